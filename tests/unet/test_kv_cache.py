"""A fused pipeline draws the same pictures and projects its text once per prompt."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch
from tiny_models import aligned, tiny_pipeline, tiny_unet

import realera_fast
from realera_fast import EraseConfig, embedded, fuse, unfuse
from realera_fast.unet import attention


def picture(pipe, prompt="a photo of a cat", steps=4, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return pipe(
        prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=generator,
        output_type="np",
        **options,
    ).images


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def calls(monkeypatch):
    """Rows of text that went through key and value projections."""
    found = []
    linear = torch.nn.Linear.forward

    def counted(self, x):
        if self.in_features == 32 and x.dim() == 3 and x.shape[1] == 77:
            found.append(x.shape[0])
        return linear(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    return found


def projections_of_text(pipe, calls) -> int:
    calls.clear()
    picture(pipe)
    return len(calls)


def test_pictures_are_the_same_to_the_bit_and_text_is_projected_once(pipe, calls):
    wanted = picture(pipe)
    plain = projections_of_text(pipe, calls)
    assert fuse(pipe) is pipe
    assert np.array_equal(picture(pipe), wanted)
    # Eight projections in each of four steps, against once.
    assert plain - projections_of_text(pipe, calls) == 8 * 3
    assert fuse(fuse(pipe)) is pipe and unfuse(pipe) is pipe
    assert projections_of_text(pipe, calls) == plain
    assert np.array_equal(picture(unfuse(pipe)), wanted)


def test_the_embedded_model_too():
    pipe = embedded.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    wanted = picture(pipe, "a photo of a rabbit", steps=3)
    assert np.array_equal(picture(fuse(pipe), "a photo of a rabbit", steps=3), wanted)


@pytest.mark.parametrize("which", ["pipe", "unet", "compiled"])
def test_takes_a_pipeline_or_its_unet(pipe, which):
    models = {"pipe": pipe, "unet": pipe.unet, "compiled": torch.compile(pipe.unet)}
    former = dict(pipe.unet.attn_processors)
    fuse(models[which])
    kinds = {type(p) for p in pipe.unet.attn_processors.values()}
    assert attention.TextAttnProcessor in kinds
    unfuse(models[which])
    assert pipe.unet.attn_processors == former


def test_bad_arguments_are_named(pipe):
    for verb in (fuse, unfuse):
        with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline"):
            verb(3)
    with pytest.raises(ValueError, match="no cross-attention"):
        fuse(torch.nn.Linear(2, 2))


def test_erasing_shows_at_once(pipe):
    config = EraseConfig.from_dict(
        {
            "vocabulary": {"cache": False},
            "alignment": {
                "steps": 1,
                "batch_size": 1,
                "trajectories": 1,
                "sampling_steps": 2,
                "check_seeds": 1,
            },
        }
    )
    plain = picture(pipe)
    fuse(pipe)
    assert np.array_equal(picture(pipe), plain)
    result = realera_fast.erase(
        pipe.unet,
        pipe.text_encoder,
        ["cat=dog"],
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
        config=config,
        progress=False,
    )
    erased = picture(pipe)
    assert not np.array_equal(erased, plain)
    assert np.array_equal(picture(unfuse(pipe)), erased)
    fuse(pipe)
    result.restore_(pipe.unet)
    assert np.array_equal(picture(pipe), plain)


def cache_of(unet) -> realera_fast.unet.kv_cache.TextKVCache:
    return next(iter(attention.layers(unet).values())).processor.projector


def call(unet, states):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8, generator=generator), 5, states).sample


def test_nothing_stale_is_ever_used():
    unet, plain = fuse(tiny_unet()), tiny_unet()
    states = torch.randn(1, 7, 32)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"

    def check():
        assert torch.equal(call(unet, states), call(plain, states))

    check()
    states.mul_(2)
    check()
    for model in (unet, plain):
        with torch.no_grad():
            model.get_submodule(layer).weight.mul_(2)
    check()
    for model in (unet, plain):
        model.get_submodule(layer).weight.data = 3 * model.get_submodule(layer).weight.data
    check()
    for model in (unet, plain):
        attn = model.get_submodule(layer.removesuffix(".to_v"))
        attn.to_v = torch.nn.Linear(32, attn.to_v.out_features, bias=True)
        torch.nn.init.constant_(attn.to_v.weight, 0.01)
        torch.nn.init.constant_(attn.to_v.bias, 0.5)
    check()
    unet.double(), plain.double()
    states = states.double()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator).double()
    with torch.no_grad():
        assert torch.equal(unet(latents, 5, states).sample, plain(latents, 5, states).sample)


def test_prompts_are_forgotten_with_their_tensors_and_few_are_kept():
    unet = fuse(tiny_unet())
    cache = cache_of(unet)
    states = torch.randn(1, 7, 32)
    call(unet, states)
    assert len(cache._prompts) == 1
    del states
    gc.collect()
    assert not cache._prompts
    many = [torch.randn(1, 7, 32) for _ in range(9)]
    for states in many:
        call(unet, states)
    assert len(cache._prompts) == 4


def test_a_new_tensor_in_old_memory_is_another_prompt():
    unet, plain = fuse(tiny_unet()), tiny_unet()
    for _ in range(5):
        states = torch.randn(1, 7, 32)
        assert torch.equal(call(unet, states), call(plain, states))
        del states


@pytest.mark.parametrize("mode", ["grad", "inference", "autocast", "compile", "adapter", "hook"])
def test_where_it_can_not_tell_it_computes_as_always(mode):
    unet, plain = fuse(tiny_unet()), tiny_unet()
    cache = cache_of(unet)
    states = torch.randn(1, 7, 32)
    latents = torch.randn(1, 4, 8, 8)

    def both():
        return [model(latents, 5, states).sample for model in (unet, plain)]

    if mode == "grad":
        for sample in both():
            sample.square().mean().backward()
        layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        grads = [model.get_submodule(layer).weight.grad for model in (unet, plain)]
        assert torch.equal(*grads) and grads[0].any()
    elif mode == "inference":
        with torch.inference_mode():
            states = torch.randn(1, 7, 32)
            assert torch.equal(*both())
    elif mode == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(*both())
    elif mode == "compile":
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(latents, 5, states).sample, plain(latents, 5, states).sample
            )
    elif mode == "adapter":
        from peft import LoraConfig

        for model in (unet, plain):
            torch.manual_seed(0)
            model.add_adapter(
                LoraConfig(r=2, target_modules=["attn2.to_k"], init_lora_weights=False)
            )
        with torch.no_grad():
            assert torch.equal(*both())
            for model in (unet, plain):
                model.disable_adapters()
            assert torch.equal(*both())
    else:
        for model in (unet, plain):
            for attn in attention.layers(model).values():
                attn.to_k.register_forward_hook(lambda *a: 2 * a[2])
        with torch.no_grad():
            assert torch.equal(*both())
    assert not any(prompt.layers for prompt in cache._prompts)


def test_a_fused_model_can_be_saved_copied_and_pickled(pipe, tmp_path):
    wanted = picture(pipe)
    keys = list(pipe.unet.state_dict())
    fuse(pipe)
    picture(pipe)
    assert list(pipe.unet.state_dict()) == keys
    pipe.save_pretrained(tmp_path)
    loaded = aligned(type(pipe).from_pretrained(tmp_path, safety_checker=None))
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(picture(loaded), wanted)
    for other in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        assert cache_of(other) is not cache_of(pipe.unet)
        former, pipe.unet = pipe.unet, other
        assert np.array_equal(picture(pipe), wanted)
        assert np.array_equal(picture(unfuse(pipe)), wanted)
        pipe.unet = former


def test_threads_do_not_disturb_each_other():
    unet, plain = fuse(tiny_unet()), tiny_unet()
    prompts = [torch.randn(1, 7, 32) for _ in range(6)]
    wanted = [call(plain, states) for states in prompts]
    wrong = []

    def work(number):
        for turn in range(10):
            at = (number + turn) % len(prompts)
            if not torch.equal(call(unet, prompts[at]), wanted[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("replaced", ["data", "parameter"])
def test_a_new_weight_at_an_old_address_is_another_weight(replaced):
    unet, plain = fuse(tiny_unet()), tiny_unet()
    states = torch.randn(1, 7, 32)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    for number in range(50):
        call(unet, states)
        for model in (unet, plain):
            module = model.get_submodule(layer)
            # The old memory is freed first: the new weight often gets its address.
            if replaced == "data":
                module.weight.data = torch.empty(0)
                module.weight.data = torch.full((module.out_features, 32), 0.01 * number)
            else:
                module.weight = None
                values = torch.full((module.out_features, 32), 0.01 * number)
                module.weight = torch.nn.Parameter(values)
        assert torch.equal(call(unet, states), call(plain, states)), number


def test_a_traced_model_holds_its_projections():
    unet, plain = fuse(tiny_unet()), tiny_unet()
    first, second = torch.randn(2, 1, 7, 32)
    latents, step = torch.randn(1, 4, 8, 8), torch.tensor([5])

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, *inputs):
            return self.unet(*inputs, return_dict=False)[0]

    with torch.no_grad():
        # Remembered before it is traced.
        unet(latents, step, first)
        traced = torch.jit.trace(Plain(), (latents, step, first), check_trace=False)
        torch.testing.assert_close(
            traced(latents, step, second), plain(latents, step, second).sample
        )


def test_a_forward_of_its_own_is_never_remembered():
    unet, plain = fuse(tiny_unet()), tiny_unet()
    states = torch.randn(1, 7, 32)
    strength = [1.0]
    for model in (unet, plain):
        for attn in attention.layers(model).values():
            plainly = attn.to_k.forward
            attn.to_k.forward = lambda x, plainly=plainly: strength[0] * plainly(x)
    for value in (1.0, 3.0):
        strength[0] = value
        assert torch.equal(call(unet, states), call(plain, states))


class Others:
    """Somebody's processor."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states


def test_processors_set_since_are_left_alone_and_fusing_again_fuses_again():
    unet = fuse(tiny_unet())
    name, attn = next(iter(attention.layers(unet).items()))
    attn.set_processor(Others())
    unfuse(unet)
    assert isinstance(unet.get_submodule(name).processor, Others)
    assert not hasattr(unet, "_realera_fast_processors")
    unet = fuse(tiny_unet())
    former = type(next(iter(tiny_unet().attn_processors.values())))
    unet.set_attn_processor(former())
    fuse(unet)
    kinds = {type(a.processor) for a in attention.layers(unet).values()}
    assert kinds == {attention.TextAttnProcessor}


def test_a_class_of_the_same_name_or_another_scale_is_refused():
    unet = tiny_unet()
    unet.set_attn_processor(type("AttnProcessor", (Others,), {})())
    with pytest.raises(ValueError, match="AttnProcessor, which can't be stood in for"):
        fuse(unet)
    unet = tiny_unet()
    next(iter(attention.layers(unet).values())).scale = 1.0
    with pytest.raises(ValueError, match=r"scales its scores by 1\.0"):
        fuse(unet)
