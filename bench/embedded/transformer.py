"""The sibling's denoiser: an `SD3Transformer2DModel` that predicts noise - latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedded.bank import open_bank
from embedded.common import autocast
from embedded.denoiser import Denoiser, train
from embedded.examples import Examples, Phase, keep_states
from embedded.pipeline import PATCH, build_transformer, export_flow
from embedded.text_encoder import trained_text
from embedded.tokenizer import MAX_TOKENS
from realera_fast.embedded.flow import shared_parts

TIMES = dict(mean=0.3, spread=1.2)
"""Of the logit of the noise's share. Which thing it is, is decided near pure noise, and a latent of
64 cells is hidden by less noise than one of thousands."""
KIND = ".joint"
ABSENT_ROWS = 256
"""Rows of zeros that the pipeline sends, unless told otherwise, in the place of T5's."""
LEAST_PADDING = 2
PHASES: dict[str, Phase] = dict(
    # What things look like.
    things=dict(
        steps=12_000,
        lr=1e-3,
        warmup=500,
        captions="said",
        rows=18,
        scene_share=0.25,
        styled_share=0.3,
        blend_from=0.7,
        blend_share=0.3,
        blend_most=0.6,
        blend_scenes=True,
    ),
    # What further words mean, and what stands beside what.
    heard=dict(
        steps=8_000,
        lr=7e-4,
        warmup=200,
        captions="heard",
        rows=18,
        scene_share=0.5,
        styled_share=0.35,
        blend_from=0.0,
        blend_share=0.5,
        blend_most=0.6,
        blend_scenes=False,
    ),
    # All of that from whole prompts, as the pipeline sends them.
    whole=dict(
        steps=800,
        lr=2e-4,
        warmup=100,
        captions="heard",
        rows=MAX_TOKENS,
        scene_share=0.5,
        styled_share=0.35,
        blend_from=0.0,
        blend_share=0.5,
        blend_most=0.6,
        blend_scenes=False,
    ),
)


class WeighedAttention:
    """Joint attention in which a row of text may stand for several that are like it.

    A row that stands for n counts n-fold in the softmax: its logits are raised by log n. On a CPU
    the plain products are faster backwards than the fused attention.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: ``[b, n, width]`` of the latents' patches.
            encoder_hidden_states: ``[b, m, width]`` of the text.
            counts: ``[b, n + m]`` how many rows each stands for, as logarithms.
        """

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        pixels, text = hidden_states, encoder_hidden_states
        query = [attn.norm_q(heads(attn.to_q(pixels)))]
        query += [attn.norm_added_q(heads(attn.add_q_proj(text)))]
        key = [attn.norm_k(heads(attn.to_k(pixels)))]
        key += [attn.norm_added_k(heads(attn.add_k_proj(text)))]
        value = torch.cat([heads(attn.to_v(pixels)), heads(attn.add_v_proj(text))], 2)
        scores = torch.cat(query, 2) @ torch.cat(key, 2).transpose(-1, -2)
        scores = scores.float() / math.sqrt(value.shape[-1])
        if counts is not None:
            scores = scores + counts[:, None, None]
        mixed = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        seen, said = mixed.split([pixels.shape[1], text.shape[1]], 1)
        return attn.to_out[0](seen), said if attn.context_pre_only else attn.to_add_out(said)


def ready(transformer: Any) -> None:
    """Train with weighed rows, from blocks that do nothing yet (adaLN-Zero, arXiv 2212.09748)."""
    transformer.set_attn_processor(WeighedAttention())
    ends = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        ends += [block.norm1.linear, block.norm1_context.linear]
    for layer in ends:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)  # minutes less than the whole, as most blocks are alike


def joint_states(tokenizer: Any, encoder: Any) -> Callable[[list[str]], Tensor]:
    """Of texts, what the pipeline makes of them: ``[n, 78, width]``, the pooled state last."""
    encoder = shared_parts(tokenizer, encoder, _NoAutoencoder())["text_encoder"]

    def states(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True)
        found = encoder(torch.tensor(ids["input_ids"]), output_hidden_states=True)
        return torch.cat([found.hidden_states[-2], found.text_embeds[:, None]], 1)

    return states


class _NoAutoencoder:
    def register_to_config(self, **_: object) -> None:
        """Nothing to configure."""


def keep_joint_states(work: Path) -> None:
    """Encode every caption as the pipeline does, once, and count its tokens."""
    bank, (tokenizer, encoder) = open_bank(work), trained_text(work)
    shape = (MAX_TOKENS + 1, encoder.config.hidden_size)
    for name, captions in (("said", bank.captions), ("heard", bank.heard_captions)):
        counted = work / f"{name}{KIND}.tokens.npy"
        if counted.exists():
            continue
        states = joint_states(tokenizer, encoder)
        texts = keep_states(work, f"{name}{KIND}", captions, states, shape)
        ids = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        np.save(counted, np.array([len(one) for one in ids], dtype=np.int16))


class JointExamples(Examples):
    """Batches whose captions are short enough for the phase's rows of text.

    A caption's own tokens all stay; a few rows of its padding, which are nearly alike, stand for
    the others.
    """

    kind = KIND

    def __init__(self, work: Path, count: int, phase: Phase) -> None:
        super().__init__(work, count, phase)
        self.tokens = np.load(work / f"{phase['captions']}{KIND}.tokens.npy").astype(int)
        self.rows = phase["rows"]
        most = MAX_TOKENS if self.rows == MAX_TOKENS else self.rows - LEAST_PADDING
        self.short = self.tokens[self.captions] <= most
        self.unrelated = self.unrelated[self.tokens[self.unrelated] <= most]

    def pictures(self) -> np.ndarray:
        found = np.empty(0, int)
        while len(found) < self.count:
            more = self.sampler(self.count)
            found = np.concatenate([found, more[self.short[more]]])
        return found[: self.count]

    def batch(self, done: float, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """
        Returns:
            Latents ``[b, 24, 8, 8]``, states ``[b, rows + 1, 2 width]``, pooled states
            ``[b, 2 width]``, and logarithms of how many rows each row of the states stands for,
            ``[b, rows + 1]``. The last row is that of the absent encoder.
        """
        drawn = self.draw(done, rng)
        told = self.told(drawn)
        tokens = self.tokens[drawn.said]
        blended = drawn.amounts > 0
        tokens[blended] = np.maximum(tokens, self.tokens[drawn.others])[blended]
        chosen, counts = thinned(tokens, self.rows, rng)
        states = told.gather(1, torch.from_numpy(chosen)[..., None].expand(-1, -1, told.shape[-1]))
        states = torch.cat([states, torch.zeros_like(states[:, :1])], 1)
        absent = np.exp(rng.random(len(tokens)) * math.log(ABSENT_ROWS))
        absent[rng.random(len(tokens)) < 0.5] = ABSENT_ROWS
        logs = np.log(np.concatenate([counts, absent[:, None]], 1)).astype(np.float32)
        # Both encoders are the one.
        return (
            self.shown(drawn),
            states.repeat(1, 1, 2),
            told[:, -1].repeat(1, 2),
            torch.from_numpy(logs),
        )


def thinned(
    tokens: np.ndarray, rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Places ``[b, rows]`` of the rows that stay, and how many rows each stands for.

    Args:
        tokens: how many rows of each caption are no padding; all of these stay.
        rows: that stay.
    """
    padding = np.arange(MAX_TOKENS) >= tokens[:, None]
    order = np.where(padding, rng.random(padding.shape), -1)
    chosen = np.sort(np.argsort(order, 1, kind="stable")[:, :rows], 1)
    kept = rows - tokens
    each = np.where(kept > 0, (MAX_TOKENS - tokens) / np.maximum(kept, 1), 1)
    return chosen, np.where(np.take_along_axis(padding, chosen, 1), each[:, None], 1.0)


def loss(denoise: Callable[..., Any], batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Rectified flow: the error of noise - latents at logit-normal times (arXiv 2403.03206)."""
    x, states, pooled, logs = batch
    noise = torch.randn_like(x)
    t = torch.sigmoid(TIMES["mean"] + TIMES["spread"] * torch.randn(len(x)))
    patches = (x.shape[-1] // PATCH) ** 2
    counts = torch.cat([torch.zeros(len(x), patches), logs], 1)
    with autocast():
        guess = denoise(
            x.lerp(noise, t.view(-1, 1, 1, 1)),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=1000 * t,
            joint_attention_kwargs={"counts": counts},
        ).sample
    error = (guess.float() - (noise - x)).square().mean()
    return error, error


TRANSFORMER = Denoiser(
    name="transformer",
    phases=PHASES,
    seed=100,
    build=build_transformer,
    ready=ready,
    examples=JointExamples,
    loss=loss,
    export=export_flow,
)


def stage_transformer(work: Path) -> None:
    keep_joint_states(work)
    train(work, TRANSFORMER)
