"""The closed form: rows into normal equations, solved for all layers at once."""

from realera_fast.solver.closed_form import (
    NormalEquations,
    Solution,
    solve_layers,
)
from realera_fast.solver.concept_map import ConceptMap
from realera_fast.solver.config import ClosedFormConfig
from realera_fast.solver.fit_values import fit_values_
from realera_fast.solver.incremental import IncrementalSystem
from realera_fast.solver.least_squares import SingularSystemError
from realera_fast.solver.prompt_gate import PromptGate
from realera_fast.solver.prompt_map import PromptMap, is_prompt_map
from realera_fast.solver.rows import Pairs
from realera_fast.solver.value_space import NAMED_WEIGHT, ValueSystem

__all__ = [
    "ClosedFormConfig",
    "ConceptMap",
    "IncrementalSystem",
    "NAMED_WEIGHT",
    "NormalEquations",
    "Pairs",
    "PromptGate",
    "PromptMap",
    "SingularSystemError",
    "Solution",
    "ValueSystem",
    "fit_values_",
    "is_prompt_map",
    "solve_layers",
]
