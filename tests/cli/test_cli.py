"""The command line as a user meets it: outputs, messages, exit codes, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from planted_kernels import broken, planted, unchecked
from tiny_models import tiny_pipeline

import realera_fast
from realera_fast import Erasure
from realera_fast.cli import program as cli
from realera_fast.cli import tables
from realera_fast.runtime.files import MARKER

FAST = ["--mining", "none", "--no-align"]
"""Options under which a tiny model is erased in a fraction of a second."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def erased(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one complete 'erase'."""
    out = tmp_path_factory.mktemp("out") / "no-cat"
    code = cli.run(
        ["erase", model, "-c", "cat=ship", "--synonym", "kitten", "--preserve", "dog"]
        + ["--save", "pipeline,delta,lora", "-o", str(out), "--quiet", *FAST]
    )
    assert code == 0
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(a) for a in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def unet_weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


def load(folder: Path | str) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


# --- help, version, info -------------------------------------------------------------------


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "realera_fast", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"realera-fast {realera_fast.__version__}\n",
        "",
    )


@pytest.mark.parametrize("command", ["", "erase", "apply", "verify", "info", "push", "demo"])
def test_help_shows_examples_that_fit_a_terminal(run: Any, command: str) -> None:
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "Example" in out and f"realera-fast {command}".strip() in out
    # Eighty columns, and examples keep their lines: a wrapped one could not be pasted.
    assert max(map(len, out.splitlines())) <= 80
    examples = out[out.index("Example") :].split("\n\n")[0].splitlines()[1:]
    for line, following in zip(examples, [*examples[1:], ""], strict=True):
        assert line.strip().startswith("realera-fast") or line.startswith("        ")
        assert following.startswith("        ") == line.endswith("\\")


def test_no_command_is_wrong_usage(run: Any) -> None:
    code, _, _ = run()
    assert code == 2


def test_info(run: Any) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert torch.__version__ in out and "cpu" in out
    for op in ("normal_equations_", "solve_spd", "low_rank_update_", "perturb"):
        assert op in out


def test_info_json(run: Any) -> None:
    code, out, err = run("info", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["versions"]["realera_fast"] == realera_fast.__version__
    assert found["devices"][0]["name"] == "cpu"
    assert set(found["operations"]["perturb"]) == {"cpu", "cuda"}


def test_info_checks_the_kernels(run: Any, tmp_path: Path) -> None:
    with unchecked(tmp_path):
        code, out, err = run("info", "--check")
        assert (code, err) == (0, "") and "\nchecks\n" in out
        with planted("solve_spd", broken):
            code, out, err = run("info", "--check", "--json")
            assert code == 1 and "error: kernels that differ from their definitions: " in err
            assert "solve_spd on cpu; plain PyTorch serves" in err
            found = json.loads(out)
            (check,) = (c for c in found["checks"] if not c["agrees"])
            assert (check["op"], check["fault"]) == ("solve_spd", "ValueError: no such instruction")
            assert found["operations"]["solve_spd"]["cpu"] == "reference"
    code, _, err = run("info", "file", "--check")
    assert code == 2 and "leave FILE out" in err


# --- erase ---------------------------------------------------------------------------------


def test_erase_writes_what_was_asked(model: str, erased: Path) -> None:
    assert sorted(p.name for p in erased.iterdir()) == [
        "complete.json",
        "erasure.md",
        "erasure.safetensors",
        "lora",
        "pipeline",
        "report.html",
        "report.json",
    ]
    base, edited = load(model), load(erased / "pipeline")
    before, after = unet_weights(base), unet_weights(edited)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    # The delta on the base model is the pipeline that was written.
    erasure = Erasure.load(erased / "erasure.safetensors")
    erasure.apply_(base.unet)
    assert all(torch.equal(value, after[name]) for name, value in unet_weights(base).items())
    assert [c.words for c in erasure.concepts] == [("cat", "kitten")]
    # Stock diffusers takes the adapter.
    adapted = load(model)
    adapted.load_lora_weights(erased / "lora")
    report = json.loads((erased / "report.json").read_text())
    assert report["concepts"][0]["anchor"] == "ship"
    assert report["erase_config"]["alignment"]["enabled"] is False
    assert "cat" in (erased / "report.html").read_text()


def test_a_checkpoint_is_kept_and_taken_up(run: Any, model: str, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    alignment = {
        "steps": 2,
        "batch_size": 1,
        "trajectories": 1,
        "sampling_steps": 2,
        "check_seeds": 0,
    }
    settings.write_text(json.dumps({"alignment": alignment}))
    folder = tmp_path / "kept"
    common = ["erase", model, "-c", "cat=dog", "--save", "delta", "--config", settings]
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        assert run(*common, "--checkpoint", folder, "-o", out)[0] == 0
        assert [p.name for p in folder.iterdir()] == ["alignment.safetensors"]
    first, second = (Erasure.load(out / "erasure.safetensors") for out in outs)
    assert first.report["alignment"]["held_back"] == second.report["alignment"]["held_back"]
    code, _, error = run(*common, "--seed", 5, "--checkpoint", folder, "-o", tmp_path / "third")
    assert code != 0 and "checkpoint_dir" in error and "of another run" in error


def test_erase_reports_on_stdout_and_nothing_else_there(
    run: Any, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "er"
    code, text, _ = run("erase", model, "-c", "cat=dog", "--save", "delta", "-o", out, *FAST)
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "complete.json",
        "erasure.md",
        "erasure.safetensors",
        "report.html",
        "report.json",
    ]
    lines = text.splitlines()
    assert lines[0].split() == ["word", "role", "becomes", "moved", "drift"]
    assert lines[1].split()[:3] == ["cat", "target", "dog"]
    assert lines[-1] == f"wrote erasure.md, erasure.safetensors, report.html, report.json to {out}"
    assert [p.name for p in out.parent.iterdir()] == ["er"]
    # Readable by others, as any file a user makes.
    assert os.stat(out).st_mode & 0o777 == 0o777 & ~_umask()
    for file in out.iterdir():
        assert os.stat(file).st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_quiet_is_quiet(run: Any, model: str, tmp_path: Path) -> None:
    common = ["erase", model, "-c", "cat=dog", "--save", "delta", *FAST]
    _, _, loud = run(*common, "-o", tmp_path / "a")
    assert "Loading" in loud
    code, _, quiet = run(*common, "-o", tmp_path / "b", "--quiet")
    assert code == 0
    assert [line for line in quiet.splitlines() if not line.startswith("warning:")] == []


def test_same_seed_same_file(run: Any, model: str, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        out = tmp_path / name
        options = ["--seed", 3, "--save", "delta", "-o", out, *FAST]
        assert run("erase", model, "-c", "cat", *options)[0] == 0
        base = load(model)
        Erasure.load(out / "erasure.safetensors").apply_(base.unet)
        files.append(unet_weights(base))
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_options_reach_the_config(run: Any, model: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"seed": 5, "erase_scale": 2.0, "mining": {"mode": "gaussian"}}))
    out = tmp_path / "out"
    options = ["--config", file, "--seed", 9, "--save", "delta", "-o", out, *FAST]
    assert run("erase", model, "-c", "cat", *options)[0] == 0
    config = json.loads((out / "report.json").read_text())["erase_config"]
    assert (config["seed"], config["erase_scale"]) == (9, 2.0)  # option over file over default
    assert config["mining"]["mode"] == "none"
    assert config["alignment"]["enabled"] is False


def test_dry_run_changes_nothing(run: Any, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("erase", model, "-c", "cat=dog", "-c", "van gogh", "--dry-run", "-o", out)
    assert code == 0
    assert "would edit 8 projections of UNet2DConditionModel (float32)" in text
    assert ["van", "gogh", "object", "-", "2"] in [line.split() for line in text.splitlines()]
    assert list(tmp_path.iterdir()) == []
    assert "would draw" not in text
    _, text, _ = run("erase", model, "-c", "cat", "--kind", "explicit", "--dry-run", "-o", out)
    assert "would draw up to 256 words each to find the members of cat" in text


# --- erase, wrong inputs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-c", ""], "target is empty"),
        (["-c", "cat", "-c", "Cat"], "named twice"),
        (["-c", "cat=cat"], "equals its anchor"),
        (["-c", "cat", "--preserve", "cat"], "decide for one"),
        (["-c", "cat", "--preserve", "Cat"], "decide for one"),
        (["-c", "cat=Cat"], "equals its anchor"),
        (["-c", "cat<|endoftext|>"], "control token"),
        (["-c", "cat<|endoftext|>", "--dry-run"], "control token"),
        (["-c", "c\u200bat"], "U+200B"),
        (["-c", "cat", "--preserve", "d\u200bog"], "U+200B"),
        (["-c", "cat", "--synonym", "k\u00aditten"], "U+00AD"),
        (["-c", "cat", "--kind", "animal"], "expected one of object, style"),
        (["-c", "cat", "-c", "dog", "--synonym", "kitten"], "exactly one --concept"),
        (["-c", "cat", "--save", "zip"], "pipeline, delta, lora"),
        (["-c", "cat", "--save", ""], "pipeline, delta, lora"),
        (["-c", "cat", "--dtype", "int8"], "fp32, bf16, fp16"),
        (["-c", "cat", "--mining", "magic"], "magic"),
        (["-c", "cat", "--seed", "-1"], "--seed"),
        (["-c", "cat", "--config", "/nowhere.json"], "No such file"),
        (["-c", "cat", "--device", "toaster"], "no such device"),
        ([], "--concept"),
    ],
)
def test_wrong_usage_is_2(
    run: Any, model: str, tmp_path: Path, options: list[str], message: str
) -> None:
    code, out, err = run("erase", model, "-o", tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert message in err and "Usage: realera-fast erase" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["-c", "cat", "--preserve", "cat"], "--preserve"),
        (["-c", "cat", "--preserve", "Cat"], "--preserve"),
        (["-c", "cat", "--preserve", "Cat", "--dry-run"], "--preserve"),
        (["-c", "cat", "--preserve", "dog<|endoftext|>"], "--preserve"),
        (["-c", "cat", "--preserve", "d\u200bog"], "--preserve"),
        (["-c", "cat", "--synonym", "k\u00aditten"], "--synonym"),
        (["-c", "cat", "--synonym", " "], "--synonym"),
        (["-c", "cat", "--config", "CONFIG"], "--config"),
        (["-c", "cat", "-c", "Cat"], "--concept"),
        (["-c", "cat<|endoftext|>"], "--concept"),
        (["-c", "cat=Cat"], "--concept"),
    ],
)
def test_wrong_names_are_told_of_the_option_that_holds_them(
    run: Any, model: str, tmp_path: Path, options: list[str], named: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"pairs": {"templates": {"object": ["{} <|endoftext|>"]}}}')
    options = [str(config) if option == "CONFIG" else option for option in options]
    code, _, err = run("erase", model, "-o", tmp_path / "out", *options)
    assert code == 2 and f"Invalid value for '{named}'" in err
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ('{"no_such_field": 1}', "no_such_field"),
        ("[1]", "EraseConfig"),
        ('{"seed": 1, "seed": 2}', "names the field 'seed' twice"),
        ('{"erase_scale": NaN}', "holds NaN"),
    ],
)
def test_bad_config_file_is_2(
    run: Any, model: str, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    code, _, err = run("erase", model, "-c", "cat", "--config", file, "-o", tmp_path / "out")
    assert code == 2
    assert message in err and str(file) in err


@pytest.mark.parametrize(
    ("arguments", "named", "told"),
    [
        (["erase", "MODEL", "-c", "caf\udce9", "-o", "OUT"], "'-c'", r"'caf\xe9'"),
        (["erase", "MODEL", "--concept=caf\udce9", "-o", "OUT"], "'--concept'", r"f\xe9'"),
        (["erase", "MODEL", "-c", "cat", "-o", "OUT\udcff"], "'-o'", r"\xff'"),
        (["erase", "MODEL\udcff", "-c", "cat", "-o", "OUT"], "'argument 2'", r"\xff'"),
        (["verify", "MODEL", "DELTA", "-p", "\ud83d", "-o", "OUT"], "'-p'", r"'\ud83d'"),
        (["info", "caf\udce9"], "'argument 2'", r"'caf\xe9'"),
    ],
)
def test_arguments_that_are_no_text_are_2(
    run: Any, model: str, tmp_path: Path, arguments: list[str], named: str, told: str
) -> None:
    places = {"MODEL": model, "OUT": str(tmp_path / "out"), "DELTA": str(tmp_path / "delta")}
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert named in err and told in err and "is not valid text" in err
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_the_terminal_can_not_show_is_no_failure(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "realera_fast", "erase", model, "-c", "\u5154\u5b50"]
    command += ["--dry-run", "-o", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "\\u5154\\u5b50" in done.stdout


def test_a_config_file_may_begin_with_a_byte_order_mark(
    run: Any, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text('\ufeff{"seed": 7}', encoding="utf-8")
    options = ["-c", "cat", "--config", file, "-o", tmp_path / "out", "--dry-run"]
    assert "seed 7" in run("erase", model, *options)[1]


def failed(result: tuple[int, str, str], message: str) -> None:
    """Exit code 1, nothing on stdout, one line `error: ...` with the message, no traceback."""
    code, out, err = result
    assert (code, out) == (1, "")
    last = err.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in err


def test_missing_models(run: Any, tmp_path: Path) -> None:
    out = ["-c", "cat", "-o", tmp_path / "out"]
    failed(run("erase", tmp_path / "nothing", *out), "no such folder")
    failed(run("erase", tmp_path, *out), "no model_index.json")
    failed(run("erase", "owner/never-downloaded", *out), "hf download owner/never-downloaded")
    file = tmp_path / "model.safetensors"
    file.touch()
    failed(run("erase", file, *out), "pass --base with a pipeline folder")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(run: Any, model: str, tmp_path: Path) -> None:
    pipe = load(model)
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    result = run("erase", tmp_path / "pickled", "-c", "cat", "-o", tmp_path / "out")
    failed(result, "weights must be safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu(run: Any, model: str, tmp_path: Path) -> None:
    result = run("erase", model, "-c", "cat", "--device", "cuda", "-o", tmp_path / "out")
    failed(result, "sees no GPU")


def test_library_errors_are_one_line(run: Any, model: str, tmp_path: Path) -> None:
    words = " ".join(["kitten"] * 90)
    result = run("erase", model, "-c", words, "-o", tmp_path / "out", *FAST)
    failed(result, "more tokens than the text encoder holds")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(run: Any, tmp_path: Path) -> None:
    code, _, err = run(
        "erase", tmp_path / "nothing", "-c", "cat", "-o", tmp_path / "out", "--debug"
    )
    assert code == 1
    assert "Traceback" in err and err.rstrip().splitlines()[-1].startswith("error: ")


# --- output folders ------------------------------------------------------------------------


def test_full_folder_needs_force(run: Any, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    (out / "pipeline").mkdir()
    (out / "pipeline" / "stale.bin").touch()
    command = ["erase", model, "-c", "cat=dog", "-o", out, "-q", *FAST]
    failed(run(*command), "not empty")
    assert sorted(p.name for p in out.iterdir()) == ["mine.txt", "pipeline"]
    assert run(*command, "--force")[0] == 0
    assert "pipeline/unet/config.json" in json.loads((out / MARKER).read_text())["files"]
    assert (out / "mine.txt").read_text() == "keep me"
    assert not (out / "pipeline" / "stale.bin").exists()
    assert (out / "pipeline" / "model_index.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_empty_folder_is_fine(run: Any, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run("erase", model, "-c", "cat=dog", "--save", "delta", "-o", out, *FAST)[0] == 0


def test_output_that_is_a_file(run: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    failed(run("erase", model, "-c", "cat", "-o", tmp_path / "out"), "is a file")
    failed(run("erase", model, "-c", "cat", "-o", tmp_path / "out" / "x"), "cannot write --out")


def test_unwritable_output_fails_before_the_model_loads(
    run: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    # Root may write anywhere, so the refusal of the file system is simulated.
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    monkeypatch.setattr("realera_fast.cli.loading.load_pipeline", load)
    result = run("erase", model, "-c", "cat", "-o", tmp_path / "out")
    failed(result, "cannot write --out")
    assert "Permission denied" in result[2]


def test_full_disk_is_found_before_the_work(
    run: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny(_: Any) -> Any:
        return type("Usage", (), {"free": 1000})

    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work began")

    monkeypatch.setattr("shutil.disk_usage", tiny)
    monkeypatch.setattr("realera_fast.eraser.erase", work)
    failed(run("erase", model, "-c", "cat", "-o", tmp_path / "out"), "GB free")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("bug"), 1, "error: KeyError: 'bug' (--debug shows where)"),
    ],
)
def test_nothing_half_written_stays(
    run: Any,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(self: Any, path: Any, **_: Any) -> None:
        Path(path).mkdir(parents=True)
        (Path(path) / "half").write_bytes(b"x")
        raise failure

    monkeypatch.setattr("diffusers.DiffusionPipeline.save_pretrained", fail)
    out = tmp_path / "out"
    got, text, err = run("erase", model, "-c", "cat=dog", "-o", out, *FAST)
    assert (got, text) == (code, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


# --- apply ---------------------------------------------------------------------------------


def test_apply_writes_the_same_pipeline(run: Any, model: str, erased: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("apply", model, erased / "erasure.safetensors", "-o", out)
    assert code == 0 and "without 'cat'" in text
    one, other = load(out), load(erased / "pipeline")
    weights = unet_weights(other)
    assert all(torch.equal(v, weights[name]) for name, v in unet_weights(one).items())


def test_apply_refuses(run: Any, model: str, erased: Path, tmp_path: Path) -> None:
    delta = erased / "erasure.safetensors"
    out = ["-o", tmp_path / "out"]
    failed(run("apply", erased / "pipeline", delta, *out), "")  # already edited: another base
    failed(run("apply", model, tmp_path / "none.safetensors", *out), "none.safetensors")
    hostile = tmp_path / "hostile.safetensors"
    hostile.write_bytes(delta.read_bytes()[:100])
    failed(run("apply", model, hostile, *out), "")
    assert not (tmp_path / "out").exists()


# --- verify --------------------------------------------------------------------------------


def test_verify(run: Any, model: str, erased: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    delta = erased / "erasure.safetensors"
    options = ["--steps", 2, "--seeds", "4,5", "-p", "a cat", "--untouched", "a dog", "-o", out]
    code, text, _ = run("verify", model, delta, *options)
    assert code == 0
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][4:] == ["erased", "a", "cat"]
    assert lines[2][4:] == ["untouched", "a", "dog"]
    assert sorted(p.name for p in out.iterdir()) == [
        "after",
        "before",
        "before_after.png",
        "complete.json",
        "report.html",
        "report.json",
        "rows.csv",
    ]
    with Image.open(out / "before_after.png") as grid:
        assert grid.size[0] > 4 * 128
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["seeds"] == [4, 5]
    assert [p["group"] for p in report["prompts"]] == ["erased", "untouched"]


def test_verify_refuses(run: Any, model: str, erased: Path, tmp_path: Path) -> None:
    delta = erased / "erasure.safetensors"
    out = ["-o", tmp_path / "out"]
    code, _, err = run("verify", model, delta, "--seeds", "1,x", *out)
    assert code == 2 and "numbers such as 0,1,2" in err
    code, _, _ = run("verify", model, delta, "--steps", 0, *out)
    assert code == 2
    failed(run("verify", erased / "pipeline", delta, "--steps", 2, *out), "")
    assert list(tmp_path.iterdir()) == []


# --- the process ---------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_behind(
    model: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    # The real process, stopped in the middle of the work, which waits there to be stopped: in
    # short sleeps, as a signal that comes just before a sleep is seen only when that one ends.
    program = (
        "import time, signal; from realera_fast import cli, eraser\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def work(*_, **__):\n"
        "    print('working', flush=True)\n"
        "    for _ in range(1200): time.sleep(0.05)\n"
        "eraser.erase = work\n"
        f"cli.main(['erase', {model!r}, '-c', 'cat', '-o', {str(out)!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "working\n"
        assert [p.name[:5] for p in tmp_path.iterdir()] == [".out."]
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_reader_that_goes_away() -> None:
    # "realera-fast info | true": no traceback on stderr.
    done = subprocess.run(
        f"{sys.executable} -m realera_fast info --json | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""


def test_the_summary_says_what_is_left_and_what_trains_against_attacks():
    class Outcome:
        report: ClassVar[dict] = {
            "alignment": {
                "closed_form": {"target": 0.1, "neighbor": 0.3, "preserve": 0.1, "worst": 0.6},
                "aligned": {"target": 0.0, "neighbor": 0.02, "preserve": 0.1, "worst": 0.25},
            }
        }

    text = tables.summary(Outcome)
    assert "left after the closed form: 20%, under attack 60%" in text
    assert "left after noise alignment: 1%, under attack 25%" in text
    assert "--preset strict" in text
    Outcome.report["attacks"] = {"cat": [{"first": 1.0, "last": 0.5}]}
    assert "--preset strict" not in tables.summary(Outcome)
    assert "attack" not in tables.summary(type("Closed", (), {"report": {"alignment": {}}}))


def test_more_is_erased_together_with_what_was(model, erased, run, tmp_path):
    delta = erased / "erasure.safetensors"
    code, _, _ = run(
        *("erase", model, "-c", "van=art", "--extends", delta, "--save", "delta"),
        *("-o", tmp_path / "both", "--quiet"),
    )
    both = Erasure.load(tmp_path / "both" / "erasure.safetensors")
    assert code == 0 and [c.target for c in both.concepts] == ["cat", "van"]
    assert both.config == Erasure.load(delta).config and both.provenance["preserve"] == ["dog"]
    code, out, _ = run(
        *("erase", model, "-c", "van=art", "--extends", delta, "--dry-run"),
        *("-o", tmp_path / "plan", "--quiet"),
    )
    assert code == 0 and "cat" in out and "van" in out
    code, out, _ = run(
        *("erase", model, "-c", "van=art", "--extends", delta, "--seed", "7", "--dry-run"),
        *("-o", tmp_path / "plan", "--quiet"),
    )
    assert code == 0 and "without noise alignment, seed 7" in out, "the other settings stay"
    missing = tmp_path / "none.safetensors"
    code, _, err = run("erase", model, "-c", "van", "--extends", missing, "-o", tmp_path / "no")
    assert code and str(missing) in err
