"""Every model family: which weights text enters through, what they are shown, and the edit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from edits import CLOSED, edited
from model_state import weights
from stock_prompts import encoded
from tiny_families import FAMILIES, auraflow, denoise, flux, pixart_alpha, sana, sd1, sd3, sdxl
from tiny_models import tiny_text_encoder, tiny_tokenizer, tiny_unet
from torch import nn

import realera_fast
from realera_fast import Concept, EraseConfig, Erasure, erase
from realera_fast.alignment import AlignmentConfig
from realera_fast.evaluation import verify
from realera_fast.mining import MiningConfig
from realera_fast.models import (
    check_width,
    components_of,
    family_of,
    is_pipeline,
    projections,
    stream_of,
    streams,
    text_streams,
)
from realera_fast.solver import ClosedFormConfig
from realera_fast.text import PairsConfig, TextWithPooled, VocabularyConfig
from realera_fast.unet import LoraParameters, SharedUNet

PROMPTS = ["a photo of a cat", "A dog next to the ship"]
MAPS = {
    "sd1": 8,
    "sd2": 8,
    "sdxl": 17,
    "refiner": 17,
    "sd3": 2,
    "sd3_without_t5": 2,
    "sd35": 2,
    "flux": 2,
    "pixart_alpha": 1,
    "pixart_sigma": 1,
    "sana": 1,
    "auraflow": 1,
    "chroma": 1,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Name and pipeline; whoever edits it undoes that."""
    return request.param, FAMILIES[request.param]()


# What is edited


def test_text_maps_are_where_text_enters(family):
    name, pipe = family
    model = components_of(pipe).model
    found = streams(model)
    assert len(found) == MAPS[name] and list(found) == list(projections(model))
    assert all(stream_of(layer) == stream for layer, stream in found.items())
    # Hooks see which linear layers get rows of what the pipeline encodes: those and no others.
    texts = {
        stream: torch.cat([section.encode([PROMPTS[0]]) for section in sections], dim=1)[0]
        for stream, sections in streams_of(pipe).items()
    }
    fed: dict[str, str] = {}

    def hook(layer_name):
        def see(_module, inputs, _output):
            for stream, text in texts.items():
                width = text.shape[-1]
                if inputs[0].shape[-1] < width:
                    continue
                rows = inputs[0].detach().float()[..., :width].reshape(-1, width)
                if row_in(text[2 if len(text) > 2 else 0], rows):
                    fed[layer_name] = stream

        return see

    handles = [
        module.register_forward_hook(hook(layer))
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        # T5 sees its padding in FLUX, so that the length of a prompt counts.
        denoise(pipe, PROMPTS[0], **({"max_sequence_length": 128} if name == "flux" else {}))
    finally:
        for handle in handles:
            handle.remove()
    assert fed == found


def streams_of(pipe):
    """Every stream's sections."""
    parts = components_of(pipe)
    return text_streams(parts.model, parts.text_encoders, parts.tokenizers)


def row_in(row, rows) -> bool:
    return bool(((rows - row).abs().amax(dim=1) <= 1e-5 * row.abs().max()).any())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_edit_is_where_it_should_be_and_nowhere_else(name):
    pipe = FAMILIES[name]()
    model = components_of(pipe).model
    before, picture, other = weights(model), denoise(pipe), denoise(pipe, "the tree")
    encoders = {
        part: weights(module)
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module) and module is not model
    }
    erasure = edited(pipe)
    after = weights(model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"{layer}.weight" for layer in streams(model)}
    for part, values in encoders.items():
        assert all(torch.equal(t, pipe.components[part].state_dict()[n]) for n, t in values.items())
    gone = denoise(pipe)
    assert torch.isfinite(gone).all() and not torch.equal(gone, picture)
    erasure.restore_(model)
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())
    assert torch.equal(denoise(pipe), picture) and torch.equal(denoise(pipe, "the tree"), other)


def test_of_sdxls_added_embedding_only_the_text_changes():
    pipe = sdxl()
    before = weights(pipe.unet)["add_embedding.linear_1.weight"]
    edited(pipe)
    after = pipe.unet.state_dict()["add_embedding.linear_1.weight"]
    assert torch.equal(before[:, 48:], after[:, 48:])
    assert not torch.equal(before[:, :48], after[:, :48])


# What the maps are shown


def test_text_is_what_the_stock_pipeline_encodes(family):
    name, pipe = family
    # As many tokens as the tiny tokenizers hold.
    lengths = {"max_sequence_length": 128}
    if name in ("pixart_alpha", "pixart_sigma", "sana", "auraflow", "chroma"):
        lengths = {"max_sequence_length": 120}
    stock = encoded(pipe, PROMPTS, **lengths)
    found = streams_of(pipe)
    sequence = torch.cat([section.encode(PROMPTS) for section in found["sequence"]], dim=1)
    expected = stock["prompt_embeds"]
    carries = torch.cat([section.shares(PROMPTS) > 0 for section in found["sequence"]], dim=1)
    # SD3 without T5 has zeros in its place, which no edit moves.
    assert not expected[:, sequence.shape[1] :].any()
    expected = expected[:, : sequence.shape[1]]
    assert sequence.shape == expected.shape and carries.any(dim=1).all()
    assert torch.allclose(sequence[carries], expected[carries], rtol=1e-4, atol=1e-5)
    if "prompt_attention_mask" in stock and name not in ("chroma", "auraflow"):
        # Begin-of-text is visible, but the same for all.
        mask = stock["prompt_attention_mask"].bool().clone()
        mask[:, : 1 if name == "sana" else 0] = False
        assert torch.equal(carries, mask)
    assert ("pooled" in found) == ("pooled_prompt_embeds" in stock)
    if "pooled" in found:
        (pooled,) = found["pooled"]
        got = pooled.encode(PROMPTS)[:, 0]
        assert torch.allclose(got, stock["pooled_prompt_embeds"], rtol=1e-4, atol=1e-5)


def test_words_are_found_where_they_stand(family):
    # The rows that differ first between prompts with other words are those of the word.
    _, pipe = family
    for section in (s for sections in streams_of(pipe).values() for s in sections):
        span = section.span("a photo of a ", "cat")
        assert span.stop > span.start and section.span("a photo of a ", "").start == span.start
        if section.max_tokens == 1:
            assert (span.start, span.stop) == (0, 1)
            continue
        shorter = section.encode(["a photo of a", "a photo of a cat"])
        (end,) = section.ends(["a photo of a cat"])
        assert end in (span.stop, span.stop - 1)
        causal = torch.equal(shorter[0, : span.start - 1], shorter[1, : span.start - 1])
        if causal:
            assert not torch.equal(shorter[0, span.start], shorter[1, span.start])


def test_edited_weights_equal_the_prompt_map(family):
    _, pipe = family
    model = components_of(pipe).model
    erasure = edited(pipe)
    try:
        weights_edited = denoise(pipe)
    finally:
        erasure.restore_(model)
    original = denoise(pipe)
    guarded = denoise(realera_fast.guard(pipe, erasure, gate=False).pipeline())
    erased = erasure.prompt_map()
    stock = encoded(pipe, ["a photo of a cat"], max_sequence_length=64)
    for sign in ("", "negative_"):
        if f"{sign}pooled_prompt_embeds" in stock:
            names = (f"{sign}prompt_embeds", f"{sign}pooled_prompt_embeds")
            stock[names[0]], stock[names[1]] = erased(*(stock[name] for name in names))
        elif f"{sign}prompt_embeds" in stock:
            stock[f"{sign}prompt_embeds"] = erased(stock[f"{sign}prompt_embeds"])
    if "negative_prompt_embeds" in stock:
        stock["negative_prompt"] = None
    mapped = denoise(pipe, **stock)
    apart = (weights_edited - original).norm()
    assert (mapped - weights_edited).norm() < 1e-3 * apart
    assert (guarded - weights_edited).norm() < 1e-3 * apart
    assert apart > 1e-3 * original.norm()


def test_before_and_after_are_drawn_for_every_family(family):
    name, pipe = family
    erasure = edited(pipe)
    side = 32 if name == "sana" else 16
    options = {"seeds": [0], "steps": 2, "height": side, "width": side, "progress": False}
    model = components_of(pipe).model
    before = weights(model)
    try:
        if name == "refiner":
            with pytest.raises(ValueError, match="starts from a picture"):
                verify(pipe, erasure, **options)
        else:
            found = verify(pipe, erasure, **options)
            assert {row.group for row in found.rows} >= {"erased", "relative", "untouched"}
            (row,) = [row for row in found.rows if row.group == "erased"]
            assert row.prompt == "cat" and row.change > 0 and row.text_change > 0
            assert row.before[0].size == (side, side)
        assert all(torch.equal(t, before[n]) for n, t in weights(model).items())
    finally:
        erasure.restore_(model)


# Several encoders, pipelines, refusals


def test_a_pipeline_and_its_parts_give_the_same():
    whole, parts = sd3(), sd3()
    edited(whole)
    erase(
        parts.transformer,
        (parts.text_encoder, parts.text_encoder_2, parts.text_encoder_3),
        ["cat=dog"],
        tokenizer=(parts.tokenizer, parts.tokenizer_2, parts.tokenizer_3),
        config=CLOSED,
        progress=False,
    )
    assert all(
        torch.equal(t, parts.transformer.state_dict()[n])
        for n, t in whole.transformer.state_dict().items()
    )


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_modular_pipeline_is_taken_like_a_classic_one(name):
    from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusionXLAutoBlocks

    pipe, plain = FAMILIES[name](), FAMILIES[name]()
    modular = {"sdxl": StableDiffusionXLAutoBlocks, "flux": FluxAutoBlocks}[name]().init_pipeline()
    known = modular._component_specs
    modular.update_components(
        **{part: value for part, value in pipe.components.items() if value and part in known}
    )
    assert is_pipeline(modular) and not is_pipeline(components_of(pipe).model)
    edited(modular)
    edited(plain)
    expected = weights(components_of(plain).model)
    assert all(torch.equal(t, expected[n]) for n, t in weights(components_of(pipe).model).items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: erase(sd1(), sd1().text_encoder, ["cat"]), TypeError, r"erase\(pipe, concepts\)"),
        (lambda: erase(sd1()), TypeError, r"erase\(pipe, concepts\)"),
        (lambda: erase(tiny_unet(), tiny_text_encoder()), TypeError, "third argument"),
        (
            lambda: erase(nn.Linear(2, 2), tiny_text_encoder(), ["cat"]),
            ValueError,
            r"Linear \(its forward is of torch\) is not supported",
        ),
        (
            lambda: text_streams(sd3().transformer, tiny_text_encoder()),
            ValueError,
            "expected 3 for Stable Diffusion 3, got 1",
        ),
        (
            lambda: text_streams(
                flux().transformer, (None, flux().text_encoder_2), (None, flux().tokenizer_2)
            ),
            ValueError,
            "a pooled vector of encoder 0, which is None",
        ),
        (
            lambda: text_streams(sd1().unet, (sd1().text_encoder,) * 2, (tiny_tokenizer(),)),
            ValueError,
            "one for each of 2 text encoders, got 1",
        ),
        (lambda: components_of(object()), TypeError, "with a unet or a transformer, got object"),
    ],
)
def test_what_is_not_supported_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_quantized_and_meta_weights_are_refused():
    pipe = pixart_alpha()
    pipe.transformer.to("meta")
    with pytest.raises(ValueError, match=r"caption_projection\.linear_1\.weight is on the meta"):
        edited(pipe)
    pipe = auraflow()
    pipe.transformer.context_embedder.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="context_embedder is quantized"):
        edited(pipe)


def test_encoders_of_another_model_are_refused():
    parts = components_of(sdxl())
    with pytest.raises(ValueError, match=r"width 80, but the model's .* takes 48"):
        erase(FAMILIES["refiner"]().unet, parts.text_encoders, ["cat"], tokenizer=parts.tokenizers)
    check_width(sdxl().unet, "pooled", 48)
    with pytest.raises(ValueError, match=r"width 47, but the model's add_embedding"):
        check_width(sdxl().unet, "pooled", 47)


@pytest.mark.parametrize("mode", ["gaussian", "offset", "none"])
@pytest.mark.parametrize("build", [sd3, flux, sana, pixart_alpha])
def test_every_way_of_mining_runs_on_every_kind_of_text(mode, build):
    pipe = build()
    mining = type(CLOSED.mining)(mode=mode)
    config = EraseConfig(
        alignment=CLOSED.alignment,
        vocabulary=VocabularyConfig(words=2, cache=False),
        pairs=PairsConfig(templates={"object": ("a photo of a {}",)}, neutral_words=2),
        mining=mining,
    )
    erasure = edited(pipe, config=config)
    assert erasure.map.rank and (erasure.pooled_map is None or erasure.pooled_map.rank)


def test_a_saved_erasure_of_two_streams_comes_back(tmp_path):
    pipe, other = flux(), flux()
    config = EraseConfig(
        **{
            **{name: getattr(CLOSED, name) for name in ("alignment", "vocabulary", "pairs")},
            "closed_form": ClosedFormConfig(keep_system=True),
            # Of a random encoder all words are near each other.
            "mining": MiningConfig(relative_words=0),
        }
    )
    erasure = erase(pipe, ["cat=dog", "ship=car"], config=config, progress=False)
    loaded = Erasure.load(erasure.save(tmp_path / "two.safetensors"))
    loaded.apply_(other.transformer)
    assert torch.equal(denoise(pipe), denoise(other))
    loaded.restore_(other.transformer)
    assert torch.equal(denoise(other), denoise(flux()))
    # One of two concepts withdrawn, in both streams.
    rest = loaded.without("ship")
    for stream, (section,) in streams_of(other).items():
        both, one = (
            part.map if stream == "sequence" else part.pooled_map for part in (loaded, rest)
        )
        assert both is not None and one is not None
        for word, least, most in (("ship", 0.0, 0.9), ("cat", 0.5, 1.5)):
            rows = section.encode([word])
            moved = [float((each(rows) - rows).norm()) for each in (both, one)]
            assert least * moved[0] < moved[1] < most * moved[0], (stream, word)
    with pytest.raises(ValueError, match="takes no pooled vector"):
        loaded.apply_(sd1().unet)


def test_the_same_family_by_class_and_configuration():
    assert family_of(tiny_unet()).name == "Stable Diffusion"
    assert family_of(sdxl().unet, 2).name == "Stable Diffusion XL"
    assert family_of(FAMILIES["refiner"]().unet, 1).name == "Stable Diffusion XL refiner"
    assert family_of(auraflow().transformer).name == "AuraFlow"


# Full size, without values


def on_meta(build, **config):
    with torch.device("meta"):
        return build(**config)


def test_stable_diffusion_1_at_full_size():
    unet = on_meta(UNet2DConditionModel, cross_attention_dim=768)
    found = streams(unet)
    shapes = [unet.get_submodule(name).weight.shape for name in found]
    assert len(found) == 32 and {shape[1] for shape in shapes} == {768}
    assert sum(shape[0] for shape in shapes) == 24_960


def test_stable_diffusion_xl_at_full_size():
    unet = on_meta(
        UNet2DConditionModel,
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    found = streams(unet)
    sequence = [n for n, stream in found.items() if stream == "sequence"]
    heights = [unet.get_submodule(name).weight.shape[0] for name in sequence]
    assert len(sequence) == 140 and sum(heights) == 166_400
    assert [n for n, s in found.items() if s == "pooled"] == ["add_embedding.linear_1"]
    assert unet.get_submodule("add_embedding.linear_1").weight.shape == (1280, 2816)


def test_flux_and_stable_diffusion_3_at_full_size():
    model = on_meta(FluxTransformer2DModel, guidance_embeds=True)
    assert {n: tuple(model.get_submodule(n).weight.shape) for n in streams(model)} == {
        "context_embedder": (3072, 4096),
        "time_text_embed.text_embedder.linear_1": (3072, 768),
    }
    model = on_meta(
        SD3Transformer2DModel,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    assert {n: tuple(model.get_submodule(n).weight.shape) for n in streams(model)} == {
        "context_embedder": (1536, 4096),
        "time_text_embed.text_embedder.linear_1": (1536, 2048),
    }


@pytest.mark.parametrize(
    ("build", "name", "shape"),
    [
        (Flux2Transformer2DModel, "context_embedder", (6144, 15360)),
        (QwenImageTransformer2DModel, "txt_in", (3072, 3584)),
        (ZImageTransformer2DModel, "cap_embedder.1", (3840, 2560)),
        (WanTransformer3DModel, "condition_embedder.text_embedder.linear_1", (5120, 4096)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_of_2025_at_full_size(build, name, shape):
    model = on_meta(build)
    assert streams(model) == {name: "sequence"}
    assert model.get_submodule(name).weight.shape == shape
    norm = family_of(model).norm
    # The norm is of the width of the text.
    assert norm is None or model.get_submodule(norm).weight.shape == shape[1:]


# Noise alignment of the second generation


def test_alignment_runs_with_v_prediction():
    pipe = FAMILIES["sd2"]()
    assert isinstance(pipe.scheduler, DDIMScheduler)
    alignment = AlignmentConfig(
        steps=2, batch_size=2, trajectories=2, sampling_steps=2, evaluation_steps=0
    )
    erasure = edited(pipe, config=EraseConfig(alignment=alignment, vocabulary=CLOSED.vocabulary))
    assert erasure.report["alignment"]["steps"] == 2


TRAINED = AlignmentConfig(
    steps=3, batch_size=2, trajectories=2, sampling_steps=2, check_seeds=0, evaluation_steps=0
)


@pytest.mark.parametrize("adversary", ["none", "worst"])
def test_alignment_runs_on_two_text_encoders(adversary):
    pipe, other = sdxl(), sdxl()
    before = weights(pipe.unet)
    trained = replace(TRAINED, adversary=adversary)
    config = EraseConfig(alignment=trained, vocabulary=CLOSED.vocabulary, pairs=CLOSED.pairs)
    erasure = edited(pipe, config=config)
    assert erasure.report["alignment"]["steps"] == 3 and len(erasure.lora) == 16
    assert not any("alignment" in text for text in erasure.report["warnings"])
    closed = edited(other)
    assert torch.equal(closed.map.left, edited(sdxl(), config=CLOSED).map.left)
    erasure.restore_(pipe.unet)
    assert all(torch.equal(t, before[n]) for n, t in weights(pipe.unet).items())


@torch.no_grad()
def test_alignment_shows_sdxl_what_its_pipeline_does():
    pipe = sdxl()
    streams_by_name = streams_of(pipe)
    (sequence,), (pooled,) = streams_by_name["sequence"], streams_by_name["pooled"]
    shown = TextWithPooled(sequence, pooled)
    erasure = edited(pipe)
    erasure.restore_(pipe.unet)
    layers = {n: layer for n, layer in projections(pipe.unet).items() if n.endswith("to_k")}
    lora = LoraParameters(layers, {}, r=2, lora_alpha=2, seed=0)
    shared = SharedUNet(pipe.unet, erasure.map, lora, pooled_map=erasure.pooled_map)
    states = shown.encode(PROMPTS)
    assert states.shape == (2, 78, 80) and not states[:, -1, 48:].any()
    assert not shown.shares(PROMPTS)[:, -1].any()
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 500])
    stock = encoded(pipe, PROMPTS)
    # The pipeline's own numbers beside the vector: sizes and crops of a 64 pixel picture.
    ids = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 48).expand(2, -1)
    added = {"text_embeds": stock["pooled_prompt_embeds"], "time_ids": ids}

    def through_the_pipeline():
        return pipe.unet(
            z, t, encoder_hidden_states=stock["prompt_embeds"], added_cond_kwargs=added
        ).sample

    with shared.installed():
        original = shared.predict(z, t, shared.condition(states, "original"))
        seen = shared.predict(z, t, shared.condition(states, "edited"))
        # Factors that add nothing yet.
        aligned = shared.predict(z, t, shared.condition(states, "aligned"))
    assert torch.allclose(original, through_the_pipeline(), rtol=1e-4, atol=1e-4)
    apart = (seen - original).norm()
    erasure.apply_(pipe.unet)
    assert (seen - through_the_pipeline()).norm() < 1e-3 * apart
    assert (aligned - seen).norm() < 1e-3 * apart


def test_nothing_to_do_is_refused():
    config = EraseConfig(closed_form=ClosedFormConfig(enabled=False))
    with pytest.raises(ValueError, match="leaves nothing to do"):
        edited(flux(), config=config)


def test_without_alignment_the_report_says_so():
    erasure = edited(
        auraflow(), config=EraseConfig(vocabulary=CLOSED.vocabulary, pairs=CLOSED.pairs)
    )
    assert any(
        "noise alignment runs on Stable Diffusion 1, 2, XL, 3 and FLUX.1" in text
        for text in erasure.report["warnings"]
    )
    assert erasure.concepts == (Concept("cat", "dog"),)
