"""Where to edit a model whose text meets the picture in joint attention (SD3, FLUX).

Edits by the same closed form, of randomly initialized models of the stock classes:

entry           the maps of the token sequence and of the pooled vector (the library)
sequence        the map of the token sequence alone
blocks          keys and values of the text in every block (``add_k_proj``, ``add_v_proj``); rows
                are what a forward hook saw there, for several latents and times; one solve each
blocks, pooled  these, and the map of the pooled vector

What counts is the prediction, for templates, latents and times that no edit was made from:

erased      |eps'(concept) - eps(anchor)| / |eps(concept) - eps(anchor)|     0: it became the anchor
kept        |eps'(other) - eps(other)| / |eps(concept) - eps(anchor)|        0: it stayed
tokens      as erased, where the pooled vector is the anchor's everywhere: what the edit does to the
            sequence, which random weights let count for little beside the pooled vector

Text embeddings are made up (a vector for each word, mixed with its template); random weights say
how the edits compare, not what a picture shows.

    python bench/run.py entry_maps
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from harness.provenance import provenance
from harness.rows import file_for, measured
from torch import Tensor, nn

from realera_fast.models import stream_of, streams
from realera_fast.solver import NormalEquations, Pairs, solve_layers

WIDTH, POOLED, TOKENS = 192, 96, 16
TEMPLATES, WORDS = 8, 64
"""Half of the templates are for the edit, half for judging; so are half of the other words."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One model."""

    name: str
    seed: int

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=16,
    )


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=4,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(8, 12, 12),
    )


def predict(model: Any, z: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """The model's prediction for `[b, c, h, w]` latents."""
    if isinstance(model, SD3Transformer2DModel):
        found: Tensor = model(
            hidden_states=z,
            timestep=1000 * t,
            encoder_hidden_states=text,
            pooled_projections=pooled,
        ).sample
        return found
    rows = nn.functional.pixel_unshuffle(z, 2).flatten(2).mT
    side = z.shape[-1] // 2
    places = torch.zeros(side, side, 3)
    places[..., 1] += torch.arange(side)[:, None]
    places[..., 2] += torch.arange(side)[None, :]
    output: Tensor = model(
        hidden_states=rows,
        timestep=t,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        img_ids=places.view(-1, 3),
        txt_ids=torch.zeros(TOKENS, 3),
    ).sample
    return output


class Words:
    """Made-up prompts: template p with word w as `[t, d]` rows and a `[q]` pooled vector."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator)

        self.templates, self.words = normal(TEMPLATES, TOKENS, WIDTH), normal(WORDS, WIDTH)
        self.spread = normal(TOKENS, WIDTH, WIDTH) / WIDTH**0.5
        self.heads = normal(POOLED, WIDTH) / WIDTH**0.5
        self.mixed = normal(TEMPLATES, POOLED)

    def __call__(self, template: int, word: int) -> tuple[Tensor, Tensor]:
        vector = self.words[word]
        rows = self.templates[template].clone()
        # The word's own rows, and what encoders let it leave in all later ones.
        rows[4:6] += 3 * vector
        rows[6:] += self.spread[6:] @ vector
        return rows, self.mixed[template] + 3 * self.heads @ vector


def batch(words: Words, prompts: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    parts = [words(*prompt) for prompt in prompts]
    return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])


def conditions(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Latents and times."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 16, 16, generator=generator), torch.rand(
        count, generator=generator
    )


CONCEPT, ANCHOR = 0, 1
OTHERS = range(2, WORDS)
SEEN, UNSEEN = range(0, TEMPLATES, 2), range(1, TEMPLATES, 2)


def equations(source: Tensor, destination: Tensor, kept: Tensor) -> NormalEquations:
    """The concept's rows, and as much weight on rows that stay."""
    found = NormalEquations(source.shape[-1])
    for rows, goal in ((source, destination), (kept, kept)):
        flat = rows.reshape(-1, rows.shape[-1])
        weight = torch.full((len(flat),), 1.0 / len(flat))
        found.update(Pairs(flat, goal.reshape(flat.shape), weight * (1 if rows is source else 5)))
    return found


def edit_entry(model: Any, words: Words, wanted: tuple[str, ...]) -> None:
    """The library's edit: the maps that text enters through, of these streams."""
    seen = [(template, CONCEPT) for template in SEEN]
    goal = [(template, ANCHOR) for template in SEEN]
    kept = [(template, word) for template in SEEN for word in list(OTHERS)[::2]]
    texts = zip(batch(words, seen), batch(words, goal), batch(words, kept), strict=True)
    maps = dict(zip(("sequence", "pooled"), texts, strict=True))
    for name in streams(model):
        stream = stream_of(name)
        if stream not in wanted:
            continue
        system = equations(*maps[str(stream)])
        solution = system.solve(ridge=1e-3 * float(system.gram.diagonal().mean()))
        weight = model.get_submodule(name).weight
        weight.copy_(weight @ solution.map.matrix)


def edit_blocks(model: Any, words: Words) -> None:
    """Keys and values of every block, from what a hook saw."""
    names = [n for n, _ in model.named_modules() if n.endswith(("add_k_proj", "add_v_proj"))]
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda _m, inputs, _o, n=n: seen.setdefault(n, []).append(inputs[0].detach())
        )
        for n in names
    ]
    z, t = conditions(1, 4)
    sets = (
        [(template, CONCEPT) for template in SEEN],
        [(template, ANCHOR) for template in SEEN],
        [(template, word) for template in SEEN for word in list(OTHERS)[::2]],
    )
    rows: list[dict[str, Tensor]] = []
    for prompts in sets:
        seen.clear()
        text, pooled = batch(words, prompts)
        for i in range(len(z)):
            count = len(prompts)
            predict(model, z[i : i + 1].repeat(count, 1, 1, 1), t[i].repeat(count), text, pooled)
        rows.append({n: torch.cat(parts) for n, parts in seen.items()})
    for handle in handles:
        handle.remove()
    systems = [equations(*(part[n] for part in rows)) for n in names]
    ridge = 1e-3 * float(systems[0].gram.diagonal().mean())
    for name, solution in zip(names, solve_layers(systems, ridge=ridge), strict=True):
        weight = model.get_submodule(name).weight
        weight.copy_(weight @ solution.map.matrix)


def edit_blocks_and_pooled(model: Any, words: Words) -> None:
    edit_blocks(model, words)
    edit_entry(model, words, ("pooled",))


EDITS: dict[str, Callable[[Any, Words], None]] = {
    "entry": lambda model, words: edit_entry(model, words, ("sequence", "pooled")),
    "sequence": lambda model, words: edit_entry(model, words, ("sequence",)),
    "blocks": edit_blocks,
    "blocks, pooled": edit_blocks_and_pooled,
}


@torch.no_grad()
def measure(point: Point) -> list[dict[str, Any]]:
    torch.manual_seed(point.seed)
    model = {"SD3": sd3, "FLUX": flux}[point.name]().eval()
    words = Words(point.seed)
    z, t = conditions(2, 4)

    def predicted(of: nn.Module, word: int, pooled_of: int | None = None) -> Tensor:
        text, pooled = batch(words, [(template, word) for template in UNSEEN])
        if pooled_of is not None:
            pooled = batch(words, [(template, pooled_of) for template in UNSEEN])[1]
        parts = [
            predict(
                of, z[i : i + 1].repeat(len(text), 1, 1, 1), t[i].repeat(len(text)), text, pooled
            )
            for i in range(len(z))
        ]
        return torch.cat(parts)

    judged = list(OTHERS)[1::4]
    concept, anchor = predicted(model, CONCEPT), predicted(model, ANCHOR)
    others = [predicted(model, word) for word in judged]
    apart = (concept - anchor).norm()
    by_tokens = (predicted(model, CONCEPT, ANCHOR) - anchor).norm()
    rows = []
    for name, edit in EDITS.items():
        edited = copy.deepcopy(model)
        edit(edited, words)
        erased = (predicted(edited, CONCEPT) - anchor).norm() / apart
        kept = [
            float((predicted(edited, word) - before).norm() / apart)
            for word, before in zip(judged, others, strict=True)
        ]
        rows.append(
            {
                **dataclasses.asdict(point),
                "edit": name,
                "erased": round(float(erased), 4),
                "kept": round(sum(kept) / len(kept), 4),
                "tokens": round(
                    float((predicted(edited, CONCEPT, ANCHOR) - anchor).norm() / by_tokens), 4
                ),
            }
        )
    return rows


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each edit."""
    for row in rows:
        yield (
            f"{row['name']} {row['seed']} {row['edit']:>14}: erased {row['erased']:.3f}, "
            f"kept {row['kept']:.3f}, tokens {row['tokens']:.3f}"
        )


def main(arguments: argparse.Namespace) -> int:
    points = [Point(name, seed) for name in ("SD3", "FLUX") for seed in range(5)]
    measured(
        points[::5] if arguments.quick else points,
        measure,
        lines,
        provenance(arguments.threads, cuda=False),
        file_for("entry_maps", arguments.out, quick=arguments.quick),
    )
    return 0
