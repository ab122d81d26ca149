"""The CUDA kernels without a GPU: run by a host emulation, and looked at in the built library."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from matrices import residual_factors
from tolerance import check, product_error
from torch import Tensor

from realera_fast.ops import reference

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "realera_fast" / "_C.abi3.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Optimised little: compiling takes longer than running.
COMPILE = ["g++", "-std=c++20", "-O1", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def compiled(target: Path, *options: str, kernels: Path = ROOT / "csrc" / "cuda") -> Path:
    """Compiles tests/emulation/driver.cpp."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folders = [f"-I{kernels}", f"-I{ROOT / 'tests' / 'emulation'}"]
    source = str(ROOT / "tests" / "emulation" / "driver.cpp")
    subprocess.run([*COMPILE, *options, *folders, source, "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a library for the host."""
    target = tmp_path_factory.mktemp("emulation") / "kernels.so"
    return ctypes.CDLL(str(compiled(target, "-fPIC", "-shared")))


class Weight(ctypes.Structure):
    """`UpdateWeight` of csrc/cuda/low_rank_update.cuh."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("first_block", ctypes.c_int32),
    ]


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def update(
    library: ctypes.CDLL,
    groups: int,
    weights: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    offset: list[Tensor],
) -> None:
    """Runs the kernel that stages ``8 * groups`` rows in a block, once for all weights."""
    table = (Weight * len(weights))()
    for i, weight in enumerate(weights):
        shared = 0 if len(left) == 1 else i
        table[i] = Weight(
            pointer(weight),
            pointer(left[shared]),
            pointer(right[shared]),
            pointer(offset[i]) if offset else None,
            *weight.stride(),
            len(weight),
        )
    library.low_rank_update(DTYPES[weights[0].dtype], groups, table, len(weights), *left[0].shape)


class TestLowRankUpdate:
    @pytest.mark.parametrize("kind", ["shared", "per layer", "offset"])
    @pytest.mark.parametrize(
        ("dtype", "groups", "d", "k"),
        [
            (torch.float32, 1, 33, 1),
            (torch.float32, 2, 70, 5),
            (torch.float32, 4, 300, 17),
            (torch.bfloat16, 1, 300, 17),
            (torch.bfloat16, 4, 64, 4),
            (torch.float16, 2, 33, 5),
            (torch.float16, 4, 1, 1),
            (torch.float64, 1, 64, 20),
            (torch.float64, 2, 33, 3),
        ],
        ids=str,
    )
    def test_update(
        self, kind: str, dtype: torch.dtype, groups: int, d: int, k: int, emulated: ctypes.CDLL
    ) -> None:
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        weights = [torch.randn(o, d).to(dtype) for o in (1, 7, 130)]
        layers = 1 if kind == "shared" else len(weights)
        left = [torch.randn(d, k, dtype=accumulate) / d for _ in range(layers)]
        right = [torch.randn(k, d, dtype=accumulate) for _ in range(layers)]
        offset = [torch.randn(len(w), k, dtype=accumulate) for w in weights]
        if kind != "offset":
            offset = []
        plain = [w.clone() for w in weights]
        reference.low_rank_update_(plain, left, right, offset)
        exact = []
        for i, w in enumerate(weights):
            l_, r_ = left[i % layers], right[i % layers]
            thin = w.numpy(force=True) if dtype != torch.bfloat16 else w.float().numpy()
            thin = thin.astype(np.longdouble) @ l_.numpy().astype(np.longdouble)
            if offset:
                thin = thin + offset[i].numpy()
            full = w.double().numpy() + thin @ r_.numpy().astype(np.longdouble)
            exact.append(torch.from_numpy(full.astype(np.float64)))
        before = [w.clone() for w in weights]
        update(emulated, groups, weights, left, right, offset)
        for i, w in enumerate(weights):
            factors = (before[i], left[i % layers], right[i % layers])
            if offset:
                # W left + offset is the product of [W, offset] and left with the identity below.
                eye = torch.eye(k, dtype=accumulate)
                factors = (
                    torch.cat((before[i], offset[i]), 1),
                    torch.cat((left[i % layers], eye)),
                    right[i % layers],
                )
            check(f"weights[{i}]", w, exact[i], plain[i], floor=product_error(*factors))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_strided(self, dtype: torch.dtype, emulated: ctypes.CDLL) -> None:
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        left = [torch.randn(24, 3, dtype=accumulate)]
        right = [torch.randn(3, 24, dtype=accumulate)]
        base = torch.randn(20, 80).to(dtype)
        views = [base[:, 2:50:2], base[:7, 51:75], torch.randn(24, 20).to(dtype).mT]
        copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
        untouched = base[:, 1:50:2].clone()
        update(emulated, 1, views, left, right, [])
        update(emulated, 1, copies, left, right, [])
        for view, copy in zip(views, copies, strict=True):
            assert torch.equal(view, copy)
        assert torch.equal(base[:, 1:50:2], untouched)

    def test_all_entries_of_the_table(self, emulated: ctypes.CDLL) -> None:
        left, right = [torch.randn(8, 2)], [torch.randn(2, 8)]
        weights = [torch.randn(1 + 4 * (i % 3), 8) for i in range(72)]
        expected = [w.clone() for w in weights]
        reference.low_rank_update_(expected, left, right, [])
        update(emulated, 1, weights, left, right, [])
        for weight, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, other)


def spd(d: int, condition: float) -> Tensor:
    """`[d, d]` symmetric positive definite matrix of a given condition number."""
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    values = torch.logspace(0, -np.log10(condition), d, dtype=torch.float64)
    gram = (basis * values) @ basis.mT
    return (gram + gram.mT) / 2


def solve(
    library: ctypes.CDLL, gram: Tensor, rhs: Tensor, rows_per_block: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """`[l, o, d]` solution, `[l]` info, `[l]` reciprocal condition number; all were NaN before."""
    systems, rows, width = rhs.shape
    solution = torch.full_like(rhs, torch.nan)
    info = torch.full((systems,), -1, dtype=torch.int32)
    reciprocal = torch.full((systems,), torch.nan, dtype=torch.float64)
    library.solve_spd(
        *map(pointer, (gram, rhs, solution, info, reciprocal)),
        *(systems, width, ctypes.c_int64(rows), ctypes.c_int64(rows_per_block)),
    )
    return solution, info, reciprocal


class TestSolveSpd:
    # The widest takes seconds in the emulation, and is solved once.
    @pytest.mark.parametrize(
        ("o", "d", "condition"),
        [
            *((o, d, c) for o, d in ((1, 1), (3, 17), (40, 33), (0, 4)) for c in (1.0, 1e3, 1e8)),
            (5, 130, 1e8),
        ],
        ids=str,
    )
    def test_against_the_reference(
        self, o: int, d: int, condition: float, emulated: ctypes.CDLL
    ) -> None:
        gram = torch.stack([spd(d, condition) for _ in range(3)])
        rhs = torch.randn(3, o, d, dtype=torch.float64)
        solution, info, reciprocal = solve(emulated, gram, rhs, 32)
        expected = reference.solve_spd(gram, rhs)[2]
        assert info.tolist() == [0, 0, 0]
        torch.testing.assert_close(reciprocal, expected, rtol=1e-6, atol=0)
        wide = gram.numpy().astype(np.longdouble)
        ours, plain = (
            torch.from_numpy((x.numpy().astype(np.longdouble) @ wide).astype(np.float64))
            for x in (solution, torch.linalg.solve(gram, rhs.mT).mT)
        )
        for i in range(len(gram)):
            factors = residual_factors(solution[i], gram[i])
            check(f"residual[{i}]", ours[i], rhs[i], plain[i], floor=product_error(*factors))

    def test_not_positive_definite(self, emulated: ctypes.CDLL) -> None:
        gram = torch.eye(20, dtype=torch.float64).repeat(4, 1, 1)
        gram[1, 18, 18] = -1
        gram[2, 3, 3] = 0
        gram[3, 5, 2] = torch.nan
        rhs = torch.ones(4, 2, 20, dtype=torch.float64)
        solution, info, reciprocal = solve(emulated, gram, rhs)
        assert info.tolist() == [0, 19, 4, 6]
        assert reciprocal.tolist() == [1, 0, 0, 0]
        assert torch.equal(solution[0], rhs[0]) and solution[1:].isnan().all()

    def test_one_stage_at_a_time(self, emulated: ctypes.CDLL) -> None:
        d = 300
        gram = spd(d, 1e4)
        inverse = torch.linalg.inv(gram)
        _, status, expected = reference.solve_spd(gram, gram[:1])
        v, norm, reciprocal = (torch.full((n,), torch.nan).double() for n in (d, 1, 1))

        def stage(number: int) -> None:
            emulated.condition(
                number, *map(pointer, (v, norm)), d, *map(pointer, (status, reciprocal))
            )

        start, first, image, slope, end = range(5)
        stage(start)
        v.copy_(inverse @ v)
        stage(first)
        for _ in range(5):
            v.copy_(inverse @ v)
            stage(image)
            v.copy_(inverse @ v)
            stage(slope)
        v.copy_(gram.abs().sum(0))
        stage(end)
        torch.testing.assert_close(reciprocal[0], expected)


def sanitized(sanitizer: str, folder: Path, **where: Path) -> subprocess.CompletedProcess[str]:
    """Runs all kernels under a sanitizer."""
    options = [f"-fsanitize={sanitizer}", "-g"]
    if "undefined" in sanitizer:
        options.append("-fno-sanitize-recover=undefined")
    program = compiled(folder / "program", *options, **where)
    # One report is enough: the rest of a run under ThreadSanitizer takes seconds.
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    result = sanitized(sanitizer, tmp_path)
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stderr[-4000:]


def test_a_missing_barrier_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "cuda")
    source = tmp_path / "cuda" / "low_rank_update.cuh"
    before = "= total;\n    }\n    __syncthreads();\n"
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, "= total;\n    }\n"))
    result = sanitized("thread", tmp_path, kernels=tmp_path / "cuda")
    assert "data race" in result.stderr


@pytest.fixture(scope="session")
def kernels() -> list[tuple[int, str, dict[str, int]]]:
    """Architecture, name and resources of each kernel in the built library."""
    triton = pytest.importorskip("triton", reason="Triton, which brings cuobjdump, is missing")
    if not LIBRARY.exists() or b".nv_fatbin" not in LIBRARY.read_bytes():
        pytest.skip("the native library is not built, or was built without nvcc")
    text = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = []
    capability = 0
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            capability = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            found.append((capability, match[1], {}))
        elif "REG:" in line:
            resources = re.findall(r"\b([A-Z]+):(\d+)", line)
            found[-1][2].update({name: int(value) for name, value in resources})
    return found


class TestLibrary:
    def test_every_kernel_is_there(self, kernels: list) -> None:
        for capability in {capability for capability, *_ in kernels}:
            names = [name for c, name, _ in kernels if c == capability]
            assert sum("update_kernel" in name for name in names) == 11
            assert sum("solve_kernel" in name for name in names) == 1
            assert sum("condition_kernel" in name for name in names) == 1

    def test_no_spills(self, kernels: list) -> None:
        for capability, name, used in kernels:
            # A spilled register lives on the stack, and nothing else here does.
            assert used["STACK"] == 0 and used["LOCAL"] == 0, (capability, name, used)
            assert used["REG"] <= (80 if "fLi" in name else 128), (capability, name, used)
            assert used["SHARED"] <= 1024, "all but what the system takes is asked for at launch"

    def test_gpus_to_come_find_something_to_compile(self, kernels: list) -> None:
        triton = pytest.importorskip("triton")
        listed = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--list-ptx", str(LIBRARY)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        newest = max(capability for capability, *_ in kernels)
        # A file for each of the two sources.
        assert re.findall(r"sm_(\d+)\.ptx", listed) == [str(newest)] * 2

    def test_cpu_torch_loads_it(self, kernels: list) -> None:
        # That it is loaded, registry.py has seen to: here, that its CUDA part took part.
        for name in ("solve_spd", "low_rank_update_"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"realera_fast::{name}", "CUDA")
