"""Rows of all concepts, gathered into the sums that the closed form solves.

Concept by concept, so that memory does not grow with their number; a run that was cut off goes on
where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from realera_fast import mining
from realera_fast.config import EraseConfig
from realera_fast.ops import philox
from realera_fast.runtime import checkpoint
from realera_fast.runtime import progress as progress_bars
from realera_fast.solver import NormalEquations, Pairs
from realera_fast.text import (
    AlignedPrompts,
    Concept,
    ConceptPrompts,
    Text,
    Vocabulary,
    encode_vocabulary,
    fill,
    mean_rows,
    preserve_gram,
)

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""Time between two checkpoints."""


class _Saved:
    """Sums with the number of concepts in them, kept in a checkpoint as they grow."""

    def __init__(
        self, equations: NormalEquations, place: tuple[Path, str, str, bool] | None
    ) -> None:
        self._equations, self.done = equations, 0
        self._place = place
        self._last = time.monotonic()
        if place is None:
            return
        folder, name, run, resume = place
        found = checkpoint.load(folder, run, name) if resume else None
        if found is not None:
            equations.load_tensors(found[0], int(found[1]["rows"]))
            self.done = int(found[1]["concepts"])
            logger.info("%s: %d concepts were read before", name, self.done)

    def advance(self, done: int, *, last: bool) -> None:
        """Notes that so many concepts are in the sums; writes them now and then, and at the end."""
        self.done = done
        if self._place is None or not (last or time.monotonic() - self._last > SECONDS):
            return
        folder, name, run, _ = self._place
        state = {"concepts": done, "rows": self._equations.rows}
        checkpoint.save(folder, self._equations.tensors(), state, run, name)
        self._last = time.monotonic()


def gather(
    sections: Sequence[Text],
    concepts: Sequence[Concept],
    mined: Mapping[str, Sequence[str]],
    kept: Mapping[str, str],
    gone: Sequence[str],
    vocabulary: Vocabulary,
    config: EraseConfig,
    *,
    place: tuple[Path, str, str, bool] | None = None,
    progress: bool | None = None,
) -> tuple[NormalEquations, dict[str, NormalEquations], Tensor]:
    """All rows of one stream, concept by concept; memory does not grow with their number.

    Args:
        sections: what stands one after the other in the stream.
        mined: neighbor words by target.
        kept: words that keep their place, and the kind of each.
        gone: words that are not preserved: named ones and their neighbors.
        vocabulary: of the first section of the token sequence; its words serve every section.
        place: of a checkpoint: folder, name, run, and whether to go on from what is there.

    Returns:
        What keeps its place with all rows, or without them and the rows of each concept where the
        system is kept; and the `[d, d]` mean second moments of the preserve prior.
    """
    width, device = sections[0].width, sections[0].device
    words = vocabulary.words or None
    prior = torch.zeros(width, width, dtype=torch.float64, device=device)
    equations = NormalEquations(width, device=device)
    prompts = []
    for section in sections:
        own = vocabulary
        if section.fingerprint() != vocabulary.fingerprint:
            own = encode_vocabulary(section, config.vocabulary, words=words, progress=progress)
        prior += preserve_gram(section, own, gone)[0].to(device)
        for word, kind in kept.items():
            _keep(equations, section, word, kind, config)
        prompts.append(
            ConceptPrompts(section, concepts, mined, config.pairs, avoid=gone, words=words)
        )
    equations.update_moments(config.vocabulary.preserve_scale * prior)
    parts: dict[str, NormalEquations] = {}
    if config.closed_form.keep_system:
        parts = {c.target: NormalEquations(width, device=device) for c in concepts}
    # Systems that are kept take d^2 numbers a concept: not what a checkpoint is for.
    saved = _Saved(equations, None if parts else place)
    first = saved.done
    with progress_bars.bar(
        total=len(concepts), desc="concepts", progress=progress, initial=first
    ) as bar:
        for index in range(first, len(concepts)):
            into = parts.get(concepts[index].target, equations)
            for number in prompts[0].numbers(index):
                named = number if number < prompts[0].named else None
                for offset, words_of in enumerate(prompts):
                    add_word(into, words_of[number], config, number=named, section=offset)
            saved.advance(index + 1, last=index + 1 == len(concepts))
            bar.update(1)
    return equations, parts, prior


def add_word(
    equations: NormalEquations,
    prompts: AlignedPrompts,
    config: EraseConfig,
    *,
    number: int | None,
    section: int = 0,
) -> NormalEquations:
    """Adds a word's rows, and if it was named its neighbor and beyond rows. Returns the equations.

    Args:
        number: of the named word's noise; None for a mined word.
        section: which part of the token sequence the prompts are; each draws its own noise.
    """
    rows = prompts.weight > 0
    scale = config.mining.neighbor_scale if number is None else config.erase_scale
    equations.update(
        Pairs(prompts.source[rows], prompts.destination[rows], scale * prompts.weight[rows])
    )
    if number is not None and config.mining.mode in ("gaussian", "offset"):
        seed = philox.fold_seed(config.seed, number)
        source, destination, weight = _moving(prompts)
        mining.add_neighbors(
            equations,
            source,
            destination,
            config.erase_scale * weight,
            config.mining,
            seed=philox.fold_seed(seed, section) if section else seed,
        )
    return equations


def _moving(prompts: AlignedPrompts) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, destinations and weights as the mining takes them: the first row never moves."""
    source, destination, weight = prompts.source, prompts.destination, prompts.weight
    used = (weight > 0).any(dim=0).nonzero()
    stop = int(used[-1]) + 1 if len(used) else weight.shape[1]
    source, destination, weight = (x[:, :stop] for x in (source, destination, weight))
    carries = (weight > 0)[..., None]
    if not bool(carries[:, 1:].all()):
        # Hidden padding has no share in the length of a prompt.
        source, destination = source * carries, destination * carries
    if len(used) and int(used[0]) == 0:
        pad = (0, 0, 1, 0)
        source, destination = (functional.pad(x, pad) for x in (source, destination))
        weight = functional.pad(weight, (1, 0))
    return source, destination, weight


def _keep(
    equations: NormalEquations, text: Text, word: str, kind: str, config: EraseConfig
) -> None:
    """Adds the rows of a word that keeps its place."""
    templates = [t for t in config.pairs.of(kind) if "{word}" not in t] or ["{}"]
    prompts = [prompt for t in templates if not text.overflow(prompt := fill(t, word))]
    if not prompts:
        raise ValueError(
            f"preserve: {word!r} needs more tokens than the text encoder holds "
            f"({text.max_tokens} with begin- and end-of-text); {text.overflow(word)!r} would be cut"
        )
    pairs = mean_rows(text, prompts, text.encode(prompts))
    scale = config.vocabulary.preserve_scale / len(prompts)
    equations.update(Pairs(pairs.source, pairs.source, scale * pairs.weight))
