"""Images before and after, what is seen in them, and pages that show both."""

from realera_fast.evaluation.clip_judge import ClipJudge
from realera_fast.evaluation.eval_unlearn import UnlearnTechnique
from realera_fast.evaluation.evaluators import Judge, find_detector, identity_of
from realera_fast.evaluation.frechet import (
    STAYS,
    FrechetDistances,
    FrechetReference,
    InceptionFeatures,
    pictures_in,
)
from realera_fast.evaluation.grid import before_after_grid
from realera_fast.evaluation.html import ScoreLine, Table, numbers, write_html
from realera_fast.evaluation.images import (
    Group,
    Row,
    Sampling,
    generate,
    picture_warnings,
    sampling_settings,
)
from realera_fast.evaluation.metrics import Scores, accuracy
from realera_fast.evaluation.nudity import NudeNet
from realera_fast.evaluation.rows_file import write_rows
from realera_fast.evaluation.shots import Shot, is_right, judged, scores_of
from realera_fast.evaluation.verification import Verification, grouped_prompts, verify

__all__ = [
    "ClipJudge",
    "FrechetDistances",
    "FrechetReference",
    "Group",
    "InceptionFeatures",
    "Judge",
    "NudeNet",
    "Row",
    "STAYS",
    "Sampling",
    "ScoreLine",
    "Scores",
    "Shot",
    "Table",
    "UnlearnTechnique",
    "Verification",
    "accuracy",
    "before_after_grid",
    "find_detector",
    "generate",
    "grouped_prompts",
    "identity_of",
    "is_right",
    "judged",
    "numbers",
    "picture_warnings",
    "pictures_in",
    "sampling_settings",
    "scores_of",
    "verify",
    "write_html",
    "write_rows",
]
