"""Tiny pipelines of the models whose text encoder is a language model.

``LANGUAGE["z_image"]()`` builds one with what it is called with beside the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tiny_families import PIECES, _built, gemma, gemma_tokenizer
from tiny_variants import Built
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

FP32 = torch.float32

CHAT_ML = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if not enable_thinking %}<think>\n\n</think>\n\n{%- endif %}{%- endif %}"
)
MISTRAL = (
    "<s>{%- for message in messages %}{%- if message.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]{%- else %}"
    "[INST]{{ message.content[0].text }}[/INST]{%- endif %}{%- endfor %}"
)


def byte_tokenizer(template: str, spoken: str, controls: Sequence[str]) -> Qwen2Tokenizer:
    """A stock ``Qwen2Tokenizer``: bytes, `PIECES` and the words of `spoken` as whole tokens."""
    words = dict.fromkeys((*PIECES, *re.findall(r"[A-Za-z]{2,}", spoken), "user", "assistant"))
    vocabulary = [*sorted(ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in words:
        # A word that follows a space is joined to it first.
        for start in ("\u0120", ""):
            parts = [*start, *word]
            while len(parts) > 1:
                pair = (parts[0], parts[1])
                if pair not in merges:
                    merges.append(pair)
                parts[:2] = ["".join(pair)]
                vocabulary.append(parts[0])
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(vocabulary))}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": list(controls)})
    tokenizer.chat_template = template
    return tokenizer


def _chat_tokenizer(spoken: str = "") -> Qwen2Tokenizer:
    return byte_tokenizer(CHAT_ML, spoken, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))


_FEW = 128
"""Tokens of a prompt where padding is in sight, of 512: every one of them costs time."""


def _sizes(words: int, layers: int, width: int) -> dict[str, Any]:
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": width // 2,
        "max_position_embeddings": 8192,
    }


def _uneven(norm: Any) -> None:
    """Gains as trained norms have them: not one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        gains = 0.4 + 1.2 * torch.rand(norm.weight.shape, generator=generator)
        norm.weight.copy_(gains)


def _flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def _flux2(kind: Any, width: int, guided: bool, **parts: Any) -> Any:
    transformer = _built(
        lambda: Flux2Transformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * width,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guided,
        ),
        0,
        FP32,
    )
    vae = _built(
        lambda: AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            sample_size=16,
        ),
        2,
        FP32,
    )
    return kind(scheduler=_flow(), vae=vae, transformer=transformer, **parts)


def flux2_klein() -> Built:
    """FLUX.2 klein: three layers of Qwen3 side by side, padding in sight of the denoiser."""
    tokenizer = _chat_tokenizer()
    tokenizer.model_max_length = _FEW
    config = Qwen3Config(**_sizes(len(tokenizer), 28, 16))
    pipe = _flux2(
        Flux2KleinPipeline,
        16,
        False,
        tokenizer=tokenizer,
        text_encoder=_built(lambda: Qwen3ForCausalLM(config), 1, FP32),
    )
    return pipe, {"max_sequence_length": _FEW, "height": 8, "width": 8, "image": None}


class Processor(ProcessorMixin):
    """Pixtral's without pictures, which need torchvision."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def flux2_dev(side: str = "left") -> Built:
    """FLUX.2 dev: three layers of Mistral side by side, a processor with a system message."""
    controls = ("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]")
    pictures = ("[IMG_BREAK]", "[IMG_END]")
    tokenizer = byte_tokenizer(MISTRAL, SYSTEM_MESSAGE, (*controls, *pictures))
    tokenizer.bos_token = "<s>"
    tokenizer.padding_side, tokenizer.model_max_length = side, _FEW
    text = _sizes(len(tokenizer), 31, 16) | {"model_type": "mistral"}
    seen = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Mistral3Config(text_config=text, vision_config=seen, image_token_index=5)
    pipe = _flux2(
        Flux2Pipeline,
        16,
        True,
        tokenizer=Processor(tokenizer, chat_template=MISTRAL),
        text_encoder=_built(lambda: Mistral3ForConditionalGeneration(config), 1, FP32),
    )
    return pipe, {"max_sequence_length": _FEW, "height": 8, "width": 8, "image": None}


QWEN_WORDS = (
    "system Describe the image by detailing the color shape size texture quantity text spatial "
    "relationships of the objects and background"
)


def qwen_image() -> Built:
    """Qwen-Image: Qwen2.5-VL in a template whose first 34 rows are cut out, then a norm."""
    tokenizer = _chat_tokenizer(QWEN_WORDS)
    text = _sizes(len(tokenizer), 2, 32) | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 2, 4],
        }
    }
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=seen | {"out_hidden_size": 32})
    transformer = _built(
        lambda: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 4, 4),
        ),
        0,
        FP32,
    )
    _uneven(transformer.txt_norm)
    pipe = QwenImagePipeline(
        scheduler=_flow(),
        vae=None,
        text_encoder=_built(lambda: Qwen2_5_VLForConditionalGeneration(config), 1, FP32),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return pipe, {"negative_prompt": "", "height": 32, "width": 32}


def z_image() -> Built:
    """Z-Image: Qwen3 in a chat, then a norm; the denoiser takes a list of prompts."""
    tokenizer = _chat_tokenizer()
    config = Qwen3Config(**_sizes(len(tokenizer), 3, 32))
    transformer = _built(
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        0,
        FP32,
    )
    _uneven(transformer.cap_embedder[0])
    pipe = ZImagePipeline(
        scheduler=_flow(),
        vae=None,
        text_encoder=_built(lambda: Qwen3Model(config), 1, FP32),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return pipe, {"height": 32, "width": 32}


def lumina2() -> Built:
    """Lumina 2: Gemma after a system prompt that stays in sight, then a norm."""
    tokenizer = gemma_tokenizer(4096, LUMINA_SYSTEM)
    transformer = _built(
        lambda: Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(8, 4, 4),
            cap_feat_dim=48,
        ),
        0,
        FP32,
    )
    _uneven(transformer.time_caption_embed.caption_embedder[0])
    pipe = Lumina2Pipeline(
        transformer=transformer,
        scheduler=_flow(),
        vae=None,
        text_encoder=gemma(tokenizer, 1, FP32),
        tokenizer=tokenizer,
    )
    return pipe, {"max_sequence_length": 256, "height": 32, "width": 32}


def cogview4() -> Built:
    """CogView4: GLM reads padding in front of the prompt, up to a multiple of 16 tokens."""
    tokenizer = byte_tokenizer(CHAT_ML, "", ("[gMASK]", "<sop>"))
    begins = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=begins
    )
    tokenizer.padding_side = "left"
    config = GlmConfig(**_sizes(len(tokenizer), 3, 32), pad_token_id=0)
    transformer = _built(
        lambda: CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(16, 16),
        ),
        0,
        FP32,
    )
    pipe = CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=_built(lambda: GlmModel(config), 1, FP32),
        vae=None,
        transformer=transformer,
        scheduler=_flow(),
    )
    return pipe, {"height": 32, "width": 32}


LUMINA_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts."
)

LANGUAGE: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (flux2_klein, flux2_dev, qwen_image, z_image, lumina2, cogview4)
}
