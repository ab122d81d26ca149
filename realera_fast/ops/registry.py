"""The library's operations behind torch's dispatcher: what each takes and who serves which device.

Each operation is one `Op` of `OPS`, and one loop registers them. The plain PyTorch reference, or
what `blockwise` writes of other operations, serves every device (the meta device included, but for
operations that draw numbers, whose shapes are given here) and a kernel made for a device overrides
it there: the library ``_C``, C++ on the CPU and CUDA where it was built with nvcc, and Triton. The
dispatcher is the only registry. A library that was never built leaves the reference in place; one
that was built and does not load raises. A kernel that fails its first check (`trust`), as without
Triton, is overridden in turn by what is plain: nothing falls back silently.

This is the only module that names the native library or ``realera_fast.kernels``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from realera_fast.ops import blockwise, perturb_reference, reference

_NATIVE = Path(__file__).parents[1] / "_C.abi3.so"

_STREAM = "int seed, int offset, int concept_offset"


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


# Kernels are imported at their first call: `import realera_fast` must not need Triton.
def _perturb_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from realera_fast.kernels import perturb

    return perturb.perturb(*arguments)


def _perturb_rows_triton(*arguments: Any) -> Tensor:
    from realera_fast.kernels import perturb

    return perturb.perturb_rows(*arguments)


def _gram_triton(gram: Tensor, source: Tensor, weight: Tensor) -> None:
    if source.dtype == torch.float64:
        # Tensor cores serve float64 rows through cuBLAS.
        reference.gram_(gram, source, weight)
        return
    from realera_fast.kernels import gram as kernels

    kernels.gram_(gram, source, weight)


def _project_into_triton(*arguments: Any) -> None:
    from realera_fast.kernels import project

    project.project_into(*arguments)


def _project_backward_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from realera_fast.kernels import project

    return project.project_backward(*arguments)


class _Project(NamedTuple):
    """The inputs of `project`, or their gradients: None for what has none."""

    x: Any = None
    weight: Any = None
    down: Any = None
    up: Any = None
    heights: Any = None
    scaling: Any = None


def _save_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = _Project(*inputs)
    ctx.save_for_backward(given.x, given.down, given.up)
    ctx.heights = given.heights
    ctx.scaling = given.scaling


def _project_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up = ctx.saved_tensors
    if down is None:
        return _Project()
    grad_down, grad_up = torch.ops.realera_fast.project_backward(
        grad, x, down, up, ctx.heights, ctx.scaling
    )
    return _Project(down=grad_down.to(down.dtype), up=grad_up.to(up.dtype))


class _PerturbProject(NamedTuple):
    """The inputs of `perturb_project`, or their gradients: None for what has none."""

    embeddings: Any = None
    alpha: Any = None
    scale: Any = None
    weight: Any = None
    down: Any = None
    up: Any = None
    heights: Any = None
    scaling: Any = None
    seed: Any = None
    offset: Any = None
    concept_offset: Any = None


def _save_perturb_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = _PerturbProject(*inputs)
    ctx.save_for_backward(given.embeddings, given.alpha, given.scale, given.down, given.up)
    ctx.heights = given.heights
    ctx.scaling = given.scaling
    ctx.seed = given.seed
    ctx.offset = given.offset
    ctx.concept_offset = given.concept_offset


def _perturb_project_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    embeddings, alpha, scale, down, up = ctx.saved_tensors
    if down is None:
        return _PerturbProject()
    grad_down, grad_up = torch.ops.realera_fast.perturb_project_backward(
        grad,
        embeddings,
        alpha,
        scale,
        down,
        up,
        ctx.heights,
        ctx.scaling,
        ctx.seed,
        ctx.offset,
        ctx.concept_offset,
    )
    return _PerturbProject(down=grad_down.to(down.dtype), up=grad_up.to(up.dtype))


class Gradient(NamedTuple):
    """How autograd differentiates an operation."""

    save: Callable[[Any, tuple[Any, ...], Any], None]
    """Keeps of the inputs what `backward` needs."""
    backward: Callable[..., tuple[Tensor | None, ...]]
    """A gradient for each input, None for what has none."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation: what it takes, what defines it and what serves it."""

    name: str
    schema: str
    """Arguments and results, in torch's schema language."""
    plain: Callable[..., Any]
    """Serves every device: plain PyTorch, or written of other operations."""
    meta: Callable[..., Any] | None = None
    """Shapes alone, for the meta device; None: `plain` serves it."""
    kernel: Callable[..., Any] | None = None
    """Triton, for CUDA; None: the native library or `plain` serves it."""
    gradient: Gradient | None = None
    """None: the operation is not differentiable."""
    parts: tuple[str, ...] = ()
    """The operations that `plain` is written of."""


OPS = (
    Op(
        name="normal_equations_",
        schema="(Tensor(a!) gram, Tensor(b!) cross, Tensor source, Tensor destination, "
        "Tensor weight) -> ()",
        plain=reference.normal_equations_,
    ),
    Op(
        name="gram_",
        schema="(Tensor(a!) gram, Tensor source, Tensor weight) -> ()",
        plain=reference.gram_,
        kernel=_gram_triton,
    ),
    Op(
        name="solve_spd",
        schema="(Tensor gram, Tensor rhs) -> (Tensor, Tensor, Tensor)",
        plain=reference.solve_spd,
    ),
    Op(
        name="low_rank_update_",
        schema="(Tensor(a!)[] weights, Tensor[] left, Tensor[] right, Tensor[] offset) -> ()",
        plain=reference.low_rank_update_,
    ),
    Op(
        name="perturb",
        schema="(Tensor embeddings, int samples, float min_cosine, float max_cosine, "
        f"float max_distance, {_STREAM}) -> (Tensor, Tensor, Tensor)",
        plain=reference.perturb,
        meta=_perturb_meta,
        kernel=_perturb_triton,
    ),
    Op(
        name="perturb_rows",
        schema=f"(Tensor embeddings, Tensor alpha, Tensor scale, {_STREAM}) -> Tensor",
        plain=reference.perturb_rows,
        meta=_perturb_rows_meta,
        kernel=_perturb_rows_triton,
    ),
    Op(
        name="perturb_project",
        schema="(Tensor embeddings, Tensor alpha, Tensor scale, Tensor weight, Tensor? down, "
        f"Tensor? up, int[] heights, float scaling, {_STREAM}) -> Tensor",
        plain=blockwise.perturb_project,
        meta=_perturb_project_meta,
        gradient=Gradient(_save_perturb_project, _perturb_project_gradients),
        parts=("perturb_rows", "project_into"),
    ),
    Op(
        name="perturb_project_backward",
        schema="(Tensor grad, Tensor embeddings, Tensor alpha, Tensor scale, Tensor down, "
        f"Tensor up, int[] heights, float scaling, {_STREAM}) -> (Tensor, Tensor)",
        plain=blockwise.perturb_project_backward,
        meta=_perturb_project_backward_meta,
        parts=("perturb_rows", "project_backward"),
    ),
    Op(
        name="perturb_accumulate_",
        schema="(Tensor(a!) gram, Tensor(b!) cross, Tensor embeddings, Tensor alpha, "
        "Tensor scale, Tensor weight, Tensor? destination, bool relative, "
        f"{_STREAM}) -> ()",
        plain=blockwise.perturb_accumulate_,
        meta=_nothing_meta,
        parts=("perturb_rows", "gram_"),
    ),
    Op(
        name="project",
        schema="(Tensor x, Tensor weight, Tensor? down, Tensor? up, int[] heights, "
        "float scaling) -> Tensor",
        plain=blockwise.project,
        gradient=Gradient(_save_project, _project_gradients),
        parts=("project_into",),
    ),
    Op(
        name="project_into",
        schema="(Tensor(a!) y, Tensor x, Tensor weight, Tensor? down, Tensor? up, "
        "int[] heights, float scaling) -> ()",
        plain=blockwise.project_into,
        kernel=_project_into_triton,
    ),
    Op(
        name="project_backward",
        schema="(Tensor grad, Tensor x, Tensor down, Tensor up, int[] heights, "
        "float scaling) -> (Tensor, Tensor)",
        plain=blockwise.project_backward,
        kernel=_project_backward_triton,
    ),
)

_library = torch.library.Library("realera_fast", "DEF")
for _op in OPS:
    _library.define(_op.name + _op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_op.name, _op.plain, "CompositeExplicitAutograd")
    if _op.meta is not None:
        _library.impl(_op.name, _op.meta, "Meta")
    # ROCm calls its devices "cuda"; the kernels are written and tuned for NVIDIA's.
    if _op.kernel is not None and torch.version.hip is None:
        _library.impl(_op.name, _op.kernel, "CUDA")
    if _op.gradient is not None:
        torch.library.register_autograd(
            f"realera_fast::{_op.name}",
            _op.gradient.backward,
            setup_context=_op.gradient.save,
            lib=_library,
        )

if _NATIVE.exists():
    torch.ops.load_library(_NATIVE)


_overrides: dict[tuple[str, str], torch.library.Library] = {}
"""What `serve_reference` has registered; the dispatcher forgets a library that nobody holds."""


def parts_of(name: str) -> tuple[str, ...]:
    """An operation and those that it is written of."""
    return (name, *next(op.parts for op in OPS if op.name == name))


def has_kernel(name: str, device_type: str) -> bool:
    """Whether a kernel is registered for devices of a type, served or overridden."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"realera_fast::{name}", key
    )


def is_overridden(name: str, device_type: str) -> bool:
    """Whether `serve_reference` stands in for a kernel on devices of a type."""
    return (name, device_type) in _overrides


def serve_reference(name: str, device_type: str) -> None:
    """Overrides a kernel by what serves where there is none."""
    if not is_overridden(name, device_type):
        library = torch.library.Library("realera_fast", "IMPL")
        plain = next(op.plain for op in OPS if op.name == name)
        with warnings.catch_warnings():
            # Torch warns that a kernel is overridden, which is what is wanted.
            warnings.simplefilter("ignore", UserWarning)
            library.impl(name, plain, device_type.upper())
        _overrides[name, device_type] = library


def serve_kernel(name: str, device_type: str) -> None:
    """Takes `serve_reference` back."""
    _overrides.pop((name, device_type), None)


def implementations() -> dict[str, dict[str, str]]:
    """Says which implementation serves each operation.

    Returns:
        For each operation, ``{"cpu": ..., "cuda": ...}`` with the values "native" (C++ or CUDA),
        "triton", "streamed" (written of other operations, block by block) and "reference" (plain
        PyTorch).
    """

    def kind(op: Op, device_type: str) -> str:
        if is_overridden(op.name, device_type) or not has_kernel(op.name, device_type):
            return "streamed" if op.plain.__module__ == blockwise.__name__ else "reference"
        return "triton" if device_type == "cuda" and op.kernel is not None else "native"

    return {op.name: {name: kind(op, name) for name in ("cpu", "cuda")} for op in OPS}
