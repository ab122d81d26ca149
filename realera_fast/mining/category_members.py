"""Members of a category: words that the model draws as what the category's name asks for.

A text encoder puts the name of a category far from its members ("weapon", "sword"), where no
neighborhood of the name reaches. The denoiser knows them: while it draws a member, the name would
push its prediction the same way as the word does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from realera_fast.models import Structure, check_drawable, check_runnable
from realera_fast.runtime import Execution, checkpoint, progress_bar, unwrapped
from realera_fast.solver import ConceptMap
from realera_fast.text import Concept, fill
from realera_fast.unet import (
    Conditioning,
    DDIMSampler,
    LoraParameters,
    SamplingOptions,
    SharedUNet,
    attention,
)

logger = logging.getLogger(__name__)

_PROMPT = "a photo of {}"
STEPS, _STARTS = 4, (40_000, 40_001)
"""Images a word and their steps (ours): on categories that are not judged, fewer mix members up
with others, more tell nothing new."""


class Encoder(Protocol):
    """Prompts to what the denoiser is shown."""

    def encode(self, prompts: Sequence[str]) -> Tensor: ...


def can_be_drawn(model: Any, config: SamplingOptions) -> bool:
    """Whether a prompt is all that it takes to draw: no image or class, a known size.

    Args:
        config: may say the size of the latents.
    """
    try:
        check_drawable(model, config.latent_size)
        check_runnable(model)
        attention.layers(model)
    except ValueError:
        return False
    return True


def guidance_cosine(
    unet: Any,
    scheduler: Any,
    names: Sequence[str],
    words: Sequence[str],
    *,
    text: Encoder,
    empty: Tensor,
    config: SamplingOptions,
    pooled_width: int | None = None,
) -> Tensor:
    """Cosine between where words and where a category's name push the prediction.

    A word is drawn from a few starts, the same for all words. On its way, with predictions e,

        cos(e(x_t, word) - e(x_t, ""), e(x_t, name) - e(x_t, ""))

    is taken over all time steps together: the directions of classifier-free guidance (Ho and
    Salimans, arXiv 2207.12598). To find words by it is ours.

    Args:
        unet: the original `UNet2DConditionModel`; unchanged on return.
        scheduler: its noise scheduler (a diffusers one; only its config is used).
        names: names of the category; the one that fits a word best counts.
        words: the words that are asked for.
        text: encodes prompts as the U-Net is shown them.
        empty: `[1, t, d]` embedding of the empty prompt.
        config: size of latents and batches, guidance scale and precision.
        pooled_width: features of the pooled vector in a prompt's last row, for SDXL.

    Returns:
        `[w]` float32 on the CPU, mean over the starts; 0 where a word changes no prediction, -inf
        where one is not finite (a warning says so).
    """
    found = torch.zeros(len(words), dtype=torch.float32, device="cpu")
    if not words or not names:
        return found
    structure = Structure(unwrapped(unet))
    lora = LoraParameters({}, {}, r=1, lora_alpha=1.0, seed=0)
    shared = SharedUNet(
        unet,
        ConceptMap.identity(empty.shape[-1]),
        lora,
        pooled_map=None if pooled_width is None else ConceptMap.identity(pooled_width),
        mixed_precision=config.mixed_precision,
    )
    sampler = DDIMSampler(
        shared,
        scheduler,
        empty,
        steps=STEPS,
        guidance_scale=config.guidance_scale,
        latent_size=config.latent_size,
        batch_size=config.sampling_batch_size,
    )
    asked = text.encode([fill(_PROMPT, name) for name in names])
    size = max(1, config.sampling_batch_size // len(_STARTS))
    try:
        unwrapped(unet).eval()
        with torch.no_grad(), shared.installed():
            fixed = [shared.condition(x[None], "original") for x in (empty[0], *asked)]
            for start in range(0, len(words), size):
                part = slice(start, start + size)
                states = text.encode([fill(_PROMPT, word) for word in words[part]])
                found[part] = _cosine(sampler, states, fixed)
    finally:
        structure.restore()
    bad = ~found.isfinite()
    if bool(bad.any()):
        logger.warning(
            "members of %r: predictions for %d words are not finite, these go by their text",
            names[0],
            int(bad.sum()),
        )
    return found.masked_fill(bad, -torch.inf)


def _cosine(sampler: DDIMSampler, states: Tensor, fixed: Sequence[Conditioning]) -> Tensor:
    """`[w]` for prompts `[w, t, d]` of words.

    Args:
        fixed: the empty prompt and the names, one row each: kept once, however many there are.
    """
    words, starts = len(states), len(_STARTS)
    shared, latents = sampler.shared, sampler.noise(_STARTS).repeat(words, 1, 1, 1)
    empty, *names = (prompt.expand(len(latents)) for prompt in fixed)
    own = shared.condition(states.repeat_interleave(starts, dim=0), "original")
    prompts = [empty, own, *names]
    # Sums over time steps: of <word, name>, |name|^2 `[n, w s]` and |word|^2 `[w s]`.
    dot = named_square = word_square = torch.zeros((), dtype=torch.float32, device="cpu")
    for timestep in sampler.scheduler.timesteps:
        free, word, *named = (
            shared.predict(latents, timestep.expand(len(latents)), part) for part in prompts
        )
        noise = free + sampler.guidance_scale * (word - free)
        latents = sampler.scheduler.step(noise, timestep, latents).prev_sample
        word = (word - free).flatten(1)
        name = torch.stack(named).sub(free).flatten(2)
        dot = dot + (word * name).sum(-1).cpu()
        named_square = named_square + name.square().sum(-1).cpu()
        word_square = word_square + word.square().sum(-1).cpu()
    cosine = dot / (named_square * word_square).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return cosine.view(-1, words, starts).mean(-1).amax(0)


class MemberSearch:
    """Measures words once and for all processes: a resumed run does not draw them again."""

    def __init__(
        self,
        measure: Callable[[Sequence[str], Sequence[str]], Tensor],
        device: torch.device,
        *,
        together: int,
        execution: Execution,
    ) -> None:
        """
        Args:
            measure: `guidance_cosine` of names and words.
            device: where processes exchange what they measured.
            together: words that a process measures at a time; then they are in the checkpoint.
            execution: its processes share the words and get the same values; the run of its
                checkpoint identifies what the values depend on.
        """
        self._measure, self._device, self._together = measure, device, together
        self._processes, self._checkpoint = execution.processes, execution.checkpoint
        self._progress = execution.main_progress
        saved = self._checkpoint.load_together(checkpoint.MEMBERS, self._processes, device)
        self._measured: dict[str, dict[str, float]] = {} if saved is None else saved.values
        """By names and word."""

    def __call__(self, concept: Concept, words: Sequence[str]) -> Tensor:
        """`[w]` cosines of words and a category, on the CPU."""
        known = self._measured.setdefault(json.dumps(concept.words), {})
        left = [word for word in words if word not in known]
        size = self._together * self._processes.count
        with progress_bar(
            total=len(words),
            initial=len(words) - len(left),
            desc="members",
            progress=self._progress,
        ) as bar:
            for start in range(0, len(left), size):
                part = left[start : start + size]
                found = torch.zeros(len(part), dtype=torch.float32, device="cpu")
                share = self._processes.share(len(part))
                found[share] = self._measure(concept.words, part[share])
                found = self._processes.summed(found, self._device)
                known |= zip(part, found.tolist(), strict=True)
                bar.update(len(part))
                if self._processes.is_main:
                    self._checkpoint.save(checkpoint.MEMBERS, {}, self._measured)
        return torch.tensor([known[word] for word in words], dtype=torch.float32, device="cpu")
