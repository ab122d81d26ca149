"""The main job: what it draws, what it counts, what it writes, and what the eraser never sees."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_models import tiny_pipeline

from realera_fast import Concept, EraseConfig, Erasure, embedded
from realera_fast.cli import program as cli
from realera_fast.cli.demo_job import run_demo
from realera_fast.cli.demo_plan import ERASE_CONFIG, DemoConfig, other_things, plan, scene_thing
from realera_fast.cli.demo_report import FILES
from realera_fast.embedded.judge import Sight

CAT = DemoConfig(thing="cat")
SMALL = DemoConfig(
    thing="cat",
    pictures=4,
    synonym_pictures=2,
    relative_pictures=1,
    others=6,
    scene_pictures=2,
    style_pictures=2,
    columns=2,
)
CLOSED_FORM = EraseConfig.from_dict({"alignment": {"enabled": False}, "mining": {"mode": "none"}})


class Reader:
    """A judge that reads what was asked for from the picture, and a painter that writes it there.

    Before the erasure it sees whatever the prompt names. After it, `blind` says which words of a
    prompt are no longer painted.
    """

    def __init__(self, blind: Sequence[str] = ()) -> None:
        self.blind = blind
        self.drawn: set[tuple[str, int]] = set()
        table = embedded.words()
        self.things = {w: t.name for t in table.things for w in (t.name, *t.said, *t.unsaid)}
        self.styles = {w: s.name for s in table.styles for w in (s.name, *s.said, *s.unsaid)}

    def paint(
        self, _pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *_: Any, **__: Any
    ) -> Any:
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            picture = Image.new("RGB", (8, 8), (seed % 256, 0, 0))
            # Nothing is drawn twice before the erasure: what was drawn already is drawn after it.
            after = (prompt, seed) in self.drawn
            self.drawn.add((prompt, seed))
            hidden = [w for w in self.blind if after and prompt.endswith(w)]
            picture.info["prompt"] = "" if hidden else prompt
            pictures.append(picture)
        return pictures

    def classify(self, images: Sequence[Image.Image]) -> tuple[list[str], list[str]]:
        def last(words: dict[str, str], prompt: str) -> str:
            found = [w for w in words if prompt.endswith(w)]
            return words[max(found, key=len)] if found else "nothing"

        prompts = [str(image.info["prompt"]) for image in images]
        return [last(self.things, p) for p in prompts], [last(self.styles, p) for p in prompts]

    def look(self, images: Sequence[Image.Image]) -> list[Sight]:
        """Both things of a scene."""
        parts = [str(image.info["prompt"]).split(" and ") for image in images]
        seen = [
            [self.things[p.removeprefix("a photo of ").split(" ", 1)[-1]] for p in part]
            for part in parts
        ]
        return [Sight(tuple(things), "color", junk=False) for things in seen]


def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind: Sequence[str] = ()) -> Any:
    reader = Reader(blind)
    monkeypatch.setattr("realera_fast.cli.demo_job.generate", reader.paint)
    return run_demo(
        tmp_path / "demo",
        SMALL,
        erase_config=CLOSED_FORM,
        progress=False,
        device="cpu",
        pipe=tiny_pipeline(),
        judge=reader,
    )


# --- the plan ------------------------------------------------------------------------------


def test_plan_covers_every_word_once_and_stays_in_budget() -> None:
    table = embedded.words()
    shots = plan(table, CAT)
    # The time of the job is the number of its pictures times the steps of the sampler: every row
    # goes through the denoiser with and without its prompt, before and after.
    for few in (shots, plan(table, DemoConfig())):
        assert len(few) <= 200 and 4 * len(few) * CAT.steps <= 4400
    cat = {shot.word: shot.group for shot in shots if shot.erased == "cat"}
    target = table.thing("cat")
    assert {w for w, g in cat.items() if g == "erased"} == {"cat"}
    assert {w for w, g in cat.items() if g == "synonym"} == set(table.held_out(target))
    assert set(target.said) < set(table.held_out(target)) < {*target.said, *target.unsaid}
    assert {w for w, g in cat.items() if g == "relative"} == set(target.relatives)
    beside = scene_thing(table, CAT)
    others = {w for w, g in cat.items() if g == "untouched"}
    assert others >= {*other_things(table, CAT), f"cat and {beside.name}"}
    assert not others & {"cat", *target.relatives} and len(others) >= CAT.others
    mosaic = {shot.word: shot.group for shot in shots if shot.erased == "mosaic"}
    assert set(mosaic) == {s.name for s in table.styles} | set(
        table.held_out(table.style("mosaic"))
    )


def test_plan_never_draws_the_same_picture_twice() -> None:
    shots = plan(embedded.words(), CAT)
    assert max(Counter((shot.prompt, shot.seed) for shot in shots).values()) == 1


def test_styles_are_shown_on_many_things_and_never_on_the_erased_one() -> None:
    shots = [s for s in plan(embedded.words(), CAT) if s.kind == "style"]
    assert len({s.prompt for s in shots if s.group == "erased"}) == CAT.pictures >= 16
    assert not any(s.prompt.startswith("a cat ") for s in shots)


def test_prompts_are_english() -> None:
    prompts = {shot.prompt for shot in plan(embedded.words(), CAT)}
    assert "a photo of a tiger" in prompts and any(p.startswith("a photo of an ") for p in prompts)
    assert not any(" a a" in p or " a e" in p or "{" in p or "  " in p for p in prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thing": "jackalope"}, "thing: the embedded model has no 'jackalope'"),
        ({"style": "cubism"}, "style: the embedded model has no 'cubism'"),
        ({"style_anchor": "art"}, "style_anchor: the embedded model has no 'art'"),
    ],
)
def test_unknown_words(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(embedded.words(), replace(DemoConfig(), **changes))


def test_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="columns must be at least 1"):
        DemoConfig(columns=0)


def test_every_thing_can_be_planned() -> None:
    table = embedded.words()
    for thing in table.things:
        shots = plan(table, DemoConfig(thing=thing.name))
        groups = {s.group for s in shots if s.erased == thing.name}
        assert groups >= {"erased", "synonym", "untouched"}, thing.name


# --- the eraser never sees a held-out word -------------------------------------------------


def test_no_held_out_word_reaches_the_eraser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from realera_fast.cli import demo_job as module

    given: dict[str, Any] = {}
    original = module.erase

    def spy(*args: Any, **options: Any) -> Erasure:
        given.update(options, concepts=args[2])
        return original(*args, **options)

    monkeypatch.setattr(module, "erase", spy)
    result = demo(tmp_path, monkeypatch)
    table = embedded.words()
    held_out = {*table.held_out(table.thing("cat")), *table.held_out(table.style("mosaic"))}
    words = {w for c in given["concepts"] for w in (*c.words, c.destination)}
    assert words == {"cat", "mosaic", None, "color"}
    assert not words & held_out and not given.get("preserve")
    report = json.loads((result.folder / "report.json").read_text())
    assert set(report["held_out"]) == held_out


@pytest.mark.parametrize("found", [(), ("kitty", "tiles")])
def test_mined_held_out_words_are_said_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[str, ...]
) -> None:
    from realera_fast.cli import demo_job as module

    original = module.erase

    def mining(*args: Any, **options: Any) -> Erasure:
        erasure = original(*args, **options)
        return replace(erasure, report={**erasure.report, "neighbors": {"cat": list(found)}})

    monkeypatch.setattr(module, "erase", mining)
    result = demo(tmp_path, monkeypatch)
    report = json.loads((result.folder / "report.json").read_text())
    page = (result.folder / "report.html").read_text()
    assert result.mined == found == tuple(report["held_out_mined"])
    text = " ".join(result.text().split())
    for place in (text, " ".join(report["warnings"]), page):
        assert (f"mining found 2 of {len(report['held_out'])} (kitty, tiles)" in place) == bool(
            found
        )
    assert ("mining found none of them" in page) != bool(found)
    assert "never told" not in page and "never given" not in page


def test_a_leak_is_refused() -> None:
    from realera_fast.cli.demo_plan import check_held_out as _check_held_out

    table = embedded.words()
    assert _check_held_out([Concept("cat")], table) == [*table.held_out(table.thing("cat"))]
    with pytest.raises(ValueError, match=r"held-out words \['kitty'\]"):
        _check_held_out([Concept("cat", synonyms=("kitty",))], table)
    with pytest.raises(ValueError, match=r"held-out words \['kitty'\]"):
        _check_held_out([Concept("cat", anchor="Kitty")], table)


# --- the scores ----------------------------------------------------------------------------


def test_a_perfect_model_scores_one_and_erases_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in demo(tmp_path, monkeypatch).scores:
        for scores in (line.before, line.after):
            assert (scores.acc_e, scores.acc_s, scores.acc_g, scores.h_o) == (1.0, 1.0, 1.0, 0.0)


def test_scores_count_every_word_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # After: the cat, two of its words and one relative are gone; of the styles, the erased one
    # with all its words, and none of the others.
    table = embedded.words()
    words = table.held_out(table.style("mosaic"))
    blind = ["cat", "kitty", "tiger", *(f"style of {word}" for word in ("mosaic", *words))]
    result = demo(tmp_path, monkeypatch, blind)
    cat, mosaic = result.scores
    others = len(
        {
            s.word
            for s in plan(table, SMALL)
            if s.group in ("relative", "untouched") and s.erased == "cat"
        }
    )
    # "housecat" and "pussycat" end in "cat", as "tomcat" does.
    words = table.held_out(table.thing("cat"))
    gone = sum(word.endswith(("cat", "kitty")) for word in words)
    assert (cat.after.acc_e, cat.after.acc_g) == (0.0, pytest.approx(1 - gone / len(words)))
    # Relatives are drawn more often than others, and still count once.
    assert cat.after.acc_s == pytest.approx((others - 1) / others)
    assert mosaic.after.percentages() == {"Acc_e": 0.0, "Acc_s": 100.0, "Acc_g": 0.0, "H_o": 100.0}
    assert cat.before.acc_e == cat.before.acc_s == cat.before.acc_g == 1.0
    text = result.text()
    assert "cat (object)" in text and "100.0 ->   0.0" in text
    report = json.loads((result.folder / "report.json").read_text())
    tiger = next(w for w in report["words"] if w["word"] == "tiger")
    assert (tiger["group"], tiger["before"], tiger["after"]) == ("relative", 1.0, 0.0)
    assert report["scores"]["cat (object)"]["after"]["h_o"] == cat.after.h_o


# --- the files -----------------------------------------------------------------------------


def test_demo_writes_everything(tmp_path: Path) -> None:
    table = replace(embedded.words(), sampling={"steps": 20, "guidance_scale": 4.0})

    class Judge:
        """Names anything: pictures of a random model show nothing."""

        def classify(self, images: Sequence[Image.Image]) -> tuple[list[str], list[str]]:
            return ["cat"] * len(images), ["ink"] * len(images)

        def look(self, images: Sequence[Image.Image]) -> list[Sight]:
            return [Sight(("cat",), "ink", junk=False)] * len(images)

    pipe = tiny_pipeline()
    folder = tmp_path / "deep" / "demo"
    for _ in range(2):  # a second run replaces the first
        pipe = tiny_pipeline()
        own, rows = pipe.scheduler, 0

        def count(_unet: Any, inputs: tuple[Any, ...]) -> None:
            nonlocal rows
            rows += len(inputs[0])

        pipe.unet.register_forward_pre_hook(count)
        result = run_demo(
            folder,
            replace(SMALL, steps=2),
            erase_config=CLOSED_FORM,
            device="cpu",
            progress=False,
            pipe=pipe,
            judge=Judge(),
            table=table,
        )
        # Two steps, guided, before and after: what the plan says, and no row more.
        assert rows == 2 * 2 * 2 * len(plan(table, SMALL))
        assert pipe.scheduler is own
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    with Image.open(folder / "before_after.png") as grid:
        assert grid.width > 4 * 128
    page = (folder / "report.html").read_text()
    assert "held-out words" in page.lower() and "kitty" in page
    report = json.loads((folder / "report.json").read_text())
    assert report["provenance"]["sampling"]["steps"] == 2
    assert report["provenance"]["sampling"]["sampler"] == "DPMSolverMultistepScheduler"
    assert report["provenance"]["versions"]["torch"]
    assert {w["word"] for w in report["erasure"]["words"]} >= {"cat", "mosaic"}
    # The delta is the edit that the pictures show.
    Erasure.load(folder / "erasure.safetensors").restore_(pipe.unet)
    base = tiny_pipeline()
    for name, value in base.unet.state_dict().items():
        assert value.equal(pipe.unet.state_dict()[name])
    assert set(result.seconds) >= {"pictures before", "erasing", "pictures after", "judging"}


def test_unwritable_folder_fails_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("realera_fast.embedded.load_pipeline", lambda: pytest.fail("it loaded"))
    with pytest.raises(OSError):
        run_demo(tmp_path / "file" / "demo")


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = Reader()
    monkeypatch.setattr("realera_fast.cli.demo_job.generate", reader.paint)
    monkeypatch.setattr("realera_fast.embedded.load_pipeline", tiny_pipeline)
    monkeypatch.setattr("realera_fast.embedded.load_judge", lambda: reader)
    options = ["--mining", "none", "--no-align", "--device", "cpu", "--quiet"]
    code = cli.run(["demo", "--thing", "dog", "--out", str(tmp_path / "out"), *options])
    out = capsys.readouterr().out
    assert code == 0
    assert "dog (object)" in out and "mosaic (style)" in out
    for name in FILES:
        assert str(tmp_path / "out" / name) in out
    assert cli.run(["demo", "--thing", "jackalope", "--out", str(tmp_path / "x"), *options]) == 1
    assert "error: thing: the embedded model has no 'jackalope'" in capsys.readouterr().err


def test_command_line_speaks_before_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def load() -> Any:
        said.append(capsys.readouterr().err)
        raise RuntimeError("stopped here")

    monkeypatch.setattr("realera_fast.embedded.load_pipeline", load)
    assert cli.run(["demo", "--out", str(tmp_path / "out")]) == 1
    assert said[0].startswith("demo: erasing 'dog' and the style 'mosaic'")
    assert "demo: loading" in said[0]


def test_command_line_takes_the_demo_s_settings_and_its_options_override_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[EraseConfig] = []

    def stop(*_: Any, erase_config: EraseConfig, **__: Any) -> None:
        given.append(erase_config)
        raise RuntimeError("stopped here")

    monkeypatch.setattr("realera_fast.cli.demo_job.run_demo", stop)
    for options in ([], ["--seed", "3"]):
        cli.run(["demo", "--out", str(tmp_path / "out"), "--quiet", *options])
    assert given == [ERASE_CONFIG, replace(ERASE_CONFIG, seed=3)]


# --- the real model ------------------------------------------------------------------------


def test_on_the_embedded_model(tmp_path: Path) -> None:
    table = embedded.words()
    names = {"cat", "tiger", "lion", "leopard", "bird", "dog"}
    few = replace(table, things=tuple(t for t in table.things if t.name in names))
    result = run_demo(
        tmp_path,
        SMALL,
        erase_config=EraseConfig.from_dict({"alignment": {"enabled": False}}),
        device="cpu",
        progress=False,
        table=few,
    )
    cat = result.scores[0]
    # The model draws what it is asked for, and less so what was erased.
    assert cat.before.acc_e > 0.8 and cat.before.acc_s > 0.8
    assert cat.after.acc_e < cat.before.acc_e - 0.4
