"""Semantic Surgery (Xiong et al., arXiv 2510.22851), at run time: prompts move, weights stay.

With D(c) = E(c) - E("") for the embeddings E of all positions, a prompt p holds concept i as far as

    gate_i = sigmoid((s_i + beta) / gamma),    s_i = mean over positions of cos(D(c_i), E(p))

says. All concepts whose gate is above one half are joined by commas to one phrase c, and the prompt
becomes

    E(p) - max_i gate_i D(c).

Without the second pass, for which a detector looks at the pictures of the first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from realera_fast.text import Concept


@dataclass(frozen=True)
class Settings:
    """Defaults: the authors', for objects."""

    beta: float | Mapping[str, float] = -0.12
    """One, or one by kind of concept, as theirs: see `AUTHORS`."""
    gamma: float = 0.02

    def beta_of(self, concept: Concept) -> float:
        if isinstance(self.beta, Mapping):
            return self.beta[concept.kind]
        return self.beta


AUTHORS: Mapping[str, float] = {"person": -0.28, "explicit": -0.06}
"""For a hundred people and for an unsafe category."""


SWEEP = (
    Settings(),
    *(Settings(beta=beta) for beta in (-0.28, -0.06, -0.2, -0.22, -0.24, -0.26, -0.3, -0.34)),
    *(Settings(beta=beta, gamma=0.05) for beta in (-0.24, -0.28)),
    *(
        Settings(beta=AUTHORS | {"object": -0.22, "style": style}, gamma=gamma)
        for style, gamma in ((-0.12, 0.02), (-0.09, 0.02), (-0.06, 0.02), (-0.09, 0.05))
    ),
)
"""What is tried on words that are not judged; the authors' settings come first. Where the line lies
depends on the text encoder: many other words are above the authors' here, and prompts hold less of
a style than of a thing."""


class Surgery:
    """What is known of the concepts; made by `erase`."""

    def __init__(self, pipe: Any, concepts: Sequence[Concept], settings: Settings) -> None:
        self._gamma = settings.gamma
        self._encode: Callable[..., Any] = pipe.encode_prompt
        self._device = pipe.device
        self._names = [word for concept in concepts for word in concept.words]
        self._betas = torch.tensor(
            [settings.beta_of(concept) for concept in concepts for _ in concept.words]
        ).to(self._device)
        self._empty = self._embeds([""])
        self._moves: dict[tuple[str, ...], Tensor] = {}
        self._directions = self._embeds(self._names) - self._empty
        for name in self._names:
            # Now: an attack's vectors stand in the text encoder while it looks for some.
            self._move((name,))

    def pipeline(self, pipe: Any) -> Any:
        """A pipeline on the same modules whose prompts are moved; those of guidance stay."""
        own = copy.copy(pipe)

        def encode_prompt(*arguments: Any, **options: Any) -> tuple[Any, ...]:
            prompts, *others = pipe.encode_prompt(*arguments, **options)
            return self.moved(prompts), *others

        own.encode_prompt = encode_prompt
        return own

    def gates(self, prompts: Tensor) -> Tensor:
        """`[p, n]`: how far each of `[p, t, d]` prompts holds each concept."""
        shares = torch.stack(
            [
                functional.cosine_similarity(self._directions, prompt.float(), dim=-1).mean(dim=-1)
                for prompt in prompts
            ]
        )
        return ((shares + self._betas) / self._gamma).sigmoid()

    def moved(self, prompts: Tensor) -> Tensor:
        """`[p, t, d]` prompts without what they hold of the concepts."""
        moved = []
        for prompt, gates in zip(prompts, self.gates(prompts), strict=True):
            held = tuple(n for n, gate in zip(self._names, gates, strict=True) if gate > 0.5)
            found = prompt.float() - gates.max() * self._move(held) if held else prompt
            moved.append(found.to(prompt.dtype))
        return torch.stack(moved)

    def _move(self, held: tuple[str, ...]) -> Tensor:
        """`[t, d]`: from nothing to these concepts in one phrase."""
        if held not in self._moves:
            self._moves[held] = (self._embeds([", ".join(held)]) - self._empty)[0]
        return self._moves[held]

    @torch.no_grad()
    def _embeds(self, phrases: Sequence[str]) -> Tensor:
        found: Tensor = self._encode(list(phrases), self._device, 1, False)[0]
        return found.float()


def erase(pipe: Any, concepts: Sequence[Concept], settings: Settings, seed: int = 0) -> Surgery:
    """Edits nothing: what comes back makes the pipeline that draws without the concepts."""
    return Surgery(pipe, concepts, settings)
