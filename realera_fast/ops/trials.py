"""Small fixed cases of every operation that has kernels, and how far a result is from the exact.

Each is run in two sizes: odd ones, which no tile divides, and aligned ones of more than one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from realera_fast.ops import perturb_reference, reference
from realera_fast.ops.tolerance import limits, product_error

_DOUBLE = torch.float64
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TINY = torch.finfo(_DOUBLE).tiny
_SCALING = 0.7
_REGION = (0.5, 0.9, 1.6)
_COUNTERS = (7, 3, 1)
"""Seed, first sample and first prompt."""


class _Size(NamedTuple):
    rows: int
    width: int
    heights: tuple[int, ...]
    rank: int


_SIZES = (_Size(37, 33, (3, 20, 5), 5), _Size(130, 160, (32, 64, 48), 16))


@dataclass(frozen=True)
class Trial:
    """Arguments on the CPU, and what must come of them."""

    arguments: tuple[Any, ...]
    results: Callable[[tuple[Any, ...], Any], Sequence[Tensor]]
    """Of the arguments after a call and of what it returned: what is compared."""
    exact: Sequence[Tensor]
    floors: Sequence[Tensor | None] | None
    """As `tolerance.limits` takes them, one for each result; None: all are equal to the bit."""


class Distance(NamedTuple):
    """An error, and what is allowed in its place."""

    error: float
    limit: float

    @property
    def share(self) -> float:
        """Of what is allowed; more than 1 is too much."""
        return self.error / max(self.limit, _TINY)


def run(call: Callable[..., Any], trial: Trial, device: torch.device) -> list[Tensor]:
    """Calls an operation on copies of the arguments on a device; the results on the CPU."""

    def there(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [there(each) for each in value]
        return value.to(device, copy=True) if isinstance(value, Tensor) else value

    arguments = tuple(there(value) for value in trial.arguments)
    returned = call(*arguments)
    return [result.cpu() for result in trial.results(arguments, returned)]


def distance(trial: Trial, got: Sequence[Tensor], plain: Sequence[Tensor]) -> Distance:
    """How far results are from the exact ones, where that is the greatest share of the limit.

    Args:
        plain: those of plain PyTorch on the same device.
    """
    worst = Distance(0.0, 0.0)
    for i, (ours, exact, theirs) in enumerate(zip(got, trial.exact, plain, strict=True)):
        if ours.shape != exact.shape or not torch.equal(ours.isfinite(), exact.isfinite()):
            return Distance(math.inf, 0.0)
        # Equal infinities and NaN have no distance.
        errors = (ours.to(_DOUBLE) - exact.to(_DOUBLE)).abs().nan_to_num(0.0)
        if trial.floors is None or not exact.is_floating_point():
            most = torch.zeros_like(errors)
        else:
            most = limits(ours, exact, theirs, trial.floors[i])
        place = int((errors / most.clamp_min(_TINY)).argmax())
        found = Distance(float(errors.flatten()[place]), float(most.flatten()[place]))
        worst = max(worst, found, key=lambda each: (each.share, each.limit))
    return worst


class _Numbers:
    """Random numbers that are the same everywhere and leave torch's own generators alone."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = _DOUBLE) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, dtype=_DOUBLE, device="cpu")
        return drawn.to(dtype)

    def weights(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator, dtype=torch.float32, device="cpu")


def _eye(width: int) -> Tensor:
    return torch.eye(width, dtype=_DOUBLE, device="cpu")


def _normal_equations(size: _Size, dtype: torch.dtype, numbers: _Numbers, _: str) -> list[Trial]:
    x, y = (numbers.normal(size.rows, size.width, dtype=dtype) for _ in range(2))
    y[::3] = x[::3]
    w = numbers.weights(size.rows)
    gram, cross = _eye(size.width), _eye(size.width)
    exact = gram.clone(), cross.clone()
    reference.normal_equations_(*exact, x, y, w)
    x64, y64, w64 = x.double(), y.double(), w.double()[:, None]
    floors = product_error(x64.mT, w64 * x64), product_error((w64 * (y64 - x64)).mT, x64)
    return [Trial((gram, cross, x, y, w), lambda given, _: given[:2], exact, floors)]


def _gram(size: _Size, dtype: torch.dtype, numbers: _Numbers, device: str) -> list[Trial]:
    x = numbers.normal(size.rows, size.width, dtype=dtype)
    w = numbers.weights(size.rows)
    gram = _eye(size.width)
    exact = gram.clone()
    reference.gram_(exact, x, w)
    # In float64 on the CPU; elsewhere sums in float32 are allowed.
    factor = x.double() if device == "cpu" else x
    floor = product_error(factor.mT, w.to(factor.dtype)[:, None] * factor)
    return [Trial((gram, x, w), lambda given, _: given[:1], [exact], [floor])]


def _solve_spd(size: _Size, dtype: torch.dtype, numbers: _Numbers, _: str) -> list[Trial]:
    width = size.width
    half = numbers.normal(2, width, width, dtype=dtype)
    gram = half @ half.mT / width + _eye(width)
    gram = (gram + gram.mT) / 2
    rhs = numbers.normal(2, 7, width, dtype=dtype)
    exact = reference.solve_spd(gram, rhs)
    floors = []
    for matrix, solution in zip(gram, exact[0], strict=True):
        factor = torch.linalg.cholesky(matrix)
        # A system within eps |L| |L^T| of the given one is solved (Higham, Accuracy and Stability
        # of Numerical Algorithms, theorem 10.4), with sums of up to d terms three times.
        inverse = torch.linalg.inv(matrix)
        floors.append(product_error(solution, factor, factor.mT, _eye(width), inverse))
    estimated = torch.full_like(exact[2], width * torch.finfo(_DOUBLE).eps)
    indefinite = _eye(width)
    indefinite[-2, -2] = -1.0
    bad = indefinite, rhs[0]
    return [
        Trial((gram, rhs), lambda _, got: got, exact, (torch.stack(floors), None, estimated)),
        # Of what has no solution only that it is said to have none.
        Trial(bad, lambda _, got: got[1:], reference.solve_spd(*bad)[1:], (None, None)),
    ]


def _low_rank_update(size: _Size, dtype: torch.dtype, numbers: _Numbers, _: str) -> list[Trial]:
    inner = torch.promote_types(dtype, torch.float32)
    weights = [numbers.normal(o, size.width, dtype=dtype) for o in (1, 70, size.rows)]
    left = [numbers.normal(size.width, size.rank, dtype=inner) / size.width]
    right = [numbers.normal(size.rank, size.width, dtype=inner)]
    offset = [numbers.normal(len(w), size.rank, dtype=inner) for w in weights]
    exact = [w.to(_DOUBLE, copy=True) for w in weights]
    doubles = ([t.double() for t in each] for each in (left, right, offset))
    reference.low_rank_update_(exact, *doubles)
    floors = [
        product_error(w, left[0], right[0]) + product_error(o, right[0])
        for w, o in zip(weights, offset, strict=True)
    ]
    return [Trial((weights, left, right, offset), lambda given, _: given[0], exact, floors)]


def _embeddings(size: _Size, dtype: torch.dtype, numbers: _Numbers) -> Tensor:
    return numbers.normal(2, 5, size.width, dtype=dtype)


def _perturb(size: _Size, dtype: torch.dtype, numbers: _Numbers, _: str) -> list[Trial]:
    given = (_embeddings(size, dtype, numbers), 3, *_REGION, *_COUNTERS)
    return [Trial(given, lambda _, got: got, reference.perturb(*given), None)]


def _perturb_rows(size: _Size, dtype: torch.dtype, numbers: _Numbers, _: str) -> list[Trial]:
    exact = perturb_reference.exact_dtype(dtype)
    alpha, scale = (numbers.normal(2, 3, dtype=exact) for _ in range(2))
    given = (_embeddings(size, dtype, numbers), alpha, scale, *_COUNTERS)
    return [Trial(given, lambda _, got: [got], [reference.perturb_rows(*given)], None)]


class _Projection(NamedTuple):
    x: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor


def _projection(size: _Size, dtype: torch.dtype, numbers: _Numbers) -> _Projection:
    outputs, layers = sum(size.heights), len(size.heights)
    # Master factors are float32 beside rows of 16 bits.
    master = torch.promote_types(dtype, torch.float32)
    return _Projection(
        numbers.normal(size.rows, size.width, dtype=dtype),
        numbers.normal(outputs, size.width, dtype=dtype),
        numbers.normal(layers, size.rank, size.width, dtype=master) / size.width,
        numbers.normal(outputs, size.rank, dtype=master),
    )


def _rounded_product(dtype: torch.dtype, *factors: Tensor) -> Tensor:
    """What a product of three matrices errs by if the first product is rounded to `dtype`."""
    magnitude = factors[0].double().abs()
    for factor in factors[1:]:
        magnitude = magnitude @ factor.double().abs()
    return product_error(*factors) + torch.finfo(dtype).eps * magnitude


def _project_into(size: _Size, dtype: torch.dtype, numbers: _Numbers, _: str) -> list[Trial]:
    given = _projection(size, dtype, numbers)
    x, weight, down, up = (t.to(dtype).double() for t in given)
    exact = reference.project(x, weight, down, up, size.heights, _SCALING)
    parts = zip(down, up.split(size.heights), strict=True)
    added = [_rounded_product(dtype, given.x, a.mT.to(dtype), b.mT.to(dtype)) for a, b in parts]
    floor = product_error(given.x, given.weight.mT) + _SCALING * torch.cat(added, dim=1)
    y = torch.full_like(exact, torch.nan, dtype=dtype)
    arguments = (y, *given, list(size.heights), _SCALING)
    return [Trial(arguments, lambda given, _: given[:1], [exact], [floor])]


def _project_backward(size: _Size, dtype: torch.dtype, numbers: _Numbers, _: str) -> list[Trial]:
    given = _projection(size, dtype, numbers)
    grad = numbers.normal(size.rows, sum(size.heights), dtype=dtype)
    g, x, down, up = (t.to(dtype).double() for t in (grad, given.x, given.down, given.up))
    exact = reference.project_backward(g, x, down, up, size.heights, _SCALING)
    floors: tuple[list[Tensor], list[Tensor]] = ([], [])
    layers = (g.split(size.heights, dim=1), down, up.split(size.heights))
    for each in zip(*layers, strict=True):
        part, a, b = (t.to(dtype) for t in each)
        floors[0].append(_rounded_product(dtype, b.mT, part.mT, given.x))
        floors[1].append(_rounded_product(dtype, part.mT, given.x, a.mT))
    allowed = _SCALING * torch.stack(floors[0]), _SCALING * torch.cat(floors[1])
    arguments = (grad, given.x, given.down, given.up, list(size.heights), _SCALING)
    return [Trial(arguments, lambda _, got: got, exact, allowed)]


_MAKERS: dict[str, Callable[[_Size, torch.dtype, _Numbers, str], list[Trial]]] = {
    "normal_equations_": _normal_equations,
    "gram_": _gram,
    "solve_spd": _solve_spd,
    "low_rank_update_": _low_rank_update,
    "perturb": _perturb,
    "perturb_rows": _perturb_rows,
    "project_into": _project_into,
    "project_backward": _project_backward,
}


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes in which an operation is tried where nobody has asked for one."""
    return (_DOUBLE,) if name == "solve_spd" else _FLOATS


def trials(name: str, dtype: torch.dtype, device: torch.device) -> list[Trial]:
    """The cases of an operation for rows, embeddings or weights of this dtype."""
    return [
        trial
        for seed, size in enumerate(_SIZES)
        for trial in _MAKERS[name](size, dtype, _Numbers(seed), device.type)
    ]
