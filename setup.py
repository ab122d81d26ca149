"""Packaging only: what is compiled, and how, is in CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
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
    """Configures and builds with CMake; `CMAKE_ARGS` is passed on."""

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
        subprocess.run(
            [
                *(cmake, "-S", str(ROOT.resolve()), "-B", str(build), *generator),
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                f"-DTORCH_DIR={torch_folder()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            check=True,
            env=environment,
        )
        subprocess.run([cmake, "--build", str(build)], check=True, env=environment)


setup(
    ext_modules=[CMakeExtension("realera_fast._C")],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
