"""The baselines as erasers: each solves what its paper says, on a small pipeline."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from baselines import esd, mace, oce, rece, semantic_surgery, speed, uce
from baselines.phrases import ANCHORS, EXPANSIONS, UNIT, Phrases, label, matrices

from realera_fast import Concept, embedded
from realera_fast.evaluation import Shot
from realera_fast.text import KINDS

MODULES = {"uce": uce, "mace": mace, "rece": rece, "speed": speed, "oce": oce, "esd": esd}
SMALL = {"esd": esd.Settings(iterations=3, sampling_steps=3, together=2, learning_rate=1e-3)}


@pytest.fixture(scope="module")
def pipe():
    return embedded.load_pipeline()


@pytest.fixture
def weights(pipe):
    """The model's weights, put back afterwards."""
    kept = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    yield kept
    pipe.unet.load_state_dict(kept)


def settings_of(name):
    return SMALL.get(name, MODULES[name].Settings())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edits_cross_attention_alone(name, dtype, pipe, weights):
    pipe.unet.to(dtype)
    try:
        before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
        MODULES[name].erase(pipe, [Concept("rabbit"), Concept("house")], settings_of(name), 0)
        changed = {k for k, v in pipe.unet.state_dict().items() if not torch.equal(v, before[k])}
        assert changed and all(".attn2." in key for key in changed)
        assert all(value.isfinite().all() for value in pipe.unet.state_dict().values())
        assert pipe.unet.dtype == dtype
        leaves = {key.split(".")[-2] for key in changed}
        if name in ("speed", "oce"):
            assert leaves == {"to_v"}
        elif name != "esd":
            assert leaves == {"to_k", "to_v"}
    finally:
        pipe.unet.float()


@pytest.mark.parametrize(
    "module", [*MODULES.values(), semantic_surgery], ids=[*MODULES, "semantic_surgery"]
)
def test_the_authors_settings_come_first_and_are_all_different(module):
    sweep = module.SWEEP
    assert sweep[0] == module.Settings()
    assert len({label(settings) for settings in sweep}) == len(sweep)


def test_uce_sends_the_last_token_to_the_anchor(pipe, weights):
    phrases = Phrases(pipe)
    layer = matrices(pipe.unet)[0]
    before = layer.weight.clone()
    uce.erase(pipe, [Concept("rabbit", anchor="house")], uce.Settings())
    rabbit, house = phrases.last(["rabbit", "house"])
    share = 0.5 / (0.5 + float(rabbit.square().sum()))
    wanted = before @ (share * rabbit + (1 - share) * house)
    # The published form inverts in float32.
    torch.testing.assert_close(layer.weight @ rabbit, wanted, rtol=1e-2, atol=0.05)


def test_the_empty_phrase_is_begin_of_text(pipe):
    phrases = Phrases(pipe)
    torch.testing.assert_close(phrases.last([""])[0], phrases.rows(["house"])[0, 0])
    assert phrases.rows(["a house"]).square().sum(-1).mean() == pytest.approx(UNIT, rel=0.05)


def test_no_baseline_keeps_what_is_near_the_target(pipe):
    phrases, names = Phrases(pipe), ("dog", "cat", "gun", "ship", "car", "bird")
    kept = phrases.kept([Concept(name) for name in names])
    gone = set(phrases.kept([])) - set(kept)
    assert gone and not {"dogs", "puppy", *names} & set(kept)
    assert len(gone) < len(kept) / 10


def test_mace_leaves_the_concepts_own_rows_out(pipe, weights):
    phrases = Phrases(pipe)
    layer = matrices(pipe.unet)[0]
    before = layer.weight.clone()
    concept = Concept("rabbit", anchor="house")
    mace.erase(pipe, [concept], mace.Settings(ridge=1.0))
    # The row of end-of-text goes to that of the anchor's prompt; the template's first words have
    # nowhere to go.
    rabbit, house = phrases.rows(["a photo of a rabbit", "a photo of a house"])
    end = phrases.text.ends(["a photo of a rabbit"])[0]
    moved = (layer.weight @ rabbit[end] - before @ house[end]).norm()
    assert moved < 0.3 * (before @ rabbit[end] - before @ house[end]).norm()


def test_rece_derives_what_reads_like_the_concept():
    torch.manual_seed(0)
    weights = [torch.randn(7, 5, dtype=torch.float64) for _ in range(2)]
    inverse = torch.randn(5, 5, dtype=torch.float64)
    edited = [weight @ inverse for weight in weights]
    rows = torch.randn(3, 5, dtype=torch.float64)
    found = rece.adversarial(weights, edited, rows, 1e-9)
    for new, old in zip(edited, weights, strict=True):
        torch.testing.assert_close(found @ new.T, rows @ old.T, rtol=1e-4, atol=1e-4)


def test_speed_never_moves_the_fixed_rows(pipe, weights):
    phrases = Phrases(pipe)
    layer = matrices(pipe.unet, ("to_v",))[0]
    before = layer.weight.clone()
    speed.erase(pipe, [Concept("rabbit")], speed.Settings(threshold=30.0, retain_scale=0.05))
    begin, rabbit = phrases.rows([""])[0, 0], phrases.last(["rabbit"])[0]
    change = layer.weight - before
    assert (change @ begin).norm() < 1e-3 * (before @ begin).norm()
    assert (change @ rabbit).norm() > 0.05 * (before @ rabbit).norm()


def test_speed_solves_its_constrained_problem(pipe, weights):
    """No step in the null space that leaves the fixed rows alone makes the objective smaller."""
    phrases = Phrases(pipe)
    layer = matrices(pipe.unet, ("to_v",))[0]
    before = layer.weight.double().clone()
    options = speed.Settings(threshold=1e9, retain_scale=1.0, augment=0, filtered=False)
    speed.erase(pipe, [Concept("rabbit")], options)
    target, anchor = phrases.last(["rabbit", ""]).double()
    empty = phrases.rows([""])[0].double()
    fixed = torch.cat([empty[:1], speed._centers(empty[1:], 3)])

    def objective(change):
        return ((before + change) @ target - before @ anchor).square().sum() + change.square().sum()

    change = layer.weight.double() - before
    basis = torch.linalg.svd(fixed, full_matrices=True)[2][4:]
    torch.manual_seed(0)
    for _ in range(20):
        step = 1e-2 * torch.randn(len(before), len(basis), dtype=torch.float64) @ basis
        assert objective(change + step) > objective(change)


def test_oce_turns_values_and_keeps_their_lengths(pipe, weights):
    layer = matrices(pipe.unet, ("to_v",))[0]
    before = layer.weight.double().clone()
    oce.erase(pipe, [Concept("rabbit")], oce.Settings(erase_scale=1e4))
    after = layer.weight.double()
    assert (after - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(after.T @ after, before.T @ before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def embeds_of(pipe, prompts):
    return pipe.encode_prompt(prompts, pipe.device, 1, True)


def test_surgery_takes_away_what_the_prompt_holds_and_leaves_other_prompts(pipe):
    concepts, settings = [Concept("rabbit"), Concept("snake")], semantic_surgery.Settings(beta=-0.3)
    surgery = semantic_surgery.erase(pipe, concepts, settings)
    prompts = ["rabbit", "a photo of a house", "rabbit, snake"]
    plain, negative = embeds_of(pipe, prompts)
    moved, of_guidance = embeds_of(surgery.pipeline(pipe), prompts)
    assert torch.equal(of_guidance, negative) and torch.equal(moved[1], plain[1])
    # The mean over positions of the cosines with the whole embeddings, and one phrase for both.
    empty = embeds_of(pipe, [""])[0][0]
    one, both = plain[0] - empty, plain[2] - empty
    share = float(torch.cosine_similarity(one, plain[0], dim=-1).mean())
    gate = 1 / (1 + math.exp(-(share - 0.3) / 0.02))
    assert gate > 0.5
    torch.testing.assert_close(moved[0], plain[0] - gate * one)
    gates = surgery.gates(plain)[2]
    assert bool((gates > 0.5).all())
    torch.testing.assert_close(moved[2], plain[2] - gates.max() * both)


def test_surgery_has_a_line_for_each_kind(pipe):
    mixed = [Concept("rabbit"), Concept("sepia", kind="style")]
    lines = semantic_surgery.AUTHORS | {"object": -0.9, "style": -0.1}
    by_kind, strict, loose = (
        semantic_surgery.erase(pipe, mixed, semantic_surgery.Settings(beta=beta))
        for beta in (lines, -0.9, -0.1)
    )
    prompts = embeds_of(pipe, ["a sepia picture of a rabbit"])[0]
    gates = by_kind.gates(prompts)
    assert torch.equal(gates[:, 0], strict.gates(prompts)[:, 0])
    assert torch.equal(gates[:, 1], loose.gates(prompts)[:, 1])
    assert gates[0, 0] < 0.5 < gates[0, 1]
    assert set(lines) == set(KINDS)


def test_surgery_edits_nothing_and_draws_without_the_concept(pipe):
    methods, studio = (importlib.import_module(f"quality.{n}") for n in ("methods", "studio"))
    tasks = importlib.import_module("quality.tasks")
    found, task = studio.Studio(torch.float32), tasks.Task("house", (Concept("house"),), {})
    shots = [
        Shot(
            erased="house",
            group="erased",
            word=word,
            expected=word,
            kind="thing",
            prompt=f"a photo of a {word}",
            seed=seed,
        )
        for word in ("house", "rabbit")
        for seed in (1, 2)
    ]
    own, before = found.pipe, [v.clone() for v in found.denoiser.state_dict().values()]
    weights_while = []

    def work():
        weights_while.extend(v.clone() for v in found.denoiser.state_dict().values())
        return found.seen(task, shots)

    method = methods.baseline(semantic_surgery, semantic_surgery.Settings(beta=-0.28))
    seen, _, about = found.erased(method, task, 0, work)
    assert "house" not in seen[:2] and seen[2:] == ["rabbit", "rabbit"]
    assert all(torch.equal(a, b) for a, b in zip(before, weights_while, strict=True))
    assert found.pipe is own and about == {}


def test_esd_follows_its_seed(pipe, weights):
    found = []
    for seed in (0, 0, 1):
        esd.erase(pipe, [Concept("rabbit")], SMALL["esd"], seed)
        found.append(matrices(pipe.unet)[0].weight.detach().clone())
        pipe.unet.load_state_dict(weights)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_esd_trains_what_takes_no_text(pipe, weights):
    settings = dataclasses.replace(SMALL["esd"], unconditional=True)
    esd.erase(pipe, [Concept("rabbit")], settings, 0)
    state = pipe.unet.state_dict()
    changed = {name for name, value in weights.items() if not torch.equal(value, state[name])}
    assert changed == {name for name in weights if ".attn2." not in name}


def test_every_kind_has_an_anchor_and_phrases():
    assert set(ANCHORS) == set(EXPANSIONS) == set(KINDS)
    assert all(template.count("{}") == 1 for part in EXPANSIONS.values() for template in part)


def test_the_studio_puts_the_model_back():
    evaluate, tasks, methods = (
        importlib.import_module(f"quality.{name}") for name in ("evaluate", "tasks", "methods")
    )
    studio = evaluate.Studio(torch.float32)
    plan = tasks.Plan(studio.table, "tuning")
    task = plan.of_things(
        "house", [plan.table.thing("house")], [0], tasks.Counts(target=2, others=2)
    )
    models = (studio.pipe.unet, studio.pipe.text_encoder)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]

    def wipe(pipe, concepts, seed, exclude):
        with torch.no_grad():
            for parameter in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()):
                parameter.zero_()

    chosen = {
        "wiped": methods.Method(wipe, False, {}),
        None: None,
        "own": methods.variants()["closed form alone"],
        "uce": methods.baselines()["UCE"],
    }
    rows = {
        name: next(iter(evaluate.rows_of(studio, name, method, task, [0])))
        for name, method in chosen.items()
    }
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert rows["wiped"]["scores"]["acc_s"] < 0.2
    assert rows[None]["scores"]["acc_e"] == 1.0 and rows["own"]["scores"]["acc_e"] == 0.0
    assert rows["own"]["neighbors"] > 0 and rows["own"]["seconds"] > 0
    # Every group is drawn, and the words of the erased thing are not among the kept ones.
    words = rows["own"]["words"]
    assert set(words) == {"erased", "synonym", "relative", "untouched"}
    assert set(words["synonym"]) == set(studio.table.held_out(studio.table.thing("house")))
