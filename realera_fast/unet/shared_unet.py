"""What text becomes in the cross-attention layers: original, edited, or edited with LoRA.

Keys and values don't depend on the latents. They are computed here, all layers at once, before the
U-Net runs, and handed to its attention layers: one module serves as teacher and student, and its
weights are never touched.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from realera_fast import ops
from realera_fast.models import LoraFactors, projections, stream_of
from realera_fast.runtime import uncompiled, unwrapped
from realera_fast.solver import ConceptMap
from realera_fast.unet import attention
from realera_fast.unet.denoiser import FP16_SCALE, Variant, is_own_call
from realera_fast.unet.lora import LoraParameters

_SHORT = 256
"""Up to so many latent pixels PyTorch's fused attention loses on a CPU in half precision: its
backward pass costs 5 ms a layer whatever the length."""

_VAE_SCALE = 8
"""Pixels of a latent's side, in every autoencoder of Stable Diffusion."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Prompts as the attention layers see them."""

    states: Tensor
    """`[b, t, d]` the prompts' embeddings."""
    pooled: Tensor | None
    """`[b, q]` their pooled vectors, edited as the variant asks; None where it takes none."""
    projected: Mapping[str, Tensor]
    """`[b, t, o]` by projection name."""
    adapted: bool
    """Whether the factors of queries, outputs and self-attention count too."""

    def expand(self, rows: int) -> Conditioning:
        """One prompt as a batch of `rows` equal ones, without a copy."""
        return Conditioning(
            self.states.expand(rows, -1, -1),
            None if self.pooled is None else self.pooled.expand(rows, -1),
            {name: part.expand(rows, -1, -1) for name, part in self.projected.items()},
            self.adapted,
        )


class SharedUNet:
    """Runs a U-Net as each of its three variants, with the text's part computed once.

    Use it inside `installed`.
    """

    def __init__(
        self,
        unet: Any,
        concept_map: ConceptMap,
        lora: LoraParameters,
        *,
        pooled_map: ConceptMap | None = None,
        moved: Mapping[str, LoraFactors] | None = None,
        mixed_precision: Literal["no", "bf16"] = "no",
        compiled: bool = False,
    ) -> None:
        """
        Args:
            unet: the original `UNet2DConditionModel`.
            concept_map: the closed form, T = I + L R.
            pooled_map: that of the pooled vector, for SDXL: prompts then have it as their last row
                (`text.TextWithPooled`). An edited map of it is an edited vector.
            moved: what the closed form adds to single projections, by name.
            lora: the factors; their text layers are some of the U-Net's projections.
            mixed_precision: "bf16" computes a float32 U-Net under autocast.
            compiled: run the student through `torch.compile`.
        """
        # A compiled model would be compiled again for every variant.
        self.unet: Any = unwrapped(unet)
        self.lora = lora
        self._pooled_map = pooled_map
        self._layers = {
            name: layer
            for name, layer in projections(unet).items()
            if stream_of(name) == "sequence"
        }
        weight = next(iter(self._layers.values())).weight
        self.device = weight.device
        self._autocast = mixed_precision == "bf16" and weight.dtype == torch.float32
        self.dtype = torch.bfloat16 if self._autocast else weight.dtype
        self.gradient_scale = FP16_SCALE if self.dtype == torch.float16 else 1.0
        """What a loss is multiplied with before its gradient is taken, and that divided by."""
        # Layers with factors come first: theirs and the others' weights are one slice each.
        rest = [name for name in self._layers if name not in lora.names]
        self._names = [*lora.names, *rest]
        self._heights = [self._layers[name].out_features for name in self._names]
        self._map = concept_map
        self._moved = moved or {}
        self._handed: Conditioning | None = None
        self._thread = threading.get_ident()
        self._forward = torch.compile(self.unet) if compiled else self.unet

    @functools.cached_property
    def _edited(self) -> Tensor:
        """All weights of the closed form one below the other; a copy, for those who ask for it."""
        edited = torch.cat([self._layers[name].weight.detach() for name in self._names])
        if self._map.rank:
            left, right = self._map.left.to(self.device), self._map.right.to(self.device)
            ops.low_rank_update_([edited], left, right)
        for name, part in zip(self._names, edited.split(self._heights), strict=True):
            if name in self._moved:
                part += self._moved[name].delta.to(part)
        return edited.to(self.dtype)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """For the length of the block the attention layers take what they are handed."""
        former = {name: attn.processor for name, attn in attention.layers(self.unet).items()}
        handles = []
        try:
            attention.install(self.unet, self)
            for name in self.lora.hidden:
                if name.removesuffix(".to_q").removesuffix(".to_out.0") not in former:
                    layer = self.unet.get_submodule(name)
                    handles.append(layer.register_forward_hook(self._hook_of(name)))
            with uncompiled(self.unet):
                yield
        finally:
            self._handed = None
            for handle in handles:
                handle.remove()
            attention.reinstate(self.unet, former)

    def _hook_of(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """Adds the factors of a layer of self-attention, whose processor stays."""

        def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self._adapted(name, inputs[0], output)

        return add

    def condition(self, states: Tensor, variant: Variant) -> Conditioning:
        """Keys and values of all layers for `[b, t, d]` prompts: one product, LoRA included."""
        pooled = None
        if self._pooled_map is not None:
            states, pooled = states[:, :-1], states[:, -1, : self._pooled_map.width]
            pooled = pooled.to(self.device)
            pooled = (pooled if variant == "original" else self._pooled_map(pooled)).to(self.dtype)
        states = states.to(self.device, self.dtype)
        parts: Sequence[Tensor]
        if variant == "original":
            parts = [
                nn.functional.linear(states, self._layers[name].weight.detach().to(self.dtype))
                for name in self._names
            ]
        else:
            parts = self._products(states, adapted=variant == "aligned")
        projected = {}
        for name, part in zip(self._names, parts, strict=True):
            bias = self._layers[name].bias
            projected[name] = part if bias is None else part + bias.detach().to(self.dtype)
        return Conditioning(states, pooled, projected, variant == "aligned")

    def _products(self, states: Tensor, *, adapted: bool) -> Sequence[Tensor]:
        rows = states.flatten(0, 1)
        split = sum(self.lora.heights) if adapted else 0
        found = []
        if split:
            found.append(
                ops.project(
                    rows,
                    self._edited[:split],
                    down=self.lora.down,
                    up=self.lora.up,
                    heights=self.lora.heights,
                    scaling=self.lora.scaling,
                )
            )
        if split < len(self._edited):
            found.append(ops.project(rows, self._edited[split:]))
        outputs = [y.view(*states.shape[:2], -1) for y in found]
        count = len(self.lora.names) if adapted else 0
        groups = [self._heights[:count], self._heights[count:]]
        # A split's gradient is one concatenation, that of slices a sum of padded copies.
        return [
            part
            for y, heights in zip(outputs, [g for g in groups if g], strict=True)
            for part in y.split(heights, dim=-1)
        ]

    def predict(self, latents: Tensor, timesteps: Tensor, prompts: Conditioning) -> Tensor:
        """`[b, c, h, w]` predicted noise, float32 or wider; the U-Net computes in its own dtype.

        Backward has to be done before the next call: recomputed layers look their prompts up again.
        """
        self._handed = prompts
        forward = self._forward if torch.is_grad_enabled() else self.unet
        dtype = torch.float32 if self._autocast else self.dtype
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast),
            self._attention(latents),
        ):
            noise = forward(
                latents.to(dtype),
                timesteps,
                encoder_hidden_states=prompts.states,
                added_cond_kwargs=self._added(latents, prompts),
            ).sample
        return noise.to(torch.promote_types(noise.dtype, torch.float32))

    def error_gradient(
        self, latents: Tensor, timesteps: Tensor, states: Tensor, goal: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor]:
        """How far predictions are from a goal, and which way prompts would have to go.

        The gradient is taken at keys and values and comes back through one product with all
        weights, as the prompts went in.

        Args:
            states: `[b, t, d]` prompts.
            goal: `[b, c, h, w]`.
            variant: what predicts.

        Returns:
            `[b]` mean squared errors, and `[b, t, d]` float32 the gradient of each with respect to
            its prompt.
        """
        with torch.no_grad():
            prompts = self.condition(states, variant)
        pooled = [] if prompts.pooled is None else [prompts.pooled]
        leaves = [x.detach().requires_grad_() for x in (*prompts.projected.values(), *pooled)]
        prompts = replace(
            prompts,
            projected=dict(zip(prompts.projected, leaves, strict=False)),
            pooled=leaves[-1] if pooled else None,
        )
        scale = self.gradient_scale
        with torch.enable_grad():
            noise = self.predict(latents, timesteps, prompts)
            errors = (noise - goal.to(noise)).square().flatten(1).mean(dim=1)
            gradients = list(torch.autograd.grad(errors.sum() * scale, leaves))
        of_pooled = gradients.pop() if pooled else None
        back = self._pulled_back(gradients, variant)
        if of_pooled is not None:
            if variant != "original":
                assert self._pooled_map is not None
                transposed = ConceptMap(self._pooled_map.right.mT, self._pooled_map.left.mT)
                of_pooled = transposed(of_pooled)
            rest = back.shape[-1] - of_pooled.shape[-1]
            row = nn.functional.pad(of_pooled.to(back), (0, rest))
            back = torch.cat([back, row[:, None]], dim=1)
        return errors.detach(), back / scale

    @torch.no_grad()
    def _pulled_back(self, gradients: Sequence[Tensor], variant: Variant) -> Tensor:
        """`[b, t, d]` float32 gradient at the prompts of those `[b, t, o]` at all projections."""
        parts = dict(zip(self._names, gradients, strict=True))
        if variant == "original":
            weights = ((parts[name], self._layers[name].weight.detach()) for name in self._names)
            return torch.stack([(part @ weight.to(part)).float() for part, weight in weights]).sum(
                0
            )
        whole = torch.cat(list(gradients), dim=-1)
        back = (whole @ self._edited.to(whole)).float()
        if variant == "aligned" and self.lora.names:
            ups = self.lora.up.detach().split(self.lora.heights)
            for name, down, up in zip(self.lora.names, self.lora.down.detach(), ups, strict=True):
                back += self.lora.scaling * (parts[name].float() @ up.float()) @ down.float()
        return back

    def _added(self, latents: Tensor, prompts: Conditioning) -> dict[str, Tensor] | None:
        """What SDXL takes beside the tokens: the pooled vector, and an image that is not cut."""
        if prompts.pooled is None:
            return None
        height, width = (_VAE_SCALE * side for side in latents.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device)
        sizes = sizes.to(prompts.pooled.dtype).expand(len(latents), -1)
        return {"text_embeds": prompts.pooled, "time_ids": sizes}

    def _attention(self, latents: Tensor) -> contextlib.AbstractContextManager[None]:
        """The implementation of attention that is faster for latents `[b, c, h, w]`."""
        short = latents.shape[-1] * latents.shape[-2] <= _SHORT
        half = self.dtype in (torch.bfloat16, torch.float16)
        if torch.is_grad_enabled() and self.device.type == "cpu" and half and short:
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    # What `attention.Projector` asks for

    def keys_values(self, layer: str, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        """The handed keys and values of a layer."""
        if not is_own_call(self._thread):
            return attn.to_k(states), attn.to_v(states)
        assert self._handed is not None
        projected = self._handed.projected
        return projected[f"{layer}.to_k"], projected[f"{layer}.to_v"]

    def query(self, layer: str, attn: Any, hidden: Tensor) -> Tensor:
        """A layer's queries, with LoRA where that is trained."""
        return self._adapted(f"{layer}.to_q", hidden, attn.to_q(hidden))

    def output(self, layer: str, attn: Any, hidden: Tensor) -> Tensor:
        """A layer's output projection, with LoRA where that is trained."""
        return self._adapted(f"{layer}.to_out.0", hidden, attn.to_out[0](hidden))

    def _adapted(self, name: str, hidden: Tensor, output: Tensor) -> Tensor:
        if not is_own_call(self._thread):
            return output
        assert self._handed is not None
        return self.lora.add_hidden(name, hidden, output) if self._handed.adapted else output
