"""A short training of the LoRA stage on tiny models."""

from __future__ import annotations

import dataclasses

from realera_fast.alignment import AlignmentConfig, AlignmentPrompts, ClosedForm, align_noise
from realera_fast.mining import MiningConfig
from realera_fast.runtime import Checkpoint, Execution, Processes
from realera_fast.solver import ConceptMap
from realera_fast.text import align

CONFIG = AlignmentConfig(
    steps=12, batch_size=4, trajectories=4, sampling_steps=4, check_seeds=2, learning_rate=2e-2
)
UNCHECKED = dataclasses.replace(CONFIG, check_seeds=0)
QUIET = Execution(progress=False)


def kept_in(folder, run="a", resume=False, accelerator=None):
    """With a checkpoint."""
    return Execution(Processes(accelerator), Checkpoint(folder, run, resume), progress=False)


class Words(list):
    """Aligned prompts, the first of them named."""

    named = 1


def run(parts, config=CONFIG, seed=0, mode="vocabulary", words=("cat",), **options):
    """
    Args:
        options: `execution`, or fields of `AlignmentPrompts`.
    """
    _, text = parts
    templates = ["a photo of a {}", "{}", "a {}", "the {}"]
    trained = Words(align(text, word, "dog", templates) for word in words)
    return trained_on(parts, trained, config, seed=seed, mode=mode, **options)


def trained_on(
    parts,
    trained,
    config=CONFIG,
    *,
    seed=0,
    mode="none",
    preserve=("a ship", "a tree", "a horse"),
    concept_map=None,
    moved=None,
    execution=QUIET,
    **options,
):
    """The stage, on prompts that are aligned already."""
    pipe, text = parts
    given = {"trained": trained, "watched": trained, "empty": text.encode([""])}
    return align_noise(
        pipe.unet,
        pipe.scheduler,
        ClosedForm({"sequence": concept_map or ConceptMap.identity(text.width)}, moved or {}),
        AlignmentPrompts(**given | {"preserve": text.encode(list(preserve))} | options),
        config,
        MiningConfig(mode=mode),
        seed=seed,
        execution=execution,
    )
