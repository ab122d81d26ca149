"""Tiny pipelines of the video models that read T5, UMT5 or Gemma.

``VIDEO["wan"]()`` builds one with what it is called with beside the prompt. None decodes: all but
one have no autoencoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from tiny_families import (
    _built,
    gemma,
    gemma_tokenizer,
    instruction_of,
    t5,
    t5_tokenizer,
    umt5,
)
from tiny_variants import Built, picture
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

FP32 = torch.float32
WIDTH = 48
"""Features of the text."""


def _t5() -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer(), "text_encoder": t5(WIDTH, seed=1, dtype=FP32)}


def _umt5() -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer(), "text_encoder": umt5(WIDTH, seed=1, dtype=FP32)}


def _flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _wan_transformer(kind: Any = WanTransformer3DModel, seed: int = 0, **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    return _built(lambda: kind(**sizes | options), seed, FP32)


def wan_vae() -> AutoencoderKLWan:
    """Wan's autoencoder, eight times in space and four times in time."""
    sizes = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return _built(lambda: AutoencoderKLWan(**sizes), 2, FP32)


def _clean(kind: Any) -> Any:
    """A pipeline's class whose module has `ftfy`, or does without, which some can't (0.42)."""
    module: Any = sys.modules[kind.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=lambda text: text)
    return kind


def wan() -> Built:
    """Wan 2.1: UMT5, zeros behind the prompt."""
    pipe = WanPipeline(**_umt5(), vae=None, scheduler=_flow(), transformer=_wan_transformer())
    return pipe, {"num_frames": 5}


def wan_i2v() -> Built:
    """Wan 2.1 from a picture: what a vision encoder says of it has maps of its own."""
    transformer = _wan_transformer(in_channels=36, image_dim=8, added_kv_proj_dim=24)
    # 257 rows of a picture, as the attention expects them before the 512 of the text.
    seen = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=2,
    )
    pipe = _clean(WanImageToVideoPipeline)(
        **_umt5(),
        vae=wan_vae(),
        scheduler=_flow(),
        transformer=transformer,
        image_encoder=_built(lambda: CLIPVisionModel(seen), 3, FP32),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=False
        ),
    )
    more = {"max_sequence_length": 512, "num_frames": 5, "height": 16, "width": 16}
    return pipe, {"image": picture(), **more}


def wan_vace() -> Built:
    """Wan VACE: control blocks beside the others, behind the same map."""
    transformer = _wan_transformer(WanVACETransformer3DModel, vace_layers=[0])
    pipe = _clean(WanVACEPipeline)(
        **_umt5(), vae=wan_vae(), scheduler=_flow(), transformer=transformer
    )
    return pipe, {"num_frames": 5}


def skyreels() -> Built:
    """SkyReels V2, after Wan."""
    transformer = _wan_transformer(SkyReelsV2Transformer3DModel)
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe = _clean(SkyReelsV2Pipeline)(
        **_umt5(), vae=None, scheduler=scheduler, transformer=transformer
    )
    return pipe, {"num_frames": 5}


def ltx() -> Built:
    """LTX-Video: T5 reads its padding, the denoiser does not."""
    transformer = _built(
        lambda: LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=WIDTH,
        ),
        0,
        FP32,
    )
    pipe = LTXPipeline(**_t5(), vae=None, scheduler=_flow(), transformer=transformer)
    return pipe, {"num_frames": 9, "height": 32, "width": 32}


def latte() -> Built:
    """Latte: T5, lowercased."""
    transformer = _built(
        lambda: LatteTransformer3DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=2,
        ),
        0,
        FP32,
    )
    pipe = LattePipeline(**_t5(), vae=None, scheduler=DDIMScheduler(), transformer=transformer)
    return pipe, {"video_length": 2, "height": 64, "width": 64}


def allegro() -> Built:
    """Allegro: T5, lowercased."""
    transformer = _built(
        lambda: AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=24,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
            caption_channels=WIDTH,
        ),
        0,
        FP32,
    )
    pipe = AllegroPipeline(**_t5(), vae=None, scheduler=DDIMScheduler(), transformer=transformer)
    return pipe, {"num_frames": 8, "height": 32, "width": 32}


def sana_video() -> Built:
    """Sana Video: Gemma after an instruction that is not Sana's."""
    tokenizer = gemma_tokenizer(4096, instruction_of(SanaVideoPipeline))
    transformer = _built(
        lambda: SanaVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=WIDTH,
            sample_size=8,
            rope_max_seq_len=32,
        ),
        0,
        FP32,
    )
    pipe = SanaVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer, 1, FP32),
        vae=None,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )
    return pipe, {"frames": 5, "height": 32, "width": 32}


def cogvideox() -> Built:
    """CogVideoX: T5 with all of its padding."""
    transformer = _built(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            max_text_seq_length=128,
        ),
        0,
        FP32,
    )
    scheduler = CogVideoXDDIMScheduler()
    pipe = CogVideoXPipeline(**_t5(), vae=None, scheduler=scheduler, transformer=transformer)
    return pipe, {"num_frames": 9}


def cogview3() -> Built:
    """CogView3-Plus, a model of pictures that reads as CogVideoX does."""
    transformer = _built(
        lambda: CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=4,
        ),
        0,
        FP32,
    )
    scheduler = CogVideoXDDIMScheduler()
    pipe = CogView3PlusPipeline(**_t5(), vae=None, scheduler=scheduler, transformer=transformer)
    return pipe, {"height": 32, "width": 32}


def wan22() -> Built:
    """Wan 2.2: one denoiser for the first steps, another for the rest."""
    pipe = WanPipeline(
        **_umt5(),
        vae=None,
        scheduler=_flow(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer(seed=7),
        boundary_ratio=0.9,
    )
    return pipe, {"num_frames": 5}


VIDEO: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (
        *(wan, wan_i2v, wan_vace, skyreels, ltx, latte, allegro, sana_video),
        *(cogvideox, cogview3),
    )
}
