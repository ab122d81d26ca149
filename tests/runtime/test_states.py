"""States that a server puts models and PyTorch into: docs/states.md, row by row."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from edits import CLOSED
from model_state import equal, weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_families import pixart_alpha, sd1, sdxl
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import realera_fast
from realera_fast import Concept, EraseConfig, Erasure, erase
from realera_fast.alignment import AlignmentConfig
from realera_fast.erasure import applied
from realera_fast.evaluation import verification, verify
from realera_fast.mining import MiningConfig
from realera_fast.models import components_of, projections, transaction
from realera_fast.text import TextModel
from realera_fast.unet import ddim_of

PAGE = Path(__file__).parents[2] / "docs" / "states.md"
ALIGNED = replace(
    CLOSED,
    # Of a category few words are drawn.
    mining=MiningConfig(member_words=16),
    alignment=AlignmentConfig(
        steps=2, batch_size=2, trajectories=2, sampling_steps=2, evaluation_steps=0, check_seeds=0
    ),
)
CONFIGS = {"closed form": CLOSED, "alignment": ALIGNED}
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def rows() -> dict[str, str]:
    """What the page says of each state but the schedulers, which have a table of their own."""
    page = PAGE.read_text(encoding="utf-8").split("## The noise scheduler")[0]
    found = re.findall(r"^\| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    return {state: told for state, told in found if state not in ("state", "---")}


@dataclass
class Case:
    """A pipeline in a state."""

    pipe: Any
    around: Any = contextlib.nullcontext
    """What is switched on around the calls."""
    same: bool = True
    """Whether the result is that of the plain pipeline."""


CASES: dict[str, Callable[[], Case]] = {}
TESTED: set[str] = {
    "a thread draws under the model's lock while another edits",
    "an erasure, copied or pickled",
    "a prompt map or a guarded pipeline, copied or pickled",
    "a model with an erasure applied, copied or pickled",
    "a model with fused keys and values, copied or pickled",
    "a model with an erasure attached as an adapter, copied",
    "threads draw from a guarded pipeline (`realera_fast.guard`) and from its own",
}
"""Rows with a test of their own; these in tests/runtime/test_services.py and
tests/eraser/test_guarding.py."""


def case(state: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def note(build: Callable[[], Case]) -> Callable[[], Case]:
        CASES[state] = build
        return build

    return note


def row(state: str) -> Callable[[Any], Any]:
    TESTED.add(state)
    return lambda test: test


def run(pipe, config=CLOSED, word="cat=dog", **options) -> Erasure:
    return erase(pipe, [word], config=config, progress=False, **options)


@lru_cache
def plain(name: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Fingerprint and weights without any state."""
    pipe = sd1()
    erasure = run(pipe, CONFIGS[name])
    assert erasure.map.rank and bool(erasure.lora) == (name == "alignment")
    return erasure.fingerprint, weights(pipe.unet)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of every tensor that has some, by its name without wrappers."""
    tensors = [(n, t.detach()) for n, t in model.named_parameters() if not t.is_meta]
    return {n: t.to_dense() if t.is_sparse else t.clone() for n, t in tensors}


def test_every_row_has_a_test():
    assert rows().keys() == CASES.keys() | TESTED


# Around a call


def around(state: str, make: Callable[[], Any]) -> None:
    case(state)(lambda: Case(sd1(), make))


@contextlib.contextmanager
def setting(put: Callable[[Any], None], value: Any, former: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(former)


around("`torch.autocast`", lambda: torch.autocast("cpu", torch.bfloat16))
around("`torch.inference_mode`", torch.inference_mode)
around("`torch.no_grad`", torch.no_grad)
around(
    "`torch.set_default_dtype(torch.bfloat16)`",
    lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
)
around(
    "`torch.set_default_dtype(torch.float64)`",
    lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
)
around("`torch.set_default_device`", lambda: setting(torch.set_default_device, "meta", None))
around(
    '`torch.set_float32_matmul_precision("medium")`',
    lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
)


@case("`torch.use_deterministic_algorithms`")
def _():
    def strictly(mode: bool) -> None:
        torch.use_deterministic_algorithms(True, warn_only=not mode)

    return Case(sd1(), lambda: setting(strictly, True, False))


# The denoiser


def denoiser(
    state: str, change: Callable[[Any, nn.Module], Any], build: Any = sd1, same: bool = True
) -> None:
    """A state that is made by a change; what that returns stands in the U-Net's place."""

    def made() -> Case:
        pipe = build()
        if isinstance(found := change(pipe, pipe.unet), nn.Module) and found is not pipe.unet:
            pipe.unet = found
        return Case(pipe, same=same)

    case(state)(made)


def strided(unet: nn.Module) -> None:
    for layer in projections(unet).values():
        layer.weight.data = layer.weight.data.T.contiguous().T


def one_buffer(unet: nn.Module) -> None:
    flat = nn.utils.parameters_to_vector(unet.parameters()).detach()
    nn.utils.vector_to_parameters(flat, unet.parameters())
    storages = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    assert len(storages) == 1


def in_inference_mode(build: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return build()


def layer_of(unet: nn.Module, name: str = "to_k") -> Any:
    return unet.get_submodule(f"{FIRST}.{name}")


def wrong(graph: Any, inputs: Any) -> Any:
    """A compiler whose code rounds otherwise."""

    def run(*arguments: Any) -> Any:
        found = graph(*arguments)
        return [x * 1.001 if torch.is_tensor(x) and x.is_floating_point() else x for x in found]

    return run


def part_compiled(unet: nn.Module) -> None:
    unet.down_blocks[0] = torch.compile(unet.down_blocks[0], backend="eager")


def tied(unet: nn.Module) -> None:
    layer_of(unet, "to_v").weight = layer_of(unet).weight


def shared(unet: nn.Module) -> None:
    unet.get_submodule(FIRST).to_v = layer_of(unet)


def expanded(unet: nn.Module) -> None:
    layer = layer_of(unet)
    layer.weight = nn.Parameter(layer.weight.detach()[:1].expand(layer.weight.shape))


def sparse(unet: nn.Module) -> None:
    layer_of(unet).weight = nn.Parameter(layer_of(unet).weight.detach().to_sparse())


def dynamic(module: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def adapter(pipe: Any, name: str = "style") -> None:
    options = LoraConfig(r=2, init_lora_weights=False, target_modules=["attn2.to_k"])
    pipe.unet.add_adapter(options, adapter_name=name)


def fused(pipe: Any, _: nn.Module) -> None:
    adapter(pipe)
    pipe.fuse_lora()


def lora(module: Any, *targets: str) -> Any:
    options = LoraConfig(r=2, init_lora_weights=False, target_modules=list(targets))
    return get_peft_model(module, options)


def grouped(module: nn.Module) -> None:
    place = torch.device("cpu")
    apply_group_offloading(module, place, place, "leaf_level")


def moved(module: nn.Module) -> None:
    cpu_offload_with_hook(module, execution_device=torch.device("cuda"))
    # There may be no GPU: what is called here must not get that far.
    module._hf_hook.pre_forward = None


denoiser("training mode", lambda _, unet: unet.train())
denoiser("`requires_grad_(False)`", lambda _, unet: unet.requires_grad_(False))
denoiser("`model.compile()`", lambda _, unet: unet.compile(backend=wrong))
denoiser(
    "`model.compile_repeated_blocks()`",
    lambda _, unet: unet.compile_repeated_blocks(backend=wrong),
)
denoiser("parts wrapped by `torch.compile`", lambda _, unet: part_compiled(unet))
denoiser("weights with other strides", lambda _, unet: strided(unet))
denoiser("all weights in one buffer", lambda _, unet: one_buffer(unet))
denoiser(
    "fused keys and values of prompts (`realera_fast.fuse`)",
    lambda pipe, _: realera_fast.fuse(pipe),
)
denoiser(
    "layerwise casting, storage in bfloat16",
    lambda _, unet: unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
    same=False,
)
denoiser(
    "layerwise casting, storage in float8",
    lambda _, unet: unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
)
denoiser("moved whenever it runs (`enable_model_cpu_offload`)", lambda _, unet: moved(unet))
denoiser(
    "offloaded module by module (`enable_sequential_cpu_offload`)",
    lambda _, unet: cpu_offload(unet, execution_device=torch.device("cpu")),
)
denoiser("offloaded in groups (`enable_group_offload`)", lambda _, unet: grouped(unet))
denoiser("on the meta device", lambda _, unet: unet.to("meta"))
denoiser("quantized", lambda _, unet: dynamic(unet))
denoiser(
    "parametrized weights", lambda _, unet: parametrizations.orthogonal(layer_of(unet)) and None
)
denoiser("`weight_norm`", lambda _, unet: weight_norm(layer_of(unet)) and None)
denoiser("sparse weights", lambda _, unet: sparse(unet))
denoiser("one weight in two layers", lambda _, unet: tied(unet))
denoiser("one layer in two places", lambda _, unet: shared(unet))
denoiser("an expanded weight", lambda _, unet: expanded(unet))
denoiser("an adapter attached", lambda pipe, _: adapter(pipe))
denoiser("an adapter fused, not unloaded", fused)
denoiser("wrapped by peft", lambda _, unet: lora(unet, "to_k"))
denoiser(
    "distilled with guidance as an input (LCM)",
    lambda _, unet: unet.register_to_config(time_cond_proj_dim=8),
)


@case("`torch.compile(model)`")
def _():
    return wrapped(lambda unet: torch.compile(unet, backend=wrong))


@case("`DataParallel`")
def _():
    return wrapped(nn.DataParallel)


class Parts:
    """A pipeline whose U-Net is called through a wrapper."""

    def __init__(self, pipe: Any, unet: nn.Module) -> None:
        self.unet = unet
        self.text_encoder, self.tokenizer = pipe.text_encoder, pipe.tokenizer
        self.scheduler = pipe.scheduler


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Case:
    pipe = sd1()
    return Case(Parts(pipe, wrap(pipe.unet)))


@case("made in `torch.inference_mode`")
def _():
    return Case(in_inference_mode(sd1))


@case("moved under `torch.inference_mode` after an erasure")
def _():
    pipe = sd1()
    earlier = run(pipe)
    with torch.inference_mode():
        pipe.unet.to(torch.float64).to(torch.float32)
    earlier.restore_(pipe.unet)
    assert next(pipe.unet.parameters()).is_inference()
    return Case(pipe)


# The text encoder


def encoder(state: str, change: Callable[[nn.Module], Any], same: bool = True) -> None:
    def made() -> Case:
        pipe = sd1()
        found = change(pipe.text_encoder)
        if isinstance(found, nn.Module):
            # A stock pipeline takes an encoder of its own class alone.
            pipe = Parts(pipe, pipe.unet)
            pipe.text_encoder = found
        return Case(pipe, same=same)

    case(f"encoder: {state}")(made)


class Packed(torch.Tensor):
    """What quantizers hold weights in: whole numbers and their scale, made dense for a product."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=scale.dtype, device=numbers.device
        )

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["numbers", "scale"], None

    def __repr__(self) -> str:
        return "Packed"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)

        def dense(value: Any) -> Any:
            return value.numbers.float() * value.scale if isinstance(value, cls) else value

        return function(*(dense(value) for value in args), **(kwargs or {}))


def packed(encoder: nn.Module) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            numbers = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Packed(numbers, scale), requires_grad=False)


def on_disk(encoder: nn.Module) -> None:
    places = {name.rpartition(".")[0]: "cpu" for name, _ in encoder.named_parameters()}
    places = {name: "disk" if "layers.1." in name else "cpu" for name in places}
    dispatch_model(
        encoder, places, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True
    )


def replaced_forward(encoder: nn.Module) -> None:
    layer = next(m for m in encoder.modules() if isinstance(m, nn.Linear))
    former = layer.forward
    layer.forward = lambda x: former(x) * 1.5


def failing(encoder: nn.Module) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    encoder.forward = forward


def peft_off(encoder: nn.Module) -> nn.Module:
    model = lora(encoder, "q_proj")
    model.base_model.disable_adapter_layers()
    return model


def norm_of(encoder: nn.Module) -> None:
    weight_norm(next(m for m in encoder.modules() if isinstance(m, nn.Linear)))


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, x):
        return x


def parametrized(encoder: nn.Module) -> None:
    layer = next(m for m in encoder.modules() if isinstance(m, nn.Linear))
    nn.utils.parametrize.register_parametrization(layer, "weight", Same())


encoder("training mode", lambda encoder: encoder.train() and None)
encoder("`torch.compile`", lambda encoder: torch.compile(encoder, backend=wrong))
encoder("`encoder.compile()`", lambda encoder: encoder.compile(backend=wrong))
encoder("`DataParallel`", nn.DataParallel)
encoder("wrapped by peft, adapter off", peft_off)
encoder("parametrized weights", parametrized)
encoder("`weight_norm`", norm_of, same=False)
encoder("an adapter attached", lambda encoder: lora(encoder, "q_proj") and None, same=False)
encoder("a replaced `forward`", replaced_forward, same=False)
encoder(
    "layerwise casting",
    lambda encoder: apply_layerwise_casting(encoder, torch.float8_e4m3fn, torch.float32),
    same=False,
)
encoder("quantized by PyTorch", dynamic, same=False)
encoder("weights of a quantizer's class", packed, same=False)
encoder("partly on disk (`device_map`)", on_disk)
encoder(
    "offloaded module by module",
    lambda encoder: cpu_offload(encoder, execution_device=torch.device("cpu")) and None,
)
encoder("offloaded in groups", grouped)
encoder("on the meta device", lambda encoder: encoder.to("meta") and None)
encoder("fails when called", failing)


@case("encoder: made in `torch.inference_mode`")
def _():
    pipe = sd1()
    pipe.text_encoder = in_inference_mode(lambda: sd1().text_encoder)
    return Case(pipe)


@pytest.mark.parametrize(
    "state", [s for s in CASES if s.startswith("encoder") and not CASES[s]().same]
)
def test_a_changed_encoder_is_read_as_the_pipeline_reads_it(state):
    pipe, other = CASES[state]().pipe, sd1()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    with torch.no_grad():
        tokens = other.tokenizer(
            "a cat",
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=text.max_tokens,
        )
        expected = pipe.text_encoder(tokens.input_ids)[0]
    assert torch.equal(text.encode(["a cat"]), expected)
    # The hash tells it from the plain one, and is the same each time.
    assert text.fingerprint() != TextModel(other.text_encoder, other.tokenizer).fingerprint()
    again = CASES[state]().pipe
    if "adapter" not in state:
        assert text.fingerprint() == TextModel(again.text_encoder, again.tokenizer).fingerprint()


def test_the_hash_of_an_encoder_follows_the_strength_of_an_adapter():
    pipe = sd1()
    lora(pipe.text_encoder, "q_proj")
    layers = [m for m in pipe.text_encoder.modules() if hasattr(m, "base_layer")]
    found = set()
    for scale in (1.0, 0.5):
        for layer in layers:
            layer.set_scale("default", scale)
        found.add(TextModel(pipe.text_encoder, pipe.tokenizer).fingerprint())
    assert len(found) == 2


@pytest.mark.parametrize("quantize", [dynamic, packed])
def test_the_hash_of_an_encoder_follows_its_packed_weights(quantize):
    def fingerprint(change: float) -> str:
        pipe = sd1()
        layer = next(m for m in pipe.text_encoder.modules() if isinstance(m, nn.Linear))
        with torch.no_grad():
            layer.weight[0, 0] += change
        found = quantize(pipe.text_encoder) or pipe.text_encoder
        return TextModel(found, pipe.tokenizer).fingerprint()

    assert fingerprint(0.0) == fingerprint(0.0) != fingerprint(1.0)


def test_a_message_names_the_encoder_that_it_is_about():
    pipe = sdxl()
    on_disk(pipe.text_encoder_2)
    with pytest.raises(ValueError, match=r"^text_encoder_2: .* are offloaded"):
        run(pipe)


# All of them


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("state", CASES)
def test_state(state, config):
    told = rows()[state]
    refused = re.search("refused: `(.+)`", told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = CASES[state]()
    if refused and (config == "alignment" or not told.startswith("closed form")):
        before = values(made.pipe.unet)
        with made.around(), pytest.raises(ValueError, match=re.escape(refused[1])) as raised:
            run(made.pipe, CONFIGS[config])
        assert re.match(r"(model|text_encoder)\b", str(raised.value))
        assert equal(values(made.pipe.unet), before) and not applied(made.pipe.unet)
        return
    model = made.pipe.unet
    before = values(model)
    with made.around():
        erasure = run(made.pipe, CONFIGS[config])
    after = values(model)
    assert erasure.map.rank and not equal(after, before)
    if warned := re.search("warning: `(.+)`", told):
        assert config != "alignment" or any(warned[1] in w for w in erasure.report["warnings"])
        config = "closed form"
    if made.same:
        fingerprint, expected = plain(config)
        assert erasure.fingerprint == fingerprint
        edited = [erasure.state_dict(model), {n: t for n, t in expected.items()}]
        assert edited[0] and all(torch.equal(t, edited[1][n]) for n, t in edited[0].items())
    with made.around():
        erasure.restore_(model)
        assert equal(values(model), before)
        erasure.apply_(model)
        assert equal(values(model), after)
        (again,) = applied(model)
        again.withdraw_(model)
    assert equal(values(model), before)


# One thread after the other, and side by side


def several(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@row("two threads erase from one model")
@pytest.mark.parametrize("wrap", [lambda unet: unet, nn.DataParallel])
def test_two_threads_erase_from_one_model(wrap):
    pipe = sd1()
    before = weights(pipe.unet)
    other = Parts(pipe, wrap(pipe.unet))
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        results = several(lambda: run(pipe, word="cat"), lambda: run(other, word="horse"))
    finally:
        sys.setswitchinterval(switch)
    order = applied(pipe.unet)
    assert {e.concepts[0].target for e in order} == {"cat", "horse"}
    assert all(any(e is r for r in results) for e in order)
    assert [len(e.provenance["history"]) for e in order] == [0, 1]
    for erasure in reversed(order):
        erasure.restore_(pipe.unet)
    assert equal(weights(pipe.unet), before)


def test_a_failing_thread_takes_back_its_own_edit_alone(monkeypatch):
    pipe = sd1()
    result = run(pipe, word="cat")
    edited = weights(pipe.unet)
    started, go_on = threading.Event(), threading.Event()

    def stuck(*_: Any, **__: Any) -> None:
        started.set()
        assert go_on.wait(60)
        raise RuntimeError("stop")

    def fail() -> None:
        monkeypatch.setattr(sys.modules["realera_fast.eraser"], "_report", stuck)
        with pytest.raises(RuntimeError, match="stop"):
            run(pipe, word="horse")

    def undo() -> None:
        assert started.wait(60)
        threading.Timer(0.2, go_on.set).start()
        result.restore_(pipe.unet)
        assert go_on.is_set(), "it did not wait"

    several(fail, undo)
    assert not equal(weights(pipe.unet), edited) and applied(pipe.unet) == ()
    assert equal(weights(pipe.unet), weights(sd1().unet))


@row("two threads, one verifies and one erases")
def test_verifying_and_erasing_at_once():
    pipe = sd1()
    first = run(pipe, word="cat")
    drawing, erased = threading.Event(), threading.Event()

    def judge(*_: Any) -> None:
        drawing.set()
        # The other one is waiting, or it would be done in this time.
        assert not erased.wait(0.5)

    def erasing() -> Erasure:
        assert drawing.wait(60)
        found = run(pipe, word="horse")
        erased.set()
        return found

    def verifying() -> None:
        options = {"seeds": (0,), "steps": 1, "height": 16, "width": 16, "progress": False}
        with pytest.MonkeyPatch.context() as patch:
            draw = verification.generate
            patch.setattr(verification, "generate", lambda *a, **k: [judge()] and draw(*a, **k))
            verify(pipe, first, ["a cat"], **options)

    _, second = several(verifying, erasing)
    assert [e.fingerprint for e in applied(pipe.unet)] == [first.fingerprint, second.fingerprint]


@row("two threads erase from two models with one text encoder")
def test_two_models_at_once_with_one_encoder():
    one, other = sd1(), sd1()
    other.text_encoder, other.tokenizer = one.text_encoder.train(), one.tokenizer
    barrier = threading.Barrier(2, timeout=60)
    encode = TextModel.first_rows

    def together(self, *arguments, **options):
        # Passed only where both erasures are inside at once.
        if not barrier.broken and barrier.n_waiting < 2 and threading.current_thread() not in met:
            met.add(threading.current_thread())
            barrier.wait()
        return encode(self, *arguments, **options)

    met: set[threading.Thread] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextModel, "first_rows", together)
        results = several(lambda: run(one), lambda: run(other))
    assert len(met) == 2
    assert {e.fingerprint for e in results} == {plain("closed form")[0]}
    assert all(module.training for module in one.text_encoder.modules())


@row("a thread draws while another aligns")
def test_drawing_while_another_thread_aligns():
    pipe = sd1()
    unet, stop = pipe.unet, threading.Event()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)

    @torch.no_grad()
    def draw() -> torch.Tensor:
        return unet(latents, 500, encoder_hidden_states=states).sample

    def drawing() -> list[torch.Tensor]:
        found = []
        while not stop.is_set():
            kinds = {type(p).__name__ for p in unet.attn_processors.values()}
            found += [draw()] if "TextAttnProcessor" in kinds else []
        return found

    def aligning() -> None:
        try:
            run(pipe, replace(ALIGNED, alignment=replace(ALIGNED.alignment, steps=20)))
        finally:
            stop.set()

    original = draw()
    pictures, _ = several(drawing, aligning)
    assert pictures
    assert all(torch.equal(p, original) for p in pictures[:-1])


def test_models_are_copied_and_pickled_as_always():
    pipe = sd1()
    run(pipe).restore_(pipe.unet)
    assert equal(weights(copy.deepcopy(pipe.unet)), weights(pipe.unet))
    assert not [name for name in vars(pipe.unet) if "lock" in name]


# What stands around a call stays as it was, and nothing depends on it


def test_random_numbers_of_the_caller_stay_as_they_are():
    pipe = sd1()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    run(pipe, ALIGNED)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and (np.random.get_state()[1] == before[2]).all()


class Watch(TorchFunctionMode):
    """Notes what a default device or dtype would decide of a tensor that is made here."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in _device_constructors():
            frame = sys._getframe(1)
            ours = Path(frame.f_code.co_filename).is_relative_to(Path(realera_fast.__file__).parent)
            drawn = kwargs.get("generator") is not None
            unsaid = [w for w in ("device", "dtype") if kwargs.get(w) is None]
            if not result.is_floating_point():
                unsaid = [w for w in unsaid if w == "device"]
            if unsaid and (ours or drawn):
                place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.found.add(f"{place} torch.{function.__name__} without {unsaid}")
        return result


@pytest.mark.parametrize("build", [sd1, sdxl])
def test_every_tensor_that_is_made_names_device_and_dtype(build, tmp_path):
    pipe = build()
    config = replace(
        ALIGNED,
        alignment=replace(
            ALIGNED.alignment,
            evaluation_steps=1,
            check_seeds=1,
            check_sampling_steps=2,
            target_modules=("to_k", "to_q"),
        ),
        closed_form=replace(ALIGNED.closed_form, keep_system=True),
        mining=replace(ALIGNED.mining, mode="gaussian"),
    )
    with Watch() as watch:
        erasure = erase(
            pipe,
            [Concept("cat", kind="explicit"), "dog=horse"],
            preserve=["ship"],
            config=config,
            checkpoint_dir=tmp_path / "run",
            progress=False,
            latents={"cat": torch.zeros(1, 4, 8, 8, device="cpu", dtype=torch.float32)},
        )
        erasure.without("cat")
        erasure.save(tmp_path / "delta.safetensors")
        erasure.save_lora(tmp_path, layout="kohya", model=pipe.unet)
        erasure.restore_(pipe.unet)
    assert not watch.found


SURROUNDINGS = [state for state in rows() if state in CASES and state.startswith("`torch.")]


@pytest.mark.parametrize("state", [s for s in SURROUNDINGS if "compile" not in s])
def test_files_and_parts_are_the_same_in_every_surrounding(state, tmp_path):
    kept = replace(CLOSED, closed_form=replace(CLOSED.closed_form, keep_system=True))
    made = CASES[state]()
    embeds = torch.randn(1, 3, made.pipe.unet.config.cross_attention_dim)

    def everything(pipe: Any, folder: Path) -> list[torch.Tensor]:
        erasure = run(pipe, kept)
        erasure.save(folder / "delta.safetensors")
        loaded = Erasure.load(folder / "delta.safetensors")
        loaded.restore_(pipe.unet)
        loaded.save_lora(folder, pipe.unet)
        rest = loaded.without("cat")
        both = loaded.then(loaded)
        edited = loaded.edited_weights(
            {n: layer.weight.detach() for n, layer in projections(pipe.unet).items()}
        )
        mapped = loaded.prompt_map()(embeds)
        own = [loaded.map.left, rest.map.left, both.map.left, both.map.right]
        assert not any(tensor.is_inference() for tensor in own)
        saved = load_file(folder / "pytorch_lora_weights.safetensors")
        return [*own, mapped, *edited.values(), *(saved[name] for name in sorted(saved))]

    for folder in ("inside", "outside"):
        (tmp_path / folder).mkdir()
    with made.around():
        inside = everything(made.pipe, tmp_path / "inside")
    outside = everything(sd1(), tmp_path / "outside")
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_the_map_of_prompts_compiles_and_heeds_no_autocast():
    erasure = run(sd1())
    mapped = erasure.prompt_map()
    embeds = torch.randn(1, 3, erasure.map.width)
    plainly = mapped(embeds)
    compiled = torch.compile(mapped, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mapped(embeds), plainly)
        assert torch.equal(compiled(embeds), plainly)
    assert mapped.to("meta")(embeds.to("meta")).shape == plainly.shape


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_an_erasure_is_verified_in_every_mode(around):
    pipe = sd1()
    before = weights(pipe.unet)
    with around():
        erasure = run(pipe)
        found = verify(
            pipe, erasure, ["a cat"], seeds=(0,), steps=2, height=16, width=16, progress=False
        )
        realera_fast.fuse(pipe)
        realera_fast.unfuse(pipe)
        erasure.restore_(pipe.unet)
    assert found.rows[0].text_change > 0 and equal(weights(pipe.unet), before)


def test_autocast_does_not_go_on_with_the_old_weights():
    pipe = sd1()
    unet = pipe.unet
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, unet.config.cross_attention_dim)

    @torch.no_grad()
    def draw() -> torch.Tensor:
        return unet(latents, 500, encoder_hidden_states=states).sample

    with torch.autocast("cpu", torch.bfloat16):
        before = draw()
        erasure = run(pipe)
        after = draw()
        erasure.restore_(unet)
        assert torch.equal(draw(), before)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("put", ["legacy", "backend"])
def test_the_precision_of_products_comes_back(put):
    backend = torch.backends.cuda.matmul
    former = backend.fp32_precision
    try:
        if put == "legacy":
            torch.set_float32_matmul_precision("medium")
        else:
            backend.fp32_precision = "tf32"
        with realera_fast.runtime.states.ordinary(), realera_fast.runtime.states.ordinary():
            assert backend.fp32_precision == "ieee"
            assert torch.get_float32_matmul_precision() == "highest"
        assert backend.fp32_precision == "tf32"
        if put == "legacy":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        backend.fp32_precision = former


# Failures leave nothing behind


@pytest.mark.parametrize("places", [(0,), (2,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("lost", [False, True])
def test_layers_that_can_not_be_put_back_do_not_keep_the_others(monkeypatch, places, lost):
    unet = sd1().unet
    before = weights(unet)
    layers = projections(unet)
    written, copying = [], torch.Tensor.copy_

    def failing(self, source, *rest):
        names = [n for n, layer in layers.items() if layer.weight is self]
        written.extend(names)
        if not lost or list(layers).index(names[0]) not in places:
            copying(self, source, *rest)
        # As PyTorch's version counter does: after the values are there.
        if list(layers).index(names[0]) in places:
            raise RuntimeError("version counter")
        return self

    with pytest.raises(ZeroDivisionError) as raised, transaction(unet):
        with torch.no_grad():
            for layer in layers.values():
                layer.weight += 1
        monkeypatch.setattr(torch.Tensor, "copy_", failing)
        raise ZeroDivisionError
    monkeypatch.undo()
    assert set(written) == set(layers)
    changed = {n for n, t in weights(unet).items() if not torch.equal(t, before[n])}
    failed = [list(layers)[place] for place in places]
    assert changed == ({f"{name}.weight" for name in failed} if lost else set())
    assert all(any(name in note for note in raised.value.__notes__) for name in failed)


# Who follows an error's advice, comes through


def unload(pipe):
    pipe.unload_lora_weights()


def fuse_and_unload(pipe):
    pipe.fuse_lora()
    pipe.unload_lora_weights()


@pytest.mark.parametrize("follow", [unload, fuse_and_unload])
def test_the_advice_before_an_erasure(follow):
    pipe = sd1()
    adapter(pipe)
    with pytest.raises(ValueError, match=r"pipe\.unload_lora_weights\(\).*pipe\.fuse_lora\(\)"):
        run(pipe)
    follow(pipe)
    erasure = run(pipe)
    # What comes afterwards keeps its own adapter.
    adapter(pipe, "later")
    with pytest.raises(ValueError, match="unload it first") as raised:
        erasure.restore_(pipe.unet)
    assert "fuse_lora" not in str(raised.value)
    pipe.unload_lora_weights()
    erasure.restore_(pipe.unet)


@pytest.mark.parametrize("verb", ["restore_", "withdraw_", "apply_", "save_weights"])
def test_the_advice_with_an_adapter_loaded_since(verb, tmp_path):
    pipe = sd1()
    before = weights(pipe.unet)
    erasure = run(pipe)
    if verb == "apply_":
        erasure.restore_(pipe.unet)
    adapter(pipe)

    def call() -> None:
        options = {"path": tmp_path / "a.safetensors"} if verb == "save_weights" else {}
        getattr(erasure, verb)(model=pipe.unet, **options)

    with pytest.raises(ValueError, match=r"unload it first \(pipe.unload_lora_weights\(\)\)"):
        call()
    pipe.unload_lora_weights()
    call()
    if verb in ("restore_", "withdraw_"):
        assert equal(weights(pipe.unet), before)


def test_the_advice_after_fusing():
    pipe = sd1()
    before = weights(pipe.unet)
    erasure = run(pipe)
    adapter(pipe)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"pipe.unfuse_lora\(\), then pipe.unload_lora_weights"):
        erasure.restore_(pipe.unet)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    try:
        erasure.restore_(pipe.unet)
    except ValueError as error:
        assert "restore_(model, force=True)" in str(error)
        erasure.restore_(pipe.unet, force=True)
    assert equal(weights(pipe.unet), before) and applied(pipe.unet) == ()


def test_forcing_an_undo_keeps_the_order():
    pipe = sd1()
    before = weights(pipe.unet)
    first, second = run(pipe, word="cat"), run(pipe, word="horse")
    with torch.no_grad():
        layer_of(pipe.unet).weight += 1
    with pytest.raises(ValueError, match="restore that one first"):
        first.restore_(pipe.unet, force=True)
    second.restore_(pipe.unet, force=True)
    first.restore_(pipe.unet)
    assert equal(weights(pipe.unet), before)


def test_the_advice_for_a_model_wrapped_by_peft():
    pipe = sd1()
    erasure = run(pipe)
    pipe.unet = lora(pipe.unet, "to_k")
    with pytest.raises(ValueError, match=r"pipe\.unet = pipe\.unet\.unload\(\)"):
        erasure.restore_(pipe.unet)
    pipe.unet = pipe.unet.unload()
    erasure.restore_(pipe.unet)


def test_the_advice_for_a_model_without_a_loader_of_adapters():
    from peft import inject_adapter_in_model

    pipe = pixart_alpha()
    erasure = run(pipe)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear_1"]), pipe.transformer)
    with pytest.raises(ValueError, match="diffusers.utils.peft_utils.recurse_remove_peft_layers"):
        erasure.restore_(pipe.transformer)
    diffusers.utils.peft_utils.recurse_remove_peft_layers(pipe.transformer)
    erasure.restore_(pipe.transformer)


def test_the_advice_for_a_model_of_inference_mode():
    pipe = in_inference_mode(sd1)
    with pytest.raises(ValueError, match=r"pipe\.unet = copy\.deepcopy\(pipe\.unet\)"):
        run(pipe, ALIGNED)
    pipe.unet = copy.deepcopy(pipe.unet)
    assert run(pipe, ALIGNED).fingerprint == plain("alignment")[0]


@pytest.mark.parametrize("change", [tied, shared])
def test_the_advice_for_weights_that_share_memory(change):
    pipe = sd1()
    change(pipe.unet)
    with pytest.raises(ValueError, match=r"put copy\.deepcopy\(layer\) in one of the two places"):
        run(pipe)
    pipe.unet.get_submodule(FIRST).to_v = copy.deepcopy(layer_of(pipe.unet, "to_v"))
    run(pipe).restore_(pipe.unet)


def test_the_advice_for_an_expanded_weight():
    pipe = sd1()
    expanded(pipe.unet)
    with pytest.raises(ValueError, match=r"weight\.data = weight\.data\.clone\(\)"):
        run(pipe)
    layer_of(pipe.unet).weight.data = layer_of(pipe.unet).weight.data.clone()
    run(pipe).restore_(pipe.unet)


# Noise schedules


BETAS = {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": "scaled_linear"}
SCHEDULERS = [
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler"),
    *("CogVideoXDDIMScheduler", "DDIMParallelScheduler", "KDPM2AncestralDiscreteScheduler"),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        BETAS,
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        {"prediction_type": "sample", "num_train_timesteps": 400},
        {"trained_betas": [0.01 * (i + 1) / 100 for i in range(100)], "num_train_timesteps": 100},
        {"beta_schedule": "sigmoid"},
        {"use_karras_sigmas": True, **BETAS},
        {"clip_sample": True, "thresholding": True, "set_alpha_to_one": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_is_that_of_the_scheduler(name, options):
    kind = getattr(diffusers, name)
    known = kind._get_init_keys(kind)
    try:
        scheduler = kind(**{k: v for k, v in options.items() if k in known})
    except NotImplementedError:
        return  # a schedule that this class does not have
    own = ddim_of(scheduler, 5)
    assert torch.equal(own.alphas_cumprod, scheduler.alphas_cumprod.float())
    assert own.config.prediction_type == scheduler.config.prediction_type
    assert len(own.alphas_cumprod) == own.config.num_train_timesteps
    assert not own.config.clip_sample and not own.config.thresholding
    trailing = scheduler.config.get("timestep_spacing") == "trailing"
    assert (own.config.timestep_spacing == "trailing") == trailing
    # Every step goes to where the next one begins.
    count, steps = len(own.alphas_cumprod), own.timesteps.tolist()
    assert {a - b for a, b in zip(steps, steps[1:], strict=False)} == {count // 5}
    if not scheduler.config.get("set_alpha_to_one", True):
        assert own.final_alpha_cumprod == own.alphas_cumprod[0]


def zero_terminal() -> list[str]:
    """Every class of diffusers that can begin with nothing of the picture."""
    kinds = {name: getattr(diffusers, name) for name in dir(diffusers) if "Scheduler" in name}
    return [
        name
        for name, kind in kinds.items()
        if isinstance(kind, type)
        and issubclass(kind, diffusers.SchedulerMixin)
        and "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters
    ]


def test_classes_with_zero_terminal_snr_are_found():
    assert {"DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"} < set(
        zero_terminal()
    )


@pytest.mark.parametrize(
    "schedule", [{"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}], ids=str
)
@pytest.mark.parametrize("name", zero_terminal())
def test_noise_is_not_predicted_where_nothing_of_the_picture_is_left(name, schedule):
    def made(**options: Any) -> Any:
        return getattr(diffusers, name)(**schedule, **options)

    try:
        scheduler = made(prediction_type="epsilon", timestep_spacing="trailing")
    except NotImplementedError:
        return  # a schedule that this class does not have
    for steps in (1, 5, 50):
        with pytest.raises(ValueError, match=f"^scheduler: {name} begins with nothing") as error:
            ddim_of(scheduler, steps)
    # What the message says to pass is taken.
    assert "'v_prediction'" in str(error.value) and "'leading'" in str(error.value)
    own = ddim_of(made(prediction_type="v_prediction", timestep_spacing="trailing"), 5)
    assert own.timesteps[0] == 999
    for spacing in ("leading", "linspace"):
        own = ddim_of(made(prediction_type="epsilon", timestep_spacing=spacing), 5)
        assert own.timesteps[0] < 999


def test_leading_steps_are_aligned_where_trailing_ones_begin_with_nothing():
    pipe = sd1()
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**options)
    with pytest.raises(ValueError, match="begins with nothing of the picture"):
        run(pipe, ALIGNED)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="leading"
    )
    assert run(pipe, ALIGNED).lora


def odd(alphas: Any) -> Any:
    """A scheduler of somebody's own."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.alphas_cumprod = alphas
    return scheduler


def test_betas_that_a_scheduler_does_not_keep_are_found_again():
    scheduler = diffusers.DDIMScheduler(**BETAS)
    expected = scheduler.betas
    del scheduler.betas
    own = ddim_of(scheduler, 5)
    assert torch.equal(own.alphas_cumprod, scheduler.alphas_cumprod)
    torch.testing.assert_close(own.betas, expected)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "has no noise schedule of betas"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), "has no noise schedule of betas"),
        (diffusers.EDMEulerScheduler(), "has no noise schedule of betas"),
        (diffusers.EDMDPMSolverMultistepScheduler(), "has no noise schedule of betas"),
        (diffusers.KarrasVeScheduler(), "has no noise schedule of betas"),
        (diffusers.DDPMWuerstchenScheduler(), "has no noise schedule of betas"),
        (diffusers.IPNDMScheduler(), "has no noise schedule of betas"),
        (diffusers.ScoreSdeVeScheduler(), "has no noise schedule of betas"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "has no noise schedule of betas"),
        (
            diffusers.EulerDiscreteScheduler(
                timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
            ),
            "has no noise schedule of betas",
        ),
        (diffusers.RePaintScheduler(), "prediction_type=None, expected one of"),
        (
            diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "prediction_type='flow_prediction', expected one of",
        ),
        (
            diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "begins with nothing of the picture",
        ),
        (odd(alphas=torch.linspace(0.0, 1.0, 1000)), "has no noise schedule of betas"),
        (odd(alphas=None), "has no noise schedule of betas"),
        (diffusers.DDIMScheduler(num_train_timesteps=3), "are too many for the 3 time steps"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else "",
)
def test_a_scheduler_that_noises_otherwise_is_refused(scheduler, message, monkeypatch):
    pipe = sd1()
    before = weights(pipe.unet)
    pipe.scheduler = scheduler

    def worked(*_: Any, **__: Any) -> None:
        pytest.fail("work was done")

    config = replace(ALIGNED, alignment=replace(ALIGNED.alignment, sampling_steps=4))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["realera_fast.eraser"], "encode_vocabulary", worked)
        with pytest.raises(ValueError, match=f"^(scheduler|AlignmentConfig): .*{message}") as error:
            run(pipe, config)
    assert equal(weights(pipe.unet), before)
    assert "alignment.enabled=False" in str(error.value)
    # As told; a category is then found by its text, where none can be drawn.
    erasure = erase(pipe, [Concept("cat", kind="explicit")], config=CLOSED, progress=False)
    assert "members of a category" in " ".join(erasure.report["warnings"])


@pytest.mark.parametrize(
    "wrong",
    [
        diffusers.DDIMScheduler,
        dict(diffusers.DDIMScheduler().config),
        diffusers.DDIMScheduler().config,
        "DDIMScheduler",
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_no_scheduler_is_refused(wrong, config):
    pipe = sd1()
    with pytest.raises(TypeError, match="^scheduler: expected a diffusers scheduler such as"):
        erase(
            pipe.unet,
            pipe.text_encoder,
            ["cat"],
            tokenizer=pipe.tokenizer,
            scheduler=wrong,
            config=CONFIGS[config],
            progress=False,
        )


def test_an_assumed_schedule_is_said_in_the_report(tmp_path):
    pipe = sd1()
    parts = components_of(pipe)
    erasure = erase(
        parts.model,
        parts.text_encoders,
        ["cat"],
        tokenizer=parts.tokenizers,
        config=ALIGNED,
        progress=False,
    )
    said = [w for w in erasure.report["warnings"] if "was assumed" in w]
    assert said and "pass scheduler=pipe.scheduler" in said[0]
    assert not any("was assumed" in w for w in run(sd1(), ALIGNED).report["warnings"])


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_schedulers_of_few_steps_are_said_in_the_report(name):
    pipe = sd1()
    pipe.scheduler = getattr(diffusers, name)()
    assert any(name in w for w in run(pipe, ALIGNED).report["warnings"])
    pipe = sd1()
    pipe.scheduler = getattr(diffusers, name)()
    few = replace(ALIGNED, alignment=replace(ALIGNED.alignment, guidance_scale=1.0))
    assert not any(name in w for w in run(pipe, few).report["warnings"])


def test_a_scheduler_beside_the_model_is_of_its_own_class(tmp_path):
    from realera_fast.alignment import find_scheduler

    pipe = sd1()
    pipe.scheduler = diffusers.LCMScheduler(beta_end=0.015)
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    # Files of hubs leave defaults out: those of the class that they name.
    file.write_text('{"_class_name": "LCMScheduler", "beta_end": 0.015}')
    unet = type(pipe.unet).from_pretrained(tmp_path / "unet")
    found = find_scheduler(unet)
    assert type(found) is diffusers.LCMScheduler
    assert torch.equal(found.alphas_cumprod, pipe.scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"_class_name": "OwnScheduler"}', r"'OwnScheduler', .* \(it is no scheduler of"),
        ('{"_class_name": "utils"}', r"'utils', .* \(it is no scheduler of diffusers"),
        ('{"_class_name": "StableDiffusionPipeline"}', "is no scheduler of diffusers"),
        ('{"_class_name": "SchedulerMixin"}', "'SchedulerMixin', .* can't be made"),
        ('{"_class_name": "LMSDiscreteScheduler"}', "needs a package which is not installed"),
        ('{"_class_name": "DDIMScheduler", "beta_schedule": "own"}', "own is not implemented"),
        ('{"beta_schedule": "linear"}', "'None', .* is no scheduler of diffusers"),
        ('["DDIMScheduler"]', "is no scheduler of diffusers"),
    ],
)
def test_a_scheduler_beside_the_model_that_cannot_be_made(
    text, told, tmp_path, monkeypatch, caplog
):
    from diffusers.utils import dummy_torch_and_scipy_objects as without_scipy

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", without_scipy.LMSDiscreteScheduler)
    pipe = sd1()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    pipe.unet = type(pipe.unet).from_pretrained(tmp_path / "unet")
    before = weights(pipe.unet)

    def erased(config: EraseConfig, scheduler: Any = None) -> Erasure:
        return erase(
            pipe.unet,
            pipe.text_encoder,
            [Concept("cat", kind="explicit")],
            tokenizer=pipe.tokenizer,
            scheduler=scheduler,
            config=config,
            progress=False,
        )

    with pytest.raises(ValueError, match=f"^scheduler: .*{told}") as error:
        erased(ALIGNED)
    assert equal(weights(pipe.unet), before)
    for advice in ("pass scheduler=pipe.scheduler", "alignment.enabled=False"):
        assert advice in str(error.value)
    # As told.
    erasure = erased(CLOSED)
    assert re.search(told, caplog.text)
    assert "members of a category" in " ".join(erasure.report["warnings"])
    erasure.restore_(pipe.unet)
    assert erased(ALIGNED, pipe.scheduler).lora


def test_page_of_schedulers_says_what_the_messages_say():
    page = PAGE.read_text(encoding="utf-8").split("## The noise scheduler")[1]
    source = (PAGE.parents[1] / "realera_fast" / "unet" / "sampler.py").read_text(encoding="utf-8")
    spoken = re.sub(r'"\s+f?"', "", source)
    for sentence in re.findall("refused: `(.+?)`", page):
        assert sentence in spoken, sentence
    assert EraseConfig().alignment.enabled
