"""Rows of all concepts, gathered into the sums that the closed form solves.

Concept by concept, so that memory does not grow with their number; a run that was cut off goes on
where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from realera_fast import mining
from realera_fast.config import EraseConfig
from realera_fast.inputs import Job
from realera_fast.models import Stream
from realera_fast.ops import philox
from realera_fast.runtime import Checkpoint, Processes, progress_bar
from realera_fast.scales import Scales
from realera_fast.selection import Selection
from realera_fast.solver import (
    ClosedFormConfig,
    IncrementalSystem,
    NormalEquations,
    Pairs,
    Solution,
)
from realera_fast.text import (
    AlignedPrompts,
    Text,
    encode_vocabulary,
    fill,
    mean_rows,
    preserve_gram,
    prompts_at_a_time,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leaving:
    """Rows that move."""

    named: NormalEquations
    """Of named words and of the noise around them, which go to the anchor, or past it."""
    mined: NormalEquations
    """Of words that follow them to the anchor, of weight 1 each."""
    attacks: NormalEquations
    """Of prompts that attacks found, which go there as well."""

    def total(self, guidance: float, neighbors: float) -> NormalEquations:
        """All of them, where named words go `guidance` of their way past the anchor and mined ones
        weigh `neighbors`."""
        return self.named.scaled(1.0, 1.0 + guidance) + self.mined.scaled(neighbors) + self.attacks


@dataclass(frozen=True)
class Equations:
    """All rows of one stream, summed."""

    staying: NormalEquations
    """The prior and words that were named to stay, of weight 1 each; words at risk, of less."""
    leaving: Mapping[str, Leaving]
    """By target where the system is kept; else all under one name."""
    halves: tuple[NormalEquations, NormalEquations]
    """Of all mined words those of even and of odd number, so that each can do without the other."""
    prior: Tensor
    """`[d, d]` float64 mean second moments of the preserve prior."""

    @property
    def named(self) -> NormalEquations:
        """Rows of all named words."""
        return sum_of([leaving.named for leaving in self.leaving.values()])

    def of(self, target: str) -> Leaving:
        """Rows of a concept, or of all where they are summed together."""
        return self.leaving.get(target) or self.leaving[_EVERY]

    def ridge(self, options: ClosedFormConfig, preserve_scale: float) -> float:
        """Relative to the mean diagonal of the preserve prior, or of all rows where it is none."""
        scale = float(self.prior.diagonal().mean())
        if not scale:
            every = [self.staying.scaled(preserve_scale)]
            every += [leaving.total(0.0, 1.0) for leaving in self.leaving.values()]
            scale = sum(float(sums.gram.diagonal().mean()) for sums in every) or 1.0
        return options.ridge * scale


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
    staying = NormalEquations(width, device=device)
    prompts = []
    for section in sections:
        vocabulary = selection.vocabulary
        if section.fingerprint() != vocabulary.fingerprint:
            vocabulary = encode_vocabulary(
                section,
                config.vocabulary,
                words=selection.vocabulary.words,
                progress=job.progress,
                processes=job.processes,
            )
        prior += preserve_gram(section, vocabulary, selection.leaving)[0].to(device)
        for word, kind in selection.retained.items():
            _retain(staying, section, word, kind, config)
        _hold(staying, section, selection.held, config)
        # Noise is mined around every row, and of every prompt, as the paper has it.
        prompts.append(selection.prompts(section, whole=config.mining.mode in mining.NOISE))
    staying.update_moments(prior)
    targets = [c.target for c in job.concepts] if config.closed_form.keep_system else [_EVERY]
    leaving = {
        target: Leaving(*(NormalEquations(width, device=device) for _ in range(3)))
        for target in targets
    }
    if config.closed_form.keep_system:
        # Systems that are kept take d^2 numbers a concept: not what a checkpoint is for.
        checkpoint = Checkpoint()
    halves = (NormalEquations(width, device=device), NormalEquations(width, device=device))
    sums = {"named": leaving[targets[0]].named, "even": halves[0], "odd": halves[1]}
    first = _resumed(sums, checkpoint, stream)
    count = len(job.concepts)
    # Few rows are kept as rows, and a checkpoint is that of one process: neither is shared.
    shared = count >= width and job.folder is None and not config.closed_form.keep_system
    processes = job.processes if shared else Processes()
    numbers = range(first, count)[processes.share(count - first)]
    with progress_bar(
        total=first + len(numbers),
        desc="concepts",
        progress=job.progress if processes.is_main else False,
        initial=first,
    ) as bar:
        for index in numbers:
            into = leaving.get(job.concepts[index].target) or leaving[_EVERY]
            for number in prompts[0].numbers(index):
                for offset, words in enumerate(prompts):
                    if number < words.named:
                        add_named_word(
                            into.named, words[number], config, number=number, section=offset
                        )
                    else:
                        add_mined_word(halves[(number - words.named) % 2], words[number])
                        if config.closed_form.keep_system:
                            add_mined_word(into.mined, words[number])
            if checkpoint.is_due(stream, always=index + 1 == count):
                checkpoint.save(stream, *_kept(sums, index + 1))
            bar.update(1)
    _add_up(sums.values(), processes)
    if not config.closed_form.keep_system:
        every = leaving[_EVERY]
        leaving = {_EVERY: Leaving(every.named, sum_of(halves), every.attacks)}
    return Equations(staying, leaving, halves, prior)


def _add_up(parts: Iterable[NormalEquations], processes: Processes) -> None:
    """Sums of what the processes read, in place of what this one read."""
    if processes.count == 1:
        return
    for part in parts:
        rows = torch.tensor([part.rows], dtype=torch.float64, device=part.device)
        gram, cross = part.gram.clone(), part.cross.clone()
        processes.sum_([gram, cross, rows])
        part.load_tensors({"gram": gram, "cross": cross}, int(rows))


def sum_of(parts: Sequence[NormalEquations]) -> NormalEquations:
    """All rows of several sums, of which there is one at least."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


_EVERY = ""
"""Name of the sums of all concepts."""


def _kept(
    parts: Mapping[str, NormalEquations], concepts: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What a checkpoint holds."""
    tensors = {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.tensors().items()
    }
    return tensors, {"concepts": concepts, **{name: part.rows for name, part in parts.items()}}


def _resumed(parts: Mapping[str, NormalEquations], checkpoint: Checkpoint, stream: Stream) -> int:
    """How many concepts are in the sums, after those of the checkpoint took their place."""
    saved = checkpoint.load(stream)
    if saved is None:
        return 0
    for name, part in parts.items():
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in saved.tensors.items()
            if key.startswith(f"{name}.")
        }
        part.load_tensors(own, int(saved.values[name]))
    done = int(saved.values["concepts"])
    logger.info("%s: %d concepts were read before", stream, done)
    return done


def solve(equations: Equations, config: EraseConfig, scales: Scales) -> Solved:
    """The concept map T, and the system that it is from if that is kept."""
    options, prior = config.closed_form, equations.prior
    if not options.enabled:
        return unsolved(equations)
    preserve = scales.preserve_of(prior.shape[0])
    ridge = equations.ridge(options, preserve)
    staying = equations.staying.scaled(preserve)
    # Noise went past the anchor when it was gathered.
    guidance = 0.0 if config.mining.mode in mining.NOISE else scales.guidance
    totals = {
        name: part.total(guidance, scales.neighbors) for name, part in equations.leaving.items()
    }
    if not options.keep_system:
        total = staying + totals[_EVERY]
        solution = total.solve(ridge=ridge, rank_tolerance=options.rank_tolerance)
        return Solved(solution, None)
    system = IncrementalSystem(staying, ridge=ridge)
    for name, sums in totals.items():
        system.add(name, sums)
    return Solved(system.solve(rank_tolerance=options.rank_tolerance), system)


def unsolved(equations: Equations) -> Solved:
    """The map that changes nothing, for a stream that is edited in another way or not at all."""
    prior = equations.prior
    identity = NormalEquations(prior.shape[0], device=prior.device).solve(ridge=1.0)
    return Solved(identity, None)


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
    noisy = config.mining.mode in mining.NOISE
    if noisy:
        # Noise goes where its word goes: past the anchor, which no factor of the sums can say.
        guidance = config.pairs.negative_guidance
        step = 1.0 + (0.0 if isinstance(guidance, str) else guidance)
        past = torch.lerp(prompts.source, prompts.destination, step)
        prompts = replace(prompts, destination=past)
    _add_rows(equations, prompts, config.erase_scale)
    if noisy:
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
    equations: NormalEquations, prompts: AlignedPrompts, scale: float = 1.0
) -> NormalEquations:
    """Adds the rows of a word that was mined, which has no neighbors. Returns the equations."""
    return _add_rows(equations, prompts, scale)


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


_HELD = ("{}", "a photo of a {}")
"""Templates of words that are held; each has one."""


def _hold(
    equations: NormalEquations, text: Text, words: Sequence[str], config: EraseConfig
) -> None:
    """Adds rows of words at risk, each in one template, as those of the prior are."""
    together = prompts_at_a_time(text)
    for start in range(0, len(words), together):
        numbered = enumerate(words[start : start + together], start)
        prompts = [fill(_HELD[n % len(_HELD)], word) for n, word in numbered]
        pairs = mean_rows(text, [prompt for prompt in prompts if not text.overflow(prompt)])
        scale = config.mining.relative_scale
        equations.update(Pairs(pairs.source, pairs.source, scale * pairs.weight))


def _retain(
    equations: NormalEquations,
    text: Text,
    word: str,
    kind: str,
    config: EraseConfig,
) -> None:
    """Adds the rows of a word that keeps its place."""
    templates = [t for t in config.pairs.of(kind) if "{word}" not in t] or ["{}"]
    prompts = [prompt for t in templates if not text.overflow(prompt := fill(t, word))]
    if not prompts:
        raise ValueError(
            f"preserve: {word!r} needs more tokens than the text encoder holds "
            f"({text.max_tokens} with begin- and end-of-text); {text.overflow(word)!r} would be cut"
        )
    pairs = mean_rows(text, prompts)
    equations.update(Pairs(pairs.source, pairs.source, pairs.weight / len(prompts)))
