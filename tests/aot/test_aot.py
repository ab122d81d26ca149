"""Ahead-of-time compilation of the Triton kernels for GPUs that are not here.

Runs in a process of its own: Triton's interpreter, which the other tests need on a CPU, is a choice
for the whole process. `pytest tests/aot` without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
from gpu_code import SHARED_LIMIT, resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="the interpreter is on: run `pytest tests/aot` by itself"
)

from realera_fast.kernels import perturb  # noqa: E402


def compiled(kernel: Any, dtype: str, capability: int, constants: dict[str, Any]) -> Any:
    """Compiles a kernel of this library for contiguous, aligned arguments.

    Args:
        kernel: a jitted function whose compile-time arguments have upper-case names.
        dtype: type of the embeddings and rows.
        capability: compute capability times ten.
        constants: the compile-time arguments.
    """
    exact = "fp64" if dtype == "fp64" else "fp32"
    constants = constants | {"stride_d": 1}
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("e_ptr", "rows_ptr"):
            signature[name] = f"*{dtype}"
        elif name in ("root_ptr", "sums_ptr"):
            signature[name] = "*fp64" if name == "root_ptr" else "*i64"
        elif name.endswith("_ptr"):
            signature[name] = f"*{exact}"
        else:
            signature[name] = parameter.annotation_type or "i32"
    aligned = [
        i
        for i, name in enumerate(signature)
        if name not in constants
        and (name.endswith("_ptr") or name in ("width", "stride_c", "stride_t"))
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in signature},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=perturb._OPTIONS
    )


KERNELS = {
    "norms": perturb._norms,
    "sums": perturb._sums,
    "scalars": perturb._scalars,
    "rows": perturb._rows,
}
TARGETS = [
    *((90, dtype) for dtype in ("bf16", "fp16", "fp32", "fp64")),
    *((capability, dtype) for capability in (80, 100) for dtype in ("bf16", "fp64")),
]
"""What 16 bits are is a matter of loads and stores: both kinds for one GPU, and one for all."""
BLOCKS = {"norms": perturb._NORM_BLOCK, "scalars": perturb._PAIRS}


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("name", list(KERNELS))
def test_perturb_compiles_without_spills(name, dtype, capability, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    constants = {
        "DOUBLE": dtype == "fp64",
        "BLOCK": BLOCKS.get(name, perturb._BLOCK),
    }
    result = compiled(KERNELS[name], dtype, capability, constants)
    used = resources(result.asm["cubin"], tmp_path)
    # A spilled register lives on the stack, and nothing else here does.
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    assert used["REG"] <= 128  # at least four blocks of 128 threads share a multiprocessor
    assert result.metadata.shared <= SHARED_LIMIT[capability]
    # Every product and sum is rounded by itself, roots and quotients correctly: the definition.
    # (`floor` flushes subnormal numbers, which it never gets here.)
    ptx = result.asm["ptx"].replace("cvt.rmi.ftz.f32.f32", "")
    assert not re.search(r"\bfma\.rn\.f(32|64)|\bmad\.f|\.approx|\.ftz|div\.full", ptx)
    if name == "rows":
        assert "sqrt.rn.f32" in ptx and re.search(r"mul\.(wide|hi)\.u32", ptx)


def test_one_element_compiles(tmp_path, monkeypatch):
    """Triton makes a constant of an argument that is 1."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    constants = {"BLOCK": perturb._PAIRS, "elements": 1, "samples": 1, "pairs": 1}
    assert compiled(perturb._scalars, "fp32", 90, constants).asm["cubin"]
    constants = {"BLOCK": perturb._NORM_BLOCK, "width": 1, "stride_t": 1}
    assert compiled(perturb._norms, "fp32", 90, constants).asm["cubin"]
    constants = {n: 1 for n in ("samples", "width", "groups", "tiles", "stride_t")}
    constants |= {"DOUBLE": False, "BLOCK": 4}
    for kernel in (perturb._sums, perturb._rows):
        assert compiled(kernel, "fp32", 90, constants).asm["cubin"]
