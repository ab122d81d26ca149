"""What the student is asked of a concept, and down-projections that are not trained."""

import dataclasses

import pytest
import torch
from tiny_alignment import UNCHECKED, run
from tiny_families import sd3
from tiny_models import tiny_pipeline, tiny_unet
from torch import Tensor

from realera_fast import EraseConfig, erase
from realera_fast.alignment import AlignmentConfig, Trainer, new_factors
from realera_fast.alignment.adversary import AdversarialTarget
from realera_fast.alignment.losses import LOSSES, TargetLoss
from realera_fast.alignment.null_space import null_space_down
from realera_fast.alignment.trainer import Batch
from realera_fast.mining import Region
from realera_fast.models import projections
from realera_fast.runtime import Processes
from realera_fast.solver import ConceptMap
from realera_fast.text import TextModel
from realera_fast.unet import LoraParameters, SharedUNet

WIDTH = 16


def predictions(count: int = 5) -> tuple[Tensor, Tensor]:
    """What the original predicts for an anchor and a concept."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, count, 4, 8, 8, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize(
    ("guidance", "eta"), [(0.0, 0.5), (0.75, 0.5), (1.5, 0.75), (2.9, 0.75), (3.0, 1.0)]
)
def test_the_triplet_ends_where_the_guided_loss_leads(guidance, eta):
    anchor, concept = predictions()
    goal = anchor - guidance * (concept - anchor)
    loss = TargetLoss("triplet", guidance, eta)
    gap = (anchor - concept).square().flatten(1).mean(1)

    def at(place: float) -> Tensor:
        """0 is the anchor, 1 the concept."""
        return loss(anchor + place * (concept - anchor), goal, concept)

    torch.testing.assert_close(at(-guidance - 0.1), torch.zeros_like(gap))
    assert bool((at(-guidance).abs() < 1e-12).all()) and bool((at(-guidance + 0.01) > 0).all())
    margin = eta * (1 + guidance) ** 2 - guidance**2
    # Half-way, where distances as they are have the hinge, and at the concept.
    torch.testing.assert_close(at(0.5), gap * (0.25 - eta * 0.25 + margin))
    torch.testing.assert_close(at(1.0), gap * (1.0 + margin))
    # All the way from the concept there is something to do.
    way = [at(1.0 - 0.05 * step * (1 + guidance)) for step in range(20)]
    assert bool((torch.stack(way) > 0).all())


def test_the_triplet_has_a_way_to_go_from_the_concept_itself():
    anchor, concept = predictions()
    student = concept.clone().requires_grad_()
    TargetLoss("triplet", 0.5, 1.0)(
        student, anchor - 0.5 * (concept - anchor), concept
    ).sum().backward()
    way = (anchor - concept).flatten(1)
    down = -student.grad.flatten(1)
    torch.testing.assert_close(torch.cosine_similarity(down, way), torch.ones(5).double())


def test_other_losses_are_the_mean_squared_error():
    anchor, concept = predictions()
    expected = (anchor - concept).square().flatten(1).mean(1)
    for name in ("guided", "adversarial_target"):
        torch.testing.assert_close(TargetLoss(name, 0.3)(concept, anchor, None), expected)


def shared_unet() -> SharedUNet:
    unet = tiny_unet(WIDTH).requires_grad_(False)
    lora = LoraParameters(projections(unet), {}, r=2, lora_alpha=2.0, seed=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        lora.up.copy_(0.3 * torch.randn(lora.up.shape, generator=generator))
    left, right = (0.3 * torch.randn(WIDTH, 2, generator=generator) for _ in "ab")
    return SharedUNet(unet, ConceptMap(left, right.mT.contiguous()), lora)


def test_an_adversarial_target_leads_away_from_what_the_student_still_shows():
    shared = shared_unet()
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(6, 4, 8, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (6,), generator=generator)
    states = torch.randn(6, 7, WIDTH, generator=generator)
    anchors = torch.randn(6, 7, WIDTH, generator=generator)
    guidance = 0.5
    with shared.installed(), torch.no_grad():

        def predicted(states: Tensor, variant: str) -> Tensor:
            return shared.predict(latents, timesteps, shared.condition(states, variant))

        shown, anchor = predicted(states, "original"), predicted(anchors, "original")
        student = predicted(states, "aligned")
        plain = anchor - guidance * (shown - anchor)
        target = AdversarialTarget(shared, Region(-1.0, 1.0, 0.05), guidance)
        goal = target.goal(latents, timesteps, states, plain, shown, asked=states)
    concept = (anchor * (1 + guidance) - goal) / guidance
    middle = (student + shown) / 2
    before, after = ((x - middle).square().flatten(1).mean(1) for x in (shown, concept))
    assert bool((after <= before * (1 + 1e-4)).all()) and bool((after < 0.999 * before).any())


def moments() -> tuple[Tensor, Tensor]:
    """Of text that stays, and of two words that leave."""
    generator = torch.Generator().manual_seed(1)
    many, few = (torch.randn(n, WIDTH, generator=generator).double() for n in (12, 2))
    return many.T @ many / 12, few.T @ few / 2


def test_frozen_rows_pass_the_words_and_hardly_what_stays():
    staying, leaving = moments()
    rows = null_space_down(staying, leaving, 2).double()

    def passed(moments: Tensor, rows: Tensor) -> Tensor:
        return ((rows @ moments) * rows).sum(1)

    # 12 rows leave 4 of 16 directions, and the words are partly there.
    assert bool((passed(staying, rows) < 0.01 * passed(leaving, rows)).all())
    drawn = leaving.diagonal().mean() / 3
    torch.testing.assert_close(passed(leaving, rows), drawn.expand(2), rtol=1e-4, atol=0)


def test_of_fewer_words_than_rows_all_rows_are_finite():
    staying, leaving = moments()
    rows = null_space_down(staying, leaving, 5)
    assert bool(rows.isfinite().all()) and bool((rows[:2].norm(dim=1) > 0).all())
    assert not rows[2:].any()
    assert bool(null_space_down(torch.zeros(4, 4), torch.eye(4), 2).isfinite().all())


def test_frozen_rows_are_no_parameters():
    unet, options = tiny_unet(WIDTH), AlignmentConfig(down_projection="null_space", r=2)
    lora = new_factors(unet, options, 0, moments())
    assert lora.parameters() == [lora.up]
    expected = null_space_down(*moments(), 2)
    assert all(torch.equal(factors.down, expected) for factors in lora.factors().values())


@pytest.fixture(scope="module")
def parts():
    pipe = tiny_pipeline()
    return pipe, TextModel(pipe.text_encoder, pipe.tokenizer)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_falls_in_training(parts, loss):
    config = dataclasses.replace(UNCHECKED, loss=loss, steps=30, evaluation_steps=10)
    found = run(parts, config)
    assert found.held_back[-1] < found.held_back[0]


def test_training_ends_where_nothing_is_left_to_move(parts, monkeypatch):
    looks = []
    plain = Trainer.look

    def look(self, held_back):
        loss = plain(self, held_back)
        looks.append(loss)
        self.is_reached = len(looks) == 3
        return loss

    monkeypatch.setattr(Trainer, "look", look)
    config = dataclasses.replace(UNCHECKED, loss="triplet", evaluation_steps=2, steps=40)
    found = run(parts, config)
    assert found.stopped == "held-back prompts are where they should be after 4 steps"
    assert len(found.losses) == 4


def test_a_look_with_no_target_left_ends_training(monkeypatch):
    found = iter([torch.tensor([0.1, 0.0, 0.0]), torch.zeros(3)])
    monkeypatch.setattr(
        "realera_fast.alignment.trainer.loss_of", lambda *_: (torch.tensor(1.0), next(found))
    )
    it = Trainer(
        shared_unet(), AlignmentConfig(loss="triplet"), None, seed=0, processes=Processes()
    )
    monkeypatch.setattr(it, "batch", lambda *_: Batch(*[torch.zeros(1)] * 6))
    for reached in (False, True):
        it.look(None)
        assert it.is_reached is reached


def test_settings_with_no_effect_are_refused():
    with pytest.raises(ValueError, match=r"triplet_eta.*0.6, got 0.5; raise it"):
        AlignmentConfig(loss="triplet", triplet_eta=0.5, negative_guidance=1.5)
    with pytest.raises(ValueError, match="adversarial_target.*raise it"):
        AlignmentConfig(loss="adversarial_target", negative_guidance=0.0)
    with pytest.raises(ValueError, match=r"AlignmentConfig.r: expected at most .* 16"):
        null_space_down(*moments(), WIDTH + 1)


def test_a_whole_erasure_keeps_frozen_rows_as_they_are(tmp_path):
    pipe = tiny_pipeline()
    options = dict(steps=4, evaluation_steps=0, check_seeds=0, sampling_steps=2, trajectories=2)
    config = EraseConfig(alignment=AlignmentConfig(down_projection="null_space", **options))
    erasure = erase(pipe, ["cat"], config=config, progress=False)
    downs = [factors.down for factors in erasure.lora.values()]
    assert downs and all(torch.equal(down, downs[0]) for down in downs)


def test_rows_are_frozen_where_their_input_is_known():
    with pytest.raises(ValueError, match="null_space.*to_k"):
        AlignmentConfig(down_projection="null_space", target_modules=("to_k", "to_q"))
    with pytest.raises(ValueError, match="null_space.*attn1.to_k"):
        AlignmentConfig(down_projection="null_space", target_modules=("to_k", "attn1.to_k"))
    pipe = sd3()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    config = EraseConfig(alignment=AlignmentConfig(down_projection="null_space"))
    with pytest.raises(ValueError, match="down_projection.*SD3Transformer2DModel.*trained"):
        erase(pipe, ["cat"], config=config)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
