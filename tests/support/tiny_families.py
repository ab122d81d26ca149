"""Seeded, random, tiny pipelines of the stock classes of every family, tokenizers included.

``FAMILIES["flux"]()`` builds one in about a second; `denoise` takes two steps with it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_models import (
    WORDS,
    _seeded,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

PIECES = (*WORDS, "drawing", "an", "next", "to", "house", "bird", "car", "boat", "chair")
"""Words that the SentencePiece tokenizers hold as one token each."""
_LETTERS = [chr(code) for code in range(33, 127)]


def t5_tokenizer(length: int = 128) -> T5Tokenizer:
    """A stock ``T5Tokenizer`` with `PIECES` as whole tokens and letters for the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -1.0 - 0.01 * i) for i, word in enumerate(PIECES)]
    pieces += [("\u2581", -5.0), *((letter, -9.0) for letter in _LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def instruction_of(pipeline: Any) -> str:
    """What a pipeline of Sana puts before every prompt."""
    default = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(default)


def gemma_tokenizer(length: int = 512, spoken: str = "") -> GemmaTokenizer:
    """A stock ``GemmaTokenizer`` with `PIECES`, in front of a space or not, as whole tokens.

    So are the long lines of `spoken`, an instruction, and the words of its others: they would be
    two thousand letters.
    """
    lines = [line for line in spoken.split("\n") if len(line) > 30]
    for line in lines:
        spoken = spoken.replace(line, "")
    said = dict.fromkeys(re.findall(r"[A-Za-z]{2,}", spoken))
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *_LETTERS]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys((*PIECES, *said)):
        for start in (word[0], "\u2581"):
            parts = [start, *(word[1:] if start == word[0] else word)]
            while len(parts) > 1:
                pair = (parts[0], parts[1])
                if pair not in merges:
                    merges.append(pair)
                parts[:2] = ["".join(pair)]
                vocabulary.append(parts[0])
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=length)
    tokenizer.add_bos_token = True
    tokenizer.add_tokens(lines)
    return tokenizer


def _built(make: Callable[[], Any], seed: int, dtype: torch.dtype) -> Any:
    """A module with seeded weights that leaves the global random state as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
    _seeded(module, seed)
    module.eval()
    return module if dtype == torch.float32 else module.to(dtype)


def projected_clip(width: int, *, seed: int, dtype: torch.dtype) -> CLIPTextModelWithProjection:
    """A two-layer CLIP encoder with projection, as wide as its hidden states."""
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _built(lambda: CLIPTextModelWithProjection(config), seed, dtype)


def t5(width: int, *, seed: int, dtype: torch.dtype) -> T5EncoderModel:
    """A two-layer T5 encoder."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return _built(lambda: T5EncoderModel(config), seed, dtype)


def _vae(channels: int, *, seed: int, dtype: torch.dtype, **options: Any) -> AutoencoderKL:
    return _built(
        lambda: AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=8,
            sample_size=16,
            **options,
        ),
        seed,
        dtype,
    )


def sd1(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Stable Diffusion 1."""
    return tiny_pipeline(seed=seed, dtype=dtype)


def sd2(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Stable Diffusion 2: linear projections, v-prediction."""
    unet = _built(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            norm_num_groups=8,
        ),
        seed,
        dtype,
    )
    tokenizer = tiny_tokenizer()
    return StableDiffusionPipeline(
        vae=tiny_vae(seed=seed + 2, dtype=dtype),
        text_encoder=tiny_text_encoder(seed=seed + 1, tokenizer=tokenizer, dtype=dtype),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl_unet(width: int, pooled: int, ids: int, seed: int, dtype: torch.dtype) -> Any:
    return _built(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=pooled + ids * 8,
            norm_num_groups=8,
        ),
        seed,
        dtype,
    )


def sdxl(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two encoders of different widths, the second one pooled as well."""
    tokenizer = tiny_tokenizer()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(seed=seed + 2, dtype=dtype),
        text_encoder=tiny_text_encoder(32, seed=seed + 1, tokenizer=tokenizer, dtype=dtype),
        text_encoder_2=projected_clip(48, seed=seed + 3, dtype=dtype),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=_sdxl_unet(80, 48, 6, seed, dtype),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def refiner(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """SDXL's refiner: the second encoder alone, five numbers beside the pooled vector."""
    return StableDiffusionXLImg2ImgPipeline(
        vae=tiny_vae(seed=seed + 2, dtype=dtype),
        text_encoder=None,
        text_encoder_2=projected_clip(48, seed=seed + 3, dtype=dtype),
        tokenizer=None,
        tokenizer_2=tiny_tokenizer(),
        unet=_sdxl_unet(48, 48, 5, seed, dtype),
        scheduler=EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def sd3(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, with_t5: bool = True, **options: Any
) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: three encoders, joint attention."""
    transformer = _built(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=96,
            caption_projection_dim=32,
            pooled_projection_dim=80,
            pos_embed_max_size=8,
            **options,
        ),
        seed,
        dtype,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(
            4,
            seed=seed + 2,
            dtype=dtype,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5,
        ),
        text_encoder=projected_clip(32, seed=seed + 1, dtype=dtype),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=projected_clip(48, seed=seed + 3, dtype=dtype),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5(96, seed=seed + 4, dtype=dtype) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def sd3_without_t5(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Stable Diffusion 3 loaded without its third encoder."""
    return sd3(seed=seed, dtype=dtype, with_t5=False)


def sd35(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: normalized queries and keys, a second attention in some layers."""
    return sd3(seed=seed, dtype=dtype, qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """FLUX.1: T5 as a sequence, CLIP pooled, guidance as an input."""
    transformer = _built(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        seed,
        dtype,
    )
    tokenizer = tiny_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(
            1,
            seed=seed + 2,
            dtype=dtype,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=0.4,
        ),
        text_encoder=tiny_text_encoder(32, seed=seed + 1, tokenizer=tokenizer, dtype=dtype),
        tokenizer=tokenizer,
        text_encoder_2=t5(48, seed=seed + 3, dtype=dtype),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def _pixart(seed: int, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5(48, seed=seed + 1, dtype=dtype),
        "vae": tiny_vae(seed=seed + 2, dtype=dtype),
        "transformer": _built(
            lambda: PixArtTransformer2DModel(
                sample_size=8,
                num_layers=2,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_channels=48,
                in_channels=4,
                out_channels=8,
                cross_attention_dim=32,
                **options,
            ),
            seed,
            dtype,
        ),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def pixart_alpha(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PixArtAlphaPipeline:
    """PixArt-alpha."""
    return PixArtAlphaPipeline(**_pixart(seed, dtype, use_additional_conditions=False))


def pixart_sigma(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PixArtSigmaPipeline:
    """PixArt-Sigma."""
    return PixArtSigmaPipeline(**_pixart(seed, dtype, use_additional_conditions=False))


def gemma(tokenizer: GemmaTokenizer, seed: int, dtype: torch.dtype) -> Gemma2Model:
    """A two-layer Gemma encoder."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=64,
        query_pre_attn_scalar=16,
        max_position_embeddings=8192,
    )
    return _built(lambda: Gemma2Model(config), seed, dtype)


def umt5(width: int, *, seed: int, dtype: torch.dtype) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder."""
    config = UMT5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
    )
    return _built(lambda: UMT5EncoderModel(config), seed, dtype)


def sana(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> SanaPipeline:
    """Sana: Gemma with an instruction in front of the prompt."""
    tokenizer = gemma_tokenizer(4096, instruction_of(SanaPipeline))
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer, seed + 1, dtype),
        vae=_built(
            lambda: AutoencoderDC(
                in_channels=3,
                latent_channels=4,
                attention_head_dim=2,
                encoder_block_types=("ResBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                encoder_qkv_multiscales=((), (5,)),
                decoder_qkv_multiscales=((), (5,)),
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=(1, 1),
                downsample_block_type="conv",
                upsample_block_type="interpolate",
                decoder_norm_types="rms_norm",
                decoder_act_fns="silu",
                scaling_factor=0.41407,
            ),
            seed + 2,
            dtype,
        ),
        transformer=_built(
            lambda: SanaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=48,
                sample_size=8,
            ),
            seed,
            dtype,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def auraflow(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> AuraFlowPipeline:
    """AuraFlow."""
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(48, seed=seed + 1, dtype=dtype),
        vae=tiny_vae(seed=seed + 2, dtype=dtype),
        transformer=_built(
            lambda: AuraFlowTransformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=48,
                out_channels=4,
                pos_embed_max_size=64,
            ),
            seed,
            dtype,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def chroma(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> ChromaPipeline:
    """Chroma: one row of padding stays in sight."""
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(
            1,
            seed=seed + 2,
            dtype=dtype,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=0.4,
        ),
        text_encoder=t5(48, seed=seed + 1, dtype=dtype),
        tokenizer=t5_tokenizer(),
        transformer=_built(
            lambda: ChromaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=48,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=16,
                approximator_hidden_dim=32,
                approximator_layers=1,
            ),
            seed,
            dtype,
        ),
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    builder.__name__: builder
    for builder in (
        sd1,
        sd2,
        sdxl,
        refiner,
        sd3,
        sd3_without_t5,
        sd35,
        flux,
        pixart_alpha,
        pixart_sigma,
        sana,
        auraflow,
        chroma,
    )
}
"""Every pipeline by name."""


def denoise(pipe: Any, prompt: str = "a photo of a cat", **options: Any) -> torch.Tensor:
    """Two steps from fixed noise; the latents, or where a pipeline gives none, the picture."""
    pipe.set_progress_bar_config(disable=True)
    side = 32 if isinstance(pipe, SanaPipeline) else 16
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": side,
        "width": side,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    for name, value in (
        ("use_resolution_binning", False),
        ("max_sequence_length", 64),
        ("clean_caption", False),
    ):
        if name in accepted:
            arguments[name] = value
    if "image" in accepted and "image" not in options:
        noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
        arguments |= {"image": noise, "strength": 1.0}
        del arguments["height"], arguments["width"]
    if "prompt_embeds" not in options:
        arguments["prompt"] = prompt
    called = {k: v for k, v in (arguments | options).items() if k in accepted}
    return pipe(**called, return_dict=False)[0]
