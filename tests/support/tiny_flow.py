"""Tiny flow transformers as their variants, with factors and maps that are not zero."""

from __future__ import annotations

import torch

from realera_fast.alignment import AlignmentConfig, new_factors
from realera_fast.models import components_of, family_of, latent_shape, projections, text_streams
from realera_fast.solver import ConceptMap
from realera_fast.text import TextInSections, TextWithPooled
from realera_fast.transformer import SharedTransformer
from realera_fast.unet import LoraParameters

LATENT = 4
"""Side of latents that every tiny transformer takes."""
ENTRIES = ("context_embedder", "time_text_embed.text_embedder.linear_1")


def maps(transformer) -> tuple[ConceptMap, ConceptMap]:
    """Of the token sequence and of the pooled vector."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for name in ENTRIES:
        width = projections(transformer)[name].in_features
        left, right = (0.3 * torch.randn(width, 2, generator=generator) for _ in "ab")
        found.append(ConceptMap(left, right.mT.contiguous()))
    return found[0], found[1]


def factors(transformer, targets=("to_k", "to_v"), dtype=torch.float32) -> LoraParameters:
    """Of rank 3, not zero."""
    lora = new_factors(transformer, AlignmentConfig(target_modules=targets, r=3), 1)
    generator = torch.Generator().manual_seed(7)
    for name, (down, up) in lora.hidden.items():
        drawn = 0.3 * torch.randn(up.shape, generator=generator)
        lora.hidden[name] = tuple(
            torch.nn.Parameter(value.detach().to(dtype)) for value in (down, drawn)
        )
    return lora


def shared_transformer(
    transformer, targets=("to_k", "to_v"), dtype=torch.float32, **options
) -> SharedTransformer:
    sequence, pooled = maps(transformer)
    return SharedTransformer(
        transformer.requires_grad_(False),
        sequence,
        factors(transformer, targets, dtype),
        pooled_map=pooled,
        **{"guidance_scale": 3.0} | options,
    )


def given(transformer, count=3, dtype=torch.float32):
    """Latents, time steps, prompts with their pooled vectors, and velocities."""
    generator = torch.Generator().manual_seed(6)
    shape = latent_shape(transformer, LATENT)
    latents, goal = (torch.randn(count, *shape, generator=generator, dtype=dtype) for _ in "ab")
    timesteps = torch.tensor([900.0, 500.0, 20.0])[:count]
    width = transformer.config.joint_attention_dim
    states = torch.randn(count, 6, width, generator=generator, dtype=dtype)
    return latents, timesteps, states, goal


def prompts_of(pipe):
    """What encodes prompts as the transformer is shown them, the empty one, and rows of zeros."""
    parts = components_of(pipe)
    streams = text_streams(parts.model, parts.text_encoders, parts.tokenizers)
    text = TextWithPooled(TextInSections(streams["sequence"]), streams["pooled"][0])
    zeros = family_of(parts.model, 3).absent_rows(parts.text_encoders)
    return text, text.encode([""]), min(zeros, 128)
