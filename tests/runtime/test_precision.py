"""16-bit dtypes on a CPU: who asks whether it multiplies them, and what users are told."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, flux
from tiny_models import tiny_pipeline

from realera_fast import Concept, EraseConfig, erase
from realera_fast.alignment import AlignmentConfig
from realera_fast.cli import program as cli
from realera_fast.evaluation import verification
from realera_fast.runtime import precision
from realera_fast.text import VocabularyConfig

WORDS = VocabularyConfig(words=20, cache=False)
CLOSED = EraseConfig(alignment=AlignmentConfig(enabled=False), vocabulary=WORDS)
HALF = [torch.bfloat16, torch.float16]
SLOW = "on a CPU that does not multiply it natively"


@pytest.fixture(params=[True, False], ids=["native", "loops"])
def native(request, monkeypatch) -> bool:
    """Whether the processor multiplies 16-bit numbers."""
    monkeypatch.setattr(precision, "multiplies_natively", lambda dtype: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_always_native(dtype):
    assert precision.multiplies_natively(dtype)


def test_what_is_said_of_this_processor_is_so(monkeypatch):
    """By what the system says of the processor, and by what torch would do."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "flags" not in flags.read_text():
        pytest.skip("needs /proc/cpuinfo of an x86 processor")
    has = set(flags.read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    if precision.multiplies_natively(torch.bfloat16):
        assert has & {"avx512_bf16", "amx_bf16"}
    if precision.multiplies_natively(torch.float16):
        assert has & {"avx512_fp16", "amx_fp16"}
    # Without oneDNN nothing but loops is left.
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not any(precision.multiplies_natively(dtype) for dtype in HALF)


def test_avx512_alone_is_not_native(monkeypatch):
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not precision.multiplies_natively(torch.bfloat16)


def test_the_dtype_that_is_chosen(native):
    assert precision.fastest_dtype("cpu") == (torch.bfloat16 if native else torch.float32)
    assert precision.fastest_dtype("cuda") == torch.bfloat16


def test_benchmarks_ask(native, monkeypatch):
    from embedded import common
    from harness import provenance
    from speed import alignment

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    provenance.add_dtype(parser)
    assert parser.parse_args([]).dtype == ("bfloat16" if native else "float32")
    assert parser.parse_args(["--dtype", "bfloat16"]).dtype == "bfloat16"
    found = {point.dtype for point in alignment.cpu_points(quick=False)}
    assert found == ({torch.float32, torch.bfloat16} if native else {torch.float32})
    with common.autocast():
        assert torch.is_autocast_enabled("cpu") == native


def told(erasure, caplog) -> list[str]:
    """What the log and the report say; both the same."""
    logged = [record.message for record in caplog.records if SLOW in record.message]
    assert logged == [text for text in erasure.report["warnings"] if SLOW in text]
    return logged


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sd1", torch.bfloat16), ("sd1", torch.float16), ("flux", torch.bfloat16)],
    ids=str,
)
def test_a_model_in_16_bits_is_warned_of_once(name, dtype, native, caplog):
    erasure = erase(FAMILIES[name](dtype=dtype), ["cat=dog"], config=CLOSED, progress=False)
    found = told(erasure, caplog)
    assert len(found) == (0 if native else 1)
    if found:
        assert found[0].startswith(str(dtype).removeprefix("torch."))
        assert "times as long as in float32" in found[0]


def test_a_text_encoder_in_16_bits_counts(native, caplog):
    pipe = tiny_pipeline()
    pipe.text_encoder.to(torch.bfloat16)
    erasure = erase(pipe, ["cat=dog"], config=CLOSED, progress=False)
    assert len(told(erasure, caplog)) == (0 if native else 1)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_of_the_alignment_counts_where_that_runs(enabled, native, caplog):
    align = AlignmentConfig(
        enabled=enabled,
        mixed_precision="bf16",
        steps=2,
        batch_size=2,
        trajectories=2,
        sampling_steps=2,
        check_seeds=0,
    )
    config = EraseConfig(alignment=align, vocabulary=WORDS)
    erasure = erase(tiny_pipeline(), [Concept("cat", "dog")], config=config, progress=False)
    assert len(told(erasure, caplog)) == (1 if enabled and not native else 0)


def test_float32_is_never_warned_of(native, caplog):
    assert not told(erase(flux(), ["cat=dog"], config=CLOSED, progress=False), caplog)


def test_pictures_that_are_drawn_to_verify_are_warned_of(native, caplog):
    pipe = tiny_pipeline(dtype=torch.bfloat16)
    erasure = erase(pipe, ["cat=dog"], config=CLOSED, progress=False)
    erasure.restore_(pipe.unet)
    caplog.clear()
    verification.verify(pipe, erasure, ["a cat"], seeds=[0], steps=1, height=16, width=16)
    said = [record.message for record in caplog.records if SLOW in record.message]
    assert len(said) == (0 if native else 1)


def test_the_command_line_says_it_once(native, tmp_path, caplog):
    tiny_pipeline().save_pretrained(tmp_path / "model", safe_serialization=True)
    (tmp_path / "settings.json").write_text('{"vocabulary": {"words": 20}}')
    code = cli.run(
        [
            "erase",
            str(tmp_path / "model"),
            "-c",
            "cat=dog",
            "--no-align",
            "--dtype",
            "bf16",
            "--device",
            "cpu",
            "--save",
            "delta",
            "--config",
            str(tmp_path / "settings.json"),
            "-o",
            str(tmp_path / "out"),
            "-q",
        ]
    )
    assert code == 0
    assert caplog.text.count(SLOW) == (0 if native else 1)
