"""The library's operations behind torch's dispatcher: schemas, checks, and who serves which device.

Each schema is defined here, once. The plain PyTorch reference, or what `blockwise` writes of other
operations, is registered for every device (the meta device included, but for operations that draw
numbers, whose shapes are given here) and a kernel made for a device overrides it there: the library
``_C``, C++ on the CPU and CUDA where it was built with nvcc, and Triton. The dispatcher is the only
registry. A library that was never built leaves the reference in place; one that was built and does
not load raises, and so does a missing Triton: nothing falls back silently.

This is the only module that names the native library or ``realera_fast.kernels``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera_fast.ops import blockwise, perturb_reference, reference

_NATIVE = Path(__file__).parents[1] / "_C.abi3.so"

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
    _plain = getattr(blockwise, _name, None) or getattr(reference, _name)
    _library.impl(_name, _plain, "CompositeExplicitAutograd")


# Shapes alone: the references would draw all blocks of random numbers of a graph that is traced.
def _perturb_meta(embeddings: Tensor, samples: int, *_: object) -> Any:
    exact = perturb_reference.exact_dtype(embeddings.dtype)
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
    exact = perturb_reference.exact_dtype(embeddings.dtype)
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
            return "streamed" if hasattr(blockwise, name) else "reference"
        return "triton" if key == "CUDA" and name in _TRITON else "native"

    return {name: {"cpu": kind(name, "CPU"), "cuda": kind(name, "CUDA")} for name in _SCHEMAS}
