"""What is compared on the flow-matching sibling, whose text meets the picture in joint attention.

Text enters by two maps, of the token sequence (`context_embedder`) and of the pooled vector
(`text_embedder.linear_1`). Where the closed form is best made is one question of the table, so it
is made at each of them alone, at both, and in every block: there the rows are what the text's keys
and values (`add_k_proj`, `add_v_proj`) see of the same words, for several latents and times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from baselines import esd, gem, uce
from baselines.phrases import ANCHORS
from harness.tables import DEFAULT, FAST
from torch import Tensor

import realera_fast
from quality.methods import Method, baseline, changed
from realera_fast import Concept, EraseConfig, Erasure
from realera_fast.embedded.flow import SAMPLING, flow_reading
from realera_fast.models import stream_of, streams, text_streams
from realera_fast.solver import NormalEquations, Pairs, solve_layers

SEQUENCE, POOLED = "closed form, token sequence alone", "closed form, pooled vector alone"
BLOCKS = "closed form, pooled vector and added K, V of every block"
UCE, GEM, ESD = "UCE, entry maps", "GEM", "ESD"


def library(config: EraseConfig, *, only: str | None = None) -> Method:
    """`realera_fast.erase` with these settings.

    Args:
        only: the stream whose maps stay edited, alone.
    """

    def erase(
        pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]
    ) -> Erasure | None:
        own = changed(config, vocabulary={"exclude": tuple(exclude)})
        before = {name: pipe.transformer.get_submodule(name).weight.clone() for name in maps(pipe)}
        erasure = realera_fast.erase(
            pipe,
            list(concepts),
            config=dataclasses.replace(own, seed=seed),
            reading=flow_reading(pipe.transformer),
            progress=False,
        )
        if only is None:
            return erasure
        with torch.no_grad():
            for name, weight in before.items():
                if stream_of(name) != only:
                    pipe.transformer.get_submodule(name).weight.copy_(weight)
        return None

    return Method(erase, config.alignment.enabled, config.to_dict())


def blocks() -> Method:
    """The library's map of the pooled vector, and its words' rows in every block."""
    config = EraseConfig.fast()
    of_pooled = library(config, only="pooled")

    def erase(pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]) -> None:
        model = pipe.transformer
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        found = library(config).erase(pipe, concepts, seed, exclude)
        assert found is not None
        report = found.report
        model.load_state_dict(before)
        leaving, anchors = [], []
        for concept in concepts:
            words = [*concept.words, *report["neighbors"][concept.target]]
            chosen = report["anchors"].get(concept.target)
            goal = chosen["words"][0] if chosen else concept.anchor or ""
            leaving += words
            anchors += [goal] * len(words)
        staying = [w["word"] for w in report["words"] if w["role"] in _STAYING]
        # Before anything moves: the rows are the original's.
        seen = [_seen(pipe, words) for words in (leaving, anchors, staying)]
        of_pooled.erase(pipe, concepts, seed, exclude)
        systems = []
        names = list(seen[0])
        for name in names:
            source, goal, kept = (rows[name] for rows in seen)
            system = NormalEquations(source.shape[-1])
            for rows, to, weight in ((source, goal, 1.0), (kept, kept, _PRESERVE_SCALE)):
                each = torch.full((len(rows),), weight / len(rows))
                system.update(Pairs(rows, to, each))
            systems.append(system)
        ridge = 1e-3 * float(systems[0].gram.diagonal().mean())
        with torch.no_grad():
            for name, solution in zip(names, solve_layers(systems, ridge=ridge), strict=True):
                weight = model.get_submodule(name).weight
                weight.copy_(weight.float() @ solution.map.matrix.float())

    return Method(erase, False, config.to_dict())


_STAYING = ("relative", "vocabulary", "preserved")
_PRESERVE_SCALE = 5.0
_TIMES = (0.95, 0.7, 0.4)


@torch.no_grad()
def _seen(pipe: Any, words: Sequence[str]) -> dict[str, Tensor]:
    """`[n, d]` float32 what every block's added keys and values see of the words' prompts."""
    model, found = pipe.transformer, {}
    handles = []
    for name, layer in model.named_modules():
        if name.endswith(("add_k_proj", "add_v_proj")):
            rows = found.setdefault(name, [])
            handles.append(
                layer.register_forward_hook(
                    lambda _m, given, _o, rows=rows: rows.append(given[0].flatten(0, 1).float())
                )
            )
    generator = torch.Generator().manual_seed(1)
    side, channels = model.config.sample_size, model.config.in_channels
    try:
        for start in range(0, len(words), 32):
            prompts = [f"a photo of a {word}" for word in words[start : start + 32]]
            states, _, pooled, _ = pipe.encode_prompt(
                prompts,
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=SAMPLING["max_sequence_length"],
            )
            for time in _TIMES:
                latents = torch.randn(1, channels, side, side, generator=generator)
                model(
                    hidden_states=latents.expand(len(prompts), -1, -1, -1).to(states),
                    encoder_hidden_states=states,
                    pooled_projections=pooled,
                    timestep=torch.full((len(prompts),), 1000.0 * time),
                )
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def maps(pipe: Any) -> Mapping[str, str]:
    """Streams by the name of the map that each enters by."""
    return {name: str(stream) for name, stream in streams(pipe.transformer).items()}


def entry_uce(settings: uce.Settings) -> Method:
    """UCE at both entry maps, as its published code has them for FLUX."""

    def erase(pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]) -> None:
        encoders = (pipe.text_encoder, pipe.text_encoder_2, None)
        tokenizers = (pipe.tokenizer, pipe.tokenizer_2, None)
        texts = text_streams(pipe.transformer, encoders, tokenizers, flow_reading(pipe.transformer))
        uce.erase_entries(pipe.transformer, texts, concepts, settings)

    return Method(erase, False, dataclasses.asdict(settings))


ALONE, BOTH = "noise alignment alone", "both stages, trained in any case"


def ablation() -> dict[str, Method]:
    """What each stage does, without the check that would drop what does not help."""
    unchecked = {"check_seeds": 0}
    return {
        FAST: library(EraseConfig.fast()),
        ALONE: library(changed(closed=False, alignment=unchecked)),
        BOTH: library(changed(alignment=unchecked)),
    }


def methods_for(table: str, count: int) -> dict[str, Method]:
    """Who is in a table.

    Args:
        count: how many concepts are erased together.
    """
    return ablation() if table == "ablation" else compared(count)


def compared(count: int) -> dict[str, Method]:
    """Who is in every table.

    Args:
        count: how many concepts are erased together; all have the same settings for one and more.
            Those of GEM and ESD were chosen on three tuning words (step sizes of 1e-3 to 3e-3, of
            2e-4 and 1e-3: at GEM's own of 2e-4 nothing went); UCE's are those of the U-Net.
    """
    fast = EraseConfig.fast()
    return {
        DEFAULT: library(EraseConfig()),
        FAST: library(fast),
        SEQUENCE: library(fast, only="sequence"),
        POOLED: library(fast, only="pooled"),
        BLOCKS: blocks(),
        GEM: baseline(gem, gem.Settings(layers=gem.FLOW_LAYERS, learning_rate=2e-3)),
        ESD: baseline(esd, esd.Settings(iterations=60, sampling_steps=12, learning_rate=2e-4)),
        UCE: entry_uce(
            uce.Settings(erase_scale=10.0, expand=True, anchors=ANCHORS | {"object": "object"})
        ),
    }
