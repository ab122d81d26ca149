"""Ahead-of-time compilation of `project` for GPUs that are not here: see `test_aot`."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
from gpu_code import MULTIPROCESSOR, SHARED_LIMIT, machine_code, resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="the interpreter is on: run `pytest tests/aot` by itself"
)

from realera_fast.kernels import project  # noqa: E402

SHAPES = {80: project._OTHER, 90: project._SHAPES[9], 100: project._SHAPES[10]}
HALF = [*((capability, "bf16") for capability in SHAPES), (90, "fp16")]
"""A product's two kinds of 16 bits are one instruction: both for one GPU, and one for all."""
PRODUCT = {80: r"\bHMMA\.\d+\.F32", 90: r"\bHGMMA\.\w+\.F32", 100: r"\bUTC\w*MMA"}
"""What a product on tensor cores is called in machine code."""
ASYNCHRONOUS = r"\bLDGSTS\.E\.[\w.]*\b128\b"
"""A copy of 16 bytes to shared memory that nobody waits for."""
WIDE_STORE = r"\bSTG\.E\.128"

ALIGNED = ("width", "outputs", "stride_y", "stride_x", "stride_w", "stride_h", "stride_g")
"""What a launch finds to be multiples of 16, unless rows are not aligned."""


def compiled(
    kernel: Any,
    dtype: str,
    constants: dict[str, Any],
    capability: int,
    shape: project.Shape,
    aligned: bool = True,
) -> Any:
    """Compiles a kernel as its launch would.

    Args:
        kernel: a jitted function.
        dtype: of rows, weights and factors.
        constants: the compile-time arguments beside the tile, and what the launch finds to be 1.
        capability: compute capability times ten.
        shape: of the tile.
        aligned: whether rows are.
    """
    types = {"tiles_ptr": "i32", "layers_ptr": "i32", "partial_ptr": "fp32"}
    sides = {"BLOCK_M": shape.m, "BLOCK_N": shape.n, "BLOCK_K": shape.k}
    names = [parameter.name for parameter in kernel.params]
    constants = constants | {name: side for name, side in sides.items() if name in names}
    signature = {
        parameter.name: "constexpr"
        if parameter.name in constants
        else f"*{types.get(parameter.name, dtype)}"
        if parameter.name.endswith("_ptr")
        else parameter.annotation_type or "i32"
        for parameter in kernel.params
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(signature)
            if name.endswith("_ptr") or (aligned and name in ALIGNED and name not in constants)
        },
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=project._OPTIONS | {"num_warps": shape.warps, "num_stages": shape.stages},
    )


def forward(
    dtype: str,
    capability: int,
    shape: project.Shape,
    *,
    fused: bool = False,
    even: bool = True,
    align: int = 16,
    loop: bool = False,
    aligned: bool = True,
    ones: tuple[str, ...] = (),
) -> Any:
    constants = {
        "FUSED": fused,
        "EVEN": even,
        "ALIGN": align,
        "LOOP": loop,
        "RANK": project._RANK,
        "GROUP": project._GROUP,
    }
    constants |= dict.fromkeys(ones, 1)
    return compiled(project._project, dtype, constants, capability, shape, aligned)


def backward(
    dtype: str,
    capability: int,
    shape: project.Shape,
    *,
    align: int = 16,
    aligned: bool = True,
    ones: tuple[str, ...] = (),
) -> Any:
    constants = {"ALIGN": align, "RANK": project._RANK, **dict.fromkeys(ones, 1)}
    return compiled(project._backward, dtype, constants, capability, shape, aligned)


def fits(result: Any, capability: int, shape: project.Shape, folder: Any, resident: int = 1) -> str:
    """Machine code of a kernel without spills of which so many programs share a multiprocessor."""
    used = resources(result.asm["cubin"], folder)
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    # Registers come eight at a time, and shared memory has a kilobyte that is not ours.
    registers = -(-used["REG"] // 8) * 8
    assert registers * 32 * shape.warps * resident <= MULTIPROCESSOR
    assert (result.metadata.shared + 1024) * resident <= SHARED_LIMIT[capability] + 1024
    # Tensor memory has 512 columns: more would compile, but never run.
    assert (getattr(result.metadata, "tmem_size", None) or 0) * resident <= 512
    return machine_code(folder)


@pytest.mark.parametrize(("capability", "dtype"), HALF)
@pytest.mark.parametrize(
    ("size", "fused"),
    [("small", True), ("small", False), ("medium", True), ("medium", False), ("large", False)],
)
def test_forward(size, fused, dtype, capability, tmp_path):
    shape = getattr(SHAPES[capability], size)
    result = forward(dtype, capability, shape, fused=fused)
    # What one program cannot do while it waits, another does.
    resident = 2 if capability >= 90 and size != "large" else 1
    code = fits(result, capability, shape, tmp_path, resident)
    assert re.search(PRODUCT[capability], code)
    assert re.search(ASYNCHRONOUS, code) and re.search(WIDE_STORE, code)


@pytest.mark.parametrize("capability", SHAPES)
@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_forward_with_a_last_step_that_is_not_full(size, capability, tmp_path):
    shape = getattr(SHAPES[capability], size)
    result = forward("bf16", capability, shape, fused=size != "large", even=False)
    code = fits(result, capability, shape, tmp_path)
    assert re.search(PRODUCT[capability], code) and re.search(ASYNCHRONOUS, code)


@pytest.mark.parametrize("capability", SHAPES)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_forward_with_many_ranks(size, capability, tmp_path):
    shape = getattr(SHAPES[capability], size)
    code = fits(forward("bf16", capability, shape, loop=True), capability, shape, tmp_path)
    assert re.search(PRODUCT[capability], code) and re.search(ASYNCHRONOUS, code)


@pytest.mark.parametrize("capability", SHAPES)
@pytest.mark.parametrize(("fused", "loop"), [(True, False), (False, False), (False, True)])
def test_forward_of_rows_that_are_not_aligned(fused, loop, capability, tmp_path):
    shape = project._UNALIGNED
    result = forward(
        "bf16", capability, shape, fused=fused, loop=loop, even=False, align=1, aligned=False
    )
    assert re.search(PRODUCT[capability], fits(result, capability, shape, tmp_path))


@pytest.mark.parametrize(("capability", "dtype"), HALF)
@pytest.mark.parametrize("shape", [project._BACKWARD, project._BACKWARD_FEW], ids=str)
def test_backward(shape, dtype, capability, tmp_path):
    result = backward(dtype, capability, shape)
    # Enough of them to have some tens of kilobytes of grad on their way.
    code = fits(result, capability, shape, tmp_path, resident=2)
    assert re.search(PRODUCT[capability], code) and re.search(ASYNCHRONOUS, code)


@pytest.mark.parametrize("capability", SHAPES)
def test_backward_of_rows_that_are_not_aligned(capability, tmp_path):
    shape = project._BACKWARD_UNALIGNED
    result = backward("bf16", capability, shape, align=1, aligned=False)
    assert re.search(PRODUCT[capability], fits(result, capability, shape, tmp_path))


@pytest.mark.parametrize("capability", SHAPES)
@pytest.mark.parametrize("aligned", [True, False])
def test_backward_in_float32(aligned, capability, tmp_path):
    shape = project._BACKWARD_FLOAT32
    result = backward("fp32", capability, shape, align=16 if aligned else 1, aligned=aligned)
    code = fits(result, capability, shape, tmp_path, resident=2)
    # Not in TF32.
    assert re.search(r"\bFFMA", code) and not re.search(PRODUCT[capability], code)


@pytest.mark.parametrize("capability", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("aligned", [True, False])
def test_add(aligned, dtype, capability, tmp_path):
    shape = project._ADD
    constants = {"ALIGN": 16 if aligned else 1}
    result = compiled(project._add, dtype, constants, capability, shape, aligned)
    fits(result, capability, shape, tmp_path, resident=2)


@pytest.mark.parametrize("capability", SHAPES)
def test_one_rank_column_and_output(capability, tmp_path):
    """A launch makes constants of arguments that are 1."""
    shape = project._UNALIGNED
    ones = ("width", "rank", "stride_x", "stride_w", "stride_y", "stride_h")
    odd = {"align": 1, "aligned": False}
    for fused in (True, False):
        fits(
            forward("bf16", capability, shape, fused=fused, even=False, ones=ones, **odd),
            capability,
            shape,
            tmp_path,
        )
    shape = project._BACKWARD_UNALIGNED
    ones = ("outputs", "rank", "stride_g", "stride_h")
    fits(backward("bf16", capability, shape, ones=ones, **odd), capability, shape, tmp_path)
    ones = dict.fromkeys(("rank", "stride_y", "stride_h"), 1)
    shape = project._ADD
    result = compiled(project._add, "fp32", {"ALIGN": 1, **ones}, capability, shape, aligned=False)
    fits(result, capability, shape, tmp_path)
