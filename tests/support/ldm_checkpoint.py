"""Single-file checkpoints as the first release of Stable Diffusion lays them out."""

from __future__ import annotations

import re

import torch
from diffusers import UNet2DConditionModel


def to_ldm(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """A U-Net in the key layout of the first release, which ``from_single_file`` reads."""
    per_block = unet.config.layers_per_block + 1
    last = len(unet.config.block_out_channels) - 1
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    plain = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    found = {}
    for key, tensor in unet.state_dict().items():
        name, _, leaf = key.rpartition(".")
        if name in plain:
            new = plain[name]
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
            kind, number, rest = match.groups()
            place = 1 if kind == "attentions" else 2 * int(number)
            new = f"middle_block.{place}.{resnet.get(rest, rest)}"
        else:
            match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
            assert match is not None, name
            side, block, kind, number, rest = match.groups()
            i, j = int(block), int(number)
            if kind == "downsamplers":
                new = f"input_blocks.{(i + 1) * per_block}.0.op"
            elif kind == "upsamplers":
                inner = 2 if f"up_blocks.{i}.attentions.0.norm.weight" in unet.state_dict() else 1
                new = f"output_blocks.{i * per_block + per_block - 1}.{inner}.conv"
            else:
                start = (
                    f"input_blocks.{1 + i * per_block + j}"
                    if side == "down"
                    else (f"output_blocks.{i * per_block + j}")
                )
                new = f"{start}.{int(kind == 'attentions')}.{resnet.get(rest, rest)}"
        found[f"model.diffusion_model.{new}.{leaf}"] = tensor
    assert last and len(found) == len(unet.state_dict())
    return found
