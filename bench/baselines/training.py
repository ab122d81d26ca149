"""What the baselines that train have in common: predictions, noised latents, and weights.

Half-precision models are trained through float32 copies: bfloat16 weights lose small steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from realera_fast.embedded.flow import SAMPLING


def denoiser(pipe: Any) -> Any:
    """The U-Net, or the transformer of the flow-matching sibling."""
    return getattr(pipe, "transformer", None) or pipe.unet


@torch.no_grad()
def encode(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """`[prompts, tokens, d]` in the denoiser's dtype; of the sibling with the pooled vector as last
    row, which is as wide there."""
    model = denoiser(pipe)
    if model is getattr(pipe, "unet", None):
        embeds, _ = pipe.encode_prompt(list(prompts), model.device, 1, False)
    else:
        rows, _, pooled, _ = pipe.encode_prompt(
            list(prompts),
            None,
            None,
            device=model.device,
            do_classifier_free_guidance=False,
            max_sequence_length=SAMPLING["max_sequence_length"],
        )
        embeds = torch.cat([rows, pooled[:, None]], dim=1)
    found: Tensor = embeds.to(model.dtype)
    return found


def predict(model: Any, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """`[b, c, h, w]` float32: what the denoiser says, noise or velocity.

    Args:
        t: `[b]`, or one for all.
        states: `[b, tokens, d]`, of the sibling as `encode` has them.
    """
    x, states = x.to(model.dtype), states.to(model.dtype)
    if "pooled_projection_dim" in model.config:
        out: Tensor = model(
            hidden_states=x,
            timestep=t.expand(len(x)),
            encoder_hidden_states=states[:, :-1],
            pooled_projections=states[:, -1],
        ).sample
    else:
        out = model(x, t, encoder_hidden_states=states).sample
    return out.float()


def guided(unet: Any, x: Tensor, t: Tensor, both: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance; `both` are `[2 b, tokens, d]`, the empty prompts first."""
    free, found = predict(unet, torch.cat([x, x]), t, both).chunk(2)
    return free + scale * (found - free)


def noise_in(scheduler: Any, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """`[b, c, h, w]`: the noise that a prediction stands for, also where it is a velocity."""
    if scheduler.config.prediction_type != "v_prediction":
        return out
    share = scheduler.alphas_cumprod.to(x.device)[t].view(-1, 1, 1, 1)
    return share.sqrt() * out + (1 - share).sqrt() * x


class Copies:
    """An optimizer that steps on float32 copies of weights and writes them back."""

    def __init__(self, weights: Sequence[nn.Parameter], kind: Any, **options: Any) -> None:
        """
        Args:
            kind: of the optimizer, a class of `torch.optim`.
        """
        self.weights = list(weights)
        self._masters = [weight.detach().float().clone() for weight in self.weights]
        self._optimizer = kind(self._masters, **options)

    @torch.no_grad()
    def step(self) -> None:
        """Takes the gradients of the weights, which are gone afterwards."""
        for weight, master in zip(self.weights, self._masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self._optimizer.step()
        for weight, master in zip(self.weights, self._masters, strict=True):
            weight.copy_(master)


@contextmanager
def trained(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these weights of a model alone; for none of them afterwards."""
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        # Fused attention goes backward slowly on a CPU in half precision.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.requires_grad_(False)


@contextmanager
def adapter(
    unet: Any, layers: Sequence[str], rank: int, seed: int, dropout: float = 0.0
) -> Iterator[list[nn.Parameter]]:
    """Float32 LoRA factors, which are merged into the weights at the end; after an error they are
    gone.

    Args:
        layers: how the names of the layers end.
        seed: of the factors and of the dropout.
    """
    from peft import LoraConfig, LoraModel

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = LoraModel(unet, config, "default")
        factors = [weight for weight in unet.parameters() if weight.requires_grad]
        for factor in factors:
            factor.data = factor.data.float()
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                yield factors
            unet.eval()
            wrapped.merge_and_unload()
        except BaseException:
            wrapped.unload()
            raise
        finally:
            vars(unet).pop("peft_config", None)
            unet.eval().requires_grad_(False)


@dataclass(frozen=True)
class Noised:
    """Latents on the way from noise to a picture."""

    x: Tensor
    """`[b, c, h, w]`."""
    t: Tensor
    """`[b]`: the time that the denoiser is told with x."""
    word: Tensor
    """`[b]` on the CPU: which of the prompts denoised them."""
    start: Tensor
    """`[b, c, h, w]`: the noise that x comes from."""


class Trajectories:
    """x_t that the denoiser of now makes of its own words, each up to a random step.

    Several are denoised together, and used one after the other: the published codes denoise one
    anew for each iteration, which is most of their time.
    """

    def __init__(
        self,
        pipe: Any,
        states: Tensor,
        generator: torch.Generator,
        *,
        steps: int,
        guidance_scale: float,
        together: int,
    ) -> None:
        """
        Args:
            states: `[1 + words, tokens, d]`: the empty prompt first.
            steps: of a whole trajectory.
            together: how many are denoised at a time.
        """
        self._unet, self._states, self._generator = denoiser(pipe), states, generator
        self._scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        self._steps, self._scale, self._together = steps, guidance_scale, together
        self._waiting: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def take(self, count: int = 1) -> Noised:
        """So many of them."""
        while len(self._waiting) < count:
            self._waiting = self._denoised() + self._waiting
        found = [self._waiting.pop() for _ in range(count)]
        xs, ts, words, starts = zip(*found, strict=True)
        t = torch.stack(ts).to(self._unet.device)
        return Noised(torch.cat(xs), t, torch.tensor(words), torch.cat(starts))

    @torch.no_grad()
    def _denoised(self) -> list[tuple[Tensor, Tensor, int, Tensor]]:
        count, unet, generator = self._together, self._unet, self._generator
        # Schedulers of flows count their steps.
        self._scheduler.set_timesteps(self._steps)
        which = torch.randint(1, len(self._states), (count,), generator=generator)
        stops = torch.randint(0, self._steps, (count,), generator=generator)
        x = noise(unet, count, generator)
        start, found = x, []
        for step, t in enumerate(self._scheduler.timesteps):
            here = stops == step
            for i in here.nonzero()[:, 0].tolist():
                found.append((x[i : i + 1], t, int(which[i]), start[i : i + 1]))
            x, which, stops, start = x[~here], which[~here], stops[~here], start[~here]
            if not len(x):
                break
            both = torch.cat([self._states[:1].expand(len(x), -1, -1), self._states[which]])
            out = guided(unet, x, t, both, self._scale)
            x = self._scheduler.step(out, t, x).prev_sample
        order = torch.randperm(count, generator=generator).tolist()
        return [found[i] for i in order]


def noise(unet: Any, count: int, generator: torch.Generator) -> Tensor:
    """`[count, c, h, w]` float32 where the denoiser is."""
    size, channels = unet.config.sample_size, unet.config.in_channels
    return torch.randn((count, channels, size, size), generator=generator).to(unet.device)
