"""The library's operations behind torch's dispatcher: schemas, checks, and who serves which device.

Each schema is defined here, once. The plain PyTorch reference is registered for every device (the
meta device included, so no separate fake function is needed) and a kernel made for a device
overrides it there: the library ``_C``, C++ on the CPU and CUDA where it was built with nvcc, and
Triton. The dispatcher is the only registry. A library that was never built leaves the reference in
place; one that was built and does not load raises, and so does a missing Triton: nothing falls
back silently.

This is the only module that names the native library or ``realera_fast.kernels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from realera_fast import philox, reference

_NAMES = ("low_rank_update_", "normal_equations_", "perturb", "solve_spd")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NATIVE = Path(__file__).with_name("_C.abi3.so")

_library = torch.library.Library("realera_fast", "DEF")
for _schema in (
    "normal_equations_(Tensor(a!) gram, Tensor(b!) cross, Tensor source, Tensor destination, "
    "Tensor weight) -> ()",
    "solve_spd(Tensor gram, Tensor rhs) -> (Tensor, Tensor, Tensor)",
    "low_rank_update_(Tensor(a!)[] weights, Tensor[] left, Tensor[] right, Tensor[] offset) -> ()",
    "perturb(Tensor embeddings, int samples, float min_cosine, float max_cosine, "
    "float max_distance, int seed, int offset) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name in _NAMES:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _perturb_cuda(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # Imported at the first call: `import realera_fast` must not need Triton.
    from realera_fast.kernels import perturb as kernel

    return kernel.perturb(embeddings, samples, min_cosine, max_cosine, max_distance, seed, offset)


_library.impl("perturb", _perturb_cuda, "CUDA")

if _NATIVE.exists():
    torch.ops.load_library(_NATIVE)


def implementations() -> dict[str, dict[str, str]]:
    """Says which implementation serves each operation.

    Returns:
        For each operation, ``{"cpu": ..., "cuda": ...}`` with the values "native" (C++ or CUDA),
        "triton" and "reference" (plain PyTorch).
    """

    def kind(name: str, key: str) -> str:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"realera_fast::{name}", key):
            return "reference"
        return "triton" if (name, key) == ("perturb", "CUDA") else "native"

    return {name: {"cpu": kind(name, "CPU"), "cuda": kind(name, "CUDA")} for name in _NAMES}


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
    _check_matrix("source", source)
    width = source.shape[1]
    for name, total in (("gram", gram), ("cross", cross)):
        if total.shape != (width, width) or total.dtype != torch.float64:
            raise ValueError(
                f"{name}: expected a float64 tensor of shape [{width}, {width}] (the width of "
                f"source), got {total.dtype} {list(total.shape)}"
            )
        if not total.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, as it is changed in place")
    if destination.shape != source.shape or destination.dtype != source.dtype:
        raise ValueError(
            f"destination: expected {source.dtype} {list(source.shape)} like source, "
            f"got {destination.dtype} {list(destination.shape)}"
        )
    if weight.shape != source.shape[:1] or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected floating point numbers of shape [{source.shape[0]}] (one for each "
            f"row of source), got {weight.dtype} {list(weight.shape)}"
        )
    _check_devices(gram=gram, cross=cross, source=source, destination=destination, weight=weight)
    with torch.no_grad():
        torch.ops.realera_fast.normal_equations_(gram, cross, source, destination, weight)
    _changed(gram, cross)


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
    _check_devices(gram=gram, rhs=rhs)
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
    alone = isinstance(left, Tensor)
    if alone != isinstance(right, Tensor):
        raise ValueError("left, right: expected two tensors or two lists, got one of each")
    left = [left] if isinstance(left, Tensor) else list(left)
    right = [right] if isinstance(right, Tensor) else list(right)
    for name, given in (("left", left), ("right", right), ("offset", offset)):
        optional = name == "offset" and not given
        if len(given) != len(weights) and not optional and not (alone and name != "offset"):
            raise ValueError(
                f"{name}: expected {len(weights)} tensors, one for each weight, got {len(given)}"
            )
    named: dict[str, Tensor] = {}
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        names = ("left", "right") if alone else (f"left[{i}]", f"right[{i}]")
        named |= {names[0]: a, names[1]: b}
        _check_matrix(names[0], a, (torch.float32, torch.float64))
        _check_matrix(names[1], b, (torch.float32, torch.float64))
        if b.shape != a.shape[::-1] or b.dtype != left[0].dtype or a.dtype != b.dtype:
            raise ValueError(
                f"{names[1]}: expected {left[0].dtype} {list(a.shape[::-1])} to match {names[0]}, "
                f"got {b.dtype} {list(b.shape)} beside {a.dtype}"
            )
    seen: dict[int | None, list[tuple[int, int, int]]] = {}
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        _check_matrix(name, weight)
        thin = left[0 if alone else i]
        if weight.shape[1] != thin.shape[0]:
            raise ValueError(
                f"{name}: expected shape [o, {thin.shape[0]}] (the height of left), "
                f"got {list(weight.shape)}"
            )
        if any(
            size > 1 and stride == 0
            for size, stride in zip(weight.shape, weight.stride(), strict=True)
        ):
            raise ValueError(f"{name}: is an expanded view and can't be changed in place; clone it")
        if weight.device.type != "meta" and weight.numel() > 0:
            # What is not contiguous may lie between the elements of another, as two columns do.
            size = weight.nbytes if weight.is_contiguous() else weight.element_size()
            start = weight.data_ptr()
            spans = seen.setdefault(_memory(weight), [])
            for first, last, other in spans:
                if start < last and first < start + size:
                    raise ValueError(
                        f"{name}: shares its memory with weights[{other}]; pass it once"
                    )
            spans.append((start, start + size, i))
        named[name] = weight
        if offset:
            expected = (weight.shape[0], thin.shape[1])
            named[f"offset[{i}]"] = offset[i]
            if offset[i].shape != expected or offset[i].dtype != thin.dtype:
                raise ValueError(
                    f"offset[{i}]: expected {thin.dtype} {list(expected)}, "
                    f"got {offset[i].dtype} {list(offset[i].shape)}"
                )
    _check_devices(**named)
    if not weights or all(thin.shape[1] == 0 for thin in left):
        return
    # A factor that is part of a weight would change while it is read.
    written = {_memory(weight) for weight in weights}
    left, right, offset = (
        [t.clone() if _memory(t) in written else t for t in given]
        for given in (left, right, offset)
    )
    with torch.no_grad():
        torch.ops.realera_fast.low_rank_update_(weights, left, right, offset)
    _changed(*weights)


def perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws random neighbors of prompt embeddings inside a region of cosine and distance.

    A sample is ``x = alpha E + beta v`` with Gaussian ``v`` (RealEra, arXiv 2410.09140, neighbor-
    concept mining). The numbers come from a counter-based generator, so equal seeds and offsets
    give equal samples on every device. Row 0, the begin-of-text token, never moves.

    Args:
        embeddings: `[c, t, d]` prompt embeddings E.
        samples: number of samples `s` of each prompt.
        min_cosine: least cosine between E and a sample.
        max_cosine: greatest cosine between E and a sample.
        max_distance: greatest distance between E and a sample, in units of ``|E|``.
        seed: key of the generator.
        offset: first sample number, so that later calls go on where earlier ones ended.

    Returns:
        `[c, s, t, d]` samples; `[c, s]` alpha; `[c, s]` beta.
    """
    philox.check_perturb(embeddings, samples, min_cosine, max_cosine, max_distance, seed, offset)
    with torch.no_grad():
        return torch.ops.realera_fast.perturb(
            embeddings, samples, min_cosine, max_cosine, max_distance, seed, offset
        )


def _check_matrix(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = _FLOATING) -> None:
    if tensor.dim() != 2 or tensor.dtype not in dtypes:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected a matrix of {kinds}, got {tensor.dtype} {list(tensor.shape)}"
        )


def _changed(*tensors: Tensor) -> None:
    # Native code writes memory directly; autograd only notices through the version counter.
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _memory(tensor: Tensor) -> int | None:
    return None if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


def _check_devices(**tensors: Tensor) -> None:
    names = list(tensors)
    for name in names[1:]:
        if tensors[name].device != tensors[names[0]].device:
            raise ValueError(
                f"{name}: is on {tensors[name].device}, but {names[0]} is on "
                f"{tensors[names[0]].device}; move one of them"
            )
