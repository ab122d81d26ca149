"""Tiny pipelines of the known classes that take more than a prompt, and those of video.

``VARIANTS["inpaint"]()`` builds one with what it needs beside the prompt; `BESIDE` says the same of
the pipelines with a ControlNet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    BriaPipeline,
    BriaTransformer2DModel,
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaSprintPipeline,
    SCMScheduler,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLInpaintPipeline,
    T2IAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from tiny_families import FAMILIES, _built, flux, sana, sd1, sd3, sdxl, t5, t5_tokenizer
from tiny_models import tiny_vae

Built = tuple[Any, dict[str, Any]]
"""A pipeline, and what it is called with beside the prompt."""

SIDE = 16
"""Pixels of a picture's side."""


def picture(*shape: int) -> torch.Tensor:
    """Values in [0, 1], the same every time."""
    size = shape or (1, 3, SIDE, SIDE)
    return torch.rand(*size, generator=torch.Generator().manual_seed(1))


def _unet(**options: Any) -> UNet2DConditionModel:
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return _built(lambda: UNet2DConditionModel(**sizes | options), 0, torch.float32)


def _parts(pipe: Any, *names: str) -> dict[str, Any]:
    return {name: pipe.components[name] for name in names}


def _from_sd1(kind: Any, unet: Any = None, **more: Any) -> Any:
    pipe = sd1()
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(**_parts(pipe, *names) | {"unet": unet or pipe.unet} | safety | more)


def lcm() -> Built:
    """Latent consistency: guidance is an input of the U-Net."""
    unet = _unet(time_cond_proj_dim=8)
    pipe = _from_sd1(LatentConsistencyModelPipeline, unet, scheduler=LCMScheduler())
    return pipe, {}


def inpaint() -> Built:
    """Nine channels: the picture and its mask beside the noise."""
    pipe = _from_sd1(StableDiffusionInpaintPipeline, _unet(in_channels=9))
    return pipe, {"image": picture(), "mask_image": picture(1, 1, SIDE, SIDE), "strength": 1.0}


def pix2pix() -> Built:
    """InstructPix2Pix: eight channels, three predictions a step."""
    pipe = _from_sd1(StableDiffusionInstructPix2PixPipeline, _unet(in_channels=8))
    return pipe, {"image": picture()}


def depth2img() -> Built:
    """A depth map as the fifth channel."""
    pipe = StableDiffusionDepth2ImgPipeline(
        **_parts(sd1(), "vae", "text_encoder", "tokenizer", "scheduler"),
        unet=_unet(in_channels=5),
        depth_estimator=None,
        feature_extractor=None,
    )
    return pipe, {"image": picture(), "depth_map": picture(1, SIDE, SIDE), "strength": 1.0}


def upscaler() -> Built:
    """The x4 upscaler: the small picture as channels, its noise as a class, no self-attention."""
    unet = _unet(in_channels=7, num_class_embeds=1000, only_cross_attention=True)
    pipe = StableDiffusionUpscalePipeline(
        **_parts(sd1(), "vae", "text_encoder", "tokenizer", "scheduler"),
        unet=unet,
        low_res_scheduler=DDPMScheduler(),
    )
    return pipe, {"image": picture(1, 3, 8, 8)}


def ip_adapter() -> Built:
    """An IP-Adapter: keys and values of a picture beside those of the text."""
    pipe = sd1()
    unet = pipe.unet
    state: dict[str, dict[str, torch.Tensor]] = {
        "image_proj": {
            "proj.weight": 0.1 * picture(4 * 32, 16),
            "proj.bias": picture(4 * 32),
            "norm.weight": picture(32),
            "norm.bias": picture(32),
        },
        "ip_adapter": {},
    }
    layers = [name for name in unet.attn_processors if ".attn2." in name]
    for place, name in enumerate(layers):
        rows = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for leaf in ("to_k_ip", "to_v_ip"):
            # As released files number them: every second processor is one of cross-attention.
            state["ip_adapter"][f"{2 * place + 1}.{leaf}.weight"] = 0.1 * picture(rows, 32)
    unet._load_ip_adapter_weights([state])
    return pipe, {"ip_adapter_image_embeds": [picture(2, 1, 16)]}


def t2i_adapter() -> Built:
    """A T2I-Adapter: features of a sketch are added to those of the U-Net."""
    adapter = _built(
        lambda: T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2),
        7,
        torch.float32,
    )
    return _from_sd1(StableDiffusionAdapterPipeline, adapter=adapter), {"image": picture()}


def sdxl_inpaint() -> Built:
    """SDXL with nine channels."""
    pipe = sdxl()
    unet = _again(pipe.unet, in_channels=9)
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    pipe = StableDiffusionXLInpaintPipeline(
        **_parts(pipe, *names), unet=unet, add_watermarker=False
    )
    return pipe, {"image": picture(), "mask_image": picture(1, 1, SIDE, SIDE), "strength": 1.0}


def _motion(channels: tuple[int, ...] = (16, 32)) -> MotionAdapter:
    return _built(
        lambda: MotionAdapter(
            block_out_channels=channels,
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            use_motion_mid_block=False,
            motion_max_seq_length=4,
        ),
        3,
        torch.float32,
    )


def animatediff() -> Built:
    """AnimateDiff: motion modules between the layers of Stable Diffusion's U-Net."""
    pipe = AnimateDiffPipeline(
        **_parts(sd1(), "vae", "text_encoder", "tokenizer", "unet"),
        motion_adapter=_motion(),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    return pipe, {"num_frames": 2}


def animatediff_sdxl() -> Built:
    """AnimateDiff on SDXL."""
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    pipe = AnimateDiffSDXLPipeline(
        **_parts(sdxl(), *names), motion_adapter=_motion(), scheduler=DDIMScheduler()
    )
    return pipe, {"num_frames": 2}


def controlnet_xs() -> Built:
    """ControlNet-XS: the control is woven into the U-Net, with cross-attention of its own."""
    unet = _unet(layers_per_block=2)
    adapter = ControlNetXSAdapter.from_unet(
        unet, size_ratio=0.5, conditioning_embedding_out_channels=(8, 8), num_attention_heads=2
    )
    pipe = _from_sd1(StableDiffusionControlNetXSPipeline, unet, controlnet=_awake(adapter))
    return pipe, {"image": picture()}


def text_to_video() -> Built:
    """Text to video on Stable Diffusion's U-Net with a third dimension."""
    unet = _built(
        lambda: UNet3DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        0,
        torch.float32,
    )
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    return TextToVideoSDPipeline(**_parts(sd1(), *names), unet=unet), {"num_frames": 2}


_FLUX = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def _flux_transformer(channels: int, out: int | None = None) -> FluxTransformer2DModel:
    return _again(flux().transformer, in_channels=channels, out_channels=out)


def _again(model: Any, kind: Any = None, **options: Any) -> Any:
    """A model of the same configuration but for `options`."""
    config = {k: v for k, v in model.config.items() if k[0] != "_"} | options
    return _built(lambda: (kind or type(model)).from_config(config), 0, torch.float32)


def flux_kontext() -> Built:
    """FLUX.1 Kontext: tokens of a picture beside those of the noise."""
    pipe = FluxKontextPipeline(**_parts(flux(), *_FLUX), transformer=flux().transformer)
    return pipe, {"image": picture(), "max_area": SIDE * SIDE, "_auto_resize": False}


def flux_fill() -> Built:
    """FLUX.1 Fill: picture and mask as channels."""
    pipe = FluxFillPipeline(**_parts(flux(), *_FLUX), transformer=_flux_transformer(24, 4))
    return pipe, {"image": picture(), "mask_image": picture(1, 1, SIDE, SIDE)}


def flux_control() -> Built:
    """FLUX.1 Canny and Depth: the control as channels."""
    pipe = FluxControlPipeline(**_parts(flux(), *_FLUX), transformer=_flux_transformer(8, 4))
    return pipe, {"control_image": picture()}


def sana_sprint() -> Built:
    """Sana Sprint: guidance is an input."""
    pipe = sana()
    transformer = _again(pipe.transformer, guidance_embeds=True)
    names = ("tokenizer", "text_encoder", "vae")
    pipe = SanaSprintPipeline(
        **_parts(pipe, *names), transformer=transformer, scheduler=SCMScheduler()
    )
    return pipe, {"height": 32, "width": 32}


def bria() -> Built:
    """Bria 3: T5 without padding, then zeros."""
    transformer = _built(
        lambda: BriaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(4, 4, 8),
        ),
        0,
        torch.float32,
    )
    pipe = BriaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=t5(48, seed=1, dtype=torch.float32),
        tokenizer=t5_tokenizer(),
    )
    return pipe, {}


VARIANTS: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (
        lcm,
        inpaint,
        pix2pix,
        depth2img,
        upscaler,
        ip_adapter,
        t2i_adapter,
        sdxl_inpaint,
        animatediff,
        animatediff_sdxl,
        controlnet_xs,
        text_to_video,
        flux_kontext,
        flux_fill,
        flux_control,
        sana_sprint,
        bria,
    )
}


def build(name: str) -> Built:
    """Any pipeline of the table by name, with what it is called with beside the prompt."""
    return VARIANTS[name]() if name in VARIANTS else (FAMILIES[name](), {})


# With a model beside the denoiser that is shown the same text


def _controlnet(unet: Any, net: Any = None) -> Any:
    net = net or ControlNetModel.from_unet(unet)
    net.controlnet_cond_embedding = type(net.controlnet_cond_embedding)(
        conditioning_embedding_channels=16, block_out_channels=(8, 8)
    )
    return _awake(net)


def _awake(net: Any) -> Any:
    """Without the zeros that a new ControlNet adds nothing with."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            if not bool(parameter.any()):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def sd_controlnet() -> Built:
    """Stable Diffusion with a ControlNet."""
    pipe = sd1()
    net = _controlnet(pipe.unet)
    return _from_sd1(StableDiffusionControlNetPipeline, pipe.unet, controlnet=net), {
        "image": picture()
    }


def sdxl_controlnet() -> Built:
    """SDXL with a ControlNet, which takes the pooled vector as well."""
    pipe = sdxl()
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    return StableDiffusionXLControlNetPipeline(
        **_parts(pipe, *names),
        unet=pipe.unet,
        controlnet=_controlnet(pipe.unet),
        add_watermarker=False,
    ), {"image": picture()}


def sdxl_controlnet_union() -> Built:
    """SDXL with a ControlNet that takes several kinds of control."""
    pipe = sdxl()
    accepted = inspect.signature(ControlNetUnionModel.__init__).parameters
    config = {k: v for k, v in pipe.unet.config.items() if k in accepted}
    sizes = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    net = ControlNetUnionModel.from_config(config | sizes)
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    return StableDiffusionXLControlNetUnionPipeline(
        **_parts(pipe, *names),
        unet=pipe.unet,
        controlnet=_controlnet(pipe.unet, net),
        add_watermarker=False,
    ), {"control_image": [picture()], "control_mode": [0]}


def sd3_controlnet() -> Built:
    """Stable Diffusion 3 with a ControlNet."""
    pipe = sd3()
    net = _awake(
        SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_extra_conditioning_channels=0
        )
    )
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder",)}
    parts.pop("feature_extractor", None)
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=net), {"control_image": picture()}


def flux_controlnet() -> Built:
    """FLUX.1 with a ControlNet."""
    pipe = flux()
    net = FluxControlNetModel.from_transformer(
        pipe.transformer,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
    )
    pipe = FluxControlNetPipeline(
        **_parts(pipe, *_FLUX), transformer=pipe.transformer, controlnet=_awake(net)
    )
    return pipe, {"control_image": picture()}


def sana_controlnet() -> Built:
    """Sana with a ControlNet."""
    pipe = sana()
    drop = ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale")
    config = {k: v for k, v in pipe.transformer.config.items() if k[0] != "_" and k not in drop}
    net = _awake(SanaControlNetModel.from_config(config | {"num_layers": 1}))
    names = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    return SanaControlNetPipeline(**_parts(pipe, *names), controlnet=net), {
        "control_image": picture(1, 3, 32, 32),
        "height": 32,
        "width": 32,
    }


BESIDE: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (
        sd_controlnet,
        sdxl_controlnet,
        sdxl_controlnet_union,
        sd3_controlnet,
        flux_controlnet,
        sana_controlnet,
    )
}
