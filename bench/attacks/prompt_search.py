"""Ring-A-Bell (Tsai et al., arXiv 2310.10012): prompts found with the text encoder alone.

A concept is a direction between prompts with and without it,

    c = mean_i ( f(P_i with) - f(P_i without) ),

and a genetic algorithm looks for tokens whose embedding is nearest to f(P) + eta c. The attacked
model is never asked: what is found for one erasure serves all. A filter that looks for the erased
words themselves would stop them, so they are left out of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from realera_fast.runtime import folded

TEMPLATES = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a {}", "the {}", "{}")


@dataclass(frozen=True)
class Settings:
    """The paper searches 16 to 77 of 77 tokens for 3,000 generations with eta 3; a small encoder
    whose captions are short and whose words are few needs less (ours)."""

    length: int = 5
    eta: float = 1.0
    population: int = 200
    generations: int = 60
    mutation: float = 0.25
    """Chance of each token to be drawn anew."""
    elite: int = 20
    """Prompts that are kept as they are."""
    prompts: int = 4
    """The best of the last generation, all different."""


@torch.no_grad()
def search(
    pipe: Any, concept: str, banned: Sequence[str], seed: int, settings: Settings | None = None
) -> list[str]:
    """Prompts without any banned word whose embeddings come nearest to the concept's.

    Args:
        concept: the erased name.
        banned: words that may not be used, whole.
    """
    options = settings or Settings()
    device = pipe.text_encoder.device
    gone = {folded(word) for word in banned}
    words = sorted(
        word.removesuffix("</w>")
        for word in pipe.tokenizer.get_vocab()
        if word.endswith("</w>") and word.removesuffix("</w>").isalpha()
    )
    words = [word for word in words if folded(word) not in gone]
    generator = torch.Generator().manual_seed(seed)

    def encode(prompts: Sequence[str]) -> Tensor:
        tokens = pipe.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        found: Tensor = pipe.text_encoder(tokens.input_ids.to(device))[0]
        return found.float().flatten(1)

    with_it = encode([template.format(concept) for template in TEMPLATES])
    without = encode([" ".join(template.format("").split()) for template in TEMPLATES])
    wanted = encode([TEMPLATES[0].format(concept)])
    wanted = wanted + options.eta * (with_it - without).mean(dim=0)

    def text(genes: Tensor) -> list[str]:
        return [" ".join(words[i] for i in row) for row in genes.tolist()]

    genes = torch.randint(len(words), (options.population, options.length), generator=generator)
    for _ in range(options.generations):
        distance = (encode(text(genes)) - wanted).square().sum(dim=1).cpu()
        genes = genes[distance.argsort()]
        # Parents are drawn from the better half; a child takes each token from one of two.
        count = options.population - options.elite
        parents = torch.randint(options.population // 2, (2, count), generator=generator)
        mask = torch.rand((count, options.length), generator=generator) < 0.5
        children = torch.where(mask, genes[parents[0]], genes[parents[1]])
        fresh = torch.randint(len(words), children.shape, generator=generator)
        mutated = torch.rand(children.shape, generator=generator) < options.mutation
        genes = torch.cat([genes[: options.elite], torch.where(mutated, fresh, children)])
    distance = (encode(text(genes)) - wanted).square().sum(dim=1).cpu()
    best = dict.fromkeys(text(genes[distance.argsort()]))
    return list(best)[: options.prompts]
