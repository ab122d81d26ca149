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

from realera_fast.alignment import ClosedForm, prepared, sampler_of, shared_denoiser
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
from realera_fast.models import Stream, is_joint
from realera_fast.ops import philox
from realera_fast.runtime import Execution, checkpoint, progress_bar
from realera_fast.scales import Scales
from realera_fast.selection import Selection
from realera_fast.solver import ConceptMap
from realera_fast.text import AlignedPrompts, ConceptPrompts, FreePrompts
from realera_fast.unet import LoraParameters, Sampler, SharedDenoiser, Variant
from realera_fast.values import MovedValues

logger = logging.getLogger(__name__)

_ATTACK_STREAM = 5
"""Number of the random numbers of attacks."""


@dataclass(frozen=True)
class Hardened:
    """The closed form after all rounds."""

    solved: Mapping[Stream, Solved]
    moved: MovedValues | None = None
    """What moves in place of the token sequence."""
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
    # In the tiny Stable Diffusion 3 no gradient reached the token vectors of one encoder.
    if not (rounds and job.denoising.alignable) or is_joint(job.model):
        return Hardened(solved)
    shown = job.denoiser_text()
    _check_encoders(shown)
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
            solved = {s: solve(each, config, scales) for s, each in equations.items()}
    return Hardened(solved, None, found, errors, attacker)


def _check_encoders(shown: DenoiserText) -> None:
    """Raises ValueError where a gradient can't reach the token vectors of an encoder."""
    for model in shown.text.models:
        if any(tensor.is_inference() for tensor in model.encoder.parameters()):
            raise ValueError(
                "text_encoders: one was made under torch.inference_mode(), so that an attack has "
                "no gradient; load it outside of that, or set mining.attack_rounds=0"
            )


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
            leaving = equations[stream].of(words.concepts[index].target)
            add_mined_word(leaving.attacks, rows, job.config.mining.attack_scale)


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
        options, parts = self.job.config, self._parts()
        if not parts:
            return 0
        batches = -(-ATTACK_TRAJECTORIES // max(1, options.alignment.sampling_batch_size // 2))
        steps = rounds * options.mining.attack_steps * parts
        return len(self.named.concepts) * (steps + batches * options.alignment.sampling_steps)

    def probe(self, shared: SharedDenoiser, variant: Variant) -> float:
        """How near to the concept an attack on a variant comes, of the one it comes nearest to: 0
        where its predictions are as far from the concept's as the anchor's are, 1 where they are
        the same. Of many concepts an even sample.

        Args:
            shared: installed.
            variant: what is attacked, with random numbers of no round.
        """
        options, count = self.job.config, len(self.named.concepts)
        sampled = range(0, count, -(-count // options.alignment.check_words))
        parts = self._parts_of(range(options.mining.attack_prompts))
        number, near = options.mining.attack_rounds, [0.0]
        with progress_bar(
            total=len(sampled) * len(parts) * options.mining.attack_steps,
            desc=f"attack, {variant}",
            progress=self.execution.main_progress,
        ) as bar:
            for index in sampled:
                start = self._start(index)
                try:
                    errors = torch.cat(
                        [
                            self._part(shared, start, index, number, part, bar, variant).errors[1]
                            for part in parts
                        ]
                    )
                except FloatingPointError as error:
                    logger.warning("%s: %s; nothing is known to hold", self._target(index), error)
                    near.append(1.0)
                    continue
                # Where word and anchor are one to the model, there is nothing to tell apart.
                if distance := self._distance(shared, index):
                    near.append(1.0 - float(errors.mean()) / distance)
        return max(near)

    def _distance(self, shared: SharedDenoiser, index: int) -> float:
        """Mean squared error between what the original predicts for a concept and its anchor."""
        points, word = self.points[index], self.named[self.named.numbers(index)[0]]
        latents, timesteps = (x.to(shared.device) for x in (points.latents, points.timesteps))
        states = word.anchor[word.plain].expand(len(latents), -1, -1)
        found = self._sampler(shared).teacher(latents, timesteps, states)
        return float((found.cpu() - points.shown).square().mean())

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
        # Gradients take the memory of a part of a training step, and no more.
        options = self.job.config.alignment
        return max(1, options.batch_size // options.gradient_accumulation_steps // ATTACK_POINTS)

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
        shared = shared_denoiser(
            job.model,
            ClosedForm(maps),
            LoraParameters({}, {}, r=1, lora_alpha=1.0, seed=0),
            replace(job.config.alignment, compile=False),
            zero_rows=job.denoising.zero_rows,
        )
        with prepared(job.model, job.config.alignment), shared.installed():
            for index in range(len(self.named.concepts)):
                outcome = self._attacked(shared, index, number, bar)
                if outcome is not None:
                    found[index] = outcome
        return found

    def _attacked(
        self, shared: SharedDenoiser, index: int, number: int, bar: Any
    ) -> Attacked | None:
        processes, start = self.execution.processes, self._start(index)
        name = f"{number}.{index}"
        if f"{name}.errors" not in self.tensors:
            share = range(len(start))[processes.share(len(start))]
            whole = [torch.zeros_like(v, device=shared.device) for v in start.vectors.values()]
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
        else:
            bar.update(self._parts() * self.job.config.mining.attack_steps)
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
        shared: SharedDenoiser,
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

    def _sampler(self, shared: SharedDenoiser) -> Sampler:
        options, scheduler = self.job.config.alignment, self.job.denoising.scheduler
        return sampler_of(shared, scheduler, self.shown.empty, options, options.sampling_steps)

    def _points(self, shared: SharedDenoiser, index: int, seed: int, bar: Any) -> AttackPoints:
        word = self.named[self.named.numbers(index)[0]]
        seeds = [philox.fold_seed(seed, i) for i in range(ATTACK_TRAJECTORIES)]
        return points_of(self._sampler(shared), word.source[word.plain], seeds, bar)

    def _target(self, index: int) -> str:
        return self.named.concepts[index].target
