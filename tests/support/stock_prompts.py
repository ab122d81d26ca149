"""Prompts as the stock pipelines encode them."""

from __future__ import annotations

import inspect

import torch


@torch.no_grad()
def encoded(pipe, prompts, **options):
    """What the stock pipeline makes of prompts, as arguments of its call."""
    accepted = inspect.signature(pipe.encode_prompt).parameters
    arguments = {
        "prompt": prompts,
        "prompt_2": None,
        "prompt_3": None,
        "device": "cpu",
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": True,
        "negative_prompt": None if "XL" in type(pipe).__name__ else [""] * len(prompts),
        "clean_caption": False,
    }
    if "complex_human_instruction" in accepted:
        default = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
        arguments["complex_human_instruction"] = default
    found = pipe.encode_prompt(**{k: v for k, v in (arguments | options).items() if k in accepted})
    name = type(pipe).__name__
    if name == "FluxPipeline":
        names = ("prompt_embeds", "pooled_prompt_embeds", None)
    elif "3Pipeline" in name or "XL" in name:
        names = (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )
    elif name == "StableDiffusionPipeline" or name.startswith(("Wan", "SkyReels", "Latte", "Cog")):
        names = ("prompt_embeds", "negative_prompt_embeds")
    elif name.startswith("Flux2"):
        names = ("prompt_embeds", None, "negative_prompt_embeds")
        if "negative_prompt_embeds" in inspect.signature(pipe.__call__).parameters:
            found = (*found, encoded_empty(pipe, arguments | options))
    elif name == "ChromaPipeline":
        names = (
            "prompt_embeds",
            None,
            "prompt_attention_mask",
            "negative_prompt_embeds",
            None,
            "negative_prompt_attention_mask",
        )
    else:
        names = (
            "prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_prompt_attention_mask",
        )
    return {k: v for k, v in zip(names, found, strict=False) if k is not None and v is not None}


def encoded_empty(pipe, arguments):
    """What FLUX.2's pipelines guide away from, which they encode as a prompt of its own."""
    accepted = inspect.signature(pipe.encode_prompt).parameters
    called = {k: v for k, v in arguments.items() if k in accepted}
    return pipe.encode_prompt(**called | {"prompt": [""] * len(arguments["prompt"])})[0]
