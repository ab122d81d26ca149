"""The one verb: pairs, mining, closed form, noise alignment, and a report."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from realera_fast.alignment import (
    NOT_ALIGNED,
    Alignment,
    AlignmentPrompts,
    ClosedForm,
    align_noise,
)
from realera_fast.config import EraseConfig
from realera_fast.equations import Equations, Solved, gather, solve, unsolved
from realera_fast.erasure import EditedWeights, Erasure, report
from realera_fast.extending import checked_extends, extending
from realera_fast.inputs import Arguments, Job, checked, takes_members
from realera_fast.mining import NOISE, KnownWords
from realera_fast.models import (
    Family,
    Stream,
    Target,
    Weights,
    streams,
    transaction,
    weights_hash,
)
from realera_fast.provenance import provenance_after
from realera_fast.robustness import Hardened, hardened
from realera_fast.runtime import Clock, checkpoint, exclusive, progress_bar
from realera_fast.scales import Scales, scales_of
from realera_fast.selection import (
    Selection,
    select,
    warn_of_stack,
    warn_of_surplus,
    warn_of_words,
)
from realera_fast.solver import ConceptMap
from realera_fast.text import (
    AlignedPrompts,
    Concept,
    WithFound,
    encode_vocabulary,
    fill,
    preserved_words,
    read_text_rows,
)
from realera_fast.values import MovedValues, joined, may_move_values, moved_values

logger = logging.getLogger(__name__)


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
    target: Target = "weights",
    extends: Erasure | Iterable[Erasure] | None = None,
) -> Erasure:
    """Removes concepts from a diffusion model, in place (RealEra, arXiv 2410.09140).

    ``erase(pipe, concepts)`` takes a whole pipeline, ``erase(model, text_encoders, concepts)`` its
    parts. The linear maps that text enters the model through (`models.streams`) are edited
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
            falls back to Stable Diffusion's schedule (of a transformer to none). Used by the
            alignment stage and to find the members of a category.
        reading: where text enters the model and how its pipeline encodes prompts
            (`models.Family`), for models that this library does not know, or for prompts that are
            encoded otherwise than by the pipeline's defaults; None looks it up (`family_of`) and
            refuses an unknown model.
        config: settings of all stages.
        latents: `[n, c, h, w]` encoded images by named word, as the denoiser takes them (the VAE's
            latents, less its shift factor if it has one, times its scaling factor): alignment
            noises these in place of denoising the word itself.
        accelerator: an `accelerate.Accelerator`: its processes share the reading of words, the
            search for members of a category and the alignment stage (start the script with
            `accelerate launch`; each erases its own copy of the model and all get the same result),
            its trackers get the losses.
        checkpoint_dir: folder where the run keeps what it needs to go on: members found so far,
            sums of the concepts read so far, then a checkpoint of the alignment stage (megabytes).
        resume: continue from that checkpoint, if there is one; the result is that of a run that
            was never stopped.
        progress: draw progress bars; `None` follows diffusers' switch.
        target: "weights" edits them in place; "adapter" attaches the same edit with peft and leaves
            every weight as it is, so that the model may be quantized (torchao, optimum-quanto,
            bitsandbytes, GGUF) or offloaded by accelerate. Such a model gets the closed form alone.
        extends: erasures whose concepts go on, applied to the model or not: they are undone, all
            concepts are erased in one call, and the result stands for all. Erasures on top of each
            other add up their side effects; this one has none but its own. Words that they
            preserved stay unless they go now, the last one's settings hold where `config` is None,
            and a concept that is named again replaces theirs. One that is attached as an adapter
            has to be taken out first, with `restore_`.

    Returns:
        A frozen `Erasure`: undo it with `restore_`, keep it with `save` or `save_lora`, read
        `report` to see what moved.

    Raises:
        ValueError, TypeError: unusable input; the message names the argument and what to do.
        CheckpointError: the checkpoint is broken or of another run (a ValueError).
    """
    given = Arguments(
        model=model,
        text_encoders=text_encoders,
        concepts=concepts,
        tokenizer=tokenizer,
        preserve=preserve,
        scheduler=scheduler,
        reading=reading,
        config=config,
        latents=latents,
        accelerator=accelerator,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        progress=progress,
        target=target,
    )
    with extending(given, checked_extends(extends)) as whole:
        return _erased(checked(whole))


def _erased(job: Job) -> Erasure:
    """What `erase` does, once it knows what is asked for."""
    if not job.concepts:
        erasure = _nothing_erased(job)
        erasure.apply_(job.model, target=job.target)
        return erasure
    clock = Clock(logger=logger)
    options = job.config.vocabulary
    with clock.stage("words"):
        known = job.known_words()
    with clock.stage("prior"):
        words = preserved_words(known.read.things, options.words)
        vocabulary = encode_vocabulary(
            job.text, options, words=words, progress=job.progress, processes=job.processes
        )
    slow = job.warn_of_slow_dtypes()
    with clock.stage("mining"):
        selection = select(job, known, vocabulary)
    run = _run_of(job, selection)
    with clock.stage("equations"):
        checkpoints = job.checkpoint(run)
        equations = {s: gather(job, selection, s, checkpoints) for s in job.texts}
    with clock.stage("closed form"):
        scales, solved, moved = _closed_form(job, selection, known, equations)
    layers = job.trained_layers
    with transaction(job.model, layers if job.target == "weights" else {}):
        with clock.stage("attacks"):
            hard = hardened(job, selection, equations, scales, solved, run)
            hard = replace(hard, moved=moved)
        aligned = _aligned(job, selection, equations, hard, run, clock)
        if moved:
            aligned = replace(aligned, lora=joined(moved.factors, aligned.lora))
        before = Weights(layers if aligned.kept else job.layers)
        erasure = _erasure(job, hard.solved, aligned)
        with clock.stage("report"):
            measured = _report(job, selection, scales, hard, aligned, erasure, before, slow)
        measured = replace(measured, seconds=clock.seconds)
        erasure = replace(erasure, report=measured.to_dict())
        erasure.apply_(job.model, target=job.target)
        # Within: whatever interrupts this leaves the model as it was.
        for stage in (*job.texts, checkpoint.MEMBERS, checkpoint.ATTACK):
            job.checkpoint(run).remove(stage)
    return erasure


def _nothing_erased(job: Job) -> Erasure:
    logger.warning("concepts is empty: nothing is erased")
    moved = dict.fromkeys(job.layers, 0.0)
    measured = report.Report(
        words=(),
        neighbors={},
        relatives={},
        beyond={},
        borderline={},
        sources={},
        line={},
        anchors={},
        scales={},
        solve={},
        layers=moved,
        attacks={},
        alignment={},
        seconds={},
        warnings=(),
        reading=job.family.explained(),
    )
    identity = {
        stream: ConceptMap.identity(sections[0].width) for stream, sections in job.texts.items()
    }
    return Erasure(
        identity["sequence"],
        {},
        (),
        job.config.to_dict(),
        job.provenance,
        measured.to_dict(),
        pooled_map=identity.get("pooled"),
    )


def _run_of(job: Job, selection: Selection) -> str:
    """Identifies the run to its checkpoint; empty where none is written."""
    if job.folder is None:
        return ""
    return job.run_of(
        [concept.to_dict() for concept in job.concepts],
        tuple(selection.retained),
        job.config.to_dict(),
        weights_hash(job.latents, torch.float32),
        selection.neighborhood.near,
        selection.neighborhood.surplus,
        {target: anchor.words for target, anchor in selection.anchors.items()},
    )


def _closed_form(
    job: Job, selection: Selection, known: KnownWords, equations: Mapping[Stream, Equations]
) -> tuple[Scales, dict[Stream, Solved], MovedValues | None]:
    """The scales of the text, the map of each stream, and what moves in place of the sequence."""
    scales = scales_of(job.config, equations[job.stream_of_words], known, selection)
    solved = {s: solve(each, job.config, scales) for s, each in equations.items()}
    moved = None
    if may_move_values(job):
        moved = moved_values(job, selection, known, equations["sequence"], scales)
    if moved:
        solved["sequence"] = unsolved(equations["sequence"])
    return scales, solved, moved


def _aligned(
    job: Job,
    selection: Selection,
    equations: Mapping[Stream, Equations],
    hard: Hardened,
    run: str,
    clock: Clock,
) -> Alignment:
    config, solved, moved = job.config, hard.solved, hard.moved
    moves = moved or solved["sequence"].solution.map.rank or not config.closed_form.enabled
    if not (job.denoising.alignable and moves):
        return NOT_ALIGNED
    shown, moments = job.denoiser_text(), None
    if config.alignment.down_projection == "null_space":
        sums = equations["sequence"]
        moments = (sums.staying.gram, sums.named.gram)
    with clock.stage("alignment"):
        staying = [fill(_PROMPT, word) for word in selection.watched]
        prompts: Sequence[AlignedPrompts]
        attacked = config.alignment.adversary == "worst"
        if attacked:
            # An adversary finds what is near a name itself.
            prompts = WithFound(selection.named_prompts(shown.text), hard.found)
        else:
            prompts = selection.prompts(shown.text)
        return align_noise(
            job.model,
            job.denoising.scheduler,
            ClosedForm(
                {stream: each.solution.map for stream, each in solved.items()},
                moved.factors if moved else {},
                moments,
            ),
            AlignmentPrompts(
                trained=prompts,
                watched=selection.watched_prompts(shown.text),
                preserve=shown.text.encode(staying or [""]),
                empty=shown.empty,
                attacked=hard.attacker.probe if attacked and hard.attacker else None,
                latents=job.latents,
                zero_rows=job.denoising.zero_rows,
            ),
            config.alignment,
            config.mining,
            seed=config.seed,
            execution=job.execution(run),
        )


def _erasure(job: Job, solved: Mapping[Stream, Solved], aligned: Alignment) -> Erasure:
    """The result without its report."""
    sequence, pooled = solved["sequence"], solved.get("pooled")
    provenance = provenance_after(job.provenance)
    if aligned.lora and job.config.alignment.self_attention and aligned.kept:
        provenance |= {"self_attention": True}
    return Erasure(
        # The result is small and outlives the model: it rests on the CPU.
        sequence.solution.map.to("cpu"),
        aligned.lora,
        job.concepts,
        job.config.to_dict(),
        provenance,
        {},
        pooled_map=None if pooled is None else pooled.solution.map.to("cpu"),
        system=sequence.system,
        pooled_system=None if pooled is None else pooled.system,
    )


_PROMPT = "a photo of a {}"
"""Prompt of a word that stays, in the report and in the alignment stage."""


def _report(
    job: Job,
    selection: Selection,
    scales: Scales,
    hard: Hardened,
    aligned: Alignment,
    erasure: Erasure,
    before: Mapping[str, Tensor],
    warnings: Iterable[str],
) -> report.Report:
    """What the erasure moves; the seconds are not known yet.

    Args:
        before: `[o, d]` weights of the layers that it edits.
        warnings: those that were given before the report.
    """
    edited: Mapping[str, Tensor] = EditedWeights(erasure, before)
    if job.target == "weights":
        edited = erasure.edited_weights(before)
    moved = hard.moved
    words = _measured_words(job, selection, moved, before, edited)
    outcome, solved = aligned.to_dict(), hard.solved
    info = asdict(solved["sequence"].solution.info)
    if "pooled" in solved:
        info["pooled"] = asdict(solved["pooled"].solution.info)
    return report.Report(
        words=tuple(words),
        neighbors=dict(selection.mined),
        relatives=selection.neighborhood.relatives,
        beyond=selection.neighborhood.beyond,
        borderline=selection.neighborhood.borderline,
        sources=selection.neighborhood.sources,
        line=selection.line.to_dict(),
        anchors={target: asdict(anchor) for target, anchor in selection.anchors.items()},
        scales=scales.to_dict() | {"values": moved.to_dict() if moved else None},
        solve=info,
        layers={
            name: float((edited[name].float() - weight.float()).norm() / weight.float().norm())
            for name, weight in before.items()
        },
        attacks=hard.attacks,
        alignment=outcome,
        seconds={},
        warnings=(
            *report.warnings_of(words, outcome, values=moved is not None),
            *job.denoising.warnings,
            *warn_of_surplus(selection),
            *warnings,
            *warn_of_words(job, selection),
            *_warn_of_members(job),
            *warn_of_stack(job, selection, before, edited, _PROMPT),
            *_warn_of_alignment(job),
            *_warn_of_attacks(job, hard),
        ),
        reading=job.family.explained(),
    )


def _measured_words(
    job: Job,
    selection: Selection,
    moved: MovedValues | None,
    before: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
) -> list[report.WordReport]:
    """How far words moved, by the layers that take the token sequence, or those of them whose
    outputs are moved."""
    kinds = streams(job.model, job.family.maps)
    names = [name for name in before if kinds.get(name) == "sequence"]
    if moved:
        names = [name for name in names if name in moved.factors]
    movement = report.Movement(*(map(w.__getitem__, names) for w in (before, edited)))
    prompts = selection.prompts(job.text, whole=job.config.mining.mode in NOISE)
    measured: dict[int, report.WordReport] = {}
    with progress_bar(total=len(prompts), desc="report", progress=job.progress) as bar:
        for index, concept in enumerate(prompts.concepts):
            for number in prompts.numbers(index):
                word = prompts.brief(number)
                role = "target" if word.word == concept.target else "synonym"
                measured[number] = report.WordReport(
                    word.word,
                    role if number < prompts.named else "neighbor",
                    selection.anchor_name(concept),
                    movement.moved(word),
                    None,
                )
                bar.update(1)
    staying = [fill(_PROMPT, word) for word in selection.watched]
    drifts = movement.drifts(*read_text_rows(job.text, staying))
    words = [measured[number] for number in range(len(prompts))]
    for name, drift in zip(selection.watched, drifts, strict=True):
        role = "relative" if name in selection.relatives else "vocabulary"
        role = "preserved" if name in selection.retained else role
        words.append(report.WordReport(name, role, None, None, drift))
    return words


def _warn_of_members(job: Job) -> Iterator[str]:
    """Warns of a category whose members can't be found by sampling."""
    if takes_members(job.concepts, job.config) and not job.denoising.drawable:
        logger.warning(_NO_MEMBERS)
        yield _NO_MEMBERS


def _warn_of_alignment(job: Job) -> Iterator[str]:
    """Warns of a model that can't be aligned."""
    if job.config.alignment.enabled and not job.denoising.alignable:
        text = f"{_NO_ALIGNMENT}: {job.denoising.why_not}"
        logger.warning(text)
        yield text


def _warn_of_attacks(job: Job, hard: Hardened) -> Iterator[str]:
    """Warns of attacks that were asked for and did not run."""
    if job.config.mining.attack_rounds and hard.attacker is None:
        text = (
            "mining.attack_rounds: nothing was attacked, as the closed form or the noise alignment "
            "does not run, or the model is no U-Net; the erasure is not trained against attacks"
        )
        logger.warning(text)
        yield text


_NO_ALIGNMENT = (
    "noise alignment runs on Stable Diffusion 1, 2, XL, 3 and FLUX.1 that draw from text alone; "
    "this model has the closed form alone"
)


_NO_MEMBERS = (
    "members of a category are found by drawing on Stable Diffusion 1, 2 and XL with their stock "
    "attention, without pictures or classes beside the text and with latents of a known size "
    "(alignment.latent_size); here the text alone decided: name the members as synonyms"
)
