"""A transformer with joint attention as the original, as the edited one, or with LoRA factors.

Text enters through one linear map of the token sequence and one of the pooled vector, so an edit of
these is an edit of the prompt: W T x = W (T x). Factors are added by hooks to the projections of
the text's stream. One module serves as teacher and student, and its weights are never touched.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from realera_fast.models import class_of, projections
from realera_fast.runtime import uncompiled, unwrapped
from realera_fast.solver import ConceptMap
from realera_fast.unet import FP16_SCALE, LoraParameters, Variant, is_own_call


@dataclass(frozen=True, eq=False)
class JointConditioning:
    """Prompts as the transformer is shown them."""

    states: Tensor
    """`[b, t, d]` the token sequence, edited as the variant asks."""
    pooled: Tensor
    """`[b, q]` the pooled vectors, edited as well."""
    adapted: bool
    """Whether the LoRA factors count."""


class SharedTransformer:
    """Runs a transformer as each of its three variants.

    Use it inside `installed`.
    """

    def __init__(
        self,
        transformer: Any,
        concept_map: ConceptMap,
        lora: LoraParameters,
        *,
        pooled_map: ConceptMap,
        zero_rows: int = 0,
        guidance_scale: float = 1.0,
        mixed_precision: Literal["no", "bf16"] = "no",
        compiled: bool = False,
    ) -> None:
        """
        Args:
            transformer: the original, of a class in `models.is_joint`.
            concept_map: the closed form of the token sequence, T = I + L R.
            lora: the factors; their hidden layers are some of `models.text_projections`.
            pooled_map: the closed form of the pooled vector, which prompts have as their last row
                (`text.TextWithPooled`).
            zero_rows: rows of zeros that the pipeline shows behind each prompt.
            guidance_scale: what a model that takes guidance as an input (FLUX.1 dev) is told.
            mixed_precision: "bf16" computes a float32 transformer under autocast.
            compiled: run the student through `torch.compile`.
        """
        self.transformer: Any = unwrapped(transformer)
        self.lora, self.zero_rows = lora, zero_rows
        weight = next(iter(projections(transformer).values())).weight
        self.device = weight.device
        self._autocast = mixed_precision == "bf16" and weight.dtype == torch.float32
        self.dtype = torch.bfloat16 if self._autocast else weight.dtype
        self.gradient_scale = FP16_SCALE if self.dtype == torch.float16 else 1.0
        self._dtype = weight.dtype
        self._maps = (concept_map, pooled_map)
        takes = bool(getattr(self.transformer.config, "guidance_embeds", False))
        self._guidance = guidance_scale if takes else None
        self._run = _RUNS[class_of(self.transformer)]
        self._adapted = False
        self._thread = threading.get_ident()
        self._forward = torch.compile(self.transformer) if compiled else self.transformer

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """For the length of the block the text's projections have their factors where asked."""
        handles = []
        try:
            for name in self.lora.hidden:
                layer = self.transformer.get_submodule(name)
                handles.append(layer.register_forward_hook(self._hook_of(name)))
            with uncompiled(self.transformer):
                yield
        finally:
            self._adapted = False
            for handle in handles:
                handle.remove()

    def _hook_of(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not (self._adapted and is_own_call(self._thread)):
                return output
            return self.lora.add_hidden(name, inputs[0], output)

        return add

    def condition(self, states: Tensor, variant: Variant) -> JointConditioning:
        """`[b, t + 1, d]` prompts as the variant sees them; the last row is the pooled vector."""
        of_sequence, of_pooled = self._maps
        states = states.to(self.device)
        sequence, pooled = states[:, :-1], states[:, -1, : of_pooled.width]
        if variant != "original":
            sequence, pooled = of_sequence(sequence), of_pooled(pooled)
        sequence = functional.pad(sequence, (0, 0, 0, self.zero_rows))
        return JointConditioning(
            sequence.to(self._dtype), pooled.to(self._dtype), variant == "aligned"
        )

    def predict(self, latents: Tensor, timesteps: Tensor, prompts: JointConditioning) -> Tensor:
        """`[b, c, h, w]` predicted velocity, float32 or wider; the transformer computes in its own
        dtype.

        Backward has to be done before the next call: recomputed layers look up whether they have
        factors again.
        """
        self._adapted = prompts.adapted
        forward = self._forward if torch.is_grad_enabled() else self.transformer
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            velocity = self._run(
                forward, latents.to(self._dtype), timesteps, prompts, self._guidance
            )
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    def error_gradient(
        self, latents: Tensor, timesteps: Tensor, states: Tensor, goal: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor]:
        """How far predictions are from a goal, and which way prompts would have to go.

        Args:
            states: `[b, t, d]` prompts.
            goal: `[b, c, h, w]`.
            variant: what predicts.

        Returns:
            `[b]` mean squared errors, and `[b, t, d]` float32 the gradient of each with respect to
            its prompt.
        """
        scale = self.gradient_scale
        with torch.enable_grad():
            asked = states.to(self.device, copy=True)
            asked = asked.to(torch.promote_types(asked.dtype, torch.float32)).detach()
            asked.requires_grad_()
            velocity = self.predict(latents, timesteps, self.condition(asked, variant))
            errors = (velocity - goal.to(velocity)).square().flatten(1).mean(dim=1)
            (gradient,) = torch.autograd.grad(errors.sum() * scale, [asked])
        return errors.detach(), gradient.float() / scale


def _run_sd3(
    forward: Any, latents: Tensor, timesteps: Tensor, prompts: JointConditioning, _: float | None
) -> Tensor:
    """Stable Diffusion 3, as its pipeline calls it."""
    velocity: Tensor = forward(
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=prompts.states,
        pooled_projections=prompts.pooled,
        return_dict=False,
    )[0]
    return velocity


def _run_flux(
    forward: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompts: JointConditioning,
    guidance_scale: float | None,
) -> Tensor:
    """FLUX.1, as its pipeline calls it: latents in rows of 2 x 2, each with its place."""
    height, width = (side // 2 for side in latents.shape[-2:])
    rows = functional.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()
    place = latents.new_zeros(height, width, 3)
    place[..., 1] += torch.arange(height, device=place.device)[:, None]
    place[..., 2] += torch.arange(width, device=place.device)
    guidance = None
    if guidance_scale is not None:
        guidance = torch.full((len(latents),), guidance_scale, device=latents.device)
    velocity: Tensor = forward(
        hidden_states=rows,
        timestep=timesteps.to(latents.dtype) / _FLUX_TIME,
        guidance=guidance,
        pooled_projections=prompts.pooled,
        encoder_hidden_states=prompts.states,
        txt_ids=latents.new_zeros(prompts.states.shape[1], 3),
        img_ids=place.flatten(0, 1),
        return_dict=False,
    )[0]
    return functional.pixel_shuffle(velocity.mT.unflatten(2, (height, width)), 2)


_FLUX_TIME = 1000.0
"""FLUX's transformer multiplies its time steps by that."""
_RUNS: dict[str, Callable[..., Tensor]] = {
    "SD3Transformer2DModel": _run_sd3,
    "FluxTransformer2DModel": _run_flux,
}
