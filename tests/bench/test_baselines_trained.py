"""The baselines that train: each follows its paper's loss, on a tiny pipeline."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from attacks import concept_inversion
from attacks.denoising import tokens_of
from baselines import adv_unlearn, erase_flow, esd, gem, mace_lora, race, stereo, training
from baselines.phrases import Phrases, label, matrices
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor
from tiny_models import tiny_pipeline
from torch.nn import functional

from realera_fast import Concept

SHORT = esd.Settings(iterations=1, sampling_steps=2, together=1, learning_rate=1e-3)
SMALL = {
    race: race.Settings(SHORT, 2, 2, learning_rate=1e-3, adversary_steps=2, sampling_steps=2),
    adv_unlearn: adv_unlearn.Settings(
        iterations=2,
        warm_up=1,
        attack_steps=2,
        retain_batch=2,
        retain_prompts=2,
        sampling_steps=2,
        together=2,
    ),
    stereo: stereo.Settings(
        rounds=1,
        search=SHORT,
        inversion=concept_inversion.Settings(steps=1, batch_size=1, start="art"),
        pictures=1,
        iterations=2,
        sampling_steps=2,
    ),
    erase_flow: erase_flow.Settings(iterations=2, batch_size=1, sampling_steps=3),
    gem: gem.Settings(iterations=2, states=2, sampling_steps=2),
    mace_lora: mace_lora.Settings(
        preserve_scale=0.01, steps=2, learning_rate=1e-2, pictures=2, sampling_steps=2
    ),
}
METHODS = pytest.mark.parametrize("module", SMALL, ids=lambda m: m.__name__.split(".")[-1])
CONCEPTS = [Concept("cat"), Concept("ship")]


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(Phrases, "kept", lambda self, concepts: ("dog", "tree", "horse"))
    return tiny_pipeline()


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    now = model.state_dict()
    assert list(now) == list(before), "an adapter was left"
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def may_train(module, name):
    if module is stereo:
        return stereo.is_trained(name)
    if module is erase_flow:
        return any(f".{part}.to_" in name for part in ("attn1", "attn2"))
    if module is gem:
        return name.endswith(("attn2.to_q.weight", "attn2.to_k.weight"))
    if module is mace_lora:
        return name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    return module is race and ".attn2." in name


@METHODS
def test_the_defaults_come_first_in_a_sweep_and_no_label_is_twice(module):
    assert module.SWEEP[0] == module.Settings()
    labels = [label(settings) for settings in module.SWEEP]
    assert labels[0] == getattr(module.Settings, "defaults", "authors'")
    assert len(set(labels)) == len(labels)


@METHODS
def test_trains_what_its_paper_trains_and_follows_its_seed(module, pipe):
    models = (pipe.unet, pipe.text_encoder)
    before = [values(model) for model in models]
    found = []
    for seed in (0, 0, 1):
        for model, weights in zip(models, before, strict=True):
            model.load_state_dict(weights)
        module.erase(pipe, CONCEPTS[: 1 if module is stereo else 2], SMALL[module], seed)
        found.append([values(model) for model in models])
    unet, encoder = (changed(m, b) for m, b in zip(models, before, strict=True))
    if module is adv_unlearn:
        assert not unet and encoder and not any("embeddings" in name for name in encoder)
    else:
        assert not encoder and unet and all(may_train(module, name) for name in unet)
    for place in range(2):
        first, again, other = (values_of[place] for values_of in found)
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        assert all(value.isfinite().all() for value in first.values())
        differ = any(not torch.equal(value, other[name]) for name, value in first.items())
        assert differ == (place == (module is adv_unlearn))
    assert not any(model.training or any(m.training for m in model.modules()) for model in models)
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    "module", [adv_unlearn, gem, mace_lora], ids=["copies", "adapter", "fused"]
)
def test_half_precision_stays(module, pipe):
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        model.to(torch.bfloat16)
    module.erase(pipe, CONCEPTS[:1], SMALL[module], 0)
    for model in (pipe.unet, pipe.text_encoder):
        assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


def noised(pipe, count=2, word=1):
    generator = torch.Generator().manual_seed(3)
    x, start = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
    return training.Noised(x, torch.tensor([200, 700])[:count], torch.full((count,), word), start)


def test_the_worst_embedding_stays_near_and_explains_the_noise_better(pipe):
    here = noised(pipe)
    center = training.encode(pipe, ["cat", "ship"])
    size = float(center.square().mean().sqrt())

    def misfit(points):
        out = training.predict(pipe.unet, here.x, here.t, points)
        return (out - here.start).square().flatten(1).sum(1)

    def found(steps):
        settings = race.Settings(adversary_steps=steps, adversary_distance=0.2)
        return race.worst(pipe, here, center, settings, torch.Generator().manual_seed(0))

    start, moved, far = found(0), found(1), found(5)
    for points in (start, moved, far):
        assert (points - center).abs().max() <= 0.2 * size * (1 + 1e-5)
        assert points.min() >= center.min() and points.max() <= center.max()
    assert (misfit(far) < misfit(start)).all()
    # One step is a quarter of the distance against the gradient's sign, row by row.
    start.requires_grad_(True)
    (gradient,) = torch.autograd.grad(misfit(start)[0], [start])
    inside = (start - 0.05 * size * gradient.sign()).detach()
    inside = inside.clamp(center - 0.2 * size, center + 0.2 * size)
    wanted = inside.clamp(center.min(), center.max())[0]
    # Where the gradient is rounding its sign may differ.
    assert ((moved[0] - wanted).abs() < 1e-5).float().mean() > 0.99


def test_a_velocity_is_turned_into_the_noise_it_stands_for():
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    t = torch.tensor([10, 900])
    clean, eps = torch.randn(2, 2, 4, 8, 8)
    x, v = scheduler.add_noise(clean, eps, t), scheduler.get_velocity(clean, eps, t)
    torch.testing.assert_close(training.noise_in(scheduler, v, x, t), eps, rtol=1e-3, atol=1e-4)


def test_a_prefix_stands_before_the_first_token(pipe):
    prefixed = adv_unlearn._Prefixed(pipe, ["cat"], torch.Generator().manual_seed(0))
    points = adv_unlearn.trajectories(
        pipe, ["cat"], SMALL[adv_unlearn], torch.Generator().manual_seed(0)
    )[0]
    losses = prefixed.attack(pipe.unet, "cat", points[:1] * 6, 0.3)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        found = prefixed.encode("cat")
        # The same, as a word of the vocabulary.
        table = pipe.text_encoder.get_input_embeddings().weight
        (place,) = pipe.tokenizer("a", add_special_tokens=False).input_ids
        table[place] = prefixed._vectors["cat"][0]
        plain = pipe.text_encoder(tokens_of(pipe, ["a cat"]))[0]
    torch.testing.assert_close(found, plain)


def test_points_are_what_the_model_says_of_its_own_trajectory(pipe):
    settings = SMALL[adv_unlearn]
    generator = torch.Generator().manual_seed(0)
    first, second = adv_unlearn.trajectories(pipe, ["cat", "dog"], settings, generator)[1]
    states = training.encode(pipe, ["", "dog"])
    with torch.no_grad():
        shown = training.predict(pipe.unet, first.x, first.t, states[1:])
        out = training.guided(pipe.unet, first.x, first.t, states, settings.guidance_scale)
    torch.testing.assert_close(first.shown, shown, rtol=1e-4, atol=1e-4)
    pipe.scheduler.set_timesteps(settings.sampling_steps)
    following = pipe.scheduler.step(out, first.t, first.x).prev_sample
    torch.testing.assert_close(second.x, following, rtol=1e-4, atol=1e-4)


def test_stereo_leads_to_the_sentence_and_away_from_the_mean_of_all_that_goes(pipe):
    here = noised(pipe, 1)
    gone = training.encode(pipe, ["cat", "kitten", "animal"])
    empty, sentence = training.encode(pipe, ["", "a cat"]).split(1)
    settings = stereo.Settings(anchor_guidance=2.0, negative_guidance=0.5)
    found = stereo.composed(pipe.unet, here.x, here.t, (empty, sentence, gone), settings)

    def says(states):
        with torch.no_grad():
            return training.predict(pipe.unet, here.x, here.t, states)

    free = says(empty)
    away = sum(says(gone[i : i + 1]) - free for i in range(3)) / 3
    wanted = free + 2.0 * (says(sentence) - free) - 0.5 * away
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_transitions_are_those_of_ddim_with_all_of_its_noise(kind):
    scheduler = DDIMScheduler(
        prediction_type=kind, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(5)
    steps = erase_flow.Steps(scheduler, 5)
    assert torch.equal(steps.times, scheduler.timesteps)
    x, out, eps = torch.randn(3, 1, 4, 8, 8)
    for place, t in enumerate(scheduler.timesteps):
        mean, deviation = steps.forward(out, x, torch.tensor([place]))
        wanted = scheduler.step(out, t, x, eta=1.0, variance_noise=eps).prev_sample
        torch.testing.assert_close(mean + deviation * eps, wanted, rtol=1e-4, atol=1e-4)
        now, later = (scheduler.alphas_cumprod[i] for i in (t, max(0, t - 1000 // 5)))
        mean, deviation = steps.backward(x, torch.tensor([place]))
        torch.testing.assert_close(mean, x * (now / later).sqrt())
        assert float(deviation) == pytest.approx(float((1 - now / later).sqrt()))


def density(eps, deviation):
    """`[n]`: of these numbers, in deviations from the mean."""
    return -deviation.log().flatten() - (eps.square().flatten(1).mean(1) + math.log(math.tau)) / 2


def test_densities_are_of_the_steps_that_were_taken(pipe):
    steps = erase_flow.Steps(pipe.scheduler, 5)
    both = training.encode(pipe, ["", "", "cat", "cat"])
    path = erase_flow.sample(pipe.unet, steps, both, 3.0, torch.Generator().manual_seed(0))
    assert path.shape == (6, 2, 4, 8, 8)
    chosen = torch.tensor([1, 3])
    every = training.encode(pipe, [*[""] * 4, *["cat"] * 4])
    with torch.no_grad():
        forward, backward = erase_flow.log_densities(pipe.unet, steps, path, chosen, every, 3.0)
        for row, place in enumerate(chosen.tolist()):
            at = torch.tensor([place])
            out = training.guided(pipe.unet, path[place], steps.times[place], both, 3.0)
            mean, deviation = steps.forward(out, path[place], at)
            eps = (path[place + 1] - mean) / deviation
            wanted = density(eps, deviation)
            torch.testing.assert_close(forward[row], wanted, rtol=1e-3, atol=1e-3)
            assert 0.7 < float(eps.square().mean()) < 1.3
            mean, deviation = steps.backward(path[place + 1], at)
            eps = (path[place] - mean) / deviation
            wanted = density(eps, deviation)
            torch.testing.assert_close(backward[row], wanted, rtol=1e-3, atol=1e-3)


def test_the_last_fifth_of_the_steps_is_always_there():
    chosen = erase_flow.some_steps(20, torch.Generator().manual_seed(0)).tolist()
    assert chosen[4:] == [16, 17, 18, 19] and len(set(chosen)) == 8 and max(chosen[:4]) < 16


def test_states_are_paired_with_the_time_at_which_they_are_denoised(pipe):
    settings = gem.Settings(states=3, sampling_steps=4)
    both = training.encode(pipe, ["", "cat"])
    x, t = gem.begun(pipe, both, settings, torch.Generator().manual_seed(0))
    noise = training.noise(pipe.unet, 1, torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(4)
    assert torch.equal(t, pipe.scheduler.timesteps[:3]) and torch.equal(x[:1], noise)
    with torch.no_grad():
        for i in range(2):
            out = training.guided(pipe.unet, x[i : i + 1], t[i], both, settings.guidance_scale)
            following = pipe.scheduler.step(out, t[i], x[i : i + 1]).prev_sample
            torch.testing.assert_close(x[i + 1 : i + 2], following)


def test_the_triplet_asks_nothing_past_its_line_and_starts_with_a_gradient():
    wanted, shown = torch.zeros(1, 1, 1, 2), torch.tensor([4.0, 0.0]).view(1, 1, 1, 2)
    for place, eta, asked in ((3.0, 1.0, 2.0), (1.0, 1.0, 0.0), (1.0, 0.25, 0.25)):
        out = torch.tensor([place, 0.0]).view(1, 1, 1, 2)
        assert float(gem.triplet(out, wanted, shown, eta)) == asked
    out = shown.clone().requires_grad_(True)
    gem.triplet(out, wanted, shown, 0.0).sum().backward()
    assert torch.equal(out.grad.flatten(), torch.tensor([1.0, 0.0]))


def test_the_attention_that_is_read_is_the_models_own(pipe, monkeypatch):
    own, scores = [], Attention.get_attention_scores

    def recorded(self, query, key, mask=None):
        found = scores(self, query, key, mask)
        own.append(found)
        return found

    monkeypatch.setattr(Attention, "get_attention_scores", recorded)
    pipe.unet.set_attn_processor(AttnProcessor())
    states = training.encode(pipe, ["a cat"])
    with torch.no_grad(), mace_lora.attended(pipe.unet) as maps:
        training.predict(pipe.unet, torch.randn(1, 4, 8, 8), torch.tensor([300]), states)
    cross = [found for found in own if found.shape[-1] == states.shape[1]]
    assert maps and len(maps) == len(cross)
    for found, wanted in zip(maps, cross, strict=True):
        torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-6)
    assert not any(m._forward_hooks for m in pipe.unet.modules())


def test_what_counts_is_the_attention_inside_of_the_segment():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :] = 1.0
    found = torch.zeros(1, 2, 16, 1)
    found[:, :, 8:] = 0.5
    assert float(mace_lora.inside([found], mask)) == 0.0
    found[0, 1, :2] = 0.5
    assert float(mace_lora.inside([found, found], mask)) == pytest.approx(2 * 2 * 0.25)


def test_times_between_the_two_bounds_are_drawn():
    settings = mace_lora.Settings()
    share = mace_lora.focal(1000, settings)
    assert float(share.sum()) == pytest.approx(1.0, rel=1e-5)
    assert float(share[200:401].sum()) > 0.85 and int(share.argmax()) == 300
    # At a bound one of the two sigmoids is a half.
    assert float(share[200] / share[300]) == pytest.approx(0.5, rel=0.03)


def test_the_segment_is_what_the_background_is_not():
    y, x = torch.meshgrid(*[torch.linspace(0, 1, 64)] * 2, indexing="ij")
    background = torch.stack([0.5 + 0.4 * x, 0.9 - 0.3 * y, 0.6 + 0.2 * x * y], dim=-1)
    thing = torch.zeros(64, 64, dtype=torch.bool)
    thing[20:50, 15:40] = True
    picture = torch.where(thing[..., None], torch.tensor([0.1, 0.1, 0.6]), background)
    # A spot of the background's color in its middle.
    picture[30:33, 25:28] = background[30:33, 25:28]
    found = mace_lora.segments(torch.stack([picture, background]), 0.15)
    assert torch.equal(found[0], thing) and not found[1].any()


def test_a_lora_takes_attention_away_and_leaves_the_model_as_it_was(pipe):
    settings = mace_lora.Settings(steps=20, learning_rate=1e-2, pictures=2, sampling_steps=2)
    lesson = mace_lora.lesson(pipe, "cat", "object", settings, torch.Generator().manual_seed(0))
    assert lesson.tokens == slice(5, 6) and lesson.masks.any()
    before = values(pipe.unet)

    def attention():
        x = pipe.scheduler.add_noise(lesson.latents, torch.ones(2, 4, 8, 8), torch.tensor([300]))
        with torch.no_grad(), mace_lora.attended(pipe.unet) as maps:
            training.predict(pipe.unet, x, torch.tensor([300]), lesson.states.expand(2, -1, -1))
        return mace_lora.inside([found[..., lesson.tokens] for found in maps], lesson.masks)

    start = attention()
    changes = mace_lora.train(pipe, lesson, settings, torch.Generator().manual_seed(0), 0)
    assert not changed(pipe.unet, before)
    # The loss does not see the values of the layer that is called last.
    ranks = sorted(int(torch.linalg.matrix_rank(change)) for change in changes)
    assert ranks == [0, *[1] * (len(changes) - 1)]
    with torch.no_grad():
        for layer, change in zip(matrices(pipe.unet), changes, strict=True):
            layer.weight += change
    assert attention() < 0.5 * start


def test_fused_weights_solve_the_least_squares_of_all_prompts():
    torch.manual_seed(0)
    original, refined = torch.randn(2, 3, 5, dtype=torch.float64)
    changes = torch.randn(2, 3, 5, dtype=torch.float64)
    rows = torch.randn(2, 7, 5, dtype=torch.float64)
    kept = torch.randn(4, 5, dtype=torch.float64)
    grams, gram = rows.mT @ rows, kept.T @ kept
    back = gram @ (original - refined).T
    found = mace_lora.fused(refined, changes, grams, back, 0.3, gram).requires_grad_(True)
    loss = 0.3 * (found - refined).square().sum() + (kept @ (found - original).T).square().sum()
    for e, change in zip(rows, changes, strict=True):
        loss = loss + (e @ (found - refined - change).T).square().sum()
    (gradient,) = torch.autograd.grad(loss, [found])
    assert gradient.abs().max() < 1e-10


def test_small_steps_are_not_lost_in_half_precision():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    copies = training.Copies([weight], torch.optim.SGD, lr=1e-3)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        copies.step()
    # A step alone is below half the distance to the next bfloat16 number.
    assert float(weight.detach()) == pytest.approx(0.98, abs=2e-3)


def test_an_adapter_is_merged_or_leaves_nothing(pipe):
    before = values(pipe.unet)
    layers = [name for name in before if name.endswith("attn2.to_k.weight")]
    with training.adapter(pipe.unet, ["attn2.to_k"], 2, seed=0) as factors:
        assert len(factors) == 2 * len(layers)
        with torch.no_grad():
            for factor in factors:
                factor.fill_(0.1)
    assert changed(pipe.unet, before) == set(layers)
    for name in layers:
        torch.testing.assert_close(pipe.unet.state_dict()[name], before[name] + 2 * 0.01)
    before = values(pipe.unet)
    with (
        pytest.raises(RuntimeError, match="stopped"),
        training.adapter(pipe.unet, ["attn2.to_k"], 2, seed=0) as factors,
    ):
        with torch.no_grad():
            factors[1].fill_(0.1)
        raise RuntimeError("stopped")
    assert not changed(pipe.unet, before)


def test_the_loss_is_the_papers_and_its_teacher_stands_still(pipe, monkeypatch):
    """RACE's gradient is that of a plain computation with the untouched original."""
    original = copy.deepcopy(pipe.unet)
    here, taken = noised(pipe, 1), []
    monkeypatch.setattr(training.Trajectories, "take", lambda self, count=1: here)
    monkeypatch.setattr(race, "worst", lambda pipe, noised, states, *rest: 1.1 * states.float())

    class Recorded(training.Copies):
        def step(self):
            taken.append([weight.grad.clone() for weight in self.weights])
            super().step()

    monkeypatch.setattr(race, "Copies", Recorded)
    settings = race.Settings(esd.Settings(iterations=0), 2, 1, 0.1, sampling_steps=2)
    student = copy.deepcopy(pipe.unet)
    race.erase(pipe, CONCEPTS[:1], settings, 0)
    empty, word = training.encode(pipe, ["", "cat"]).split(1)
    with torch.no_grad():
        free, shown = (
            training.predict(original, here.x, here.t, states) for states in (empty, word)
        )
    weights = [p for name, p in student.named_parameters() if ".attn2." in name]
    for gradients in taken:
        out = training.predict(student, here.x, here.t, 1.1 * word)
        loss = functional.mse_loss(out, free - settings.negative_guidance * (shown - free))
        plain = torch.autograd.grad(loss, weights)
        torch.testing.assert_close(tuple(gradients), plain, rtol=1e-3, atol=1e-5)
        optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    assert len(taken) == 2
