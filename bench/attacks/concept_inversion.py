"""A new token, learnt from pictures of the concept against the edited model.

Concept inversion (Pham et al., arXiv 2308.01508): textual inversion (Gal et al., arXiv 2208.01618)
with the erased model in place of the original. The vector v* of one new token follows

    min | eps'(z_t, t, f(template with v*)) - eps |^2

on noised pictures of the concept, each step with another template. It starts from a word that means
nothing in particular, so that what is found comes from the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.denoising import Denoising, embeds_of
from attacks.prompt_optimization import FreePrompt

TEMPLATES = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a {}", "the {}")
STYLE_TEMPLATES = ("a picture in the style of {}", "an image in the style of {}", "the style of {}")
"""The first of each is the one that is drawn with; the token is the last."""


@dataclass(frozen=True)
class Settings:
    """The authors' scripts take 5,000 steps of 16 noised pictures at a constant 5e-3 on Stable
    Diffusion; a small model needs fewer (ours, chosen on cow and house)."""

    steps: int = 60
    batch_size: int = 4
    learning_rate: float = 0.15
    """Adam's step, in units of the root mean square of the encoder's own token vectors; falls to a
    tenth."""
    start: str = "thing"
    """A word of one token."""


def invert(
    pipe: Any,
    latents: Tensor,
    seed: int,
    settings: Settings | None = None,
    *,
    templates: Sequence[str] = TEMPLATES,
) -> FreePrompt:
    """A prompt with the new token in it, learnt in the model as it is now.

    Args:
        latents: `[n, c, h, w]` of pictures of the concept, scaled as the denoiser takes them.
        templates: of the prompts, each in turn; the token stands at their end.
    """
    options = settings or Settings()
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(seed)
    size = float(table.float().square().mean().sqrt())
    (first,) = pipe.tokenizer(options.start, add_special_tokens=False).input_ids
    vector = table[first].float().clone()[None].requires_grad_(True)
    prompts = [template.format(options.start) for template in templates]
    free = [FreePrompt(pipe, vector, prompt) for prompt in prompts]
    denoising = Denoising(pipe, latents, options.batch_size, generator)
    optimizer = torch.optim.Adam([vector], lr=options.learning_rate * size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for step in range(options.steps):
            noised, i = denoising.draw(), step % len(free)
            with free[i].installed():
                states = embeds_of(pipe, [prompts[i]])
            (vector.grad,) = torch.autograd.grad(denoising.loss(noised, states), [vector])
            optimizer.step()
            schedule.step()
    return FreePrompt(pipe, vector.detach(), prompts[0])
