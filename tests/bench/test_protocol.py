"""The protocols: what they hold, and a run of each on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from edits import CLOSED
from model_state import weights
from quality import protocol as protocols
from tiny_clip import tiny_clip
from tiny_families import sd1

from realera_fast.evaluation import ClipJudge
from realera_fast.text import parse_concepts

BENCH = Path(__file__).parents[2] / "bench"
NAMES = sorted(path.stem for path in (BENCH / "protocols").glob("*.json"))


def test_there_is_one_for_each_task_of_the_field():
    assert set(NAMES) == {"objects", "people", "styles", "explicit", "general"}


@pytest.mark.parametrize("model", ["embedded", "other"])
@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_is_complete_and_never_names_what_it_holds_out(name, model):
    protocol = protocols.read_protocol(name, model)
    assert protocol["source"] and protocol["about"] and protocol["pictures"] > 0
    assert {"steps", "guidance"} <= set(protocol["sampler"])
    found = list(protocols.cases(protocol, pictures=2))
    assert found
    for case in found:
        named = {word for concept in parse_concepts(case.concepts) for word in concept.words}
        held_out = {shot.prompt for shot in case.shots if shot.group == "unnamed"}
        assert not named & held_out
        assert {shot.group for shot in case.shots} >= {"erased"}
        kept = {shot.name for shot in case.shots if shot.group == "kept"}
        assert not kept & named
        for group in ("erased", "unnamed", "kept"):
            for shot in case.shots:
                if shot.group == group and group != "kept":
                    assert shot.name in named
    if name == "objects":
        assert len(found) == 10 and all(len(case.concepts) == 1 for case in found)
        assert all(len(case.shots) == 2 * (1 + 3 + 9) for case in found)


def test_pictures_are_shared_between_the_cases_of_a_protocol():
    protocol = protocols.read_protocol("objects", "other")
    first, second = list(protocols.cases(protocol, pictures=3))[:2]
    assert {s for s in first.shots if s.group == "kept"} & set(second.shots)


@pytest.fixture
def small():
    """A protocol of two objects for a tiny model."""
    return {
        **json.loads((BENCH / "protocols" / "objects.json").read_text()),
        "concepts": [{"target": "cat", "unnamed": ["kitten"]}, {"target": "ship", "unnamed": []}],
        "kept": ["tree"],
        "sampler": {"steps": 2, "guidance": 3.0, "height": 16, "width": 16},
        "embedded": False,
        "clip": True,
    }


def run(name, protocol, cases, out, detectors=None, judge=None, accelerator=None):
    pipe = sd1()
    before = weights(pipe.unet)
    job = protocols.Job(
        name=name,
        protocol=protocol,
        model="tiny",
        judge=judge,
        detectors=detectors or {},
        config=CLOSED,
        batch_size=4,
        out=out,
        keep_pictures=True,
        accelerator=accelerator,
    )
    rows = protocols.run(job, pipe, cases)
    assert all(torch.equal(t, before[n]) for n, t in weights(pipe.unet).items())
    return rows


def test_objects(small, tmp_path, capsys):
    judge = ClipJudge(*tiny_clip(), things=("cat", "ship", "tree"))
    found = list(protocols.cases(small, pictures=2))
    rows = run("objects", small, found, tmp_path, judge=judge)
    assert [row["erased"] for row in rows] == [["cat"], ["ship"]]
    assert set(rows[0]["after"]) == {"Acc_e", "Acc_s", "Acc_g", "H_o"}
    assert rows[0]["before"]["Acc_g"] is not None and rows[1]["before"]["Acc_g"] is None
    assert len(rows[0]["evaluators"]["judge"]["weights_sha256"]) == 64
    saved = [json.loads(line) for line in (tmp_path / "objects.jsonl").read_text().splitlines()]
    assert saved == json.loads(json.dumps(rows))
    page = (tmp_path / "objects.html").read_text()
    assert "kitten" in page and "Acc_e after" in page
    assert len(list((tmp_path / "pictures" / "001" / "after").glob("*.png"))) == rows[0]["pictures"]
    assert "mean: " in capsys.readouterr().out


def test_one_process_of_several_writes(small, tmp_path):
    other = SimpleNamespace(process_index=0, num_processes=1, is_main_process=False, trackers=())
    judge = ClipJudge(*tiny_clip(), things=("cat", "ship", "tree"))
    (case, _) = protocols.cases(small, pictures=1)
    assert run("objects", small, [case], tmp_path / "out", judge=judge, accelerator=other) == []
    assert not (tmp_path / "out").exists()


def test_styles_are_scored_by_clip(small, tmp_path):
    judge = ClipJudge(*tiny_clip(), things=("cat", "ship", "tree"))
    protocol = {**small, "score": "clip", "erase": "all"}
    (case,) = protocols.cases(protocol, pictures=1)
    (row,) = run("styles", protocol, [case], tmp_path, judge=judge)
    assert row["after"]["H_a"] == pytest.approx(row["after"]["CLIP_s"] - row["after"]["CLIP_e"])
    assert [c.target for c in case.concepts] == ["cat", "ship"]


def test_explicit_content_is_counted_by_detectors(small, tmp_path):
    csv = tmp_path / "i2p.csv"
    csv.write_text("prompt,sd_seed,sd_guidance_scale\na photo,7,2.5\na tree,9,\n")
    protocol = {**small, "score": "detections", "erase": "all"}
    (case,) = protocols.cases(protocol, pictures=1, prompts=protocols.read_prompts(csv, None))
    drawn = [shot for shot in case.shots if shot.group == "kept"]
    assert [(s.prompt, s.seed, s.guidance) for s in drawn] == [
        ("a photo", 7, 2.5),
        ("a tree", 9, None),
    ]
    (row,) = run("explicit", protocol, [case], tmp_path, {"all": lambda picture: ["found"]})
    assert row["after"] == {"flagged, erased": 2.0, "flagged, unnamed": 1.0, "flagged, kept": 2.0}
    (none,) = run("explicit", protocol, [case], tmp_path, {"none": lambda picture: False})
    assert set(none["after"].values()) == {0.0}


def test_a_prompt_file_without_prompts_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\nhello\n")
    with pytest.raises(SystemExit, match="expected a column 'prompt'"):
        protocols.read_prompts(path, None)
