"""The one verb: pairs, mining, closed form, noise alignment, and a report."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from realera_fast import alignment
from realera_fast.alignment import Alignment, align_noise
from realera_fast.config import EraseConfig
from realera_fast.equations import gather
from realera_fast.erasure import Erasure, history_of, report
from realera_fast.mining import STEPS as MEMBER_STEPS
from realera_fast.mining import MemberSearch, can_be_drawn, guidance_cosine, neighbor_words
from realera_fast.models import (
    Family,
    RefusedModelError,
    as_read,
    base_hashes,
    check_runnable,
    check_trainable,
    check_width,
    components_of,
    family_of,
    is_pipeline,
    projections,
    queries_and_outputs,
    refuse_adapters,
    streams,
    text_streams,
    transaction,
    weights_hash,
    why_not_aligned,
)
from realera_fast.runtime import (
    Processes,
    checkpoint,
    clean,
    clean_names,
    cpu_warnings,
    exclusive,
    folded,
    unwrapped,
)
from realera_fast.runtime import progress as progress_bars
from realera_fast.solver import ConceptMap, IncrementalSystem, NormalEquations, Solution
from realera_fast.text import (
    Concept,
    ConceptPrompts,
    Text,
    TextWithPooled,
    Vocabulary,
    check_names,
    encode_vocabulary,
    fill,
    parse_concepts,
)
from realera_fast.unet import config_of, ddim_of

logger = logging.getLogger(__name__)


class _Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.seconds[name] = round(seconds, 4)
        logger.info("%s: %.2f s", name, self.seconds[name])


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


@exclusive
def erase(
    model: Any,
    text_encoders: Any = None,
    concepts: str | Concept | Iterable[str | Concept] | None = None,
    *,
    tokenizer: Any = None,
    preserve: Iterable[str] | None = (),
    scheduler: Any = None,
    reading: Family | None = None,
    config: EraseConfig | None = None,
    latents: Mapping[str, Tensor] | None = None,
    accelerator: Any = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Erasure:
    """Removes concepts from a diffusion model, in place (RealEra, arXiv 2410.09140).

    ``erase(pipe, concepts)`` takes a whole pipeline, ``erase(model, text_encoders, concepts)`` its
    parts. The linear maps that text enters the model through (`denoiser.streams`) are edited
    transactionally: any failure, an interrupt included, leaves them bit-identical. `dtype` and
    `device` are the model's.

    Args:
        model: a U-Net or transformer of diffusers (fp32, bf16 or fp16; CPU or CUDA), or a pipeline,
            classic or modular, that has one. 16 bits on a CPU that does not multiply them natively
            are slow, and a warning says so.
        text_encoders: its text encoder, or a tuple of them in the order of the pipeline; never
            changed. With a pipeline the concepts stand here.
        concepts: strings, `Concept`s or a mix; `"Van Gogh=art"` names an anchor. Two names are the
            same if they are the same tokens to every text encoder: "cat" and "Cat" are to CLIP, not
            to T5.
        tokenizer: the encoder's tokenizer, or a tuple of them; `None` looks beside the encoders'
            own files.
        preserve: words that must keep their meaning, in addition to the vocabulary's.
        scheduler: noise scheduler of the pipeline; `None` looks beside the model's own files and
            falls back to Stable Diffusion's schedule. Used by the alignment stage and to find the
            members of a category.
        reading: where text enters the model and how its pipeline encodes prompts
            (`families.Family`), for models that this library does not know, or for prompts that are
            encoded otherwise than by the pipeline's defaults; None looks it up (`family_of`) and
            refuses an unknown model.
        config: settings of all stages.
        latents: `[n, c, h, w]` encoded pictures by named word (the VAE's latents times its scaling
            factor): alignment noises these in place of denoising the word itself.
        accelerator: an `accelerate.Accelerator`: its processes share the search for members of a
            category and the alignment stage (start the script with `accelerate launch`; each erases
            its own copy of the model and all get the same result), its trackers get the losses.
        checkpoint_dir: folder where the run keeps what it needs to go on: members found so far,
            sums of the concepts read so far, then a checkpoint of the alignment stage (megabytes).
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
    if is_pipeline(model):
        if (concepts is None) == (text_encoders is None) or tokenizer is not None:
            raise TypeError(
                "erase: with a pipeline expected erase(pipe, concepts) without text encoders or "
                "tokenizers; with its parts, pass pipe.unet or pipe.transformer first"
            )
        pipe = components_of(model)
        concepts = text_encoders if concepts is None else concepts
        model, text_encoders, tokenizer = pipe.model, pipe.text_encoders, pipe.tokenizers
        scheduler = pipe.scheduler if scheduler is None else scheduler
    elif concepts is None:
        raise TypeError(
            "concepts: expected what to erase as the third argument, after the text encoders "
            "(or erase(pipe, concepts) with a whole pipeline)"
        )
    config = config or EraseConfig()
    preserve = clean_names(preserve, "preserve")
    if not isinstance(config, EraseConfig):
        raise TypeError(f"config: expected an EraseConfig, got {type(config).__name__}")
    if reading is not None:
        if not isinstance(reading, Family):
            raise TypeError(
                f"reading: expected a realera_fast.models.Family, got {type(reading).__name__}"
            )
    parsed = parse_concepts(concepts, preserve=preserve)
    if isinstance(model, nn.Module):
        refuse_adapters(model, before_erasing=True)
    maps = None if reading is None else reading.maps
    try:
        layers = projections(model, maps)
    except RefusedModelError as error:
        raise ValueError(f"{error}{error.before_erasing}") from None
    if scheduler is not None:
        config_of(scheduler)
    count = len(text_encoders) if isinstance(text_encoders, tuple | list) else 1
    family = family_of(model, count) if reading is None else reading
    not_aligned = why_not_aligned(model, family, config.alignment.latent_size)
    alignable = config.alignment.enabled and not_aligned is None
    if not (alignable or config.closed_form.enabled):
        raise ValueError(
            "config: closed_form.enabled=False leaves nothing to do, as noise alignment is off or "
            f"does not run on this model ({not_aligned or 'alignment.enabled=False'})"
        )
    if resume and checkpoint_dir is None:
        raise ValueError("resume: expected a checkpoint_dir to continue from, got none")
    if alignable:
        latents = _checked_latents(latents, parsed, latent_shape(model, config))
    elif latents:
        raise ValueError(
            "latents: they are for the alignment stage, which does not run here: "
            f"{not_aligned or 'alignment.enabled=False'}"
        )
    categories = any(c.kind == "explicit" for c in parsed) and config.mining.member_words > 0
    drawable = categories and family.aligned and can_be_drawn(model, config.alignment)
    noise: Any = None
    said: list[str] = []
    if alignable or drawable:
        noise, said = _noise_scheduler(model, scheduler, config, alignable)
        drawable = drawable and noise is not None
    texts = text_streams(model, text_encoders, tokenizer, reading)
    for stream, sections in texts.items():
        for section in sections:
            check_width(model, stream, section.width, maps)
    text = texts["sequence"][0]
    check_tokens(texts, parsed, preserve, config)
    key = _key(texts)
    encoders = text_encoders if isinstance(text_encoders, tuple | list) else (text_encoders,)
    family = as_read(family, encoders, texts)
    provenance = _provenance(model, config, family)
    if not parsed:
        logger.warning("concepts is empty: nothing is erased")
        empty_report = report.Report(
            (), {}, {}, {}, dict.fromkeys(layers, 0.0), {}, {}, (), family.explained()
        ).to_dict()
        identity = [ConceptMap.identity(sections[0].width) for sections in texts.values()]
        result = Erasure(
            identity[0],
            {},
            (),
            config.to_dict(),
            provenance,
            empty_report,
            pooled_map=identity[1] if len(identity) > 1 else None,
        )
        result.apply_(model)
        return result

    clock = _Clock()
    anchors = {c.destination: c.kind for c in parsed if c.destination}
    kinds = {key(word): kind for word, kind in anchors.items()}
    first: dict[Any, str] = {}
    for word in (*preserve, *anchors):
        first.setdefault(key(word), word)
    kept_words = tuple(first.values())
    kept = {word: kinds.get(key(word), "object") for word in kept_words}
    with clock.stage("prior"):
        vocabulary = encode_vocabulary(text, config.vocabulary, progress=progress)

    autocast = config.alignment.mixed_precision == "bf16" and (alignable or drawable)
    slow = cpu_warnings((model, *encoders), autocast=autocast)
    for warning in slow:
        logger.warning(warning)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    members = None
    if drawable:
        drawing = config.alignment
        settings = (drawing.guidance_scale, drawing.latent_size, drawing.mixed_precision)
        own = _run(texts, noise, provenance, settings)
        members = MemberSearch(
            lambda names, words: guidance_cosine(
                model, noise, names, words, config=drawing, **_shown(texts)
            ),
            next(iter(layers.values())).weight.device,
            together=max(1, drawing.sampling_batch_size // 2),
            processes=Processes(accelerator),
            place=None if folder is None else (folder, own, resume),
            progress=progress,
        )
    with clock.stage("mining"):
        # In every mode: words of the neighborhood are not preserved, whoever moves them.
        around = neighbor_words(
            text,
            vocabulary,
            parsed,
            config.mining,
            keep=kept_words,
            key=key,
            members=members,
            progress=progress,
        )
        near = around.near
        gone = [w for c in parsed for w in (*c.words, *near[c.target], *around.surplus[c.target])]
        mined: dict[str, tuple[str, ...]] = {c.target: () for c in parsed}
        if config.mining.mode == "vocabulary":
            mined = near
    run = ""
    if folder is not None:
        run = _run(
            texts,
            noise,
            provenance,
            [concept.to_dict() for concept in parsed],
            kept_words,
            config.to_dict(),
            weights_hash(latents or {}, torch.float32),
            near,
            around.surplus,
        )
    solved: dict[str, tuple[Solution, IncrementalSystem | None]] = {}
    for stream, sections in texts.items():
        with clock.stage("equations"):
            gathered = gather(
                sections,
                parsed,
                mined,
                kept,
                gone,
                vocabulary,
                config,
                place=None if folder is None else (folder, stream, run, resume),
                progress=progress,
            )
        with clock.stage("closed form"):
            solved[stream] = solve(*gathered, config)
    solution, system = solved["sequence"]
    pooled, pooled_system = solved.get("pooled", (None, None))
    # The result is small and outlives the model: it rests on the CPU.
    concept_map = solution.map.to("cpu")
    pooled_map = None if pooled is None else pooled.map.to("cpu")
    known = vocabulary.words or None
    prompts = ConceptPrompts(text, parsed, mined, config.pairs, avoid=gone, words=known)
    stayers = _stayers(vocabulary, gone, kept_words)
    aligned = alignment.NOT_ALIGNED
    before = {name: module.weight.detach().clone() for name, module in layers.items()}
    guarded: Mapping[str, Any] = layers
    if alignable and not set(config.alignment.target_modules) <= {"to_k", "to_v"}:
        guarded = layers | queries_and_outputs(model)
    with transaction(model, guarded):
        moves = solution.map.rank or not config.closed_form.enabled
        if alignable and moves:
            seen = _shown(texts)
            shown = seen["text"]
            with clock.stage("alignment"):
                aligned = align_noise(
                    model,
                    noise,
                    solution.map,
                    prompts=ConceptPrompts(
                        shown, parsed, mined, config.pairs, avoid=gone, words=known
                    ),
                    watched=ConceptPrompts(
                        shown, parsed, near, config.pairs, avoid=gone, words=known
                    ),
                    preserve=shown.encode([fill("a photo of a {}", w) for w in stayers] or [""]),
                    empty=seen["empty"],
                    pooled_map=None if pooled is None else pooled.map,
                    config=config.alignment,
                    mining_config=config.mining,
                    latents=latents,
                    seed=config.seed,
                    accelerator=accelerator,
                    checkpoint_dir=folder,
                    resume=resume,
                    run=run,
                    progress=progress,
                )
        hidden = {name: module for name, module in guarded.items() if name not in layers}
        before |= {name: module.weight.detach().clone() for name, module in hidden.items()}
        draft = Erasure(
            concept_map,
            aligned.lora,
            parsed,
            config.to_dict(),
            provenance,
            {},
            pooled_map=pooled_map,
        )
        edited = draft.edited_weights(before)
        with clock.stage("report"):
            found = _report(
                before,
                edited,
                prompts,
                kept_words,
                stayers,
                text,
                solution,
                aligned,
                mined,
                streams(model, maps),
                progress,
            )
            found["relatives"] = around.relatives
            found["reading"] = family.explained()
            if pooled is not None:
                found["solve"]["pooled"] = dataclasses.asdict(pooled.info)
            found["warnings"] = (*found["warnings"], *said, *_cut(around.surplus, mined), *slow)
            moved = [word for words in mined.values() for word in words]
            found["warnings"] += tuple(_spelled(parsed, (*moved, *kept_words), key))
            found["warnings"] += tuple(_unknown(parsed, texts))
            found["warnings"] += tuple(_kept_in_part(parsed, kept_words, texts))
            if categories and not drawable:
                found["warnings"] = (*found["warnings"], _NO_MEMBERS)
                logger.warning(_NO_MEMBERS)
            if not vocabulary.words:
                found["warnings"] = (*found["warnings"], _NO_WORDS)
                logger.warning(_NO_WORDS)
            if config.alignment.enabled and not alignable:
                told = f"{_NO_ALIGNMENT}: {not_aligned}"
                found["warnings"] = (*found["warnings"], told)
                logger.warning(told)
        full = report.Report(**found, seconds=clock.seconds).to_dict()
        result = dataclasses.replace(draft, report=full, system=system, pooled_system=pooled_system)
        result.apply_(model)
    if folder is not None:
        for stage in (*texts, checkpoint.MEMBERS):
            checkpoint.remove(folder, stage)
    return result


_NO_ALIGNMENT = (
    "noise alignment runs on Stable Diffusion 1, 2 and XL that draw from text alone; this model "
    "has the closed form alone"
)

_NO_WORDS = (
    "the vocabulary is empty: the tokenizer marks no whole words (or vocabulary.words is 0), so no "
    "neighbor words are mined and nothing but preserve= and anchors is held in place; name "
    "synonyms, and what must stay"
)


_NO_MEMBERS = (
    "members of a category are found by drawing on Stable Diffusion 1, 2 and XL with their stock "
    "attention, without pictures or classes beside the text and with latents of a known size "
    "(alignment.latent_size); here the text alone decided: name the members as synonyms"
)


def _key(texts: Mapping[Any, Sequence[Text]]) -> Callable[[str], tuple[Any, ...]]:
    """Equal for names that are the same tokens to every text encoder."""
    every = [text for sections in texts.values() for text in sections]
    return lambda name: tuple(text.name_key(name) for text in every)


def check_tokens(
    texts: Mapping[Any, Sequence[Text]],
    concepts: Sequence[Concept],
    preserve: Sequence[str],
    config: EraseConfig,
) -> None:
    """What only the tokenizers can tell of names.

    Args:
        texts: what the model is shown, by stream.
        preserve: words that must stay, cleaned.

    Raises:
        ValueError: two names are the same tokens and are to go twice, or to go and to stay; or a
            text holds a control token.
    """
    anchors = [c.destination for c in concepts if c.destination]
    templates = [t for kind in {c.kind for c in concepts} for t in config.pairs.of(kind)]
    for what, given in (
        ("concepts", [*(word for c in concepts for word in c.words), *anchors]),
        ("preserve", preserve),
        ("templates", templates),
    ):
        for value in given:
            for text in (text for sections in texts.values() for text in sections):
                if (token := text.control_token(value)) is not None:
                    raise ValueError(
                        f"{what}: {value!r} holds {token!r}, a control token of the text encoder "
                        "and not a word; leave it out"
                    )
    key = functools.cache(_key(texts))
    for concept in concepts:
        for word in concept.words:
            if key(word) == key(""):
                raise ValueError(
                    f"concepts: {word!r} has no tokens to the text encoder, so nothing would be "
                    "erased; name it in another way"
                )
    check_names(concepts, preserve, key=key)


def _unknown(concepts: Sequence[Concept], texts: Mapping[Any, Sequence[Text]]) -> Iterator[str]:
    """Warns of names that are nothing of their own to a text encoder."""
    every = [text for sections in texts.values() for text in sections]
    words = [word for c in concepts for word in c.words]
    if found := [word for word in words if any(text.unknown(word) for text in every)]:
        some = ", ".join(map(repr, found[:6])) + (", ..." if len(found) > 6 else "")
        text = (
            f"the text encoder knows no such characters as in {some}: what else it does not know "
            "looks the same to it and may go as well"
        )
        logger.warning(text)
        yield text


def _kept_in_part(
    concepts: Sequence[Concept], kept: Sequence[str], texts: Mapping[Any, Sequence[Text]]
) -> Iterator[str]:
    """Warns of words to be kept that one of several text encoders can't tell from erased ones."""
    words = [word for c in concepts for word in c.words]
    for text in (text for sections in texts.values() for text in sections):
        gone = {text.name_key(word): word for word in words}
        for word in kept:
            if (other := gone.get(text.name_key(word))) is not None:
                told = (
                    f"{word!r} is to stay and {other!r} to go, which are the same to one of the "
                    "text encoders: it stays in part"
                )
                logger.warning(told)
                yield told
                return


def _spelled(
    concepts: Sequence[Concept], others: Sequence[str], key: Callable[[str], Any]
) -> Iterator[str]:
    """Warns of spellings that the tokenizers tell apart and that nobody named.

    Args:
        others: words beside the named ones that are moved, or kept.
    """
    known = {key(word) for word in (*others, *(w for c in concepts for w in c.words))}
    found: dict[Any, str] = {}
    for word in (word for c in concepts for word in c.words):
        each = " ".join(part[:1].upper() + part[1:] for part in word.split())
        for spelling in (word.lower(), word[:1].upper() + word[1:], each, word.upper()):
            if key(spelling) not in known:
                found.setdefault(key(spelling), spelling)
    if found:
        some = ", ".join(map(repr, list(found.values())[:6])) + (", ..." if len(found) > 6 else "")
        text = (
            f"the text encoder tells spellings of what was erased apart: {some} were not named and "
            "may stay; name those that prompts use as synonyms"
        )
        logger.warning(text)
        yield text


def _shown(texts: Mapping[Any, Sequence[Text]]) -> dict[str, Any]:
    """What a U-Net is shown: whole prompts with their pooled vector, and the empty one."""
    text, pooled = texts["sequence"][0], texts.get("pooled")
    if pooled is None:
        return {"text": text, "empty": text.encode([""]), "pooled_width": None}
    joined = TextWithPooled(text, pooled[0])
    # SDXL is guided away from zeros (force_zeros_for_empty_prompt).
    empty = torch.zeros_like(joined.encode([""]))
    return {"text": joined, "empty": empty, "pooled_width": pooled[0].width}


def latent_shape(model: Any, config: EraseConfig) -> tuple[int, ...]:
    """`(c, h, w)` of the latents that alignment denoises, for a model that it runs on.

    Raises:
        ValueError: the model is in a state in which it can't denoise.
    """
    try:
        check_runnable(model)
        check_trainable(model)
    except ValueError as error:
        raise ValueError(
            f"{error}: the alignment stage can't denoise with it; set alignment.enabled=False for "
            "the closed form alone"
        ) from None
    options: Any = unwrapped(model).config
    size = config.alignment.latent_size or options.sample_size
    return (options.in_channels, *((size, size) if isinstance(size, int) else tuple(size)))


def _noise_scheduler(
    model: Any, scheduler: Any, config: EraseConfig, alignable: bool
) -> tuple[Any | None, list[str]]:
    """The scheduler whose noise schedule is used, and what the report has to say of it.

    Args:
        alignable: whether alignment needs it; else None comes back for one that can't be used.

    Raises:
        ValueError: alignment needs it, and it can't be used.
    """
    options, said = config.alignment, []
    counts = {options.sampling_steps, options.check_sampling_steps} if alignable else {MEMBER_STEPS}
    try:
        found = alignment.find_scheduler(model) if scheduler is None else scheduler
        if found is None:
            found = alignment.assumed_scheduler()
            said.append(alignment.ASSUMED)
        for steps in counts:
            ddim_of(found, steps)
    except ValueError as error:
        if not alignable:
            logger.warning("%s", error)
            return None, said
        raise ValueError(
            f"{error}; or set alignment.enabled=False for the closed form alone"
        ) from None
    if alignable and (few := alignment.distilled(found, options)) is not None:
        logger.warning(few)
        said.append(few)
    return found, said


def _checked_latents(
    latents: Mapping[str, Tensor] | None, concepts: Sequence[Concept], shape: tuple[int, ...]
) -> Mapping[str, Tensor]:
    """The given latents, if they are of named words."""
    if not isinstance(latents, Mapping | None):
        raise TypeError(
            f"latents: expected a mapping of words to tensors, got {type(latents).__name__}"
        )
    named = {word for concept in concepts for word in concept.words}
    given: dict[str, Tensor] = {}
    for word, values in (latents or {}).items():
        word = clean(word, "latents")
        if word in given:
            raise ValueError(f"latents: {word!r} is there twice; leave one out")
        given[word] = values
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
    return given


def _run(
    texts: Mapping[Any, Sequence[Text]], scheduler: Any, provenance: Mapping[str, Any], *more: Any
) -> str:
    """Identifies what a checkpoint belongs to: everything that what it holds depends on.

    Args:
        more: beside model, text encoders and scheduler; plain JSON values.
    """
    parts = [
        provenance["base_hashes"],
        provenance["versions"],
        [text.fingerprint() for sections in texts.values() for text in sections],
        # Private entries come in an order of chance.
        {k: v for k, v in dict(getattr(scheduler, "config", {})).items() if k[0] != "_"},
        *more,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _cut(surplus: Mapping[str, Sequence[str]], mined: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Warns of neighbors that are too many to be erased."""
    for target, words in surplus.items():
        if words and mined[target]:
            text = (
                f"{target!r}: {len(words)} words of its neighborhood, {words[0]!r} the nearest of "
                "them, were too many to be erased with it: raise mining.max_words"
            )
            logger.warning(text)
            yield text


def _stayers(
    vocabulary: Vocabulary, gone: Sequence[str], kept_words: Sequence[str], count: int = 64
) -> list[str]:
    """Words that should not move: the named ones, then an even sample of the vocabulary."""
    leaving = {folded(word) for word in gone}
    rest = [w for w in vocabulary.words if folded(w) not in leaving and w not in kept_words]
    step = max(1, math.ceil(len(rest) / count))
    return [*kept_words, *rest[::step]]


def _report(
    before: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
    prompts: ConceptPrompts,
    kept_words: Sequence[str],
    stayers: Sequence[str],
    text: Text,
    solution: Solution,
    aligned: Alignment,
    mined: Mapping[str, tuple[str, ...]],
    streams: Mapping[str, str],
    progress: bool | None,
) -> dict[str, Any]:
    taking = [name for name in before if streams.get(name) == "sequence"]
    movement = report.Movement(*([w[name] for name in taking] for w in (before, edited)))
    found: dict[int, report.WordReport] = {}
    with progress_bars.bar(total=len(prompts), desc="report", progress=progress) as bar:
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
                bar.update(1)
    words = [found[number] for number in range(len(prompts))]
    told = [fill("a photo of a {}", word) for word in stayers]
    drifts = movement.drifts(text.encode(told), text.shares(told) > 0)
    for stayer, drift in zip(stayers, drifts, strict=True):
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


def _provenance(model: Any, config: EraseConfig, family: Family) -> dict[str, Any]:
    versions = {}
    for package in ("realera_fast", "torch", "diffusers", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    weight = next(iter(projections(model, family.maps).values())).weight
    name = str(getattr(getattr(unwrapped(model), "config", None), "_name_or_path", ""))
    is_id = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()
    return {
        # A hub id; a path on this machine is nobody's business.
        "base_model": name if is_id else None,
        "versions": versions,
        "model_class": type(unwrapped(model)).__name__,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "base_hashes": base_hashes(model, family.maps),
        "reading": family.to_dict(),
        "history": history_of(model),
        "seed": config.seed,
    }
