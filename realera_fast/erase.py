"""The one verb: pairs, mining, closed form, noise alignment, and a report."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera_fast import alignment, mining, philox, report
from realera_fast import unet as unets
from realera_fast.alignment import Alignment, align_noise
from realera_fast.closed_form import NormalEquations, Pairs, Solution
from realera_fast.concept_map import ConceptMap
from realera_fast.concepts import Concept, parse_concepts
from realera_fast.config import EraseConfig
from realera_fast.erasure import Erasure
from realera_fast.incremental import IncrementalSystem
from realera_fast.pairs import AlignedPrompts, ConceptPrompts, fill
from realera_fast.text import TextModel
from realera_fast.vocabulary import (
    Vocabulary,
    describe,
    encode_vocabulary,
    preserve_gram,
)

logger = logging.getLogger(__name__)


class _Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 4)
        logger.info("%s: %.2f s", name, self.seconds[name])


def neighbor_words(
    text: TextModel,
    vocabulary: Vocabulary,
    concepts: Sequence[Concept],
    config: mining.MiningConfig,
    *,
    keep: Sequence[str] = (),
) -> dict[str, tuple[str, ...]]:
    """Words of the tokenizer that lie in the neighborhood of each concept, nearest first.

    Args:
        keep: words that are never neighbors (preserved words and anchors).

    Returns:
        Neighbor words by target; a word near two concepts goes to the nearer one.
    """
    found: dict[str, list[tuple[float, str]]] = {c.target: [] for c in concepts}
    if not vocabulary.words or not concepts:
        return {target: () for target in found}
    taken = {word.casefold() for c in concepts for word in (*c.words, c.destination or "")}
    taken |= {word.casefold() for word in keep}
    # Words inside a named phrase ("van" in "van gogh") are parts of it, not neighbors.
    taken |= {part for phrase in list(taken) for part in phrase.split()}
    scores = torch.stack(
        [vocabulary.similarity(describe(text, concept.words).mean(dim=0)) for concept in concepts]
    )
    best, owner = scores.max(dim=0)
    for index, word in enumerate(vocabulary.words):
        if word.casefold() not in taken and float(best[index]) >= config.word_cosine:
            found[concepts[int(owner[index])].target].append((float(best[index]), word))
    return {
        target: tuple(word for _, word in sorted(words, reverse=True)[: config.max_words])
        for target, words in found.items()
    }


def prior_equations(
    preserved: Sequence[Tensor], prior: Tensor, config: EraseConfig
) -> NormalEquations:
    """What keeps its place whatever is erased.

    Args:
        preserved: `[p, t, d]` prompts of words that keep their place, one tensor a word.
        prior: `[d, d]` mean second moments of the preserve prior.
    """
    equations = NormalEquations(prior.shape[0], device=prior.device)
    equations.update_moments(config.vocabulary.preserve_scale * prior)
    for hidden in preserved:
        rows = hidden[:, 1:].flatten(0, 1)
        weight = torch.full((len(rows),), config.vocabulary.preserve_scale / len(rows))
        equations.update(Pairs(rows, rows, weight.to(rows.device)))
    return equations


def add_word(
    equations: NormalEquations,
    prompts: AlignedPrompts,
    prior: Tensor,
    config: EraseConfig,
    *,
    number: int | None,
) -> NormalEquations:
    """Adds a word's rows, and if it was named its neighbor and beyond rows. Returns the equations.

    Args:
        prior: `[d, d]` mean second moments of the preserve prior.
        number: of the named word's noise; None for a mined word.
    """
    rows = prompts.weight > 0
    scale = config.mining.neighbor_scale if number is None else config.erase_scale
    equations.update(
        Pairs(prompts.source[rows], prompts.destination[rows], scale * prompts.weight[rows])
    )
    if number is not None and config.mining.mode in ("gaussian", "covariance", "offset"):
        mining.add_neighbors(
            equations,
            prompts.source,
            prompts.destination,
            prompts.weight,
            config.mining,
            seed=philox.fold_seed(config.seed, number),
            covariance=prior if config.mining.mode == "covariance" else None,
        )
    return equations


def solve(
    equations: NormalEquations,
    parts: Mapping[str, NormalEquations],
    prior: Tensor,
    config: EraseConfig,
) -> tuple[Solution, IncrementalSystem | None]:
    """The concept map T, and the system it is from if that is kept.

    Args:
        equations: what keeps its place; all rows, if the system isn't kept.
        parts: rows of each concept, if it is.
        prior: `[d, d]` mean second moments of the preserve prior; the ridge is relative to its mean
            diagonal.
    """
    options = config.closed_form
    if not options.enabled:
        return NormalEquations(prior.shape[0], device=prior.device).solve(ridge=1.0), None
    scale = float(prior.diagonal().mean())
    if not scale:
        rows = (equations, *parts.values())
        scale = sum(float(part.gram.diagonal().mean()) for part in rows) or 1.0
    ridge = options.ridge * scale
    if not options.keep_system:
        return equations.solve(ridge=ridge, rank_tolerance=options.rank_tolerance), None
    system = IncrementalSystem(equations, ridge=ridge)
    for name, part in parts.items():
        system.add(name, part)
    return system.solve(rank_tolerance=options.rank_tolerance), system


@torch.inference_mode(False)
@torch.enable_grad()
def erase(
    unet: Any,
    text_encoder: Any,
    concepts: str | Concept | Sequence[str | Concept],
    *,
    tokenizer: Any = None,
    preserve: Sequence[str] = (),
    scheduler: Any = None,
    config: EraseConfig | None = None,
    latents: Mapping[str, Tensor] | None = None,
    accelerator: Any = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Erasure:
    """Removes concepts from a diffusion model, in place (RealEra, arXiv 2410.09140).

    The cross-attention key and value projections of `unet` are edited transactionally: any failure,
    an interrupt included, leaves them bit-identical. `dtype` and `device` are the U-Net's.

    Args:
        unet: a `UNet2DConditionModel` with text cross-attention (fp32, bf16 or fp16; CPU or CUDA).
        text_encoder: its CLIP text encoder; never changed.
        concepts: strings, `Concept`s or a mix; `"Van Gogh=art"` names an anchor.
        tokenizer: the encoder's tokenizer; `None` looks beside the encoder's own files.
        preserve: words that must keep their meaning, in addition to the vocabulary's.
        scheduler: noise scheduler of the pipeline; `None` looks beside the U-Net's own files and
            falls back to Stable Diffusion's schedule. Used by the alignment stage alone.
        config: settings of all stages.
        latents: `[n, c, h, w]` encoded pictures by named word (the VAE's latents times its scaling
            factor): alignment noises these in place of denoising the word itself.
        accelerator: an `accelerate.Accelerator`: its processes share the alignment stage (start
            the script with `accelerate launch`; each erases its own copy of the model and all get
            the same result) and its trackers get the losses.
        checkpoint_dir: folder where the alignment stage keeps a checkpoint of a few megabytes, or
            more for large latents.
        resume: continue from that checkpoint, if there is one; the result is that of a run that
            was never stopped.
        progress: draw progress bars; `None` follows diffusers' switch.

    Returns:
        A frozen `Erasure`: undo it with `restore_`, keep it with `save` or `save_lora`, read
        `report` to see what moved.

    Raises:
        ValueError, TypeError: unusable input; the message names the argument and what to do.
        CheckpointError: the checkpoint is broken or of another run (a ValueError).
    """
    config = config or EraseConfig()
    if isinstance(preserve, str):
        raise TypeError(f"preserve: expected a list of strings, got the string {preserve!r}")
    if not isinstance(config, EraseConfig):
        raise TypeError(f"config: expected an EraseConfig, got {type(config).__name__}")
    parsed = parse_concepts(concepts, preserve=preserve)
    layers = unets.projections(unet)
    if scheduler is not None and not hasattr(scheduler, "config"):
        raise TypeError(
            "scheduler: expected a diffusers scheduler such as pipe.scheduler, got "
            f"{type(scheduler).__name__}"
        )
    channels = (unet.config.in_channels, unet.config.out_channels)
    if config.alignment.enabled and channels[0] != channels[1]:
        raise ValueError(
            f"unet: it takes {channels[0]} channels and gives {channels[1]} (inpainting?), which "
            "the alignment stage can't denoise; set alignment.enabled=False"
        )
    if resume and checkpoint_dir is None:
        raise ValueError("resume: expected a checkpoint_dir to continue from, got none")
    size = config.alignment.latent_size or unet.config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    latents = _checked_latents(latents, parsed, (channels[0], *sides))
    text = TextModel(text_encoder, tokenizer)
    if text.width != unets.text_width(unet):
        raise ValueError(
            f"text_encoder: its embeddings have width {text.width}, but the U-Net's "
            f"cross-attention takes {unets.text_width(unet)}; pass the encoder of this U-Net"
        )
    provenance = _provenance(unet, config)
    if not parsed:
        logger.warning("concepts is empty: nothing is erased")
        empty_report = report.Report((), {}, {}, dict.fromkeys(layers, 0.0), {}, {}, ()).to_dict()
        nothing = ConceptMap.identity(text.width)
        result = Erasure(nothing, {}, (), config.to_dict(), provenance, empty_report)
        result.apply_(unet)
        return result

    clock = _Clock()
    with clock.stage("prior"):
        vocabulary = encode_vocabulary(text, config.vocabulary, progress=progress)
    anchors = tuple(dict.fromkeys(c.destination for c in parsed if c.destination))
    kept_words = tuple(dict.fromkeys((*(" ".join(w.split()) for w in preserve), *anchors)))
    with clock.stage("mining"):
        # In every mode: words of the neighborhood are not preserved, whoever moves them.
        near = neighbor_words(text, vocabulary, parsed, config.mining, keep=kept_words)
        gone = [w for c in parsed for w in (*c.words, *near[c.target])]
        mined: dict[str, tuple[str, ...]] = {c.target: () for c in parsed}
        if config.mining.mode == "vocabulary":
            mined = near
            if not vocabulary.words:
                logger.warning("the tokenizer offers no whole words: no neighbors are mined")
    with clock.stage("pairs"):
        prompts = ConceptPrompts(text, parsed, mined, config.pairs, avoid=gone)
        kind_of = {c.destination: c.kind for c in parsed}
        kept = [_kept(text, word, kind_of.get(word, "object"), config) for word in kept_words]
    with clock.stage("equations"):
        prior, _ = preserve_gram(text, vocabulary, gone)
        equations, parts = prior_equations(kept, prior, config), {}
        for place, concept in enumerate(parsed):
            into = equations
            if config.closed_form.keep_system:
                into = parts[concept.target] = NormalEquations(text.width, device=prior.device)
            for number in prompts.numbers(place):
                named = number if number < prompts.named else None
                add_word(into, prompts[number], prior, config, number=named)
    with clock.stage("closed form"):
        solution, system = solve(equations, parts, prior, config)
        # The result is small and outlives the model: it rests on the CPU.
        concept_map = solution.map.to("cpu")

    stayers = _stayers(vocabulary, gone, kept_words)
    aligned = alignment.NOT_ALIGNED
    before = {name: module.weight.detach().clone() for name, module in layers.items()}
    guarded: Mapping[str, Any] = layers
    if not set(config.alignment.target_modules) <= {"to_k", "to_v"}:
        guarded = layers | unets.queries_and_outputs(unet)
    with unets.transaction(unet, guarded):
        moves = solution.map.rank or not config.closed_form.enabled
        if config.alignment.enabled and moves:
            noise = scheduler or alignment.find_scheduler(unet)
            run = ""
            if checkpoint_dir is not None:
                run = _run(text, parsed, kept_words, config, provenance, noise, latents)
            with clock.stage("alignment"):
                aligned = align_noise(
                    unet,
                    noise,
                    solution.map,
                    prompts=prompts,
                    watched=ConceptPrompts(text, parsed, near, config.pairs, avoid=gone),
                    preserve=text.encode([fill("a photo of a {}", w) for w in stayers] or [""]),
                    empty=text.encode([""]),
                    config=config.alignment,
                    mining_config=config.mining,
                    noise_factor=(
                        mining.noise_factor(prior) if config.mining.mode == "covariance" else None
                    ),
                    latents=latents,
                    seed=config.seed,
                    accelerator=accelerator,
                    checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir),
                    resume=resume,
                    run=run,
                    progress=progress,
                )
        hidden = {name: module for name, module in guarded.items() if name not in layers}
        before |= {name: module.weight.detach().clone() for name, module in hidden.items()}
        draft = Erasure(concept_map, aligned.lora, parsed, config.to_dict(), provenance, {})
        edited = draft.edited_weights(before)
        with clock.stage("report"):
            found = _report(
                before,
                edited,
                list(layers),
                prompts,
                kept_words,
                stayers,
                text,
                solution,
                aligned,
                mined,
            )
        full = report.Report(**found, seconds=clock.seconds).to_dict()
        result = Erasure(
            concept_map, aligned.lora, parsed, config.to_dict(), provenance, full, system
        )
        result.apply_(unet)
    return result


def _checked_latents(
    latents: Mapping[str, Tensor] | None, concepts: Sequence[Concept], shape: tuple[int, ...]
) -> Mapping[str, Tensor]:
    """The given latents, if they are of named words."""
    named = {word for concept in concepts for word in concept.words}
    for word, values in (latents or {}).items():
        if word not in named:
            raise ValueError(f"latents: {word!r} is not to be erased; {sorted(named)} are")
        fits = isinstance(values, Tensor) and values.dim() == 4 and values.shape[1:] == shape
        if not fits or not len(values) or not bool(values.isfinite().all()):
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"latents[{word!r}]: expected finite [n, {', '.join(map(str, shape))}], got {got}; "
                "encode pictures of that size (AlignmentConfig.latent_size) with the pipeline's "
                "VAE and multiply by its scaling factor"
            )
    return latents or {}


def _run(
    text: TextModel,
    concepts: Sequence[Concept],
    kept: Sequence[str],
    config: EraseConfig,
    provenance: Mapping[str, Any],
    scheduler: Any,
    latents: Mapping[str, Tensor],
) -> str:
    """Identifies what a checkpoint belongs to: everything that the result depends on."""
    parts = [
        [concept.to_dict() for concept in concepts], list(kept), config.to_dict(),
        provenance["base_hashes"], provenance["versions"], text.fingerprint(),
        dict(scheduler.config), unets.weights_hash(latents, torch.float32),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _kept(text: TextModel, word: str, kind: str, config: EraseConfig) -> Tensor:
    """`[p, t, d]` prompts of a word that keeps its place."""
    templates = [t for t in config.pairs.of(kind) if "{word}" not in t] or ["{}"]
    prompts = [prompt for t in templates if not text.overflow(prompt := fill(t, word))]
    if not prompts:
        raise ValueError(
            f"preserve: {word!r} needs more tokens than the text encoder holds "
            f"({text.max_tokens} with begin- and end-of-text); {text.overflow(word)!r} would be cut"
        )
    return text.encode(prompts)


def _stayers(
    vocabulary: Vocabulary, gone: Sequence[str], kept_words: Sequence[str], count: int = 64
) -> list[str]:
    """Words that should not move: the named ones, then an even sample of the vocabulary."""
    leaving = {word.casefold() for word in gone}
    rest = [w for w in vocabulary.words if w.casefold() not in leaving and w not in kept_words]
    step = max(1, math.ceil(len(rest) / count))
    return [*kept_words, *rest[::step]]


def _report(
    before: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
    projections: Sequence[str],
    prompts: ConceptPrompts,
    kept_words: Sequence[str],
    stayers: Sequence[str],
    text: TextModel,
    solution: Solution,
    aligned: Alignment,
    mined: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    movement = report.Movement(*([w[name] for name in projections] for w in (before, edited)))
    found: dict[int, report.WordReport] = {}
    for place, concept in enumerate(prompts.concepts):
        # Encoded a second time: to keep all words' prompts would take gigabytes.
        for number in prompts.numbers(place):
            word = prompts[number]
            role = "target" if word.word == concept.target else "synonym"
            found[number] = report.WordReport(
                word.word,
                role if number < prompts.named else "neighbor",
                concept.anchor_name,
                movement.moved(word),
                None,
            )
    words = [found[number] for number in range(len(prompts))]
    hidden = text.encode([fill("a photo of a {}", word) for word in stayers])
    for stayer, drift in zip(stayers, movement.drifts(hidden), strict=True):
        role = "preserved" if stayer in kept_words else "vocabulary"
        words.append(report.WordReport(stayer, role, None, None, drift))
    outcome = aligned.to_dict()
    return {
        "words": tuple(words),
        "neighbors": dict(mined),
        "solve": dataclasses.asdict(solution.info),
        "layers": {
            name: float((edited[name].float() - weight.float()).norm() / weight.float().norm())
            for name, weight in before.items()
        },
        "alignment": outcome,
        "warnings": report.warnings_of(words, outcome),
    }


def _provenance(unet: Any, config: EraseConfig) -> dict[str, Any]:
    versions = {}
    for package in ("realera_fast", "torch", "diffusers", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    weight = next(iter(unets.projections(unet).values())).weight
    return {
        "versions": versions,
        "model_class": type(unet).__name__,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "base_hashes": unets.base_hashes(unet),
        "seed": config.seed,
    }
