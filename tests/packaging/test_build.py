"""What is built, and what happens where it can't be: setup.py, tools/setup_env.py, launches."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]


def module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Build:
    """setup.py with a CMake that is told what fails."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, arguments: str) -> None:
        self.options: dict[str, Any] = {}
        self.commands: list[list[str]] = []
        self.nvcc, self.fails = "/usr/bin/nvcc", {"configure with CUDA"}
        self._folder = folder / "build"
        patch.setenv("CMAKE_ARGS", arguments)
        patch.setattr(setuptools, "setup", self.options.update)
        self._setup = module("setup_of_this_project", ROOT / "setup.py")
        patch.setattr(self._setup.subprocess, "run", self._run)

    def _run(self, command: Sequence[str], **_: Any) -> None:
        self.commands.append(list(command))
        cuda = "-DREALERA_FAST_CUDA=OFF" not in command
        step = "build" if command[1] == "--build" else "configure"
        cache = self._folder / "CMakeCache.txt"
        if step == "configure":
            assert not cache.exists() or cuda, "what CMake remembers is in the way"
            cache.write_text(f"CMAKE_CUDA_COMPILER:FILEPATH={self.nvcc}\n")
            self._cuda = cuda
        if f"{step} with CUDA" in self.fails and self._cuda:
            raise subprocess.CalledProcessError(1, command)
        if step in self.fails:
            raise subprocess.CalledProcessError(1, command)

    def run(self) -> None:
        (extension,) = self.options["ext_modules"]
        command = self.options["cmdclass"]["build_ext"](setuptools.Distribution())
        command.initialize_options()
        command.build_temp, command.build_lib = str(self._folder), str(self._folder)
        command.extensions, command.debug = [extension], False
        command.build_extension(extension)


@pytest.mark.parametrize("step", ["configure", "build"])
def test_a_broken_nvcc_is_left_out(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    build = Build(tmp_path, monkeypatch, "")
    build.fails = {f"{step} with CUDA"}
    build.run()
    assert "-DREALERA_FAST_CUDA=OFF" in build.commands[-2] and "--build" in build.commands[-1]
    assert "building with nvcc failed" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", ["-DREALERA_FAST_CUDA=ON", "-DREALERA_FAST_CUDA=OFF"])
def test_what_was_asked_for_is_not_left_out(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(tmp_path, monkeypatch, arguments)
    build.fails = {"configure"}
    with pytest.raises(subprocess.CalledProcessError):
        build.run()
    assert len(build.commands) == 1


def test_an_error_that_has_nothing_to_do_with_nvcc_ends_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(tmp_path, monkeypatch, "")
    build.fails, build.nvcc = {"build"}, "NOTFOUND"
    with pytest.raises(subprocess.CalledProcessError):
        build.run()
    assert len(build.commands) == 2


def test_the_library_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build(tmp_path, monkeypatch, "-DREALERA_FAST_NATIVE=OFF")
    assert build.options["ext_modules"] == []


class Environment:
    """tools/setup_env.py with a pip whose builds of native code fail."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.setup_env = module("setup_env", ROOT / "tools" / "setup_env.py")
        self.environments: list[dict[str, str]] = []
        patch.setattr(self.setup_env.subprocess, "run", self._run)
        patch.setattr(self.setup_env, "ROOT", folder)

    def _run(self, command: Sequence[str], **options: Any) -> None:
        self.environments.append(dict(options.get("env") or {}))
        if "-DREALERA_FAST_NATIVE=OFF" not in self.environments[-1].get("CMAKE_ARGS", ""):
            raise subprocess.CalledProcessError(1, command)


def test_the_demo_runs_without_a_compiler_and_the_tests_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = Environment(tmp_path, monkeypatch)
    assert environment.setup_env.build(Path("python"), go_on=True) is False
    assert len(environment.environments) == 2
    assert "plain PyTorch" in capfd.readouterr().err
    with pytest.raises(subprocess.CalledProcessError):
        environment.setup_env.build(Path("python"), go_on=False)
    commands = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "demo: SETUP = --go-on" in commands and commands.count("--go-on") == 1


def launches(tree: ast.Module) -> tuple[int, int]:
    """How many kernels are launched, and how many of these on the device of a tensor."""
    kernels = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "jit" in ast.unparse(node.decorator_list[:1])
    }

    def found(node: ast.AST) -> int:
        return sum(
            isinstance(each, ast.Call)
            and isinstance(each.func, ast.Subscript)
            and ast.unparse(each.func.value) in kernels
            for each in ast.walk(node)
        )

    guarded = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and "torch.cuda.device_of" in ast.unparse(node.items[0].context_expr)
    ]
    return found(tree), sum(map(found, guarded))


@pytest.mark.parametrize("name", ["gram", "perturb", "project"])
def test_kernels_run_on_the_device_of_their_tensors(name: str) -> None:
    """On cuda:1 too, whichever device is the current one."""
    tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8"))
    every, guarded = launches(tree)
    assert every == guarded > 0
