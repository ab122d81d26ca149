"""Pictures before and after an erasure, drawn from the same seeds, and pages that show them.

`generate` draws, `verify` compares any pipeline before and after an `Erasure`, `before_after_grid`
puts the outcome on one picture, `page.write_html` on one self-contained page. Nothing here needs a
judge; where there is one (any classifier with a ``classify`` method), what it saw is shown.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import io
import logging
import operator
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat
from torch import Tensor

from realera_fast.concepts import Concept
from realera_fast.denoiser import base_hashes, projections, streams
from realera_fast.erasure import Erasure
from realera_fast.families import component_name, components_of, text_streams
from realera_fast.files import write_atomically
from realera_fast.names import folded, listed, script, valid_texts
from realera_fast.precision import cpu_warnings
from realera_fast.progress import bar
from realera_fast.states import alone

logger = logging.getLogger(__name__)

Group = Literal["erased", "synonym", "relative", "untouched"]

GROUPS: Mapping[Group, str] = {
    "erased": "erased",
    "synonym": "synonyms of the erased",
    "relative": "near relatives, to be kept",
    "untouched": "untouched",
}
"""Kinds of row, in the order in which they are shown, with their headings."""

UNCHANGED = 0.5 / 255
"""Mean pixel difference, in [0, 1], below which two pictures count as the same: half of the
smallest difference an 8-bit pixel can show."""

BLANK = 2.0
"""Standard deviation over the pixels, of 255, below which a picture counts as blank."""


Detector = Callable[[Image.Image], Any]
"""Anything that says something of a picture: a label, a number, a list of what it found."""


class Scorer(Protocol):
    """Anything that says how well pictures fit prompts."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """`[n]` scores of picture i and prompt i, higher is better."""
        ...


class Judge(Protocol):
    """Anything that names what pictures show."""

    def classify(self, images: Sequence[Image.Image]) -> tuple[Sequence[str], Sequence[str]]:
        """`[n]` pictures to `[n]` names of things and `[n]` names of styles."""
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt: pictures before and after, picture i of both from the same seed."""

    group: Group
    """What the prompt is to the erasure; one of `GROUPS`."""

    prompt: str
    """The prompt, shown as it is."""

    seeds: tuple[int, ...]
    """`[s]` one seed per picture."""

    before: tuple[Image.Image, ...]
    """`[s]` pictures of the original model."""

    after: tuple[Image.Image, ...]
    """`[s]` pictures of the edited model."""

    seen_before: tuple[str, ...] = ()
    """`[s]` what a judge saw in `before`; empty without a judge."""

    seen_after: tuple[str, ...] = ()
    """`[s]` what a judge saw in `after`; empty without a judge."""

    text_change: float | None = None
    """|W' x - W x| / |W x| of the prompt x over the maps that its tokens enter the model through;
    None where it was not measured."""

    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean score before and after by name, such as ``clip``."""

    detected: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    """What each detector said of the pictures before and after, as text."""

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"Row.group must be one of {tuple(GROUPS)}, got {self.group!r}")
        if not self.before or not len(self.before) == len(self.after) == len(self.seeds):
            raise ValueError(
                "Row needs as many pictures before as after and one seed for each, got "
                f"{len(self.before)} before, {len(self.after)} after, {len(self.seeds)} seeds"
            )
        for name in ("seen_before", "seen_after"):
            if len(getattr(self, name)) not in (0, len(self.seeds)):
                raise ValueError(
                    f"Row.{name} must be empty or name all {len(self.seeds)} pictures, "
                    f"got {len(getattr(self, name))}"
                )

    @property
    def change(self) -> float:
        """Mean absolute pixel difference between before and after, in [0, 1]."""
        pairs = zip(self.before, self.after, strict=True)
        return sum(picture_difference(old, new) for old, new in pairs) / len(self.before)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The pictures of one erasure, before and after."""

    rows: tuple[Row, ...]
    """One per prompt."""

    settings: Mapping[str, Any]
    """Sampler, steps, guidance and library versions: what it takes to draw the same again."""

    warnings: tuple[str, ...] = field(default=())
    """What a reader must not overlook, such as erased prompts whose pictures did not change."""

    evaluators: Mapping[str, Any] = field(default_factory=dict)
    """Who judged: class, version and hash of each judge, scorer and detector."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: everything but the pictures."""
        return {
            "settings": dict(self.settings),
            "evaluators": dict(self.evaluators),
            "warnings": list(self.warnings),
            "prompts": [
                {
                    "prompt": row.prompt,
                    "group": row.group,
                    "seeds": list(row.seeds),
                    "pixel_change": row.change,
                    "text_change": row.text_change,
                    "scores": {k: list(v) for k, v in row.scores.items()},
                    "seen": [list(row.seen_before), list(row.seen_after)],
                    "detected": {k: [list(x) for x in v] for k, v in row.detected.items()},
                }
                for row in self.rows
            ],
        }


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    description: str = "drawing",
    progress: bool | None = None,
) -> list[Image.Image]:
    """Draws picture i from prompt i and seed i.

    Every picture has its own random generator, on the CPU: the same seed gives the same picture
    (up to rounding) in any batch, in any order, and on any device.

    Args:
        pipe: A diffusers text-to-image pipeline. Its safety checker, if it has one, stays on.
        prompts: `[n]` prompts.
        seeds: `[n]` seeds, or one seed for all prompts.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        height: In pixels; None takes the pipeline's own.
        width: In pixels; None takes the pipeline's own.
        batch_size: Pictures drawn together.
        description: Text of the progress bar.
        progress: Draw a bar; None follows the pipeline's and diffusers' own switches.

    Returns:
        `[n]` RGB pictures.
    """
    prompts, seeds = valid_texts(prompts, "prompts"), _seeds(seeds)
    if len(seeds) == 1:
        seeds = (seeds[0],) * len(prompts)
    if len(prompts) != len(seeds):
        raise ValueError(
            f"seeds must have one entry, or one per prompt: got {len(seeds)} seeds for "
            f"{len(prompts)} prompts"
        )
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    accepted = inspect.signature(pipe.__call__).parameters
    if "image" in accepted and "height" not in accepted:
        raise ValueError(
            f"pipe: {type(pipe).__name__} starts from a picture; expected a text-to-image pipeline "
            "(a refiner is judged by the pictures of the pipeline that it is part of)"
        )
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    options |= {k: v for k, v in (("height", height), ("width", width)) if v is not None}
    if "use_resolution_binning" in accepted and (height or width):
        # PixArt and Sana would draw at the nearest size they were trained for.
        options["use_resolution_binning"] = False
    batches = [
        range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)
    ]
    pictures: list[Image.Image] = []
    hidden = 0
    with (
        _silenced(pipe) as silent,
        bar(
            total=steps * len(batches),
            desc=f"{description} {len(prompts)} pictures",
            progress=False if progress is None and silent else progress,
            unit="step",
        ) as steps_bar,
    ):
        # Every stock pipeline calls back after a step; others advance the bar batch by batch.
        calls_back = "callback_on_step_end" in accepted
        if calls_back:

            def advance(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> Any:
                steps_bar.update(1)
                return tensors

            options["callback_on_step_end"] = advance
        for count, batch in enumerate(batches, start=1):
            output = pipe(
                prompt=[prompts[i] for i in batch],
                generator=[torch.Generator("cpu").manual_seed(seeds[i]) for i in batch],
                output_type="pil",
                **options,
            )
            pictures += [picture.convert("RGB") for picture in output.images]
            hidden += sum(getattr(output, "nsfw_content_detected", None) or ())
            # Samplers of second order call the model, but not the callback, twice a step.
            steps_bar.update(count * steps - steps_bar.n)
    if hidden:
        logger.warning("the pipeline's safety checker blacked out %d pictures", hidden)
    return pictures


def picture_difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute pixel difference of two pictures of the same size, in [0, 1]."""
    if one.size != other.size:
        raise ValueError(f"pictures must have the same size, got {one.size} and {other.size}")
    difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return sum(ImageStat.Stat(difference).mean) / (3 * 255)


@alone
def verify(
    pipe: Any,
    erasure: Erasure,
    prompts: Sequence[str] | None = None,
    *,
    untouched: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 25,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    judge: Judge | None = None,
    scorer: Scorer | None = None,
    detectors: Mapping[str, Detector] | None = None,
    progress: bool | None = None,
) -> Verification:
    """Draws every prompt before and after the erasure, from the same seeds.

    The pipeline may come without or with the erasure applied, and leaves as it came, whatever
    happens in between.

    Args:
        pipe: A diffusers text-to-image pipeline with a ``unet`` or a ``transformer``.
        erasure: What to compare.
        prompts: Prompts to draw; one that contains a target or a synonym is shown as such. None
            draws every target and every synonym of `erasure` alone, the words of its report that
            lie just outside the neighborhood (near relatives), and three that moved least.
        untouched: Further prompts, shown as untouched whatever they contain.
        seeds: `[s]` seeds, the same for every prompt.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        height: In pixels; None takes the pipeline's own.
        width: In pixels; None takes the pipeline's own.
        batch_size: Pictures drawn together.
        judge: Names what the pictures show (`clip_judge.ClipJudge`, or any other); None shows the
            seeds instead.
        scorer: Says how well pictures fit their prompts (`ClipJudge` does).
        detectors: By name, any callables from a picture to what they found in it.
        progress: Draw bars; None follows the pipeline's and diffusers' own switches.

    Returns:
        Pictures, settings and warnings. `before_after_grid` and `write_html` show the rows.
    """
    relatives: Sequence[str] = ()
    untouched, seeds = valid_texts(untouched, "untouched"), _seeds(seeds)
    if prompts is None:
        prompts = [word for concept in erasure.concepts for word in concept.words]
        relatives, quiet = _watched(erasure)
        untouched = untouched or tuple(quiet)
    prompts = valid_texts(prompts, "prompts")
    if not prompts and not untouched:
        raise ValueError("prompts is empty: name at least one prompt to draw")
    if not seeds:
        raise ValueError("seeds is empty: name at least one")
    grouped = [(group_of(prompt, erasure.concepts), prompt) for prompt in prompts]
    grouped += [("relative", prompt) for prompt in relatives]
    grouped += [("untouched", prompt) for prompt in untouched]
    grouped.sort(key=lambda entry: list(GROUPS).index(entry[0]))
    every_prompt = [prompt for _, prompt in grouped for _ in seeds]
    every_seed = [seed for _ in grouped for seed in seeds]

    def draw(description: str) -> list[tuple[Image.Image, ...]]:
        pictures = generate(
            pipe,
            every_prompt,
            every_seed,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            batch_size=batch_size,
            description=description,
            progress=progress,
        )
        return [tuple(pictures[i : i + len(seeds)]) for i in range(0, len(pictures), len(seeds))]

    parts = components_of(pipe)
    for warning in cpu_warnings(pipe.components.values()):
        logger.warning(warning)
    maps = None if erasure.reading is None else erasure.reading.maps
    # Before anything is undone: what can't be applied again must not be.
    layers = projections(parts.model, maps)
    with _applied(parts.model, erasure, False):
        before = draw("before:")
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        changes = text_changes(pipe, weights, erasure, [prompt for _, prompt in grouped])
    with _applied(parts.model, erasure, True):
        after = draw("after:")

    def told(detector: Detector, pictures: Sequence[Image.Image]) -> tuple[str, ...]:
        return tuple(str(detector(picture)) for picture in pictures)

    def mean(pictures: Sequence[Image.Image], prompt: str) -> float:
        assert scorer is not None
        return float(scorer.score(pictures, [prompt] * len(pictures)).mean())

    rows = tuple(
        Row(
            group=group,
            prompt=prompt,
            seeds=tuple(seeds),
            before=old,
            after=new,
            seen_before=tuple(judge.classify(old)[0]) if judge else (),
            seen_after=tuple(judge.classify(new)[0]) if judge else (),
            text_change=change,
            scores={"clip": (mean(old, prompt), mean(new, prompt))} if scorer else {},
            detected={
                name: (told(detector, old), told(detector, new))
                for name, detector in (detectors or {}).items()
            },
        )
        for (group, prompt), old, new, change in zip(grouped, before, after, changes, strict=True)
    )
    evaluators = {"judge": judge, "scorer": scorer, **(detectors or {})}
    settings = sampling_settings(pipe, steps=steps, guidance=guidance) | {"seeds": list(seeds)}
    return Verification(
        rows=rows,
        settings=settings,
        warnings=tuple(picture_warnings(rows)),
        evaluators={name: identity_of(who) for name, who in evaluators.items() if who is not None},
    )


def _seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(seed) for seed in listed(seeds, "seeds", of="a list of ints"))
    except TypeError as error:
        raise TypeError(f"seeds: expected a list of ints, got {seeds!r}"[:200]) from error


def _watched(erasure: Erasure, count: int = 3) -> tuple[list[str], list[str]]:
    """Near relatives of what was erased, and words that moved least, by its report."""
    near = erasure.report.get("relatives", {}).values()
    # One of each concept, then the next of each: a long list is not drawn as a whole.
    longest = max(map(len, near), default=0)
    turns = [words[i] for i in range(longest) for words in near if i < len(words)]
    relatives = list(dict.fromkeys(turns))[:count]
    words = [w for w in erasure.report.get("words", ()) if w.get("drift") is not None]
    words = [w for w in words if w["word"] not in relatives]
    words.sort(key=lambda word: -word["drift"])
    return relatives, [word["word"] for word in words[-count:]]


def text_changes(
    pipe: Any, weights: Mapping[str, Tensor], erasure: Erasure, prompts: Sequence[str]
) -> list[float]:
    """How much of each prompt's entry into the model changes: |W' x - W x| / |W x|.

    Args:
        weights: `[o, d]` un-edited weight of each text-conditioned map.
    """
    parts, reading = components_of(pipe), erasure.reading
    kinds = streams(parts.model, None if reading is None else reading.maps)
    takes = {n: w for n, w in weights.items() if kinds.get(n) == "sequence"}
    edited = erasure.edited_weights(takes)
    found = torch.zeros(2, len(prompts), dtype=torch.float64)
    texts = text_streams(parts.model, parts.text_encoders, parts.tokenizers, reading)
    for section in texts["sequence"]:
        rows = section.encode(prompts) * (section.shares(prompts) > 0)[..., None].to(section.device)
        for name, weight in takes.items():
            states = rows.to(weight.device)
            for place, matrix in enumerate((edited[name].float() - weight.float(), weight.float())):
                found[place] += (states @ matrix.mT).double().square().sum((1, 2)).cpu()
    change, whole = found.sqrt()
    return (change / whole.clamp_min(1e-30)).tolist()


def find_detector(name: str) -> Detector:
    """The callable that ``module:name`` means.

    Raises:
        ValueError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r}: {error}; expected module:function") from error
    if not callable(found):
        raise ValueError(f"{name!r} is a {type(found).__name__}, expected a callable")
    return found


def identity_of(who: Any) -> Any:
    """What pins an evaluator: what it says of itself, or where it is from."""
    if callable(getattr(who, "identity", None)):
        return who.identity()
    of = who if inspect.isfunction(who) else type(who)
    package = (of.__module__ or "").split(".")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"name": f"{of.__module__}.{of.__qualname__}", "version": version}


def group_of(prompt: str, concepts: Sequence[Concept]) -> Group:
    """What a prompt is to an erasure: does it contain a target, a synonym, or neither?

    Names count as whole words, in any case, width or composition of accents, with any white space,
    hyphens or low lines between their words; other forms of a word, such as a plural, are other
    words. Where a script has no spaces between words (Chinese, Japanese, Thai), any place in the
    text is one.
    """
    text = _matched(prompt)
    groups: Sequence[tuple[Group, list[str]]] = (
        ("erased", [concept.target for concept in concepts]),
        ("synonym", [word for concept in concepts for word in concept.synonyms]),
    )
    for group, words in groups:
        if any(_contains(text, _matched(word)) for word in words):
            return group
    return "untouched"


_UNSPACED = frozenset(
    ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TAI", "NEW")
)
"""First words of the Unicode names of letters in scripts without spaces between words."""
_PARTICLES = re.compile(
    "(들)?(은|는|이|가|을|를|의|에|에서|에게|한테|께|와|과|랑|이랑|하고|도|만|로|으로|처럼|보다|까지|부터"
    "|마다|이나|나|라는|이라는|인|이다|입니다)?"
)
"""What Korean appends to a noun: the plural, then a particle."""


_HANGUL = re.compile("[가-힣]+")


def _matched(text: str) -> str:
    """A text as names are looked for in it."""
    text = re.sub(r"[\s_\-\u2010-\u2015]+", " ", folded(text))
    # Soft hyphens, marks of direction and the like; a joiner makes one emoji of two.
    dropped = {c for c in text if unicodedata.category(c) == "Cf"} - {"\u200c", "\u200d"}
    table = dict.fromkeys((*map(ord, dropped), 0xFE0E, 0xFE0F)) | {0x2019: "'"}
    return text.translate(table).strip()


def _contains(text: str, word: str) -> bool:
    """Whether a word stands in a text, both `_matched`."""
    start = text.find(word) if word else -1
    while start >= 0:
        stop = start + len(word)
        if not _is_inside(text[max(start - 1, 0) : start], word[0]):
            ending = _HANGUL.match(text, stop)
            if ending is not None and _PARTICLES.fullmatch(ending.group()):
                return True
            if not _is_inside(word[-1], text[stop : stop + 1]):
                return True
        start = text.find(word, start + 1)
    return False


def _is_inside(left: str, right: str) -> bool:
    """Whether there can't be a border of words between two neighboring characters."""
    if not (left and right):
        return False
    if "\u200d" in (left, right) or unicodedata.category(right)[0] == "M":
        return True
    if not all(unicodedata.category(c)[0] in "LMN" for c in (left, right)):
        return False
    scripts = (script(left), script(right))
    # A word of Katakana is a foreign one, and ends where the Katakana does.
    return scripts == ("KATAKANA", "KATAKANA") or not _UNSPACED.intersection(scripts)


def picture_warnings(rows: Sequence[Row]) -> Iterator[str]:
    """What can be said against an erasure without knowing what the pictures show."""
    for row in rows:
        if row.group == "erased" and row.change < UNCHANGED:
            yield f"the pictures of the erased prompt {row.prompt!r} did not change"
        was_blank = sum(_is_blank(picture) for picture in row.before)
        is_blank = sum(_is_blank(picture) for picture in row.after)
        if is_blank > was_blank:
            yield f"{is_blank} of {len(row.after)} pictures of {row.prompt!r} came out blank"


def sampling_settings(pipe: Any, *, steps: int, guidance: float) -> dict[str, Any]:
    """What it takes to draw the same pictures again: sampler, numbers, dtype and device."""
    scheduler = pipe.scheduler
    model = getattr(pipe, component_name(pipe))
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return {
        "sampler": type(scheduler).__name__,
        "sampler_config": {k: v for k, v in sorted(config.items()) if _is_plain(v)},
        "steps": steps,
        "guidance_scale": guidance,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("realera_fast", "torch", "diffusers", "transformers")
        },
    }


def before_after_grid(
    rows: Sequence[Row],
    path: str | Path | None = None,
    *,
    title: str = "",
    tile: int | None = None,
) -> Image.Image:
    """One picture of all rows: prompts on the left, before and after in columns by seed.

    Args:
        rows: What to show; rows of one group stand together under its heading, in the order of
            `GROUPS`.
        path: Where to write a PNG, atomically; None only returns the picture.
        title: Line above everything.
        tile: Side of one picture in pixels; None shows small pictures at a whole multiple of
            their size, to 128 pixels, and large ones scaled down to 192.

    Returns:
        The grid.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to show")
    columns = max(len(row.seeds) for row in rows)
    size = rows[0].before[0].size
    if tile is None:
        longest = max(size)
        tile = 192 if longest > 192 else longest * max(1, 128 // longest)
    scale = tile / max(size)
    cell = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))

    heading, text, small = (ImageFont.load_default(points) for points in (17, 15, 12))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label_width = 40 + max(
        measure.textlength(line, text) for row in rows for line in _wrapped(row.prompt, 26)
    )
    label_width = int(max(label_width, 150))
    gap, margin, middle = 6, 22, 30
    judged = any(row.seen_before or row.seen_after for row in rows)
    row_height = cell[1] + gap + (16 if judged else 0)
    half = columns * (cell[0] + gap) - gap
    left = (margin + label_width, margin + label_width + half + middle)
    groups = [(g, [row for row in rows if row.group == g]) for g in GROUPS]
    groups = [(g, members) for g, members in groups if members]
    top = margin + (34 if title else 0)
    body = top + 50
    band = 34
    total_width = left[1] + half + margin
    if title:
        total_width = max(total_width, int(measure.textlength(title, heading)) + 2 * margin)
    total_height = body + sum(band + len(members) * row_height for _, members in groups) + margin

    page = Image.new("RGB", (total_width, total_height), _PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((margin, margin), title, _INK, heading)
    for x, name in zip(left, ("before", "after"), strict=True):
        draw.text((x + half / 2, top + 10), name, _INK, heading, anchor="mm")
        draw.line((x, top + 24, x + half, top + 24), _RULE)
    if len({row.seeds for row in rows}) == 1:
        for x in left:
            for i, seed in enumerate(rows[0].seeds):
                at = (x + i * (cell[0] + gap) + cell[0] / 2, top + 36)
                draw.text(at, f"seed {seed}", _FAINT, small, anchor="mm")
    y = body
    for group, members in groups:
        color = _COLORS[group]
        draw.text((margin + 14, y + band / 2 + 2), GROUPS[group], color, heading, anchor="lm")
        bottom = y + band + len(members) * row_height - gap
        draw.rectangle((margin, y + 8, margin + 4, bottom), color)
        y += band
        for row in members:
            lines = _wrapped(row.prompt, 26)
            for i, line in enumerate(lines):
                offset = (i - (len(lines) - 1) / 2) * 19
                draw.text((margin + 14, y + cell[1] / 2 + offset), line, _INK, text, anchor="lm")
            for x, pictures, seen in (
                (left[0], row.before, row.seen_before),
                (left[1], row.after, row.seen_after),
            ):
                for i, picture in enumerate(pictures):
                    at = (x + i * (cell[0] + gap), y)
                    page.paste(picture.convert("RGB").resize(cell, Image.Resampling.LANCZOS), at)
                    if seen:
                        name_at = (at[0] + cell[0] / 2, y + cell[1] + 8)
                        draw.text(name_at, seen[i], _FAINT, small, anchor="mm")
            y += row_height
    if path is not None:
        write_atomically(path, encoded(page, "PNG"))
    return page


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


_PAPER, _INK, _FAINT, _RULE = "#ffffff", "#1d2430", "#6b7482", "#cfd5dd"
_COLORS: Mapping[Group, str] = {
    "erased": "#b3261e",
    "synonym": "#9a6200",
    "relative": "#1e6b52",
    "untouched": "#1f5fa8",
}


def _wrapped(text: str, width: int) -> list[str]:
    """At most three lines; what does not fit ends in an ellipsis."""
    lines = textwrap.wrap(text, width) or ["(empty prompt)"]
    return lines if len(lines) <= 3 else [*lines[:2], lines[2][: width - 1] + "…"]


def _is_blank(picture: Image.Image) -> bool:
    return max(ImageStat.Stat(picture.convert("RGB")).stddev) < BLANK


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


@contextmanager
def _silenced(pipe: Any) -> Iterator[bool]:
    """Turns the pipeline's own bar off inside; yields whether its user had done so already."""
    config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(config or {}), "disable": True})
    try:
        yield bool((config or {}).get("disable"))
    finally:
        if config is None:
            del pipe._progress_bar_config
        else:
            pipe.set_progress_bar_config(**config)


@contextmanager
def _applied(model: Any, erasure: Erasure, wanted: bool) -> Iterator[None]:
    """Holds the model with or without `erasure` inside, and puts it back as it was after."""
    hashes = erasure.provenance.get("base_hashes", {})
    maps = None if erasure.reading is None else erasure.reading.maps
    is_base = any(hashes.get(dtype) == value for dtype, value in base_hashes(model, maps).items())
    is_applied = not is_base
    if is_applied and not wanted:
        erasure.restore_(model)
    elif wanted and not is_applied:
        erasure.apply_(model)
    try:
        yield
    finally:
        if is_applied and not wanted:
            erasure.apply_(model)
        elif wanted and not is_applied:
            erasure.restore_(model)
