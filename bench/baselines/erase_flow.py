"""EraseFlow (Kusumba et al., NeurIPS 2025, arXiv 2511.00804): trajectory balance.

    (log Z + sum_t [ log p(x_{t-1} | x_t, c) - log q(x_t | x_{t-1}) ] - log beta)^2

x_T to x_0 are sampled under the anchor by DDIM with all of its noise, by the model as it is
trained; p are its steps under the concept, q those of the forward process, Z is learnt and beta
constant: under the concept the model is to draw what it draws under the anchor. As in the published
code logarithms of densities are means over the latent's numbers, and the sum runs over some of the
steps: all of the last fifth, and as many of those before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.phrases import ANCHORS, anchor_of
from baselines.training import adapter, encode, guided, noise
from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors' but for budgets, which a small model on a CPU needs smaller."""

    defaults: ClassVar[str] = "the authors' with smaller budgets"

    iterations: int = 20
    batch_size: int = 1
    """Trajectories of an iteration."""
    learning_rate: float = 3e-4
    """AdamW's. For styles theirs is 5e-4."""
    flow_learning_rate: float = 3e-4
    """Of log Z."""
    flow: float = -0.1953
    """Where log Z starts."""
    log_beta: float = 2.5
    rank: int = 4
    """Of LoRA on all projections of self- and cross-attention."""
    guidance_scale: float = 3.0
    """The model's own, in sampling and training."""
    sampling_steps: int = 20
    """Theirs: 50."""
    anchors: Mapping[str, str] = field(default_factory=lambda: dict(ANCHORS))


SWEEP = (
    Settings(),
    Settings(learning_rate=5e-4),
    Settings(learning_rate=1e-3),
    Settings(learning_rate=2e-3),
    Settings(learning_rate=4e-3),
    Settings(iterations=60, learning_rate=5e-4),
    Settings(iterations=60, learning_rate=1e-3),
)
"""What is tried on words that are not judged."""

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Trains LoRA factors of all attention and merges them; one word an iteration."""
    unet = pipe.unet
    pairs = [(w, anchor_of(c, settings.anchors)) for c in concepts for w in c.words]
    empty = encode(pipe, [""])
    states = [encode(pipe, pair) for pair in pairs]
    generator = torch.Generator().manual_seed(seed)
    count = settings.batch_size
    with adapter(unet, LAYERS, settings.rank, seed) as factors:
        flow = torch.tensor(settings.flow, device=unet.device, requires_grad=True)
        groups = [
            {"params": factors, "lr": settings.learning_rate},
            {"params": [flow], "lr": settings.flow_learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups)
        for _ in range(settings.iterations):
            word, anchor = states[int(torch.randint(len(states), (1,), generator=generator))]
            steps = Steps(pipe.scheduler, settings.sampling_steps)
            both = torch.stack([empty[0], anchor]).repeat_interleave(count, dim=0)
            path = sample(unet, steps, both, settings.guidance_scale, generator)
            chosen = some_steps(settings.sampling_steps, generator)
            both = torch.stack([empty[0], word]).repeat_interleave(count * len(chosen), dim=0)
            forward, backward = log_densities(
                unet, steps, path, chosen, both, settings.guidance_scale
            )
            balance = flow + (forward - backward).sum(0) - settings.log_beta
            optimizer.zero_grad()
            balance.square().mean().backward()
            for part in (factors, [flow]):
                torch.nn.utils.clip_grad_norm_(part, 1.0)
            optimizer.step()


class Steps:
    """The transitions of DDIM with all of its noise (eta 1; Song et al., arXiv 2010.02502)."""

    def __init__(self, scheduler: Any, count: int) -> None:
        own = type(scheduler).from_config(scheduler.config)
        own.set_timesteps(count)
        self.times: Tensor = own.timesteps
        self._velocity = own.config.prediction_type == "v_prediction"
        alphas = own.alphas_cumprod
        before = self.times - own.config.num_train_timesteps // count
        self._now, self._next = alphas[self.times], alphas[before.clamp(min=0)]

    def shares(self, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, 1, 1, 1]`: alpha-bar of x_t and of x_{t-1} at these steps."""
        return tuple(  # type: ignore[return-value]
            values[places].to(like.device).view(-1, 1, 1, 1) for values in (self._now, self._next)
        )

    def forward(self, out: Tensor, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[n, c, h, w]` and deviation `[n, 1, 1, 1]` of p(x_{t-1} | x_t)."""
        now, later = self.shares(places, x)
        if self._velocity:
            clean, eps = now.sqrt() * x - (1 - now).sqrt() * out, now.sqrt() * out
            eps = eps + (1 - now).sqrt() * x
        else:
            clean, eps = (x - (1 - now).sqrt() * out) / now.sqrt(), out
        variance = (1 - later) / (1 - now) * (1 - now / later)
        return later.sqrt() * clean + (1 - later - variance).sqrt() * eps, variance.sqrt()

    def backward(self, following: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of q(x_t | x_{t-1})."""
        now, later = self.shares(places, following)
        return (now / later).sqrt() * following, (1 - now / later).sqrt()


def some_steps(count: int, generator: torch.Generator) -> Tensor:
    """The last fifth of the steps, and as many before."""
    last = max(1, count // 5)
    before = torch.randperm(count - last, generator=generator)[:last]
    return torch.cat([before, torch.arange(count - last, count)])


@torch.no_grad()
def sample(
    unet: Any, steps: Steps, both: Tensor, scale: float, generator: torch.Generator
) -> Tensor:
    """`[steps + 1, b, c, h, w]` from noise to picture; `both` are `[2 b, tokens, d]`."""
    x = noise(unet, len(both) // 2, generator)
    path = [x]
    for place, t in enumerate(steps.times):
        out = guided(unet, x, t, both, scale)
        mean, deviation = steps.forward(out, x, torch.tensor([place]))
        x = mean + deviation * noise(unet, len(x), generator)
        path.append(x)
    return torch.stack(path)


def log_densities(
    unet: Any, steps: Steps, path: Tensor, chosen: Tensor, both: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`[k, b]` log p(x_{t-1} | x_t) and log q(x_t | x_{t-1}), means over the latent's numbers.

    Args:
        path: `[steps + 1, b, c, h, w]`.
        chosen: `[k]`.
        both: `[2 k b, tokens, d]`, the empty prompts first.
    """
    count = path.shape[1]
    x, following = path[chosen].flatten(0, 1), path[chosen + 1].flatten(0, 1)
    places = chosen.repeat_interleave(count)
    t = steps.times[places].to(x.device)
    out = guided(unet, x, t.repeat(2), both, scale)
    forward = log_normal(following, *steps.forward(out, x, places))
    backward = log_normal(x, *steps.backward(following, places))
    return forward.view(-1, count), backward.view(-1, count)


def log_normal(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """`[n]` log densities, means over numbers."""
    return (
        torch.distributions.Normal(mean, deviation.expand_as(mean)).log_prob(x).flatten(1).mean(1)
    )
