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
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from PIL import Image, ImageChops, ImageStat
from torch import Tensor

from realera_fast.models import component_name
from realera_fast.runtime import bar, listed, valid_texts

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
    prompts, seeds = valid_texts(prompts, "prompts"), distinct_seeds(seeds)
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


def distinct_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(seed) for seed in listed(seeds, "seeds", of="a list of ints"))
    except TypeError as error:
        raise TypeError(f"seeds: expected a list of ints, got {seeds!r}"[:200]) from error


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
