"""Cross-attention whose projections come from elsewhere, through diffusers' processor interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional

from realera_fast.runtime import unwrapped

_SAME = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "XFormersAttnProcessor",
    "SlicedAttnProcessor",
    "TextAttnProcessor",
)
"""Processors of the same mathematics: what they compute can be computed here."""


class Projector(Protocol):
    """Where a cross-attention layer gets its projections from."""

    def keys_values(self, layer: str, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[b, t, o]` for text `[b, t, d]`."""
        ...

    def query(self, layer: str, attn: Any, hidden: Tensor) -> Tensor:
        """Queries `[b, s, o]` for hidden states `[b, s, i]`."""
        ...

    def output(self, layer: str, attn: Any, hidden: Tensor) -> Tensor:
        """The output projection `[b, s, i]` of `[b, s, o]`, before dropout."""
        ...


class TextAttnProcessor:
    """Scaled dot-product cross-attention whose projections come from a projector."""

    def __init__(self, layer: str, projector: Projector) -> None:
        """
        Args:
            layer: name of the attention layer in its model.
        """
        self.layer, self.projector = layer, projector

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What diffusers asks of a processor: `[b, s, i]` for `[b, s, i]` and text `[b, t, d]`."""
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, tokens = states.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query = self.projector.query(self.layer, attn, hidden_states)
        key, value = self.projector.keys_values(self.layer, attn, states)
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        output: Tensor = attn.to_out[1](self.projector.output(self.layer, attn, mixed))
        return output / attn.rescale_output_factor


def layers(unet: nn.Module) -> dict[str, Any]:
    """The cross-attention layers of a model, each checked to be one that can be stood in for.

    Raises:
        ValueError: a layer computes something else; the message names it and says what to do.
    """
    found: dict[str, Any] = {}
    for name, module in unwrapped(unet).named_modules():
        if getattr(module, "is_cross_attention", False):
            _check(name, module)
            found[name] = module
    if not found:
        raise ValueError(f"model: {type(unet).__name__} has no cross-attention layer")
    return found


def _check(name: str, attn: Any) -> None:
    own = type(attn.processor)
    kind = own.__name__
    if kind.startswith("Fused"):
        raise ValueError(f"model: {name} runs {kind}; call unfuse_qkv_projections() first")
    # A name alone would let in a caller's class that computes something else.
    if kind not in _SAME or own.__module__.split(".")[0] not in ("diffusers", "realera_fast"):
        raise ValueError(
            f"model: {name} runs the attention processor {kind}, which can't be stood in for; call "
            "unet.set_attn_processor(AttnProcessor2_0()) first, and set it again afterwards"
        )
    for part in ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k"):
        if getattr(attn, part, None) is not None:
            raise ValueError(f"model: {name} has a {part}, which is not supported")
    width = attn.to_q.out_features / attn.heads
    if abs(attn.scale * width**0.5 - 1) > 1e-6:
        raise ValueError(f"model: {name} scales its scores by {attn.scale}: not supported")
    if attn.residual_connection:
        raise ValueError(f"model: {name} has a residual connection of its own: not supported")


def install(unet: nn.Module, projector: Projector) -> dict[str, Any]:
    """Sets a `TextAttnProcessor` on every cross-attention layer.

    Returns:
        The former processors by layer name, for `reinstate`.

    Raises:
        ValueError: a layer can't be stood in for; nothing is changed then.
    """
    found = layers(unet)
    former = {name: attn.processor for name, attn in found.items()}
    try:
        for name, attn in found.items():
            attn.set_processor(TextAttnProcessor(name, projector))
    except BaseException:
        # An interrupt between two layers.
        reinstate(unet, former)
        raise
    return former


def reinstate(unet: nn.Module, processors: Mapping[str, Any]) -> None:
    """Puts former processors back: the same objects."""
    model: Any = unwrapped(unet)
    for name, processor in processors.items():
        model.get_submodule(name).set_processor(processor)
