"""Where z_t comes from: denoising trajectories, kept and drawn from again.

The mathematics: docs/method.md, section 6.2.

Drawing z_t anew for every step would cost as many passes as an image. So a window of trajectories
is denoised in batches, every point of them is kept with what the original model predicts there, and
training draws from these until the next window. A point is at most `refresh_steps` optimizer steps
old, and a step has no teacher's pass of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from realera_fast import mining
from realera_fast.alignment.config import AlignmentConfig
from realera_fast.alignment.timesteps import discriminative_steps
from realera_fast.ops import philox
from realera_fast.runtime import Processes
from realera_fast.text import AlignedPrompts
from realera_fast.unet import Sampler, Variant

logger = logging.getLogger(__name__)

_PROMPTS = 8
"""Prompts of a word that the points of one trajectory are shown with, at most."""
_HELD_BACK = 4
"""Every fourth prompt of a word is never trained on."""
_LOOKED_AT = 16
"""Trajectories of each kind that the held-back loss is of, at most (count; ours)."""
BEYOND_STREAM, PROMPT_STREAM, PRESERVE_STREAM = 1, 2, 3
_TARGET_PROMPTS, _TARGET_STARTS, _PRESERVE_STARTS = 1 << 20, 2 << 20, 3 << 20
"""Numbers of the random streams of a window; the last ones are of a first trajectory each."""


@dataclass(frozen=True)
class Points:
    """Points of trajectories, with the prompt that the student is shown and its goal."""

    latents: Tensor
    """`[e, c, h, w]` float32."""
    timesteps: Tensor
    """`[e]` integer, of a flow float32."""
    states: Tensor
    """`[q, t, d]` prompts."""
    prompt: Tensor
    """`[e]` number of each point's prompt."""
    teacher: Tensor
    """`[e, c, h, w]` float32 the prediction to agree with."""
    shown: Tensor | None = None
    """`[e, c, h, w]` float32 what the original predicts for the prompt, of targets; None where
    nobody asks."""

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, index: Tensor) -> Points:
        """Some of the points, each with a prompt of its own."""
        index = index.to(self.latents.device)
        chosen = self.prompt[index]
        return Points(
            self.latents[index],
            self.timesteps[index],
            self.states[chosen],
            torch.arange(len(index), device=index.device),
            self.teacher[index],
            None if self.shown is None else self.shown[index],
        )

    def tensors(self) -> dict[str, Tensor]:
        """By field name, for a checkpoint."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Window:
    """What training draws from until the next window."""

    target: Points
    """Named words and neighbors, whose goal is the anchor's prediction."""
    beyond: Points | None
    """The same places with prompts from beyond the neighborhood, which keep their prediction."""
    preserve: Points
    """Prompts that keep their prediction, where the original model goes with them."""

    def tensors(self) -> dict[str, Tensor]:
        """By name, each once, for a checkpoint."""
        groups = {"target": self.target, "beyond": self.beyond, "preserve": self.preserve}
        return {
            f"{group}.{name}": tensor
            for group, points in groups.items()
            if points is not None
            for name, tensor in points.tensors().items()
            if group != "beyond" or name not in _SHARED
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Window:
        """The inverse of `tensors`."""

        def points(group: str) -> Points:
            names = (f.name for f in fields(Points) if f"{group}.{f.name}" in found)
            return Points(**{name: found[f"{group}.{name}"] for name in names})

        found = {name: tensor.to(device) for name, tensor in tensors.items()}
        if not any(name.startswith("beyond.") for name in found):
            return cls(points("target"), None, points("preserve"))
        found |= {f"beyond.{name}": found[f"target.{name}"] for name in _SHARED}
        return cls(points("target"), points("beyond"), points("preserve"))


_SHARED = ("latents", "timesteps")
"""What beyond has in common with target."""


def word_numbers(window: int, count: int, named: int, words: int) -> list[int]:
    """Words of a window's trajectories: named ones and neighbors by turns, each in a circle."""
    if named in (0, words):
        return [(window * count + i) % words for i in range(count)]
    half = -(-count // 2)
    first = [(window * half + i) % named for i in range(half)]
    others = words - named
    second = [named + (window * (count - half) + i) % others for i in range(count - half)]
    # Interleaved, so that a process's share has both.
    return [
        number
        for pair in zip(first, [*second, None], strict=False)
        for number in pair
        if number is not None
    ]


def _prompts_of(numbers: range, held_back: bool) -> list[int]:
    """Those of a word's prompts for training, or those that training never sees."""
    if len(numbers) < _HELD_BACK:
        return list(numbers)
    return [n for i, n in enumerate(numbers) if (i % _HELD_BACK == _HELD_BACK - 1) == held_back]


def _chosen(word: AlignedPrompts, held_back: bool, generator: torch.Generator) -> Tensor:
    """`[8]` numbers of the prompts that a trajectory's points are shown with.

    Half of them are prompts that an attack found, where there are some.
    """
    known = len(word.prompts) - word.found
    groups = [range(known), range(known, len(word.prompts))] if word.found else [range(known)]
    count = _PROMPTS // len(groups)
    found = []
    for group in groups:
        usable = torch.tensor(_prompts_of(group, held_back), device="cpu")
        chosen = usable[torch.randperm(len(usable), device="cpu", generator=generator)]
        found.append(chosen.repeat(-(-count // len(chosen)))[:count])
    return torch.cat(found)


class WindowFiller:
    """Denoises the trajectories of one window after the other."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Any,
        preserve: Tensor,
        config: AlignmentConfig,
        *,
        beyond_region: mining.Region | None,
        latents: Mapping[str, Tensor],
        seed: int,
        processes: Processes,
    ) -> None:
        """
        Args:
            prompts: `AlignedPrompts` of all words, the first `prompts.named` are named ones.
            preserve: `[p, t, d]` prompts that keep their prediction.
            config: its numbers of trajectories are rounded up to multiples of the processes.
            latents: `[n, c, h, w]` encoded images of words, noised in place of trajectories.
        """
        self.sampler, self.prompts, self.named = sampler, prompts, prompts.named
        self.preserve, self.latents = preserve, latents
        self.trajectories = _divisible(config.trajectories, processes.count)
        self.preserve_trajectories = _divisible(config.preserve_trajectories, processes.count)
        self.negative_guidance = config.negative_guidance
        self.needs_shown = (
            config.negative_guidance > 0 or config.adversary == "worst" or config.loss != "guided"
        )
        self.by_turns = config.original_trajectories
        self.beyond_region, self.seed, self.processes = beyond_region, seed, processes
        self.used = sampler.timesteps >= sampler.train_timesteps * config.min_timestep
        if not bool(self.used.any()):
            first = int(sampler.timesteps[0])
            raise ValueError(
                f"AlignmentConfig.min_timestep: {config.min_timestep} leaves none of "
                f"{len(self.used)} denoising steps, of which the first is at time step {first}; "
                "lower it or raise sampling_steps"
            )
        self.trained = self.used
        """`[s]` the steps that targets are trained at, of those that are used."""
        self.min_timestep = config.min_timestep

    def choose(self, bar: Any) -> None:
        """Leaves targets the steps at which the original tells named words from their anchors.

        Those that stay are at all steps: the factors are there at all of them when it draws.

        Raises:
            ValueError: `AlignmentConfig.min_timestep` leaves out all of these.
        """
        places = range(self.trajectories)[self.processes.share(self.trajectories)]
        words = [self.prompts[place % (self.named or len(self.prompts))] for place in places]
        chosen = discriminative_steps(
            self.sampler, words, places, bar, seed=self.seed, processes=self.processes
        )
        self.trained = self.used & chosen
        if not bool(self.trained.any()):
            raise ValueError(
                f"AlignmentConfig.min_timestep: {self.min_timestep} leaves none of the time steps "
                f"{self.sampler.timesteps[chosen].tolist()}, at which the words are told from "
                'their anchors; lower it, or set timesteps="all"'
            )

    def _counts(self, held_back: bool) -> tuple[int, int]:
        """Trajectories of targets and of preserve prompts; of a look they need to be few."""
        own = (self.trajectories, self.preserve_trajectories)
        few = _divisible(_LOOKED_AT, self.processes.count)
        return (min(own[0], few), min(own[1], few)) if held_back else own

    def passes(self, *, held_back: bool) -> int:
        """Passes through the denoiser that a window's trajectories take in this process."""
        targets, kept = (
            range(count)[self.processes.share(count)] for count in self._counts(held_back)
        )
        by_original = sum(map(self._by_original, targets))
        parts = (len(targets) - by_original, by_original, len(kept))
        return self.sampler.passes * sum(map(self.sampler.batches, parts))

    def _by_original(self, place: int) -> bool:
        """Whether the original model denoises the trajectory of that place."""
        return self.by_turns and place % 3 > 0

    def windows(self, steps: int, refresh_steps: int) -> int:
        """Number of windows for so many steps: enough for every named word to be denoised."""
        turn = self.trajectories
        if self.named < len(self.prompts):
            turn = -(-turn // 2)
        needed = -(-self.named // turn)
        if needed > steps:
            logger.warning(
                "alignment: %d steps see %d of %d named words; raise AlignmentConfig.steps or "
                ".trajectories",
                steps,
                steps * turn,
                self.named,
            )
        return min(steps, max(needed, -(-steps // refresh_steps)))

    def fill(self, window: int, variant: Variant, bar: Any, *, held_back: bool = False) -> Window:
        """The window of this number.

        Args:
            variant: what denoises the targets.
            held_back: prompts that training never sees.
        """
        seed = philox.fold_seed(self.seed, 2 * window + int(held_back))
        targets, kept = self._counts(held_back)
        numbers = word_numbers(window, targets, self.named, len(self.prompts))
        share = range(targets)[self.processes.share(targets)]
        target, beyond = self._targets(
            [numbers[i] for i in share], share, seed, variant, bar, held_back
        )
        preserve = self._preserved(range(kept)[self.processes.share(kept)], seed, bar)
        target = self._gathered(target)
        if beyond is not None:
            # Not gathered apart from the target's: they are one tensor.
            own = self._gathered(beyond)
            beyond = Points(target.latents, target.timesteps, own.states, own.prompt, own.teacher)
        return Window(target, beyond, self._gathered(preserve))

    def _targets(
        self,
        numbers: Sequence[int],
        places: range,
        seed: int,
        variant: Variant,
        bar: Any,
        held_back: bool,
    ) -> tuple[Points, Points | None]:
        plain, sources, anchors, meant, words = [], [], [], [], []
        for number, place in zip(numbers, places, strict=True):
            word = self.prompts[number]
            generator = torch.Generator("cpu").manual_seed(
                philox.fold_seed(seed, _TARGET_PROMPTS + place)
            )
            chosen = _chosen(word, held_back, generator).to(word.source.device)
            follows = word.anchor if self.by_turns and place % 3 == 2 else word.source
            plain.append(follows[word.plain])
            sources.append(word.source[chosen])
            anchors.append(word.anchor[chosen])
            # The original draws of a prompt that an attack found anything.
            known = len(word.prompts) - word.found
            meant.append(word.source[torch.where(chosen < known, chosen, word.plain)])
            words.append(word.word)
        device = self.sampler.shared.device
        source, anchor, said = (torch.stack(x).to(device) for x in (sources, anchors, meant))
        starts = [philox.fold_seed(seed, _TARGET_STARTS + place) for place in places]
        by_original = [self._by_original(place) for place in places]
        latents = self._followed(torch.stack(plain), starts, by_original, variant, bar)
        timesteps = self.sampler.timesteps[self.trained].repeat(len(numbers), 1)
        for i, (word_name, start) in enumerate(zip(words, starts, strict=True)):
            if word_name in self.latents:
                latents[i] = self._noised(self.latents[word_name], timesteps[i], start)
        points = timesteps.shape[1]
        generator = torch.Generator("cpu").manual_seed(philox.fold_seed(seed, PROMPT_STREAM))
        within = torch.randint(_PROMPTS, (places.stop, points), device="cpu", generator=generator)
        mine = within[places.start : places.stop].to(device)
        prompt = (torch.arange(len(numbers), device=device)[:, None] * _PROMPTS + mine).flatten()
        z, t = latents.flatten(0, 1), timesteps.flatten()
        states = source.flatten(0, 1)
        goal = self.sampler.teacher(z, t, anchor.flatten(0, 1)[prompt])
        own = said.flatten(0, 1)[prompt] if self.needs_shown else None
        shown = None if own is None else self.sampler.teacher(z, t, own)
        if shown is not None:
            goal = goal - self.negative_guidance * (shown - goal)
        target = Points(z, t, states, prompt, goal, shown)
        if self.beyond_region is None:
            return target, None
        away = mining.sample(
            states[prompt],
            self.beyond_region,
            samples=1,
            seed=philox.fold_seed(seed, BEYOND_STREAM),
            concept_offset=places.start * points,
        ).rows()[:, 0]
        beyond = Points(
            z, t, away, torch.arange(len(z), device=device), self.sampler.teacher(z, t, away)
        )
        return target, beyond

    def _followed(
        self,
        states: Tensor,
        starts: Sequence[int],
        by_original: Sequence[bool],
        variant: Variant,
        bar: Any,
    ) -> Tensor:
        """`[e, s, c, h, w]` the trajectories of some prompts, one after the other, each point by
        point: a share is a consecutive part.

        Args:
            by_original: which of them the original model denoises.
        """
        found: dict[int, Tensor] = {}
        models: tuple[tuple[Variant, bool], ...] = ((variant, False), ("original", True))
        for model, original in models:
            own = [i for i, of_it in enumerate(by_original) if of_it is original]
            if own:
                way = self.sampler.run(states[own], [starts[i] for i in own], model, bar)
                ways = way.latents[:-1][self.trained].transpose(0, 1)
                found |= dict(zip(own, ways, strict=True))
        return torch.stack([found[i] for i in range(len(starts))])

    def _preserved(self, places: range, seed: int, bar: Any) -> Points:
        device = self.sampler.shared.device
        generator = torch.Generator("cpu").manual_seed(philox.fold_seed(seed, PRESERVE_STREAM))
        count = len(self.preserve)
        order = torch.randperm(count, device="cpu", generator=generator)
        order = order.repeat(-(-places.stop // count))
        states = self.preserve[order[places.start : places.stop]].to(device)
        starts = [philox.fold_seed(seed, _PRESERVE_STARTS + place) for place in places]
        way = self.sampler.run(states, starts, "original", bar)
        # The original model denoised them, so what it predicts there is known already.
        latents = way.latents[:-1][self.used].transpose(0, 1)
        teacher = way.predictions[self.used].transpose(0, 1)
        timesteps = way.timesteps[self.used].repeat(len(states), 1)
        prompt = torch.arange(len(states), device=device).repeat_interleave(timesteps.shape[1])
        return Points(
            latents.flatten(0, 1), timesteps.flatten(), states, prompt, teacher.flatten(0, 1)
        )

    def _noised(self, images: Tensor, timesteps: Tensor, seed: int) -> Tensor:
        """`[s, c, h, w]` an image drawn by chance for each time step, with that much noise."""
        generator = torch.Generator("cpu").manual_seed(seed)
        chosen = torch.randint(len(images), (len(timesteps),), device="cpu", generator=generator)
        clean = images[chosen.to(images.device)].to(timesteps.device, torch.float32)
        noise = torch.randn(clean.shape, dtype=torch.float32, device="cpu", generator=generator)
        return self.sampler.noised(clean, noise.to(clean.device), timesteps)

    def _gathered(self, points: Points) -> Points:
        """The points of all processes, in the order of one process that made them all."""
        gather, rank = self.processes.gather, self.processes.rank
        moved = points.prompt + rank * len(points.states)
        return Points(
            gather(points.latents),
            gather(points.timesteps),
            gather(points.states),
            gather(moved),
            gather(points.teacher),
            None if points.shown is None else gather(points.shown),
        )


def _divisible(count: int, by: int) -> int:
    """The least multiple that is not less."""
    return -(-count // by) * by
