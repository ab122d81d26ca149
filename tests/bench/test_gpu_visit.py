"""The visit to a GPU: what `bench/gpu.sh` would do and in what order, without one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from speed import end_to_end, models
from speed.full_size import Memory
from tiny_erase import CONFIG
from tiny_models import tiny_pipeline

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
QUARTER = 900
"""Seconds of a visit."""
TO_KILL = 5
"""Seconds that a step may take to end, beyond its limit."""


class Step(NamedTuple):
    name: str
    seconds: int
    when: str
    command: str


def visit(*arguments: object, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    command = ["sh", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, env={"PATH": path}, capture_output=True, text=True, timeout=60, check=False
    )


def steps() -> list[Step]:
    listed = [line.split("\t") for line in visit("--dry-run").stdout.splitlines()]
    return [Step(name, int(seconds), when, command) for name, seconds, when, command in listed]


def test_order_and_limits() -> None:
    found = steps()
    always = [step for step in found if step.when == "always"]
    assert [step.name for step in always] == [
        *("device", "build", "check", "kernels", "tests"),
        *("closed_form", "end_to_end", "perturb", "alignment"),
    ]
    assert found[: len(always)] == always, "what is for spare time comes last"
    assert sum(step.seconds + TO_KILL for step in always) <= QUARTER
    limits = {step.name: step.seconds for step in found}
    assert limits["build"] <= 180 and limits["kernels"] + limits["tests"] <= 240
    assert {step.when for step in found} == {"always", "spare"}
    assert len({step.name for step in found}) == len(found)
    assert {"memcheck", "profile_closed_form"} < {step.name for step in found[len(always) :]}


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    found = visit("--dry-run", tmp_path / "out")
    assert found.returncode == 0 and not list(tmp_path.iterdir())
    assert str(tmp_path / "out" / "closed_form.jsonl") in found.stdout


@pytest.mark.parametrize(
    "arguments", [["--fast"], ["--minutes"], ["--minutes", "x"], ["out", "again"]], ids=str
)
def test_wrong_usage(arguments: list[str]) -> None:
    found = visit(*arguments)
    assert found.returncode == 2 and found.stderr.startswith("usage: ")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where `timeout` runs nothing: two steps outlast their limit, one fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "timeout").write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> "{tmp_path}/calls"\n'
        "echo said\n"
        'case "$*" in *closed_form.jsonl*|*end_to_end*) exit 124;; *"-m gpu"*) exit 1;; esac\n'
    )
    (folder / "timeout").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_it_goes_on_where_it_stopped(tmp_path: Path, path: str) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    # Between the limits of two steps, so that the seconds of the test do not count.
    found = visit("--minutes", 12, out, path=path)
    assert found.returncode == 0, found.stderr
    names = [step.name for step in steps()]
    fitting = [step.name for step in steps() if step.seconds <= 600]
    assert [line.split(":")[0] for line in (out / "steps.txt").read_text().splitlines()] == fitting
    cut = {"closed_form", "end_to_end"}
    assert {p.name for p in (out / "done").iterdir()} == set(fitting) - cut
    assert (out / "done" / "tests").read_text() == "1\n"
    assert (out / "kernels.log").read_text() == "said\n"
    assert "-k 5 170 sh -c" in calls.read_text()
    assert f"{names[-1]}: no time left" in found.stdout

    calls.unlink()
    visit("--minutes", 12, out, "continue", path=path)
    again = calls.read_text().splitlines()
    assert len(again) == len(cut) and all("closed_form" in c or "end_to_end" in c for c in again)

    calls.unlink()
    visit("--minutes", 12, out, path=path)
    assert len(calls.read_text().splitlines()) >= len(fitting), "a new visit starts over"


def test_nothing_begins_when_the_time_is_over(tmp_path: Path, path: str) -> None:
    found = visit("--minutes", 0, tmp_path / "out", path=path)
    assert not (tmp_path / "calls").exists()
    assert found.stdout.splitlines() == [f"{step.name}: no time left" for step in steps()]


def test_rows_of_a_whole_erasure_name_every_stage() -> None:
    pipe = tiny_pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    parts = models.Parts(pipe.unet, (pipe.text_encoder,), (pipe.tokenizer,), pipe.scheduler)
    memory = Memory(torch.device("cpu"))
    point = end_to_end.Point("tiny", "first", 1)
    rows = end_to_end.whole(point, parts, ["cat=ship"], memory, CONFIG)
    memory.stop()
    by_stage = {row["stage"]: row for row in rows}
    assert {"alignment", "all", "edit and checks"} < set(by_stage)
    parts_of_it = sum(row["seconds"] for name, row in by_stage.items() if name != "all")
    assert parts_of_it == pytest.approx(by_stage["all"]["seconds"], abs=0.01)
    assert by_stage["all"]["peak_mb"] == max(row["peak_mb"] for row in rows) > 0
    assert len(list(end_to_end.lines(rows))) == len(rows)
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (models.stable_diffusion_1, [860, 123]),
        (models.stable_diffusion_xl, [2567, 123, 695]),
        (models.flux, [546, 123, 4762]),
    ],
)
def test_models_are_as_large_as_the_real_ones(build, millions) -> None:
    with torch.device("meta"):
        unet, encoders = build()
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (unet, *encoders)]
    assert [round(size) for size in sizes] == millions
