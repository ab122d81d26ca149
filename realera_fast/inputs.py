"""What `erase` is asked for: checked before any work, then one frozen `Job`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from realera_fast.config import EraseConfig
from realera_fast.denoising import (
    DenoiserText,
    Denoising,
    checked_latents,
    checked_shape,
    why_not,
    with_scheduler,
)
from realera_fast.erasure import check_attachable, originals_of
from realera_fast.mining import KnownWords, can_be_drawn, read_known_words
from realera_fast.models import (
    TEXT_STREAM,
    Family,
    RefusedModelError,
    Stream,
    Target,
    as_read,
    check_target,
    check_width,
    components_of,
    dense_weight,
    family_of,
    is_joint,
    is_pipeline,
    projections,
    queries_and_outputs,
    refuse_adapters,
    self_attention,
    stream_of,
    streams,
    text_projections,
    text_streams,
    value_gram,
    why_not_run,
)
from realera_fast.provenance import provenance_of
from realera_fast.runtime import (
    Checkpoint,
    Execution,
    Processes,
    clean_names,
    cpu_warnings,
)
from realera_fast.text import (
    Concept,
    Text,
    TextInSections,
    TextWithPooled,
    check_names,
    parse_concepts,
)
from realera_fast.unet import config_of

VALUES = ".to_v"
"""How the names of value projections end."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arguments:
    """The arguments of `erase`, as they were given."""

    model: Any
    text_encoders: Any
    concepts: Any
    tokenizer: Any
    preserve: Iterable[str] | None
    scheduler: Any
    reading: Family | None
    config: EraseConfig | None
    latents: Mapping[str, Tensor] | None
    accelerator: Any
    checkpoint_dir: str | os.PathLike[str] | None
    resume: bool
    progress: bool | None
    target: Target
    inherited: tuple[str, ...] = ()
    """Words that erasures which go on preserved; they stay unless they are to go now."""


@dataclass(frozen=True)
class Job:
    """One call of `erase`, checked."""

    model: Any
    layers: Mapping[str, nn.Linear]
    """Linear maps that text enters the model through, by name."""
    encoders: Sequence[Any]
    texts: Mapping[Stream, Sequence[Text]]
    """Sections of each text stream."""
    concepts: tuple[Concept, ...]
    preserve: tuple[str, ...]
    config: EraseConfig
    family: Family
    denoising: Denoising
    latents: Mapping[str, Tensor]
    provenance: dict[str, Any]
    accelerator: Any
    folder: Path | None
    """Of the checkpoint."""
    resume: bool
    progress: bool | None
    target: Target

    @property
    def text(self) -> Text:
        """The first section of the token sequence; its tokenizer's vocabulary serves all."""
        return self.texts["sequence"][0]

    @property
    def stream_of_words(self) -> Stream:
        """Whose encoder finds neighbors: one that reads words without padding, where there is."""
        found = [s for s, sections in self.texts.items() if sections[0].reads_unpadded]
        return found[0] if found else "sequence"

    def known_words(self) -> KnownWords:
        """What the model may know."""
        stream = self.stream_of_words
        text, kinds = self.texts[stream][0], streams(self.model, self.family.maps)
        layers = {name: layer for name, layer in self.layers.items() if kinds[name] == stream}
        return read_known_words(
            text,
            value_gram(self.model, layers, text.width, originals_of(self.model)),
            cache=self.config.vocabulary.cache,
            progress=self.progress,
            processes=self.processes,
        )

    @property
    def processes(self) -> Processes:
        """Those that share the work."""
        return Processes(self.accelerator)

    @property
    def trained_layers(self) -> Mapping[str, nn.Linear]:
        """The layers, and those that alignment changes as well if its settings name them."""
        if not self.denoising.alignable:
            return self.layers
        targets = self.config.alignment.target_modules
        if is_joint(self.model):
            leaves = tuple(f".{TEXT_STREAM[leaf]}" for leaf in targets)
            found = text_projections(self.model)
            return {**self.layers, **{n: x for n, x in found.items() if n.endswith(leaves)}}
        layers = dict(self.layers)
        if {"to_q", "to_out.0"} & set(targets):
            layers |= queries_and_outputs(self.model)
        if own := self.config.alignment.self_attention:
            found = self_attention(self.model)
            layers |= {name: x for name, x in found.items() if name.endswith(own)}
        return layers

    @property
    def device(self) -> torch.device:
        return dense_weight(next(iter(self.layers.values()))).device

    def denoiser_text(self) -> DenoiserText:
        """Whole prompts with their pooled vector, and the empty one."""
        sections, pooled = self.texts["sequence"], self.texts.get("pooled")
        text = self.text if len(sections) == 1 else TextInSections(sections)
        if pooled is None:
            return DenoiserText(text, text.encode([""]), None)
        joined = TextWithPooled(text, pooled[0])
        empty = joined.encode([""])
        if not is_joint(self.model):
            # SDXL is guided away from zeros (force_zeros_for_empty_prompt).
            empty = torch.zeros_like(empty)
        return DenoiserText(joined, empty, pooled[0].width)

    def warn_of_slow_dtypes(self) -> tuple[str, ...]:
        """Warns of a 16-bit dtype that the CPU does not multiply natively."""
        denoised = self.denoising.alignable or self.denoising.drawable
        autocast = self.config.alignment.mixed_precision == "bf16" and denoised
        slow = cpu_warnings((self.model, *self.encoders), autocast=autocast)
        for warning in slow:
            logger.warning(warning)
        return slow

    def run_of(self, *more: Any) -> str:
        """Identifies what a checkpoint belongs to: everything that what it holds depends on.

        Args:
            more: beside model, text encoders and scheduler; plain JSON values.
        """
        options = dict(getattr(self.denoising.scheduler, "config", {}))
        parts = [
            self.provenance["base_hashes"],
            self.provenance["versions"],
            [text.fingerprint() for sections in self.texts.values() for text in sections],
            # Private entries come in an order of chance.
            {name: value for name, value in options.items() if not name.startswith("_")},
            self.denoising.zero_rows,
            *more,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def checkpoint(self, run: str) -> Checkpoint:
        """Files of the run of that identity, in the folder that was given."""
        return Checkpoint(self.folder, run, self.resume)

    def execution(self, run: str) -> Execution:
        """How a stage that processes share runs."""
        return Execution(self.processes, self.checkpoint(run), self.progress)


def checked(given: Arguments) -> Job:
    """The job that the arguments of `erase` ask for.

    Raises:
        ValueError, TypeError: unusable input; the message names the argument and what to do.
    """
    given = with_parts(given)
    config, preserve = _checked_settings(given)
    concepts = parse_concepts(given.concepts, preserve=preserve)
    layers = _checked_layers(given.model, given.reading, given.target)
    if given.scheduler is not None:
        config_of(given.scheduler)
    encoders = given.text_encoders
    encoders = encoders if isinstance(encoders, tuple | list) else (encoders,)
    family = family_of(given.model, len(encoders)) if given.reading is None else given.reading
    not_aligned = why_not(given.model, family, given.scheduler, config, given.target)
    alignable = config.alignment.enabled and not_aligned is None
    disabled = not_aligned or "alignment.enabled=False"
    if not (alignable or config.closed_form.enabled):
        raise ValueError(
            "config: closed_form.enabled=False leaves nothing to do, as noise alignment is off or "
            f"does not run on this model ({disabled})"
        )
    if given.resume and given.checkpoint_dir is None:
        raise ValueError("resume: expected a checkpoint_dir to continue from, got none")
    latents: Mapping[str, Tensor] = {}
    if alignable:
        latents = checked_latents(given.latents, concepts, checked_shape(given.model, config))
    elif given.latents:
        raise ValueError(
            f"latents: they are for the alignment stage, which does not run here: {disabled}"
        )
    asks = takes_members(concepts, config) or config.mining.borderline > 0
    drawable = asks and family.aligned and can_be_drawn(given.model, config.alignment)
    if given.target == "adapter":
        drawable = drawable and why_not_run(given.model, family.maps) is None
    rows = family.absent_rows(encoders) if alignable else 0
    denoising = Denoising(None, alignable, not_aligned, drawable, (), rows)
    if alignable or drawable:
        denoising = with_scheduler(denoising, given.model, given.scheduler, config)
    texts = text_streams(given.model, given.text_encoders, given.tokenizer, given.reading)
    for stream, sections in texts.items():
        for section in sections:
            check_width(given.model, stream, section.width, family.maps)
    preserve = (*_inherited(given, texts, concepts, preserve), *preserve)
    check_tokens(texts, concepts, preserve, config)
    if config.closed_form.enabled and config.closed_form.space == "values":
        if not has_values(layers, texts):
            raise ValueError(
                'config: closed_form.space="values" runs on models whose cross-attention reads one '
                "text encoder's tokens in value projections of its own (Stable Diffusion 1, 2 and "
                'XL), and this model has none such; set closed_form.space="text"'
            )
    family = as_read(family, encoders, texts)
    return Job(
        model=given.model,
        layers=layers,
        encoders=encoders,
        texts=texts,
        concepts=concepts,
        preserve=preserve,
        config=config,
        family=family,
        denoising=denoising,
        latents=latents,
        provenance=provenance_of(given.model, config, family, given.target, preserve),
        accelerator=given.accelerator,
        folder=None if given.checkpoint_dir is None else Path(given.checkpoint_dir),
        resume=given.resume,
        progress=given.progress,
        target=given.target,
    )


def _inherited(
    given: Arguments,
    texts: Mapping[Stream, Sequence[Text]],
    concepts: Sequence[Concept],
    preserve: Sequence[str],
) -> Iterator[str]:
    """Preserved words of before, each once, that are neither to go now nor preserved anyway."""
    key = name_key(texts)
    known = {key(word) for concept in concepts for word in concept.words}
    known |= {key(word) for word in preserve}
    for word in given.inherited:
        if key(word) not in known:
            known.add(key(word))
            yield word


def has_values(layers: Mapping[str, nn.Linear], texts: Mapping[Stream, Sequence[Text]]) -> bool:
    """Whether the closed form can be solved for the outputs of value projections."""
    sections = texts["sequence"]
    speak = any(name.endswith(VALUES) for name in layers)
    # A map of the caller's own beside them would be left as it is.
    speak = speak and all(n.endswith((".to_k", VALUES)) or stream_of(n) == "pooled" for n in layers)
    return speak and len(sections) == 1 and sections[0].reads_unpadded


def with_parts(given: Arguments) -> Arguments:
    """The arguments with the parts of a pipeline in place of the pipeline."""
    model, concepts = given.model, given.concepts
    if not is_pipeline(model):
        if concepts is None:
            raise TypeError(
                "concepts: expected what to erase as the third argument, after the text encoders "
                "(or erase(pipe, concepts) with a whole pipeline)"
            )
        return given
    if (concepts is None) == (given.text_encoders is None) or given.tokenizer is not None:
        raise TypeError(
            "erase: with a pipeline expected erase(pipe, concepts) without text encoders or "
            "tokenizers; with its parts, pass pipe.unet or pipe.transformer first"
        )
    pipe = components_of(model)
    return dataclasses.replace(
        given,
        model=pipe.model,
        text_encoders=pipe.text_encoders,
        # The second argument is the concepts where the first is a whole pipeline.
        concepts=given.text_encoders if concepts is None else concepts,
        tokenizer=pipe.tokenizers,
        scheduler=pipe.scheduler if given.scheduler is None else given.scheduler,
    )


def _checked_settings(given: Arguments) -> tuple[EraseConfig, tuple[str, ...]]:
    """Settings and preserved words, cleaned."""
    config = given.config or EraseConfig()
    preserve = clean_names(given.preserve, "preserve")
    if not isinstance(config, EraseConfig):
        raise TypeError(f"config: expected an EraseConfig, got {type(config).__name__}")
    if given.reading is not None and not isinstance(given.reading, Family):
        raise TypeError(
            f"reading: expected a realera_fast.models.Family, got {type(given.reading).__name__}"
        )
    return config, preserve


def _checked_layers(model: Any, reading: Family | None, target: Target) -> dict[str, nn.Linear]:
    """The linear maps that text enters a model through."""
    check_target(target)
    if isinstance(model, nn.Module):
        refuse_adapters(model, before_erasing=True)
    try:
        found = projections(model, None if reading is None else reading.maps, target=target)
        if target == "adapter":
            check_attachable(model)
        return found
    except RefusedModelError as error:
        raise ValueError(f"{error}{error.before_erasing}") from None


def takes_members(concepts: Sequence[Concept], config: EraseConfig) -> bool:
    """Whether members of a category are asked for."""
    return any(c.kind == "explicit" for c in concepts) and config.mining.member_words > 0


def name_key(texts: Mapping[Any, Sequence[Text]]) -> Callable[[str], tuple[Any, ...]]:
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
    key = functools.cache(name_key(texts))
    for concept in concepts:
        for word in concept.words:
            if key(word) == key(""):
                raise ValueError(
                    f"concepts: {word!r} has no tokens to the text encoder, so nothing would be "
                    "erased; name it in another way"
                )
    check_names(concepts, preserve, key=key)
