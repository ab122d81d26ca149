"""Neighbor mining: regions, distributions, and the sampled sums against their expectation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from realera_fast import mining
from realera_fast.mining import MiningConfig, Region, add_neighbors, moments, rows, sample
from realera_fast.ops import perturb_reference
from realera_fast.solver import NormalEquations

NEIGHBOR = Region(0.5, 0.9, 1.6)
BEYOND = Region(-1.0, 0.5, 1.6)


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Two-sample statistic in units of its critical value at one in a thousand."""
    values = torch.cat((a, b)).sort().values
    gap = torch.searchsorted(a.sort().values, values, right=True) / len(a) - torch.searchsorted(
        b.sort().values, values, right=True
    ) / len(b)
    return float(gap.abs().max()) / (1.95 * math.sqrt(1 / len(a) + 1 / len(b)))


def rejection(e: Tensor, region: Region, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The plain sampler: noise, then step lengths drawn until one is accepted.

    Args:
        e: `[n]` embedding.

    Returns:
        step lengths in units of |E| `[count]`, noise in units of rms(E) `[count, n]`, points.
    """
    generator = torch.Generator().manual_seed(seed)
    norm = e.norm()
    noise = torch.randn(count, len(e), generator=generator, dtype=torch.float64)
    direction = noise * norm / math.sqrt(len(e)) - e
    direction /= direction.norm(dim=1, keepdim=True)
    step = torch.full((count,), torch.nan, dtype=torch.float64)
    for _ in range(500):
        left = step.isnan().nonzero()[:, 0]
        if len(left) == 0:
            break
        rho = torch.rand(len(left), generator=generator, dtype=torch.float64) * region.max_distance
        x = e + rho[:, None] * norm * direction[left]
        cosine = (x @ e) / (x.norm(dim=1) * norm)
        accepted = (cosine >= region.min_cosine) & (cosine <= region.max_cosine)
        step[left[accepted]] = rho[accepted]
    assert not step.isnan().any()
    return step, noise, e + step[:, None] * norm * direction


@pytest.mark.parametrize("region", [NEIGHBOR, BEYOND])
def test_distribution_equals_rejection_sampling(region):
    count = 4000
    e = embeddings(1, 5, 16)
    flat = e[0, 1:].flatten()
    drawn = sample(e, region, samples=count, seed=1)
    x = drawn.rows()[0, :, 1:].flatten(1)
    step, noise, points = rejection(flat, region, count, seed=2)

    def cosine(y: Tensor) -> Tensor:
        return (y @ flat) / (y.norm(dim=1) * flat.norm())

    rho = (x - flat).norm(dim=1) / flat.norm()
    z = (x - drawn.alpha[0, :, None] * flat) / drawn.beta[0, :, None]
    z = z * math.sqrt(len(flat)) / flat.norm()
    assert kolmogorov_smirnov(rho, step) < 1
    assert kolmogorov_smirnov(cosine(x), cosine(points)) < 1
    assert kolmogorov_smirnov(z.flatten(), noise.flatten()) < 1
    assert kolmogorov_smirnov(z.norm(dim=1), noise.norm(dim=1)) < 1
    # The same statistics tell a slightly different region and a slightly different noise.
    other = dataclasses.replace(region, min_cosine=region.min_cosine + 0.08, max_distance=1.5)
    wrong, _, _ = rejection(flat, other, count, seed=3)
    assert kolmogorov_smirnov(rho, wrong) > 1
    assert kolmogorov_smirnov(z.flatten() * 1.02, noise.flatten()) > 1


@pytest.mark.parametrize("region", [NEIGHBOR, BEYOND])
def test_moments_are_the_means_of_samples(region):
    e = embeddings(1, 5, 16, seed=3)
    flat = e[0, 1:].flatten()
    x = sample(e, region, samples=20_000, seed=5).rows()[0, :, 1:].flatten(1)
    along = x @ flat / flat.square().sum()
    across = (x - along[:, None] * flat).square().sum(1) / flat.square().sum() / (len(flat) - 1)
    limit = moments(len(flat), region)
    for draws, expected in (
        (along, limit.first),
        (along.square(), limit.second),
        (across, limit.noise),
    ):
        error = float(draws.std()) / math.sqrt(len(draws))
        assert abs(float(draws.mean()) - expected) < 4 * error
        # One element in eight more or fewer than there are would be seen.
    assert abs(float(across.mean()) - moments(72, region).noise) > 4 * error


def test_moments_converge_for_many_elements():
    """With |v_perp| = 1 and g = 0 the interval is elementary: u at 135 degrees to E."""
    low = 1 / (0.9 / perturb_reference.sine(0.9) + 1)
    high = 1 / (0.5 / perturb_reference.sine(0.5) + 1)
    limit = moments(10**9, NEIGHBOR)
    assert limit.first == pytest.approx(1 - (low + high) / 2, rel=1e-4)
    mean_square = (low**2 + low * high + high**2) / 3
    assert limit.noise * 1e9 == pytest.approx(mean_square, rel=1e-4)


def test_moments_of_nothing_and_of_too_little():
    assert moments(0, NEIGHBOR) == mining.Moments(1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="two elements"):
        moments(1, NEIGHBOR)
    with pytest.raises(ValueError, match="directions"):
        moments(3, BEYOND)


def problem(mode: str, **changes) -> tuple[Tensor, Tensor, Tensor, MiningConfig]:
    source = embeddings(2, 5, 16)
    destination = embeddings(2, 5, 16, seed=1)
    destination[:, 0] = source[:, 0] = source[0, 0]
    weight = torch.rand(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight[1, 3] = 0.0
    return source, destination, weight, MiningConfig(mode=mode, beyond_scale=0.5, **changes)


def accumulate(mode: str, samples: int | None, seed: int = 0, **changes) -> NormalEquations:
    source, destination, weight, config = problem(mode, **changes)
    equations = NormalEquations(16)
    config = dataclasses.replace(config, samples=samples)
    drawn = add_neighbors(equations, source, destination, weight, config, seed=seed)
    assert drawn == (0 if samples is None else 4 * samples)
    return equations


def distance(a: NormalEquations, b: NormalEquations) -> float:
    return float(torch.cat((a.gram - b.gram, a.cross - b.cross)).norm())


def slope(mode: str, limit: NormalEquations) -> float:
    """Exponent of the error of the sampled sums against `limit`, over 64 to 4096 samples."""
    counts = [64, 256, 1024, 4096]
    errors = []
    for count in counts:
        squares = [distance(accumulate(mode, count, seed), limit) ** 2 for seed in range(6)]
        errors.append(math.log(sum(squares) / 6) / 2)
    x = torch.tensor([math.log(count) for count in counts], dtype=torch.float64)
    y = torch.tensor(errors, dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


@pytest.mark.parametrize("mode", ["gaussian", "offset"])
def test_sampled_sums_converge_to_the_expectation(mode):
    assert -0.65 < slope(mode, accumulate(mode, None)) < -0.35


def test_sampled_sums_do_not_converge_to_another_expectation():
    wrong = accumulate("gaussian", None, max_cosine=0.8)
    assert slope("gaussian", wrong) > -0.25


def test_expectation_of_two_prompts_is_exact_algebra():
    """Row by row from the definition of the moments, for every mode and both terms."""
    source, destination, weight, _ = problem("gaussian")
    near, far = moments(64, NEIGHBOR), moments(64, BEYOND)
    eye = torch.eye(16, dtype=torch.float64)
    for mode in ("gaussian", "offset"):
        gram, cross = torch.zeros_like(eye), torch.zeros_like(eye)
        for p in range(2):
            square = source[p, 1:].square().sum()
            for t in range(5):
                e, a, w = source[p, t], destination[p, t], weight[p, t]
                for m, scale in ((near, 1.0), (far, 0.5)):
                    outer = torch.outer(e, e)
                    second = outer
                    if t > 0:
                        second = m.second * outer + m.noise * (square * eye - outer)
                    gram += w * scale * second
                    if m is near:
                        first = m.first if t > 0 else 1.0
                        if mode == "gaussian":
                            cross += w * (first * torch.outer(a, e) - second)
                        else:
                            cross += w * first * torch.outer(a - e, e)
        got = accumulate(mode, None)
        assert torch.allclose(got.gram, gram, rtol=1e-12, atol=1e-12)
        assert torch.allclose(got.cross, cross, rtol=1e-12, atol=1e-12)


def test_weights_scales_and_blocks(monkeypatch):
    whole = accumulate("gaussian", 20)
    split = accumulate("gaussian", 20)
    assert distance(whole, split) < 1e-12 * float(whole.gram.norm())
    source, destination, weight, config = problem("gaussian")
    for samples in (None, 20):
        config = dataclasses.replace(config, samples=samples, beyond_scale=0.0, neighbor_scale=1.0)
        one, half = NormalEquations(16), NormalEquations(16)
        add_neighbors(one, source, destination, weight, config, seed=0)
        config = dataclasses.replace(config, neighbor_scale=0.5)
        add_neighbors(half, source, destination, weight, config, seed=0)
        assert torch.allclose(one.gram, 2 * half.gram) and torch.allclose(one.cross, 2 * half.cross)
        # A row without weight has no part, whatever it holds.
        changed = destination.clone()
        changed[1, 3] = 1e6
        other = NormalEquations(16)
        add_neighbors(other, source, changed, weight, config, seed=0)
        assert torch.allclose(other.cross, half.cross)
        assert not torch.allclose(one.cross, half.cross)


def test_no_noise_is_used_twice(monkeypatch):
    counters = []

    def recorded(source, region, *, samples, offset, **kwargs):
        counters.extend(range(offset, offset + samples))
        return sample(source, region, samples=samples, offset=offset, **kwargs)

    monkeypatch.setattr(rows, "sample", recorded)
    whole = accumulate("gaussian", 20)
    assert len(counters) == len(set(counters)) == 40
    counters.clear()
    # Blocks of a few samples draw the same ones.
    monkeypatch.setattr(rows, "SCALARS_PER_BLOCK", 7)
    blocks = accumulate("gaussian", 20)
    assert torch.allclose(whole.gram, blocks.gram) and torch.allclose(whole.cross, blocks.cross)
    assert len(counters) == len(set(counters)) == 40


def test_beyond_rows_only_hold():
    source, destination, weight, config = problem("gaussian")
    for samples in (None, 20):
        config = dataclasses.replace(config, samples=samples, neighbor_scale=0.0)
        equations = NormalEquations(16)
        add_neighbors(equations, source, destination, weight, config, seed=0)
        assert not equations.cross.any() and equations.gram.diagonal().min() > 0
        nothing = dataclasses.replace(config, beyond_scale=0.0)
        assert add_neighbors(equations, source, destination, weight, nothing, seed=0) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("samples", [None, 8])
def test_embeddings_of_any_type(dtype, samples):
    source, destination, weight, config = problem("offset")
    config = dataclasses.replace(config, samples=samples)
    narrow, wide = NormalEquations(16), NormalEquations(16)
    source, destination = source.to(dtype), destination.to(dtype)
    add_neighbors(narrow, source, destination, weight.to(dtype), config, seed=0)
    add_neighbors(
        wide, source.double(), destination.double(), weight.to(dtype).double(), config, seed=0
    )
    assert distance(narrow, wide) < 1e-5 * float(wide.gram.norm())


def test_prompts_that_do_not_move():
    source = embeddings(2, 1, 16)
    for samples in (None, 3):
        config = MiningConfig(mode="gaussian", samples=samples, beyond_scale=0.0)
        equations = NormalEquations(16)
        add_neighbors(equations, source, source, torch.ones(2, 1), config, seed=0)
        assert torch.allclose(equations.gram, source[:, 0].T @ source[:, 0])
        assert float(equations.cross.norm()) < 1e-6


def test_other_modes_and_bad_arguments():
    source, destination, weight, config = problem("none")
    equations = NormalEquations(16)
    assert add_neighbors(equations, source, destination, weight, config, seed=0) == 0
    assert not equations.gram.any()

    def add(mode="gaussian", s=source, a=destination, w=weight, **kwargs):
        chosen = dataclasses.replace(config, mode=mode)
        return add_neighbors(equations, s, a, w, chosen, **({"seed": 0} | kwargs))

    with pytest.raises(ValueError, match="vocabulary"):
        add("vocabulary")
    with pytest.raises(ValueError, match="destination"):
        add(a=destination[:1])
    with pytest.raises(ValueError, match="weight"):
        add(w=weight[:1])
    with pytest.raises(ValueError, match="width"):
        add(s=source[..., :8], a=destination[..., :8])
    for bad in (torch.zeros_like(source), torch.full_like(source, torch.nan)):
        with pytest.raises(ValueError, match="can't be mined"):
            add(s=bad)
        config = dataclasses.replace(config, samples=2)
        with pytest.raises(ValueError, match="can't be mined"):
            add(s=bad)
        config = dataclasses.replace(config, samples=None)


def test_sample_says_what_can_not_be_mined():
    with pytest.raises(ValueError, match=r"embeddings\[0\].*widen"):
        sample(torch.ones(1, 2, 1), NEIGHBOR, samples=3, seed=0)
    with pytest.raises(ValueError, match=r"embeddings\[1\].*zero"):
        sample(torch.stack((torch.ones(4, 9), torch.zeros(4, 9))), NEIGHBOR, samples=3, seed=0)
    with pytest.raises(ValueError, match="NaN"):
        sample(torch.full((1, 4, 9), torch.nan), NEIGHBOR, samples=3, seed=0)
    with pytest.raises(ValueError, match="seed"):
        sample(torch.ones(1, 4, 9), NEIGHBOR, samples=3, seed=-1)


def test_sample_splits_over_offsets():
    e = embeddings(2, 4, 8)
    whole = sample(e, NEIGHBOR, samples=6, seed=3)
    parts = [sample(e, NEIGHBOR, samples=3, seed=3, offset=o) for o in (0, 3)]
    assert torch.equal(whole.rows(), torch.cat([p.rows() for p in parts], 1))
    assert torch.equal(whole.alpha, torch.cat([p.alpha for p in parts], 1))


@pytest.mark.parametrize(
    "window",
    [
        (0.9, 0.5, 1.6),
        (0.5, 0.5, 1.6),
        (-1.1, 0.5, 1.6),
        (0.5, 1.1, 1.6),
        (0.5, 0.9, 0.0),
        (0.5, 0.9, math.inf),
        (0.5, 0.9, 0.43),
        (-1.0, -0.1, 1.0),
        (math.nan, 0.9, 1.6),
    ],
)
def test_empty_regions(window):
    with pytest.raises(ValueError, match="Region"):
        Region(*window)


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "magic"},
        {"samples": 0},
        {"samples": 1.5},
        {"min_cosine": 0.95},
        {"max_cosine": 2.0},
        {"max_distance": 0.1},
        {"beyond_distance": 0.1},
        {"neighbor_scale": -1.0},
        {"beyond_scale": math.nan},
        {"max_words": -1},
        {"max_words": True},
        {"word_cosine": 1.5},
    ],
)
def test_bad_configuration(change):
    with pytest.raises((ValueError, TypeError)):
        MiningConfig(**change)


def test_configuration_regions():
    config = MiningConfig()
    assert config.neighbor_region == NEIGHBOR and config.beyond_region == BEYOND
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.samples = 3
