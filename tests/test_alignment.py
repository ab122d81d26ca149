"""The LoRA stage: it learns, it leaves the model alone, and it is kept only where it helps."""

import dataclasses

import pytest
import torch
from tiny_models import tiny_pipeline

from realera_fast import alignment
from realera_fast.alignment import AlignmentConfig, AlignmentScore, align_noise, find_scheduler
from realera_fast.concept_map import ConceptMap
from realera_fast.mining import MiningConfig
from realera_fast.pairs import align
from realera_fast.text import TextModel

CONFIG = AlignmentConfig(
    steps=12, batch_size=4, trajectories=4, sampling_steps=4, check_seeds=2, learning_rate=2e-2
)


@pytest.fixture(scope="module")
def parts():
    pipe = tiny_pipeline()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    return pipe, text


def run(parts, config=CONFIG, seed=0, mode="vocabulary"):
    pipe, text = parts
    return align_noise(
        pipe.unet,
        pipe.scheduler,
        ConceptMap.identity(text.width),
        named=[align(text, "cat", "dog", ["a photo of a {}", "{}"])],
        neighbors=[],
        preserve=text.encode(["a ship", "a tree", "a horse"]),
        empty=text.encode([""]),
        config=config,
        mining_config=MiningConfig(mode=mode),
        seed=seed,
        progress=False,
    )


def test_training_reduces_the_loss_and_leaves_the_model_alone(parts):
    pipe, _ = parts
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    modules = [id(m) for m in pipe.unet.modules()]
    config = dataclasses.replace(CONFIG, steps=60, check_seeds=0)
    result = run(parts, config)
    # Every loss is of other noise and other starts: compare means, not single steps.
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [id(m) for m in pipe.unet.modules()] == modules
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_same_seed_same_factors_and_another_seed_others(parts):
    config = dataclasses.replace(CONFIG, check_seeds=0)
    first, second, third = run(parts, config), run(parts, config), run(parts, config, seed=1)
    assert first.losses == second.losses and first.losses != third.losses
    for name, factors in first.lora.items():
        assert torch.equal(factors.down, second.lora[name].down)
        assert torch.equal(factors.up, second.lora[name].up)


@pytest.mark.parametrize("mode", ["gaussian", "offset", "none"])
def test_every_kind_of_mining_trains(parts, mode):
    config = dataclasses.replace(CONFIG, steps=2, check_seeds=0, negative_guidance=0.5)
    assert len(run(parts, config, mode=mode).losses) == 2


@pytest.mark.parametrize(
    ("aligned", "better"),
    [
        (AlignmentScore(0.2, 0.1), True),
        (AlignmentScore(0.7, 0.1), False),
        (AlignmentScore(0.2, 0.2), False),
    ],
)
def test_adapters_stay_only_where_held_back_pictures_improve(parts, monkeypatch, aligned, better):
    closed = AlignmentScore(0.5, 0.1)
    monkeypatch.setattr(alignment, "_check", lambda *_: (closed, aligned))
    result = run(parts)
    assert result.kept is better and bool(result.lora) is better


def test_scores_measure_the_way_to_the_anchor(parts):
    result = run(parts)
    # No closed form: the edited model is the original, so nothing is erased and nothing harmed.
    assert result.closed_form.target == pytest.approx(1.0, abs=1e-5)
    assert result.closed_form.preserve == pytest.approx(0.0, abs=1e-9)
    assert result.aligned.target != result.closed_form.target


def test_divergence_keeps_the_closed_form_and_says_so(parts, caplog):
    config = dataclasses.replace(CONFIG, learning_rate=1e30)
    result = run(parts, config)
    assert not result.kept and not result.lora
    assert "diverged" in caplog.text


def test_interrupt_takes_the_adapters_out(parts, monkeypatch):
    pipe, _ = parts
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_scheduler_is_found_beside_the_unet(parts, tmp_path, caplog):
    pipe, _ = parts
    pipe.save_pretrained(tmp_path)
    unet = type(pipe.unet).from_pretrained(tmp_path / "unet")
    assert find_scheduler(unet).config.beta_end == pipe.scheduler.config.beta_end
    assert "none was found" not in caplog.text
    assert find_scheduler(pipe.unet).config.beta_schedule == "scaled_linear"
    assert "pass scheduler=pipe.scheduler" in caplog.text


@pytest.mark.parametrize(
    "field", ["steps", "rank", "batch_size", "trajectories", "sampling_steps", "learning_rate"]
)
def test_config_names_the_bad_field(field):
    with pytest.raises(ValueError, match=field):
        AlignmentConfig(**{field: 0})
