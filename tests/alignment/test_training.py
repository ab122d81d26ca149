"""The training step: the plain loop's mathematics, and nothing that depends on how it is split."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from baselines.peft_alignment import PlainLoop
from shares import Share
from tiny_models import tiny_unet
from tolerance import check
from torch import Tensor

from realera_fast.alignment import AlignmentConfig, DivergedError, Points, Trainer, Window, loss_of
from realera_fast.alignment.adversary import adversary_of
from realera_fast.alignment.trainer import Batch
from realera_fast.mining import MiningConfig
from realera_fast.models import LoraFactors, projections, queries_and_outputs, self_attention
from realera_fast.runtime import Processes
from realera_fast.solver import ConceptMap
from realera_fast.unet import SELF_ATTENTION, LoraParameters, SharedUNet

WIDTH, RANK, ALPHA = 32, 3, 6.0
SIZES, SCALES = (3, 2, 2), (1.0, 0.5, 0.7)


def concept_map() -> ConceptMap:
    generator = torch.Generator().manual_seed(5)
    left, right = (0.1 * torch.randn(WIDTH, 2, generator=generator) for _ in range(2))
    return ConceptMap(left, right.T.contiguous())


def inputs() -> tuple[Tensor, ...]:
    """Latents, time steps, student's and teacher's prompts, float64."""
    generator = torch.Generator().manual_seed(6)
    count = sum(SIZES)
    latents = torch.randn(count, 4, 8, 8, generator=generator, dtype=torch.float64)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    student, teacher = (
        torch.randn(count, 7, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return latents, timesteps, student, teacher


def shared_unet(unet, *, dtype=torch.float32, targets=("to_k", "to_v"), **options) -> SharedUNet:
    def chosen(layers):
        # Plain names are of cross-attention.
        ends = tuple(f".{t}" if t.startswith("attn1.") else f".attn2.{t}" for t in targets)
        return {n: x for n, x in layers.items() if n.endswith(ends)}

    lora = LoraParameters(
        chosen(projections(unet)),
        chosen(queries_and_outputs(unet)) | chosen(self_attention(unet)),
        r=RANK,
        lora_alpha=ALPHA,
        seed=1,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in lora.named_tensors().items():
            if name.endswith("up"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return SharedUNet(unet.requires_grad_(False), concept_map(), lora, **options)


def batch_of(shared: SharedUNet) -> Batch:
    latents, timesteps, student, teacher = inputs()
    states, goal = (x.to(shared.dtype) for x in (student, teacher))
    with torch.no_grad():
        z = latents.to(torch.promote_types(shared.dtype, torch.float32))
        wanted = shared.predict(z, timesteps, shared.condition(goal, "original"))
    parts = zip(SIZES, SCALES, strict=True)
    weight = torch.cat([torch.full((n,), s / n, dtype=torch.float64) for n, s in parts])
    term = torch.block_diag(*(torch.full((1, n), 1.0 / n) for n in SIZES)).to(z.dtype)
    return Batch(z, timesteps, states, wanted, weight.to(z.dtype), term)


def ours(dtype: torch.dtype, targets=("to_k", "to_v"), **options) -> dict[str, Tensor]:
    """Student, teacher, and the gradient of every factor by peft's names."""
    unet = tiny_unet(WIDTH).to(dtype)
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    shared = shared_unet(unet, dtype=masters, targets=targets, **options)
    with shared.installed():
        batch = batch_of(shared)
        loss, terms = loss_of(shared, batch)
        loss.backward()
        # Attention may differ where there is no gradient.
        student = shared.predict(
            batch.latents, batch.timesteps, shared.condition(batch.states, "aligned")
        ).detach()
    error = (student - batch.teacher).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.detach(), (error * batch.weight).sum())
    torch.testing.assert_close(terms, batch.term @ error)
    lora, found = shared.lora, {"student": student, "teacher": batch.teacher}
    ups = lora.up.grad.split(lora.heights) if lora.names else ()
    for i, name in enumerate(lora.names):
        found[f"{name}.lora_A.default.weight"] = lora.down.grad[i]
        found[f"{name}.lora_B.default.weight"] = ups[i]
    for name, (down, up) in lora.hidden.items():
        found[f"{name}.lora_A.default.weight"] = down.grad
        found[f"{name}.lora_B.default.weight"] = up.grad
    return found


def plain(dtype: torch.dtype, targets=("to_k", "to_v")) -> dict[str, Tensor]:
    """The same from the plain loop, with the same factors."""
    unet = tiny_unet(WIDTH).to(dtype)
    shared = shared_unet(copy.deepcopy(unet), targets=targets)
    loop = PlainLoop(
        unet,
        {"sequence": concept_map()},
        r=RANK,
        lora_alpha=ALPHA,
        learning_rate=1.0,
        target_modules=targets,
    )
    with torch.no_grad():
        for name, factors in shared.lora.factors().items():
            down, up = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
            loop.factors[down].copy_(factors.down)
            loop.factors[up].copy_(factors.up / shared.lora.scaling)
    latents, timesteps, student, teacher = inputs()
    rows = (latents, timesteps, student.to(dtype), teacher.to(dtype))
    loop.loss(*rows, sizes=SIZES, scales=SCALES).backward()
    with torch.no_grad():
        predicted = dict(zip(("student", "teacher"), loop.predictions(*rows), strict=True))
    return predicted | {n: p.grad for n, p in loop.factors.items()}


@functools.cache
def exact(targets=("to_k", "to_v")) -> dict[str, Tensor]:
    return plain(torch.float64, targets)


def check_all(mine: dict, truth: dict, theirs: dict) -> None:
    """`check`, one tensor for all layers: a single layer's error is a matter of luck."""
    for kind in ("student", "teacher", "lora_A", "lora_B"):
        names = [name for name in truth if kind in name]
        got, same, true = (
            torch.cat([found[name].flatten() for name in names]) for found in (mine, theirs, truth)
        )
        check(kind, got, true, same)


@pytest.mark.parametrize(
    "targets",
    [
        ("to_k", "to_v"),
        ("to_v", "to_q", "to_out.0"),
        ("to_q",),
        ("to_k", "attn1.to_q", "attn1.to_v"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_plain_loop(dtype, targets):
    mine, theirs, truth = ours(dtype, targets), plain(dtype, targets), exact(targets)
    assert set(mine) == set(theirs) == set(truth)
    check_all(mine, truth, theirs)


@pytest.mark.parametrize("targets", [("to_k", "to_v"), ("to_k", *SELF_ATTENTION)])
def test_float64_is_the_plain_loop_to_the_last_digits(targets):
    mine, truth = ours(torch.float64, targets), exact(targets)
    for name, value in truth.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    shared = shared_unet(tiny_unet(WIDTH).double(), dtype=torch.float64)
    with shared.installed():
        batch = batch_of(shared)

        def loss(down, up):
            shared.lora.down, shared.lora.up = down, up
            return loss_of(shared, batch)[0]

        factors = (shared.lora.down.detach(), shared.lora.up.detach())
        factors = tuple(f.clone().requires_grad_() for f in factors)
        assert torch.autograd.gradcheck(loss, factors, fast_mode=True)


@pytest.mark.parametrize("targets", [("to_k", "to_v"), ("to_k", *SELF_ATTENTION)])
def test_recomputed_activations_give_the_same_gradients(monkeypatch, targets):
    once = ours(torch.float32, targets)
    enabled = tiny_unet

    def checkpointed(*arguments, **options):
        unet = enabled(*arguments, **options)
        unet.enable_gradient_checkpointing()
        return unet

    monkeypatch.setitem(globals(), "tiny_unet", checkpointed)
    again = ours(torch.float32, targets)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("targets", [("to_k", "to_v"), ("to_k", "attn1.to_q", "attn1.to_v")])
def test_compiled_student_gives_the_same_gradients(monkeypatch, targets):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    mine, theirs = (ours(torch.float32, targets, compiled=way) for way in (True, False))
    truth = exact(targets)
    check_all(mine, truth, theirs)


def test_mixed_precision_computes_in_bfloat16_on_a_float32_model():
    shared = shared_unet(tiny_unet(WIDTH), mixed_precision="bf16")
    with shared.installed(), torch.no_grad():
        batch = batch_of(shared)
        prompts = shared.condition(batch.states, "aligned")
        assert prompts.projected["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].dtype
        assert {p.dtype for p in prompts.projected.values()} == {torch.bfloat16}
        mixed = shared.predict(batch.latents, batch.timesteps, prompts)
    wide = shared_unet(tiny_unet(WIDTH))
    with wide.installed(), torch.no_grad():
        full = wide.predict(
            batch.latents, batch.timesteps, wide.condition(batch.states.float(), "aligned")
        )
    assert mixed.dtype == torch.float32
    error = (mixed - full).norm() / full.norm()
    assert 1e-4 < error < 0.05


# Steps


def window() -> Window:
    generator = torch.Generator().manual_seed(8)

    def points(count: int) -> Points:
        latents, teacher = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
        states = torch.randn(3, 7, WIDTH, generator=generator)
        timesteps = torch.randint(0, 1000, (count,), generator=generator)
        prompt = torch.randint(0, 3, (count,), generator=generator)
        shown = torch.randn(latents.shape, generator=generator)
        return Points(latents, timesteps, states, prompt, teacher, shown)

    return Window(points(9), points(9), points(7))


def trainer(processes=None, **config) -> Trainer:
    config = AlignmentConfig(**{"steps": 20, "batch_size": 4, "learning_rate": 1e-2} | config)
    shared = shared_unet(tiny_unet(WIDTH))
    adversary = adversary_of(shared, config, MiningConfig())
    return Trainer(shared, config, adversary, seed=3, processes=processes or Processes())


def steps(it: Trainer, count: int, start: int = 0) -> None:
    with it.shared.installed():
        for number in range(start, start + count):
            it.step(window(), number)


@pytest.mark.parametrize("parts", [1, 3, 5])
@pytest.mark.parametrize("adversary", ["none", "random"])
def test_shares_and_parts_make_up_the_batch(parts, adversary):
    it = trainer(batch_size=6, adversary=adversary)
    whole = it.batch(window(), 11, 0, 1)
    split = [it.batch(window(), 11, part, parts) for part in range(parts)]
    for name in ("latents", "timesteps", "states", "teacher", "weight"):
        pieces = torch.cat([getattr(batch, name) for batch in split])
        # A part has rows of all terms: compare as sets of rows.
        rows = sorted(map(str, whole.__dict__[name].flatten(1 if pieces.dim() > 1 else 0).tolist()))
        assert sorted(map(str, pieces.flatten(1 if pieces.dim() > 1 else 0).tolist())) == rows
    assert whole.weight.sum() == pytest.approx(1.0 + 0.5 + 2.0)
    assert whole.term.sum(1).tolist() == pytest.approx([1.0, 1.0, 1.0])
    shares = [Share(rank, 3).share(7) for rank in range(3)]
    assert [i for share in shares for i in range(7)[share]] == list(range(7))


def test_accumulation_changes_rounding_alone():
    whole, parts = trainer(), trainer(gradient_accumulation_steps=2)
    steps(whole, 1)
    steps(parts, 1)
    torch.testing.assert_close(whole.lora.down.grad, parts.lora.down.grad, rtol=1e-4, atol=1e-6)
    assert whole.losses == pytest.approx(parts.losses)


@pytest.mark.parametrize("adversary", ["none", "worst"])
def test_a_restored_trainer_takes_the_same_steps(adversary):
    first = trainer(adversary=adversary)
    steps(first, 2)
    first.keep()
    saved = {name: tensor.detach().clone() for name, tensor in first.tensors().items()}
    state = copy.deepcopy(first.state())
    steps(first, 3, start=2)
    second = trainer(adversary=adversary)
    second.restore(saved, state)
    steps(second, 3, start=2)
    assert first.losses == second.losses
    for name, value in first.lora.named_tensors().items():
        assert torch.equal(value, second.lora.named_tensors()[name])
        assert torch.equal(first.best[name], second.best[name])


def test_the_step_size_falls_to_zero():
    it = trainer(steps=4)
    steps(it, 4)
    assert it.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)


@pytest.mark.parametrize("adversary", ["none", "worst"])
def test_numbers_out_of_range_leave_the_factors_alone(adversary):
    it = trainer(adversary=adversary)
    with torch.no_grad():
        it.lora.up[0, 0] = float("inf")
    before = it.lora.down.detach().clone()
    with pytest.raises(DivergedError, match="at step 1"):
        steps(it, 1)
    assert torch.equal(it.lora.down, before) and not it.losses


def test_the_best_factors_are_those_of_the_least_held_back_loss(monkeypatch):
    it = trainer(patience=2)
    found = iter([3.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(
        "realera_fast.alignment.trainer.loss_of",
        lambda *_: (torch.tensor(next(found)), torch.ones(3)),
    )
    for number in range(4):
        with torch.no_grad():
            it.lora.up.fill_(number)
        it.look(window())
        assert it.is_exhausted == (number == 3)
    assert it.best_look == 1
    it.use_best()
    assert (it.lora.up == 1.0).all()


def test_a_held_back_loss_that_explodes_is_divergence():
    it = trainer()
    with it.shared.installed():
        it.held_back.append(it.look(window()) / 11)
        del it.held_back[0]
        with pytest.raises(DivergedError, match="held-back"):
            it.look(window())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f, 0) for f in ("steps", "r", "batch_size", "trajectories", "sampling_steps")),
        *((f, 0) for f in ("learning_rate", "lora_alpha", "refresh_steps", "patience")),
        *((f, -1) for f in ("beyond_scale", "evaluation_steps", "check_seeds")),
        ("min_timestep", 1.0),
        ("target_modules", ("to_x",)),
        ("target_modules", ("attn2.to_q",)),
        ("timesteps", "some"),
        ("target_modules", ()),
        ("mixed_precision", "fp8"),
        ("adversary", "best"),
        *((f, 0) for f in ("adversary_steps", "adversary_distance", "preserve_trajectories")),
        ("preserve_batch_size", 0),
        ("adversary_distance", float("inf")),
    ],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=field):
        AlignmentConfig(**{field: value})


def test_the_student_has_what_the_closed_form_adds_to_single_projections():
    """Beside its map; and the factors that are trained come on top."""
    unet = tiny_unet(WIDTH)
    generator = torch.Generator().manual_seed(8)
    layers = {n: x for n, x in projections(unet).items() if n.endswith("to_v")}
    moved = {
        name: LoraFactors(
            torch.randn(2, WIDTH, generator=generator),
            torch.randn(layer.out_features, 2, generator=generator),
        )
        for name, layer in layers.items()
    }
    shared = shared_unet(unet, moved=moved)
    student = copy.deepcopy(unet)
    factors = shared.lora.factors()
    latents, timesteps, states, _ = (x.float() if x.is_floating_point() else x for x in inputs())
    for variant in ("original", "edited", "aligned"):
        for name, layer in projections(student).items():
            weight = projections(unet)[name].weight
            if variant != "original":
                weight = weight @ concept_map().matrix
                weight = weight + moved[name].delta if name in moved else weight
            if variant == "aligned":
                weight = weight + factors[name].delta
            layer.weight.data = weight.detach().clone()
        with torch.no_grad(), shared.installed():
            found = shared.predict(latents, timesteps, shared.condition(states, variant))
            wanted = student(latents, timesteps, encoder_hidden_states=states).sample
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
