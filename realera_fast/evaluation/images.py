"""Images sampled from seeds, rows that compare them before and after, and who judges them.

No judge is needed; where there is one (any classifier with a `classify` method), a `Row` holds what
it saw.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image, ImageChops, ImageStat

from realera_fast.models import component_name
from realera_fast.runtime import Processes, listed, progress_bar, valid_texts

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
"""Mean pixel difference, in [0, 1], below which two images count as the same: half of the
smallest difference an 8-bit pixel can show."""

BLANK = 2.0
"""Standard deviation over the pixels, of 255, below which an image counts as blank."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt: images before and after, image i of both from the same seed."""

    group: Group
    """What the prompt is to the erasure; one of `GROUPS`."""

    prompt: str
    """The prompt, shown as it is."""

    seeds: tuple[int, ...]
    """`[s]` one seed per image."""

    before: tuple[Image.Image, ...]
    """`[s]` images of the original model."""

    after: tuple[Image.Image, ...]
    """`[s]` images of the edited model."""

    seen_before: tuple[str, ...] = ()
    """`[s]` what a judge saw in `before`; empty without a judge."""

    seen_after: tuple[str, ...] = ()
    """`[s]` what a judge saw in `after`; empty without a judge."""

    text_change: float | None = None
    """|W' x - W x| / |W x| of the prompt x over the maps that its tokens enter the model through;
    None where it was not measured."""

    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean score before and after by name, such as ``clip``."""

    picture_scores: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(
        default_factory=dict
    )
    """`[s]` scores of each image before and after, by the names of `scores`."""

    detected: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    """What each detector said of the images before and after, as text."""

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
        return sum(self.changes) / len(self.before)

    @property
    def changes(self) -> tuple[float, ...]:
        """`[s]` the same of each pair."""
        pairs = zip(self.before, self.after, strict=True)
        return tuple(pixel_difference(old, new) for old, new in pairs)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a pipeline samples images.

    Raises:
        ValueError: a count is below 1.
    """

    steps: int = 25
    """Denoising steps."""

    guidance: float = 7.5
    """Scale of classifier-free guidance."""

    height: int | None = None
    """In pixels; None takes the pipeline's own."""

    width: int | None = None
    """In pixels; None takes the pipeline's own."""

    batch_size: int = 4
    """Images sampled together."""

    max_sequence_length: int | None = None
    """Tokens of a T5's prompt (Stable Diffusion 3, FLUX.1); None takes the pipeline's own."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def arguments(self) -> dict[str, Any]:
        """Those of a pipeline's call."""
        own = {name: getattr(self, name) for name in ("height", "width", "max_sequence_length")}
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            **{name: value for name, value in own.items() if value is not None},
        }


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    description: str = "drawing",
    progress: bool | None = None,
    accelerator: Any = None,
) -> list[Image.Image]:
    """Samples image i from prompt i and seed i.

    Every image has its own random generator, on the CPU: the same seed gives the same image
    (up to rounding) in any batch, in any order, and on any device.

    Args:
        pipe: a diffusers text-to-image pipeline. Its safety checker, if it has one, stays on.
        prompts: `[n]` prompts.
        seeds: `[n]` seeds, or one seed for all prompts.
        sampling: steps, guidance, size and batches.
        description: text of the progress bar.
        progress: draw a bar; None follows the pipeline's and diffusers' own switches.
        accelerator: an `accelerate.Accelerator` whose processes share the batches; each gets all
            images.

    Returns:
        `[n]` RGB images.

    Raises:
        TypeError: prompts or seeds are no lists of texts and ints.
        ValueError: the seeds do not fit the prompts, or the pipeline starts from an image or draws
            videos.
    """
    prompts, seeds = valid_texts(prompts, "prompts"), distinct_seeds(seeds)
    if len(seeds) == 1:
        seeds = (seeds[0],) * len(prompts)
    if len(prompts) != len(seeds):
        raise ValueError(
            f"seeds must have one entry, or one per prompt: got {len(seeds)} seeds for "
            f"{len(prompts)} prompts"
        )
    accepted = inspect.signature(pipe.__call__).parameters
    if "image" in accepted and "height" not in accepted:
        raise ValueError(
            f"pipe: {type(pipe).__name__} starts from a picture; expected a text-to-image pipeline "
            "(a refiner is judged by the pictures of the pipeline that it is part of)"
        )
    if not accepted.keys().isdisjoint(("num_frames", "video_length", "frames")):
        raise ValueError(
            f"pipe: {type(pipe).__name__} draws videos; expected a text-to-image pipeline (draw a "
            "video before the erasure and one after apply_, with the same generator, and look)"
        )
    arguments = sampling.arguments()
    if sampling.max_sequence_length is not None and "max_sequence_length" not in accepted:
        raise ValueError(
            f"sampling: {type(pipe).__name__} takes no max_sequence_length; leave it out"
        )
    if "use_resolution_binning" in accepted and (sampling.height or sampling.width):
        # PixArt and Sana would draw at the nearest size they were trained for.
        arguments["use_resolution_binning"] = False
    size = sampling.batch_size
    batches = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
    processes = Processes(accelerator)
    # Whole batches: a picture is to the bit what one process draws.
    batches = batches[processes.share(len(batches))]
    if not processes.is_main:
        progress = False
    images: list[Image.Image] = []
    hidden = 0
    with (
        _silenced(pipe) as silent,
        progress_bar(
            total=sampling.steps * len(batches),
            desc=f"{description} {len(prompts)} pictures",
            progress=False if progress is None and silent else progress,
            unit="step",
        ) as steps_bar,
    ):
        # Every stock pipeline calls back after a step; others advance the bar batch by batch.
        if "callback_on_step_end" in accepted:

            def advance(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> Any:
                steps_bar.update(1)
                return tensors

            arguments["callback_on_step_end"] = advance
        for count, batch in enumerate(batches, start=1):
            output = pipe(
                prompt=[prompts[i] for i in batch],
                generator=[torch.Generator("cpu").manual_seed(seeds[i]) for i in batch],
                output_type="pil",
                **arguments,
            )
            images += [image.convert("RGB") for image in output.images]
            hidden += sum(getattr(output, "nsfw_content_detected", None) or ())
            # Samplers of second order call the model, but not the callback, twice a step.
            steps_bar.update(count * sampling.steps - steps_bar.n)
    if hidden:
        logger.warning("the pipeline's safety checker blacked out %d pictures", hidden)
    return processes.joined(images)


def pixel_difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute pixel difference of two images of the same size, in [0, 1]."""
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
    """What can be said against an erasure without knowing what the images show."""
    for row in rows:
        if row.group == "erased" and row.change < UNCHANGED:
            yield f"the pictures of the erased prompt {row.prompt!r} did not change"
        was_blank = sum(map(_is_blank, row.before))
        is_blank = sum(map(_is_blank, row.after))
        if is_blank > was_blank:
            yield f"{is_blank} of {len(row.after)} pictures of {row.prompt!r} came out blank"


def sampling_settings(pipe: Any, sampling: Sampling) -> dict[str, Any]:
    """What it takes to sample the same images again: sampler, numbers, dtype and device."""
    scheduler = pipe.scheduler
    model = getattr(pipe, component_name(pipe))
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return {
        "sampler": type(scheduler).__name__,
        "sampler_config": {k: v for k, v in sorted(config.items()) if is_plain(v)},
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("realera_fast", "torch", "diffusers", "transformers")
        },
    }


def _is_blank(image: Image.Image) -> bool:
    return max(ImageStat.Stat(image.convert("RGB")).stddev) < BLANK


def is_plain(value: Any) -> bool:
    """Whether a value is a single one: no mapping, no list, no object."""
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
