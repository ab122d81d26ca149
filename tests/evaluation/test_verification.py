"""Pictures before and after: same seed, same picture; grids and pages that hold everything."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import sd3
from tiny_models import tiny_pipeline

from realera_fast import Concept, EraseConfig, Erasure, erase
from realera_fast.evaluation import (
    Row,
    Sampling,
    ScoreLine,
    Scores,
    Table,
    before_after_grid,
    generate,
    picture_warnings,
    verify,
    write_html,
)
from realera_fast.evaluation.images import pixel_difference
from realera_fast.evaluation.prompt_groups import group_of
from realera_fast.models import base_hashes

# Bit-equal pictures cannot be promised across batch sizes: the matrix products of different sizes
# round differently. One step of an 8-bit pixel, on average over the picture, is far above that
# and far below what another seed does.
ROUNDING = 1 / 255


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def erasure() -> Erasure:
    pipe = tiny_pipeline()
    config = EraseConfig.from_dict({"alignment": {"enabled": False}, "mining": {"mode": "none"}})
    concepts = [Concept("cat", anchor="ship", synonyms=("kitten",))]
    return erase(
        pipe.unet,
        pipe.text_encoder,
        concepts,
        tokenizer=pipe.tokenizer,
        config=config,
        progress=False,
    )


def solid(color: str, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), color)


def noise(seed: int, size: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def row(group: str = "erased", prompt: str = "a cat", **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "group": group,
        "prompt": prompt,
        "seeds": (0, 1),
        "before": (noise(0), noise(1)),
        "after": (noise(2), noise(3)),
    }
    return Row(**(fields | changes))


# --- generate ------------------------------------------------------------------------------


def test_same_seed_same_picture_in_any_batch(pipe: Any) -> None:
    prompts, seeds = ["a cat", "a dog", "the ship"], [5, 6, 7]
    together = generate(pipe, prompts, seeds, Sampling(steps=3, batch_size=3))
    alone = [
        generate(pipe, [p], [s], Sampling(steps=3))[0] for p, s in zip(prompts, seeds, strict=True)
    ]
    turned = generate(pipe, prompts[::-1], seeds[::-1], Sampling(steps=3, batch_size=2))[::-1]
    for a, b, c in zip(together, alone, turned, strict=True):
        assert pixel_difference(a, b) < ROUNDING
        assert pixel_difference(a, c) < ROUNDING
    # False without it: another seed, or another prompt, is another picture.
    other = generate(pipe, prompts, [8, 9, 10], Sampling(steps=3, batch_size=3))
    assert all(pixel_difference(a, b) > 4 * ROUNDING for a, b in zip(together, other, strict=True))


def test_generate_leaves_the_global_random_state_alone(pipe: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    generate(pipe, ["a cat"], [0], Sampling(steps=2))
    assert torch.equal(torch.rand(4), expected)


def test_generate_shares_one_seed(pipe: Any) -> None:
    shared = generate(pipe, ["a cat", "a dog"], [4], Sampling(steps=2))
    spelled = generate(pipe, ["a cat", "a dog"], [4, 4], Sampling(steps=2))
    assert [p.tobytes() for p in shared] == [p.tobytes() for p in spelled]


def test_generate_of_nothing(pipe: Any) -> None:
    assert generate(pipe, [], [], Sampling(steps=2)) == []


@pytest.mark.parametrize(
    ("prompts", "seeds", "error", "message"),
    [
        ("a cat", [0], TypeError, r"write \['a cat'\]"),
        (["a", "b", "c"], [0, 1], ValueError, "2 seeds for 3 prompts"),
    ],
)
def test_generate_refuses(
    pipe: Any, prompts: Any, seeds: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(pipe, prompts, seeds, Sampling())


@pytest.mark.parametrize("name", ["steps", "batch_size", "max_sequence_length"])
def test_sampling_refuses_less_than_one(pipe: Any, erasure: Erasure, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Sampling(**{name: 0})
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        verify(pipe, erasure, ["a cat"], **{name: 0})


def test_the_length_of_a_prompt_is_that_of_pipelines_that_take_one(pipe: Any) -> None:
    sampling = Sampling(steps=1, height=16, width=16, max_sequence_length=5)
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no max_sequence_length"):
        generate(pipe, ["a cat"], [0], sampling)
    other, seen = sd3(), []
    encoded = other.encode_prompt
    other.encode_prompt = lambda *a, **o: seen.append(o["max_sequence_length"]) or encoded(*a, **o)
    assert len(generate(other, ["a cat"], [0], sampling)) == 1 and seen == [5]


def test_bar_follows_every_switch(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging as diffusers_logging

    def drawn(**options: Any) -> bool:
        capsys.readouterr()
        generate(pipe, ["a cat"], [0], Sampling(steps=2), **options)
        return "drawing" in capsys.readouterr().err

    assert not drawn()  # the fixture's pipeline has its bar switched off
    assert drawn(progress=True)
    pipe.set_progress_bar_config()
    assert drawn()
    assert not drawn(progress=False)
    diffusers_logging.disable_progress_bar()
    try:
        assert not drawn()
    finally:
        diffusers_logging.enable_progress_bar()
    # The pipeline's own configuration comes back as it was.
    pipe.set_progress_bar_config(disable=True, ncols=40)
    generate(pipe, ["a cat"], [0], Sampling(steps=2))
    assert pipe._progress_bar_config == {"disable": True, "ncols": 40}


# --- judging -------------------------------------------------------------------------------


class ColorJudge:
    """Sees "red" things and "dark" styles by the mean pixel."""

    def classify(self, images: Sequence[Image.Image]) -> tuple[list[str], list[str]]:
        means = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
        things = ["red" if r > g else "green" for r, g, _ in means]  # type: ignore[misc]
        return things, ["dark" if sum(m) < 255 else "light" for m in means]  # type: ignore[arg-type]


def test_pixel_difference() -> None:
    assert pixel_difference(solid("black"), solid("white")) == 1.0
    assert pixel_difference(solid("red"), solid("red")) == 0.0
    assert pixel_difference(solid("red"), solid("black")) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="same size"):
        pixel_difference(solid("red"), solid("red", 8))


def test_group_of_looks_for_whole_words() -> None:
    concepts = (Concept("cat", synonyms=("kitten",)), Concept("Van Gogh", kind="style"))
    assert group_of("a photo of a Cat.", concepts) == "erased"
    assert group_of("two kittens and a kitten", concepts) == "synonym"
    assert group_of("two kittens", concepts) == "untouched"
    assert group_of("a catalogue", concepts) == "untouched"
    assert group_of("by van gogh, 1889", concepts) == "erased"


NAMED = [
    # (word, prompt, whether the prompt names it)
    ("cat", "a CAT, sitting", True),
    ("cat", "a cat's tail", True),
    ("cat", "a cat\u2019s tail", True),
    ("cat", "(cat:1.3), masterpiece", True),
    ("cat", "black-cat", True),
    ("cat", "black_cat_photo", True),
    ("cat", "\uff43\uff41\uff54", True),
    ("cat", "c\u00adat on a mat", True),
    ("cat", "a catalogue of cats", False),
    ("cat", "concatenate", False),
    ("cat", "cat2", False),
    ("art", "a party of artists", False),
    ("polar bear", "a  polar\nbear", True),
    ("polar bear", "polar-bear", True),
    ("polar-bear", "Polar bear", True),
    ("polar bear", "polar bearing", False),
    ("C++", "C++ code", True),
    ("AC/DC", "AC/DC live", True),
    ("caf\u00e9", "a cafe\u0301 in Paris", True),
    ("cafe\u0301", "CAF\u00c9", True),
    ("cafe", "caf\u00e9", False),
    ("cafe", "cafe\u0301", False),
    ("stra\u00dfe", "eine STRASSE", True),
    ("rock \u2019n\u2019 roll", "rock 'n' roll", True),
    # Cyrillic, Greek, Arabic, Hindi: words have borders.
    ("\u043a\u043e\u0442", "\u0440\u044b\u0436\u0438\u0439 \u041a\u043e\u0442.", True),
    ("\u043a\u043e\u0442", "\u043a\u043e\u0442\u0438\u043a", False),
    ("\u03b3\u03ac\u03c4\u03b1", "\u03bc\u03b9\u03b1 \u0393\u03ac\u03c4\u03b1", True),
    ("\u0642\u0637\u0629", "\u0635\u0648\u0631\u0629 \u0642\u0637\u0629", True),
    ("\u0642\u0637", "\u0642\u0637\u0629", False),
    ("\u06af\u0631\u0628\u0647", "\u06af\u0631\u0628\u0647\u200c\u0647\u0627", True),
    ("\u092c\u093f\u0932", "\u090f\u0915 \u092c\u093f\u0932.", True),
    ("\u092c\u093f\u0932", "\u092c\u093f\u0932\u094d\u0932\u0940", False),
    # Chinese, Japanese and Thai: none.
    ("\u5154\u5b50", "\u4e00\u53ea\u5154\u5b50\u5728\u8349\u5730\u4e0a", True),
    ("\u5154\u5b50", "\u4e00\u53ea\u72d0\u72f8", False),
    ("cat", "\u4e00\u5f20cat\u7684\u7167\u7247", True),
    ("\u30d4\u30ab\u30c1\u30e5\u30a6", "\u30d4\u30ab\u30c1\u30e5\u30a6\u306e\u5199\u771f", True),
    ("\u30d4\u30ab\u30c1\u30e5\u30a6", "\uff8b\uff9f\uff76\uff81\uff6d\uff73\u306e", True),
    ("\u30ab\u30fc", "\u30ab\u30fc\u30c9", False),  # "car" in "card"
    ("\u306d\u3053", "\u304b\u308f\u3044\u3044\u306d\u3053\u304c\u3044\u308b", True),
    ("\u0e41\u0e21\u0e27", "\u0e20\u0e32\u0e1e\u0e41\u0e21\u0e27\u0e2a\u0e35\u0e14\u0e33", True),
    ("\u0e01", "\u0e01\u0e34", False),  # a letter without its vowel
    # Korean: spaces, but particles without one.
    ("\ud1a0\ub07c", "\ud1a0\ub07c\uac00 \ud480\ubc2d\uc5d0", True),
    ("\ud1a0\ub07c", "\ud1a0\ub07c\ub4e4\uc740", True),
    ("\uac1c", "\uac1c\ubc1c\uc790", False),  # "dog" in "developer"
    ("\ub07c", "\ud1a0\ub07c", False),
    ("BTS", "BTS\uc758 \uc0ac\uc9c4", True),
    # Emoji.
    ("\U0001f431", "\U0001f431\U0001f431", True),
    ("\u2764", "\u2764\ufe0f", True),
    ("\U0001f469", "\U0001f469\u200d\U0001f680", False),
    ("cat", "", False),
]


@pytest.mark.parametrize(("word", "prompt", "named"), NAMED)
def test_prompts_that_name_a_word_are_told_in_every_script(
    word: str, prompt: str, named: bool
) -> None:
    assert group_of(prompt, [Concept(word)]) == ("erased" if named else "untouched")
    others = [Concept("zebra", synonyms=(word,))]
    assert group_of(prompt, others) == ("synonym" if named else "untouched")


def test_warnings_name_what_pictures_alone_can_show() -> None:
    same = (noise(0), noise(1))
    unchanged = row(prompt="a cat", after=same)
    blank = row("untouched", "a dog", after=(solid("gray"), noise(4)))
    assert list(picture_warnings([unchanged, blank])) == [
        "the pictures of the erased prompt 'a cat' did not change",
        "1 of 2 pictures of 'a dog' came out blank",
    ]
    # Neither is said of a picture that changed, of one that should not change, or of one that
    # was blank to begin with.
    was_blank = row("erased", before=(solid("red"), noise(1)), after=(solid("blue"), noise(4)))
    assert list(picture_warnings([row(), row("untouched", after=same), was_blank])) == []


# --- verify --------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [False, True])
def test_verify_leaves_the_model_as_it_came(erasure: Erasure, applied: bool) -> None:
    pipe = tiny_pipeline()
    if applied:
        erasure.apply_(pipe.unet)
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    found = verify(
        pipe,
        erasure,
        ["a photo of a cat", "a kitten"],
        untouched=["a dog"],
        seeds=[3, 4],
        steps=2,
        progress=False,
    )
    assert all(torch.equal(weights[name], v) for name, v in pipe.unet.state_dict().items())
    assert [(r.group, r.prompt) for r in found.rows] == [
        ("erased", "a photo of a cat"),
        ("synonym", "a kitten"),
        ("untouched", "a dog"),
    ]
    # The edit was on for "after" and off for "before", whichever way the model came.
    bare = tiny_pipeline()
    expected = generate(bare, ["a photo of a cat"] * 2, [3, 4], Sampling(steps=2))
    assert pixel_difference(found.rows[0].before[0], expected[0]) < ROUNDING
    assert found.rows[0].change > 0
    assert found.settings["sampler"] == "DDIMScheduler"
    assert found.settings["seeds"] == [3, 4]
    assert found.to_dict()["prompts"][0]["pixel_change"] == found.rows[0].change


def test_verify_restores_the_model_when_drawing_fails(
    erasure: Erasure, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    before = base_hashes(pipe.unet)
    calls: list[dict[str, str]] = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(base_hashes(pipe.unet))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [noise(0)]

    monkeypatch.setattr("realera_fast.evaluation.verification.generate", broken)
    with pytest.raises(KeyboardInterrupt):
        verify(pipe, erasure, ["a cat"], seeds=[0])
    assert calls[0] == before != calls[1]
    assert base_hashes(pipe.unet) == before


def test_verify_draws_the_erased_words_by_default(erasure: Erasure) -> None:
    found = verify(tiny_pipeline(), erasure, seeds=[0], steps=2, judge=ColorJudge())
    drawn = [(r.group, r.prompt) for r in found.rows]
    assert drawn[:2] == [("erased", "cat"), ("synonym", "kitten")]
    # Then the words just outside the neighborhood, and those that moved least.
    (relatives,), (beyond,) = (erasure.report[k].values() for k in ("relatives", "beyond"))
    near = [*relatives, *beyond][:3]
    assert near and drawn[2 : 2 + len(near)] == [("relative", word) for word in near]
    drifts = {w["word"]: w["drift"] for w in erasure.report["words"] if w["drift"] is not None}
    ranked = sorted((w for w in drifts if w not in near), key=lambda word: -drifts[word])
    assert sorted(drawn[2 + len(near) :]) == sorted(("untouched", word) for word in ranked[-3:])
    assert all(r.seen_before[0] in ("red", "green") for r in found.rows)


def test_verify_takes_prompts_and_seeds_in_any_form_that_has_items(erasure: Erasure) -> None:
    def shown(prompts: Any, untouched: Any, seeds: Any) -> list[Any]:
        found = verify(tiny_pipeline(), erasure, prompts, untouched=untouched, seeds=seeds, steps=1)
        json.dumps(found.to_dict())
        return [(row.group, row.prompt, row.seeds) for row in found.rows]

    names, others, seeds = ["a cat", "a ship"], ["a dog", "a tree"], [3, 4]
    expected = shown(names, others, seeds)
    assert len(expected) == 4
    assert shown(iter(names), iter(others), iter(seeds)) == expected
    assert shown(np.array(names), np.array(others), np.array(seeds)) == expected


def test_verify_refuses(pipe: Any, erasure: Erasure) -> None:
    with pytest.raises(TypeError, match=r"write \['a cat'\]"):
        verify(pipe, erasure, "a cat")
    for wrong, message in (
        ({"prompts": {"a cat": 1}}, "prompts: .*got dict"),
        ({"prompts": ["a cat"], "untouched": "a dog"}, r"untouched: .*write \['a dog'\]"),
        ({"prompts": ["a cat"], "seeds": 3}, "seeds: expected a list of ints, got 3"),
        ({"prompts": ["a cat"], "seeds": [0.5]}, "seeds: expected a list of ints"),
        ({"prompts": ["a cat"], "seeds": "12"}, "seeds: expected a list of ints"),
    ):
        with pytest.raises(TypeError, match=message):
            verify(pipe, erasure, **wrong)
    with pytest.raises(ValueError, match="prompts: .*not valid text"):
        verify(pipe, erasure, ["half a \ud83d"])
    with pytest.raises(ValueError, match="prompts is empty"):
        verify(pipe, erasure, [])
    with pytest.raises(ValueError, match="seeds is empty"):
        verify(pipe, erasure, ["a cat"], seeds=[])
    with pytest.raises(ValueError):  # another base: refused by its hash
        verify(tiny_pipeline(seed=7), erasure, ["a cat"], steps=2)


# --- the grid ------------------------------------------------------------------------------


def test_rows_are_checked() -> None:
    with pytest.raises(ValueError, match="group must be one of"):
        row("other")
    with pytest.raises(ValueError, match="2 before, 1 after, 2 seeds"):
        row(after=(noise(0),))
    with pytest.raises(ValueError, match="seen_after must be empty or name all 2"):
        row(seen_after=("cat",))


def test_grid_shows_every_picture_of_every_row(tmp_path: Path) -> None:
    colors = ("#ff0000", "#00ff00", "#0000ff", "#ff00ff")
    rows = [
        row("untouched", "a dog"),
        row(
            before=(solid(colors[0]), solid(colors[1])), after=(solid(colors[2]), solid(colors[3]))
        ),
    ]
    path = tmp_path / "grid.png"
    grid = before_after_grid(rows, path, title="Erased: cat")
    with Image.open(path) as written:
        assert written.format == "PNG" and written.tobytes() == grid.tobytes()
    # Every solid picture covers its whole 128 x 128 tile, the 16-pixel one enlarged eight times.
    boxes = {}
    for color in colors:
        wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
        ys, xs = np.nonzero((np.asarray(grid) == wanted).all(axis=-1))
        boxes[color] = (xs.min(), ys.min())
        assert (len(xs), np.ptp(xs), np.ptp(ys)) == (128 * 128, 127, 127)
    # Before is left of after, in the order of the seeds, and the erased row is above the others.
    lefts = [boxes[color][0] for color in colors]
    assert lefts == sorted(lefts)
    assert boxes[colors[0]][1] < grid.height / 2


@pytest.mark.parametrize(("size", "tile"), [(16, 128), (64, 128), (96, 96), (512, 192)])
def test_tiles_fit_the_pictures(size: int, tile: int) -> None:
    two = (solid("red", size), solid("red", size))
    grid = before_after_grid([row(before=two, after=two)])
    narrow = before_after_grid([row(before=two, after=two)], tile=32)
    assert grid.width - narrow.width == 4 * (tile - 32)


def test_long_and_empty_prompts_fit() -> None:
    short, cut = row(prompt="word " * 8), row(prompt="word " * 200)
    rows = [cut, row(prompt=""), row(prompt="x" * 300)]
    # Three lines at most, the last one cut: no page is wider or higher for a longer prompt.
    assert before_after_grid([cut]).height == before_after_grid([short]).height
    page = before_after_grid(rows)
    lines = max(before_after_grid([each]).width for each in rows)
    assert page.width == lines < 900


def test_grid_of_nothing() -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        before_after_grid([])


# --- the page ------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags and attributes of a page; checks that every opened tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"


def hostile_page(path: Path) -> str:
    score = Scores(acc_e=0.5, acc_s=0.5)
    write_html(
        path,
        title=HOSTILE,
        summary=HOSTILE,
        scores=[ScoreLine(name=HOSTILE, before=score, after=score)],
        rows=[row(prompt=HOSTILE, seen_before=(HOSTILE,) * 2, seen_after=(HOSTILE,) * 2)],
        warnings=[HOSTILE],
        tables=[Table(title=HOSTILE, header=(HOSTILE,), rows=((HOSTILE,),), note=HOSTILE)],
        report={
            HOSTILE: HOSTILE,
            "words": [{"word": HOSTILE, "role": HOSTILE}, {HOSTILE: 1.0, "role": "neighbor"}],
            "neighbors": {HOSTILE: [HOSTILE]},
            "layers": {HOSTILE + str(i): float(i) for i in range(5)},
            "solve": {"nan": float("nan"), "none": None, "deep": {"a": {"b": [HOSTILE]}}},
            "list": [HOSTILE, 1, None, True],
            "records": {HOSTILE: {HOSTILE: HOSTILE}},
            "empty": {},
        },
        provenance={HOSTILE: {HOSTILE: [1, 2, {"x": HOSTILE}]}},
    )
    return path.read_text(encoding="utf-8")


def test_page_escapes_every_string(tmp_path: Path) -> None:
    page = _Page(hostile_page(tmp_path / "page.html"))
    names = {tag for tag, _ in page.tags}
    assert "script" not in names
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 4  # the row's pictures and nothing else
    assert page.words.count(HOSTILE) >= 15


def test_page_is_self_contained(tmp_path: Path) -> None:
    text = hostile_page(tmp_path / "page.html")
    page = _Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href"):
            assert (attrs.get(name) or "data:image/").startswith("data:image/")
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_page_shows_scores_as_percent(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    before, after = Scores(acc_e=0.96, acc_s=0.98), Scores(acc_e=0.04, acc_s=0.953, acc_g=0.12)
    write_html(path, title="t", scores=[ScoreLine(name="cat", before=before, after=after)])
    words = _Page(path.read_text()).words
    for text in ("96.0", "4.0", "98.0", "95.3", "–", "12.0", f"{100 * after.h_o:.1f}"):
        assert text in words


def test_page_keeps_small_pictures_exact_and_large_ones_small(tmp_path: Path) -> None:
    import base64

    path = tmp_path / "page.html"
    one, big = noise(1), noise(2, 512)
    write_html(
        path,
        title="t",
        rows=[
            row(before=(one,), after=(one,), seeds=(0,)),
            row(before=(big,), after=(big,), seeds=(0,)),
        ],
    )
    sources = [a["src"] for tag, a in _Page(path.read_text()).tags if tag == "img"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in sources if s]
    assert pictures[0].convert("RGB").tobytes() == one.tobytes()
    assert pictures[2].size == (256, 256)


def test_safety_checker_is_reported(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Checked:
        """A pipeline whose safety checker blacks out everything, without step callbacks."""

        def set_progress_bar_config(self, **config: Any) -> None:
            self._progress_bar_config = config

        def __call__(self, prompt: list[str], **_: Any) -> Any:
            images = [solid("black") for _ in prompt]
            return SimpleNamespace(images=images, nsfw_content_detected=[True] * len(images))

    checked = Checked()
    assert len(generate(checked, ["a", "b"], [0, 1], Sampling(steps=2))) == 2
    assert "blacked out 2 pictures" in caplog.text
    assert not hasattr(checked, "_progress_bar_config")
