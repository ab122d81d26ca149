"""ESD (Gandikota et al., arXiv 2303.07345): fine-tuning away from the concept.

    | eps'(x_t, c) - (eps(x_t, c) - eta (eps(x_t, c) - eps(x_t, ""))) |^2

with eta as the published code counts it, one more than the paper's. x_t is denoised by the model as
it is trained, up to a random step, as in the paper (the published code takes the original model);
nothing is preserved. Trained are the cross-attention projections ("esd-x"). Several x_t are
denoised together, for as many iterations: the published code denoises one anew for each, which is
most of its time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors'."""

    iterations: int = 200
    learning_rate: float = 5e-5
    negative_guidance: float = 2.0
    """eta."""
    guidance_scale: float = 3.0
    sampling_steps: int = 50
    together: int = 10
    """x_t denoised at a time, and iterations that use them (ours; 1 is the published code)."""


SWEEP = (
    Settings(),
    Settings(negative_guidance=3.0),
    Settings(negative_guidance=3.0, sampling_steps=20),
    Settings(negative_guidance=3.0, sampling_steps=20, learning_rate=2e-4),
    Settings(sampling_steps=20, learning_rate=2e-4),
)
"""What is tried on words that are not judged; the authors' settings come first."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Trains every projection of cross-attention; of several concepts one at random an iteration.

    Half-precision models are trained through float32 copies: the published code's bfloat16 weights
    lose small steps.
    """
    words = [word for concept in concepts for word in concept.words]
    unet, dtype, device = pipe.unet, pipe.unet.dtype, pipe.unet.device
    with torch.no_grad():
        states = _encode(pipe, ["", *words]).to(dtype)
    teacher = copy.deepcopy(unet).requires_grad_(False)
    unet.requires_grad_(False)
    trained = [p for name, p in unet.named_parameters() if ".attn2." in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    masters = [parameter.detach().float().clone() for parameter in trained]
    optimizer = torch.optim.Adam(masters, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(settings.sampling_steps)
    size, channels = unet.config.sample_size, unet.config.in_channels

    def predict(model: Any, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return model(x.to(dtype), t, encoder_hidden_states=s).sample.float()

    @torch.no_grad()
    def trajectories() -> list[tuple[Tensor, Tensor, int]]:
        """As many x_t as fit together: each of its own word, at its own random step."""
        count = settings.together
        which = torch.randint(1, len(words) + 1, (count,), generator=generator)
        stops = torch.randint(0, settings.sampling_steps, (count,), generator=generator)
        x = torch.randn((count, channels, size, size), generator=generator).to(device)
        found = []
        for step, t in enumerate(scheduler.timesteps):
            here = stops == step
            found += [(x[i : i + 1], t, int(which[i])) for i in here.nonzero()[:, 0].tolist()]
            x, which, stops = x[~here], which[~here], stops[~here]
            if not len(x):
                break
            both = torch.cat([states[:1].expand(len(x), -1, -1), states[which]])
            free, guided = predict(unet, torch.cat([x, x]), t, both).chunk(2)
            x = scheduler.step(free + settings.guidance_scale * (guided - free), t, x).prev_sample
        order = torch.randperm(count, generator=generator).tolist()
        return [found[i] for i in order]

    waiting: list[tuple[Tensor, Tensor, int]] = []
    for _ in range(settings.iterations):
        waiting = waiting or trajectories()
        x, t, word = waiting.pop()
        with torch.no_grad():
            both = torch.stack([states[0], states[word]])
            free, guided = predict(teacher, torch.cat([x, x]), t, both).chunk(2)
            wanted = guided - settings.negative_guidance * (guided - free)
        loss = functional.mse_loss(predict(unet, x, t, states[word : word + 1]), wanted)
        loss.backward()
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
            for parameter, master in zip(trained, masters, strict=True):
                parameter.copy_(master)
    unet.requires_grad_(False)


def _encode(pipe: Any, prompts: Sequence[str]) -> Tensor:
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.unet.device, 1, False)
    return embeds
