"""The flow-matching sibling of the embedded model: a stock ``StableDiffusion3Pipeline``.

Only its transformer and its scheduler are stored; text encoder, tokenizer and autoencoder are those
of the embedded model. They are fitted to what the pipeline expects of them: both CLIP encoders are
the one encoder, with the identity as projection of its pooled state, and there is no T5.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera_fast.embedded import ACCURACY, FOLDER, Words, words

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusion3Pipeline

    from realera_fast.models import Family

__all__ = ["FLOW", "SAMPLING", "flow_reading", "flow_words", "load_flow", "shared_parts"]

FLOW = "flow"
"""Beside the embedded model's pipeline: the sibling's folder."""
SAMPLING: dict[str, Any] = dict(
    steps=8, guidance_scale=3.0, height=64, width=64, max_sequence_length=1
)
"""Recommended arguments of the pipeline call, as in the table's ``sampling``. In T5's place the
pipeline sends rows of zeros, 256 by default: one does, and takes less time."""


def flow_words(folder: str | Path | None = None) -> Words:
    """The table with the sibling's own sampling and accuracy."""
    folder = FOLDER if folder is None else Path(folder)
    drawn = folder / FLOW / ACCURACY
    measured = json.loads(drawn.read_text(encoding="utf-8")) if drawn.is_file() else {}
    return replace(
        words(folder),
        sampling=SAMPLING,
        accuracy={word: share for rows in measured.values() for word, share in rows.items()},
    )


def flow_reading(transformer: Any) -> Family:
    """How prompts are read in calls with `SAMPLING`: ``reading=`` of `erase`."""
    from realera_fast.models import family_of

    family = family_of(transformer, 3)
    rows = replace(family.sections[1][0], max_tokens=SAMPLING["max_sequence_length"])
    return replace(family, sections=(family.sections[0], (rows,)))


def shared_parts(tokenizer: Any, encoder: Any, vae: Any) -> dict[str, Any]:
    """What the pipeline takes from the embedded model, by the pipeline's names.

    Args:
        tokenizer: ``CLIPTokenizer``.
        encoder: ``CLIPTextModel``; its weights are copied.
        vae: ``AutoencoderKL``; its configuration is given a shift of the latents, which is zero, as
            the pipeline computes with one.
    """
    import torch
    from transformers import CLIPTextModelWithProjection

    with_projection = CLIPTextModelWithProjection(encoder.config)
    with_projection.text_model.load_state_dict(
        {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    )
    with torch.no_grad():
        torch.nn.init.eye_(with_projection.text_projection.weight)
    with_projection.to(encoder.dtype).eval().requires_grad_(False)
    vae.register_to_config(shift_factor=0.0)
    return dict(
        vae=vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        text_encoder=with_projection,
        text_encoder_2=with_projection,
        text_encoder_3=None,
    )


def load_flow(
    dtype: torch.dtype | None = None, folder: str | Path | None = None
) -> StableDiffusion3Pipeline:
    """The sibling on the CPU, in ``dtype`` (float32 by default), progress bar off.

    Args:
        folder: of a model, as the training exports one; by default the package's.

    Raises:
        FileNotFoundError: the folder has no ``flow``.
    """
    import torch
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = FOLDER if folder is None else Path(folder)
    own, shared = folder / FLOW, folder / "pipeline"
    for needed in (own, shared):
        if not needed.is_dir():
            raise FileNotFoundError(
                f"{needed}: no such folder; a model with a flow-matching sibling has one "
                "(bench/run.py embedded --denoiser transformer)"
            )
    stored = dict(local_files_only=True)
    parts = shared_parts(
        CLIPTokenizer.from_pretrained(shared / "tokenizer", **stored),
        CLIPTextModel.from_pretrained(shared / "text_encoder", **stored),
        AutoencoderKL.from_pretrained(shared / "vae", **stored),
    )
    pipe = StableDiffusion3Pipeline.from_pretrained(own, **parts, **stored, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    # Cast afterwards: the loader's argument is named differently in older and newer releases.
    wanted = torch.float32 if dtype is None else dtype
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        module.to(wanted)
    return pipe
