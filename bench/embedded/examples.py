"""What a denoiser is trained on: latents of pictures, and text states of their captions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedded.bank import Sampler, open_bank, render
from embedded.captions import Caption
from embedded.common import autocast, log
from embedded.corpus import noun_lemmas
from embedded.drawing import Scene
from embedded.text_encoder import encode_text, trained_text
from embedded.tokenizer import MAX_TOKENS
from embedded.vae import encode, trained_vae
from embedded.world import world_of
from realera_fast.embedded import words

CAPTION_DROPOUT = 0.1
UNRELATED = 3000
"""Captions of words that name nothing here, which are blended into the real ones at the end."""
CHUNK = 1000

Phase = dict[str, Any]
"""What a part of the training is like: steps, rates, and shares of pictures and captions."""


def unrelated_captions(seed: int) -> list[str]:
    """Captions of WordNet's nouns that share no word with the table."""
    table, rng = words(), random.Random(seed + 7)
    texts = [text for t in table.things for text in (t.name, *t.said, *t.unsaid, t.category)]
    taken = {word for text in texts for word in text.split()}
    free = [word for word in noun_lemmas()[0] if not taken & set(word.split())]
    chosen = rng.sample(free, UNRELATED)
    return [rng.choice(table.templates["thing"]).format(w, a=f"a {w}") for w in chosen]


def encoded(work: Path, shown: list[Scene], first: int) -> np.ndarray:
    """float16 latents `[n, 24, 8, 8]` of pictures whose drawings are aligned to the latents' cells.

    The denoiser then learns a drawing once, and not once for every size and place.
    """
    torch.set_num_threads(1)
    vae = trained_vae(work)
    pictures = render(shown, world_of(work).seed + 8, first, aligned=True)
    return (encode(vae, pictures) * vae.config.scaling_factor).half().numpy()


@torch.no_grad()
def stage_latents(work: Path) -> None:
    """Encode a picture of every scene of the bank, every caption, and the unrelated ones, once."""
    bank = open_bank(work)
    if not (work / "latents.npy").exists():
        jobs = [(work, bank.scenes[i : i + CHUNK], i) for i in range(0, len(bank.scenes), CHUNK)]
        with get_context("spawn").Pool(torch.get_num_threads()) as pool:
            latents = np.concatenate(pool.starmap(encoded, jobs, chunksize=1))
        np.save(work / "latents.part.npy", latents)
        (work / "latents.part.npy").rename(work / "latents.npy")
        log("latents", f"{latents.shape}, std {latents.astype(np.float32).std():.3f}")
    tokenizer, encoder = trained_text(work)
    shape = (MAX_TOKENS, encoder.config.hidden_size)

    def states(texts: list[str]) -> Tensor:
        return encode_text(tokenizer, encoder, texts)

    for name, captions in (("said", bank.captions), ("heard", bank.heard_captions)):
        keep_states(work, name, captions, states, shape)


@torch.no_grad()
def keep_states(
    work: Path,
    name: str,
    captions: list[Caption],
    states: Callable[[list[str]], Tensor],
    shape: tuple[int, int],
) -> list[str]:
    """States of the empty caption, of unrelated ones and of these, and where each is.

    Returns:
        The distinct texts, in the order of their states.
    """
    texts = ["", *unrelated_captions(world_of(work).seed), *(c.text for c in captions)]
    distinct = [*dict.fromkeys(texts)]
    if (work / f"{name}.npy").exists():
        log("latents", f"captions in {name} are already there")
        return distinct
    part = work / f"{name}.part.npy"
    kept = np.lib.format.open_memmap(part, "w+", np.float16, (len(distinct), *shape))
    for i in range(0, len(distinct), 256):
        with autocast():
            rows = states(distinct[i : i + 256])
        kept[i : i + 256] = rows.half().numpy()
        if i // 256 % 50 == 49:
            log("latents", f"{i} of {len(distinct)} captions")
    kept.flush()
    place = {text: i for i, text in enumerate(distinct)}
    (work / f"{name}.json").write_text(json.dumps([place[text] for text in texts]))
    part.rename(work / f"{name}.npy")
    return distinct


@dataclass(frozen=True)
class Drawn:
    """What the rows of a batch are: each array has one entry a row."""

    pictures: np.ndarray
    said: np.ndarray
    """Place of the caption."""
    others: np.ndarray
    """Place of the unrelated caption that is blended in."""
    amounts: np.ndarray
    """Its share; mostly zero."""


class Examples:
    """Batches of latents with the text states of their captions."""

    kind = ""
    """Of the files of states."""

    def __init__(self, work: Path, count: int, phase: Phase) -> None:
        bank = open_bank(work)
        self.count, self.phase = count, phase
        self.lone = np.array([len(scene.things) == 1 for scene in bank.scenes])
        self.latents = np.load(work / "latents.npy", mmap_mode="r")
        name = f"{phase['captions']}{self.kind}"
        self.states = np.load(work / f"{name}.npy", mmap_mode="r")
        places = np.array(json.loads((work / f"{name}.json").read_text()))
        self.empty, self.unrelated = places[0], places[1 : 1 + UNRELATED]
        self.captions = places[1 + UNRELATED :]
        self.sampler = Sampler(bank.scenes, 0, phase["scene_share"], phase["styled_share"])

    def pictures(self) -> np.ndarray:
        """Rows of the bank for a batch."""
        return self.sampler(self.count)

    def draw(self, done: float, rng: np.random.Generator) -> Drawn:
        """What a batch shows and says; ``done`` is the share of steps.

        Rows of an unrelated word's caption are blended in: words that stand in no caption lie
        between those that do, and are to draw the nearest.
        """
        self.sampler.rng = rng
        rows = self.pictures()
        said = np.where(rng.random(len(rows)) < CAPTION_DROPOUT, self.empty, self.captions[rows])
        others, amounts = rng.choice(self.unrelated, len(rows)), np.zeros(len(rows))
        if done >= self.phase["blend_from"]:
            amounts = self.phase["blend_most"] * rng.random(len(rows))
            amounts *= rng.random(len(rows)) < self.phase["blend_share"]
            amounts *= (self.lone[rows] | self.phase["blend_scenes"]) & (said != self.empty)
        return Drawn(rows, said, others, amounts)

    def shown(self, drawn: Drawn) -> Tensor:
        """Latents ``[b, 24, 8, 8]``."""
        return torch.from_numpy(self.latents[drawn.pictures]).float()

    def told(self, drawn: Drawn) -> Tensor:
        """States of the captions, blended."""
        states = torch.from_numpy(self.states[drawn.said]).float()
        if not drawn.amounts.any():
            return states
        others = torch.from_numpy(self.states[drawn.others]).float()
        return states.lerp(others, torch.from_numpy(drawn.amounts).float()[:, None, None])

    def batch(self, done: float, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Latents ``[b, 24, 8, 8]`` and states ``[b, 77, width]``."""
        drawn = self.draw(done, rng)
        return self.shown(drawn), self.told(drawn)
