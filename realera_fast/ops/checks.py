"""Checks of arguments that several ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realera_fast.ops import perturb_reference, philox

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def without_gradients(*tensors: Tensor) -> list[Tensor]:
    # Autograd would otherwise record the operation for gradients that it does not have.
    return [tensor.detach() for tensor in tensors]


def needs_gradients(*factors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in factors)


def check_sums(source: Tensor, weight: Tensor, name: str = "source", **sums: Tensor) -> None:
    check_matrix(name, source)
    width = source.shape[1]
    for sum_name, total in sums.items():
        if total.shape != (width, width) or total.dtype != torch.float64:
            raise ValueError(
                f"{sum_name}: expected a float64 tensor of shape [{width}, {width}] (the width of "
                f"{name}), got {total.dtype} {list(total.shape)}"
            )
        if not total.is_contiguous():
            raise ValueError(f"{sum_name}: expected a contiguous tensor, as it is changed in place")
    if weight.shape != source.shape[:1] or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected floating point numbers of shape [{source.shape[0]}] (one for each "
            f"row of {name}), got {weight.dtype} {list(weight.shape)}"
        )
    check_devices(**sums, **{name: source}, weight=weight)


def check_embeddings(
    embeddings: Tensor,
    samples: int,
    seed: int,
    offset: int,
    concept_offset: int,
) -> None:
    if embeddings.dim() != 3 or embeddings.dtype not in perturb_reference.FLOATS:
        raise ValueError(
            "embeddings: expected [c, t, d] of float32, bfloat16, float16 or float64, "
            f"got {embeddings.dtype} {list(embeddings.shape)}"
        )
    concepts, tokens, width = embeddings.shape
    if (tokens - 1) * width > perturb_reference.MOST_ELEMENTS:
        raise ValueError(
            f"embeddings: expected at most {perturb_reference.MOST_ELEMENTS} elements that move, "
            f"got {tokens - 1} tokens of {width}"
        )
    philox.check_seed(seed)
    for name, first, count in (
        ("offset", offset, samples),
        ("concept_offset", concept_offset, concepts),
    ):
        if first < 0 or count < 0 or first + count > 1 << 32:
            raise ValueError(
                f"{name}: counters are in [0, 2^32], got {first} and {count} more from there"
            )


def check_drawn(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    seed: int,
    offset: int,
    concept_offset: int,
) -> None:
    samples = alpha.shape[-1] if alpha.dim() else 0
    check_embeddings(embeddings, samples, seed, offset, concept_offset)
    exact = perturb_reference.exact_dtype(embeddings.dtype)
    for name, given in (("alpha", alpha), ("scale", scale)):
        expected = (embeddings.shape[0], samples)
        if given.shape != expected or given.dtype != exact:
            raise ValueError(
                f"{name}: expected {exact} {list(expected)} as `perturb` returns it, "
                f"got {given.dtype} {list(given.shape)}"
            )
    check_devices(embeddings=embeddings, alpha=alpha, scale=scale)


def check_projection(
    name: str,
    x: Tensor,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    heights: Sequence[int] | None,
) -> list[int]:
    width = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.dtype != x.dtype:
        raise ValueError(
            f"weight: expected {x.dtype} [m, {width}] like {name}, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    rows = [len(weight)] if heights is None else [int(height) for height in heights]
    if sum(rows) != len(weight) or any(height < 0 for height in rows):
        raise ValueError(
            f"heights: expected numbers that sum to the {len(weight)} rows of weight, got {rows}"
        )
    if (down is None) != (up is None):
        raise ValueError("down, up: expected both LoRA factors or none, got one")
    given = {name: x, "weight": weight}
    if down is not None and up is not None:
        rank = down.shape[1] if down.dim() == 3 else "r"
        for factor_name, factor, expected in (
            ("down", down, [len(rows), rank, width]),
            ("up", up, [len(weight), rank]),
        ):
            if list(factor.shape) != expected or factor.dtype not in (x.dtype, torch.float32):
                raise ValueError(
                    f"{factor_name}: expected {x.dtype} or float32 "
                    f"[{', '.join(map(str, expected))}], got {factor.dtype} {list(factor.shape)}"
                )
        given |= {"down": down, "up": up}
    check_devices(**given)
    return rows


def check_matrix(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = _FLOATING) -> None:
    if tensor.dim() != 2 or tensor.dtype not in dtypes:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected a matrix of {kinds}, got {tensor.dtype} {list(tensor.shape)}"
        )


def count_versions(*tensors: Tensor) -> None:
    # Native code writes memory directly; autograd only notices through the version counter.
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def memory_of(tensor: Tensor) -> int | None:
    return None if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


def check_devices(**tensors: Tensor) -> None:
    names = list(tensors)
    for name in names[1:]:
        if tensors[name].device != tensors[names[0]].device:
            raise ValueError(
                f"{name}: is on {tensors[name].device}, but {names[0]} is on "
                f"{tensors[names[0]].device}; move one of them"
            )
