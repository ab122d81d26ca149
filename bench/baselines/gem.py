"""GEM (arXiv 2606.00140, ICML 2026): a triplet on what a frozen teacher predicts.

    sum_t max(0, | v'(x_t, c) - v(x_t, a) | - eta | v'(x_t, c) - v(x_t, c) |)

over the first states of the student's own trajectory under the concept c, with a the anchor. Not as
in the published code: a state is paired with the time at which it is denoised, not with the one
before; at the first step, where student and teacher are the same and the second norm has no
gradient, there is none of it; and no trajectory is denoised further than it is used, or decoded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.phrases import ANCHORS, anchor_of
from baselines.training import adapter, denoiser, encode, guided, noise, predict
from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors' for FLUX, but for what a small U-Net asks for."""

    defaults: ClassVar[str] = "the authors' for a U-Net"

    iterations: int = 23
    """Theirs: 250 states, which are 23 iterations; 500 for gore."""
    states: int = 11
    """Of the trajectory, from noise on."""
    learning_rate: float = 1e-3
    """AdamW's. 2e-4 for Stable Diffusion 3."""
    eta: float = 1.0
    """At 1 nothing is asked of a student that is nearer to the anchor's than to the concept's
    prediction; less asks for more."""
    scale: float = 100.0
    """Of the loss."""
    rank: int = 16
    dropout: float = 0.1
    layers: tuple[str, ...] = ("attn2.to_q", "attn2.to_k")
    """Theirs: query and key, of text and picture, in blocks that hold both."""
    guidance_scale: float = 3.0
    sampling_steps: int = 20
    """Of a whole trajectory. Theirs: the model's own number, 40 for Stable Diffusion 3."""
    anchors: Mapping[str, str] = field(default_factory=lambda: dict(ANCHORS))


FLOW_LAYERS = ("attn.to_q", "attn.to_k", "add_q_proj", "add_k_proj")
"""Of Stable Diffusion 3: all that its blocks have of query and key."""

SWEEP = (
    Settings(),
    Settings(learning_rate=3e-3),
    Settings(eta=0.25),
    *(Settings(learning_rate=r, layers=("attn2.to_k", "attn2.to_v")) for r in (1e-3, 3e-3)),
)
"""What is tried on words that are not judged."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Trains LoRA factors and merges them; one word an iteration."""
    unet = denoiser(pipe)
    pairs = [(w, anchor_of(c, settings.anchors)) for c in concepts for w in c.words]
    empty = encode(pipe, [""])
    states = [encode(pipe, pair) for pair in pairs]
    teacher = copy.deepcopy(unet).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with adapter(unet, settings.layers, settings.rank, seed, settings.dropout) as factors:
        optimizer = torch.optim.AdamW(factors, lr=settings.learning_rate)
        for iteration in range(settings.iterations):
            word, anchor = states[int(torch.randint(len(states), (1,), generator=generator))]
            unet.eval()
            x, t = begun(pipe, torch.stack([empty[0], word]), settings, generator)
            told = torch.stack([anchor, word]).repeat_interleave(len(x), dim=0)
            with torch.no_grad():
                wanted, shown = predict(teacher, torch.cat([x, x]), t.repeat(2), told).chunk(2)
            unet.train()
            out = predict(unet, x, t, word.expand(len(x), -1, -1))
            eta = settings.eta if iteration else 0.0
            optimizer.zero_grad()
            (settings.scale * triplet(out, wanted, shown, eta).mean()).backward()
            optimizer.step()


@torch.no_grad()
def begun(
    pipe: Any, both: Tensor, settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`[states, c, h, w]` and their times `[states]`: the beginning of one trajectory."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(settings.sampling_steps)
    times = scheduler.timesteps[: settings.states]
    model = denoiser(pipe)
    x = noise(model, 1, generator)
    found = [x]
    for t in times[:-1]:
        out = guided(model, x, t, both, settings.guidance_scale)
        x = scheduler.step(out, t, x).prev_sample
        found.append(x)
    return torch.cat(found), times.to(x.device)


def triplet(out: Tensor, wanted: Tensor, shown: Tensor, eta: float) -> Tensor:
    """`[n]`: how much nearer `out` should be to what is wanted than to what was shown.

    Args:
        eta: 0 leaves the second norm, which may have no gradient, out.
    """
    near = (out - wanted).flatten(1).norm(dim=1)
    if not eta:
        return near
    return (near - eta * (out - shown).flatten(1).norm(dim=1)).relu()
