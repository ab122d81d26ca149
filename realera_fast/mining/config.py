"""Settings of neighbor mining."""

from __future__ import annotations

import math
from dataclasses import dataclass

from realera_fast.mining.region import BEYOND_OFFSET, Region
from realera_fast.runtime import check_scale, check_types, clean_names

NOISE = ("gaussian", "offset")
"""Modes that draw noise around a concept."""
MODES = ("vocabulary", *NOISE, "none")
"""Where neighbors come from; see `MiningConfig.mode`."""


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """How associated concepts are found and how much they, and their surroundings, weigh.

    The paper publishes neither its cosine bounds nor its radii: defaults marked (ours) are this
    library's choice.
    """

    mode: str = "vocabulary"
    """Source of neighbors. "vocabulary": the tokenizer's own words whose prompts fall inside the
    neighbor region; "gaussian": isotropic noise, mapped to where the target goes (the paper: to
    the anchor, which `PairsConfig.negative_guidance=0` asks for); "offset": the same noise, whose
    offset from the target is kept, e + eta -> a + eta; "none": no mining. In every mode the
    preserve prior leaves the neighborhood's words out, so these are always looked for. Default
    (ours): words did best of all on the embedded model (docs/results/quality.md)."""
    samples: int | None = None
    """Samples per prompt and region, a count; `None` takes the limit of infinitely many in closed
    form. Default (ours): the limit has no sampling noise and a cost independent of the count."""
    min_cosine: float = 0.5
    """S1, no unit: neighbors have at least this cosine with the target, beyond samples less.
    Default (ours): the paper gives no value; 0.5 is used by an independent re-implementation."""
    max_cosine: float = 0.9
    """S2, no unit: neighbors have at most this cosine with the target. Default (ours): the paper
    gives no value; 0.9 is used by an independent re-implementation."""
    max_distance: float = 1.6
    """D1, in units of the embedding's norm: longest step of a neighbor. Default (ours): the paper
    gives no value; a radius of 400 at a norm of 246 (Stable Diffusion 1.4) in an independent
    re-implementation."""
    beyond_distance: float = 1.6
    """D2, in units of the embedding's norm: longest step of a beyond sample. Default (ours): equal
    to D1."""
    neighbor_scale: float | str = "auto"
    """Weight of all noise neighbors of a prompt together, in units of the prompt's own weight; in
    vocabulary mode of each mined word, where a named one has `erase_scale`. "auto": as much as the
    target itself, or less where several concepts go together and the names and what stays would
    give way to mined words (`scales.choose_scales`). Default (ours): of 10 to 60 concepts of the
    embedded model more went and more stayed, of one nothing changed."""
    beyond_scale: float = 0.1
    """Weight of all beyond samples of a prompt together, in units of the prompt's own weight.
    Default (ours): enough to hold directions that no other row defends, too little to hold the
    target."""
    max_words: int = 64
    """Most words that are erased with a concept, a count, and twice as many with a category (kind
    "explicit"); more that are in its neighborhood are neither erased nor preserved, and the report
    warns of them. Default (ours)."""
    word_cosine: float | None = None
    """No unit: least cosine between a word and the target, as the denoiser sees them
    (`word_space.WordSpace`), for a word of which nothing is known to be in its neighborhood. `None`
    takes the line that pairs of the lexicon draw in this model (`line.Line`). Default (ours): a
    cosine means another thing in every model."""
    relative_words: int = 96
    """Most words a concept that are held in place for its sake, a count: relatives by the lexicon,
    and things near it that mean something else. Default (ours)."""
    relative_scale: float = 0.03
    """Weight of each of these, in units of the prior's mean row (`VocabularyConfig.preserve_scale`
    weighs both). Default (ours)."""
    candidates: int = 300
    """Words a concept that are read to see whether they are neighbors, a count, where the
    tokenizer's are too many to read all. Default (ours)."""
    spare: tuple[str, ...] = ()
    """Words that are no neighbors, whatever they look like: what a reader of the report strikes out
    (default: none)."""
    member_words: int = 256
    """Concepts of kind "explicit", which name a category: so many words, nearest to its name, are
    drawn to see whether they are members of it (`members`), a count. The size of latents and
    batches, the guidance scale and the precision are those of `AlignmentConfig`. Each word takes 8
    passes of the U-Net for every name of the category and for two more prompts: hours on a CPU for
    Stable Diffusion. A name that the model does not know finds what it happens to draw: read the
    report's neighbors. 0 goes by the text alone, as models do that the noise alignment does not run
    on. Default (ours)."""
    member_cosine: float = 0.42
    """The same, no unit: least cosine between where a word and where the category's name push the
    predicted noise for the word to be a neighbor; the lexicon's kinds of the name go by their text
    alone. Default (ours): above all others of the words near plant, food, clothing and building on
    the embedded model."""

    borderline: int = 0
    """Words close to the line between neighbors and relatives: so many for each concept are drawn
    as those of `member_words` are, a count, and beside them four certain neighbors and four
    relatives. One goes whose cosine with the concept's names is nearer to the neighbors' than to
    the relatives'. Default (ours): none, so that what goes depends on no scheduler and no
    device."""

    attack_rounds: int = 0
    """Rounds in which prompts are looked for that bring a concept back (`attack`), a count; those
    that are found go to its anchor, and the noise alignment trains on them with the adversary
    "worst". On U-Nets that the noise alignment runs on. Default (ours): none, for what they
    cost."""
    attack_prompts: int = 4
    """Prompts that are looked for in each round for each concept, a count. Default (ours)."""
    attack_scale: float = 10.0
    """Weight of each prompt that is found, in units of a mined word's: few of its rows carry it.
    Default (ours)."""
    attack_steps: int = 60
    """Optimizer steps of each, a count; every step takes 2 passes of the U-Net and back for each
    prompt. Default (ours)."""

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "spare", clean_names(self.spare, "MiningConfig.spare"))
        if self.mode not in MODES:
            raise ValueError(f"MiningConfig.mode must be one of {MODES}, got {self.mode!r}")
        if self.samples is not None and not 1 <= self.samples <= BEYOND_OFFSET:
            raise ValueError(
                f"MiningConfig.samples must be from 1 to 2**31, or None, got {self.samples}"
            )
        check_scale(self.neighbor_scale, "MiningConfig.neighbor_scale")
        for name in ("beyond_scale", "relative_scale", "attack_scale"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"MiningConfig.{name} must be finite and at least 0, got {value}")
        counts = ("max_words", "relative_words", "candidates", "member_words", "borderline")
        for name in (*counts, "attack_rounds"):
            count = getattr(self, name)
            if count < 0:
                raise ValueError(f"MiningConfig.{name} must not be negative, got {count}")
        for name in ("attack_prompts", "attack_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"MiningConfig.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("word_cosine", "member_cosine"):
            value = getattr(self, name)
            if value is not None and not -1.0 <= value <= 1.0:
                raise ValueError(
                    f"MiningConfig.{name} must be from -1 to 1, got {getattr(self, name)}"
                )
        # Both regions are built once here, so that a bad window fails where it was written.
        _ = self.neighbor_region, self.beyond_region

    @property
    def noise_scale(self) -> float:
        """`neighbor_scale` of noise, of which nothing is chosen."""
        return 1.0 if isinstance(self.neighbor_scale, str) else self.neighbor_scale

    @property
    def neighbor_region(self) -> Region:
        """Where neighbors lie: cosine in [S1, S2], step at most D1."""
        return Region(self.min_cosine, self.max_cosine, self.max_distance)

    @property
    def beyond_region(self) -> Region:
        """Where beyond samples lie: cosine below S1, step at most D2."""
        return Region(-1.0, self.min_cosine, self.beyond_distance)
