"""Transformers whose text is a stream of its own in joint attention: Stable Diffusion 3, FLUX.1.

Noise alignment trains the projections of that stream in double-stream blocks. Blocks that text and
picture share (FLUX's single-stream ones) are left as they are: a factor there would act on the
picture too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from realera_fast.models.dense import Target
from realera_fast.models.entrances import check_drawable, class_of, projections
from realera_fast.models.refusals import (
    check_alike,
    check_apart,
    check_layer,
    check_readable,
    check_way,
)
from realera_fast.runtime import unwrapped

TEXT_STREAM: Mapping[str, str] = {
    "to_q": "add_q_proj",
    "to_k": "add_k_proj",
    "to_v": "add_v_proj",
    "to_out.0": "to_add_out",
}
"""What the parts of a cross-attention layer are called in the text's stream of a double block."""

PACKED = "FluxTransformer2DModel"
"""Takes latents as rows of 2 x 2, so its channels are four times those of a latent."""
_JOINT = ("SD3Transformer2DModel", PACKED)


def is_joint(model: nn.Module) -> bool:
    """Whether it is a transformer with joint attention that alignment knows how to run."""
    return class_of(unwrapped(model)) in _JOINT


def text_projections(
    model: nn.Module, *, as_run: bool = True, target: Target = "weights"
) -> dict[str, nn.Linear]:
    """Projections of the text's stream in every double-stream block, by module name.

    Text has passed other layers before it meets them, so no closed form reaches them; adapters may.
    Checked like `projections`, which `model` must pass.

    Args:
        as_run: whether the model must also run them as they stand.
        target: "weights" are edited in place; for an "adapter" they need to be readable alone.

    Raises:
        ValueError: a layer that an edit would not (or not correctly) reach.
    """
    model = unwrapped(model)
    found: dict[str, nn.Linear] = {}
    check = check_layer if target == "weights" else check_readable
    blocks: Any = model.transformer_blocks
    for number, block in enumerate(blocks):
        place = f"transformer_blocks.{number}.attn"
        attn = block.attn
        kind = type(getattr(attn, "processor", None)).__name__
        # SD3's layers keep the flag when they are unfused: there the processor decides.
        flagged = class_of(model) == PACKED and getattr(attn, "fused_projections", False)
        if as_run and (flagged or kind.startswith("Fused")):
            raise ValueError(
                f"model: {place} runs fused projections, which ignore the weights of its add_k_proj"
                " and add_v_proj; call unfuse_qkv_projections() first, and fuse again afterwards"
            )
        # The last block of SD3 gives no text: nobody asks what its queries find.
        silent = getattr(attn, "to_add_out", None) is None
        for leaf in TEXT_STREAM.values():
            if getattr(attn, leaf, None) is not None and not (silent and leaf == "add_q_proj"):
                name = f"{place}.{leaf}"
                found[name] = check(name, getattr(attn, leaf))
                if as_run:
                    check_way(model, name, known=True)
    if target == "adapter":
        return found
    check_alike(projections(model, as_run=False) | found)
    check_apart(model, found)
    return found


def patch_side(model: nn.Module) -> int:
    """Latents on a side of what a transformer of `is_joint` takes as one token."""
    inner: Any = unwrapped(model)
    return 2 if class_of(inner) == PACKED else int(inner.config.patch_size)


def latent_shape(model: nn.Module, latent_size: int | None) -> tuple[int, int, int]:
    """`(c, h, w)` of the latents that a denoiser draws from.

    Args:
        latent_size: height and width, if the caller knows them.

    Raises:
        ValueError: the size is not known, or is none that the model takes.
    """
    config: Any = unwrapped(model).config
    size = latent_size or getattr(config, "sample_size", None)
    if not size:
        raise ValueError("model: its config has no sample_size; name AlignmentConfig.latent_size")
    height, width = (size, size) if isinstance(size, int) else size
    channels = int(config.in_channels)
    if is_joint(model):
        packed, patch = class_of(unwrapped(model)) == PACKED, patch_side(model)
        most = None if packed else int(config.pos_embed_max_size) * patch
        if height % patch or width % patch or (most and max(height, width) > most):
            limit = f" and at most {most}" if most else ""
            raise ValueError(
                f"model: it takes latents whose sides are multiples of {patch}{limit}, and "
                f"AlignmentConfig.latent_size is {latent_size or size}"
            )
        channels //= 4 if packed else 1
    return channels, int(height), int(width)


def check_alignable(model: nn.Module, latent_size: int | None) -> None:
    """Refuses a denoiser that alignment can't run: it needs more than a prompt to draw, or its size
    is not known.

    Args:
        latent_size: height and width of the latents, if the caller knows them.

    Raises:
        ValueError: says why.
    """
    if not is_joint(model):
        check_drawable(model, latent_size)
        return
    inner: Any = unwrapped(model)
    out = getattr(inner, "out_channels", None) or inner.config.in_channels
    if inner.config.in_channels != out:
        raise ValueError(
            f"model: it takes {inner.config.in_channels} channels and gives {out} (a picture "
            "beside the noise?)"
        )
    for part in ("image_proj", "encoder_hid_proj"):
        if getattr(inner, part, None) is not None:
            raise ValueError(
                f"model: it takes a picture beside the text ({part}, an IP-Adapter); call "
                "pipe.unload_ip_adapter() first"
            )
    latent_shape(model, latent_size)
    text_projections(model)
