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
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from realera_fast.alignment.adversary import AdversarialTarget, Adversary
from realera_fast.alignment.config import AlignmentConfig
from realera_fast.alignment.losses import GUIDED, TargetLoss
from realera_fast.alignment.windows import Points, Window
from realera_fast.ops import philox
from realera_fast.runtime import Processes
from realera_fast.unet import LoraParameters, SharedDenoiser

_MAX_NORM = 1.0
_WORSE = 10.0
"""A held-back loss so many times that of the start is divergence."""


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
    targets: int = 0
    """How many of the rows, the first ones, are targets with a loss of their own."""
    shown: Tensor | None = None
    """`[targets, c, h, w]` what the original predicts for the concept; None where nobody asks."""


def loss_of(
    shared: SharedDenoiser, batch: Batch, loss: TargetLoss = GUIDED
) -> tuple[Tensor, Tensor]:
    """The loss of some rows, and `[3]` its terms without weights or gradients."""
    prompts = shared.condition(batch.states, "aligned")
    student = shared.predict(batch.latents, batch.timesteps, prompts)
    targets = batch.targets
    errors = (student[targets:] - batch.teacher[targets:].to(student)).square()
    leaving = loss(student[:targets], batch.teacher[:targets], batch.shown)
    errors = torch.cat([leaving, errors.flatten(1).mean(dim=1)])
    return (errors * batch.weight).sum(), batch.term @ errors.detach().to(batch.term)


class DivergedError(FloatingPointError):
    """Training left the range of numbers, or went the wrong way."""


class Trainer:
    """Takes optimizer steps on the LoRA factors of a `SharedDenoiser`."""

    def __init__(
        self,
        shared: SharedDenoiser,
        config: AlignmentConfig,
        adversary: Adversary | None,
        *,
        target: AdversarialTarget | None = None,
        seed: int,
        processes: Processes,
    ) -> None:
        """
        Args:
            adversary: moves prompts of targets within their neighborhood; None leaves them.
            target: moves what they lead away from; None leaves it.
        """
        self.shared, self.config, self.processes = shared, config, processes
        self.lora: LoraParameters = shared.lora
        self.adversary, self.target, self.seed = adversary, target, seed
        self.loss = TargetLoss(config.loss, config.negative_guidance, config.triplet_eta)
        self.parameters = self.lora.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0
        )
        self._scale = shared.gradient_scale
        self.best: dict[str, Tensor] = {}
        """Factors of the best held-back loss so far, by name."""
        self.held_back: list[float] = []
        """Held-back loss of each look, the first before any step."""
        self.losses: list[float] = []
        """Loss of each step."""
        self.is_reached = False
        """Whether the last look found no held-back target that is left to be moved."""

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
        config, device = self.config, self.shared.device
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
            if number == 0:
                rows = targets = self._moved(rows, seed, start)
            chosen.append(rows)
            weights.append(
                torch.full((stop - start,), scale / count, dtype=torch.float32, device="cpu")
            )
            shares = torch.zeros(3, stop - start, dtype=torch.float32, device="cpu")
            shares[number] = 1.0 / count
            terms.append(shares)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(rows, name) for rows in chosen])

        return Batch(
            joined("latents"),
            joined("timesteps"),
            joined("states"),
            joined("teacher"),
            torch.cat(weights).to(device),
            torch.cat(terms, dim=1).to(device),
            len(targets),
            targets.shown,
        )

    def _moved(self, rows: Points, seed: int, offset: int) -> Points:
        """Target rows after the adversary had them.

        Args:
            seed: of the step.
            offset: number of the first row in the step.
        """
        if not len(rows):
            return rows
        plain = rows.states
        if self.adversary is not None:
            states = self.adversary.moved(
                rows.latents, rows.timesteps, rows.states, rows.shown, seed=seed, offset=offset
            )
            rows = replace(rows, states=states)
        if self.target is not None:
            assert rows.shown is not None
            goal = self.target.goal(
                rows.latents, rows.timesteps, plain, rows.teacher, rows.shown, asked=rows.states
            )
            rows = replace(rows, teacher=goal)
        return rows

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
        total = torch.zeros(4, device=self.shared.device, dtype=torch.float64)
        parts = config.gradient_accumulation_steps
        for i in range(parts):
            batch = self.batch(
                window, seed, self.processes.rank * parts + i, self.processes.count * parts
            )
            if len(batch.latents):
                loss, terms = loss_of(self.shared, batch, self.loss)
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
        total = torch.zeros(3, device=self.shared.device, dtype=torch.float64)
        for i in range(parts):
            batch = self.batch(held_back, seed, processes.rank * parts + i, processes.count * parts)
            if len(batch.latents):
                found, terms = loss_of(self.shared, batch, self.loss)
                total += torch.stack([found, terms[0], self._untouched(batch)])
        processes.sum_([total])
        loss, target, untouched = total.tolist()
        if not math.isfinite(loss) or (
            self.held_back and loss > _WORSE * max(self.held_back[0], untouched, 1e-12)
        ):
            raise DivergedError(f"held-back loss {loss} after step {len(self.losses)}")
        self.held_back.append(loss)
        self.is_reached = target == 0.0
        if loss <= min(self.held_back):
            self.keep()
        return loss

    def _untouched(self, batch: Batch) -> Tensor:
        """A triplet's loss of a student that predicts the concept: where the closed form did the
        work, the first look is next to nothing. Of other losses 0."""
        if self.loss.name != "triplet" or batch.shown is None:
            return torch.zeros((), dtype=torch.float32, device=self.shared.device)
        count = batch.targets
        errors = self.loss(batch.shown, batch.teacher[:count], batch.shown)
        return (errors * batch.weight[:count]).sum()

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
        return {
            "losses": self.losses,
            "held_back": self.held_back,
            "is_reached": self.is_reached,
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continues from `tensors` and `state`."""
        for name, parameter in self.lora.named_tensors().items():
            parameter.copy_(tensors[f"lora.{name}"])
            if not parameter.requires_grad:
                continue
            prefix = f"adam.{name}."
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): value if key.endswith(".step") else value.to(parameter)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        device = self.shared.device
        self.best = {
            key.removeprefix("best."): value.to(device)
            for key, value in tensors.items()
            if key.startswith("best.")
        }
        self.losses, self.held_back = list(state["losses"]), list(state["held_back"])
        self.is_reached = bool(state["is_reached"])


_HELD_BACK_STREAM = (1 << 31) - 1
"""No step has this number."""
