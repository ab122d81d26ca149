"""One erasure's images before and after, from the same seeds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from realera_fast.erasure import Erasure, attached_to, check_alone
from realera_fast.evaluation.evaluators import Detector, Judge, Scorer, identity_of
from realera_fast.evaluation.images import (
    GROUPS,
    Group,
    Row,
    Sampling,
    distinct_seeds,
    generate,
    picture_warnings,
    sampling_settings,
)
from realera_fast.evaluation.prompt_groups import group_of
from realera_fast.models import (
    Target,
    Weights,
    base_hashes,
    components_of,
    projections,
    streams,
    text_streams,
)
from realera_fast.runtime import Processes, alone, cpu_warnings, valid_texts

logger = logging.getLogger(__name__)

Images = Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The images of one erasure, before and after."""

    rows: tuple[Row, ...]
    """One per prompt."""

    settings: Mapping[str, Any]
    """Sampler, steps, guidance and library versions: what it takes to sample the same again."""

    warnings: tuple[str, ...] = field(default=())
    """What a reader must not overlook, such as erased prompts whose images did not change."""

    evaluators: Mapping[str, Any] = field(default_factory=dict)
    """Who judged: class, version and hash of each judge, scorer and detector."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: everything but the images."""
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
                    "picture_scores": {
                        k: [list(x) for x in v] for k, v in row.picture_scores.items()
                    },
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
    max_sequence_length: int | None = None,
    judge: Judge | None = None,
    scorer: Scorer | None = None,
    detectors: Mapping[str, Detector] | None = None,
    progress: bool | None = None,
    accelerator: Any = None,
) -> Verification:
    """Samples every prompt before and after the erasure, from the same seeds.

    The pipeline may come without or with the erasure applied, and leaves as it came, whatever
    happens in between.

    Args:
        pipe: a diffusers text-to-image pipeline with a ``unet`` or a ``transformer``.
        erasure: what to compare.
        prompts: prompts to draw; one that contains a target or a synonym is shown as such. None
            draws every target and every synonym of `erasure` alone, the words of its report that
            lie just outside the neighborhood (near relatives), and three that moved least.
        untouched: further prompts, shown as untouched whatever they contain.
        seeds: `[s]` seeds, the same for every prompt.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        height: in pixels; None takes the pipeline's own.
        width: in pixels; None takes the pipeline's own.
        batch_size: images sampled together.
        max_sequence_length: tokens of a T5's prompt; None takes the pipeline's own.
        judge: names what the images show (`ClipJudge`, or any other); None shows the seeds instead.
        scorer: says how well images fit their prompts (`ClipJudge` does).
        detectors: by name, any callables from an image to what they found in it.
        progress: draw bars; None follows the pipeline's and diffusers' own switches.
        accelerator: an `accelerate.Accelerator` whose processes share the drawing and the judging;
            each has its own copy of the model and gets the same result.

    Returns:
        Images, settings and warnings. `before_after_grid` and `write_html` show the rows.

    Raises:
        TypeError: prompts or seeds are no lists of texts and ints.
        ValueError: there is nothing to draw, or the erasure is of another base model.
    """
    untouched, seeds = valid_texts(untouched, "untouched"), distinct_seeds(seeds)
    prompted = grouped_prompts(erasure, prompts, untouched)
    if not prompted:
        raise ValueError("prompts is empty: name at least one prompt to draw")
    if not seeds:
        raise ValueError("seeds is empty: name at least one")
    sampling = Sampling(
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        batch_size=batch_size,
        max_sequence_length=max_sequence_length,
    )
    texts = [prompt for _, prompt in prompted]

    def sample(description: str) -> list[tuple[Image.Image, ...]]:
        images = generate(
            pipe,
            [text for text in texts for _ in seeds],
            [seed for _ in texts for seed in seeds],
            sampling,
            description=description,
            progress=progress,
            accelerator=accelerator,
        )
        return [tuple(images[i : i + len(seeds)]) for i in range(0, len(images), len(seeds))]

    model = components_of(pipe).model
    for warning in cpu_warnings(pipe.components.values()):
        logger.warning(warning)
    # Before anything is undone: what can't be applied again must not be.
    maps = None if erasure.reading is None else erasure.reading.maps
    if _is_attached(model, erasure):
        check_alone(model)
    else:
        projections(model, maps, target=erasure.provenance.get("target", "weights"))
    with _applied(model, erasure, wanted=False):
        before = sample("before:")
        weights = Weights(projections(model, maps, target="adapter"))
        changes = text_changes(pipe, weights, erasure, texts)
    with _applied(model, erasure, wanted=True):
        after = sample("after:")
    evaluators = _Evaluators(judge, scorer, detectors or {})
    processes = Processes(accelerator)
    mine = range(len(texts))[processes.share(len(texts))]
    judged = processes.joined([evaluators.fields(texts[i], before[i], after[i]) for i in mine])
    rows = tuple(
        Row(
            group=group,
            prompt=prompt,
            seeds=seeds,
            before=old,
            after=new,
            text_change=change,
            **fields,
        )
        for (group, prompt), old, new, change, fields in zip(
            prompted, before, after, changes, judged, strict=True
        )
    )
    return Verification(
        rows=rows,
        settings=sampling_settings(pipe, sampling) | {"seeds": list(seeds)},
        warnings=tuple(picture_warnings(rows)),
        evaluators=evaluators.identities(),
    )


@dataclass(frozen=True)
class _Evaluators:
    judge: Judge | None
    scorer: Scorer | None
    detectors: Mapping[str, Detector]

    def fields(self, prompt: str, before: Images, after: Images) -> dict[str, Any]:
        """Those of a `Row` that evaluators fill."""
        fields: dict[str, Any] = {}
        if self.judge is not None:
            fields["seen_before"] = tuple(self.judge.classify(before)[0])
            fields["seen_after"] = tuple(self.judge.classify(after)[0])
        if self.scorer is not None:
            found = [self.scorer.score(x, [prompt] * len(x)) for x in (before, after)]
            fields["scores"] = {"clip": tuple(float(scores.mean()) for scores in found)}
            fields["picture_scores"] = {"clip": tuple(tuple(x.tolist()) for x in found)}
        fields["detected"] = {
            name: tuple(tuple(_told(detector(i)) for i in images) for images in (before, after))
            for name, detector in self.detectors.items()
        }
        return fields

    def identities(self) -> dict[str, Any]:
        """What pins each of them, by name."""
        named = {"judge": self.judge, "scorer": self.scorer, **self.detectors}
        return {name: identity_of(who) for name, who in named.items() if who is not None}


def _told(found: Any) -> str:
    """What a detector found, as text; several things are joined by commas."""
    return ", ".join(map(str, found)) if isinstance(found, list | tuple) else str(found)


def grouped_prompts(
    erasure: Erasure, prompts: Sequence[str] | None, untouched: Sequence[str]
) -> list[tuple[Group, str]]:
    """Every prompt that `verify` draws with its group, in the order of `GROUPS`.

    Args:
        erasure: names what is erased; its report, words that are watched.
        prompts: as for `verify`; None draws the erasure's own words.
        untouched: as for `verify`.
    """
    relatives: Sequence[str] = ()
    if prompts is None:
        prompts = [word for concept in erasure.concepts for word in concept.words]
        relatives, quiet = _watched(erasure)
        untouched = untouched or quiet
    grouped = [
        (group_of(prompt, erasure.concepts), prompt) for prompt in valid_texts(prompts, "prompts")
    ]
    grouped += [("relative", prompt) for prompt in relatives]
    grouped += [("untouched", prompt) for prompt in untouched]
    return sorted(grouped, key=lambda entry: list(GROUPS).index(entry[0]))


def _watched(erasure: Erasure, count: int = 3) -> tuple[list[str], list[str]]:
    """Near relatives of what was erased, and words that moved least, by its report."""
    report = erasure.report
    near = [
        (*words, *report.get("beyond", {}).get(target, ()))
        for target, words in report.get("relatives", {}).items()
    ]
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
    sums = torch.zeros(2, len(prompts), dtype=torch.float64)
    texts = text_streams(parts.model, parts.text_encoders, parts.tokenizers, reading)
    for section in texts["sequence"]:
        rows = section.encode(prompts) * (section.shares(prompts) > 0)[..., None].to(section.device)
        for name, weight in takes.items():
            states = rows.to(weight.device)
            for i, matrix in enumerate((edited[name].float() - weight.float(), weight.float())):
                sums[i] += (states @ matrix.mT).double().square().sum((1, 2)).cpu()
    change, whole = sums.sqrt()
    return (change / whole.clamp_min(1e-30)).tolist()


def _is_attached(model: Any, erasure: Erasure) -> bool:
    """Whether a model has it as an adapter."""
    attached = attached_to(model)
    return attached is not None and attached.fingerprint == erasure.fingerprint


@contextmanager
def _applied(model: Any, erasure: Erasure, *, wanted: bool) -> Iterator[None]:
    """Holds the model with or without `erasure` inside, and puts it back as it was after."""
    hashes = erasure.provenance.get("base_hashes", {})
    maps = None if erasure.reading is None else erasure.reading.maps
    is_applied = True
    target: Target = "adapter"
    if not _is_attached(model, erasure):
        found = base_hashes(model, maps)
        is_applied = not any(hashes.get(dtype) == value for dtype, value in found.items())
        target = "weights" if is_applied else erasure.provenance.get("target", "weights")
    if is_applied == wanted:
        yield
        return
    apply_ = functools.partial(erasure.apply_, target=target)
    change, undo = (apply_, erasure.restore_) if wanted else (erasure.restore_, apply_)
    change(model)
    try:
        yield
    finally:
        undo(model)
