"""Settings of noise alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from realera_fast.alignment.losses import LOSSES, Loss
from realera_fast.runtime import check_types, valid_texts
from realera_fast.unet import SELF_ATTENTION, TARGET_MODULES

_POSITIVE_COUNTS = (
    "steps",
    "batch_size",
    "r",
    "trajectories",
    "refresh_steps",
    "sampling_steps",
    "gradient_accumulation_steps",
    "sampling_batch_size",
    "patience",
    "check_words",
    "check_sampling_steps",
    "preserve_trajectories",
    "adversary_steps",
)
ADVERSARIES = ("none", "random", "worst")
"""What moves the prompts that are trained on; see `AlignmentConfig.adversary`."""
DOWN_PROJECTIONS = ("trained", "null_space")
"""How the factors' down-projections come about; see `AlignmentConfig.down_projection`."""
TIMESTEPS = ("all", "discriminative")
"""At which denoising steps targets are trained; see `AlignmentConfig.timesteps`."""
_NOT_NEGATIVE = (
    "beyond_scale",
    "preserve_scale",
    "negative_guidance",
    "evaluation_steps",
    "check_seeds",
)


@dataclass(frozen=True)
class AlignmentConfig:
    """The LoRA stage. The paper publishes none of these values: all defaults are ours.

    `guidance_scale`, `latent_size`, `sampling_batch_size` and `mixed_precision` hold for the search
    for members of a category too (`MiningConfig.member_words`), with the stage enabled or not.
    """

    enabled: bool = True
    """Run the stage (default: yes, RealEra has two stages)."""

    steps: int = 100
    """Optimizer steps at most (count; MACE's LoRA stage takes 50 to 120)."""

    batch_size: int = 8
    """Target rows a step; half as many beyond rows (count; ours)."""

    preserve_batch_size: int | None = None
    """Preserve rows a step (count); `None` takes `batch_size`."""

    r: int = 4
    """peft's `r`, the rank of the factors (ours; MACE uses 1)."""

    lora_alpha: float = 4.0
    """peft's `lora_alpha`; the factors are scaled by `lora_alpha / r` (ours)."""

    use_rslora: bool = False
    """peft's `use_rslora`: scale by `lora_alpha / sqrt(r)` (arXiv 2312.03732)."""

    target_modules: tuple[str, ...] = ("to_k", "to_v")
    """Projections of each cross-attention layer with factors; "to_q" and "to_out.0" are possible
    too (default: those that text enters through). In joint attention those of the text's stream:
    "add_k_proj", "add_v_proj", "add_q_proj" and "to_add_out". "attn1.to_q", "attn1.to_k",
    "attn1.to_v" and "attn1.to_out.0" are of the self-attention of U-Nets."""

    learning_rate: float = 1e-3
    """AdamW step size, falling linearly to 0 over the steps (ours; MACE uses 1e-5 to 1e-4)."""

    beyond_scale: float = 0.5
    """gamma: weight of the beyond term (ratio; ours)."""

    preserve_scale: float = 2.0
    """gamma_p: weight of the preserve term (ratio; ours)."""

    negative_guidance: float = 1.5
    """g in the target eps(A) - g (eps(E) - eps(A)): away from the concept (ESD's idea, arXiv
    2303.07345). 0 follows the anchor, as RealEra's text has it, and was seen to bring synonyms back
    (ratio; ours)."""

    loss: Loss = "guided"
    """What a target row is asked for. "guided": the mean squared error to the target above;
    "triplet": relu(|s - eps(A)|^2 - eta |s - eps(E)|^2 + m) of the student's prediction s, which is
    0 from that target on, so that training ends where all are there (after GEM, arXiv 2606.00140,
    whose distances are not squared and whose m is 0); "adversarial_target": eps(E) in the target is
    that of the prompt nearby, one signed gradient step away, that the student is most like (after
    AEGIS, as docs/method.md, section 6.1 has it)."""

    triplet_eta: float = 0.75
    """eta of "triplet" (above `g / (1 + g)`, at most 1; ours, GEM has 1, with which nothing holds a
    prediction on the way from the concept to the anchor)."""

    down_projection: Literal["trained", "null_space"] = "trained"
    """"null_space" freezes the factors' down-projections where text that stays has next to nothing
    and the named words have most, by the second moments of the closed form, and trains the
    up-projections alone (after SuPLoRA, arXiv 2601.03305). Of `to_k` and `to_v` of U-Nets."""

    adversary: Literal["none", "random", "worst"] = "none"
    """What moves a prompt before the student is shown it. "none": nothing; "random": noise in
    RealEra's neighborhood (`MiningConfig.neighbor_region`, arXiv 2410.09140); "worst": signed
    gradient steps from a random start to where the student still predicts what the original does,
    at the z_t that is trained on and within `adversary_distance` (after RACE, arXiv 2405.16341).
    With "worst" the factors are trained whatever the closed form left, and stay where less of the
    concept comes back so."""

    adversary_steps: int = 1
    """Signed gradient steps of "worst", each one more forward and backward pass of the targets
    (count; ours; RACE takes 10)."""

    adversary_distance: float = 0.5
    """Longest step of "worst", in units of the embedding's norm (ratio; ours)."""

    trajectories: int = 8
    """Starts denoised for targets in a window (count; ours)."""

    original_trajectories: bool = False
    """Of three of these one follows the word's prompt with the model that is trained, one the
    word's and one the anchor's with the original: where a picture of the concept is begun already,
    an attack goes on."""

    preserve_trajectories: int = 8
    """Starts denoised for preserve prompts in a window, each of another word (count; ours)."""

    refresh_steps: int = 100
    """Optimizer steps that a window of trajectories serves, so z_t is of factors at most so many
    steps old (count; ours). Shorter where the named words need more windows."""

    sampling_steps: int = 20
    """Denoising steps of a trajectory (count; ours)."""

    guidance_scale: float = 5.0
    """Classifier-free guidance of the trajectories (ratio; diffusers' SD default is 7.5). FLUX.1
    dev is told it as an input, schnell takes none."""

    min_timestep: float = 0.0
    """Latest part of the schedule that is left out, as a fraction of it (0 to 1; ours)."""

    timesteps: Literal["all", "discriminative"] = "all"
    """Denoising steps that targets are trained at. "discriminative": those at which the original
    tells its pictures of the named words from their anchors at least as well as it does on average
    (a diffusion classifier, arXiv 2303.16203; after SDErasure, ICLR 2026, whose threshold is 0.8 of
    a softmax). What stays is held at all of them."""

    latent_size: int | None = None
    """Height and width of the latents in latent pixels; `None` is the model's `sample_size`. FLUX.1
    has none: the stage runs where this is named."""

    gradient_accumulation_steps: int = 1
    """Parts that a step's batch goes through the U-Net in (count)."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """"bf16" runs a float32 U-Net under bfloat16 autocast; others compute in their own dtype. On a
    CPU it pays only where that multiplies bfloat16 natively (`precision.multiplies_natively`)."""

    compile: bool = False
    """Train through `torch.compile`. It compiles for minutes: for long runs on a GPU."""

    sampling_batch_size: int = 32
    """Rows that go through the U-Net at a time where nothing is trained (count; ours)."""

    evaluation_steps: int = 20
    """Steps between looks at the loss of held-back prompts; the best factors seen stay (count;
    ours). 0 never looks and keeps the last ones."""

    patience: int = 3
    """Looks without improvement after which training stops (count; ours)."""

    check_seeds: int = 4
    """Held-back starts for each checked prompt (count; ours); 0 keeps the adapters unchecked."""

    check_sampling_steps: int = 10
    """Denoising steps of a checked image (count; ours)."""

    check_words: int = 16
    """Named words whose images are checked, and as many words near them (count; ours)."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.target_modules is None:
            raise TypeError(
                f"AlignmentConfig.target_modules must name some of {TARGET_MODULES}, got None"
            )
        names = valid_texts(self.target_modules, "AlignmentConfig.target_modules")
        object.__setattr__(self, "target_modules", names)
        for name in _POSITIVE_COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"AlignmentConfig.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AlignmentConfig.{name} must be > 0, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"AlignmentConfig.{name} must be >= 0, got {getattr(self, name)}")
        if not 0.0 <= self.min_timestep < 1.0:
            raise ValueError(
                f"AlignmentConfig.min_timestep must be in [0, 1), got {self.min_timestep}"
            )
        if self.preserve_batch_size is not None and self.preserve_batch_size < 1:
            raise ValueError(
                "AlignmentConfig.preserve_batch_size must be >= 1 or None, got "
                f"{self.preserve_batch_size}"
            )
        for name, known in (
            ("adversary", ADVERSARIES),
            ("loss", LOSSES),
            ("down_projection", DOWN_PROJECTIONS),
            ("timesteps", TIMESTEPS),
            ("mixed_precision", ("no", "bf16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"AlignmentConfig.{name} must be one of {known}, got {getattr(self, name)!r}"
                )
        if not 0.0 < self.triplet_eta <= 1.0:
            raise ValueError(
                f"AlignmentConfig.triplet_eta must be in (0, 1], got {self.triplet_eta}"
            )
        g = self.negative_guidance
        if self.loss == "triplet" and g / (1.0 + g) >= self.triplet_eta:
            raise ValueError(
                f"AlignmentConfig.triplet_eta: the triplet ends before its target unless it is "
                f"above negative_guidance / (1 + negative_guidance) = {g / (1.0 + g):.3g}, got "
                f"{self.triplet_eta}; raise it, or lower negative_guidance"
            )
        if self.loss == "adversarial_target" and not g:
            raise ValueError(
                'AlignmentConfig.loss: "adversarial_target" moves what negative_guidance leads '
                "away from, and that is 0; raise it, or take another loss"
            )
        if not 0.0 < self.adversary_distance < math.inf:
            raise ValueError(
                "AlignmentConfig.adversary_distance must be positive and finite, got "
                f"{self.adversary_distance}"
            )
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        if unknown or not self.target_modules:
            raise ValueError(
                f"AlignmentConfig.target_modules must name some of {TARGET_MODULES}, "
                f"got {self.target_modules}"
            )
        if self.down_projection == "null_space" and not set(names) <= {"to_k", "to_v"}:
            raise ValueError(
                'AlignmentConfig.target_modules: down_projection="null_space" knows the input of '
                f'"to_k" and "to_v" alone, got {names}; name these, or train the down-projections'
            )

    @property
    def self_attention(self) -> tuple[str, ...]:
        """Those of `target_modules` that are of self-attention."""
        return tuple(name for name in self.target_modules if name in SELF_ATTENTION)

    @property
    def beyond_size(self) -> int:
        """Beyond rows a step."""
        return max(1, self.batch_size // 2) if self.beyond_scale else 0

    @property
    def preserve_size(self) -> int:
        """Preserve rows a step."""
        size = self.batch_size if self.preserve_batch_size is None else self.preserve_batch_size
        return size if self.preserve_scale else 0
