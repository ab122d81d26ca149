"""Everything that is compared as an eraser: the library, its variants, and the baselines.

All take a pipeline, edit its denoiser in place, and are told names alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from baselines import esd, mace, oce, rece, speed, uce
from baselines.phrases import ANCHORS, label
from harness.tables import DEFAULT

import realera_fast
from realera_fast import Concept, EraseConfig, Erasure

BASELINES: Mapping[str, ModuleType] = {
    "UCE": uce,
    "MACE, closed form": mace,
    "RECE": rece,
    "SPEED": speed,
    "OCE": oce,
    "ESD": esd,
}
"""By name in tables. Each module has `Settings`, `SWEEP` (the authors' settings first) and
`erase`."""

TUNED: Mapping[str, Any] = {
    "UCE": uce.Settings(expand=True),
    "MACE, closed form": mace.Settings(ridge=1000.0, concept_rows=True),
    "RECE": rece.Settings(
        regularization=1e-3, vocabulary=True, anchors=ANCHORS | {"object": "object"}
    ),
    "SPEED": speed.Settings(threshold=30.0, retain_scale=0.05, expand=True),
    "OCE": oce.Settings(erase_scale=1000.0),
    "ESD": esd.Settings(sampling_steps=20, learning_rate=2e-4, negative_guidance=3.0),
}
"""The settings of each baseline's sweep with the highest mean H_o on words that are not judged
(`bench/results/sweep.jsonl`)."""


TOGETHER: Mapping[str, Any] = {
    "UCE": uce.Settings(preserve_scale=0.1, expand=True, anchors=ANCHORS | {"object": "object"}),
    "MACE, closed form": mace.Settings(preserve_scale=0.01, concept_rows=True),
    "RECE": rece.Settings(regularization=1e-3, vocabulary=True),
    "SPEED": speed.Settings(threshold=10.0, expand=True),
    "OCE": oce.Settings(erase_scale=3000.0, preserve_concept_scale=0.3),
}
"""The same for several at once (table "sweep_several")."""


@dataclass(frozen=True)
class Method:
    """One way to erase."""

    erase: Callable[[Any, Sequence[Concept], int, Sequence[str]], Erasure | None]
    """Of pipeline, concepts, seed, and words that the tokenizer is not to list; an erasure knows
    how to undo itself."""
    seeded: bool
    """Whether the seed changes what comes out; if not, one edit serves all seeds."""
    settings: Mapping[str, Any]


def library(config: EraseConfig) -> Method:
    """`realera_fast.erase` with these settings."""

    def erase(pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]) -> Erasure:
        own = changed(config, vocabulary={"exclude": tuple(exclude)})
        return realera_fast.erase(
            pipe, list(concepts), config=dataclasses.replace(own, seed=seed), progress=False
        )

    drawn = config.mining.mode in ("gaussian", "offset")
    seeded = config.alignment.enabled or (drawn and config.mining.samples is not None)
    return Method(erase, seeded, config.to_dict())


def baseline(module: ModuleType, settings: Any) -> Method:
    """A baseline with these settings."""

    def erase(pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]) -> None:
        # Baselines keep no word that the library erases as a neighbor.
        module.erase(pipe, concepts, settings, seed)

    return Method(erase, module is esd, dataclasses.asdict(settings))


def changed(
    base: EraseConfig | None = None,
    *,
    aligned: bool | None = None,
    closed: bool | None = None,
    **parts: Mapping[str, Any],
) -> EraseConfig:
    """The default settings with some replaced, by part: `mining={"mode": "gaussian"}`."""
    config = base or EraseConfig()
    changes: dict[str, dict[str, Any]] = {name: dict(values) for name, values in parts.items()}
    if aligned is not None:
        changes.setdefault("alignment", {})["enabled"] = aligned
    if closed is not None:
        changes.setdefault("closed_form", {})["enabled"] = closed
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in changes.items()
        },
    )


PAPER: Mapping[str, Any] = {"pairs": {"negative_guidance": 0.0}}
"""Destinations are the anchors."""


def variants() -> dict[str, Method]:
    """The library: its default, then RealEra in each variant of its mining and both stages."""
    found = {
        DEFAULT: library(EraseConfig()),
        "closed form, vocabulary": library(changed(aligned=False)),
        "closed form, no mining": library(changed(aligned=False, mining={"mode": "none"})),
    }
    for mode, name in (
        ("vocabulary", "vocabulary to the anchor"),
        ("gaussian", "gaussian (paper)"),
        ("offset", "offset"),
        ("none", "no mining to the anchor"),
    ):
        config = changed(aligned=False, mining={"mode": mode}, **PAPER)
        found[f"closed form, {name}"] = library(config)
    paper: Mapping[str, Any] = {"mining": {"mode": "gaussian"}, **PAPER}
    found["both stages, gaussian"] = library(changed(**paper))
    found[BOTH] = library(changed(alignment={"negative_guidance": 0.0, "check_seeds": 0}, **paper))
    return found


CLOSED = "closed form, gaussian (paper)"
BOTH = "both stages, gaussian (paper)"
"""RealEra as published: its closed form, and with a noise alignment that follows the anchor."""


def baselines(*, authors: bool = True) -> dict[str, Method]:
    """Each baseline with the tuned settings, and with its authors'."""
    found = {}
    for name, module in BASELINES.items():
        if authors:
            found[f"{name}, authors'"] = baseline(module, module.Settings())
        found[name] = baseline(module, TUNED[name])
    return found


def compared(count: int = 1) -> dict[str, Method]:
    """Who is in every table: the default, RealEra's closed form as published, the baselines.

    Args:
        count: how many concepts are erased together; baselines have settings for one and for more.
    """
    own = variants()
    found = {name: own[name] for name in (DEFAULT, CLOSED)} | baselines(authors=False)
    if count > 1:
        found |= {name: baseline(BASELINES[name], best) for name, best in TOGETHER.items()}
    return found


def by_category() -> dict[str, Method]:
    """Who is in the table of a category: its members found by drawing, and by the text alone."""
    return compared() | {
        f"closed form, {name}": library(changed(aligned=False, mining=mining))
        for name, mining in (
            ("members drawn", {}),
            ("members drawn from 64 words", {"member_words": 64}),
            ("members by their text alone", {"member_words": 0}),
            ("members by their text alone, cosine 0.4", {"member_words": 0, "word_cosine": 0.4}),
        )
    }


def sweep() -> dict[str, Method]:
    """Every setting of every baseline's sweep."""
    return {
        f"{name}: {label(settings)}": baseline(module, settings)
        for name, module in BASELINES.items()
        for settings in module.SWEEP
    }


def ablation() -> dict[str, Method]:
    """RealEra's parts, one by one, without the check that would drop what does not help."""
    found = {}

    def add(name: str, **changes: Any) -> None:
        changes = {"aligned": True, "pairs": pairs} | changes
        changes["alignment"] = {"check_seeds": 0} | dict(changes.get("alignment", {}))
        found[name] = library(changed(**changes))

    paper: Mapping[str, Any] = {"mode": "gaussian"}
    pairs: Mapping[str, Any] = {"negative_guidance": 0.0}
    stages: Mapping[str, Mapping[str, Any]] = {
        "closed form": {"aligned": False},
        "alignment": {"closed": False},
        "both": {},
    }
    for stage, switches in stages.items():
        for neighbors in (True, False):
            for beyond in (True, False):
                mining = dict(paper) | {"neighbor_scale": float(neighbors)}
                mining |= {} if beyond else {"beyond_scale": 0.0}
                name = f"{stage}{', neighbors' * neighbors}{', beyond' * beyond}"
                align = {} if beyond else {"beyond_scale": 0.0}
                add(name, mining=mining, alignment=align, **switches)
    closed: Mapping[str, Any] = {"aligned": False}
    for guidance in (0.25, 0.5, 1.0, 1.5):
        for mode in ("gaussian", "none", "vocabulary"):
            add(
                f"closed form, {mode}, guidance {guidance:g}",
                mining={"mode": mode},
                pairs={"negative_guidance": guidance},
                **closed,
            )
    add("closed form, vocabulary, guidance 0", mining={"mode": "vocabulary"}, **closed)
    for scale in (1.0, 10.0, 40.0, 160.0):
        add(
            f"closed form, vocabulary, guidance 0.75, preserve {scale:g}",
            vocabulary={"preserve_scale": scale},
            pairs={},
            **closed,
        )
    add(
        "closed form, no preserve prior", mining=paper, vocabulary={"preserve_scale": 0.0}, **closed
    )
    add(
        "both, no preserve prior",
        mining=paper,
        vocabulary={"preserve_scale": 0.0},
        alignment={"preserve_scale": 0.0},
    )
    for samples in (5, 50, 500):
        add(f"closed form, {samples} samples", mining={**paper, "samples": samples}, **closed)
    for low, high in ((0.3, 0.9), (0.7, 0.9), (0.5, 0.7), (0.5, 0.97)):
        mining = {**paper, "min_cosine": low, "max_cosine": high}
        add(f"closed form, S1 {low}, S2 {high}", mining=mining, **closed)
    for distance in (0.6, 1.0):
        mining = {**paper, "max_distance": distance, "beyond_distance": distance + 0.6}
        add(f"closed form, D1 {distance}, D2 {distance + 0.6}", mining=mining, **closed)
    for scale in (0.25, 4.0):
        add(
            f"closed form, neighbors x {scale:g}",
            mining={**paper, "neighbor_scale": scale},
            **closed,
        )
    for factor in (0.1, 10.0):
        ridge = EraseConfig().closed_form.ridge * factor
        add(
            f"closed form, ridge x {factor:g}", mining=paper, closed_form={"ridge": ridge}, **closed
        )
    for rank in (1, 16):
        add(
            f"both, LoRA rank {rank}",
            mining=paper,
            alignment={"r": rank, "lora_alpha": float(rank)},
        )
    return found
