"""What commands read: concepts, settings, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera_fast.cli.loading import check_model
from realera_fast.cli.options import (
    KIND_NAMES,
    MINING_MODES,
    PRESETS,
    option_of,
    usage_error,
)
from realera_fast.cli.output import check_output

if TYPE_CHECKING:
    from realera_fast.config import EraseConfig
    from realera_fast.text import Concept


def concepts_of(
    words: Sequence[str],
    file: Path | None,
    kind: str,
    synonyms: Sequence[str],
    preserve: Sequence[str],
) -> tuple[tuple[Concept, ...], list[str]]:
    if kind not in KIND_NAMES:
        raise usage_error("--kind", f"expected one of {', '.join(KIND_NAMES)}, got {kind!r}")
    if bool(words) == (file is not None):
        raise usage_error("--concept", "expected --concept, or --concepts with a file")
    if synonyms and len(words) != 1:
        raise usage_error("--synonym", f"needs exactly one --concept, got {len(words)}")
    from realera_fast.runtime import clean_names
    from realera_fast.text import parse_concept, parse_concepts, read_concepts

    try:
        preserve = clean_names(preserve, "preserve")
    except ValueError as error:
        raise usage_error("--preserve", str(error)) from error
    if file is not None:
        return parse_concepts(read_concepts(file, kind=kind), preserve=preserve), list(preserve)
    try:
        concepts = [parse_concept(word, kind=kind) for word in words]
        if synonyms:
            concepts = [replace(concepts[0], synonyms=tuple(synonyms))]
        return parse_concepts(concepts, preserve=preserve), list(preserve)
    except ValueError as error:
        raise usage_error(option_of(error), str(error)) from error


def check_concept_tokens(
    pipe: Any, concepts: Sequence[Concept], preserve: Sequence[str], config: EraseConfig
) -> None:
    """What only the model's tokenizers can tell of the names is wrong usage like all else."""
    from realera_fast.inputs import check_tokens
    from realera_fast.models import components_of, text_streams

    parts = components_of(pipe)
    texts = text_streams(parts.model, parts.text_encoders, parts.tokenizers)
    try:
        check_tokens(texts, concepts, preserve, config)
    except ValueError as error:
        raise usage_error(option_of(error), str(error)) from error


def check_files(*files: Path) -> None:
    """Raises the OSError of the first file that is not there, before anything that takes seconds.

    What they hold is for the library to check.
    """
    for file in files:
        file.stat()


def check_places(
    model: str, base: Path | None, out: Path, force: bool, deltas: Sequence[Path] = ()
) -> None:
    """What a command reads is there and its output may be written, before anything that takes
    seconds.

    Raises:
        OSError: of a delta.
        CommandError: of the output or the model.
    """
    check_files(*deltas)
    check_output(out, force)
    check_model(model, base)


@dataclass(frozen=True)
class Asked:
    """The options of `verify` that say who judges."""

    model: str
    device: str | None
    clip: Path | None
    labels: Sequence[str]
    detectors: Sequence[str]
    fid: Path | None
    fid_weights: Path | None


def check_fid(fid: Path | None, weights: Path | None, clip: Path | None) -> None:
    """Refuses options for Fréchet distances that do not fit, before anything that takes seconds.

    Raises:
        OSError: of a file.
    """
    if fid is None:
        if weights is not None:
            raise usage_error("--fid-weights", "needs --fid with a folder of reference pictures")
        return
    if weights is None and clip is None:
        raise usage_error("--fid", "needs features: pass --clip, or --fid-weights for FID proper")
    check_files(fid, *([weights] if weights else ()))
    if not fid.is_dir():
        raise usage_error("--fid", f"expected a folder of pictures, got the file {fid}")


def read_config(file: Path | None) -> Any:
    """The JSON values of a file of settings; none without a file."""
    if file is None:
        return {}
    from realera_fast.runtime import read_json

    try:
        return read_json(file.read_bytes())
    except OSError as error:
        raise usage_error("--config", f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise usage_error("--config", f"{file}: {error}") from error


def settings_of(
    values: Any,
    file: Path | None,
    *,
    mining: str | None,
    no_align: bool,
    seed: int | None,
    defaults: EraseConfig | None = None,
    preset: str | None = None,
    spare: Sequence[str] = (),
) -> EraseConfig:
    """`EraseConfig` of the values that `read_config` read, and the options that override it.

    Args:
        defaults: the settings without a file.
        preset: name of settings to begin with.
        spare: words that are no neighbors.
    """
    if preset is not None and (preset not in PRESETS or file is not None):
        told = f"expected one of {', '.join(PRESETS)}, and no --config beside it, got {preset!r}"
        raise usage_error("--preset", told)
    if mining is not None and mining not in MINING_MODES:
        told = f"MiningConfig.mode must be one of {MINING_MODES}, got {mining!r}"
        raise usage_error("--mining", told)
    from realera_fast.config import EraseConfig

    config = getattr(EraseConfig, preset)() if preset else defaults or EraseConfig()
    if file is not None:
        try:
            config = EraseConfig.from_dict(values)
        except ValueError as error:
            raise usage_error("--config", f"{file}: {error}") from error
    if mining is not None:
        config = replace(config, mining=replace(config.mining, mode=mining))
    if spare:
        config = replace(config, mining=replace(config.mining, spare=tuple(spare)))
    if no_align:
        config = replace(config, alignment=replace(config.alignment, enabled=False))
    return config if seed is None else replace(config, seed=seed)
