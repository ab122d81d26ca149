"""The native loops compile for Arm, whose processors have others than those of the tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LOOPS = {"tiles": "TILES", "noise": "NOISE"}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None,
    reason="no compiler for aarch64: pip install realera_fast[arm]",
)
@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*.cpp")), ids=lambda path: path.stem)
def test_compiles_for_aarch64(path: Path, tmp_path: Path) -> None:
    prefix = LOOPS.get(path.stem)
    names = [f"-D{prefix}_KERNELS={path.stem}_baseline", f'-D{prefix}_NAME="baseline"']
    made = subprocess.run(
        [
            *(sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"),
            *("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra"),
            *("-Wno-unused-parameter", "-Wno-unused-command-line-argument"),
            f"-isystem{Path(torch.__file__).parent / 'include'}",
            "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
            *(names if prefix else []),
            *("-c", str(path), "-o", str(tmp_path / "out.o")),
        ],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    machine = (tmp_path / "out.o").read_bytes()[18:20]
    assert machine == (183).to_bytes(2, "little"), "an object file for another processor"
