"""Erasures on top of one another: stacked, withdrawn, joined, and remembered."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
)
from edits import CLOSED
from model_state import equal, weights
from tiny_families import denoise, sd1, sdxl
from tiny_models import tiny_pipeline

from realera_fast import Erasure, erase
from realera_fast.alignment import AlignmentConfig
from realera_fast.cli import program as cli
from realera_fast.erasure import (
    BaseModelMismatchError,
    ErasureFileError,
    applied,
    read_description,
    report,
)
from realera_fast.evaluation import verify
from realera_fast.models import LoraFactors


def erased(pipe, *concepts):
    return [erase(pipe, [concept], config=CLOSED, progress=False) for concept in concepts]


def near(got, expected, base) -> bool:
    """Equal but for the rounding of the weights' dtype, seen against the whole change."""
    change = sum(float((expected[n] - base[n]).norm() ** 2) for n in base) ** 0.5
    apart = sum(float((expected[n] - got[n]).norm() ** 2) for n in base) ** 0.5
    return change > 0 and apart < 1e-5 * change


@pytest.mark.parametrize("build", [sd1, sdxl])
def test_what_was_erased_first_can_be_withdrawn(build):
    pipe, alone = build(), build()
    base = weights(pipe.unet)
    first, second = erased(pipe, "cat=dog", "ship=tree")
    (again,) = first.withdraw_(pipe.unet)
    erased(alone, "ship=tree")
    assert near(weights(pipe.unet), weights(alone.unet), base)
    assert equal(weights(pipe.unet), weights(alone.unet)), "the same factors on the same weights"
    assert torch.equal(denoise(pipe), denoise(alone))
    assert [entry["action"] for entry in again.provenance["history"]] == ["withdrawn"]
    assert again.provenance["history"][0]["concepts"] == ["cat"]
    again.restore_(pipe.unet)
    assert equal(weights(pipe.unet), base)
    with pytest.raises(ValueError, match="not applied to this model"):
        second.restore_(pipe.unet)


def test_what_erasures_moved_together_is_warned_of(monkeypatch):
    pipe = sd1()
    monkeypatch.setattr(report, "DRIFTED", 0.0)
    first, second = erased(pipe, "cat=dog", "ship=tree")

    def stacked(erasure):
        return [w for w in erasure.report["warnings"] if "on top of each other" in w]

    assert not stacked(first)
    (warning,) = stacked(second)
    assert "since the first of 2 " in warning and "pass those before as extends=" in warning
    assert "'cat'" not in warning, "what went before was to go"
    monkeypatch.setattr(report, "DRIFTED", 1e9)
    assert not stacked(*erased(pipe, "van=art"))


def test_one_of_three_is_withdrawn_and_the_others_stay():
    pipe, alone = sd1(), sd1()
    base = weights(pipe.unet)
    _, middle, _ = erased(pipe, "cat=dog", "ship=tree", "van=art")
    remaining = middle.withdraw_(pipe.unet)
    erased(alone, "cat=dog", "van=art")
    assert equal(weights(pipe.unet), weights(alone.unet))
    assert [e.concepts[0].target for e in applied(pipe.unet)] == ["cat", "van"]
    assert [entry["concepts"] for entry in remaining[0].provenance["history"]] == [
        ["cat"],
        ["ship"],
    ]
    for erasure in reversed(applied(pipe.unet)):
        erasure.restore_(pipe.unet)
    assert equal(weights(pipe.unet), base)


def test_the_last_one_is_withdrawn_like_it_is_restored():
    pipe = sd1()
    first, last = erased(pipe, "cat=dog", "ship=tree")
    assert last.withdraw_(pipe.unet) == ()
    assert [e.fingerprint for e in applied(pipe.unet)] == [first.fingerprint]


def test_history_tells_what_was_erased_before():
    pipe = sd1()
    first, second = erased(pipe, "cat=dog", "ship=tree")
    assert first.provenance["history"] == []
    (entry,) = second.provenance["history"]
    assert entry["action"] == "erased" and entry["concepts"] == ["cat"]
    assert entry["fingerprint"] == first.fingerprint and entry["seed"] == CLOSED.seed
    second.restore_(pipe.unet)
    first.restore_(pipe.unet)
    assert erased(pipe, "van=art")[0].provenance["history"] == []


def test_a_failed_withdrawal_leaves_everything_as_it_was(monkeypatch):
    pipe = sd1()
    first, second = erased(pipe, "cat=dog", "ship=tree")
    before = weights(pipe.unet)

    def broken(self, model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Erasure, "rebase", broken)
        with pytest.raises(KeyboardInterrupt):
            first.withdraw_(pipe.unet)
    assert equal(weights(pipe.unet), before)
    assert [e.fingerprint for e in applied(pipe.unet)] == [first.fingerprint, second.fingerprint]
    second.restore_(pipe.unet)
    first.restore_(pipe.unet)
    assert equal(weights(pipe.unet), weights(sd1().unet))


def test_withdrawing_what_is_not_there_is_refused():
    pipe = sd1()
    (first,) = erased(pipe, "cat=dog")
    with pytest.raises(ValueError, match="is not applied to it, or its weights changed"):
        first.withdraw_(sd1().unet)
    with torch.no_grad():
        next(iter(pipe.unet.mid_block.attentions[0].transformer_blocks)).attn2.to_k.weight.add_(1)
    with pytest.raises(ValueError, match="its weights changed since"):
        first.withdraw_(pipe.unet)


def test_in_another_process_the_rest_is_put_on_the_base_model(tmp_path):
    pipe, other, alone = sd1(), sd1(), sd1()
    _, second = erased(pipe, "cat=dog", "ship=tree")
    loaded = Erasure.load(second.save(tmp_path / "second.safetensors"))
    with pytest.raises(BaseModelMismatchError):
        loaded.apply_(other.unet)
    loaded.rebase(other.unet).apply_(other.unet)
    erased(alone, "ship=tree")
    assert equal(weights(other.unet), weights(alone.unet))


@pytest.mark.parametrize(
    "history", [{}, ["erased"], [{"action": "erased", "concepts": [1], "fingerprint": ""}], [{}]]
)
def test_a_hostile_history_is_refused(tmp_path, monkeypatch, history):
    (erasure,) = erased(sd1(), "cat=dog")
    odd = dataclasses.replace(erasure, provenance={**erasure.provenance, "history": history})
    monkeypatch.setattr("realera_fast.erasure.erasure.write_card", lambda *_, **__: None)
    file = odd.save(tmp_path / "odd.safetensors")
    for read in (Erasure.load, read_description):
        with pytest.raises(ErasureFileError, match="a history that is none"):
            read(file)


@pytest.mark.parametrize("build", [sd1, sdxl])
def test_two_erasures_are_one(tmp_path, build):
    pipe, other = build(), build()
    base = weights(pipe.unet)
    first, second = erased(pipe, "cat=dog", "ship=tree")
    joined = Erasure.load(first.then(second).save(tmp_path / "both.safetensors"))
    joined.apply_(other.unet)
    assert near(weights(other.unet), weights(pipe.unet), base)
    assert [c.target for c in joined.concepts] == ["cat", "ship"]
    assert [e["concepts"] for e in joined.provenance["history"]] == [["cat"], ["ship"]]
    joined.restore_(other.unet)
    assert equal(weights(other.unet), base)


def test_two_erasures_with_adapters_are_one():
    pipe = tiny_pipeline()
    names = [n for n, m in pipe.unet.named_modules() if n.endswith("attn2.to_v")]
    generator = torch.Generator().manual_seed(0)
    base = weights(pipe.unet)

    def with_adapters(erasure, chosen):
        lora = {}
        for name in chosen:
            rows = pipe.unet.get_submodule(name).out_features
            lora[name] = LoraFactors(
                torch.randn(2, 32, generator=generator), torch.randn(rows, 2, generator=generator)
            )
        return dataclasses.replace(erasure, lora=lora)

    (first,) = erased(pipe, "cat=dog")
    first.restore_(pipe.unet)
    first = with_adapters(first, names[:2])
    first.apply_(pipe.unet)
    (second,) = erased(pipe, "ship=tree")
    second.restore_(pipe.unet)
    second = with_adapters(second, names[1:3])
    second.apply_(pipe.unet)
    both = weights(pipe.unet)
    other = tiny_pipeline()
    joined = first.then(second)
    assert {len(f.down) for f in joined.lora.values()} == {2, 4}
    joined.apply_(other.unet)
    assert near(weights(other.unet), both, base)


def test_erasures_of_different_models_are_not_joined():
    first, second = erased(sd1(), "cat=dog")[0], erased(sd1(seed=4), "ship=tree")[0]
    with pytest.raises(ValueError, match="made on another model"):
        first.then(second)
    # Two of the same base model are: their maps compose.
    third = erased(sd1(), "ship=tree")[0]
    assert first.then(third).map.rank


def test_info_prints_the_history(tmp_path, capsys):
    pipe = sd1()
    _, middle, _ = erased(pipe, "cat=dog", "ship=tree", "van=art")
    (last,) = middle.withdraw_(pipe.unet)
    file = last.save(tmp_path / "last.safetensors")
    assert cli.run(["info", str(file)]) == 0
    told = capsys.readouterr().out.partition("history, oldest first")[2].split()
    assert told[0::3] == ["erased", "withdrawn"] and told[1::3] == ["cat", "ship"]


# What is set up around the weights after an erasure


def custom_diffusion(unet):
    processors = {}
    torch.manual_seed(0)
    for name in unet.attn_processors:
        attn = unet.get_submodule(name.removesuffix(".processor"))
        sizes = (attn.to_q.in_features, attn.cross_attention_dim)
        processors[name] = CustomDiffusionAttnProcessor2_0(attn.is_cross_attention, False, *sizes)
    unet.set_attn_processor(processors)
    return lambda: unet.set_attn_processor(AttnProcessor2_0())


def replaced(place):
    def install(unet):
        module = unet.get_submodule(place)
        own = module.forward
        module.forward = lambda *args, **kwargs: own(*args, **kwargs)
        return lambda: delattr(module, "forward")

    return install


def hooked(place, register):
    def install(unet):
        return getattr(unet.get_submodule(place), register)(lambda *_: None).remove

    return install


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
SURROUNDINGS = {
    "custom diffusion": custom_diffusion,
    "recorder": hooked(f"{ATTENTION}.to_k", "register_forward_hook"),
    "pre-hook": hooked(f"{ATTENTION}.to_v", "register_forward_pre_hook"),
    "hook of a layer": hooked(ATTENTION, "register_forward_hook"),
    "forward of a map": replaced(f"{ATTENTION}.to_v"),
    "forward of a layer": replaced(ATTENTION),
    "forward of the model": replaced(""),
}


@pytest.fixture(params=SURROUNDINGS)
def surround(request):
    """Sets something up around a U-Net; returns what takes it away again."""
    return SURROUNDINGS[request.param]


def test_an_erasure_is_undone_whatever_is_around_its_weights(surround):
    pipe = sd1()
    base = weights(pipe.unet)
    first, second = erased(pipe, "cat=dog", "ship=tree")
    edited = second.state_dict(pipe.unet)
    takedown = surround(pipe.unet)
    got = second.state_dict(pipe.unet)
    assert equal(edited, got)
    (again,) = first.withdraw_(pipe.unet)
    again.restore_(pipe.unet)
    takedown()
    assert equal(base, weights(pipe.unet)) and not applied(pipe.unet)


def test_adapters_of_queries_are_undone_whatever_is_around_them(surround):
    pipe = sd1()
    base = weights(pipe.unet)
    alignment = AlignmentConfig(
        steps=1,
        batch_size=1,
        trajectories=1,
        sampling_steps=2,
        evaluation_steps=0,
        check_seeds=0,
        target_modules=("to_k", "to_q", "to_out.0"),
    )
    config = dataclasses.replace(CLOSED, alignment=alignment)
    erasure = erase(pipe, ["cat=dog"], config=config, progress=False)
    assert any(name.endswith("to_q") for name in erasure.lora)
    takedown = surround(pipe.unet)
    erasure.restore_(pipe.unet)
    takedown()
    assert equal(base, weights(pipe.unet))


def test_an_erasure_is_applied_once_that_is_taken_away(surround):
    pipe = sd1()
    base = weights(pipe.unet)
    (erasure,) = erased(pipe, "cat=dog")
    expected = weights(pipe.unet)
    erasure.restore_(pipe.unet)
    takedown = surround(pipe.unet)
    with pytest.raises(ValueError, match="^model: ") as caught:
        erasure.apply_(pipe.unet)
    # The erasure is of the base weights: nothing may be merged into these.
    assert "before the call" in str(caught.value) and "merge" not in str(caught.value)
    takedown()
    assert equal(base, weights(pipe.unet)) and not applied(pipe.unet)
    erasure.apply_(pipe.unet)
    assert equal(expected, weights(pipe.unet))


def test_verify_undoes_nothing_that_it_could_not_apply_again(surround):
    pipe = sd1()
    (erasure,) = erased(pipe, "cat=dog")
    expected = weights(pipe.unet)
    takedown = surround(pipe.unet)
    with pytest.raises(ValueError, match="before the call"):
        verify(pipe, erasure, ["a cat"], seeds=[0], steps=1)
    takedown()
    assert equal(expected, weights(pipe.unet)) and applied(pipe.unet) == (erasure,)


def test_weights_of_a_processor_may_be_merged_before_erasing():
    pipe = sd1()
    custom_diffusion(pipe.unet)
    with pytest.raises(ValueError, match="before the call .*, or merge its weights into the model"):
        erased(pipe, "cat=dog")
    for name, processor in pipe.unet.attn_processors.items():
        if hasattr(processor, "to_k_custom_diffusion"):
            attn = pipe.unet.get_submodule(name.removesuffix(".processor"))
            attn.to_k.load_state_dict(processor.to_k_custom_diffusion.state_dict())
            attn.to_v.load_state_dict(processor.to_v_custom_diffusion.state_dict())
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert erased(pipe, "cat=dog")[0].map.rank


def test_a_way_to_read_text_is_asked_for_only_where_it_can_be_given():
    pipe, other = sd1(), sd1()
    (erasure,) = erased(pipe, "cat=dog")
    other.unet = UNet2DModel(
        8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    for verb in (
        lambda: erasure.apply_(other.unet),
        lambda: erasure.restore_(other.unet),
        lambda: erasure.rebase(other.unet),
        lambda: erasure.state_dict(other.unet),
        lambda: verify(other, erasure, ["a cat"], seeds=[0], steps=1),
    ):
        with pytest.raises(ValueError, match="UNet2DModel is not supported") as caught:
            verb()
        assert "reading" not in str(caught.value)
    with pytest.raises(ValueError, match=r"UNet2DModel is not supported.* are\. .* pass reading="):
        erased(other, "cat=dog")
