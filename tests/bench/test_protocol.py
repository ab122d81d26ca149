"""The protocols: what they hold, and a run of each on tiny models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from baselines import adv_unlearn
from edits import CLOSED
from model_state import same, weights
from quality import methods
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


LIBRARY = {"realera_fast": methods.library(CLOSED)}


def run(name, protocol, cases, out, detectors=None, judge=None, accelerator=None, erasers=LIBRARY):
    pipe = sd1()
    before = [weights(model) for model in (pipe.unet, pipe.text_encoder)]
    job = protocols.Job(
        name=name,
        protocol=protocol,
        model="tiny",
        judge=judge,
        detectors=detectors or {},
        methods=erasers,
        seed=0,
        batch_size=4,
        out=out,
        keep_pictures=True,
        accelerator=accelerator,
    )
    rows = protocols.run(job, pipe, cases)
    assert all(map(same, (pipe.unet, pipe.text_encoder), before))
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
    folders = [tmp_path / "pictures" / "001" / side for side in ("before", "realera_fast")]
    assert [len(list(f.glob("*.png"))) for f in folders] == [rows[0]["pictures"]] * 2
    assert "mean of 2, realera_fast: " in capsys.readouterr().out


def test_methods_are_drawn_from_the_same_pictures_and_stand_in_one_table(small, tmp_path, capsys):
    def broken(pipe, concepts, seed, exclude):
        with torch.no_grad():
            next(pipe.unet.parameters()).zero_()
        raise ValueError("no such layer")

    erasers = {
        **LIBRARY,
        **methods.named(["UCE", "AdvUnlearn"], tuned=False),
        "OCE": methods.Method(broken, False, {}),
    }
    advised = "AdvUnlearn, the authors' with smaller budgets"
    assert list(erasers) == ["realera_fast", "UCE, authors'", advised, "OCE"]
    few = dataclasses.replace(adv_unlearn.Settings(), iterations=1, warm_up=0)
    erasers[advised] = methods.baseline(adv_unlearn, few)
    judge = ClipJudge(*tiny_clip(), things=("cat", "ship", "tree"))
    found = list(protocols.cases(small, pictures=1))
    rows = run("objects", small, found, tmp_path, judge=judge, erasers=erasers)
    made = [(row["method"], *row["erased"]) for row in rows]
    assert made == [(m, c) for c in ("cat", "ship") for m in list(erasers)[:3]]
    assert rows[0]["before"] == rows[1]["before"] == rows[2]["before"]
    assert rows[1]["settings"] == dict(erasers["UCE, authors'"].settings)
    told = capsys.readouterr().out
    assert "OCE: stopped by an error, and left out from here: no such layer" in told
    page = (tmp_path / "objects.html").read_text()
    assert page.index("OCE: ValueError: no such layer") < page.index("Methods")
    assert page.index("Methods") < page.index("Scores")
    assert all(text in page for text in ("UCE, authors&#x27;", "realera_fast: a photo of the cat"))


def test_words_that_a_config_excludes_stay_excluded(monkeypatch):
    given = []
    monkeypatch.setattr(
        "realera_fast.erase", lambda *_, config, **__: given.append(config.vocabulary.exclude)
    )
    config = methods.changed(CLOSED, vocabulary={"exclude": ("lynx",)})
    methods.library(config).erase(None, [], 0, ("kitty",))
    assert given == [("lynx", "kitty")]


def test_mistakes_in_who_erases_are_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    call = ["objects", "--model", "embedded", "--erase", "cat", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"expected some of realera_fast, strict.*got 'nobody'"):
        protocols.main([*call, "--methods", "UCE", "nobody"])
    with pytest.raises(SystemExit, match="--config is of realera_fast"):
        protocols.main([*call, "--methods", "UCE", "--config", str(config)])
    found = methods.named(["MACE", "stric?"], tuned=True)
    assert list(found) == ["MACE", "strict"] and found["MACE"].settings == dict(
        methods.baseline(methods.BASELINES["MACE"], methods.TUNED["MACE"]).settings
    )


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
