"""Whether trained factors stay: what the original model still sees in held-out images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from realera_fast import mining
from realera_fast.alignment.adversary import Adversary
from realera_fast.alignment.config import AlignmentConfig
from realera_fast.alignment.prompts import AlignmentPrompts
from realera_fast.runtime import progress_bar
from realera_fast.unet import Moved, Sampler, Variant


@dataclass(frozen=True)
class AlignmentScore:
    """What the original model still sees in held-back images (0 is perfect)."""

    target: float
    """Where images of named words are between the original's images of their anchors (0) and of
    the words (1), by how much better the word than the anchor fits them; beyond the anchor is 0."""
    neighbor: float
    """The same for words of the tokenizer near them that nobody named; random neighbors of the
    named words where there are none."""
    preserve: float
    """|x'(P) - x(P)|^2 over the spread of the original's images."""
    worst: float = 0.0
    """What an attack brings back: how near its predictions come to those of the concept (1), from
    as far as those of the anchor are (0). Where nobody attacks, the same as `target` where an
    adversary moves the prompt at every time step."""

    @property
    def left(self) -> float:
        """What is left of the concept, named or not."""
        return (self.target + self.neighbor) / 2

    @property
    def shows(self) -> float:
        """The same of whichever shows more."""
        return max(self.target, self.neighbor)


_HARM = 0.1
"""So much drift of preserved images is taken for unharmed, in units of their spread (ours)."""
_PRICE = 0.15
"""So much more drift is what holding an attack may cost (ours: with it relatives of tuning things
stayed, with 0.26 one in five went)."""
_GAIN, _GONE = 0.05, 0.1
"""Less of the concept than that is no gain, is nothing left: the measure is as noisy (ours)."""
THERE = 0.4
"""Where the judge begins to see the concept (ours; `scales` has it from the other end)."""


def is_better(before: AlignmentScore, after: AlignmentScore, *, worst: bool = False) -> bool:
    """Whether less of the concept is left and the rest is not harmed.

    Args:
        worst: whether it is what an attack brings back that has to fall; of the rest it is enough
            that the concept is not seen.
    """
    if worst:
        falls = after.worst < before.worst or after.worst <= _GONE
        hidden = after.left <= max(before.left, THERE)
        return falls and hidden and after.preserve <= before.preserve + _PRICE
    return before.left - after.left > _GAIN and after.preserve <= max(before.preserve, _HARM)


class HeldOutCheck:
    """What the original model sees in images from seeds that training never saw."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: AlignmentPrompts,
        region: mining.Region,
        adversary: Adversary,
        config: AlignmentConfig,
        seed: int,
        progress: bool | None,
    ) -> None:
        self._sampler, self._progress, self._adversary = sampler, progress, adversary
        self._attacked, watched, preserve = prompts.attacked, prompts.watched, prompts.preserve
        # Gradients take the memory of a part of a training step, and no more.
        self._rows = max(1, config.batch_size // config.gradient_accumulation_steps)
        if not config.check_seeds:
            return

        def plain(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            """`[w, t, d]` prompts of some words and of their anchors."""
            words = [watched[number] for number in numbers]
            states = torch.stack([word.source[word.plain] for word in words])
            return states, torch.stack([word.anchor[word.plain] for word in words])

        def repeat(states: Tensor) -> Tensor:
            return states.repeat_interleave(config.check_seeds, dim=0)

        named, words = watched.named, len(watched)
        source, anchor = plain(_spread(0, named, config.check_words))
        if words > named:
            near, near_anchor = plain(_spread(named, words, config.check_words))
        else:
            near = mining.sample(source, region, samples=1, seed=seed).rows()[:, 0]
            near_anchor = anchor
        chosen = _spread(0, len(preserve), max(4, len(source)))
        kept = preserve[torch.tensor(chosen, device=preserve.device)].to(source)
        self._prompts = [repeat(states) for states in (source, near, kept)]
        self._anchors = [repeat(states) for states in (anchor, near_anchor)]
        self._first = seed + _CHECK_STARTS

    @functools.cached_property
    def _original(self) -> Sequence[Tensor]:
        return self._draw(self._prompts, "original")

    @functools.cached_property
    def _ends(self) -> list[tuple[Tensor, Tensor]]:
        """`[w]` margins of the original's images of each group's words, and of their anchors."""
        anchored = self._draw(self._anchors, "original")
        words, anchors = self._margins(self._original), self._margins(anchored)
        return list(zip(words, anchors, strict=True))

    def score(self, variant: Variant) -> AlignmentScore:
        """Of the closed form alone ("edited"), or with the factors as they are ("aligned")."""
        images, original = self._draw(self._prompts, variant), self._original
        left = [
            _place(seen, *ends)
            for seen, ends in zip(self._margins(images), self._ends, strict=True)
        ]
        drift = float((images[2] - original[2]).square().mean())
        spread = float((original[2] - original[2].mean(dim=0)).square().mean())
        return AlignmentScore(left[0], left[1], drift / max(spread, 1e-12), self._worst(variant))

    def _worst(self, variant: Variant) -> float:
        if self._attacked is None:
            moved = functools.partial(self._moved, variant)
            attacked = self._draw(self._prompts[:1], variant, moved)
            return _place(self._margins(attacked)[0], *self._ends[0])
        return self._attacked(self._sampler.shared, variant)

    def _moved(self, variant: Variant, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        shown = self._sampler.teacher(latents, times, states)
        rows = torch.arange(len(latents), device=latents.device).split(self._rows)
        seed = self._first + int(times[0])
        parts = [
            self._adversary.moved(
                latents[part],
                times[part],
                states[part],
                shown[part],
                seed=seed,
                offset=number * self._rows,
                variant=variant,
            )
            for number, part in enumerate(rows)
        ]
        return torch.cat(parts)

    def _draw(
        self, groups: Sequence[Tensor], variant: Variant, moved: Moved | None = None
    ) -> Sequence[Tensor]:
        states = torch.cat(list(groups))
        total = self._sampler.passes * self._sampler.batches(len(states))
        seeds = range(self._first, self._first + len(states))
        with progress_bar(
            total=total, desc=f"alignment check, {variant}", progress=self._progress
        ) as bar:
            run = self._sampler.run(states, seeds, variant, bar, moved)
        return run.latents[-1].split([len(group) for group in groups])

    def _margins(self, images: Sequence[Tensor]) -> list[Tensor]:
        """`[w]` how much better the words than their anchors fit, for named and for near words."""
        return [
            self._sampler.margin(x, states, other)
            for x, states, other in zip(images, self._prompts, self._anchors, strict=False)
        ]


def _place(seen: Tensor, word: Tensor, anchor: Tensor) -> float:
    """Where margins are on the way from those of the anchors (0) to those of the words (1)."""
    way = float((word - anchor).mean())
    # Where the original can't tell the two apart, nothing is known to be gone.
    place = (seen - anchor.mean()) / way if way > 0 else torch.ones_like(seen)
    return float(place.clamp_min(0.0).mean())


_CHECK_STARTS = 20_000
"""Seeds from here on start checked images."""


def _spread(start: int, stop: int, count: int) -> list[int]:
    """`count` numbers of the range, evenly over it; all of it if there are fewer."""
    count = min(count, stop - start)
    return [start + i * (stop - start) // count for i in range(count)]
