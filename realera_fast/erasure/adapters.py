"""An edit as a LoRA adapter, in the key layouts that other programs read.

    diffusers   unet.<layer>.lora_A.weight, lora_B.weight     pipe.load_lora_weights, peft
    kohya       lora_unet_<layer>.lora_down.weight, lora_up.weight, alpha     A1111, ComfyUI, kohya

Both hold the same factors; alpha is the rank everywhere, so that the scaling is 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from realera_fast.erasure.edit import Edit
from realera_fast.runtime import encode_json

Layout = Literal["diffusers", "kohya"]
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""`[o, q]` up and `[q, i]` down by layer name."""

_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)")
_FLUX = {
    "context_embedder": "txt_in",
    "time_text_embed.text_embedder.linear_1": "vector_in_in_layer",
}


def adapter_factors(edit: Edit, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """`[o, q]` and `[q, d]` float32 factors of the whole update of each changed projection.

    Args:
        weights: `[o, d]` un-edited weight of each layer that the edit changes; empty without a
            closed form, which is all that they are needed for.
    """
    found = {}
    for name in weights or edit.lora:
        ups, downs = [], []
        concept_map = edit.map_of(name)
        # Read once: what is quantized is unpacked whenever it is asked for.
        weight = weights[name].to("cpu", torch.float64) if name in weights else None
        if concept_map is not None and concept_map.rank and weight is not None:
            ups.append(weight[:, : concept_map.width] @ concept_map.left.to(weight))
            downs.append(concept_map.right.to(weight))
        if name in edit.lora:
            ups.append(edit.lora[name].up.to("cpu", torch.float64))
            downs.append(edit.lora[name].down.to("cpu", torch.float64))
        up, down = torch.cat(ups, 1), torch.cat(downs, 0)
        if weight is not None:
            down = functional.pad(down, (0, weight.shape[1] - down.shape[1]))
        if down.shape[0] >= min(up.shape[0], down.shape[1]):
            u, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
            floor = s[0] * torch.finfo(torch.float64).eps * max(up.shape[0], down.shape[1])
            rank = max(1, int((s > floor).sum()))
            up, down = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
        # Equal sizes on both sides, for fp16's narrow range; powers of two round nothing.
        ratio = down.norm(dim=1) / up.norm(dim=0)
        usable = ratio.isfinite() & (ratio > 0)
        scale = torch.where(usable, ratio, 1.0).sqrt().log2().round().exp2()
        found[name] = ((up * scale).float(), (down / scale[:, None]).float())
    return found


def in_layout(
    factors: Factors, layout: Layout, component: str, config: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an adapter file.

    Args:
        component: "unet" or "transformer", what the pipeline calls the model.
        config: the model's configuration; "kohya" names layers after it.

    Raises:
        ValueError: an unknown layout, or one that has no names for this architecture.
    """
    ranks = {name: down.shape[0] for name, (_, down) in factors.items()}
    if layout == "diffusers":
        tensors = {}
        for name, (up, down) in factors.items():
            tensors[f"{component}.{name}.lora_A.weight"] = down
            tensors[f"{component}.{name}.lora_B.weight"] = up
        return tensors, _peft_metadata(ranks, component)
    if layout != "kohya":
        raise ValueError(f"layout: expected 'diffusers' or 'kohya', got {layout!r}")
    tensors = {}
    rank = max(ranks.values())
    for name, (up, down) in factors.items():
        key = f"lora_unet_{_kohya_name(name, component, config)}"
        # Loaders take one alpha for all layers (diffusers does): zeros make all ranks the same.
        more = rank - ranks[name]
        tensors[f"{key}.lora_down.weight"] = functional.pad(down, (0, 0, 0, more))
        tensors[f"{key}.lora_up.weight"] = functional.pad(up, (0, more))
        tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=torch.float32, device="cpu")
    return tensors, {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }


def _peft_metadata(ranks: Mapping[str, int], component: str) -> dict[str, str]:
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    # peft's LoraConfig, only what differs from its defaults: those fields exist in every
    # release, so that the file loads in older and newer ones.
    adapter = {
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    return {
        "format": "pt",
        "lora_adapter_metadata": encode_json({f"{component}.{k}": v for k, v in adapter.items()}),
    }


def _kohya_name(name: str, component: str, config: Any) -> str:
    """What kohya's scripts call a layer: their SDXL and FLUX have the names of the first release,
    their Stable Diffusion 1 and 2 those of diffusers."""
    if component != "unet":
        # FLUX.2 has no pooled vector, and names of its own.
        of_flux1 = hasattr(config, "guidance_embeds") and hasattr(config, "pooled_projection_dim")
        if of_flux1 and name not in _FLUX:
            raise ValueError(
                "layout: 'kohya' has one name for the queries, keys and values of a FLUX.1 block, "
                f"so none for {name}; use layout='diffusers'"
            )
        if not of_flux1:
            raise ValueError(
                "layout: 'kohya' has names for Stable Diffusion 1, 2, XL and FLUX.1 alone; use "
                "layout='diffusers'"
            )
        return _FLUX[name]
    if getattr(config, "addition_embed_type", None) == "text_time":
        if name.startswith("add_embedding.linear_"):
            return f"label_emb_0_{2 * (int(name[-1]) - 1)}"
        if name.startswith("mid_block.attentions.0."):
            name = f"middle_block.1.{name.removeprefix('mid_block.attentions.0.')}"
        elif found := _BLOCK.fullmatch(name):
            side, block, place, rest = found.groups()
            per_block = int(config.layers_per_block) + 1
            number = int(block) * per_block + int(place) + (side == "down")
            name = f"{'input' if side == 'down' else 'output'}_blocks.{number}.1.{rest}"
    return name.replace(".", "_")
