"""A tiny CLIP model for the judge."""

from __future__ import annotations

import torch
from tiny_models import tiny_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor


def tiny_clip(dtype: torch.dtype = torch.float32) -> tuple[CLIPModel, CLIPProcessor]:
    """A random two-layer CLIP for 32-pixel pictures."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "eos_token_id": tokenizer.eos_token_id,
                },
                vision_config={
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "image_size": 32,
                    "patch_size": 8,
                },
                projection_dim=16,
            )
        )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return model.to(dtype).eval(), CLIPProcessor(image_processor=images, tokenizer=tokenizer)
