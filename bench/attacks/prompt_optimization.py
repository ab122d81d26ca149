"""Continuous prompts against the edited model, with all of its gradients.

After textual inversion against erased models (Pham et al., arXiv 2308.01508) and UnlearnDiffAtk
(Zhang et al., arXiv 2310.11868): free token vectors stand for the concept's word, and follow

    min | eps'(z_t, t, f("a photo of a <vectors>")) - eps |^2

on noised pictures of the concept. UnlearnDiffAtk rounds them to tokens, which makes it weaker; here
they stay free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.denoising import Denoising, embeds_of


@dataclass(frozen=True)
class Settings:
    """Small model, few steps (ours; UnlearnDiffAtk takes 40 passes over 50 time steps)."""

    vectors: int = 3
    steps: int = 120
    batch_size: int = 4
    learning_rate: float = 0.02
    """Adam's step, in units of the root mean square of the encoder's own token vectors."""


class FreePrompt:
    """The prompt that was found: replaces token vectors of the text encoder while it is used."""

    def __init__(self, pipe: Any, vectors: Tensor, prompt: str, start: int | None = None) -> None:
        """
        Args:
            vectors: `[n, d]`.
            start: the first token that they replace; by default they replace the prompt's last n.
        """
        self._embedding: nn.Embedding = pipe.text_encoder.get_input_embeddings()
        self._vectors, self.prompt = vectors, prompt
        plain = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
        self.start = 1 + len(plain) - len(vectors) if start is None else start

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Every prompt that is encoded meanwhile has the vectors in its place."""

        def replace(module: nn.Module, arguments: Any, found: Tensor) -> Tensor:
            rows = self._vectors.to(found.dtype).expand(len(found), -1, -1)
            stop = self.start + rows.shape[1]
            return torch.cat([found[:, : self.start], rows, found[:, stop:]], dim=1)

        handle = self._embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def optimize(
    pipe: Any,
    latents: Tensor,
    word: str,
    seed: int,
    settings: Settings | None = None,
    *,
    template: str = "a photo of a {}",
) -> FreePrompt:
    """A free prompt that draws what the latents show, in the model as it is now.

    Args:
        latents: `[n, c, h, w]` of pictures of the concept, scaled as the denoiser takes them.
        word: of one token, where the vectors start.
        template: the prompt; the vectors stand at its end.
    """
    options = settings or Settings()
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(seed)
    size = table.float().square().mean().sqrt()
    first = pipe.tokenizer(word, add_special_tokens=False).input_ids[0]
    start = table[first].float().expand(options.vectors, -1)
    noise = torch.randn(start.shape, generator=generator).to(start.device)
    vectors = (start + 0.1 * size * noise).clone().requires_grad_(True)
    prompt = template.format(" ".join([word] * options.vectors))
    free = FreePrompt(pipe, vectors, prompt)
    denoising = Denoising(pipe, latents, options.batch_size, generator)
    optimizer = torch.optim.Adam([vectors], lr=options.learning_rate * float(size))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(options.steps):
            noised = denoising.draw()
            with free.installed():
                states = embeds_of(pipe, [prompt])
            (vectors.grad,) = torch.autograd.grad(denoising.loss(noised, states), [vectors])
            optimizer.step()
            schedule.step()
    return FreePrompt(pipe, vectors.detach(), prompt)
