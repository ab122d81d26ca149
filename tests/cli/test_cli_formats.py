"""The command line with every kind of model, list, file and evaluator."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from drawn_face import drawn_face
from ldm_checkpoint import to_ldm
from safetensors.torch import load_file, save_file
from tiny_clip import tiny_clip
from tiny_families import denoise, flux, pixart_sigma, sd1
from tiny_models import aligned

from realera_fast import EraseConfig, Erasure, erase
from realera_fast.cli import program as cli

SETTINGS = {
    # Scales that depend on what was erased before would hide what the formats do.
    "vocabulary": {"words": 6, "cache": False, "preserve_scale": 5.0},
    "pairs": {"context_words": 2, "neutral_words": 4, "negative_guidance": 0.0},
    "alignment": {"enabled": False},
    "mining": {"mode": "none", "relative_words": 0},
}


@pytest.fixture
def run(capsys, tmp_path):
    """Runs a command in this process: (exit code, stdout, stderr)."""
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))

    def call(*arguments):
        if arguments[0] == "erase":
            arguments = (*arguments, "--config", tmp_path / "settings.json")
        capsys.readouterr()
        code = cli.run([str(a) for a in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of pipelines by name."""
    root = tmp_path_factory.mktemp("models")
    for name, build in (("sd1", sd1), ("flux", flux), ("pixart", pixart_sigma)):
        build().save_pretrained(root / name)
    return root


def test_a_transformer_is_erased_saved_and_verified(run, models, tmp_path):
    out = tmp_path / "out"
    code, _, err = run(
        "erase",
        models / "flux",
        "-c",
        "cat=dog",
        "-o",
        out,
        "--save",
        "pipeline,delta,lora,kohya,weights",
    )
    assert code == 0, err
    assert {p.name for p in out.iterdir()} == {
        "complete.json",
        "erasure.md",
        "erasure.safetensors",
        "kohya.md",
        "kohya.safetensors",
        "lora",
        "pipeline",
        "report.html",
        "report.json",
        "weights.md",
        "weights.safetensors",
    }
    from diffusers import FluxPipeline

    loaded = aligned(FluxPipeline.from_pretrained(out / "pipeline"))
    assert not torch.equal(denoise(loaded), denoise(flux()))
    base = flux()
    base.transformer.load_state_dict(load_file(out / "weights.safetensors"), strict=False)
    assert torch.equal(denoise(loaded), denoise(base))
    code, text, err = run(
        "verify",
        models / "flux",
        out / "erasure.safetensors",
        "-o",
        tmp_path / "check",
        "--steps",
        2,
        "--height",
        16,
        "--width",
        16,
        "--seeds",
        "0",
        "-q",
    )
    assert code == 0, err
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][4:] == ["erased", "cat"] and {"relative", "untouched"} <= {
        line[4] for line in lines[2:] if len(line) > 5
    }


def test_a_family_without_adapters_fails_before_anything_is_written(run, models, tmp_path):
    code, _, err = run(
        "erase", models / "pixart", "-c", "cat=dog", "-o", tmp_path / "out", "--save", "delta,lora"
    )
    assert code == 1 and "diffusers loads no adapters for it" in err
    assert not (tmp_path / "out").exists()
    assert (
        run(
            "erase",
            models / "pixart",
            "-c",
            "cat=dog",
            "-o",
            tmp_path / "out",
            "--save",
            "delta,weights",
        )[0]
        == 0
    )


def test_a_list_of_concepts(run, models, tmp_path):
    file = tmp_path / "list.csv"
    file.write_text("target,anchor,kind\ncat,dog,\nvan gogh,,style\n")
    code, text, err = run(
        "erase",
        models / "sd1",
        "--concepts",
        file,
        "--save",
        "delta",
        "-o",
        tmp_path / "out",
        "--checkpoint",
        tmp_path / "run",
    )
    assert code == 0, err
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["cat", "van"]
    kinds = [c.kind for c in Erasure.load(tmp_path / "out" / "erasure.safetensors").concepts]
    assert kinds == ["object", "style"]
    file.write_text("target,anchor\ncat,dog\nship,ship\n")
    code, _, err = run("erase", models / "sd1", "--concepts", file, "-o", tmp_path / "bad")
    assert code == 1 and f"{file}, line 3: " in err and not (tmp_path / "bad").exists()
    code, _, err = run("erase", models / "sd1", "-o", tmp_path / "bad")
    assert code == 2 and "expected --concept, or --concepts with a file" in err
    code, _, err = run("erase", models / "sd1", "-c", "cat", "--concepts", file, "-o", "x")
    assert code == 2


def test_info_tells_what_a_file_holds(run, models, tmp_path):
    out = tmp_path / "out"
    assert (
        run(
            "erase",
            models / "sd1",
            "-c",
            "cat=dog",
            "--save",
            "pipeline,delta,lora,kohya",
            "-o",
            out,
        )[0]
        == 0
    )
    told = {}
    for file, holds in (
        ("erasure.safetensors", "the factors of an erasure"),
        ("lora/pytorch_lora_weights.safetensors", "an adapter (diffusers)"),
        ("kohya.safetensors", "an adapter (kohya)"),
    ):
        code, text, err = run("info", out / file)
        assert code == 0, err
        assert holds in text and re.search(r"cat +- +dog +object", text)
        assert "realera_fast" in text and "base float32" in text and "residual_ratio" in text
        code, text, _ = run("info", out / file, "--json")
        told[file] = json.loads(text)
    digests = {value["report_sha256"] for value in told.values()}
    assert len(digests) == 1 and len(digests.pop()) == 64
    whole = out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    code, text, _ = run("info", whole)
    assert code == 0 and "edited tensors" in text and "cat" in text
    code, _, err = run("info", models / "sd1" / "unet" / whole.name)
    assert code == 1 and "says nothing about an erasure" in err
    assert run("info", tmp_path / "nothing.safetensors")[0] == 1


def test_deltas_are_stacked_and_one_is_withdrawn(run, models, tmp_path):
    from diffusers import StableDiffusionPipeline

    def weights(folder):
        return StableDiffusionPipeline.from_pretrained(folder).unet.state_dict()

    assert run("erase", models / "sd1", "-c", "cat=dog", "-o", tmp_path / "a")[0] == 0
    assert (
        run("erase", tmp_path / "a" / "pipeline", "-c", "ship=tree", "-o", tmp_path / "b")[0] == 0
    )
    assert run("erase", models / "sd1", "-c", "ship=tree", "-o", tmp_path / "alone")[0] == 0
    first, second = (tmp_path / name / "erasure.safetensors" for name in "ab")
    assert run("apply", models / "sd1", first, second, "-o", tmp_path / "both")[0] == 0
    expected = weights(tmp_path / "b" / "pipeline")
    assert all(torch.equal(t, expected[n]) for n, t in weights(tmp_path / "both").items())
    code, _, err = run("apply", models / "sd1", second, "-o", tmp_path / "rest")
    assert code == 1 and "was made for" in err
    assert run("apply", models / "sd1", second, "--rebase", "-o", tmp_path / "rest")[0] == 0
    expected = weights(tmp_path / "alone" / "pipeline")
    assert all(torch.equal(t, expected[n]) for n, t in weights(tmp_path / "rest").items())


def vae_to_ldm(vae) -> dict[str, torch.Tensor]:
    """An autoencoder in the key layout of the first release."""
    last = len(vae.config.block_out_channels) - 1
    rules = (
        (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm", "norm"),
        (r"to_out\.0", "proj_out"),
        (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    )
    found = {}
    for key, tensor in vae.state_dict().items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        if "attn_1" in key and key.endswith("weight") and "norm" not in key:
            tensor = tensor[..., None, None]
        found[f"first_stage_model.{key}"] = tensor
    return found


def test_a_single_file_checkpoint_is_erased(run, models, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = sd1()
    tensors = to_ldm(pipe.unet) | vae_to_ldm(pipe.vae)
    for key, tensor in pipe.text_encoder.state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"cond_stage_model.transformer.{name}"] = tensor
    file = tmp_path / "base.safetensors"
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, file)
    out = tmp_path / "out"
    code, _, err = run(
        "erase",
        file,
        "--base",
        models / "sd1",
        "-c",
        "cat=dog",
        "-o",
        out,
        "--save",
        "delta,single-file",
    )
    assert code == 0, err
    edited = StableDiffusionPipeline.from_single_file(
        str(out / "model.safetensors"), config=str(models / "sd1"), local_files_only=True
    )
    expected = StableDiffusionPipeline.from_pretrained(models / "sd1")
    Erasure.load(out / "erasure.safetensors").apply_(expected.unet)
    for name, tensor in expected.unet.state_dict().items():
        assert torch.equal(edited.unet.state_dict()[name], tensor), name
    for name, tensor in expected.vae.state_dict().items():
        assert torch.equal(edited.vae.state_dict()[name], tensor), name
    text = dict(edited.text_encoder.named_parameters())
    assert all(torch.equal(text[n], p) for n, p in expected.text_encoder.named_parameters())
    code, text, _ = run("info", out / "model.safetensors")
    assert code == 0 and "edited tensors" in text
    code, _, err = run("erase", models / "sd1", "-c", "cat", "--save", "single-file", "-o", "x")
    assert code == 2 and "needs a MODEL that is a single file" in err
    code, _, err = run("erase", file, "-c", "cat", "-o", tmp_path / "x")
    assert code == 1 and "pass --base" in err
    (tmp_path / "a.ckpt").touch()
    code, _, err = run("erase", tmp_path / "a.ckpt", "-c", "cat", "-o", tmp_path / "x")
    assert code == 1 and "expected a .safetensors file" in err


def test_verify_with_clip_and_detectors(run, models, tmp_path):
    model, processor = tiny_clip()
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    assert (
        run("erase", models / "sd1", "-c", "cat=dog", "--save", "delta", "-o", tmp_path / "out")[0]
        == 0
    )
    delta = tmp_path / "out" / "erasure.safetensors"
    out = tmp_path / "check"
    code, _, err = run(
        "verify",
        models / "sd1",
        delta,
        "-o",
        out,
        "--clip",
        tmp_path / "clip",
        "--detector",
        "detectors:brightness",
        "--steps",
        2,
        "--seeds",
        "0",
        "--height",
        16,
        "--width",
        16,
        "-p",
        "<b>cat</b>",
        "-q",
    )
    assert code == 0, err
    found = json.loads((out / "report.json").read_text())
    (row,) = found["prompts"]
    assert len(row["scores"]["clip"]) == 2 and row["text_change"] > 0
    assert row["detected"]["detectors:brightness"][0][0] in ("bright", "dark")
    pinned = found["evaluators"]
    assert row["seen"][0][0] in pinned["judge"]["things"]
    assert len(pinned["judge"]["weights_sha256"]) == 64
    assert pinned["detectors:brightness"]["name"] == "detectors.brightness"
    assert found["settings"]["seeds"] == [0] and found["settings"]["sampler"] == "DDIMScheduler"
    assert found["settings"]["versions"]["diffusers"]
    page = (out / "report.html").read_text()
    assert "<b>cat</b>" not in page and "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "clip before" in page
    assert pinned["judge"]["weights_sha256"] in page
    with (out / "rows.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["prompt"] == "<b>cat</b>" and line["concept"] == "cat"
    assert float(line["clip_after"]) == pytest.approx(row["scores"]["clip"][1])
    assert line["detectors:brightness_before"] in ("bright", "dark")
    assert (out / "after" / line["file"]).is_file()
    code, _, err = run("verify", models / "sd1", delta, "-o", tmp_path / "x", "--detector", "no:x")
    assert code == 2 and "expected module:function" in err
    code, _, err = run("verify", models / "sd1", delta, "-o", tmp_path / "x", "--clip", tmp_path)
    assert code == 1 and "holds no CLIP model" in err


@pytest.fixture(scope="module")
def judged(models, tmp_path_factory):
    """A delta, a CLIP model and a folder of reference pictures."""
    root = tmp_path_factory.mktemp("judged")
    pipe = sd1()
    result = erase(pipe, ["cat=dog"], config=EraseConfig.from_dict(SETTINGS), progress=False)
    result.save(root / "delta.safetensors")
    for part in tiny_clip():
        part.save_pretrained(root / "clip")
    (root / "reference").mkdir()
    for i in range(3):
        drawn_face(20 + i).save(root / "reference" / f"{i}.png")
    return root


def verified(run, models, judged, out, *options):
    size = ("--height", 16, "--width", 16, "--steps", 1, "--seeds", "0,1", "-q")
    delta = judged / "delta.safetensors"
    return run("verify", models / "sd1", delta, "-o", out, *size, *options)


def test_verify_with_nudenet(run, models, judged, tmp_path):
    pytest.importorskip("nudenet")
    out = tmp_path / "check"
    code, _, err = verified(run, models, judged, out, "-p", "cat", "--detector", "nudenet")
    assert code == 0, err
    found = json.loads((out / "report.json").read_text())
    assert found["evaluators"]["nudenet"]["version"]
    # Noise shows nobody.
    assert found["prompts"][0]["detected"] == {"nudenet": [["", ""], ["", ""]]}


def test_verify_with_a_frechet_distance(run, models, judged, tmp_path):
    pytest.importorskip("torchmetrics")
    out = tmp_path / "check"
    options = ("--clip", judged / "clip", "--fid", judged / "reference")
    prompts = ("-p", "cat", "--untouched", "dog")
    code, _, err = verified(run, models, judged, out, *prompts, *options)
    assert code == 0, err
    assert "warning: Fréchet distances of 2 pictures and 16 features are biased" in err
    found = json.loads((out / "report.json").read_text())
    assert found["fid"]["reference"] == 3 and found["fid"]["pictures"] == 2
    assert found["fid"]["before"] > 0 and found["fid"]["after"] > 0
    assert len(found["evaluators"]["fid"]["weights_sha256"]) == 64
    assert "reference to after" in (out / "report.html").read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    options = ("--clip", judged / "clip", "--fid", empty)
    code, _, err = verified(run, models, judged, tmp_path / "x", *prompts, *options)
    assert code == 2 and "holds no pictures" in err
    options = ("--fid", judged / "reference", "--fid-weights", judged / "delta.safetensors")
    code, _, err = verified(run, models, judged, tmp_path / "x", *prompts, *options)
    assert code == 2 and "--fid-weights" in err
    assert not (tmp_path / "x").exists()


def test_verify_refuses_distances_that_it_can_not_take(run, models, judged, tmp_path):
    known = ("--fid", judged / "reference", "--clip", judged / "clip")
    for options, told in (
        (("--fid", judged / "reference"), "pass --clip, or --fid-weights"),
        (("--fid-weights", judged / "delta.safetensors"), "needs --fid with a folder"),
        (("--fid", judged / "delta.safetensors", *known[2:]), "expected a folder of pictures"),
        ((*known, "-p", "a cat"), "these prompts and seeds draw 0"),
    ):
        code, _, err = verified(run, models, judged, tmp_path / "x", *options)
        assert code == 2 and told in " ".join(err.split()), err
    # What both made is one delta, whose report names no words that stay.
    one = Erasure.load(judged / "delta.safetensors")
    one.then(one).save(tmp_path / "delta.safetensors")
    code, _, err = verified(run, models, tmp_path, tmp_path / "x", *known)
    assert code == 2 and "the words of this delta and seeds draw 0" in " ".join(err.split()), err
    assert not (tmp_path / "x").exists()
