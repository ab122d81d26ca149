"""`EraseConfig`: the settings of all stages in one frozen tree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from realera_fast.alignment import AlignmentConfig
from realera_fast.mining import NOISE, MiningConfig
from realera_fast.runtime import check_types
from realera_fast.solver import ClosedFormConfig
from realera_fast.text import PairsConfig, VocabularyConfig


@dataclass(frozen=True)
class EraseConfig:
    """All settings of `erase`; every field says unit, default and where it is from."""

    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Prompt templates."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """The preserve prior."""
    mining: MiningConfig = field(default_factory=MiningConfig)
    """Neighbor-concept mining (RealEra)."""
    closed_form: ClosedFormConfig = field(default_factory=ClosedFormConfig)
    """The regularised least squares."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """The LoRA stage."""
    erase_scale: float = 1.0
    """Weight of each named word's rows, noise around it included (ratio to the prior; UCE's
    `erase_scale`, 1)."""
    seed: int = 0
    """All randomness comes from it (default: 0)."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.erase_scale < math.inf:
            raise ValueError(
                f"EraseConfig.erase_scale must be finite and > 0, got {self.erase_scale}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"EraseConfig.seed must be from 0 to 2**32 - 1, got {self.seed}")
        if self.closed_form.enabled and self.closed_form.space == "values":
            if self.mining.attack_rounds:
                raise ValueError(
                    'EraseConfig: closed_form.space="values" takes no prompts that attacks find; '
                    'set mining.attack_rounds=0, or closed_form.space="text"'
                )
            if self.mining.mode in NOISE:
                raise ValueError(
                    f'EraseConfig: closed_form.space="values" takes no noise, and mining.mode is '
                    f'{self.mining.mode!r}; set it to "vocabulary" or "none"'
                )

    @property
    def asks_for_text(self) -> bool:
        """Whether a setting asks for what only the closed form of the text has: equations that are
        kept, rows of noise or attacks, or weights of its own. Then `closed_form.space` "auto" is
        the text."""
        return bool(
            self.closed_form.keep_system
            or self.mining.mode in NOISE
            or self.mining.attack_rounds
            or self.vocabulary.preserve_scale != "auto"
            or self.pairs.negative_guidance != "auto"
            or self.mining.neighbor_scale != "auto"
            or self.pairs.templates is not None
            or self.closed_form.ridge != ClosedFormConfig().ridge
            or self.erase_scale != 1.0
        )

    @classmethod
    def paper(cls) -> EraseConfig:
        """RealEra as published: neighbors are noise around the target and go to the anchor, then
        LoRA factors follow the anchor and stay, whatever a check would find. Values that the paper
        does not give are this library's."""
        return cls(
            pairs=PairsConfig(negative_guidance=0.0, anchors="mean"),
            vocabulary=VocabularyConfig(preserve_scale=40.0),
            mining=MiningConfig(mode="gaussian", relative_words=0),
            alignment=AlignmentConfig(negative_guidance=0.0, check_seeds=0, adversary="random"),
        )

    @classmethod
    def fast(cls) -> EraseConfig:
        """The closed form alone: seconds, and no pass of the denoiser."""
        return cls(mining=MiningConfig(member_words=0), alignment=AlignmentConfig(enabled=False))

    @classmethod
    def strict(cls) -> EraseConfig:
        """Against prompts that nobody listed and attacks that look for them: the outputs of the
        value projections are moved past the anchor's, in closed form. What is asked for by an
        erased name seldom looks like anything. On Stable Diffusion 1, 2 and XL; what it reaches:
        docs/alignment.md."""
        return cls(
            mining=MiningConfig(member_words=0),
            closed_form=ClosedFormConfig(
                space="values", value_ridge=1.0, value_guidance=1.0, value_neighbors=0.0
            ),
            alignment=AlignmentConfig(enabled=False),
        )

    @classmethod
    def adversarial(cls) -> EraseConfig:
        """Trained against attacks: the closed form is attacked and takes in what is found, then
        LoRA factors are trained on that and on the worst neighbors, beside many words that stay.
        Minutes; what it reaches beside `strict`: docs/alignment.md."""
        return cls(
            mining=MiningConfig(attack_rounds=3),
            alignment=AlignmentConfig(
                adversary="worst",
                learning_rate=2e-3,
                negative_guidance=0.5,
                beyond_scale=0.0,
                preserve_scale=4.0,
                preserve_batch_size=16,
                trajectories=60,
                original_trajectories=True,
                preserve_trajectories=96,
                sampling_steps=12,
                guidance_scale=3.0,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EraseConfig:
        """Settings from JSON values; fields left out keep their defaults.

        Raises:
            ValueError: an unknown field, with the ones that exist.
        """
        return _from_dict(cls, values, "EraseConfig")


_PARTS: Mapping[str, Any] = {
    "pairs": PairsConfig,
    "vocabulary": VocabularyConfig,
    "mining": MiningConfig,
    "closed_form": ClosedFormConfig,
    "alignment": AlignmentConfig,
}


def _from_dict(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object with fields, got {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]!r}; it has {sorted(known)}")
    arguments = {}
    for name, value in values.items():
        if cls is EraseConfig and name in _PARTS:
            value = _from_dict(_PARTS[name], value, f"{where}.{name}")
        arguments[name] = value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
