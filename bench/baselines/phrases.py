"""What the baselines read of a pipeline: phrases, words to keep, and the matrices they edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from realera_fast.alignment import AlignmentConfig
from realera_fast.mining import (
    KnownWords,
    MiningConfig,
    find_neighbors,
    guidance_cosine,
    read_known_words,
)
from realera_fast.models import projections, text_streams, value_gram
from realera_fast.runtime import folded
from realera_fast.text import Concept, Text, VocabularyConfig, preserved_words

UNIT = 784.0
"""|e|^2 of a row of Stable Diffusion 1.4's text encoder, on which all published ridges and
thresholds were chosen: rows are scaled to it, so that these mean the same for every encoder."""

ANCHORS: Mapping[str, str] = {
    "object": "",
    "style": "art",
    "person": "a person",
    "explicit": "",
}
"""By kind, where a concept names none (UCE's and SPEED's; "a person" is MACE's)."""


class Phrases:
    """Embeddings in Stable Diffusion's scale."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.text: Text = text_streams(pipe.unet, pipe.text_encoder, pipe.tokenizer)["sequence"][0]
        rows = self.text.encode(["a photo of a"])
        self.scale = (UNIT / rows.square().sum(-1).mean()).sqrt()
        self._words: dict[tuple[Concept, ...], tuple[str, ...]] = {}

    def rows(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t, d]` all rows."""
        return self.text.encode(prompts) * self.scale

    def last(self, phrases: Sequence[str]) -> Tensor:
        """`[p, d]` the row of each phrase's last token; of the empty phrase, that of
        begin-of-text, as in the published codes."""
        # Many concepts share an anchor.
        distinct = list(dict.fromkeys(phrases))
        place = torch.tensor(self.text.ends(distinct)) - 1
        rows = self.rows(distinct)[torch.arange(len(distinct)), place]
        return rows[[distinct.index(phrase) for phrase in phrases]]

    def kept(self, concepts: Sequence[Concept]) -> tuple[str, ...]:
        """Words to keep: those of the tokenizer that are neither erased nor near what is.

        The words of the library's own preserve prior, so that no method knows of more than another:
        members of a category, which the library finds by drawing, are left out here too.
        """
        key = tuple(concepts)
        if key not in self._words:
            known = self._known()
            found = find_neighbors(known, concepts, MiningConfig(), members=self._members)
            near = [w for words in (found.near, found.surplus) for w in words.values()]
            gone = {folded(w) for words in (*near, *(c.words for c in concepts)) for w in words}
            kept = preserved_words(known.read.things, VocabularyConfig().words)
            self._words[key] = tuple(w for w in kept if folded(w) not in gone)
        return self._words[key]

    def _known(self) -> KnownWords:
        unet = self._pipe.unet
        return read_known_words(self.text, value_gram(unet, projections(unet), self.text.width))

    def _members(self, concept: Concept, words: Sequence[str]) -> Tensor:
        return guidance_cosine(
            self._pipe.unet,
            self._pipe.scheduler,
            concept.words,
            words,
            text=self.text,
            empty=self.text.encode([""]),
            config=AlignmentConfig(),
        )


EXPANSIONS: Mapping[str, tuple[str, ...]] = {
    "object": ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}"),
    "style": ("{}", "a {} picture", "a picture in the style of {}", "{} style", "a {} drawing"),
    "person": ("{}", "a photo of {}", "a portrait of {}", "a picture of {}", "an image of {}"),
    "explicit": ("{}", "a photo of {}", "a photo of a {}", "a picture of {}", "an image of {}"),
}
"""Five phrases in place of the bare one, where a method expands it, as UCE's and OCE's commands
can; in the words that small models know too."""


def pairs_of(
    concepts: Sequence[Concept], anchors: Mapping[str, str], *, expand: bool
) -> list[tuple[str, str]]:
    """Phrases of the targets with those of their anchors."""
    return [
        (template.format(word), " ".join(template.format(anchor_of(concept, anchors)).split()))
        for concept in concepts
        for word in concept.words
        for template in (EXPANSIONS[concept.kind] if expand else ("{}",))
    ]


def anchor_of(concept: Concept, anchors: Mapping[str, str]) -> str:
    """What a concept becomes: its own anchor, or that of its kind."""
    return anchors[concept.kind] if concept.anchor is None else concept.anchor


def matrices(unet: nn.Module, leaves: Sequence[str] = ("to_k", "to_v")) -> list[nn.Linear]:
    """Cross-attention projections of the text."""
    ends = tuple(f"attn2.{leaf}" for leaf in leaves)
    return [m for name, m in unet.named_modules() if name.endswith(ends)]  # type: ignore[misc]


@torch.no_grad()
def rewrite(layers: Sequence[nn.Linear], edit: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """Edits weights in float32 and stores them in the model's type."""
    weights = [layer.weight.float() for layer in layers]
    for layer, weight in zip(layers, edit(weights), strict=True):
        layer.weight.copy_(weight)


def label(settings: Any) -> str:
    """The fields in which settings differ from the authors', or what else the defaults are, for a
    row."""
    own = type(settings)()
    changed = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if getattr(settings, f.name) != getattr(own, f.name)
    }
    cells = [
        f"anchor={value['object']}" if name == "anchors" else f"{name}={value}"
        for name, value in changed.items()
    ]
    return ", ".join(cells) or getattr(own, "defaults", "authors'")
