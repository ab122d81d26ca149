"""Packaging only: what is compiled, and how, is in CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def torch_folder() -> Path:
    """The installed torch, found without importing it: importing takes seconds.

    A build isolated by pip can't import the torch of the environment it is made for, but that is
    where its headers are, and where the library will run: so that one comes first.
    """
    outer = Path(sysconfig.get_path("purelib")) / "torch"
    if (outer / "include").is_dir():
        return outer
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "torch is not installed, and building realera_fast needs its headers. Run "
            "`make setup`, or install torch 2.10 or later first, then "
            "`pip install --no-build-isolation .`"
        )
    return Path(spec.origin).parent


class CMakeExtension(Extension):
    """A library that CMake builds. `depends` puts the native sources into the sdist."""

    def __init__(self, name: str) -> None:
        files = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        sources = sorted(str(path.relative_to(ROOT)) for path in files)
        super().__init__(
            name, sources=[], depends=["CMakeLists.txt", *sources], py_limited_api=True
        )


class CMakeBuild(build_ext):
    """Configures and builds with CMake; `CMAKE_ARGS` is passed on.

    What fails with nvcc is built again without it.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # Tools installed by pip are beside the interpreter, which need not be on the user's PATH.
        paths = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
        environment = {**os.environ, "PATH": os.pathsep.join(paths)}
        cmake = shutil.which("cmake", path=environment["PATH"])
        if cmake is None:
            raise SystemExit("cmake is not installed; `pip install cmake ninja` provides it")
        ninja = shutil.which("ninja", path=environment["PATH"])
        generator = ["-G", "Ninja"] if ninja else []
        command = [
            *(cmake, "-S", str(ROOT.resolve()), "-B", str(build), *generator),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DTORCH_DIR={torch_folder()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        try:
            subprocess.run(command, check=True, env=environment)
            subprocess.run([cmake, "--build", str(build)], check=True, env=environment)
        except subprocess.CalledProcessError:
            if any(argument.startswith("-DREALERA_FAST_CUDA") for argument in command):
                raise
            if not found_nvcc(build):
                raise
            print(
                "realera_fast: building with nvcc failed (above): now without it, and "
                "on a GPU Triton and PyTorch serve. CMAKE_ARGS=-DREALERA_FAST_CUDA=ON insists.",
                file=sys.stderr,
            )
            # What CMake remembers of a compiler that does not work would fail again.
            shutil.rmtree(build)
            build.mkdir()
            command.append("-DREALERA_FAST_CUDA=OFF")
            subprocess.run(command, check=True, env=environment)
            subprocess.run([cmake, "--build", str(build)], check=True, env=environment)


def found_nvcc(build: Path) -> bool:
    """Whether CMake met a CUDA compiler when it configured this folder."""
    cache = build / "CMakeCache.txt"
    text = cache.read_text(encoding="utf-8", errors="replace") if cache.exists() else ""
    return re.search(r"^CMAKE_CUDA_COMPILER:\w+=(?!.*NOTFOUND).", text, re.MULTILINE) is not None


# Without it the definitions in PyTorch serve every operation.
NATIVE = "-DREALERA_FAST_NATIVE=OFF" not in shlex.split(os.environ.get("CMAKE_ARGS", ""))

setup(
    ext_modules=[CMakeExtension("realera_fast._C")] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
