"""How a pipeline reads its text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from realera_fast.models.entrances import (
    STREAMS,
    Maps,
)
from realera_fast.text import Output, TextModel


@dataclass(frozen=True)
class Reading:
    """How a pipeline reads one of its text encoders."""

    encoder: int
    """Number of the encoder; -1 is the last."""
    output: Output = "last"
    layers: tuple[int, ...] = ()
    """Hidden states that stand side by side in each row, by number, in place of `output`."""
    max_tokens: int | None = None
    """Rows of a prompt by the pipeline's default; None is all that encoder and tokenizer hold.
    Where padding is hidden the rows of a prompt do not depend on it."""
    masked: bool = False
    """Whether padding is hidden from the encoder and from the denoiser."""
    encoder_mask: bool | None = None
    """Whether it is hidden from the encoder, where that differs from the denoiser."""
    front_padding: int = 0
    """Prompts are filled up in front to a multiple of so many tokens, which the encoder reads."""
    visible_padding: int = 0
    """Rows of padding after the prompt that the denoiser is shown although the rest is hidden."""
    lowercase: bool = False
    clean: bool = False
    """Whether HTML entities and doubled spaces are taken out of prompts."""
    instruction: str | Callable[[], str] = ""
    """Text in front of every prompt; in a chat, the system message."""
    suffix: str = ""
    """Text behind every prompt."""
    chat: Mapping[str, Any] | None = None
    """Arguments of the tokenizer's chat template, which is put around every prompt."""
    dropped: int | None = None
    """Rows that are cut out at the start; None are those of the instruction but for its last token,
    behind the row of begin-of-text (Sana), and in a chat none."""
    multi_vector: bool = False
    """Whether the pipeline expands a textual inversion of several vectors to all of its tokens."""
    model_types: tuple[str, ...] = ()
    """``config.model_type`` of the encoders that are known to be read so; empty takes any."""

    def of(
        self, encoders: Sequence[Any], tokenizers: Sequence[Any], norm: nn.Module | None = None
    ) -> TextModel:
        """The encoder, read this way.

        Args:
            norm: of the denoiser, which the rows pass first.

        Raises:
            ValueError: an encoder of another type.
        """
        encoder = encoders[self.encoder]
        kind = getattr(getattr(encoder, "config", None), "model_type", None)
        if self.model_types and kind and kind not in self.model_types:
            raise ValueError(
                f"text_encoders: expected a text encoder of type {' or '.join(self.model_types)}, "
                f"got {type(encoder).__name__} ({kind}): how its output is read is not known; pass "
                "reading=realera_fast.models.Family(...) if you know"
            )
        return TextModel(
            encoder,
            tokenizers[self.encoder],
            output=self.output,
            layers=self.layers,
            max_tokens=self.max_tokens,
            masked=self.masked,
            encoder_mask=self.encoder_mask,
            front_padding=self.front_padding,
            visible_padding=self.visible_padding,
            lowercase=self.lowercase,
            clean=self.clean,
            instruction=self.resolved().instruction,
            suffix=self.suffix,
            chat=self.chat,
            dropped=self.dropped,
            multi_vector=self.multi_vector,
            norm=norm,
            # A refiner's only encoder is the pipeline's second one.
            name="text_encoder" + {0: "", -1: "_2"}.get(self.encoder, f"_{self.encoder + 1}"),
        )

    def resolved(self) -> Any:
        """The same with its instruction as text."""
        made = self.instruction if isinstance(self.instruction, str) else self.instruction()
        return dataclasses.replace(self, instruction=made)


@dataclass(frozen=True)
class Family:
    """One architecture: where text enters the denoiser, and how its pipeline encodes prompts."""

    name: str
    sections: tuple[tuple[Reading, ...], ...]
    """What stands one after the other in the token sequence; each of encoders side by side."""
    pooled: tuple[Reading, ...] = ()
    """Pooled vectors, side by side."""
    aligned: bool = False
    """Whether the noise alignment knows how to run the denoiser."""
    padded: bool = False
    """Whether zeros fill a section up to the width that the denoiser takes."""
    maps: Maps | None = None
    """Which text each linear map of the denoiser takes, by module name, for a class that is not in
    `entrances.ENTRANCES`; None looks there."""
    norm: str | None = None
    """Module of the denoiser that the token sequence passes before its map, such as a norm. What it
    gives is the text that is learned from, and that the edited map is shown."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sections", _listed_readings(self.sections, "sections"))
        (pooled,) = _listed_readings((self.pooled,), "pooled")
        object.__setattr__(self, "pooled", pooled)
        flags = (self.aligned, self.padded)
        if not isinstance(self.name, str) or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError("reading: name is a string, aligned and padded are True or False")
        if not self.sections or not all(self.sections):
            raise ValueError("reading: sections is empty; name what the token sequence is made of")
        if any(r.output != "pooled" for r in self.pooled) or any(
            r.output == "pooled" for part in self.sections for r in part
        ):
            raise ValueError(
                "reading: output='pooled' is for the pooled vector, and for nothing else"
            )
        if self.norm is not None and (
            not isinstance(self.norm, str) or any(len(part) > 1 for part in self.sections)
        ):
            raise ValueError("reading: norm is the name of a module, and takes one encoder's rows")
        if self.maps is not None:
            self._check_maps(self.maps)

    def _check_maps(self, maps: Maps) -> None:
        if not isinstance(maps, Mapping):
            raise ValueError(
                "reading: maps: expected module names with 'sequence' or 'pooled', got "
                f"{type(maps).__name__}"
            )
        for name, stream in maps.items():
            if not isinstance(name, str) or stream not in STREAMS:
                raise ValueError(f"reading: maps[{name!r}] is {stream!r}, expected of {STREAMS}")
        if "sequence" not in maps.values():
            raise ValueError("reading: maps names none of the token sequence")
        if bool(self.pooled) != ("pooled" in maps.values()):
            raise ValueError("reading: maps and pooled disagree about a pooled vector")
        if self.aligned:
            raise ValueError("reading: aligned=True is for the families of this library")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""

        def plain(readings: Sequence[Reading]) -> list[dict[str, Any]]:
            return [dataclasses.asdict(reading.resolved()) for reading in readings]

        return {
            "name": self.name,
            "sections": [plain(readings) for readings in self.sections],
            "pooled": plain(self.pooled),
            "aligned": self.aligned,
            "padded": self.padded,
            "maps": None if self.maps is None else dict(self.maps),
            "norm": self.norm,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Family:
        """The inverse of `to_dict`; the values are not trusted.

        Raises:
            ValueError: they are not those of a family.
        """
        try:
            found = dict(values)
            sections = tuple(tuple(map(_reading, part)) for part in found.pop("sections"))
            pooled = tuple(map(_reading, found.pop("pooled")))
            return cls(sections=sections, pooled=pooled, **found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is not how a model reads text: {error}") from error

    def present(self, encoders: Sequence[Any]) -> tuple[tuple[Reading, ...], ...]:
        """The sections whose encoders are all loaded."""
        return tuple(
            readings
            for readings in self.sections
            if all(encoders[reading.encoder] is not None for reading in readings)
        )

    def absent_rows(self, encoders: Sequence[Any]) -> int:
        """Rows of zeros that stand in the token sequence for sections that are not loaded (SD3
        without T5); 0 where the denoiser sees none."""
        if not self.padded:
            return 0
        missing = [part for part in self.sections if any(encoders[r.encoder] is None for r in part)]
        return sum(part[0].max_tokens or 0 for part in missing)

    def explained(self) -> tuple[str, ...]:
        """For which prompts an erasure holds that was made with this reading, in sentences."""
        parts = [
            *((f"section {i} of the text", r) for i, r in enumerate(self.sections, 1)),
            *((("pooled vector", self.pooled),) if self.pooled else ()),
        ]
        return tuple(f"{self.name}, {part}: {_explained(readings)}" for part, readings in parts)


def _listed_readings(parts: Any, field: str) -> tuple[tuple[Reading, ...], ...]:
    """Readings, one tuple a section.

    Raises:
        ValueError: something else is among them.
    """
    listed = list | tuple
    if not isinstance(parts, listed) or not all(isinstance(part, listed) for part in parts):
        shape = "((Reading(0),),)" if field == "sections" else "(Reading(0, 'pooled'),)"
        raise ValueError(f"reading: {field}: expected tuples of Reading such as {shape}")
    for part in parts:
        for reading in part:
            if not isinstance(reading, Reading):
                raise ValueError(
                    f"reading: {field}: expected a Reading, got {type(reading).__name__}"
                )
            _check_reading(reading)
    return tuple(tuple(part) for part in parts)


def _reading(values: Any) -> Reading:
    found = dict(values)
    listed = {name: tuple(found.get(name, ())) for name in ("layers", "model_types")}
    return Reading(**found | listed)


def _check_reading(reading: Reading) -> None:
    rows, last = reading.max_tokens, 1 << 16
    flags = (reading.masked, reading.lowercase, reading.clean, reading.multi_vector)
    typed = (
        _is_count(reading.encoder, -1, 15)
        and (rows is None or _is_count(rows, 1, last))
        and _is_count(reading.visible_padding, 0, last)
        and _is_count(reading.front_padding, 0, last)
        and all(isinstance(flag, bool) for flag in flags)
        and reading.encoder_mask in (None, True, False)
        and all(_is_count(layer, -_DEEPEST, _DEEPEST) for layer in reading.layers)
        and (reading.dropped is None or _is_count(reading.dropped, 0, last))
        and (reading.chat is None or isinstance(reading.chat, Mapping))
        and isinstance(reading.suffix, str)
        and all(isinstance(kind, str) for kind in reading.model_types)
        and (isinstance(reading.instruction, str) or callable(reading.instruction))
    )
    if not typed or reading.output not in get_args(Output):
        raise ValueError(f"reading: {reading} is not how an encoder is read")


_DEEPEST = 1 << 10
"""Hidden states of an encoder, at most."""


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _explained(readings: Sequence[Reading]) -> str:
    """What readings side by side give, in words."""
    which = " and ".join(
        "the last text encoder" if r.encoder < 0 else f"text encoder {r.encoder + 1}"
        for r in readings
    )
    first = readings[0]
    if first.output == "pooled":
        return f"{which}, pooled"
    states = f"{first.output} states"
    if first.layers:
        states = f"states {', '.join(map(str, first.layers))} side by side"
    if first.chat is not None:
        states += ", in the tokenizer's chat template"
    if first.lowercase:
        states += ", lowercased and without caption cleaning"
    if first.front_padding:
        return (
            f"{which}, {states}, filled up in front to a multiple of {first.front_padding} tokens: "
            "prompts that are encoded together with longer ones have other rows"
        )
    if first.masked and first.encoder_mask is not False:
        return f"{which}, {states}; padding is hidden: any max_sequence_length"
    sized = f"{which}, {states}, {first.max_tokens or 'all'} rows"
    if first.masked:
        return (
            f"{sized}; the encoder reads the padding: prompts that are encoded at another length "
            "have other rows"
        )
    if first.encoder_mask:
        return f"{sized}; padding is in sight, but not of the encoder: any max_sequence_length"
    return (
        f"{sized}; padding is in sight: prompts that are encoded at another length have other rows"
    )
