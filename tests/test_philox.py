"""The random stream and the reference of `perturb`: known answers, counters, odd inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from realera_fast import philox

NEIGHBOR = (0.5, 0.9, 1.6)
BEYOND = (-1.0, 0.5, 1.6)
WORD = 0xFFFFFFFF


def embeddings(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def in_float64(e: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and distance / |E| of every sample, `[c, s]`, begin-of-text excluded."""
    base = e[:, None, 1:].flatten(2).double()
    x = rows[:, :, 1:].flatten(2).double()
    norm = base.norm(dim=-1)
    return (x * base).sum(-1) / (x.norm(dim=-1) * norm), (x - base).norm(dim=-1) / norm


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Known answers of Random123 for philox4x32-10.
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD, WORD), (WORD,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key, counter, expected):
    words = philox.philox(key[0] | key[1] << 32, *(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in words) == expected


def test_randint4x_spreads_the_offset_over_two_words():
    offset = torch.tensor([5, 5 + (3 << 32)])
    words = torch.stack(philox.randint4x(9, offset))
    zero = torch.zeros(2, dtype=torch.int64)
    direct = torch.stack(philox.philox(9, torch.tensor([5, 5]), torch.tensor([0, 3]), zero, zero))
    assert torch.equal(words, direct)
    assert not torch.equal(words[:, 0], words[:, 1])


def test_uniforms_and_normals_follow_their_distributions():
    offset = torch.arange(50_000)
    words = torch.cat(philox.randint4x(1, offset))
    u = philox.uniform(words)
    assert u.min() >= 0 and u.max() < 1
    assert philox.uniform(torch.tensor([0, WORD])).tolist() == [0.0, 0.0]
    assert philox.uniform(torch.tensor([(1 << 31) - 1])).item() < 1.0
    n = len(u)
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    limit = 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at one in a thousand
    assert (u.double().sort().values - grid).abs().max() < limit
    four = philox.randn4x(2, offset)
    for z in (torch.cat(four), torch.cat(four) * 1.02):
        sorted_z = z.double().sort().values
        gap = (0.5 * (1 + torch.erf(sorted_z / math.sqrt(2))) - grid).abs().max()
        if z.std() < 1.01:
            assert gap < limit
        else:  # the test tells a scale that is 2% off
            assert gap > limit
    correlation = torch.corrcoef(torch.stack(four)) - torch.eye(4)
    assert correlation.abs().max() < 4 / math.sqrt(len(offset))


def test_any_tile_can_be_drawn_again():
    concept, sample = torch.tensor([0, 3]), torch.tensor([7, 7])
    whole = philox.normals(5, concept, sample, 9, 13)
    assert torch.equal(philox.normals(5, concept[1:], sample[1:], 9, 13)[0], whole[1])
    assert torch.equal(philox.normals(5, concept, sample, 4, 6), whole[:, :3, :6])
    # One value straight from its documented counter: concept 3, sample 7, token 2, column 10.
    words = philox.philox(5, *(torch.tensor(c) for c in (10 // 4, 2, 7, 3)))
    pair = philox.box_muller(philox.uniform(words[2]), philox.uniform(words[3]))
    assert pair[10 % 4 - 2] == whole[1, 2 - 1, 10]
    assert not torch.equal(philox.normals(6, concept, sample, 9, 13), whole)


def test_uniform_of_a_step_is_apart_from_the_noise():
    words = philox.philox(5, *(torch.tensor(c) for c in (0, 0, 7, 3)))
    step = philox.step_uniforms(5, torch.tensor([3]), torch.tensor([7]))
    assert step.item() == philox.uniform(words[0]).item()


def test_box_muller_in_float32_is_within_float32_rounding():
    u = philox.uniform(torch.cat(philox.randint4x(3, torch.arange(20_000))))
    u1, u2 = u.chunk(2)
    exact, single = philox.box_muller(u1, u2), philox.box_muller(u1, u2, torch.float32)
    for x, y in zip(exact, single, strict=True):
        assert (x - y).abs().max() < 6 * 2**-22  # |z| < 6


def test_fold_seed_separates_streams():
    seeds = {philox.fold_seed(seed, index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert philox.fold_seed(3, 4) == philox.fold_seed(3, 4)


@pytest.mark.parametrize(
    "region", [NEIGHBOR, BEYOND, (-1.0, 1.0, 0.3), (0.95, 1.0, 2.0), (0.5, 0.51, 1.6)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sample_lies_in_its_region(region, dtype):
    e = embeddings(3, 9, 33, dtype=dtype)
    rows, alpha, beta = philox.perturb(e, 400, *region, seed=11)
    # The sample as its scalars define it, in float64, and as stored.
    concept, sample = torch.arange(3).repeat_interleave(400), torch.arange(400).repeat(3)
    z = philox.normals(11, concept, sample, 9, 33).double().view(3, 400, 8, 33)
    sigma = e[:, 1:].double().square().mean((1, 2)).sqrt()
    exact = rows.double().clone()
    exact[:, :, 1:] = (
        alpha.double()[..., None, None] * e.double()[:, None, 1:]
        + (beta.double() * sigma[:, None])[..., None, None] * z
    )
    for x in (exact, rows):
        cosine, distance = in_float64(e, x)
        assert cosine.min() >= region[0] and cosine.max() <= region[1]
        assert distance.max() <= region[2]
    assert torch.equal(rows[:, :, 0], e[:, None, 0].expand(3, 400, 33))
    assert (rows - exact.to(dtype)).abs().max() <= 2 * torch.finfo(dtype).eps * rows.abs().max()
    # False before: a step of fixed length along the same noise leaves the region.
    plain = e[:, None, 1:] + 1.7 * z * sigma.view(3, 1, 1, 1)
    cosine, distance = in_float64(e, torch.cat((rows[:, :, :1], plain), 2))
    assert ((cosine < region[0]) | (cosine > region[1]) | (distance > region[2])).any()


def test_samples_fill_their_region():
    cosine, _ = in_float64(e := embeddings(1, 9, 33), philox.perturb(e, 4000, *NEIGHBOR, seed=1)[0])
    assert cosine.min() < 0.502 and cosine.max() > 0.898


def test_splitting_samples_or_concepts_changes_nothing():
    e = embeddings(3, 6, 10)
    whole = philox.perturb(e, 12, *NEIGHBOR, seed=4, offset=2)
    parts = [philox.perturb(e, n, *NEIGHBOR, seed=4, offset=o) for n, o in ((5, 2), (1, 7), (6, 8))]
    for full, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(full, torch.cat(split, dim=1))
    for full, first in zip(
        whole, philox.perturb(e[:1], 12, *NEIGHBOR, seed=4, offset=2), strict=True
    ):
        assert torch.equal(full[:1], first)
    assert not torch.equal(whole[2], philox.perturb(e, 12, *NEIGHBOR, seed=5, offset=2)[2])
    assert not torch.equal(whole[2], philox.perturb(e, 12, *NEIGHBOR, seed=4, offset=3)[2])


def test_internal_blocks_and_threads_change_nothing(monkeypatch):
    e = embeddings(2, 6, 10)
    whole = philox.perturb(e, 12, *NEIGHBOR, seed=4)
    monkeypatch.setattr(philox, "_ELEMENTS_PER_BLOCK", 1)
    for full, split in zip(whole, philox.perturb(e, 12, *NEIGHBOR, seed=4), strict=True):
        assert torch.equal(full, split)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounding_of_exact_samples(dtype):
    e = embeddings(2, 5, 12, dtype=dtype)
    rows, alpha, beta = philox.perturb(e, 7, *NEIGHBOR, seed=1)
    wide = philox.perturb(e.float(), 7, *NEIGHBOR, seed=1)
    assert rows.dtype == dtype and alpha.dtype == beta.dtype == torch.float32
    assert torch.equal(alpha, wide[1]) and torch.equal(beta, wide[2])
    assert (rows.double() - wide[0].double()).abs().max() <= torch.finfo(
        dtype
    ).eps * rows.abs().max()


def test_non_contiguous_embeddings():
    e = embeddings(5, 12, 2).permute(2, 0, 1)
    assert not e.is_contiguous()
    for a, b in zip(
        philox.perturb(e, 3, *NEIGHBOR, seed=1),
        philox.perturb(e.contiguous(), 3, *NEIGHBOR, seed=1),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_only_begin_of_text_does_not_move():
    e = embeddings(2, 1, 8)
    rows, alpha, beta = philox.perturb(e, 3, *NEIGHBOR, seed=1)
    assert torch.equal(rows, e[:, None].expand(2, 3, 1, 8))
    assert bool((alpha == 1).all()) and bool((beta == 0).all())


@pytest.mark.parametrize(
    ("shape", "samples"), [((0, 4, 8), 3), ((2, 4, 8), 0), ((2, 4, 0), 3), ((2, 0, 8), 3)]
)
def test_empty(shape, samples):
    rows, alpha, beta = philox.perturb(torch.zeros(shape), samples, *NEIGHBOR, seed=1)
    assert rows.shape == (shape[0], samples, *shape[1:])
    assert alpha.shape == beta.shape == (shape[0], samples)


def test_directions_without_an_accepted_point_are_nan():
    # One token of one column: noise is parallel to E, so every cosine is 1 or -1.
    rows, alpha, beta = philox.perturb(embeddings(1, 2, 1), 4, *NEIGHBOR, seed=1)
    assert alpha.isnan().all() and beta.isnan().all() and rows[:, :, 1:].isnan().all()
    assert not rows[:, :, 0].isnan().any()
    for bad in (torch.zeros(1, 4, 8), torch.full((1, 4, 8), torch.inf)):
        assert philox.perturb(bad, 4, *NEIGHBOR, seed=1)[2].isnan().all()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"embeddings": torch.zeros(2, 3)}, "embeddings"),
        ({"samples": -1}, "samples"),
        ({"min_cosine": 0.9}, "min_cosine"),
        ({"min_cosine": -1.5}, "min_cosine"),
        ({"max_cosine": math.nan}, "max_cosine"),
        ({"max_distance": 0.0}, "max_distance"),
        ({"max_distance": math.inf}, "max_distance"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"offset": -1}, "offset"),
        ({"offset": (1 << 32) - 1}, "offset"),
    ],
)
def test_bad_arguments(change, name):
    good = {
        "embeddings": torch.ones(2, 3, 4),
        "samples": 2,
        "min_cosine": 0.5,
        "max_cosine": 0.9,
        "max_distance": 1.6,
        "seed": 0,
        "offset": 0,
    }
    philox.perturb(**good)
    with pytest.raises(ValueError, match=name):
        philox.perturb(**(good | change))


def test_bad_types():
    with pytest.raises(TypeError, match="int64"):
        philox.perturb(torch.ones(2, 3, 4, dtype=torch.int64), 2, *NEIGHBOR, seed=0)
    with pytest.raises(TypeError, match="seed"):
        philox.check_seed(1.0)


def test_factor_shapes_the_noise():
    e = embeddings(1, 30, 4)
    scale = torch.tensor([1.9, 0.5, 0.3, 0.2])
    factor = torch.diag(scale / scale.square().mean().sqrt())
    rows, alpha, _ = philox.perturb(e, 200, *NEIGHBOR, seed=1, factor=factor)
    noise = (rows - alpha[..., None, None] * e[:, None])[0, :, 1:]
    spread = noise.square().mean((0, 1)).sqrt()
    assert torch.allclose(spread / spread[0], scale / scale[0], rtol=0.05)
    cosine, distance = in_float64(e, rows)
    assert cosine.min() >= 0.5 and cosine.max() <= 0.9 and distance.max() <= 1.6
