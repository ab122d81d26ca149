"""The LoRA stage: it learns, it leaves the model alone, and it is kept only where it helps."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from child import child_environment
from safetensors.torch import load_file, save_file
from tiny_alignment import CONFIG, UNCHECKED, Words, kept_in, run, trained_on
from tiny_models import tiny_pipeline

from realera_fast import embedded
from realera_fast.alignment import Trainer, WindowFiller, check, find_scheduler
from realera_fast.alignment.check import AlignmentScore
from realera_fast.runtime import CheckpointError, checkpoint
from realera_fast.solver import ConceptMap
from realera_fast.text import TextModel, align


@pytest.fixture(scope="module")
def parts():
    pipe = tiny_pipeline()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    return pipe, text


def same(first, second) -> bool:
    return list(first.lora) == list(second.lora) and all(
        torch.equal(factors.down, second.lora[name].down)
        and torch.equal(factors.up, second.lora[name].up)
        for name, factors in first.lora.items()
    )


def test_training_reduces_the_loss_and_leaves_the_model_alone(parts):
    pipe, _ = parts
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    modules = [id(m) for m in pipe.unet.modules()]
    processors = dict(pipe.unet.attn_processors)
    pipe.unet.conv_in.requires_grad_(False)
    pipe.unet.train()
    config = dataclasses.replace(UNCHECKED, steps=60, gradient_checkpointing=True)
    result = run(parts, config)
    # Every loss is of other noise and other starts: compare means, not single steps.
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])
    assert min(result.held_back) < 0.8 * result.held_back[0]
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [id(m) for m in pipe.unet.modules()] == modules
    assert pipe.unet.attn_processors == processors
    assert {n for n, p in pipe.unet.named_parameters() if not p.requires_grad} == {
        "conv_in.weight",
        "conv_in.bias",
    }
    assert pipe.unet.training and not pipe.unet.is_gradient_checkpointing
    pipe.unet.requires_grad_(True).eval()


def test_same_seed_same_factors_and_another_seed_others(parts):
    first, second, third = run(parts, UNCHECKED), run(parts, UNCHECKED), run(parts, UNCHECKED, 1)
    assert first.losses == second.losses and first.losses != third.losses
    assert same(first, second) and not same(first, third)


def test_the_global_random_state_is_left_alone(parts):
    state = torch.get_rng_state()
    run(parts, dataclasses.replace(UNCHECKED, steps=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["gaussian", "offset", "none"])
def test_every_kind_of_mining_trains(parts, mode):
    config = dataclasses.replace(UNCHECKED, steps=2, negative_guidance=0.5)
    assert len(run(parts, config, mode=mode).losses) == 2


@pytest.mark.parametrize("missing", ["beyond_scale", "preserve_scale"])
def test_terms_can_be_left_out(parts, missing):
    config = dataclasses.replace(UNCHECKED, steps=2, **{missing: 0.0})
    assert len(run(parts, config).losses) == 2


def test_queries_and_outputs_can_have_factors(parts):
    config = dataclasses.replace(UNCHECKED, target_modules=("to_q", "to_out.0", "to_v"))
    factors = run(parts, config).lora
    leaves = {name.split("attn2.")[1] for name in factors}
    assert leaves == {"to_q", "to_out.0", "to_v"}
    assert all(f.up.abs().max() > 0 for f in factors.values())


def test_self_attention_can_have_factors(parts):
    targets = ("to_v", "attn1.to_k", "attn1.to_out.0")
    config = dataclasses.replace(UNCHECKED, target_modules=targets)
    factors = run(parts, config).lora
    layers = {name.split("transformer_blocks.0.")[1] for name in factors}
    assert layers == {"attn2.to_v", "attn1.to_k", "attn1.to_out.0"}
    assert all(f.up.abs().max() > 0 for f in factors.values())


@pytest.mark.parametrize(
    ("aligned", "better"),
    [
        (AlignmentScore(0.2, 0.5, 0.1), True),
        (AlignmentScore(0.5, 0.2, 0.1), True),
        (AlignmentScore(0.7, 0.5, 0.1), False),
        (AlignmentScore(0.2, 0.2, 0.3), False),
        # Hardly any less is none.
        (AlignmentScore(0.46, 0.46, 0.1), False),
    ],
)
def test_adapters_stay_only_where_held_back_pictures_improve(parts, monkeypatch, aligned, better):
    closed = AlignmentScore(0.5, 0.5, 0.2)
    scores = {"edited": closed, "aligned": aligned}
    monkeypatch.setattr(check.HeldOutCheck, "score", lambda self, model: scores[model])
    result = run(parts)
    assert result.kept is better and bool(result.lora) is better


def test_a_little_drift_of_the_rest_is_no_harm():
    before = AlignmentScore(0.5, 0.5, 0.0)
    assert check.is_better(before, AlignmentScore(0.1, 0.1, 0.1))
    assert not check.is_better(before, AlignmentScore(0.1, 0.1, 0.11))


def test_what_an_adversary_brings_back_counts_where_it_is_asked():
    before, after = AlignmentScore(0.0, 0.1, 0.2, 0.9), AlignmentScore(0.0, 0.1, 0.2, 0.1)
    assert check.is_better(before, after, worst=True) and not check.is_better(before, after)
    # Holding an attack may cost something, and no more.
    dear = [dataclasses.replace(after, preserve=moved) for moved in (0.34, 0.36)]
    assert [check.is_better(before, each, worst=True) for each in dear] == [True, False]
    for first, then, kept in ((0.6, 0.59, True), (0.6, 0.6, False), (0.0, 0.1, True)):
        scores = (dataclasses.replace(before, worst=worst) for worst in (first, then))
        assert check.is_better(*scores, worst=True) is kept
    # The name may lose its coherence, and must not be seen.
    for target, kept in ((0.6, True), (0.8, False)):
        assert (
            check.is_better(before, dataclasses.replace(after, target=target), worst=True) is kept
        )


def test_scores_of_a_model_that_is_as_it_was():
    pipe = embedded.load_pipeline()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    templates = ["a photo of a {}", "a {}"]
    config = dataclasses.replace(
        CONFIG,
        steps=1,
        learning_rate=1e-6,
        evaluation_steps=0,
        batch_size=2,
        trajectories=2,
        sampling_steps=2,
        check_seeds=1,
        check_sampling_steps=5,
    )
    words = Words(align(text, word, "house", templates) for word in ("rabbit", "bunny"))
    result = trained_on((pipe, text), words, config, preserve=("a ship", "a tree"))
    # No closed form: the edited model is the original, so nothing is erased and nothing harmed.
    assert result.closed_form.target == pytest.approx(1.0)
    assert result.closed_form.neighbor == pytest.approx(1.0)
    assert result.closed_form.preserve == 0.0
    assert result.aligned.left == pytest.approx(1.0, abs=1e-2) and not result.kept


def test_scores_of_a_model_that_draws_the_anchor():
    pipe = embedded.load_pipeline()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    rabbit, house = text.encode(["a photo of a rabbit", "a photo of a house"])
    # Sends the rabbit's last rows to the house's, whatever that does to the rest.
    source, goal = rabbit[1:].double(), house[1:].double()
    left = torch.linalg.pinv(source) @ (goal - source)
    u, s, vh = torch.linalg.svd(left.T, full_matrices=False)
    moving = ConceptMap(u[:, :76].float(), (s[:76, None] * vh[:76]).float())
    config = dataclasses.replace(
        CONFIG,
        steps=1,
        learning_rate=1e-6,
        evaluation_steps=0,
        batch_size=2,
        trajectories=2,
        sampling_steps=2,
        check_seeds=1,
        check_sampling_steps=5,
    )
    words = Words([align(text, "rabbit", "house", ["a photo of a {}"])])
    result = trained_on(
        (pipe, text), words, config, preserve=("a ship", "a tree"), concept_map=moving
    )
    assert result.closed_form.target < 0.1


@pytest.mark.parametrize("gone", [AlignmentScore(0.0, 0.4, 0.3), AlignmentScore(0.4, 0.0, 0.3)])
def test_nothing_is_trained_where_nothing_shows(parts, monkeypatch, gone):
    monkeypatch.setattr(check.HeldOutCheck, "score", lambda self, model: gone)
    result = run(parts)
    assert not result.kept and not result.losses and result.aligned is None
    assert result.stopped == "the closed form left nothing that shows"
    assert result.to_dict()["steps"] == 0


def test_it_is_trained_where_a_word_near_the_name_shows(parts, monkeypatch):
    monkeypatch.setattr(
        check.HeldOutCheck, "score", lambda self, model: AlignmentScore(0.0, 0.41, 0.3)
    )
    assert run(parts).losses


def test_training_stops_where_held_back_prompts_improve_no_more(parts):
    config = dataclasses.replace(
        UNCHECKED, steps=50, evaluation_steps=1, patience=2, learning_rate=0.05
    )
    result = run(parts, config)
    assert "no improvement" in result.stopped and len(result.losses) < 50
    assert len(result.held_back) == len(result.losses) + 1


def test_divergence_keeps_the_last_good_factors_and_says_so(parts, caplog, monkeypatch):
    good = run(parts, dataclasses.replace(UNCHECKED, evaluation_steps=4))
    step = Trainer.step

    def poisoned(self, window, number):
        if number == 8:
            with torch.no_grad():
                self.lora.up.fill_(float("nan"))
        return step(self, window, number)

    monkeypatch.setattr(Trainer, "step", poisoned)
    result = run(parts, dataclasses.replace(UNCHECKED, evaluation_steps=4))
    assert result.stopped.startswith("diverged: loss nan") and "diverged" in caplog.text
    assert len(result.losses) == 8 and result.losses == good.losses[:8]
    assert result.kept and all(f.up.isfinite().all() for f in result.lora.values())


def test_a_hopeless_run_leaves_the_closed_form_alone(parts):
    result = run(parts, dataclasses.replace(CONFIG, learning_rate=1e30))
    assert not result.kept and not result.lora


def test_interrupt_leaves_the_model_alone(parts, monkeypatch):
    pipe, _ = parts
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(parts, UNCHECKED)
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert pipe.unet.attn_processors == processors
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_memory_does_not_grow_with_the_number_of_words(parts, monkeypatch):
    _, text = parts
    word = align(text, "cat", "dog", ["a photo of a {}", "{}"])
    asked, held = [], []

    class Many:
        named = 1000

        def __len__(self):
            return 3000

        def __getitem__(self, number):
            asked.append(number)
            return word

    fill = WindowFiller.fill

    def measured(self, *arguments, **options):
        window = fill(self, *arguments, **options)
        held.append(sum(tensor.nbytes for tensor in window.tensors().values()))
        return window

    monkeypatch.setattr(WindowFiller, "fill", measured)
    some = AlignmentScore(0.5, 0.5, 0.0)
    monkeypatch.setattr(check.HeldOutCheck, "score", lambda self, model: some)
    trained_on(parts, Many(), preserve=("a ship",))
    assert len(set(held)) == 1
    assert len(asked) <= CONFIG.trajectories * (CONFIG.steps + 1) + 4 * CONFIG.check_words


# Checkpoints


def test_resuming_a_finished_run_changes_nothing(parts, tmp_path):
    first = run(parts, UNCHECKED, execution=kept_in(tmp_path))
    again = run(parts, UNCHECKED, execution=kept_in(tmp_path, resume=True))
    assert same(first, again) and first.losses == again.losses
    assert [path.name for path in tmp_path.iterdir()] == [f"{checkpoint.ALIGNMENT}.safetensors"]


def test_a_checkpoint_of_another_run_is_refused(parts, tmp_path):
    config = dataclasses.replace(UNCHECKED, steps=1)
    run(parts, config, execution=kept_in(tmp_path, "a"))
    with pytest.raises(CheckpointError, match="of another run"):
        run(parts, config, execution=kept_in(tmp_path, "b", resume=True))
    run(parts, config, execution=kept_in(tmp_path, "b"))
    run(parts, config, execution=kept_in(tmp_path, "b", resume=True))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "other"])
def test_a_broken_checkpoint_is_refused(parts, tmp_path, content):
    path = tmp_path / f"{checkpoint.ALIGNMENT}.safetensors"
    if content == "other":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        run(parts, UNCHECKED, execution=kept_in(tmp_path, resume=True))


KILLED = """
    import os, signal, traceback
    from pathlib import Path
    import torch
    from realera_fast.runtime import checkpoint
    from realera_fast.alignment.config import AlignmentConfig
    from realera_fast.alignment.trainer import Trainer
    from safetensors.torch import save_file
    from realera_fast.text.encoders import TextModel
    from tiny_alignment import kept_in, run
    from tiny_models import tiny_pipeline

    def trained(folder, out, kill_at):
        step = Trainer.step
        def told(self, window, number):
            result = step(self, window, number)
            print("step", number, flush=True)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        Trainer.step = told
        pipe = tiny_pipeline()
        config = AlignmentConfig(
            steps=9, refresh_steps=4, batch_size=4, trajectories=4, sampling_steps=4,
            check_seeds=0, evaluation_steps=2, learning_rate=2e-2, patience=9,
            adversary="worst", timesteps="discriminative",
            target_modules=("to_k", "to_v", "attn1.to_q", "attn1.to_v"),
        )
        result = run(
            (pipe, TextModel(pipe.text_encoder, pipe.tokenizer)), config, seed=3,
            mode="gaussian", execution=kept_in(Path(folder), resume=True),
        )
        assert 0 < len(result.timesteps) < 4
        factors = {{f"{{n}}.down": f.down for n, f in result.lora.items()}}
        factors |= {{f"{{n}}.up": f.up for n, f in result.lora.items()}}
        factors["losses"] = torch.tensor(result.losses, dtype=torch.float64)
        save_file(factors, out)

    checkpoint.SECONDS = 0.0
    for job in {jobs!r}:
        # Each in a process of its own, without importing everything again.
        child = os.fork()
        if child == 0:
            try:
                trained(*job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def children(*jobs: tuple[str, str, int | None]) -> list[list[str]]:
    """Runs trainings one after the other: folder, file for the factors, step to be killed after."""
    code = textwrap.dedent(KILLED).format(jobs=jobs)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: list[list[str]] = [[]]
    for line in result.stdout.splitlines():
        if not line.startswith("status"):
            found[-1].append(line)
            continue
        killed = jobs[len(found) - 1][2] is not None
        assert line == f"status {-signal.SIGKILL if killed else 0}", result.stderr
        found.append([])
    return found[:-1]


def test_killed_at_any_moment_the_same_factors_come_out(tmp_path):
    folder, out = str(tmp_path / "killed"), str(tmp_path / "killed.safetensors")
    whole, *seen = children(
        (str(tmp_path / "whole"), str(tmp_path / "whole.safetensors"), None),
        *((folder, out, number) for number in (1, 4, 6, None)),
    )
    assert whole == [f"step {i}" for i in range(9)]
    # It went on where it was, not from the start.
    assert seen[0][0] == "step 0" and all(part[0] != "step 0" for part in seen[1:])
    first, second = (load_file(tmp_path / f"{n}.safetensors") for n in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_scheduler_is_found_beside_the_unet(parts, tmp_path, caplog):
    pipe, _ = parts
    pipe.save_pretrained(tmp_path)
    unet = type(pipe.unet).from_pretrained(tmp_path / "unet")
    assert find_scheduler(unet).config.beta_end == pipe.scheduler.config.beta_end
    assert find_scheduler(pipe.unet) is None
