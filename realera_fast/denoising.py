"""What the denoiser itself is run for: the scheduler, the size and the pictures that it needs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from realera_fast import alignment
from realera_fast.config import EraseConfig
from realera_fast.mining import STEPS as MEMBER_STEPS
from realera_fast.models import (
    Family,
    Target,
    check_runnable,
    check_trainable,
    is_joint,
    latent_shape,
    self_attention,
    why_not_aligned,
)
from realera_fast.runtime import clean
from realera_fast.text import Concept, Text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Denoising:
    """What the denoiser itself is run for, beside the closed form."""

    scheduler: Any
    """The noise schedule; None where the denoiser is not run."""
    alignable: bool
    """Whether the alignment stage runs."""
    why_not: str | None
    """Why the model can't be aligned, as a clause."""
    drawable: bool
    """Whether members of a category are found by sampling images."""
    warnings: tuple[str, ...]
    zero_rows: int = 0
    """Rows of zeros that the pipeline shows behind each prompt (`models.Family.absent_rows`)."""


@dataclass(frozen=True)
class DenoiserText:
    """What a denoiser is shown of prompts."""

    text: Text
    """Encodes whole prompts, with their pooled vector where there is one."""
    empty: Tensor
    """`[1, t, d]` what guidance leads away from."""
    pooled_width: int | None
    """Features of the pooled vector in a prompt's last row; None where there is none."""


def why_not(
    model: Any, family: Family, scheduler: Any, config: EraseConfig, target: Target
) -> str | None:
    """Why noise alignment does not run, as a clause; None where it does.

    Args:
        scheduler: what the caller gave, if anything.
        target: what the erasure is written to.
    """
    clause = why_not_aligned(model, family, config.alignment.latent_size, target)
    wanted = clause is None and config.alignment.enabled and scheduler is None and is_joint(model)
    # Flows differ in how they shift time: no guess is right for all.
    if wanted and alignment.find_scheduler(model) is None:
        return "no scheduler was given or found beside the model; pass scheduler=pipe.scheduler"
    return clause


def checked_shape(model: Any, config: EraseConfig) -> tuple[int, ...]:
    """`(c, h, w)` of the latents that alignment denoises, for a model that it runs on.

    Raises:
        ValueError: the model is in a state in which it can't denoise.
    """
    try:
        check_runnable(model)
        check_trainable(model)
    except ValueError as error:
        raise ValueError(
            f"{error}: the alignment stage can't denoise with it; set alignment.enabled=False for "
            "the closed form alone"
        ) from None
    if is_joint(model) and config.alignment.down_projection == "null_space":
        raise ValueError(
            'config.alignment.down_projection: "null_space" needs second moments of what the '
            "layers read, which are known of U-Nets alone, and this is a "
            f'{type(model).__name__}; set "trained"'
        )
    if own := config.alignment.self_attention:
        if is_joint(model):
            raise ValueError(
                f"config.alignment.target_modules: {own[0]!r} is of the self-attention of U-Nets, "
                f"and a {type(model).__name__} has none apart from its text; name some of to_k, "
                "to_v, to_q and to_out.0, which are those of the text's stream there"
            )
        self_attention(model)
    return latent_shape(model, config.alignment.latent_size)


def with_scheduler(
    denoising: Denoising, model: Any, scheduler: Any, config: EraseConfig
) -> Denoising:
    """What is run with the scheduler whose noise schedule is used, and what is to say of it.

    Raises:
        ValueError: alignment needs the scheduler, and it can't be used.
    """
    options, alignable = config.alignment, denoising.alignable
    warnings = []
    counts = {options.sampling_steps, options.check_sampling_steps} if alignable else {MEMBER_STEPS}
    try:
        found = alignment.find_scheduler(model) if scheduler is None else scheduler
        if found is None:
            found = alignment.assumed_scheduler()
            warnings.append(alignment.ASSUMED)
        for steps in counts:
            alignment.check_scheduler(found, model, steps, options)
    except ValueError as error:
        if alignable:
            raise ValueError(
                f"{error}; or set alignment.enabled=False for the closed form alone"
            ) from None
        logger.warning("%s", error)
        return dataclasses.replace(denoising, drawable=False, warnings=tuple(warnings))
    if alignable and (few := alignment.distilled(found, options)) is not None:
        logger.warning(few)
        warnings.append(few)
    return dataclasses.replace(denoising, scheduler=found, warnings=tuple(warnings))


def checked_latents(
    latents: Mapping[str, Tensor] | None, concepts: Sequence[Concept], shape: tuple[int, ...]
) -> Mapping[str, Tensor]:
    """The given latents, if they are of named words."""
    if not isinstance(latents, Mapping | None):
        raise TypeError(
            f"latents: expected a mapping of words to tensors, got {type(latents).__name__}"
        )
    named = {word for concept in concepts for word in concept.words}
    given: dict[str, Tensor] = {}
    for word, values in (latents or {}).items():
        word = clean(word, "latents")
        if word in given:
            raise ValueError(f"latents: {word!r} is there twice; leave one out")
        given[word] = values
        if word not in named:
            raise ValueError(f"latents: {word!r} is not to be erased; {sorted(named)} are")
        fits = isinstance(values, Tensor) and values.dim() == 4 and values.shape[1:] == shape
        if not fits or not len(values) or not bool(values.isfinite().all()):
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"latents[{word!r}]: expected finite [n, {', '.join(map(str, shape))}], got {got}; "
                "encode pictures of that size (AlignmentConfig.latent_size) with the pipeline's "
                "VAE, take its shift_factor off if it has one, and multiply by its scaling factor"
            )
    return given
