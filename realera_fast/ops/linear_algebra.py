"""Sums, solves and updates of many layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from realera_fast.ops.checks import (
    check_devices,
    check_matrix,
    check_sums,
    count_versions,
    memory_of,
)
from realera_fast.ops.trust import believe


def normal_equations_(
    gram: Tensor, cross: Tensor, source: Tensor, destination: Tensor, weight: Tensor
) -> None:
    """Adds weighted rows to the normal equations, in place.

    ``gram += sum_i w_i x_i x_i^T`` and ``cross += sum_i w_i (y_i - x_i) x_i^T``: the sums A and D
    of the closed form W' = W (I + D A^-1). Memory beside the arguments is O(d^2) for any ``n``.

    Args:
        gram: `[d, d]` float64, contiguous and symmetric: one triangle is summed and copied.
        cross: `[d, d]` float64, contiguous.
        source: `[n, d]` rows x: float32, bfloat16, float16 or float64.
        destination: `[n, d]` rows y, of the same dtype.
        weight: `[n]` weights w, of any floating dtype.
    """
    check_sums(source, weight, gram=gram, cross=cross)
    if destination.shape != source.shape or destination.dtype != source.dtype:
        raise ValueError(
            f"destination: expected {source.dtype} {list(source.shape)} like source, "
            f"got {destination.dtype} {list(destination.shape)}"
        )
    check_devices(source=source, destination=destination)
    believe("normal_equations_", source.device, source.dtype)
    with torch.no_grad():
        torch.ops.realera_fast.normal_equations_(gram, cross, source, destination, weight)
    count_versions(gram, cross)


def solve_spd(gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solves ``X gram = rhs`` for symmetric positive definite ``gram``, one system or a batch.

    By Cholesky factorisation. Only the lower triangle of ``gram`` is read by it, so a matrix that
    is not symmetric gives no meaningful answer.

    Args:
        gram: `[d, d]` or `[l, d, d]` float64.
        rhs: `[o, d]` or `[l, o, d]` float64.

    Returns:
        Float64 solution X, shaped like ``rhs``; `[]` or `[l]` int32 ``info``, 0 or the order of
        the first leading minor that is not positive (X then means nothing); `[]` or `[l]` float64
        estimate of the reciprocal 1-norm condition number.
    """
    batched = 3 if gram.dim() == 3 else 2
    for name, tensor in (("gram", gram), ("rhs", rhs)):
        if tensor.dim() != batched or tensor.dtype != torch.float64:
            raise ValueError(
                f"{name}: expected float64 matrices, [o, d] or a batch [l, o, d] for both "
                f"arguments, got {tensor.dtype} {list(tensor.shape)}"
            )
    if gram.shape[-2] != gram.shape[-1]:
        raise ValueError(f"gram: expected square matrices, got shape {list(gram.shape)}")
    if rhs.shape[-1] != gram.shape[-1] or rhs.shape[:-2] != gram.shape[:-2]:
        expected = [*gram.shape[:-2], "o", gram.shape[-1]]
        raise ValueError(
            f"rhs: expected shape [{', '.join(map(str, expected))}] to match gram, "
            f"got {list(rhs.shape)}"
        )
    check_devices(gram=gram, rhs=rhs)
    believe("solve_spd", gram.device, gram.dtype)
    with torch.no_grad():
        return torch.ops.realera_fast.solve_spd(gram, rhs)


def low_rank_update_(
    weights: Sequence[Tensor],
    left: Tensor | Sequence[Tensor],
    right: Tensor | Sequence[Tensor],
    offset: Sequence[Tensor] = (),
) -> None:
    """Replaces every weight ``W`` by ``W + (W left + offset) right``, in place.

    Computed in float32 (in float64 for float64 weights) and rounded once to the weight's dtype.
    Values are not checked: NaN or infinity in the factors, or a result too great for the dtype,
    end in the weights.

    Args:
        weights: `[o_i, d]` each: float32, bfloat16, float16 or float64, contiguous or not. No two
            may share memory.
        left: `[d, k]` float32 or float64, shared by all weights; or one for each weight (k may
            differ then).
        right: `[k, d]`, of the same dtype; a list if ``left`` is one.
        offset: `[o_i, k]` one for each weight, of the same dtype; or none. With it the update is
            per-layer: ``left = -X^T``, ``offset = V_l`` and ``right = R`` move the outputs for rows
            X towards the values V_l of each layer.
    """
    for name, given in (("weights", weights), ("offset", offset)):
        if isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a list of tensors, got one tensor; pass [tensor]")
    weights, offset = list(weights), list(offset)
    shared = isinstance(left, Tensor)
    if shared != isinstance(right, Tensor):
        raise ValueError("left, right: expected two tensors or two lists, got one of each")
    left = [left] if isinstance(left, Tensor) else list(left)
    right = [right] if isinstance(right, Tensor) else list(right)
    _check_updates(weights, left, right, offset, shared=shared)
    if not weights or all(factor.shape[1] == 0 for factor in left):
        return
    # A factor that is part of a weight would change while it is read.
    written = {memory_of(weight) for weight in weights}
    left, right, offset = (
        [t.clone() if memory_of(t) in written else t for t in given]
        for given in (left, right, offset)
    )
    for dtype in {weight.dtype for weight in weights}:
        believe("low_rank_update_", weights[0].device, dtype)
    with torch.no_grad():
        torch.ops.realera_fast.low_rank_update_(weights, left, right, offset)
    count_versions(*weights)


def _check_updates(
    weights: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    offset: list[Tensor],
    *,
    shared: bool,
) -> None:
    """Checks the arguments of `low_rank_update_`; `shared`: one left and right for all weights."""
    for_each = {} if shared else {"left": left, "right": right}
    if offset:
        for_each["offset"] = offset
    for name, given in for_each.items():
        if len(given) != len(weights):
            raise ValueError(
                f"{name}: expected {len(weights)} tensors, one for each weight, got {len(given)}"
            )
    named: dict[str, Tensor] = {}
    for i, (left_factor, right_factor) in enumerate(zip(left, right, strict=True)):
        index = "" if shared else f"[{i}]"
        _check_factors(index, left_factor, right_factor, left[0].dtype)
        named |= {f"left{index}": left_factor, f"right{index}": right_factor}
    spans: dict[int | None, list[_Span]] = {}
    for i, weight in enumerate(weights):
        left_factor = left[0 if shared else i]
        _check_weight(f"weights[{i}]", weight, left_factor)
        _check_apart(i, weight, spans)
        named[f"weights[{i}]"] = weight
        if offset:
            _check_offset(f"offset[{i}]", offset[i], weight, left_factor)
            named[f"offset[{i}]"] = offset[i]
    check_devices(**named)


def _check_factors(index: str, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Checks one pair of factors, named `left` and `right` plus `index`, to be of `dtype`."""
    check_matrix(f"left{index}", left, (torch.float32, torch.float64))
    check_matrix(f"right{index}", right, (torch.float32, torch.float64))
    if right.shape != left.shape[::-1] or right.dtype != dtype or left.dtype != right.dtype:
        raise ValueError(
            f"right{index}: expected {dtype} {list(left.shape[::-1])} to match left{index}, "
            f"got {right.dtype} {list(right.shape)} beside {left.dtype}"
        )


def _check_weight(name: str, weight: Tensor, left: Tensor) -> None:
    check_matrix(name, weight)
    if weight.shape[1] != left.shape[0]:
        raise ValueError(
            f"{name}: expected shape [o, {left.shape[0]}] (the height of left), "
            f"got {list(weight.shape)}"
        )
    if any(
        size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)
    ):
        raise ValueError(f"{name}: is an expanded view and can't be changed in place; clone it")


def _check_offset(name: str, offset: Tensor, weight: Tensor, left: Tensor) -> None:
    expected = (weight.shape[0], left.shape[1])
    if offset.shape != expected or offset.dtype != left.dtype:
        raise ValueError(
            f"{name}: expected {left.dtype} {list(expected)}, "
            f"got {offset.dtype} {list(offset.shape)}"
        )


class _Span(NamedTuple):
    """The addresses from `start` to before `end` that a weight occupies."""

    start: int
    end: int
    weight_index: int


def _check_apart(index: int, weight: Tensor, spans: dict[int | None, list[_Span]]) -> None:
    """Adds a weight to `spans` (by storage); raises if it shares bytes with one of them."""
    if weight.device.type == "meta" or weight.numel() == 0:
        return
    # What is not contiguous may lie between the elements of another, as two columns do.
    size = weight.nbytes if weight.is_contiguous() else weight.element_size()
    own = _Span(weight.data_ptr(), weight.data_ptr() + size, index)
    others = spans.setdefault(memory_of(weight), [])
    for other in others:
        if other.start < own.end and own.start < other.end:
            raise ValueError(
                f"weights[{index}]: shares its memory with weights[{other.weight_index}]; "
                "pass it once"
            )
    others.append(own)


def gram_(gram: Tensor, source: Tensor, weight: Tensor) -> None:
    """Adds ``sum_i w_i x_i x_i^T`` to ``gram``, in place: the normal equations of rows that stay.

    On the CPU in float64; on CUDA float32 sums of up to some thousand rows are added in float64.

    Args:
        gram: `[d, d]` float64, contiguous and symmetric: one triangle is summed and copied.
        source: `[n, d]` rows x: float32, bfloat16, float16 or float64.
        weight: `[n]` weights w, of any floating dtype.
    """
    check_sums(source, weight, gram=gram)
    believe("gram_", source.device, source.dtype)
    with torch.no_grad():
        torch.ops.realera_fast.gram_(gram, source, weight)
    count_versions(gram)
