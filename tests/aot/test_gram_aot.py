"""Ahead-of-time compilation of `gram_` for GPUs that are not here: see `test_aot`."""

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

from realera_fast.kernels import gram  # noqa: E402

SHAPES = {80: gram._OTHER, 90: gram._ALIGNED[9], 100: gram._ALIGNED[10]}
UNALIGNED = {80: gram._OTHER, 90: gram._UNALIGNED[9], 100: gram._UNALIGNED[10]}
PARTS = {"bf16": 1, "fp16": 2, "fp32": 3}
PRODUCT = {80: r"HMMA\.\d+\.F32\.BF16", 90: r"HGMMA\.\w+\.F32\.BF16", 100: r"UTC\w*MMA"}
"""What a product on tensor cores is called in machine code."""


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    options: dict[str, int],
    aligned: tuple[str, ...] = (),
) -> Any:
    """Compiles a kernel as its launch would.

    Args:
        kernel: a jitted function.
        types: of what the pointers point to; aligned, as all memory from PyTorch is.
        constants: the compile-time arguments, and what the launch finds to be 1.
        capability: compute capability times ten.
        options: of the launch.
        aligned: arguments that the launch finds to be multiples of 16.
    """
    signature = {
        parameter.name: "constexpr"
        if parameter.name in constants
        else f"*{types[parameter.name]}"
        if parameter.name in types
        else "i32"
        for parameter in kernel.params
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(signature)
            if name in types or name in aligned
        },
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=gram._OPTIONS | options
    )


def products(dtype: str, shape: gram.Shape, capability: int, aligned: bool) -> Any:
    constants = {
        "PARTS": PARTS[dtype],
        "BLOCK": shape.block,
        "HEIGHT": shape.height,
        "DEPTH": shape.depth,
    }
    return compiled(
        gram._products,
        {"source_ptr": dtype, "weight_ptr": "fp32", "partial_ptr": "fp32"},
        constants,
        capability,
        {"num_warps": shape.warps, "num_stages": shape.stages},
        ("width", "stride_n") if aligned else (),
    )


@pytest.mark.parametrize("capability", SHAPES)
@pytest.mark.parametrize("dtype", PARTS)
def test_products_use_tensor_cores_and_do_not_spill(dtype, capability, tmp_path):
    shape = SHAPES[capability]
    result = products(dtype, shape, capability, aligned=True)
    used = resources(result.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    # Registers come eight at a time, and shared memory has a kilobyte that is not ours.
    registers = -(-used["REG"] // 8) * 8
    assert registers * 32 * shape.warps * shape.resident <= MULTIPROCESSOR
    assert (result.metadata.shared + 1024) * shape.resident <= SHARED_LIMIT[capability] + 1024
    assert re.search(PRODUCT[capability], machine_code(tmp_path))
    # Tensor memory has 512 columns: more would compile, but never run.
    assert (getattr(result.metadata, "tmem_size", None) or 0) <= 512


@pytest.mark.parametrize("capability", UNALIGNED)
@pytest.mark.parametrize("dtype", PARTS)
def test_rows_that_are_not_aligned_do_not_spill(dtype, capability, tmp_path):
    shape = UNALIGNED[capability]
    result = products(dtype, shape, capability, aligned=False)
    used = resources(result.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    assert result.metadata.shared <= SHARED_LIMIT[capability]
    assert re.search(PRODUCT[capability], machine_code(tmp_path))


@pytest.mark.parametrize("capability", SHAPES)
def test_one_column(capability, tmp_path):
    """A launch makes constants of arguments that are 1."""
    shape = UNALIGNED[capability]
    constants = {
        "PARTS": 3,
        "BLOCK": shape.block,
        "HEIGHT": shape.height,
        "DEPTH": shape.depth,
        "width": 1,
        "stride_n": 1,
    }
    types = {"source_ptr": "fp32", "weight_ptr": "fp32", "partial_ptr": "fp32"}
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    compiled(gram._products, types, constants, capability, options)
    constants = {"BLOCK": shape.block, "PART": gram._ADD_BLOCK, "width": 1}
    compiled(gram._add, {"partial_ptr": "fp32", "gram_ptr": "fp64"}, constants, capability, {})


@pytest.mark.parametrize("capability", SHAPES)
def test_add_does_not_spill(capability, tmp_path):
    result = compiled(
        gram._add,
        {"partial_ptr": "fp32", "gram_ptr": "fp64"},
        {"BLOCK": SHAPES[capability].block, "PART": gram._ADD_BLOCK},
        capability,
        {"num_warps": 4},
        ("width",),
    )
    used = resources(result.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    assert used["REG"] <= 128
    assert result.metadata.shared <= SHARED_LIMIT[capability]
