"""STEREO (Srivatsan et al., CVPR 2025, arXiv 2408.16807): search thoroughly, then erase once.

First stage: the concept is erased as by ESD, a new token that brings it back is learnt from
pictures (textual inversion), that token is erased, and so on. Second stage, from the original
weights:

    | eps'(x_t, c) - (e + a (eps(x_t, s) - e) - n mean_k (eps(x_t, c_k) - e)) |^2,  e = eps(x_t, "")

c_k are the concept and the tokens found, c is one of them, and s is a sentence that shows the
concept beside something else, which stays. All weights are trained but those of cross-attention, of
the time's embedding and of the last layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from attacks import concept_inversion
from attacks.denoising import tokens_of
from torch import Tensor, nn
from torch.nn import functional

from baselines import esd
from baselines.phrases import Phrases
from baselines.training import Copies, Trajectories, encode, guided, noise, predict, trained
from realera_fast.text import Concept

SENTENCES: Mapping[str, str] = {
    "object": "a {} next to a {}",
    "style": "a {1} in the style of {0}",
    "person": "{} next to a {}",
    "explicit": "a {} next to a {}",
}
"""By kind. Theirs are some two hundred for each concept, written by a language model."""


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors' but for budgets, which a small model on a CPU needs smaller."""

    defaults: ClassVar[str] = "the authors' with smaller budgets"

    rounds: int = 2
    search: esd.Settings = esd.Settings(iterations=25, sampling_steps=20, learning_rate=1e-4)
    """Of each round. Theirs: 200 iterations at 5e-6."""
    inversion: concept_inversion.Settings = concept_inversion.Settings(steps=30)
    """Of each round. Theirs: 3,000 steps at 5e-3."""
    pictures: int = 12
    """To learn tokens from. Theirs: 500."""
    iterations: int = 50
    """Of the second stage. Theirs: 200."""
    learning_rate: float = 2e-4
    """AdamW's in the second stage. Theirs: 2e-5, four times as many steps. Here 1e-4 left three of
    four cows, and 4e-4 nothing of anything."""
    anchor_guidance: float = 1.0
    """a."""
    negative_guidance: float = 3.0
    """n. Their code takes one off both scales, 2 and -2: hence 1 and 3."""
    guidance_scale: float = 3.0
    sampling_steps: int = 20
    """Theirs: 50."""


SWEEP = (
    Settings(),
    Settings(learning_rate=1e-4),
    Settings(learning_rate=1e-4, negative_guidance=1.0),
    Settings(negative_guidance=1.0),
    Settings(learning_rate=3e-4),
    Settings(learning_rate=3e-4, negative_guidance=1.0),
)
"""What is tried on words that are not judged."""


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> None:
    """Each word is searched for on its own; the second stage takes all of them together."""
    unet = pipe.unet
    weights = [p for name, p in unet.named_parameters() if is_trained(name)]
    original = {name: value.clone() for name, value in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    words = [(word, concept) for concept in concepts for word in concept.words]
    empty = encode(pipe, [""])
    groups = []
    for word, _ in words:
        groups.append(search(pipe, word, weights, settings, generator))
        unet.load_state_dict(original)
    kept = Phrases(pipe).kept(concepts)
    teacher = copy.deepcopy(unet).requires_grad_(False)
    states = torch.cat([empty, *groups])
    optimizer = Copies(weights, torch.optim.AdamW, lr=settings.learning_rate)
    trajectories = Trajectories(
        pipe,
        states,
        generator,
        steps=settings.sampling_steps,
        guidance_scale=settings.guidance_scale,
        together=10,
    )
    with trained(unet, weights):
        for _ in range(settings.iterations):
            noised = trajectories.take()
            x, t, place = noised.x, noised.t, int(noised.word)
            which = (place - 1) // len(groups[0])
            word, concept = words[which]
            other = kept[int(torch.randint(len(kept), (1,), generator=generator))]
            sentence = encode(pipe, [SENTENCES[concept.kind].format(word, other)])
            wanted = composed(teacher, x, t, (empty, sentence, groups[which]), settings)
            out = predict(unet, x, t, states[place : place + 1])
            functional.mse_loss(out, wanted).backward()
            optimizer.step()


def is_trained(name: str) -> bool:
    """Whether a weight is neither of cross-attention, nor of the time's embedding, nor of the last
    layers."""
    return ".attn2." not in name and not name.startswith(
        ("time_embedding.", "conv_norm_out.", "conv_out.")
    )


@torch.no_grad()
def composed(
    teacher: Any, x: Tensor, t: Tensor, states: tuple[Tensor, Tensor, Tensor], settings: Settings
) -> Tensor:
    """`[1, c, h, w]`: what the second stage follows.

    Args:
        states: of the empty prompt, the sentence, and `[k, tokens, d]` all that is to go.
    """
    every = torch.cat(states)
    found = predict(teacher, x.expand(len(every), -1, -1, -1), t.expand(len(every)), every)
    free, anchor, gone = found[:1], found[1:2], found[2:].mean(0, keepdim=True)
    toward = settings.anchor_guidance * (anchor - free)
    return free + toward - settings.negative_guidance * (gone - free)


def search(
    pipe: Any,
    word: str,
    weights: Sequence[nn.Parameter],
    settings: Settings,
    generator: torch.Generator,
) -> Tensor:
    """`[1 + rounds, tokens, d]` embeddings of the word and of each token that brings it back; the
    denoiser is left as the last round erased it."""
    empty, found = encode(pipe, [""]), [encode(pipe, [word])]
    latents = drawn(pipe, torch.cat([empty, found[0]]), settings, generator)
    for _ in range(settings.rounds):
        esd.fine_tune(pipe, torch.cat([empty, found[-1]]), weights, settings.search, generator)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        free = concept_inversion.invert(pipe, latents, seed, settings.inversion)
        with torch.no_grad(), free.installed():
            states = pipe.text_encoder(tokens_of(pipe, [free.prompt]))[0]
        found.append(states.to(found[0].dtype))
    return torch.cat(found)


@torch.no_grad()
def drawn(pipe: Any, states: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """`[pictures, c, h, w]` latents of the concept; `states` are of the empty prompt and of it."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(settings.sampling_steps)
    x = noise(pipe.unet, settings.pictures, generator)
    both = states.repeat_interleave(len(x), dim=0)
    for t in scheduler.timesteps:
        out = guided(pipe.unet, x, t, both, settings.guidance_scale)
        x = scheduler.step(out, t, x).prev_sample
    return x
