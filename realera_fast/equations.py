"""Rows of all concepts, gathered into the sums that the closed form solves.

Concept by concept, so that memory does not grow with their number; a run that was cut off goes on
where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from realera_fast import mining
from realera_fast.config import EraseConfig
from realera_fast.inputs import Job
from realera_fast.models import Stream
from realera_fast.ops import philox
from realera_fast.runtime import Checkpoint, progress_bar
from realera_fast.selection import Selection
from realera_fast.solver import IncrementalSystem, NormalEquations, Pairs, Solution
from realera_fast.text import (
    AlignedPrompts,
    Text,
    encode_vocabulary,
    fill,
    mean_rows,
    preserve_gram,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Equations:
    """All rows of one stream, summed."""

    sums: NormalEquations
    """What keeps its place and all rows, or without the rows where `of_concepts` has them."""
    of_concepts: Mapping[str, NormalEquations]
    """Rows of each concept by target, where the system is kept; else none."""
    prior: Tensor
    """`[d, d]` float64 mean second moments of the preserve prior."""


@dataclass(frozen=True)
class Solved:
    """The closed form of one stream."""

    solution: Solution
    system: IncrementalSystem | None
    """What the solution is from, if that is kept."""


def gather(job: Job, selection: Selection, stream: Stream, checkpoint: Checkpoint) -> Equations:
    """All rows of one stream, concept by concept; memory does not grow with their number.

    Args:
        selection: its vocabulary is of the first section of the token sequence; its words serve
            every section.
        checkpoint: keeps the sums as they grow, under the name of the stream.
    """
    sections, config = job.texts[stream], job.config
    width, device = sections[0].width, sections[0].device
    prior = torch.zeros(width, width, dtype=torch.float64, device=device)
    sums = NormalEquations(width, device=device)
    prompts = []
    for section in sections:
        vocabulary = selection.vocabulary
        if section.fingerprint() != vocabulary.fingerprint:
            vocabulary = encode_vocabulary(
                section,
                config.vocabulary,
                words=selection.vocabulary.words or None,
                progress=job.progress,
            )
        prior += preserve_gram(section, vocabulary, selection.leaving)[0].to(device)
        for word, kind in selection.retained.items():
            _retain(sums, section, word, kind, config)
        prompts.append(selection.prompts(section))
    sums.update_moments(config.vocabulary.preserve_scale * prior)
    of_concepts: dict[str, NormalEquations] = {}
    if config.closed_form.keep_system:
        of_concepts = {c.target: NormalEquations(width, device=device) for c in job.concepts}
        # Systems that are kept take d^2 numbers a concept: not what a checkpoint is for.
        checkpoint = Checkpoint()
    first = _resumed(sums, checkpoint, stream)
    count = len(job.concepts)
    with progress_bar(total=count, desc="concepts", progress=job.progress, initial=first) as bar:
        for index in range(first, count):
            into = of_concepts.get(job.concepts[index].target, sums)
            for number in prompts[0].numbers(index):
                for offset, words in enumerate(prompts):
                    if number < words.named:
                        add_named_word(into, words[number], config, number=number, section=offset)
                    else:
                        add_mined_word(into, words[number], config)
            if checkpoint.is_due(stream, always=index + 1 == count):
                checkpoint.save(stream, sums.tensors(), {"concepts": index + 1, "rows": sums.rows})
            bar.update(1)
    return Equations(sums, of_concepts, prior)


def _resumed(sums: NormalEquations, checkpoint: Checkpoint, stream: Stream) -> int:
    """How many concepts are in the sums, after those of the checkpoint took their place."""
    saved = checkpoint.load(stream)
    if saved is None:
        return 0
    sums.load_tensors(saved.tensors, int(saved.values["rows"]))
    done = int(saved.values["concepts"])
    logger.info("%s: %d concepts were read before", stream, done)
    return done


def solve(equations: Equations, config: EraseConfig) -> Solved:
    """The concept map T, and the system that it is from if that is kept.

    The ridge is relative to the mean diagonal of the preserve prior.
    """
    options, prior = config.closed_form, equations.prior
    if not options.enabled:
        identity = NormalEquations(prior.shape[0], device=prior.device).solve(ridge=1.0)
        return Solved(identity, None)
    scale = float(prior.diagonal().mean())
    if not scale:
        every = (equations.sums, *equations.of_concepts.values())
        scale = sum(float(sums.gram.diagonal().mean()) for sums in every) or 1.0
    ridge = options.ridge * scale
    if not options.keep_system:
        solution = equations.sums.solve(ridge=ridge, rank_tolerance=options.rank_tolerance)
        return Solved(solution, None)
    system = IncrementalSystem(equations.sums, ridge=ridge)
    for name, sums in equations.of_concepts.items():
        system.add(name, sums)
    return Solved(system.solve(rank_tolerance=options.rank_tolerance), system)


def add_named_word(
    equations: NormalEquations,
    prompts: AlignedPrompts,
    config: EraseConfig,
    *,
    number: int,
    section: int = 0,
) -> NormalEquations:
    """Adds a named word's rows with its neighbor and beyond rows. Returns the equations.

    Args:
        number: of the word's noise.
        section: which part of the token sequence the prompts are; each has noise of its own.
    """
    _add_rows(equations, prompts, config.erase_scale)
    if config.mining.mode in ("gaussian", "offset"):
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


def add_mined_word(
    equations: NormalEquations, prompts: AlignedPrompts, config: EraseConfig
) -> NormalEquations:
    """Adds the rows of a word that was mined, which has no neighbors. Returns the equations."""
    return _add_rows(equations, prompts, config.mining.neighbor_scale)


def _add_rows(equations: NormalEquations, prompts: AlignedPrompts, scale: float) -> NormalEquations:
    rows = prompts.weight > 0
    weight = scale * prompts.weight[rows]
    return equations.update(Pairs(prompts.source[rows], prompts.destination[rows], weight))


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


def _retain(
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
