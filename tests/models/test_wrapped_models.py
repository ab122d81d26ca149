"""Models that are compiled, wrapped, offloaded, sliced or laid out differently."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, cpu_offload_with_hook
from edits import CLOSED
from model_state import weights
from tiny_families import flux, pixart_alpha, sd1, sdxl
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from realera_fast import EraseConfig, Erasure, erase
from realera_fast.alignment import AlignmentConfig
from realera_fast.models import components_of, projections

TRAINED = EraseConfig(
    alignment=AlignmentConfig(
        steps=2, batch_size=2, trajectories=2, sampling_steps=2, evaluation_steps=0
    ),
    vocabulary=CLOSED.vocabulary,
    pairs=CLOSED.pairs,
)


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def run(pipe, model, config=CLOSED, **options) -> Erasure:
    parts = components_of(pipe)
    return erase(
        model,
        parts.text_encoders,
        ["cat=dog"],
        tokenizer=parts.tokenizers,
        scheduler=parts.scheduler,
        config=config,
        progress=False,
        **options,
    )


def check(pipe, wrapped, plain, config=CLOSED) -> None:
    """Erasing through a wrapper edits the model inside like any other, and is undone alike."""
    model, other = components_of(pipe).model, components_of(plain).model
    before = weights(model)
    parameters = dict(model.named_parameters())
    erasure = run(pipe, wrapped, config)
    expected = run(plain, other, config)
    assert erasure.fingerprint == expected.fingerprint
    assert erasure.provenance["model_class"] == type(model).__name__
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in weights(model).items())
    assert any(not torch.equal(t, before[n]) for n, t in weights(model).items())
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert set(erasure.state_dict(wrapped)) == {f"{n}.weight" for n in projections(model)}
    erasure.restore_(wrapped)
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())


@pytest.mark.parametrize("build", [sd1, sdxl, flux, pixart_alpha])
def test_compiled(build):
    pipe = build()
    check(pipe, torch.compile(components_of(pipe).model, backend="eager"), build())


@pytest.mark.parametrize("build", [sd1, flux])
@pytest.mark.usefixtures("one_process")
def test_data_parallel_and_compiled_on_top(build):
    pipe = build()
    wrapped = DistributedDataParallel(components_of(pipe).model)
    check(pipe, wrapped, build())
    check(pipe, torch.compile(wrapped, backend="eager"), build())
    check(pipe, nn.DataParallel(components_of(pipe).model), build())


@pytest.mark.usefixtures("one_process")
def test_data_parallel_with_alignment():
    pipe = sd1()
    check(pipe, DistributedDataParallel(pipe.unet), sd1(), TRAINED)


@pytest.mark.parametrize("config", [CLOSED, TRAINED], ids=["closed form", "alignment"])
def test_channels_last(config):
    pipe = sd1()
    pipe.unet.to(memory_format=torch.channels_last)
    strides = {n: p.stride() for n, p in pipe.unet.named_parameters()}
    erasure = run(pipe, pipe.unet, config)
    assert erasure.map.rank
    assert {n: p.stride() for n, p in pipe.unet.named_parameters()} == strides
    erasure.restore_(pipe.unet)
    assert all(torch.equal(t, pipe.unet.state_dict()[n]) for n, t in weights(sd1().unet).items())


def test_sliced_attention():
    pipe = sd1()
    pipe.enable_attention_slicing(1)
    processors = dict(pipe.unet.attn_processors)
    erasure = run(pipe, pipe.unet, TRAINED)
    assert erasure.report["alignment"]["steps"] == 2
    assert all(processors[n] is p for n, p in pipe.unet.attn_processors.items())


@pytest.mark.parametrize("build", [sd1, flux])
def test_offloaded_weights_are_refused(build):
    pipe = build()
    model = components_of(pipe).model
    before = weights(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded|meta device"):
        run(pipe, model)
    pipe = build()
    cpu_offload_with_hook(components_of(pipe).model, execution_device=torch.device("cpu"))
    try:
        erasure = run(pipe, components_of(pipe).model)
    except ValueError as error:
        assert "offloaded" in str(error)
    else:
        erasure.restore_(components_of(pipe).model)
    assert all(torch.equal(t, before[n]) for n, t in weights(components_of(pipe).model).items())


def test_offloaded_text_encoders_are_refused():
    pipe = sdxl()
    cpu_offload(pipe.text_encoder_2, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="text_encoder_2: the weights of .* are offloaded"):
        run(pipe, pipe.unet)


def test_sharded_weights_are_refused():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    pipe = sd1()
    with pytest.raises(ValueError, match="its weights are sharded"):
        run(pipe, FullyShardedDataParallel(pipe.unet))
