"""The library's operations behind torch's dispatcher: schemas, checks, and who serves which device.

Each schema is defined here, once. The plain PyTorch reference, or what `streamed` writes of other
operations, is registered for every device (the meta device included, but for operations that draw
numbers, whose shapes are given here) and a kernel made for a device overrides it there: the library
``_C``, C++ on the CPU and CUDA where it was built with nvcc, and Triton. The dispatcher is the only
registry. A library that was never built leaves the reference in place; one that was built and does
not load raises, and so does a missing Triton: nothing falls back silently.

This is the only module that names the native library or ``realera_fast.kernels``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera_fast import perturbation, philox, reference, streamed

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NATIVE = Path(__file__).with_name("_C.abi3.so")

_STREAM = "int seed, int offset, int concept_offset"
_SCHEMAS = {
    "normal_equations_": "(Tensor(a!) gram, Tensor(b!) cross, Tensor source, Tensor destination, "
    "Tensor weight) -> ()",
    "gram_": "(Tensor(a!) gram, Tensor source, Tensor weight) -> ()",
    "solve_spd": "(Tensor gram, Tensor rhs) -> (Tensor, Tensor, Tensor)",
    "low_rank_update_": "(Tensor(a!)[] weights, Tensor[] left, Tensor[] right, Tensor[] offset) "
    "-> ()",
    "perturb": "(Tensor embeddings, int samples, float min_cosine, "
    f"float max_cosine, float max_distance, {_STREAM}) -> (Tensor, Tensor, Tensor)",
    "perturb_rows": f"(Tensor embeddings, Tensor alpha, Tensor scale, {_STREAM}) -> Tensor",
    "perturb_project": "(Tensor embeddings, Tensor alpha, Tensor scale, "
    "Tensor weight, Tensor? down, Tensor? up, int[] heights, float scaling, "
    f"{_STREAM}) -> Tensor",
    "perturb_project_backward": "(Tensor grad, Tensor embeddings, Tensor alpha, "
    "Tensor scale, Tensor down, Tensor up, int[] heights, float scaling, "
    f"{_STREAM}) -> (Tensor, Tensor)",
    "perturb_accumulate_": "(Tensor(a!) gram, Tensor(b!) cross, Tensor embeddings, "
    "Tensor alpha, Tensor scale, Tensor weight, Tensor? destination, "
    f"bool relative, {_STREAM}) -> ()",
    "project": "(Tensor x, Tensor weight, Tensor? down, Tensor? up, int[] heights, float scaling) "
    "-> Tensor",
    "project_into": "(Tensor(a!) y, Tensor x, Tensor weight, Tensor? down, Tensor? up, "
    "int[] heights, float scaling) -> ()",
    "project_backward": "(Tensor grad, Tensor x, Tensor down, Tensor up, int[] heights, "
    "float scaling) -> (Tensor, Tensor)",
}
_library = torch.library.Library("realera_fast", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    # What is written of other operations and serves every device comes before the reference.
    _plain = getattr(streamed, _name, None) or getattr(reference, _name)
    _library.impl(_name, _plain, "CompositeExplicitAutograd")


# Shapes alone: the references would draw all blocks of random numbers of a graph that is traced.
def _perturb_meta(embeddings: Tensor, samples: int, *_: object) -> Any:
    exact = perturbation.exact_dtype(embeddings.dtype)
    return tuple(
        embeddings.new_empty((embeddings.shape[0], samples), dtype=exact) for _ in range(3)
    )


def _perturb_rows_meta(embeddings: Tensor, alpha: Tensor, *_: object) -> Tensor:
    return embeddings.new_empty((*alpha.shape, *embeddings.shape[1:]))


def _perturb_project_meta(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    weight: Tensor,
    *_: object,
) -> Tensor:
    return embeddings.new_empty((*alpha.shape, embeddings.shape[1], len(weight)))


def _perturb_project_backward_meta(
    grad: Tensor,
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    down: Tensor,
    up: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    exact = perturbation.exact_dtype(embeddings.dtype)
    return down.new_empty(down.shape, dtype=exact), up.new_empty(up.shape, dtype=exact)


def _nothing_meta(*_: object) -> None:
    return None


_library.impl("perturb", _perturb_meta, "Meta")
_library.impl("perturb_rows", _perturb_rows_meta, "Meta")
_library.impl("perturb_project", _perturb_project_meta, "Meta")
_library.impl("perturb_project_backward", _perturb_project_backward_meta, "Meta")
_library.impl("perturb_accumulate_", _nothing_meta, "Meta")


def _triton(module: str, name: str) -> Callable[..., Any]:
    """A kernel, imported at its first call: `import realera_fast` must not need Triton."""

    def call(*arguments: Any) -> Any:
        kernels = importlib.import_module(f"realera_fast.kernels.{module}")
        return getattr(kernels, name)(*arguments)

    return call


def _gram_cuda(gram: Tensor, source: Tensor, weight: Tensor) -> None:
    # Tensor cores serve float64 rows through cuBLAS.
    kernel = reference.gram_ if source.dtype == torch.float64 else _triton("gram", "gram_")
    kernel(gram, source, weight)


_TRITON = {
    "perturb": "perturb",
    "perturb_rows": "perturb",
    "gram_": "gram",
    "project_into": "project",
    "project_backward": "project",
}
for _name, _module in _TRITON.items():
    _library.impl(_name, _gram_cuda if _name == "gram_" else _triton(_module, _name), "CUDA")


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, down, up, ctx.heights, ctx.scaling = inputs
    ctx.save_for_backward(x, down, up)


def _project_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up = ctx.saved_tensors
    if down is None:
        return (None,) * 6
    parts = torch.ops.realera_fast.project_backward(grad, x, down, up, ctx.heights, ctx.scaling)
    return None, None, parts[0].to(down.dtype), parts[1].to(up.dtype), None, None


def _save_perturbed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    embeddings, alpha, scale, _, down, up, *ctx.rest = inputs
    ctx.save_for_backward(embeddings, alpha, scale, down, up)


def _perturbed_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *drawn, down, up = ctx.saved_tensors
    if down is None:
        return (None,) * 11
    parts = torch.ops.realera_fast.perturb_project_backward(grad, *drawn, down, up, *ctx.rest)
    return (*(None,) * 4, parts[0].to(down.dtype), parts[1].to(up.dtype), *(None,) * 5)


torch.library.register_autograd(
    "realera_fast::project", _project_gradients, setup_context=_save_projection, lib=_library
)
torch.library.register_autograd(
    "realera_fast::perturb_project",
    _perturbed_gradients,
    setup_context=_save_perturbed,
    lib=_library,
)

if _NATIVE.exists():
    torch.ops.load_library(_NATIVE)


def implementations() -> dict[str, dict[str, str]]:
    """Says which implementation serves each operation.

    Returns:
        For each operation, ``{"cpu": ..., "cuda": ...}`` with the values "native" (C++ or CUDA),
        "triton", "streamed" (written of other operations, block by block) and "reference" (plain
        PyTorch).
    """

    def kind(name: str, key: str) -> str:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"realera_fast::{name}", key):
            return "streamed" if hasattr(streamed, name) else "reference"
        return "triton" if key == "CUDA" and name in _TRITON else "native"

    return {name: {"cpu": kind(name, "CPU"), "cuda": kind(name, "CUDA")} for name in _SCHEMAS}


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
    _check_sums(source, weight, gram=gram, cross=cross)
    if destination.shape != source.shape or destination.dtype != source.dtype:
        raise ValueError(
            f"destination: expected {source.dtype} {list(source.shape)} like source, "
            f"got {destination.dtype} {list(destination.shape)}"
        )
    _check_devices(source=source, destination=destination)
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


def gram_(gram: Tensor, source: Tensor, weight: Tensor) -> None:
    """Adds ``sum_i w_i x_i x_i^T`` to ``gram``, in place: the normal equations of rows that stay.

    On the CPU in float64; on CUDA float32 sums of up to some thousand rows are added in float64.

    Args:
        gram: `[d, d]` float64, contiguous and symmetric: one triangle is summed and copied.
        source: `[n, d]` rows x: float32, bfloat16, float16 or float64.
        weight: `[n]` weights w, of any floating dtype.
    """
    _check_sums(source, weight, gram=gram)
    with torch.no_grad():
        torch.ops.realera_fast.gram_(gram, source, weight)
    _changed(gram)


def perturb(
    embeddings: Tensor,
    samples: int,
    min_cosine: float,
    max_cosine: float,
    max_distance: float,
    seed: int,
    *,
    offset: int = 0,
    concept_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the scalars of random neighbors of prompt embeddings inside a region.

    A sample is ``x = alpha E + beta v`` with Gaussian ``v = rms(E) z`` (RealEra, arXiv 2410.09140,
    neighbor-concept mining). Each is accepted: the steps inside the region form one interval. The
    numbers come from a counter-based generator, so equal seeds and counters give equal bits on
    every device. The samples themselves: `perturb_rows`, and without storing
    them `perturb_project`, `perturb_accumulate_`.

    Args:
        embeddings: `[c, t, d]` prompt embeddings E; row 0, begin-of-text, never moves.
        samples: number of samples `s` of each prompt.
        min_cosine: least cosine between E and a sample.
        max_cosine: greatest cosine between E and a sample.
        max_distance: greatest distance between E and a sample, in units of ``|E|``.
        seed: key of the generator, in [0, 2^63).
        offset: first sample number, so that later calls go on where earlier ones ended.
        concept_offset: first prompt number, likewise.

    Returns:
        alpha, beta and ``scale = beta rms(E)``, `[c, s]`, float64 for float64 embeddings, else
        float32; NaN where a prompt's direction meets no point of the region.
    """
    _check_embeddings(embeddings, samples, seed, offset, concept_offset)
    if not -1.0 <= min_cosine < max_cosine <= 1.0:
        name = "min_cosine" if not -1.0 <= min_cosine < 1.0 else "max_cosine"
        raise ValueError(
            f"{name}: expected -1 <= min_cosine < max_cosine <= 1, "
            f"got {min_cosine} and {max_cosine}"
        )
    if not 0.0 < max_distance < math.inf:
        raise ValueError(f"max_distance: expected a positive number, got {max_distance}")
    with torch.no_grad():
        return torch.ops.realera_fast.perturb(
            embeddings,
            samples,
            min_cosine,
            max_cosine,
            max_distance,
            seed,
            offset,
            concept_offset,
        )


def perturb_rows(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    seed: int,
    *,
    offset: int = 0,
    concept_offset: int = 0,
) -> Tensor:
    """The samples whose scalars `perturb` has drawn: ``alpha E + scale z``.

    Args:
        embeddings, seed, offset, concept_offset: as given to `perturb`.
        alpha, scale: `[c, s]` as returned by it.

    Returns:
        `[c, s, t, d]` of the embeddings' dtype.
    """
    _check_drawn(embeddings, alpha, scale, seed, offset, concept_offset)
    with torch.no_grad():
        return torch.ops.realera_fast.perturb_rows(
            embeddings, alpha, scale, seed, offset, concept_offset
        )


def perturb_project(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    weight: Tensor,
    seed: int,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    heights: Sequence[int] | None = None,
    scaling: float = 1.0,
    offset: int = 0,
    concept_offset: int = 0,
) -> Tensor:
    """`project` of the samples of `perturb`, which are drawn block by block and not stored.

    Memory beside arguments and result is at most 64 MiB. Gradients go to ``down`` and ``up`` alone.

    Args:
        embeddings, seed, offset, concept_offset: as given to `perturb`.
        alpha, scale: `[c, s]` as returned by it.
        weight, down, up, heights, scaling: as for `project`; ``weight`` has the embeddings' dtype.

    Returns:
        `[c, s, t, m]` of the embeddings' dtype.
    """
    _check_drawn(embeddings, alpha, scale, seed, offset, concept_offset)
    heights = _check_projection("embeddings", embeddings, weight, down, up, heights)
    embeddings, alpha, scale, weight = _constants(embeddings, alpha, scale, weight)
    return torch.ops.realera_fast.perturb_project(
        embeddings,
        alpha,
        scale,
        weight,
        down,
        up,
        heights,
        scaling,
        seed,
        offset,
        concept_offset,
    )


def perturb_accumulate_(
    gram: Tensor,
    cross: Tensor,
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    weight: Tensor,
    seed: int,
    *,
    destination: Tensor | None = None,
    relative: bool = False,
    offset: int = 0,
    concept_offset: int = 0,
) -> None:
    """Adds the samples of `perturb` to the normal equations (`normal_equations_`), in place.

    The samples are drawn block by block, in float32 for 16-bit embeddings, and not stored: memory
    beside the arguments is O(d^2).

    Args:
        gram, cross: `[d, d]` float64, contiguous; ``gram`` is symmetric.
        embeddings, seed, offset, concept_offset: as given to `perturb`.
        alpha, scale: `[c, s]` as returned by it.
        weight: `[c, t]` weight of each sample of a token, of any floating dtype.
        destination: `[c, t, d]` where the samples of a token go; None: they stay, and ``cross`` is
            not changed.
        relative: whether a sample x goes to ``x + destination`` instead.
    """
    _check_drawn(embeddings, alpha, scale, seed, offset, concept_offset)
    flat = embeddings.flatten(0, 1)
    if weight.shape != embeddings.shape[:2]:
        raise ValueError(
            f"weight: expected {list(embeddings.shape[:2])}, one for each token, "
            f"got {list(weight.shape)}"
        )
    _check_sums(flat, weight.flatten(), "embeddings", gram=gram, cross=cross)
    if destination is not None:
        if destination.shape != embeddings.shape or not destination.is_floating_point():
            raise ValueError(
                f"destination: expected floating point numbers of shape {list(embeddings.shape)} "
                f"like embeddings, got {destination.dtype} {list(destination.shape)}"
            )
        _check_devices(embeddings=embeddings, destination=destination)
    with torch.no_grad():
        torch.ops.realera_fast.perturb_accumulate_(
            gram,
            cross,
            embeddings,
            alpha,
            scale,
            weight,
            destination,
            relative,
            seed,
            offset,
            concept_offset,
        )
    _changed(gram, cross)


def project(
    x: Tensor,
    weight: Tensor,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    heights: Sequence[int] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Rows times the weights of many layers at once, each with its LoRA part.

    ``y_l = x W_l^T + scaling (x A_l^T) B_l^T``. Gradients go to ``down`` and ``up`` alone: ``x``
    and ``weight`` are constants, whatever their ``requires_grad``.

    Args:
        x: `[n, d]` rows: float32, bfloat16, float16 or float64.
        weight: `[m, d]` the weights W_l one below the other, of the same dtype.
        down: `[l, r, d]` LoRA factors A_l, of the same dtype or, as master factors are, float32;
            or None.
        up: `[m, r]` LoRA factors B_l one below the other, likewise.
        heights: the number of rows of each of the l weights; None for one weight alone.
        scaling: factor of the LoRA part.

    Returns:
        `[n, m]` of the dtype of ``x``.
    """
    _check_matrix("x", x)
    heights = _check_projection("x", x, weight, down, up, heights)
    x, weight = _constants(x, weight)
    return torch.ops.realera_fast.project(x, weight, down, up, heights, scaling)


def _constants(*tensors: Tensor) -> list[Tensor]:
    # Autograd would otherwise record the operation for gradients that it does not have.
    return [tensor.detach() for tensor in tensors]


def _check_sums(source: Tensor, weight: Tensor, name: str = "source", **sums: Tensor) -> None:
    _check_matrix(name, source)
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
    _check_devices(**sums, **{name: source}, weight=weight)


def _check_embeddings(
    embeddings: Tensor,
    samples: int,
    seed: int,
    offset: int,
    concept_offset: int,
) -> None:
    if embeddings.dim() != 3 or embeddings.dtype not in perturbation.FLOATS:
        raise ValueError(
            "embeddings: expected [c, t, d] of float32, bfloat16, float16 or float64, "
            f"got {embeddings.dtype} {list(embeddings.shape)}"
        )
    concepts, tokens, width = embeddings.shape
    if (tokens - 1) * width > perturbation.MOST_ELEMENTS:
        raise ValueError(
            f"embeddings: expected at most {perturbation.MOST_ELEMENTS} elements that move, "
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


def _check_drawn(
    embeddings: Tensor,
    alpha: Tensor,
    scale: Tensor,
    seed: int,
    offset: int,
    concept_offset: int,
) -> None:
    samples = alpha.shape[-1] if alpha.dim() else 0
    _check_embeddings(embeddings, samples, seed, offset, concept_offset)
    exact = perturbation.exact_dtype(embeddings.dtype)
    for name, given in (("alpha", alpha), ("scale", scale)):
        expected = (embeddings.shape[0], samples)
        if given.shape != expected or given.dtype != exact:
            raise ValueError(
                f"{name}: expected {exact} {list(expected)} as `perturb` returns it, "
                f"got {given.dtype} {list(given.shape)}"
            )
    _check_devices(embeddings=embeddings, alpha=alpha, scale=scale)


def _check_projection(
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
    _check_devices(**given)
    return rows


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
