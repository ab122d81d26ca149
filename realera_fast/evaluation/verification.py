"""Pictures before and after an erasure, drawn from the same seeds, and pages that show them.

`generate` draws, `verify` compares any pipeline before and after an `Erasure`, `before_after_grid`
puts the outcome on one picture, `page.write_html` on one self-contained page. Nothing here needs a
judge; where there is one (any classifier with a ``classify`` method), what it saw is shown.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from realera_fast.erasure import Erasure
from realera_fast.evaluation.images import (
    GROUPS,
    Detector,
    Group,
    Judge,
    Row,
    Scorer,
    distinct_seeds,
    generate,
    picture_warnings,
    sampling_settings,
)
from realera_fast.models import base_hashes, components_of, projections, streams, text_streams
from realera_fast.runtime import alone, cpu_warnings, folded, script, valid_texts
from realera_fast.text import Concept

logger = logging.getLogger(__name__)


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
    untouched, seeds = valid_texts(untouched, "untouched"), distinct_seeds(seeds)
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
