"""Rounds of attack and answer: what brings a concept back becomes rows of the closed form.

Each round attacks the model as the closed form of the last one leaves it (`mining.attack`), sends
the prompts that were found to the concept's anchor, and solves again. The noise alignment then
trains on the same prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from realera_fast.equations import Equations, Solved, add_mined_word, solve
from realera_fast.inputs import DenoiserText, Job
from realera_fast.mining import (
    ATTACK_POINTS,
    ATTACK_TRAJECTORIES,
    NOISE,
    Attacked,
    AttackPoints,
    attack,
    points_of,
)
from realera_fast.models import Stream, Structure
from realera_fast.ops import philox
from realera_fast.runtime import Execution, checkpoint, progress_bar, unwrapped
from realera_fast.scales import Scales
from realera_fast.selection import Selection
from realera_fast.solver import ConceptMap
from realera_fast.text import AlignedPrompts, ConceptPrompts, FreePrompts
from realera_fast.unet import DDIMSampler, LoraParameters, SharedUNet, Variant

logger = logging.getLogger(__name__)

_ATTACK_STREAM = 5
"""Number of the random numbers of attacks."""


@dataclass(frozen=True)
class Hardened:
    """The closed form after all rounds."""

    solved: Mapping[Stream, Solved]
    found: Mapping[int, AlignedPrompts] = field(default_factory=dict)
    """Prompts that were found, by number of the named word that they bring back."""
    attacks: Mapping[str, Any] = field(default_factory=dict)
    """For the report: by target how near to the concept the prompts of each round came."""
    attacker: Attacker | None = None


def hardened(
    job: Job,
    selection: Selection,
    equations: Mapping[Stream, Equations],
    scales: Scales,
    solved: Mapping[Stream, Solved],
    run: str,
) -> Hardened:
    """The closed form, with what attacks on it found; the equations take their rows.

    Args:
        solved: the closed form before any attack.
        run: identifies the run to its checkpoint.
    """
    config = job.config
    rounds = config.mining.attack_rounds if config.closed_form.enabled else 0
    if not (rounds and job.denoising.alignable):
        return Hardened(solved)
    shown = job.denoiser_text()
    named = selection.named_prompts(shown.text)
    attacker = Attacker(job, shown, named, job.execution(run))
    found: dict[int, AlignedPrompts] = {}
    errors: dict[str, list[dict[str, float]]] = {}
    with progress_bar(
        total=attacker.passes(rounds), desc="attack", progress=attacker.execution.main_progress
    ) as bar:
        for number in range(rounds):
            maps = {stream: each.solution.map for stream, each in solved.items()}
            for index, outcome in attacker.attacked(maps, number, bar).items():
                word = named.numbers(index)[0]
                target = named.concepts[index].target
                first, last = outcome.errors.mean(1).tolist()
                errors.setdefault(target, []).append({"first": first, "last": last})
                rows = named.found(word, outcome.prompts)
                found[word] = found[word].with_found(rows) if word in found else rows
                _add(job, selection, equations, index, outcome.prompts)
            solved = {stream: solve(each, config, scales) for stream, each in equations.items()}
    return Hardened(solved, found, errors, attacker)


def _add(
    job: Job,
    selection: Selection,
    equations: Mapping[Stream, Equations],
    index: int,
    prompts: FreePrompts,
) -> None:
    """Adds prompts that bring a concept back to the rows that go to its anchor."""
    for stream, sections in job.texts.items():
        for section in sections:
            words = selection.prompts(section, whole=job.config.mining.mode in NOISE)
            rows = words.found(words.numbers(index)[0], prompts)
            rows = replace(rows, weight=job.config.mining.attack_scale * rows.weight)
            leaving = equations[stream].of(words.concepts[index].target)
            add_mined_word(leaving.mined, rows, job.config)


class Attacker:
    """Attacks all concepts, shared by the processes; what was found before is not looked for."""

    def __init__(
        self, job: Job, shown: DenoiserText, named: ConceptPrompts, execution: Execution
    ) -> None:
        self.job, self.shown, self.named, self.execution = job, shown, named, execution
        self.points: dict[int, AttackPoints] = {}
        saved = execution.checkpoint.load_together(
            checkpoint.ATTACK, execution.processes, job.device
        )
        self.tensors: dict[str, Tensor] = {} if saved is None else dict(saved.tensors)

    def passes(self, rounds: int) -> int:
        """Steps of all attacks and of the trajectories that they need."""
        options = self.job.config
        steps = rounds * options.mining.attack_steps * self._parts()
        return len(self.named.concepts) * (steps + options.alignment.sampling_steps)

    @torch.no_grad()
    def probe(self, shared: SharedUNet, variant: Variant) -> dict[int, Tensor]:
        """`[j, t, d]` prompts that bring a concept back, by number of its name; of many concepts
        an even sample.

        Args:
            shared: installed.
            variant: what is attacked, with random numbers of no round.
        """
        options, count = self.job.config, len(self.named.concepts)
        sampled = range(0, count, -(-count // options.alignment.check_words))
        parts = self._parts_of(range(options.mining.attack_prompts))
        number, found = options.mining.attack_rounds, {}
        with progress_bar(
            total=len(sampled) * len(parts) * options.mining.attack_steps,
            desc=f"attack, {variant}",
            progress=self.execution.main_progress,
        ) as bar:
            for index in sampled:
                start = self._start(index)
                try:
                    each = [
                        self._part(shared, start, index, number, part, bar, variant).prompts
                        for part in parts
                    ]
                except FloatingPointError as error:
                    logger.warning("%s: %s; its attack does not count", self._target(index), error)
                    continue
                states = [self.shown.text.encode_free(prompts) for prompts in each]
                found[self.named.numbers(index)[0]] = torch.cat(states)
        return found

    def _start(self, index: int) -> FreePrompts:
        count = self.job.config.mining.attack_prompts
        return self.named.free(self.named.numbers(index)[0], count)

    def _parts_of(self, share: range) -> list[slice]:
        """Prompts that are attacked with together."""
        return [
            slice(first, min(first + self._together(), share.stop))
            for first in range(share.start, share.stop, self._together())
        ]

    def _together(self) -> int:
        return max(1, self.job.config.alignment.sampling_batch_size // ATTACK_POINTS)

    def _parts(self) -> int:
        count = self.job.config.mining.attack_prompts
        return len(self._parts_of(range(count)[self.execution.processes.share(count)]))

    def attacked(
        self, maps: Mapping[Stream, ConceptMap], number: int, bar: Any
    ) -> dict[int, Attacked]:
        """What is found of each concept, by its place.

        Args:
            maps: the closed form that is attacked.
            number: of the round.
        """
        job, found = self.job, {}
        model: Any = unwrapped(job.model)
        structure = Structure(model)
        shared = SharedUNet(
            job.model,
            maps["sequence"],
            LoraParameters({}, {}, r=1, lora_alpha=1.0, seed=0),
            pooled_map=maps.get("pooled"),
            mixed_precision=job.config.alignment.mixed_precision,
        )
        try:
            model.eval().requires_grad_(False)
            with shared.installed():
                for index in range(len(self.named.concepts)):
                    outcome = self._attacked(shared, index, number, bar)
                    if outcome is not None:
                        found[index] = outcome
        finally:
            structure.restore()
        return found

    def _attacked(self, shared: SharedUNet, index: int, number: int, bar: Any) -> Attacked | None:
        processes, start = self.execution.processes, self._start(index)
        name = f"{number}.{index}"
        if f"{name}.errors" not in self.tensors:
            share = range(len(start))[processes.share(len(start))]
            whole = [torch.zeros_like(v) for v in start.vectors.values()]
            errors = torch.zeros(2, len(start), dtype=torch.float32, device=shared.device)
            failed = torch.zeros(1, dtype=torch.float32, device=shared.device)
            try:
                for part in self._parts_of(share):
                    outcome = self._part(shared, start, index, number, part, bar, "edited")
                    errors[:, part] = outcome.errors
                    for vectors, own in zip(whole, outcome.prompts.vectors.values(), strict=True):
                        vectors[part] = own
            except FloatingPointError as error:
                logger.warning("%s: %s; nothing is added", self._target(index), error)
                failed += 1
            processes.sum_([errors, failed, *whole])
            if bool(failed):
                errors.fill_(torch.nan)
            self.tensors |= {f"{name}.{i}": vectors for i, vectors in enumerate(whole)}
            self.tensors[f"{name}.errors"] = errors
            if processes.is_main:
                self.execution.checkpoint.save(checkpoint.ATTACK, self.tensors, {})
        errors = self.tensors[f"{name}.errors"].to(shared.device)
        if not bool(torch.isfinite(errors).all()):
            return None
        kept = [self.tensors[f"{name}.{i}"].to(own) for i, own in enumerate(start.vectors.values())]
        logger.info(
            "%s: attack %d came from %.3g to %.3g of what the original predicts",
            *(self._target(index), number + 1, *errors.mean(1).tolist()),
        )
        return Attacked(start.with_vectors(kept), errors)

    def _part(
        self,
        shared: SharedUNet,
        start: FreePrompts,
        index: int,
        number: int,
        part: slice,
        bar: Any,
        variant: Variant,
    ) -> Attacked:
        config = self.job.config
        seed = philox.fold_seed(philox.fold_seed(config.seed, _ATTACK_STREAM), index)
        if index not in self.points:
            self.points[index] = self._points(shared, index, seed, bar)
        place = number * len(start)
        return attack(
            shared,
            self.shown.text,
            start.with_vectors(vectors[part] for vectors in start.vectors.values()),
            self.points[index],
            variant=variant,
            steps=config.mining.attack_steps,
            seeds=[
                philox.fold_seed(seed, ATTACK_TRAJECTORIES + place + i)
                for i in range(part.start, part.stop)
            ],
            bar=bar,
        )

    def _points(self, shared: SharedUNet, index: int, seed: int, bar: Any) -> AttackPoints:
        options = self.job.config.alignment
        sampler = DDIMSampler(
            shared,
            self.job.denoising.scheduler,
            self.shown.empty,
            steps=options.sampling_steps,
            guidance_scale=options.guidance_scale,
            latent_size=options.latent_size,
            batch_size=options.sampling_batch_size,
        )
        word = self.named[self.named.numbers(index)[0]]
        seeds = [philox.fold_seed(seed, i) for i in range(ATTACK_TRAJECTORIES)]
        return points_of(sampler, word.source[word.plain], seeds, bar)

    def _target(self, index: int) -> str:
        return self.named.concepts[index].target
