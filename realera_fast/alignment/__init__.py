"""The second stage: LoRA factors trained on predicted noise, and the check whether they stay."""

from realera_fast.alignment.config import AlignmentConfig
from realera_fast.alignment.denoisers import (
    ClosedForm,
    check_scheduler,
    new_factors,
    sampler_of,
    shared_denoiser,
)
from realera_fast.alignment.prompts import AlignmentPrompts
from realera_fast.alignment.scheduler import ASSUMED, assumed_scheduler, distilled, find_scheduler
from realera_fast.alignment.stage import NOT_ALIGNED, Alignment, align_noise, prepared
from realera_fast.alignment.trainer import DivergedError, Trainer, loss_of
from realera_fast.alignment.windows import Points, Window, WindowFiller

__all__ = [
    "ASSUMED",
    "Alignment",
    "AlignmentConfig",
    "AlignmentPrompts",
    "ClosedForm",
    "DivergedError",
    "NOT_ALIGNED",
    "Points",
    "Trainer",
    "Window",
    "WindowFiller",
    "align_noise",
    "assumed_scheduler",
    "check_scheduler",
    "distilled",
    "find_scheduler",
    "loss_of",
    "new_factors",
    "prepared",
    "sampler_of",
    "shared_denoiser",
]
