"""The library's operations: what is registered, checked arguments, and who serves which device."""

from realera_fast.ops import perturb_reference, philox
from realera_fast.ops.linear_algebra import gram_, low_rank_update_, normal_equations_, solve_spd
from realera_fast.ops.perturbation import (
    perturb,
    perturb_accumulate_,
    perturb_project,
    perturb_rows,
)
from realera_fast.ops.projection import project
from realera_fast.ops.registry import implementations
from realera_fast.ops.trust import check_kernels, distrusted
from realera_fast.ops.verdicts import Verdict

__all__ = [
    "Verdict",
    "check_kernels",
    "distrusted",
    "gram_",
    "implementations",
    "low_rank_update_",
    "normal_equations_",
    "perturb",
    "perturb_accumulate_",
    "perturb_project",
    "perturb_reference",
    "perturb_rows",
    "philox",
    "project",
    "solve_spd",
]
