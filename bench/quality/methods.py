"""Everything that is compared as an eraser: the library, its variants, and the baselines.

All take a pipeline, edit its denoiser in place (AdvUnlearn: its text encoder; at run time: nothing,
but prompts on their way), and are told names alone.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from baselines import (
    adv_unlearn,
    erase_flow,
    esd,
    gem,
    mace,
    mace_lora,
    oce,
    race,
    rece,
    semantic_surgery,
    speed,
    stereo,
    uce,
)
from baselines.phrases import ANCHORS, label
from baselines.semantic_surgery import Surgery
from harness.tables import DEFAULT, EXTENDED, FAST, FIRST, GATED, IN_TURN, STRICT, TEXT, UNGATED

import realera_fast
from realera_fast import Concept, EraseConfig, Erasure

TRAINED: Mapping[str, ModuleType] = {
    "ESD": esd,
    "MACE": mace_lora,
    "RACE": race,
    "AdvUnlearn": adv_unlearn,
    "STEREO": stereo,
    "EraseFlow": erase_flow,
    "GEM": gem,
}
"""The baselines that train: they follow their seed, and all but ESD and MACE are made against
attacks."""
ROBUST = tuple(name for name in TRAINED if name not in ("ESD", "MACE"))
"""These take minutes each: they stand in the tables of objects and of attacks alone."""

SURGERY = "Semantic Surgery (run time)"

BASELINES: Mapping[str, ModuleType] = {
    "UCE": uce,
    "MACE, closed form": mace,
    "RECE": rece,
    "SPEED": speed,
    "OCE": oce,
    SURGERY: semantic_surgery,
    **TRAINED,
}
"""By name in tables. Each module has `Settings`, `SWEEP` (the authors' settings first) and
`erase`."""

TUNED: Mapping[str, Any] = {
    "UCE": uce.Settings(erase_scale=10.0, expand=True, anchors=ANCHORS | {"object": "object"}),
    "MACE, closed form": mace.Settings(ridge=1000.0, concept_rows=True),
    "RECE": rece.Settings(rounds=2, vocabulary=True, anchors=ANCHORS | {"object": "object"}),
    "SPEED": speed.Settings(threshold=30.0, expand=True),
    "OCE": oce.Settings(erase_scale=3000.0, preserve_concept_scale=0.3),
    SURGERY: semantic_surgery.Settings(
        beta=semantic_surgery.AUTHORS | {"object": -0.22, "style": -0.09}, gamma=0.05
    ),
    # A tie with 1e-5 and concept_rows, which the authors leave out.
    "MACE": mace_lora.Settings(ridge=1000.0, learning_rate=1e-4),
    # On two words, cow and sailboat; EraseFlow on cow.
    "ESD": esd.Settings(learning_rate=1e-5, sampling_steps=20, unconditional=True),
    "RACE": race.Settings(learning_rate=2e-5),
    "AdvUnlearn": adv_unlearn.Settings(learning_rate=2e-5),
    "STEREO": stereo.Settings(learning_rate=1e-4),
    "EraseFlow": erase_flow.Settings(iterations=60, learning_rate=5e-4),
    "GEM": gem.Settings(layers=("attn2.to_k", "attn2.to_v")),
}
"""The settings of each baseline's sweep with the highest mean H_o on words that are not judged
(`bench/results/sweep.jsonl`)."""


TOGETHER: Mapping[str, Any] = {
    "UCE": uce.Settings(preserve_scale=0.1, expand=True, anchors=ANCHORS | {"object": "object"}),
    "MACE, closed form": mace.Settings(preserve_scale=0.01, concept_rows=True),
    "RECE": rece.Settings(regularization=1e-3, vocabulary=True),
    "SPEED": speed.Settings(threshold=10.0, expand=True),
    "OCE": oce.Settings(erase_scale=3000.0, preserve_concept_scale=0.3),
    SURGERY: semantic_surgery.Settings(beta=-0.28, gamma=0.05),
}
"""The same for several at once (table "sweep_several")."""


@dataclass(frozen=True)
class Method:
    """One way to erase."""

    erase: Callable[[Any, Sequence[Concept], int, Sequence[str]], Erasure | Surgery | None]
    """Of pipeline, concepts, seed, and words that the tokenizer is not to list; an erasure knows
    how to undo itself, and a surgery has nothing to undo."""
    seeded: bool
    """Whether the seed changes what comes out; if not, one edit serves all seeds."""
    settings: Mapping[str, Any]
    drawn: Callable[[Any, Any], Any] | None = None
    """What draws of pipeline and what `erase` gave, for methods of run time: the weights stay as
    they were. None draws from the edited weights."""


def library(config: EraseConfig, *, accelerator: Any = None, progress: bool = False) -> Method:
    """`realera_fast.erase` with these settings; the accelerator's processes share the work."""

    def erase(pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]) -> Erasure:
        given = config.vocabulary.exclude
        own = changed(config, vocabulary={"exclude": (*given, *exclude)})
        return realera_fast.erase(
            pipe,
            list(concepts),
            config=dataclasses.replace(own, seed=seed),
            progress=progress,
            accelerator=accelerator,
        )

    drawn = config.mining.mode in ("gaussian", "offset")
    seeded = config.alignment.enabled or (drawn and config.mining.samples is not None)
    return Method(erase, seeded, config.to_dict())


def baseline(module: ModuleType, settings: Any) -> Method:
    """A baseline with these settings."""

    def erase(
        pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]
    ) -> Surgery | None:
        # Baselines keep no word that the library erases as a neighbor.
        found: Surgery | None = module.erase(pipe, concepts, settings, seed)
        return found

    drawn = _operated if module is semantic_surgery else None
    return Method(erase, module in TRAINED.values(), dataclasses.asdict(settings), drawn)


def _operated(pipe: Any, surgery: Surgery) -> Any:
    return surgery.pipeline(pipe)


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


CLOSED = "RealEra, closed form (paper)"
BOTH = "RealEra, both stages (paper)"
"""RealEra as published: its closed form, and with a noise alignment that follows the anchor."""


def variants() -> dict[str, Method]:
    """The library as it comes, its presets, and RealEra as published."""
    paper = EraseConfig.paper()
    return {
        DEFAULT: library(EraseConfig()),
        STRICT: library(EraseConfig.strict()),
        FAST: library(EraseConfig.fast()),
        CLOSED: library(changed(paper, aligned=False)),
        BOTH: library(paper),
    }


def run_time() -> dict[str, Method]:
    """The prompt map in place of edited weights, with its gate and without, and the same edit."""
    text = changed(EraseConfig.fast(), closed_form={"space": "text"})

    def mapped(gate: bool) -> Method:
        def drawn(pipe: Any, erasure: Erasure) -> Any:
            return realera_fast.guard(pipe, erasure, gate=gate).pipeline()

        return dataclasses.replace(library(text), drawn=drawn)

    return {GATED: mapped(True), UNGATED: mapped(False), TEXT: library(text)}


def baselines(*, authors: bool = True) -> dict[str, Method]:
    """Each baseline with the tuned settings, and with its authors', or scaled from theirs."""
    found = {}
    for name, module in BASELINES.items():
        if authors and module.Settings() != TUNED[name]:
            found[f"{name}, {label(module.Settings())}"] = baseline(module, module.Settings())
        found[name] = baseline(module, TUNED[name])
    return found


def named(patterns: Sequence[str], *, tuned: bool) -> dict[str, Method]:
    """Presets, run-time methods and baselines by their names in tables, or patterns of these.

    Args:
        tuned: whether baselines have the settings of their sweeps; else those of their authors, or
            scaled from these, which their names then say.

    Raises:
        SystemExit: a name that nobody has.
    """
    known = {name: (name, method) for name, method in (variants() | run_time()).items()}
    for name, module in BASELINES.items():
        settings = TUNED[name] if tuned else module.Settings()
        shown = name if tuned else f"{name}, {label(settings)}"
        known[name] = shown, baseline(module, settings)
    found: dict[str, Method] = {}
    for pattern in patterns:
        matching = [known[name] for name in known if fnmatch.fnmatch(name, pattern)]
        if not matching:
            raise SystemExit(f"--methods: expected some of {', '.join(known)}; got {pattern!r}")
        found |= dict(matching)
    return found


def compared(count: int = 1) -> dict[str, Method]:
    """Who is in every table: the default, its closed form alone, RealEra's, the baselines.

    Args:
        count: how many concepts are erased together; baselines have settings for one and for more.
    """
    own = variants()
    found = {name: own[name] for name in (DEFAULT, STRICT, FAST, CLOSED)}
    found |= run_time() | baselines(authors=False)
    found = {name: method for name, method in found.items() if name not in ROBUST}
    if count > 1:
        found |= {name: baseline(BASELINES[name], best) for name, best in TOGETHER.items()}
    return found


def attacked() -> dict[str, Method]:
    """Who is attacked: the same, and what is made against attacks."""
    own = {name: baseline(BASELINES[name], TUNED[name]) for name in ROBUST}
    return compared() | own


def costed(count: int) -> dict[str, Method]:
    """Whose seconds and memory are measured: who is compared; of one, who is attacked too."""
    return compared(count) if count > 1 else attacked()


def in_turn() -> dict[str, Method]:
    """The closed form of all concepts in one erasure, of each on top of those before it, of each
    with what those before it took, and of the first alone."""
    fast = library(EraseConfig.fast())

    def extended(
        pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]
    ) -> Erasure | None:
        config = dataclasses.replace(EraseConfig.fast(), seed=seed)
        last: Erasure | None = None
        for concept in concepts:
            last = realera_fast.erase(pipe, [concept], config=config, progress=False, extends=last)
        return last

    def stacked(pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]) -> None:
        for concept in concepts:
            fast.erase(pipe, [concept], seed, exclude)

    def first(
        pipe: Any, concepts: Sequence[Concept], seed: int, exclude: Sequence[str]
    ) -> Erasure | None:
        return fast.erase(pipe, concepts[:1], seed, exclude)

    return {
        FAST: fast,
        IN_TURN: Method(stacked, fast.seeded, fast.settings),
        EXTENDED: Method(extended, fast.seeded, fast.settings),
        FIRST: Method(first, fast.seeded, fast.settings),
    }


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


def parts() -> dict[str, Method]:
    """The closed form of the text, which takes all of them, with each of its parts taken away or
    put in another's place, and that of the values."""
    fixed: Mapping[str, Any] = {"preserve_scale": 40.0}
    past: Mapping[str, Any] = {"negative_guidance": 0.75}
    none: Mapping[str, Any] = {"mode": "none"}
    without: Mapping[str, Mapping[str, Any]] = {
        "no neighbors": {"mining": none},
        "neighbors by the lexicon alone": {"mining": {"candidates": 0}},
        "Gaussian noise for neighbors": {"mining": {"mode": "gaussian"}},
        "a line at cosine 0.6": {"mining": {"word_cosine": 0.6}},
        "no relatives held": {"mining": {"relative_words": 0}},
        "preserve scale 40": {"vocabulary": fixed},
        "guidance 0": {"pairs": {"negative_guidance": 0.0}},
        "guidance 0.75": {"pairs": past},
        "preserve scale 40, guidance 0.75": {"vocabulary": fixed, "pairs": past},
        "the mean word for anchor": {"pairs": {"anchors": "mean"}},
        "none of these": {
            "mining": {**none, "relative_words": 0},
            "vocabulary": fixed,
            "pairs": {**past, "anchors": "mean"},
        },
    }
    text: Mapping[str, Any] = {"closed_form": {"space": "text"}}
    found = {
        FAST: EraseConfig.fast(),
        TEXT: changed(EraseConfig.fast(), **text),
        "closed form of the values by the name alone": changed(
            EraseConfig.fast(), closed_form={"space": "values", "value_neighbors": 0.0}
        ),
        "closed form of the values, guidance 0": changed(
            EraseConfig.fast(), closed_form={"space": "values", "value_guidance": 0.0}
        ),
    } | {
        f"closed form, {name}": changed(EraseConfig.fast(), **text, **changes)
        for name, changes in without.items()
    }
    return {name: library(config) for name, config in found.items()}


def sweep() -> dict[str, Method]:
    """Every setting of every baseline's sweep."""
    return {
        f"{name}: {label(settings)}": baseline(module, settings)
        for name, module in BASELINES.items()
        for settings in module.SWEEP
    }


def ablation() -> dict[str, Method]:
    """RealEra's parts, one by one, without the check that would drop what does not help."""
    stages: Mapping[str, Mapping[str, Any]] = {
        "closed form": {"aligned": False},
        "alignment": {"closed": False},
        "both": {},
    }
    found = {}
    for stage, switches in stages.items():
        for neighbors in (True, False):
            for beyond in (True, False):
                mining: dict[str, Any] = {"neighbor_scale": float(neighbors)}
                alignment: dict[str, Any] = {}
                if not neighbors:
                    alignment["adversary"] = "none"
                if not beyond:
                    mining["beyond_scale"] = alignment["beyond_scale"] = 0.0
                name = f"{stage}{', neighbors' * neighbors}{', beyond' * beyond}"
                found[name] = library(
                    changed(EraseConfig.paper(), mining=mining, alignment=alignment, **switches)
                )
    return found
