"""What is claimed of each class of model, seen with hooks on the stock pipelines.

Each edited map is called with the rows that the pipeline encodes, nothing before it changes them,
and with the maps' outputs frozen the prediction does not depend on the text any more: text has no
other way in.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.modeling_utils import ModelMixin
from edits import CLOSED
from model_state import weights
from peft import LoraConfig
from stock_prompts import encoded
from tiny_families import FAMILIES, denoise, flux, sana, sd1, sd3, sdxl, t5, t5_tokenizer
from tiny_language import LANGUAGE
from tiny_models import tiny_text_encoder, tiny_tokenizer, tiny_unet
from tiny_variants import BESIDE, VARIANTS, build
from tiny_video import VIDEO, wan22
from torch import nn

from realera_fast import Erasure, erase
from realera_fast.erasure import applied
from realera_fast.evaluation import verify
from realera_fast.models import (
    ENTRANCES,
    Family,
    Reading,
    components_of,
    family_of,
    projections,
    streams,
    text_streams,
)
from realera_fast.models.components import Components
from realera_fast.models.entrances import COMPANIONS, UNSUPPORTED
from realera_fast.models.families import FAMILIES as BY_CLASS
from realera_fast.text import TextModel

HERE = re.escape(__name__)
LIBRARY = re.escape(__name__.partition(".")[0])
"""What errors call this module, and the library that it belongs to."""

PROMPTS = ("a photo of a cat", "A Portrait by Van GOGH", "")
TABLE = [*FAMILIES, *VARIANTS]
NEWER = {**VIDEO, **LANGUAGE}


@pytest.fixture(scope="module", params=[*TABLE, *NEWER, *BESIDE])
def case(request):
    """A pipeline, its parts and how it is called; whoever edits it undoes that."""
    name = request.param
    elsewhere = {**NEWER, **BESIDE}
    pipe, more = elsewhere[name]() if name in elsewhere else build(name)
    if name in BESIDE:
        # What `components_of` refuses to give.
        parts = dict(pipe.components)
        pipe.register_modules(controlnet=None)
        found = components_of(SimpleNamespace(**{**parts, "controlnet": None}))
        pipe.register_modules(controlnet=parts["controlnet"])
    else:
        found = components_of(pipe)
    # Where padding is in sight the rows depend on their number: what the tiny tokenizers hold.
    more = {"max_sequence_length": 128, **more}
    return SimpleNamespace(name=name, pipe=pipe, parts=found, more=more)


def run(case, prompt):
    # Some pipelines encode a picture with random numbers that nobody seeds.
    torch.manual_seed(0)
    return denoise(case.pipe, prompt, **case.more)


@contextmanager
def hooked(model, names, before=None, after=None):
    """`before(name, x)` may replace what a layer is called with, `after(name, y)` what it gives."""
    handles = []
    for name in names:
        layer = model.get_submodule(name)
        if before is not None:
            handles.append(
                layer.register_forward_pre_hook(lambda _m, x, name=name: before(name, x[0]))
            )
        if after is not None:
            handles.append(layer.register_forward_hook(lambda _m, _x, y, name=name: after(name, y)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def models_of(case):
    """The models of a pipeline that take text."""
    beside = getattr(case.pipe, "controlnet", None)
    return [case.parts.model, *([beside] if type(beside).__name__ in COMPANIONS else [])]


def expected_rows(case, prompt, bare=False):
    """By stream, `[t, d]` rows of a prompt, and `[t]` which of them carry text; `bare` reads it
    without an instruction, as Sana's pipelines do with what guidance goes away from."""
    family = family_of(case.parts.model, len(case.parts.text_encoders))
    if bare:
        sections = [[replace(r, instruction="", dropped=None) for r in s] for s in family.sections]
        family = replace(family, sections=sections)
    parts = (case.parts.model, case.parts.text_encoders, case.parts.tokenizers)
    texts = text_streams(*parts, family if bare else None)
    return {
        stream: (
            torch.cat([part.encode([prompt]) for part in parts], dim=1)[0],
            torch.cat([part.shares([prompt]) for part in parts], dim=1)[0] > 0,
        )
        for stream, parts in texts.items()
    }


def agrees(rows, wanted):
    """Whether `[t, d]` rows are those of a prompt where these carry text; padding may be in front
    of all of them."""
    expected, carries = wanted
    tokens = int(carries.nonzero().max()) + 1 if carries.any() else 0
    return aligned(rows, wanted) or aligned(rows[len(rows) - tokens :], wanted)


def aligned(rows, wanted):
    expected, carries = wanted
    count = min(len(rows), len(expected))
    if bool(carries[count:].any()):
        return False
    used = carries[:count]
    return torch.allclose(rows[:count][used], expected[:count][used], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "cased", "empty"])
def test_maps_are_called_with_the_rows_that_the_pipeline_encodes(case, prompt):
    wanted, empty = expected_rows(case, prompt), expected_rows(case, "")
    uncond = expected_rows(case, "", bare=True)
    for model in models_of(case):
        kinds, seen = streams(model), defaultdict(list)

        def note(name, x, seen=seen):
            seen[name].append(x)

        with hooked(model, kinds, before=note):
            run(case, prompt)
        assert set(seen) == set(kinds)
        for layer, stream in kinds.items():
            width = wanted[stream][0].shape[1]
            found = [
                row[..., :width].reshape(-1, width)
                for x in seen[layer]
                for row in prompts_of(x.detach().float(), wanted[stream], stream)
            ]
            # Stable Diffusion 3's ControlNets are shown no pooled vector but zeros.
            silent = stream == "pooled" and getattr(
                model.config, "force_zeros_for_pooled_projection", False
            )
            assert silent != any(agrees(row, wanted[stream]) for row in found), layer
            for row in found:
                # What guidance goes away from: the empty prompt, or zeros (SDXL).
                known = (wanted[stream], empty[stream], uncond[stream])
                assert any(agrees(row, rows) for rows in known) or not row.any()


def prompts_of(x, wanted, stream):
    """The prompts that a map is called with."""
    if stream == "pooled" or x.dim() > 2:
        return x
    # Z-Image's stand one after the other, each filled up to a multiple of 32 rows.
    tokens = int(wanted[1].nonzero().max()) + 1
    first = 32 * -(-tokens // 32)
    return x[:first], x[first:]


def test_text_has_no_other_way_in(case):
    models = models_of(case)

    def frozen(models, prompt, kept):
        places = {}

        def give(place):
            def after(name, output):
                number = places[place, name] = places.get((place, name), -1) + 1
                return kept.setdefault((place, name, number), output.detach().clone())

            return after

        with (
            hooked(models[0], streams(models[0]), after=give(0)),
            hooked(models[-1], streams(models[-1]) if len(models) > 1 else (), after=give(1)),
        ):
            return run(case, prompt)

    # Prompts of as many tokens: where padding is hidden, the number of tokens is no text.
    kept: dict[object, torch.Tensor] = {}
    cat, dog = frozen(models, "a photo of a cat", kept), run(case, "a photo of a dog")
    assert torch.equal(cat, run(case, "a photo of a cat")) and not torch.equal(cat, dog)
    assert torch.equal(cat, frozen(models, "a photo of a dog", kept))
    if len(models) > 1:
        # A ControlNet is such a way: why a pipeline with one is refused.
        own: dict[object, torch.Tensor] = {}
        frozen(models[:1], "a photo of a cat", own)
        assert not torch.equal(cat, frozen(models[:1], "a photo of a dog", own))


@pytest.fixture(scope="module")
def erasure(case):
    """An erasure of what the case draws, made and undone."""
    parts = case.parts
    found = erase(
        parts.model,
        parts.text_encoders,
        ["cat=dog"],
        tokenizer=parts.tokenizers,
        config=CLOSED,
        progress=False,
    )
    found.restore_(parts.model)
    return found


def test_edited_weights_are_the_map_of_the_text(case, request):
    if case.name in FAMILIES:
        return  # test_families does the same with the prompt map
    erasure = request.getfixturevalue("erasure")
    parts, models = case.parts, models_of(case)
    before = [weights(model) for model in models]
    original = run(case, PROMPTS[0])
    erasure.apply_(parts.model)
    try:
        for model in models[1:]:
            erasure.rebase(model).apply_(model)
        edited = run(case, PROMPTS[0])
    finally:
        for model in models[1:]:
            applied(model)[-1].restore_(model)
        erasure.restore_(parts.model)
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(t, values[n]) for n, t in weights(model).items())
    kinds = [streams(model) for model in models]
    maps = {"sequence": erasure.map, "pooled": erasure.pooled_map}

    def mapping(kinds):
        def before(name, x):
            concept_map = maps[kinds[name]]
            width = concept_map.width
            return (torch.cat((concept_map(x[..., :width]), x[..., width:]), dim=-1),)

        return before

    with (
        hooked(models[0], kinds[0], before=mapping(kinds[0])),
        hooked(models[-1], kinds[-1] if len(models) > 1 else (), before=mapping(kinds[-1])),
    ):
        mapped = run(case, PROMPTS[0])
    apart = (edited - original).norm()
    assert apart > 1e-4 * original.norm()
    assert (mapped - edited).norm() < 1e-3 * apart


def drawn_otherwise(case, request, tmp_path):
    """What the case draws with edited weights, and without an erasure, of a newer family."""
    erasure = request.getfixturevalue("erasure")
    original = run(case, PROMPTS[0])
    loaded = Erasure.load(erasure.save(tmp_path / "saved.safetensors"))
    loaded.apply_(case.parts.model)
    try:
        return erasure, original, run(case, PROMPTS[0])
    finally:
        loaded.restore_(case.parts.model)


def test_a_prompt_map_does_the_same_or_is_refused(case, request, tmp_path):
    if case.name not in NEWER:
        return  # test_families
    erasure, original, edited = drawn_otherwise(case, request, tmp_path)
    norm = family_of(case.parts.model).norm
    if norm is not None:
        with pytest.raises(ValueError, match=f"through its {norm} before the map"):
            erasure.prompt_map()
        return
    asked = {"max_sequence_length": case.more["max_sequence_length"]}
    stock = encoded(case.pipe, [PROMPTS[0]], **asked)
    mapped = erasure.prompt_map()
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if name in stock:
            stock[name] = mapped(stock[name])
    if "negative_prompt_embeds" in stock:
        stock["negative_prompt"] = None
    torch.manual_seed(0)
    drawn = denoise(case.pipe, **case.more | stock)
    assert (drawn - edited).norm() < 1e-3 * (edited - original).norm()


def test_an_adapter_does_the_same_or_is_refused(case, request, tmp_path):
    if case.name not in NEWER:
        return  # tests of exports
    erasure, original, edited = drawn_otherwise(case, request, tmp_path)
    pipe, model = case.pipe, case.parts.model
    if not hasattr(model, "load_lora_adapter"):
        with pytest.raises(ValueError, match="diffusers loads no adapters for it"):
            erasure.save_lora(tmp_path, model)
        return
    erasure.save_lora(tmp_path, model)
    with pytest.raises(ValueError, match="'kohya' has names for Stable Diffusion 1, 2, XL and"):
        erasure.save_lora(tmp_path / "kohya", model, layout="kohya")
    before = weights(model)
    pipe.load_lora_weights(str(tmp_path))
    try:
        drawn = run(case, PROMPTS[0])
    finally:
        pipe.unload_lora_weights()
    assert (drawn - edited).norm() < 1e-3 * (edited - original).norm()
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())


def test_a_picture_before_the_prompt_is_not_passed_over():
    pipe, _ = LANGUAGE["qwen_image"]()
    stand_in = SimpleNamespace(**pipe.components, processor=object())
    with pytest.raises(ValueError, match="shows its text encoder a picture before the prompt"):
        erase(stand_in, ["cat"], config=CLOSED)


@pytest.mark.parametrize("name", ["z_image", "flux2_klein"])
def test_how_a_language_model_is_read_is_in_the_file(name):
    pipe, _ = LANGUAGE[name]()
    family = family_of(pipe.transformer)
    again = Family.from_dict(json.loads(json.dumps(family.to_dict())))
    assert again == Family.from_dict(family.to_dict()) and again.norm == family.norm
    assert again.sections[0][0].chat == family.sections[0][0].chat
    assert again.sections[0][0].layers == family.sections[0][0].layers
    told = " ".join(family.explained())
    assert "in the tokenizer's chat template" in told and "any max_sequence_length" in told


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_norm_before_a_map_is_refused(register):
    pipe, _ = LANGUAGE["z_image"]()
    getattr(pipe.transformer.cap_embedder[0], register)(lambda *_: None)
    with pytest.raises(ValueError, match=r"cap_embedder\.0 is not run as it stands"):
        erase(pipe, ["cat"], config=CLOSED, progress=False)


def test_of_two_models_of_a_class_the_other_encoder_is_refused():
    pipe, _ = LANGUAGE["flux2_klein"]()
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match=r"type mistral3, got Qwen3ForCausalLM \(qwen3\)"):
        erase(pipe, ["cat"], config=CLOSED, progress=False)


@pytest.mark.parametrize("name", ["wan", "latte", "sana_video"])
def test_videos_are_not_judged_as_pictures(name):
    pipe, _ = VIDEO[name]()
    before = weights(pipe.transformer)
    erasure = erase(pipe, [], config=CLOSED, progress=False)
    with pytest.raises(ValueError, match=r"Pipeline draws videos; expected a text-to-image"):
        verify(pipe, erasure, ["a cat"], progress=False)
    assert all(torch.equal(t, before[n]) for n, t in weights(pipe.transformer).items())


def test_two_denoisers_are_erased_from_one_after_the_other(tmp_path):
    pipe, more = wan22()
    with pytest.raises(ValueError, match=r"its transformer_2 .* is shown the prompt") as caught:
        erase(pipe, ["cat"], config=CLOSED, progress=False)
    assert "erasure.rebase(pipe.transformer_2).apply_(pipe.transformer_2)" in str(caught.value)
    models = (pipe.transformer, pipe.transformer_2)
    before = [weights(model) for model in models]
    original = denoise(pipe, **more)
    erasure = erase(
        pipe.transformer,
        pipe.text_encoder,
        ["cat=dog"],
        tokenizer=pipe.tokenizer,
        config=CLOSED,
        progress=False,
    )
    first = denoise(pipe, **more)
    second = erasure.rebase(pipe.transformer_2)
    second.apply_(pipe.transformer_2)
    edited = denoise(pipe, **more)
    # Each draws one of the two steps.
    assert not torch.equal(first, original) and not torch.equal(edited, first)
    files = [
        made.save_lora(tmp_path / str(number), model)
        for number, (made, model) in enumerate(zip((erasure, second), models, strict=True))
    ]
    second.restore_(pipe.transformer_2)
    erasure.restore_(pipe.transformer)
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(t, values[n]) for n, t in weights(model).items())
    for number, file in enumerate(files):
        pipe.load_lora_weights(
            str(file), adapter_name=f"part{number}", load_into_transformer_2=bool(number)
        )
    drawn = denoise(pipe, **more)
    assert (drawn - edited).norm() < 1e-3 * (edited - original).norm()


# What is not in the table


def hollow(kind):
    """An object of a class without its layers: enough to ask for its class."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    return model


def every_model():
    for name in dir(diffusers):
        # With onnxruntime there are names of pipelines that have gone.
        kind = getattr(diffusers, name, None)
        if isinstance(kind, type) and issubclass(kind, ModelMixin) and kind is not ModelMixin:
            yield kind


def test_no_other_class_of_diffusers_is_taken():
    kinds = [kind for kind in every_model() if "forward" in vars(kind)]
    assert len(kinds) > 90
    refused = 0
    for kind in kinds:
        if kind.__name__ in {**ENTRANCES, **COMPANIONS}:
            continue
        with pytest.raises(ValueError, match=rf"model: {kind.__name__} is not supported") as caught:
            streams(hollow(kind))
        assert UNSUPPORTED.get(kind.__name__, "") in str(caught.value)
        assert "SD3Transformer2DModel" in str(caught.value)
        refused += 1
    assert refused > 80
    assert set(BY_CLASS) <= set(ENTRANCES)
    # Every reason is of a class that diffusers has, or that it keeps elsewhere.
    known = {kind.__name__ for kind in kinds} | {"Kandinsky3UNet", "StableCascadeUNet"}
    assert set(UNSUPPORTED) <= known and not set(UNSUPPORTED) & {*ENTRANCES, *COMPANIONS}


def test_a_forward_of_ones_own_is_another_model():
    class Mine(type(tiny_unet())):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Same(type(tiny_unet())):  # type: ignore[misc]
        """A subclass that computes what its class does."""

    unet = tiny_unet()
    unet.__class__ = Same
    assert len(projections(unet)) == 8
    unet.__class__ = Mine
    with pytest.raises(ValueError, match=rf"Mine \(its forward is of {LIBRARY}\) is not supp"):
        projections(unet)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_hid_dim_type", "text_proj"),
        ("addition_embed_type", "text"),
        ("class_embed_type", "projection"),
        ("class_embed_type", "simple_projection"),
        ("attention_type", "gated"),
        ("dual_cross_attention", True),
    ],
)
def test_configurations_that_let_more_text_in_are_refused(name, value):
    unet = tiny_unet()
    unet.register_to_config(**{name: value})
    with pytest.raises(ValueError, match=f"{name}={value!r} gives text another way in"):
        erase(unet, tiny_text_encoder(), ["cat"], tokenizer=tiny_tokenizer(), progress=False)


def test_encoders_of_another_kind_are_refused():
    other = flux()
    with pytest.raises(ValueError, match=r"type clip_text_model, got T5EncoderModel \(t5\)"):
        erase(tiny_unet(48), other.text_encoder_2, ["cat"], tokenizer=other.tokenizer_2)


# Beside the denoiser


@pytest.mark.parametrize("name", BESIDE)
def test_a_controlnet_is_named_and_the_advice_works(name):
    pipe, _ = BESIDE[name]()
    models = [pipe.controlnet, getattr(pipe, "unet", None) or pipe.transformer]
    before = [weights(model) for model in models]
    with pytest.raises(ValueError, match="its controlnet .* is shown the prompt") as caught:
        erase(pipe, ["cat"], config=CLOSED, progress=False)
    assert "erasure.rebase(pipe.controlnet).apply_(pipe.controlnet)" in str(caught.value)
    assert "scheduler=pipe.scheduler" in str(caught.value)
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(t, values[n]) for n, t in weights(model).items())


def test_a_compiled_controlnet_is_known():
    pipe, _ = BESIDE["sd_controlnet"]()
    parts = {**pipe.components, "controlnet": torch.compile(pipe.controlnet, backend="eager")}
    with pytest.raises(ValueError, match=r"erasure\.rebase\(pipe\.controlnet\)"):
        components_of(SimpleNamespace(**parts, components=parts))


@pytest.mark.parametrize("name", BESIDE)
def test_a_controlnet_by_itself_is_read_as_its_denoiser(name):
    pipe, _ = BESIDE[name]()
    net, model = pipe.controlnet, getattr(pipe, "unet", None) or pipe.transformer
    assert family_of(net, 2) == family_of(model, 2)


def test_adapters_of_other_classes_are_not_believed():
    parts = {**sd1().components, "adapter": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"its adapter \(Linear\) is shown the prompt"):
        components_of(SimpleNamespace(**parts, components=parts))


def test_each_net_of_several_is_named():
    pipe, _ = BESIDE["sd_controlnet"]()
    several = diffusers.MultiControlNetModel([pipe.controlnet, pipe.controlnet])
    pipe.register_modules(controlnet=several)
    with pytest.raises(ValueError, match=r"each net of pipe\.controlnet\.nets"):
        components_of(pipe)


@pytest.mark.parametrize("part", ["prior", "text_conditioner", "connectors", "transformer_2"])
def test_other_parts_that_may_be_shown_text_are_refused_without_advice(part):
    pipe = sd1()
    parts = {**pipe.components, part: nn.Linear(2, 2)}
    stand_in = SimpleNamespace(**parts, components=parts)
    with pytest.raises(ValueError, match=rf"its {part} \(Linear\) .*: not supported$"):
        erase(stand_in, ["cat"])


def test_a_rebased_erasure_leaves_the_factors_of_the_denoiser_out(tmp_path, caplog):
    pipe, _ = BESIDE["sd_controlnet"]()
    erasure = erase(
        pipe.unet,
        pipe.text_encoder,
        ["cat=dog"],
        tokenizer=pipe.tokenizer,
        config=CLOSED,
        progress=False,
    )
    own = erasure.rebase(pipe.controlnet)
    assert own.provenance["model_class"] == "ControlNetModel"
    loaded = Erasure.load(own.save(tmp_path / "net.safetensors"))
    assert ".apply_(pipe.controlnet)" in (tmp_path / "net.md").read_text()
    with pytest.raises(ValueError, match="no pipeline loads adapters into a ControlNet"):
        loaded.save_lora(tmp_path / "lora", pipe.controlnet)
    before = weights(pipe.controlnet)
    loaded.apply_(pipe.controlnet)
    assert any(not torch.equal(t, before[n]) for n, t in weights(pipe.controlnet).items())
    loaded.restore_(pipe.controlnet)
    assert all(torch.equal(t, before[n]) for n, t in weights(pipe.controlnet).items())


# Attention processors and replaced forwards


def test_processors_with_maps_of_their_own_are_refused():
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0 as Custom

    unet = tiny_unet()
    own = {}
    for name in unet.attn_processors:
        attn = unet.get_submodule(name.removesuffix(".processor"))
        sizes = (attn.to_q.in_features, attn.cross_attention_dim)
        own[name] = Custom(attn.is_cross_attention, False, *sizes)
    unet.set_attn_processor(own)
    with pytest.raises(ValueError, match=r"CustomDiffusionAttnProcessor2_0, which has weights"):
        projections(unet)

    class Held:
        """Weights in an attribute, without being a module."""

        def __init__(self):
            self.to_text = nn.Linear(32, 16)

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            return hidden_states

    unet = tiny_unet()
    unet.set_attn_processor(Held())
    with pytest.raises(ValueError, match=r"Held, which has weights of its own \(to_text\.weight"):
        projections(unet)


def wrapped_in(layer):
    """A processor that hides a layer in each of the places where Python keeps things."""

    def closure(attn, hidden_states, encoder_hidden_states=None, **kwargs):
        return layer(hidden_states) if layer else absent

    class Slotted:
        __slots__ = ("inner",)

        def __call__(self, *args, **kwargs): ...

    slotted = Slotted()
    slotted.inner = {"maps": [SimpleNamespace(of_text=layer)]}
    if layer is None:
        absent = None  # so that the closure has a cell with nothing in it, which comes first
    return {
        "closure": closure,
        "slots": slotted,
        "attribute": SimpleNamespace(m=layer),
        "partial": partial(lambda own, *_, **__: own, layer),
        "bound": layer.__call__,
        "tensor": SimpleNamespace(delta=layer.weight.detach()),
    }


@pytest.mark.parametrize("place", ["closure", "slots", "attribute", "partial", "bound", "tensor"])
def test_weights_of_processors_are_found_wherever_they_are(place):
    unet = tiny_unet()
    processor = wrapped_in(nn.Linear(32, 16))[place]
    unet.get_submodule(LAYER).processor = processor
    with pytest.raises(ValueError, match="which has weights of its own"):
        projections(unet)


def test_a_processor_may_refer_to_the_model():
    unet = tiny_unet()
    unet.get_submodule(LAYER).processor = SimpleNamespace(model=[unet], maps=torch.randn(2, 8, 32))
    assert len(projections(unet)) == 8


def test_a_text_projection_beside_an_ip_adapter_is_refused():
    unet = tiny_unet()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    unet.text_encoder_hid_proj = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="its text_encoder_hid_proj transforms the text"):
        projections(unet)


def test_a_processor_without_weights_is_the_users_own_business():
    from diffusers.models.attention_processor import AttnProcessor

    class Recorder(AttnProcessor):
        """As those that keep attention maps."""

        def __init__(self):
            super().__init__()
            self.maps = []

    unet = tiny_unet()
    unet.set_attn_processor(Recorder())
    assert len(projections(unet)) == 8


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


BLOCK = LAYER.rpartition(".")[0]


@pytest.mark.parametrize("place", ["", BLOCK, LAYER, f"{LAYER}.to_v"])
@pytest.mark.parametrize("hooked_before", [False, True])
def test_replaced_forwards_are_refused(place, hooked_before):
    unet = tiny_unet()
    if hooked_before:
        # accelerate replaces forwards as well, which is no excuse for others.
        add_hook_to_module(unet.get_submodule(place), ModelHook())
        assert len(projections(unet)) == 8
    module = unet.get_submodule(place)
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match=f"its forward is replaced by {HERE}"):
        projections(unet)
    module.forward = own
    assert len(projections(unet)) == 8


def test_a_forward_that_accelerate_hides_is_found():
    unet = tiny_unet()
    layer = unet.get_submodule(f"{LAYER}.to_k")
    own = layer.forward
    layer.forward = lambda x: own(x) + 1
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(ValueError, match=f"its forward is replaced by {HERE}"):
        projections(unet)


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: FAMILIES["pixart_alpha"]().transformer, "caption_projection"),
        (lambda: flux().transformer, "time_text_embed"),
    ],
    ids=["pixart", "flux"],
)
def test_what_stands_before_a_map_is_looked_at_too(make, place):
    model = make()
    handle = model.get_submodule(place).register_forward_pre_hook(lambda _m, x: x)
    with pytest.raises(ValueError, match=f"{place} is not run as it stands"):
        projections(model)
    handle.remove()
    module = model.get_submodule(place)
    module.__class__ = type("Other", (type(module),), {"forward": lambda self, x: x})
    with pytest.raises(ValueError, match=f"{place} is a Other, a class that is not of diffusers"):
        projections(model)


def test_a_hook_of_the_whole_model_is_the_users_own_business():
    # It sees what the model is called with and gives, as a profiler does, and no map.
    unet = tiny_unet()
    unet.register_forward_hook(lambda *_: None)
    assert len(projections(unet)) == 8


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", [LAYER, f"{LAYER}.to_k"])
def test_hooks_on_a_map_are_refused(register, place):
    unet = tiny_unet()
    handle = getattr(unet.get_submodule(place), register)(lambda *_: None)
    with pytest.raises(ValueError, match=f"it has the forward hook {HERE}"):
        projections(unet)
    handle.remove()
    assert len(projections(unet)) == 8


def test_a_subclass_of_a_linear_layer_is_refused():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum()

    unet = tiny_unet()
    unet.get_submodule(f"{LAYER}.to_k").__class__ = Adapted
    with pytest.raises(ValueError, match=r"to_k is quantized or not a plain linear layer"):
        projections(unet)


# A textual inversion of several vectors is one word


@pytest.mark.parametrize("make", [sd1, sdxl, flux], ids=lambda make: make.__name__)
def test_multi_vector_words_are_read_as_the_pipeline_reads_them(make):
    pipe = make()
    tokenizers = [pipe.tokenizer, *([pipe.tokenizer_2] if hasattr(pipe, "tokenizer_2") else [])]
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    for tokenizer, encoder in zip(tokenizers, encoders, strict=False):
        tokenizer.add_tokens(["<bun>", "<bun>_1", "<bun>_2"])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    prompt = "a photo of a <bun> and a cat"
    parts = components_of(pipe)
    family = family_of(parts.model, len(encoders))
    plain = replace(
        family,
        sections=tuple(tuple(replace(r, multi_vector=False) for r in s) for s in family.sections),
        pooled=tuple(replace(r, multi_vector=False) for r in family.pooled),
    )
    found, as_written = (
        text_streams(parts.model, parts.text_encoders, parts.tokenizers, reading)
        for reading in (None, plain)
    )
    expanded = "a photo of a <bun> <bun>_1 <bun>_2 and a cat"
    for stream, sections in found.items():
        for section, written in zip(sections, as_written[stream], strict=True):
            assert torch.equal(section.encode([prompt]), written.encode([expanded]))
            assert not torch.equal(section.encode([prompt]), written.encode([prompt]))
            if section.max_tokens > 1:
                span = section.span("a photo of a ", "<bun>")
                assert span.stop - span.start == 3
                assert section.token_ids("<bun>") == written.token_ids("<bun> <bun>_1 <bun>_2")
    stock = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
    assert stock == expanded


def test_sd3_does_not_expand_them():
    pipe = sd3()
    assert not hasattr(pipe, "maybe_convert_prompt")
    for tokenizer, encoder in (
        (pipe.tokenizer, pipe.text_encoder),
        (pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        tokenizer.add_tokens(["<bun>", "<bun>_1"])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    parts = components_of(pipe)
    section = text_streams(parts.model, parts.text_encoders, parts.tokenizers)["sequence"][0]
    span = section.span("a photo of a ", "<bun>")
    assert span.stop - span.start == 1


# A reading that the caller knows


class Strange(nn.Module):
    """A denoiser that nobody knows."""

    def __init__(self):
        super().__init__()
        self.config = {}
        torch.manual_seed(0)
        self.text_in = nn.Linear(32, 16, bias=False)

    def forward(self, text):
        return self.text_in(text)


STRANGE = Family("Strange", ((Reading(0),),), maps={"text_in": "sequence"})


def test_the_caller_may_say_how_a_model_reads_text(tmp_path):
    model, encoder, tokenizer = Strange(), tiny_text_encoder(), tiny_tokenizer()
    refused = rf"Strange \(its forward is of {LIBRARY}\) is not .* pass reading="
    with pytest.raises(ValueError, match=refused):
        erase(model, encoder, ["cat=dog"], tokenizer=tokenizer, progress=False)
    erasure = erase(
        model,
        encoder,
        ["cat=dog"],
        tokenizer=tokenizer,
        reading=STRANGE,
        config=CLOSED,
        progress=False,
    )
    # With the rows that it really has.
    read = Family("Strange", ((Reading(0, max_tokens=77),),), maps={"text_in": "sequence"})
    assert erasure.reading == read
    text = text_streams(model, encoder, tokenizer, STRANGE)["sequence"][0].encode(["a cat"])
    other = Strange()
    mapped = other(erasure.prompt_map()(text))
    assert not torch.allclose(model(text), other(text), atol=1e-3)
    assert torch.allclose(model(text), mapped, rtol=1e-4, atol=1e-5)
    loaded = Erasure.load(erasure.save(tmp_path / "strange.safetensors"))
    assert loaded.reading == read
    loaded.apply_(other)
    assert torch.equal(other.text_in.weight, model.text_in.weight)
    loaded.restore_(other)
    erasure.restore_(model)
    assert torch.equal(other.text_in.weight, model.text_in.weight)


def test_a_reading_may_shorten_the_prompts():
    pipe = flux()
    known = family_of(pipe.transformer, 2)
    short = Family.from_dict(
        known.to_dict() | {"sections": [[known.to_dict()["sections"][0][0] | {"max_tokens": 64}]]}
    )
    erasure = erase(pipe, ["cat=dog"], reading=short, config=CLOSED, progress=False)
    assert any("64 rows; padding is in sight" in text for text in erasure.report["reading"])
    assert erasure.provenance["reading"]["sections"][0][0]["max_tokens"] == 64
    model = pipe.transformer
    texts = text_streams(
        model, (pipe.text_encoder, pipe.text_encoder_2), (pipe.tokenizer, pipe.tokenizer_2), short
    )
    assert texts["sequence"][0].encode(["cat"]).shape[1] == 64


@pytest.mark.parametrize(
    ("reading", "error", "message"),
    [
        (dict, TypeError, "reading: expected a realera_fast.models.Family, got dict"),
        (lambda: Family("x", ()), ValueError, "sections is empty"),
        (lambda: Family("x", (Reading(0),)), ValueError, "sections: expected tuples of Reading"),
        (lambda: Family("x", ((0,),)), ValueError, "sections: expected a Reading, got int"),
        (
            lambda: Family("x", ((Reading(0),),), Reading(0, "pooled")),
            ValueError,
            "pooled: expected tuples of Reading",
        ),
        (lambda: Family(3, ((Reading(0),),)), ValueError, "name is a string"),
        (lambda: Family("x", ((Reading(0),),), maps=["text_in"]), ValueError, "maps: expected"),
        (lambda: Family("x", ((Reading(0),),), maps={"no": "sequence"}), ValueError, "map 'no'"),
        (lambda: Family("x", ((Reading(0),),), maps={"text_in": ""}), ValueError, "expected of"),
        (
            lambda: Family("x", ((Reading(0),),), maps={"text_in": "pooled"}),
            ValueError,
            "maps names none of the token sequence",
        ),
        (
            lambda: Family("x", ((Reading(0, "pooled"),),)),
            ValueError,
            "output='pooled' is for the pooled vector",
        ),
        (lambda: Family("x", ((Reading(0, "third"),),)), ValueError, "not how an encoder is read"),
        (lambda: Family("x", ((Reading(0, max_tokens=0),),)), ValueError, "how an encoder is read"),
        (lambda: Family("x", ((Reading(0, layers=(0.5,)),),)), ValueError, "how an encoder is"),
        (lambda: Family("x", ((Reading(0, dropped=-1),),)), ValueError, "how an encoder is read"),
        (lambda: Family("x", ((Reading(0, chat="a"),),)), ValueError, "how an encoder is read"),
        (lambda: Family("x", ((Reading(0), Reading(1)),), norm="n"), ValueError, "one encoder's"),
        (
            lambda: Family("x", ((Reading(0),),), maps={"text_in": "sequence"}, norm="gone"),
            ValueError,
            "it names the norm 'gone', which Strange does not have",
        ),
        (
            lambda: Family("x", ((Reading(0),),), aligned=True, maps={"text_in": "sequence"}),
            ValueError,
            "aligned=True is for the families of this library",
        ),
        (lambda: Family("x", ((Reading(0),),)), ValueError, "is not supported"),
    ],
)
def test_bad_readings_are_refused(reading, error, message):
    with pytest.raises(error, match=message):
        erase(
            Strange(), tiny_text_encoder(), ["cat"], tokenizer=tiny_tokenizer(), reading=reading()
        )


def test_a_reading_must_name_the_pooled_vector_of_a_model_that_takes_one():
    pipe = flux()
    before = weights(pipe.transformer)
    reading = Family("FLUX at 64", ((Reading(1, max_tokens=64),),))
    with pytest.raises(ValueError, match="reading: FluxTransformer2DModel takes a pooled vector"):
        erase(pipe, ["cat"], reading=reading, config=CLOSED, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in weights(pipe.transformer).items())


def test_a_reading_without_a_length_must_name_one():
    tokenizer = t5_tokenizer(int(1e30))
    with pytest.raises(ValueError, match="reading: neither text_encoder nor its tokenizer says"):
        TextModel(t5(48, seed=1, dtype=torch.float32), tokenizer)
    assert TextModel(t5(48, seed=1, dtype=torch.float32), tokenizer, max_tokens=20).rows == 20


def test_length_and_padding_are_in_the_report_and_in_the_file(tmp_path):
    pipe = sd3()
    erasure = erase(pipe, ["cat=dog"], config=CLOSED, progress=False)
    told = " ".join(erasure.report["reading"])
    # As many as the tiny tokenizer holds; the pipeline's default is 256.
    assert "text encoder 3, last states, 128 rows; padding is in sight" in told
    assert "text encoder 1 and text encoder 2, penultimate states, 77 rows" in told
    loaded = Erasure.load(erasure.save(tmp_path / "sd3.safetensors"))
    assert loaded.provenance["reading"]["name"] == "Stable Diffusion 3"
    assert loaded.provenance["reading"]["sections"][1][0]["max_tokens"] == 128
    assert "128 rows; padding is in sight" in (tmp_path / "sd3.md").read_text()
    less = erase(FAMILIES["sd3_without_t5"](), ["cat=dog"], config=CLOSED, progress=False)
    assert "text encoder 3" not in " ".join(less.report["reading"])
    masked = erase(sana(), ["cat=dog"], config=CLOSED, progress=False)
    assert "any max_sequence_length" in " ".join(masked.report["reading"])


def test_whether_adapters_load_is_asked_of_the_class(tmp_path):
    pipe, _ = build("text_to_video")
    erasure = erase(pipe, ["cat=dog"], config=CLOSED, progress=False)
    assert not hasattr(pipe.unet, "load_lora_adapter")
    with pytest.raises(ValueError, match="UNet3DConditionModel: diffusers loads no adapters"):
        erasure.save_lora(tmp_path, pipe.unet)
    erasure.restore_(pipe.unet)
    with pytest.raises(ValueError, match="UNet3DConditionModel: diffusers loads no adapters"):
        erasure.save_lora(tmp_path)
    pipe, _ = build("bria")
    erasure = erase(pipe, ["cat=dog"], config=CLOSED, progress=False)
    file = erasure.save_lora(tmp_path / "bria", pipe.transformer)
    card = file.with_name("README.md")
    edited = weights(pipe.transformer)["context_embedder.weight"]
    erasure.restore_(pipe.transformer)
    assert not hasattr(pipe, "load_lora_weights")
    (call,) = re.findall(r"pipe\.transformer\.load_lora_adapter\(.*\)", card.read_text())
    exec(call.replace("path/to/this/folder", str(file.parent)), {"pipe": pipe})
    layer = pipe.transformer.context_embedder
    delta = layer.get_delta_weight("default_0") if hasattr(layer, "get_delta_weight") else None
    assert delta is not None
    assert torch.allclose(layer.base_layer.weight + delta, edited, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("lcm", "inpaint", "pix2pix", "depth2img", "upscaler", "animatediff", "text_to_video"),
        *("sdxl_inpaint", "bria"),
    ],
)
def test_models_that_alignment_does_not_run_on_get_the_closed_form_and_a_warning(name):
    pipe, _ = build(name)
    config = replace(CLOSED, alignment=replace(CLOSED.alignment, enabled=True))
    erasure = erase(pipe, ["cat=dog"], config=config, progress=False)
    (told,) = [text for text in erasure.report["warnings"] if "noise alignment runs on" in text]
    assert told.split(": ", 1)[1]
    erasure.restore_(components_of(pipe).model)


def test_an_adapter_is_still_refused():
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="an adapter is attached"):
        projections(unet)


def test_what_is_no_pipeline_of_a_known_denoiser_is_named():
    parts = {"prior": nn.Linear(2, 2), "text_encoder": tiny_text_encoder()}
    with pytest.raises(TypeError, match="whose parts are prior, text_encoder: not supported"):
        erase(SimpleNamespace(components=parts, **parts), ["cat"])
    unet = tiny_unet()
    with pytest.raises(ValueError, match=r"its bert \(CLIPTextModel\) is shown the prompt"):
        erase(SimpleNamespace(unet=unet, bert=tiny_text_encoder()), ["cat"])
    with pytest.raises(TypeError, match="a pipeline that takes no text has nothing to erase"):
        erase(SimpleNamespace(unet=unet, image_encoder=nn.Linear(2, 2)), ["cat"])
    assert isinstance(components_of(sd1()), Components)
