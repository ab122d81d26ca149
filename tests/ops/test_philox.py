"""The random stream: known answers, counters, distributions, accuracy of the last bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tolerance import check
from torch import Tensor

from realera_fast.ops import philox

WORD = 0xFFFFFFFF


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


def test_box_muller_is_as_exact_as_pytorch():
    u = philox.uniform(torch.cat(philox.randint4x(3, torch.arange(100_000))))
    # Both ends of the logarithm, and turns beside every multiple of an eighth.
    edges = torch.tensor([0.0, 1e-7, 2e-7, 0.5, 0.70710677, 0.7071068, 1 - 2.0**-24])
    eighths = torch.arange(8) / 8
    eighths = torch.cat((eighths, eighths.nextafter(torch.tensor(1.0))))
    u1, u2 = u.chunk(2)
    u1 = torch.cat((u1, edges.repeat_interleave(len(eighths))))
    u2 = torch.cat((u2, eighths.repeat(len(edges))))

    def plain(dtype: torch.dtype) -> Tensor:
        first, second = u1.clamp_min(philox.SMALLEST_UNIFORM).to(dtype), u2.to(dtype)
        radius = torch.sqrt(-2.0 * torch.log(first))
        angle = second * torch.tensor(2 * math.pi, dtype=dtype)
        return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)))

    ours = torch.stack(philox.box_muller(u1, u2))
    assert ours.abs().max() < philox.LARGEST_NORMAL
    check("box_muller", ours, plain(torch.float64), plain(torch.float32))
    # Where PyTorch multiplies by 2 pi first it loses what we keep.
    error = (ours - plain(torch.float64)).abs().max()
    assert error < (plain(torch.float32) - plain(torch.float64)).abs().max()


def test_normals_do_not_depend_on_where_they_are_computed():
    """No library function whose vectorized body and tail differ in the last bit."""
    u = philox.uniform(torch.cat(philox.randint4x(3, torch.arange(1001))))
    u1, u2 = u[:2000], u[2000:4000]
    whole = torch.stack(philox.box_muller(u1, u2))
    single = [
        torch.stack(philox.box_muller(u1[i : i + 1], u2[i : i + 1])) for i in range(0, 2000, 7)
    ]
    assert torch.equal(whole[:, ::7], torch.cat(single, 1))
    strided = torch.stack(philox.box_muller(u1[::3], u2[::3]))
    assert torch.equal(whole[:, ::3], strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_square_root_is_correctly_rounded(dtype):
    x = torch.cat(
        (torch.rand(200_000, dtype=dtype) * 40, torch.tensor([0.0, 1.0, 4.0], dtype=dtype))
    )
    assert torch.equal(philox.square_root(x), torch.from_numpy(np.sqrt(x.numpy())))
    odd = philox.square_root(torch.tensor([math.inf, math.nan, -1.0], dtype=dtype))
    assert odd[0] == math.inf and odd[1:].isnan().all()


def test_fold_seed_separates_streams():
    seeds = {philox.fold_seed(seed, index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert philox.fold_seed(3, 4) == philox.fold_seed(3, 4)


def test_bad_seeds():
    with pytest.raises(TypeError, match="seed"):
        philox.check_seed(1.0)
    for seed in (-1, 1 << 63):
        with pytest.raises(ValueError, match="seed"):
            philox.check_seed(seed)
