"""AdvUnlearn (Zhang et al., NeurIPS 2024, arXiv 2405.15234): the text encoder, trained against
prompts that bring the concept back.

    | eps(z_t, t, f'(c*)) - (eps(z_t, t, f("")) - eta (eps(z_t, t, f(c)) - eps(z_t, t, f("")))) |^2
        + lambda | eps(z_t, t, f'(k)) - eps(z_t, t, f(k)) |^2

    c* = argmin over prefixes of | eps(z_t, t, f'(prefix c)) - eps(z_t, t, f(c)) |^2

with k prompts to keep. The prefix is a free vector before the concept's first token; Adam moves it
on, from where the last attack left it, at another z_t each step. The denoiser is never changed, so
z_t and all that f says of them are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from attacks.denoising import tokens_of
from attacks.prompt_optimization import FreePrompt
from torch import Tensor
from torch.nn import functional

from baselines.phrases import Phrases
from baselines.training import Copies, encode, noise, predict, trained
from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors' but for budgets, which a small model on a CPU needs smaller."""

    defaults: ClassVar[str] = "the authors' with smaller budgets"

    iterations: int = 50
    """Theirs: 1,000."""
    warm_up: int = 25
    """Iterations before the first attack. Theirs: 200."""
    learning_rate: float = 2e-4
    """Adam's. Theirs: 1e-5, twenty times as many steps."""
    negative_guidance: float = 1.0
    """eta."""
    attack_steps: int = 8
    """Theirs: 30."""
    attack_learning_rate: float = 0.2
    """Adam's step, in units of the root mean square of the encoder's own token vectors. Theirs:
    1e-3, which is about a tenth of that in Stable Diffusion, four times as many steps."""
    retain_scale: float = 0.3
    """lambda."""
    retain_batch: int = 5
    retain_prompts: int = 16
    """That these are drawn from. Theirs: objects of COCO, which a small model does not know."""
    guidance_scale: float = 3.0
    sampling_steps: int = 20
    """Theirs: 50."""
    together: int = 6
    """Trajectories of the concept."""


SWEEP = (
    Settings(),
    Settings(learning_rate=2e-5),
    Settings(learning_rate=5e-5),
    Settings(learning_rate=5e-4),
)
"""What is tried on words that are not judged."""


@dataclass(frozen=True)
class Point:
    """z_t, and what the original model says there."""

    x: Tensor
    """`[1, c, h, w]`."""
    t: Tensor
    free: Tensor
    """`[1, c, h, w]`, to the empty prompt."""
    shown: Tensor
    """`[1, c, h, w]`, to the prompt that denoised it."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Trains every weight of the text encoder but its token and place vectors."""
    words = [word for concept in concepts for word in concept.words]
    encoder, unet = pipe.text_encoder, pipe.unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    kept = Phrases(pipe).kept(concepts)
    chosen = torch.randperm(len(kept), generator=generator)[: settings.retain_prompts].tolist()
    prompts = [f"a photo of a {kept[i]}" for i in chosen]
    prefixed = _Prefixed(pipe, words, generator)
    shares = [word for word in words for _ in range(-(-settings.together // len(words)))]
    points = trajectories(pipe, [*shares, *prompts], settings, generator)
    own: dict[str, list[Point]] = {word: [] for word in words}
    for word, found in zip(shares, points, strict=False):
        own[word] += found
    others = points[len(shares) :]
    weights = [p for name, p in encoder.named_parameters() if "embeddings" not in name]
    optimizer = Copies(weights, torch.optim.Adam, lr=settings.learning_rate)
    with trained(encoder, weights):
        for iteration in range(settings.iterations):
            word = words[draw(len(words))]
            attacked = iteration >= settings.warm_up
            if attacked:
                here = [own[word][draw(len(own[word]))] for _ in range(settings.attack_steps)]
                prefixed.attack(unet, word, here, settings.attack_learning_rate)
            point = own[word][draw(len(own[word]))]
            wanted = point.free - settings.negative_guidance * (point.shown - point.free)
            states = prefixed.encode(word) if attacked else encoder(tokens_of(pipe, [word]))[0]
            loss = functional.mse_loss(predict(unet, point.x, point.t, states), wanted)
            places = [draw(len(prompts)) for _ in range(settings.retain_batch)]
            beside = [others[place][draw(settings.sampling_steps)] for place in places]
            states = encoder(tokens_of(pipe, [prompts[place] for place in places]))[0]
            out = predict(unet, *_stacked(beside), states)
            retained = functional.mse_loss(out, torch.cat([p.shown for p in beside]))
            (loss + settings.retain_scale * retained).backward()
            optimizer.step()


class _Prefixed:
    """Prompts with a free vector before each word, which attacks move."""

    def __init__(self, pipe: Any, words: Sequence[str], generator: torch.Generator) -> None:
        self._pipe = pipe
        table = pipe.text_encoder.get_input_embeddings().weight.detach()
        self._size = float(table.float().square().mean().sqrt())
        # A random token, of which the padded prompt holds the place.
        self._vectors = {
            word: table[torch.randint(len(table), (1,), generator=generator)].float().clone()
            for word in words
        }
        self._tokens = {word: tokens_of(pipe, [f"a {word}"]) for word in words}

    def encode(self, word: str) -> Tensor:
        """`[1, tokens, d]` by the encoder of now."""
        with FreePrompt(self._pipe, self._vectors[word], f"a {word}", start=1).installed():
            found: Tensor = self._pipe.text_encoder(self._tokens[word])[0]
        return found

    def attack(
        self, unet: Any, word: str, points: Sequence[Point], learning_rate: float
    ) -> list[float]:
        """Takes a step at each of the points; answers the losses before."""
        vectors = self._vectors[word].requires_grad_(True)
        optimizer = torch.optim.Adam([vectors], lr=learning_rate * self._size)
        losses = []
        for point in points:
            out = predict(unet, point.x, point.t, self.encode(word))
            loss = functional.mse_loss(out, point.shown)
            (vectors.grad,) = torch.autograd.grad(loss, [vectors])
            optimizer.step()
            losses.append(float(loss.detach()))
        vectors.requires_grad_(False)
        return losses


def _stacked(points: Sequence[Point]) -> tuple[Tensor, Tensor]:
    return torch.cat([point.x for point in points]), torch.stack([point.t for point in points])


@torch.no_grad()
def trajectories(
    pipe: Any, prompts: Sequence[str], settings: Settings, generator: torch.Generator
) -> list[list[Point]]:
    """Of each prompt the points of one trajectory of the model as it is."""
    unet, count = pipe.unet, len(prompts)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(settings.sampling_steps)
    both = encode(pipe, [*[""] * count, *prompts])
    x, found = noise(unet, count, generator), []
    for t in scheduler.timesteps:
        free, shown = predict(unet, torch.cat([x, x]), t, both).chunk(2)
        here = t.to(unet.device)
        found.append([Point(x[i, None], here, free[i, None], shown[i, None]) for i in range(count)])
        x = scheduler.step(free + settings.guidance_scale * (shown - free), t, x).prev_sample
    return [list(points) for points in zip(*found, strict=True)]
