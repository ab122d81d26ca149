"""Training of the LoRA factors: settings, loss, and steps that any process can take again.

    L = | eps'(z_t, t, E + eta) - eps(z_t, t, A) |^2              targets and neighbors
      + gamma   | eps'(z_t, t, E + eta') - eps(z_t, t, E + eta') |^2   beyond
      + gamma_p | eps'(z_t, t, P) - eps(z_t, t, P) |^2                 preserve

(docs/method.md, section 6.1). What a step draws depends on the seed and its number alone, so a
resumed run and a second process draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from realera_fast import mining, philox
from realera_fast.lora import TARGET_MODULES, LoraParameters
from realera_fast.names import valid_texts
from realera_fast.processes import Processes
from realera_fast.settings import check_types
from realera_fast.text_path import TextPath
from realera_fast.trajectories import Window

_FP16_SCALE = 2.0**14
"""Half precision holds no gradient below 6e-8: it travels scaled."""
_MAX_NORM = 1.0
_WORSE = 10.0
"""A held-back loss so many times that of the start is divergence."""


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
    """Target rows and as many preserve rows a step; half as many beyond rows (count; ours)."""

    r: int = 4
    """peft's `r`, the rank of the factors (ours; MACE uses 1)."""

    lora_alpha: float = 4.0
    """peft's `lora_alpha`; the factors are scaled by `lora_alpha / r` (ours)."""

    use_rslora: bool = False
    """peft's `use_rslora`: scale by `lora_alpha / sqrt(r)` (arXiv 2312.03732)."""

    target_modules: tuple[str, ...] = ("to_k", "to_v")
    """Projections of each cross-attention layer with factors; "to_q" and "to_out.0" are possible
    too (default: those that text enters through)."""

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

    trajectories: int = 8
    """Starts denoised for targets, and as many for preserve prompts, in a window (count; ours)."""

    refresh_steps: int = 100
    """Optimizer steps that a window of trajectories serves, so z_t is of factors at most so many
    steps old (count; ours). Shorter where the named words need more windows."""

    sampling_steps: int = 20
    """Denoising steps of a trajectory (count; ours)."""

    guidance_scale: float = 5.0
    """Classifier-free guidance of the trajectories (ratio; diffusers' SD default is 7.5)."""

    min_timestep: float = 0.0
    """Latest part of the schedule that is left out, as a fraction of it (0 to 1; ours)."""

    latent_size: int | None = None
    """Height and width of the latents in latent pixels; `None` is the U-Net's `sample_size`."""

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
    """Denoising steps of a checked picture (count; ours)."""

    check_words: int = 16
    """Named words whose pictures are checked, and as many words near them (count; ours)."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.target_modules is None:
            raise TypeError(
                f"AlignmentConfig.target_modules must name some of {TARGET_MODULES}, got None"
            )
        names = valid_texts(self.target_modules, "AlignmentConfig.target_modules")
        object.__setattr__(self, "target_modules", names)
        for name in (
            *("steps", "batch_size", "r", "trajectories", "refresh_steps", "sampling_steps"),
            *("gradient_accumulation_steps", "sampling_batch_size", "patience", "check_words"),
            "check_sampling_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"AlignmentConfig.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AlignmentConfig.{name} must be > 0, got {getattr(self, name)}")
        for name in (
            *("beyond_scale", "preserve_scale", "negative_guidance"),
            *("evaluation_steps", "check_seeds"),
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"AlignmentConfig.{name} must be >= 0, got {getattr(self, name)}")
        if not 0.0 <= self.min_timestep < 1.0:
            raise ValueError(
                f"AlignmentConfig.min_timestep must be in [0, 1), got {self.min_timestep}"
            )
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        if unknown or not self.target_modules:
            raise ValueError(
                f"AlignmentConfig.target_modules must name some of {TARGET_MODULES}, "
                f"got {self.target_modules}"
            )
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                'AlignmentConfig.mixed_precision must be "no" or "bf16", '
                f"got {self.mixed_precision!r}"
            )

    @property
    def beyond_size(self) -> int:
        """Beyond rows a step."""
        return max(1, self.batch_size // 2) if self.beyond_scale else 0

    @property
    def preserve_size(self) -> int:
        """Preserve rows a step."""
        return self.batch_size if self.preserve_scale else 0


@dataclass(frozen=True)
class Terms:
    """The loss and what it is made of, unweighted means."""

    loss: float
    target: float
    beyond: float
    preserve: float

    def to_dict(self) -> dict[str, float]:
        """Plain values, for trackers and bars."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Batch:
    """Rows of the three terms, one below the other, and how much each counts."""

    latents: Tensor
    """`[b, c, h, w]`."""
    timesteps: Tensor
    """`[b]`."""
    states: Tensor
    """`[b, t, d]` what the student is shown."""
    teacher: Tensor
    """`[b, c, h, w]` the prediction to agree with."""
    weight: Tensor
    """`[b]` of a row's mean squared error in the loss."""
    term: Tensor
    """`[3, b]` of a row's mean squared error in the three terms."""


def loss_of(path: TextPath, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of some rows, and `[3]` its terms without weights or gradients."""
    prompts = path.condition(batch.states, "aligned")
    student = path.predict(batch.latents, batch.timesteps, prompts)
    errors = (student - batch.teacher.to(student)).square().flatten(1).mean(dim=1)
    return (errors * batch.weight).sum(), batch.term @ errors.detach()


class DivergedError(FloatingPointError):
    """Training left the range of numbers, or went the wrong way."""


class Trainer:
    """Takes optimizer steps on the factors of a text path."""

    def __init__(
        self,
        path: TextPath,
        config: AlignmentConfig,
        region: mining.Region | None,
        *,
        seed: int,
        processes: Processes,
    ) -> None:
        """
        Args:
            region: where targets are moved to within their neighborhood; None leaves them.
        """
        self.path, self.config, self.processes = path, config, processes
        self.lora: LoraParameters = path.lora
        self.region, self.seed = region, seed
        self.parameters = self.lora.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0
        )
        self._scale = _FP16_SCALE if path.dtype == torch.float16 else 1.0
        self.best: dict[str, Tensor] = {}
        """Factors of the best held-back loss so far, by name."""
        self.held_back: list[float] = []
        """Held-back loss of each look, the first before any step."""
        self.losses: list[float] = []
        """Loss of each step."""

    @property
    def best_look(self) -> int:
        """Number of the look with the least held-back loss."""
        return min(range(len(self.held_back)), key=self.held_back.__getitem__)

    @property
    def is_exhausted(self) -> bool:
        """Whether the last looks were all worse than an earlier one."""
        return len(self.held_back) - 1 - self.best_look >= self.config.patience

    def batch(self, window: Window, seed: int, part: int, parts: int) -> Batch:
        """One of the equal parts of a step's rows.

        Args:
            seed: decides what the step draws.
            part, parts: which of how many.
        """
        config, device = self.config, self.path.device
        generator = torch.Generator("cpu").manual_seed(seed)
        chosen, weights, terms = [], [], []
        for number, (points, count, scale) in enumerate(
            (
                (window.target, config.batch_size, 1.0),
                (window.beyond, config.beyond_size, config.beyond_scale),
                (window.preserve, config.preserve_size, config.preserve_scale),
            )
        ):
            if not count or points is None:
                continue
            index = torch.randint(len(points), (count,), device="cpu", generator=generator)
            start, stop = count * part // parts, count * (part + 1) // parts
            rows = points.take(index[start:stop])
            states = rows.states
            if number == 0 and self.region is not None and stop > start:
                states = mining.sample(
                    states,
                    self.region,
                    samples=1,
                    seed=seed,
                    concept_offset=start,
                ).rows()[:, 0]
            chosen.append((rows, states))
            weights.append(
                torch.full((stop - start,), scale / count, dtype=torch.float32, device="cpu")
            )
            shares = torch.zeros(3, stop - start, dtype=torch.float32, device="cpu")
            shares[number] = 1.0 / count
            terms.append(shares)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(rows, name) for rows, _ in chosen])

        return Batch(
            joined("latents"),
            joined("timesteps"),
            torch.cat([states for _, states in chosen]),
            joined("teacher"),
            torch.cat(weights).to(device),
            torch.cat(terms, dim=1).to(device),
        )

    def step(self, window: Window, number: int) -> Terms:
        """Optimizer step of that number.

        Raises:
            DivergedError: the loss or a gradient is not finite; the factors are as before.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * (1.0 - number / config.steps)
        self.optimizer.zero_grad(set_to_none=False)
        seed = philox.fold_seed(self.seed, number)
        total = torch.zeros(4, device=self.path.device, dtype=torch.float64)
        parts = config.gradient_accumulation_steps
        for i in range(parts):
            batch = self.batch(
                window, seed, self.processes.rank * parts + i, self.processes.count * parts
            )
            if len(batch.latents):
                loss, terms = loss_of(self.path, batch)
                (loss * self._scale).backward()
                total += torch.cat([loss.detach()[None], terms])
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad.div_(self._scale))
        self.processes.sum_(gradients)
        self.processes.sum_([total])
        values = Terms(*total.tolist())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_NORM)
        if not (math.isfinite(values.loss) and bool(torch.isfinite(norm))):
            raise DivergedError(
                f"loss {values.loss}, gradient norm {norm.item()} at step {number + 1}"
            )
        self.optimizer.step()
        self.losses.append(values.loss)
        return values

    @torch.no_grad()
    def look(self, held_back: Window) -> float:
        """Loss of held-back prompts now; keeps the factors if it is the least so far.

        Raises:
            DivergedError: it is not finite, or many times that of the start.
        """
        config, processes = self.config, self.processes
        rows = config.batch_size + config.beyond_size + config.preserve_size
        parts = -(-rows // config.sampling_batch_size)
        seed = philox.fold_seed(self.seed, _HELD_BACK_STREAM)
        total = torch.zeros(1, device=self.path.device, dtype=torch.float64)
        for i in range(parts):
            batch = self.batch(held_back, seed, processes.rank * parts + i, processes.count * parts)
            if len(batch.latents):
                total += loss_of(self.path, batch)[0]
        processes.sum_([total])
        loss = float(total)
        if not math.isfinite(loss) or (
            self.held_back and loss > _WORSE * max(self.held_back[0], 1e-12)
        ):
            raise DivergedError(f"held-back loss {loss} after step {len(self.losses)}")
        self.held_back.append(loss)
        if loss <= min(self.held_back):
            self.keep()
        return loss

    def keep(self) -> None:
        """Remembers the factors as the best ones."""
        self.best = {
            name: value.detach().clone() for name, value in self.lora.named_tensors().items()
        }

    @torch.no_grad()
    def use_best(self) -> None:
        """Goes back to the remembered factors."""
        for name, value in self.lora.named_tensors().items():
            value.copy_(self.best[name])

    def tensors(self) -> dict[str, Tensor]:
        """Factors, optimizer state and best factors, for a checkpoint."""
        found = {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.lora.named_tensors().items():
            found[f"lora.{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"adam.{name}.{key}"] = value
        return found

    def state(self) -> dict[str, Any]:
        """Everything else, as plain JSON values."""
        return {"losses": self.losses, "held_back": self.held_back}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continues from `tensors` and `state`."""
        for name, parameter in self.lora.named_tensors().items():
            parameter.copy_(tensors[f"lora.{name}"])
            prefix = f"adam.{name}."
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): value if key.endswith(".step") else value.to(parameter)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        device = self.path.device
        self.best = {
            key.removeprefix("best."): value.to(device)
            for key, value in tensors.items()
            if key.startswith("best.")
        }
        self.losses, self.held_back = list(state["losses"]), list(state["held_back"])


_HELD_BACK_STREAM = (1 << 31) - 1
"""No step has this number."""
