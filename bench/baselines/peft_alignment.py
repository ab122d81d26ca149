"""Noise alignment as a plain diffusers and peft training loop, after RealEra's second stage.

Two denoisers: a frozen original and an edited one with a peft adapter. Every step runs the original
on the whole batch, then the edited one, and takes an AdamW step on the same loss as the library's.
A Stable Diffusion 3 transformer takes prompts whose last row is the pooled vector.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional

from realera_fast.models import Stream, is_joint, streams
from realera_fast.solver import ConceptMap


class PlainLoop:
    """The two models, the optimizer, and one step."""

    def __init__(
        self,
        model: Any,
        maps: Mapping[Stream, ConceptMap],
        *,
        r: int,
        lora_alpha: float,
        learning_rate: float,
        target_modules: Sequence[str] = ("to_k", "to_v"),
        compiled: bool = False,
    ) -> None:
        """
        Args:
            model: the original; it becomes the teacher and is frozen.
            maps: the closed form of each text stream.
            target_modules: of a U-Net's cross-attention (of its self-attention: "attn1.to_q") or
                of the text's stream.
            compiled: run both models through `torch.compile`.
        """
        student = copy.deepcopy(model)
        with torch.no_grad():
            for name, stream in streams(student).items():
                layer = student.get_submodule(name)
                weight = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))
                left, right = maps[stream].left.to(weight), maps[stream].right.to(weight)
                layer.weight.copy_(weight + (weight @ left) @ right)
        student.requires_grad_(False)
        student.add_adapter(
            LoraConfig(
                r=r,
                lora_alpha=lora_alpha,  # type: ignore[arg-type]
                target_modules=[
                    name if is_joint(model) or "attn1" in name else f"attn2.{name}"
                    for name in target_modules
                ],
            )
        )
        dtype = next(model.parameters()).dtype
        # Factors of half-precision models are float32, as training scripts make them.
        wide = torch.promote_types(dtype, torch.float32)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(wide)
        self.student = student
        self.factors = {
            name: parameter
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }
        self._teacher = model.requires_grad_(False)
        self._autocast = dtype != wide
        self._run_teacher, self._run_student = self._teacher, student
        if compiled:
            self._run_teacher, self._run_student = torch.compile(model), torch.compile(student)
        self.optimizer = torch.optim.AdamW(
            list(self.factors.values()), lr=learning_rate, weight_decay=0.0
        )

    def _called(self, run: Any, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """`[b, c, h, w]` what a model predicts."""
        if is_joint(self._teacher):
            rows, pooled = states[:, :-1], states[:, -1]
            found: Tensor = run(
                hidden_states=latents,
                timestep=timesteps,
                encoder_hidden_states=rows,
                pooled_projections=pooled[:, : self._teacher.config.pooled_projection_dim],
            ).sample
            return found
        found = run(latents, timesteps, encoder_hidden_states=states).sample
        return found

    def predictions(
        self, latents: Tensor, timesteps: Tensor, student_states: Tensor, teacher_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`[b, c, h, w]` noise predicted by the student and by the teacher.

        Args:
            latents: `[b, c, h, w]`.
            timesteps: `[b]`.
            student_states, teacher_states: `[b, t, d]`.
        """
        dtype = next(self._teacher.parameters()).dtype
        latents = latents.to(dtype)
        # Mixed precision, as training scripts run half-precision models with float32 adapters.
        with torch.autocast(latents.device.type, dtype, enabled=self._autocast):
            with torch.no_grad():
                teacher = self._called(
                    self._run_teacher, latents, timesteps, teacher_states.to(dtype)
                )
            student = self._called(self._run_student, latents, timesteps, student_states.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        return student.to(wide), teacher.to(wide)

    def loss(self, *rows: Any, sizes: Sequence[int], scales: Sequence[float]) -> Tensor:
        """Weighted mean squared errors of the terms.

        Args:
            rows: as of `predictions`, those of the terms one below the other.
            sizes: rows of each term.
            scales: weight of each term.
        """
        student, teacher = self.predictions(*rows)
        total = torch.zeros_like(student[0, 0, 0, 0])
        parts = zip(student.split(list(sizes)), teacher.split(list(sizes)), scales, strict=True)
        for predicted, wanted, scale in parts:
            total = total + scale * functional.mse_loss(predicted, wanted)
        return total

    def gradient(self, latents: Tensor, timesteps: Tensor, states: Tensor, shown: Tensor) -> Tensor:
        """`[b, t, d]` gradient of the student's squared error against `shown` at its prompts."""
        dtype = next(self._teacher.parameters()).dtype
        leaf = states.detach().clone().requires_grad_()
        with torch.autocast(latents.device.type, dtype, enabled=self._autocast):
            student = self._called(self._run_student, latents.to(dtype), timesteps, leaf.to(dtype))
        error = (student.to(shown) - shown).square().flatten(1).mean(1).sum()
        return torch.autograd.grad(error, leaf)[0]

    def worst(
        self, latents: Tensor, timesteps: Tensor, states: Tensor, shown: Tensor, distance: float
    ) -> Tensor:
        """Prompts one signed gradient step from where they are (RACE, arXiv 2405.16341)."""
        size = states.float().square().mean(dim=(1, 2), keepdim=True).sqrt()
        start = states + distance / 2 * size * torch.randn_like(states)
        gradient = self.gradient(latents, timesteps, start, shown)
        return start - distance * size * gradient.sign()

    @torch.no_grad()
    def trajectory(
        self, scheduler: Any, noise: Tensor, states: Tensor, empty: Tensor, guidance_scale: float
    ) -> Tensor:
        """`[s + 1, b, c, h, w]` latents from noise to picture, denoised by the student.

        Args:
            scheduler: with its time steps set.
            noise: `[b, c, h, w]`.
            states, empty: `[b, t, d]` prompts and empty prompts.
        """
        dtype = next(self._teacher.parameters()).dtype
        both = torch.cat([empty, states]).to(dtype)
        latents, way = noise, [noise]
        for timestep in scheduler.timesteps:
            with torch.autocast(latents.device.type, dtype, enabled=self._autocast):
                free, guided = (
                    self._called(
                        self._run_student, torch.cat([latents, latents]).to(dtype), timestep, both
                    )
                    .float()
                    .chunk(2)
                )
            predicted = free + guidance_scale * (guided - free)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
            way.append(latents)
        return torch.stack(way)

    def step(self, *rows: Any, sizes: Sequence[int], scales: Sequence[float]) -> float:
        """One optimizer step on the loss."""
        loss = self.loss(*rows, sizes=sizes, scales=scales)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.factors.values()), 1.0)
        self.optimizer.step()
        return loss.item()
