"""MACE with both stages (Lu et al., CVPR 2024, arXiv 2403.06135).

After the closed form (`mace`), every word has a LoRA of rank 1 on K and V of cross-attention, which
takes the attention of the word's own tokens S out of the thing's segment M:

    sum over layers l and tokens i in S of | A_{t,l}^i * M |_F^2

x_t are pictures of the original model, noised at times with most weight between t_1 and t_2:

    xi(t) = (sigmoid(gamma (t - t_1)) - sigmoid(gamma (t - t_2))) / Z

The LoRAs of several words meet in one least-squares problem over all tokens e of their prompts:

    W* = argmin sum_i sum_e | W* e - (W' + B_i A_i) e |^2 + ridge | W* - W' |^2
         + sum over kept rows p of | W* p - W p |^2

A single LoRA is added, the solution for a ridge of nothing. M comes from Grounded-SAM in the paper;
here from the background, which the embedded model draws plain: what differs from a bilinear surface
through the picture's border. A style has no segment: M is its whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from attacks.denoising import encode_pictures
from torch import Tensor
from torch.nn import functional

from baselines import mace
from baselines.phrases import EXPANSIONS, Phrases, matrices, rewrite
from baselines.training import adapter, encode, predict
from realera_fast.evaluation import Sampling, generate
from realera_fast.text import Concept, PairsConfig

_PROMPT_ROWS = 30 * 77
"""Rows of a word in the fusion: all tokens of 30 prompts."""
_LAYERS = ("attn2.to_k", "attn2.to_v")


@dataclass(frozen=True)
class Settings(mace.Settings):
    """Defaults: the authors' for their objects; the first stage's stand before these."""

    steps: int = 50
    """Of one picture each. 120 for explicit content."""
    learning_rate: float = 1e-5
    """AdamW's. 1e-4 for people and styles."""
    pictures: int = 8
    rank: int = 1
    gamma: float = 0.05
    early: float = 200.0
    """t_1."""
    late: float = 400.0
    """t_2."""
    guidance_scale: float = 3.0
    """Of the pictures (ours, as everywhere here; Stable Diffusion's own is 7.5)."""
    sampling_steps: int = 20
    """Of the pictures (ours)."""
    contrast: float = 0.15
    """How far a color in [0, 1]^3 is from the background's inside the segment (ours)."""


SWEEP = (
    *(Settings(learning_rate=rate) for rate in (1e-5, 1e-4, 1e-3, 3e-3)),
    *(Settings(ridge=1000.0, learning_rate=rate) for rate in (1e-5, 1e-4, 1e-3, 3e-3)),
    *(Settings(ridge=1000.0, learning_rate=rate, steps=120) for rate in (1e-4, 1e-3)),
    *(Settings(ridge=1000.0, learning_rate=rate, concept_rows=True) for rate in (1e-5, 1e-3)),
)
"""What is tried on words that are not judged; the authors' settings come first."""


@dataclass(frozen=True)
class Lesson:
    """What the LoRA of a word is trained on."""

    states: Tensor
    """`[1, tokens, d]` of its prompt."""
    tokens: slice
    """The word's own."""
    latents: Tensor
    """`[n, c, h, w]` of its pictures."""
    masks: Tensor
    """`[n, 1, height, width]` float32 in the pictures' size: 1 inside of the segment."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Both stages; a LoRA for each word."""
    generator = torch.Generator().manual_seed(seed)
    words = [(word, concept.kind) for concept in concepts for word in concept.words]
    lessons = [lesson(pipe, word, kind, settings, generator) for word, kind in words]
    layers = matrices(pipe.unet)
    original = [layer.weight.detach().float().clone() for layer in layers]
    mace.erase(pipe, concepts, settings)
    changes = [
        train(pipe, each, settings, generator, seed + place) for place, each in enumerate(lessons)
    ]
    if len(words) == 1:
        rewrite(layers, lambda refined: [w + c for w, c in zip(refined, changes[0], strict=True)])
        return
    phrases = Phrases(pipe)
    grams = torch.stack([prompts_gram(phrases, word, kind) for word, kind in words])
    kept = torch.zeros_like(grams[0])
    if settings.preserve_scale:
        rows = phrases.rows([f"a photo of a {word}" for word in phrases.kept(concepts)])
        kept = settings.preserve_scale * mace.TOKENS / rows.shape[1] * _gram(rows)

    def fuse(refined: list[Tensor]) -> list[Tensor]:
        return [
            fused(w, torch.stack(moved), grams, kept @ (before - w).mT, settings.ridge, kept)
            for before, w, *moved in zip(original, refined, *changes, strict=True)
        ]

    rewrite(layers, fuse)


def lesson(
    pipe: Any, word: str, kind: str, settings: Settings, generator: torch.Generator
) -> Lesson:
    """Pictures of a word by the model as it is."""
    template = EXPANSIONS[kind][2]
    prompt, side = template.format(word), pipe.unet.config.sample_size * pipe.vae_scale_factor
    seeds = torch.randint(2**31, (settings.pictures,), generator=generator).tolist()
    sampling = Sampling(
        steps=settings.sampling_steps, guidance=settings.guidance_scale, height=side, width=side
    )
    pictures = generate(pipe, [prompt] * len(seeds), seeds, sampling, progress=False)
    colors = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures]))
    masks = segments(colors.float() / 255, settings.contrast)
    if kind == "style":
        masks = torch.ones_like(masks)
    span = Phrases(pipe).text.span(template.split("{}")[0], word)
    return Lesson(
        encode(pipe, [prompt]),
        slice(span.start, span.stop),
        encode_pictures(pipe, pictures),
        masks[:, None].float().to(pipe.unet.device),
    )


def segments(colors: Tensor, contrast: float) -> Tensor:
    """`[n, height, width]` bool: what does not look like the background.

    Args:
        colors: `[n, height, width, 3]` in [0, 1].
        contrast: least distance to the background's color.
    """
    height, width = colors.shape[1:3]
    y, x = (torch.linspace(-1, 1, size) for size in (height, width))
    y, x = (part.flatten() for part in torch.meshgrid(y, x, indexing="ij"))
    surface = torch.stack([torch.ones_like(x), x, y, x * y], dim=1)
    border = torch.maximum(x.abs(), y.abs()) > 1 - 2 / 16
    flat = colors.flatten(1, 2)
    fitted = torch.linalg.lstsq(surface[border].expand(len(flat), -1, -1), flat[:, border]).solution
    found = (flat - surface @ fitted).norm(dim=-1) > contrast
    found = found.unflatten(1, (height, width)).float()
    # Closing: spots of the background's color in the middle of the thing are its own.
    reach = width // 16
    grown = functional.max_pool2d(found, 2 * reach + 1, 1, reach)
    return -functional.max_pool2d(-grown, 2 * reach + 1, 1, reach) > 0


def train(
    pipe: Any, of: Lesson, settings: Settings, generator: torch.Generator, seed: int
) -> list[Tensor]:
    """What a word's LoRA adds to every K and V, `[o, d]` float32; the model stays as it is.

    Args:
        generator: of pictures, times and noise.
        seed: of the factors.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    share = focal(len(scheduler.alphas_cumprod), settings)
    with adapter(unet, _LAYERS, settings.rank, seed) as factors, attended(unet) as maps:
        optimizer = torch.optim.AdamW(factors, lr=settings.learning_rate)
        for _ in range(settings.steps):
            which = torch.randint(len(of.latents), (1,), generator=generator)
            t = torch.multinomial(share, 1, generator=generator).to(of.latents.device)
            clean = of.latents[which].float()
            noise = torch.randn(clean.shape, generator=generator).to(clean.device)
            maps.clear()
            predict(unet, scheduler.add_noise(clean, noise, t), t, of.states)
            optimizer.zero_grad()
            inside([found[..., of.tokens] for found in maps], of.masks[which]).backward()
            optimizer.step()
        with torch.no_grad():
            wrapped: list[Any] = list(matrices(unet))
            changes = [w.get_delta_weight("default").float().clone() for w in wrapped]
            # The least squares of several take them unrounded.
            for factor in factors:
                factor.zero_()
    return changes


def focal(count: int, settings: Settings) -> Tensor:
    """`[count]`: how likely each time is."""
    t = torch.arange(count)
    first, last = (settings.gamma * (t - at) for at in (settings.early, settings.late))
    weights = first.sigmoid() - last.sigmoid()
    return weights / weights.sum()


@contextmanager
def attended(unet: Any) -> Iterator[list[Tensor]]:
    """The maps `[b, heads, pixels, tokens]` of cross-attention, layer by layer as it is called."""
    maps: list[Tensor] = []
    queries: list[Tensor] = []
    handles = []
    for name, module in unet.named_modules():
        if not name.endswith("attn2"):
            continue

        def read(layer: Any, inputs: Any, keys: Tensor, own: Any = module) -> None:
            q, k = (
                x.float().unflatten(-1, (own.heads, -1)).transpose(1, 2)
                for x in (queries.pop(), keys)
            )
            maps.append((own.scale * q @ k.mT).softmax(-1))

        handles.append(
            module.to_q.register_forward_hook(lambda layer, inputs, out: queries.append(out))
        )
        handles.append(module.to_k.register_forward_hook(read))
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def inside(maps: Sequence[Tensor], masks: Tensor) -> Tensor:
    """The loss of maps `[b, heads, pixels, tokens]`; masks are `[b, 1, height, width]`."""
    total = torch.zeros((), device=masks.device)
    for found in maps:
        side = math.isqrt(found.shape[2])
        mask = functional.adaptive_avg_pool2d(masks, side).flatten(2)[..., None]
        total = total + (found * mask).square().sum()
    return total


def prompts_gram(phrases: Phrases, word: str, kind: str) -> Tensor:
    """`[d, d]` of all rows of a word's prompts."""
    templates = [t for t in PairsConfig().of(kind) if "{word}" not in t]
    rows = phrases.rows([template.replace("{}", word) for template in templates])
    return _PROMPT_ROWS / (rows.shape[0] * rows.shape[1]) * _gram(rows)


def _gram(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, 1).float()
    return flat.mT @ flat


def fused(
    refined: Tensor, changes: Tensor, grams: Tensor, back: Tensor, ridge: float, kept: Tensor
) -> Tensor:
    """`[o, d]`: the weight nearest to what each LoRA says of its own prompts.

    Args:
        refined: `[o, d]` W'.
        changes: `[n, o, d]` of the LoRAs.
        grams: `[n, d, d]` of their prompts' rows.
        back: `[d, o]`: the Gram matrix of kept rows times what the first stage took from W.
        kept: `[d, d]` that matrix.
    """
    total = grams.sum(0) + kept + ridge * torch.eye(len(kept)).to(kept)
    aim = (changes @ grams).sum(0) + back.mT
    return refined + torch.linalg.solve(total, aim.mT).mT
