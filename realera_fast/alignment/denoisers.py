"""The denoiser of a run, as its variants, and its sampler: of a U-Net or of a flow transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from realera_fast.alignment.config import AlignmentConfig
from realera_fast.alignment.null_space import null_space_down
from realera_fast.models import (
    TEXT_STREAM,
    LoraFactors,
    Stream,
    is_joint,
    projections,
    queries_and_outputs,
    self_attention,
    text_projections,
)
from realera_fast.solver import ConceptMap
from realera_fast.transformer import EulerSampler, SharedTransformer, euler_of
from realera_fast.unet import (
    DDIMSampler,
    LoraParameters,
    Sampler,
    SharedDenoiser,
    SharedUNet,
    ddim_of,
)


@dataclass(frozen=True)
class ClosedForm:
    """What the student of the stage starts from."""

    maps: Mapping[Stream, ConceptMap]
    """Of each text stream, T = I + L R."""
    moved: Mapping[str, LoraFactors] = field(default_factory=dict)
    """What is added to single projections, by name."""
    moments: tuple[Tensor, Tensor] | None = None
    """`[d, d]` of the token sequence, of what stays and of the named words; None where no factors
    rest on them."""


def new_factors(
    model: Any,
    config: AlignmentConfig,
    seed: int,
    moments: tuple[Tensor, Tensor] | None = None,
) -> LoraParameters:
    """Factors of the layers that the settings name, which add nothing yet.

    Args:
        moments: see `ClosedForm.moments`.
    """
    layers = projections(model)
    device = next(iter(layers.values())).weight.device
    if is_joint(model):
        leaves = tuple(f".{TEXT_STREAM[leaf]}" for leaf in config.target_modules)
        text, hidden = {}, text_projections(model)
    else:
        own = config.self_attention
        leaves = tuple(f".{leaf}" for leaf in config.target_modules if leaf not in own)
        text = {name: layer for name, layer in layers.items() if name.endswith(leaves)}
        hidden = queries_and_outputs(model)
    hidden = {name: layer for name, layer in hidden.items() if name.endswith(leaves)}
    if config.self_attention:
        of_pictures = self_attention(model)
        hidden |= {n: x for n, x in of_pictures.items() if n.endswith(config.self_attention)}
    lora = LoraParameters(
        text,
        hidden,
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        seed=seed,
        device=device,
    )
    if config.down_projection == "null_space":
        assert moments is not None
        lora.freeze_down(null_space_down(*moments, config.r))
    return lora


def shared_denoiser(
    model: Any,
    closed_form: ClosedForm,
    lora: LoraParameters,
    config: AlignmentConfig,
    *,
    zero_rows: int = 0,
) -> SharedDenoiser:
    """A denoiser as the original, as the edited one, and with factors.

    Args:
        model: the original, unchanged.
        zero_rows: rows of zeros that the pipeline shows behind each prompt
            (`models.Family.absent_rows`).
    """
    maps = closed_form.maps
    if is_joint(model):
        return SharedTransformer(
            model,
            maps["sequence"],
            lora,
            pooled_map=maps["pooled"],
            zero_rows=zero_rows,
            guidance_scale=config.guidance_scale,
            mixed_precision=config.mixed_precision,
            compiled=config.compile,
        )
    return SharedUNet(
        model,
        maps["sequence"],
        lora,
        pooled_map=maps.get("pooled"),
        moved=closed_form.moved,
        mixed_precision=config.mixed_precision,
        compiled=config.compile,
    )


def sampler_of(
    shared: SharedDenoiser, scheduler: Any, empty: Tensor, config: AlignmentConfig, steps: int
) -> Sampler:
    """What denoises with a shared denoiser, in so many steps.

    Args:
        scheduler: a diffusers scheduler, unchanged; see `check_scheduler`.
        empty: `[1, t, d]` embedding of the empty prompt, for guidance.
    """
    options: dict[str, Any] = dict(
        steps=steps,
        guidance_scale=config.guidance_scale,
        latent_size=config.latent_size,
        batch_size=config.sampling_batch_size,
    )
    if isinstance(shared, SharedTransformer):
        return EulerSampler(shared, scheduler, empty, **options)
    assert isinstance(shared, SharedUNet)
    return DDIMSampler(shared, scheduler, empty, **options)


def check_scheduler(scheduler: Any, model: Any, steps: int, config: AlignmentConfig) -> None:
    """Refuses a scheduler whose steps are none of the model, or that does not hold so many.

    Raises:
        ValueError: says what to pass.
    """
    if is_joint(model):
        euler_of(scheduler, model, steps, config.latent_size)
    else:
        ddim_of(scheduler, steps)
