"""Seeded, random, tiny Stable Diffusion parts, built from the stock classes in well under a second.

Import as ``from tiny_models import tiny_pipeline``. Nothing here touches the global random state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = (
    *("cat", "kitten", "dog", "puppy", "art", "horse", "ship", "tree", "style", "van", "gogh"),
    *("a", "of", "the", "in", "photo", "picture", "painting", "image", "by", "animal"),
)
"""Words that the tiny tokenizer holds as one token each; everything else falls to letters."""


def _byte_characters() -> list[str]:
    """The 256 printable characters that byte-level BPE (GPT-2, CLIP) writes bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # Bytes without a printable character of their own take the code points from 256 on.
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def byte_pair_merges(
    texts: Iterable[Sequence[str]], after: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, str]]:
    """Merges, in order, that make one token of each text, which comes as its letters.

    Args:
        after: merges that come before them.
    """
    ranks = {pair: rank for rank, pair in enumerate(after)}
    for text in texts:
        parts = list(text)
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            # The lowest rank merges first, so a merge added later never changes an earlier text.
            pair = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            at = pairs.index(pair)
            parts[at : at + 2] = ["".join(pair)]
    return list(ranks)


def tiny_tokenizer(words: Sequence[str] = WORDS, *, length: int = 77) -> CLIPTokenizer:
    """A stock ``CLIPTokenizer`` with `words` as whole tokens, built offline.

    Args:
        words: Lower-case words; each becomes one token, by merging its letters left to right.
        length: Tokens per prompt, padding included.
    """
    letters = _byte_characters()
    merges = byte_pair_merges((*word[:-1], word[-1] + "</w>") for word in words)
    entries = letters + [letter + "</w>" for letter in letters] + ["".join(m) for m in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    # Two merge paths may end in the same string: keep the first.
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _seeded(model: torch.nn.Module, seed: int) -> None:
    """Fills every matrix with normal noise of standard deviation 1 / sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / fan_in**0.5)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """`model` in evaluation mode and `dtype`; diffusers warns even at a cast that does nothing."""
    model.eval()
    return model if dtype == torch.float32 else model.to(dtype)


def tiny_unet(
    width: int = 32, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """A two-level ``UNet2DConditionModel``: 4 cross-attention layers, 8 projections, 8x8 latents.

    Args:
        width: Text width d.
        seed: Seed of the weights.
        dtype: Dtype of the weights; the float32 values are the same for every dtype.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    _seeded(unet, seed)
    return _cast(unet, dtype)


def tiny_text_encoder(
    width: int = 32,
    *,
    seed: int = 1,
    tokenizer: CLIPTokenizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> CLIPTextModel:
    """A two-layer ``CLIPTextModel`` of text width `width` for `tokenizer`, else the tiny one."""
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModel(config)
    _seeded(encoder, seed)
    return _cast(encoder, dtype)


def tiny_vae(*, seed: int = 2, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """A one-level ``AutoencoderKL`` with 4 latent channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    _seeded(vae, seed)
    return _cast(vae, dtype)


def tiny_pipeline(
    width: int = 32, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """A complete ``StableDiffusionPipeline`` of the tiny parts (16x16 pictures), progress off."""
    tokenizer = tiny_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(seed=seed + 2, dtype=dtype),
        text_encoder=tiny_text_encoder(width, seed=seed + 1, tokenizer=tokenizer, dtype=dtype),
        tokenizer=tokenizer,
        unet=tiny_unet(width, seed=seed, dtype=dtype),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def aligned(loaded: Any) -> Any:
    """The model or pipeline with its tensors where torch allocates them.

    Those of a file are used where the file holds them, at any address, and BLAS sums in another
    order there: the same weights predict the same only within rounding.
    """
    parts = [loaded] if isinstance(loaded, nn.Module) else loaded.components.values()
    for module in parts:
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()
    return loaded
