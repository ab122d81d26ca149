"""Random points of a region: the definition, and the operations that must equal it to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import check
from torch import Tensor

from realera_fast import ops
from realera_fast.ops import perturb_reference, philox

NEIGHBOR = (0.5, 0.9, 1.6)
BEYOND = (-1.0, 0.5, 1.6)
REGIONS = [NEIGHBOR, BEYOND, (-1.0, 1.0, 0.3), (0.95, 1.0, 2.0), (0.5, 0.51, 1.6)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def embeddings(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw(
    e: Tensor, samples: int, region: tuple[float, float, float], seed: int, **stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, alpha, beta, scale of the definition."""
    scalars = perturb_reference.perturb(e, samples, *region, seed, **stream)
    rows = perturb_reference.perturb_rows(e, scalars[0], scalars[2], seed, **stream)
    return rows, *scalars


def in_float64(e: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and distance / |E| of every sample, `[c, s]`, begin-of-text excluded."""
    base = e[:, None, 1:].flatten(2).double()
    x = rows[:, :, 1:].flatten(2).double()
    norm = base.norm(dim=-1)
    return (x * base).sum(-1) / (x.norm(dim=-1) * norm), (x - base).norm(dim=-1) / norm


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sample_lies_in_its_region(region, dtype):
    e = embeddings(3, 9, 33, dtype=dtype)
    rows, alpha, beta, scale = draw(e, 400, region, 11)
    # The sample as its scalars define it, in float64, and as stored.
    concept, sample = torch.arange(3).repeat_interleave(400), torch.arange(400).repeat(3)
    z = philox.normals(11, concept, sample, 9, 33).double().view(3, 400, 8, 33)
    sigma = perturb_reference.rms(e)
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
    eps = torch.finfo(dtype).eps
    assert (rows - exact.to(dtype)).abs().max() <= 2 * eps * rows.abs().max()
    assert (scale - (beta.double() * sigma[:, None]).to(dtype)).abs().max() <= 2e-7 * scale.max()
    # False before: a step of fixed length along the same noise leaves the region.
    plain = e[:, None, 1:] + 1.7 * z * sigma.view(3, 1, 1, 1)
    cosine, distance = in_float64(e, torch.cat((rows[:, :, :1], plain), 2))
    assert ((cosine < region[0]) | (cosine > region[1]) | (distance > region[2])).any()


def test_samples_fill_their_region():
    e = embeddings(1, 9, 33)
    cosine, _ = in_float64(e, draw(e, 4000, NEIGHBOR, 1)[0])
    assert cosine.min() < 0.502 and cosine.max() > 0.898


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_norms_are_exact_to_float64_rounding(scale):
    e = embeddings(3, 7, 45, dtype=torch.float64) * scale
    e[1, 2, 3] = 300 * scale  # one element much larger than the others, as text encoders have
    plain = e[:, 1:].square().mean((1, 2)).sqrt()
    assert ((perturb_reference.rms(e) - plain).abs() <= 1e-11 * plain).all()


def test_integer_sums_are_as_exact_as_sums_in_float32():
    """Beta against the same formula in float64 throughout, from float sums."""
    e = embeddings(3, 9, 33, seed=5)
    e[:, 3, 5] = 40.0
    _, _, beta, _ = draw(e, 50, NEIGHBOR, 3)

    def plain(dtype: torch.dtype) -> Tensor:
        concept, sample = torch.arange(3).repeat_interleave(50), torch.arange(50).repeat(3)
        z = philox.normals(3, concept, sample, 9, 33).to(dtype).flatten(1)
        base = e[concept, 1:].flatten(1).to(dtype)
        base = base / base.square().mean(1, keepdim=True).sqrt()
        parallel, total = (base * z).mean(1), z.square().mean(1)
        perpendicular = (total - parallel.square()).sqrt()
        low, high = perturb_reference.interval(parallel, perpendicular, *NEIGHBOR)
        uniform = philox.step_uniforms(3, concept, sample).to(dtype)
        return (low + uniform * (high - low)).view(3, 50)

    check("beta", beta, plain(torch.float64), plain(torch.float32))


def test_largest_elements_do_not_overflow_the_sums():
    """All of E in one element: the largest product that fixed point must hold."""
    e = torch.zeros(1, 1 + (1 << 9), 1 << 12)
    e[0, 1, 0] = 3.0
    assert e[0, 1:].numel() == perturb_reference.MOST_ELEMENTS
    rows, _, beta, _ = draw(e, 1, NEIGHBOR, 0)
    assert not beta.isnan().any()
    cosine, _ = in_float64(e, rows)
    assert 0.5 <= cosine.min() and cosine.max() <= 0.9
    largest = 8 * math.sqrt(perturb_reference.MOST_ELEMENTS)
    assert largest * perturb_reference.inner_scale(perturb_reference.MOST_ELEMENTS) <= 2**31
    assert philox.LARGEST_NORMAL**2 * perturb_reference.SQUARE_SCALE < 2**31
    too_many = torch.zeros(1, 1, 1).expand(1, 2 + (1 << 9), 1 << 12)
    with pytest.raises(ValueError, match="embeddings: expected at most"):
        ops.perturb(too_many, 1, *NEIGHBOR, 0)


def test_splitting_samples_or_concepts_changes_nothing():
    e = embeddings(3, 6, 10)
    whole = draw(e, 12, NEIGHBOR, 4, offset=2)
    parts = [draw(e, n, NEIGHBOR, 4, offset=o) for n, o in ((5, 2), (1, 7), (6, 8))]
    for full, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(full, torch.cat(split, dim=1))
    parts = [draw(e[c : c + 1], 12, NEIGHBOR, 4, offset=2, concept_offset=c) for c in range(3)]
    for full, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(full, torch.cat(split))
    assert not torch.equal(whole[2], draw(e, 12, NEIGHBOR, 5, offset=2)[2])
    assert not torch.equal(whole[2], draw(e, 12, NEIGHBOR, 4, offset=3)[2])


def test_internal_blocks_change_nothing(monkeypatch):
    e = embeddings(2, 6, 10)
    whole = draw(e, 12, NEIGHBOR, 4)
    monkeypatch.setattr(perturb_reference, "_ELEMENTS_PER_BLOCK", 1)
    for full, split in zip(whole, draw(e, 12, NEIGHBOR, 4), strict=True):
        assert torch.equal(full, split)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounding_of_exact_samples(dtype):
    e = embeddings(2, 5, 12, dtype=dtype)
    rows, alpha, beta, _ = draw(e, 7, NEIGHBOR, 1)
    wide = draw(e.float(), 7, NEIGHBOR, 1)
    assert rows.dtype == dtype and alpha.dtype == beta.dtype == torch.float32
    assert torch.equal(alpha, wide[1]) and torch.equal(beta, wide[2])
    assert torch.equal(rows, wide[0].to(dtype))


# ---- The operations, whoever serves them -----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "samples"),
    [((1, 2, 24), 1), ((2, 5, 7), 3), ((3, 9, 33), 2), ((1, 77, 64), 2), ((1, 2, 2), 1)],
)
@pytest.mark.parametrize("region", REGIONS[:3])
def test_the_operations_equal_the_definition_bit_by_bit(shape, samples, dtype, region, device):
    e = embeddings(*shape, dtype=dtype)
    stream = {"offset": 3, "concept_offset": 2}
    rows, *scalars = draw(e, samples, region, 5, **stream)
    got = ops.perturb(e.to(device), samples, *region, 5, **stream)
    for a, b in zip(got, scalars, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b)
    again = ops.perturb_rows(e.to(device), got[0], got[2], 5, **stream)
    assert again.dtype == dtype and torch.equal(again.cpu(), rows)


def test_non_contiguous_embeddings(device):
    e = embeddings(5, 12, 4).permute(2, 0, 1)[::2].to(device)
    assert not e.is_contiguous()
    whole = ops.perturb(e, 3, *NEIGHBOR, 1)
    for a, b in zip(whole, ops.perturb(e.contiguous(), 3, *NEIGHBOR, 1), strict=True):
        assert torch.equal(a, b)
    alpha, scale = whole[0], whole[2]
    rows = ops.perturb_rows(e, alpha, scale, 1)
    assert torch.equal(rows, ops.perturb_rows(e.contiguous(), alpha, scale, 1))
    strided = [torch.stack((t, t), -1)[..., 0] for t in (alpha, scale)]
    assert not strided[0].is_contiguous()
    assert torch.equal(rows, ops.perturb_rows(e, *strided, 1))


def test_memory_behind_the_embeddings_is_not_read(device):
    padded = torch.full((2, 6, 16), torch.nan, device=device)
    view = padded[:, :5, :13]
    view.copy_(embeddings(2, 5, 13))
    for a, b in zip(
        ops.perturb(view, 2, *NEIGHBOR, 1),
        ops.perturb(view.contiguous(), 2, *NEIGHBOR, 1),
        strict=True,
    ):
        assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize(
    ("shape", "samples"),
    [((2, 1, 8), 3), ((0, 4, 8), 3), ((2, 4, 8), 0), ((2, 4, 0), 3), ((2, 0, 8), 3)],
)
def test_nothing_moves(shape, samples, device):
    e = embeddings(*shape).to(device)
    alpha, beta, scale = ops.perturb(e, samples, *NEIGHBOR, 1)
    assert bool((alpha == 1).all()) and not beta.any() and not scale.any()
    rows = ops.perturb_rows(e, alpha, scale, 1)
    assert torch.equal(rows, e[:, None].expand(shape[0], samples, *shape[1:]))


def test_directions_without_an_accepted_point_are_nan(device):
    nan = torch.ones(2, 4, 8)
    nan[1, 2, 3] = torch.nan
    for bad, bad_concepts in (
        (embeddings(1, 2, 1), [0]),  # one element: noise is parallel to E, every cosine 1 or -1
        (torch.zeros(1, 4, 8), [0]),
        (torch.full((1, 4, 8), torch.inf), [0]),
        (1e-42 * embeddings(1, 4, 8), [0]),
        (nan, [1]),
    ):
        bad = bad.to(device)
        alpha, beta, scale = ops.perturb(bad, 4, *NEIGHBOR, 1)
        rows = ops.perturb_rows(bad, alpha, scale, 1)
        for concept in range(len(bad)):
            expected = concept in bad_concepts
            for t in (alpha[concept], beta[concept], scale[concept], rows[concept, :, 1:]):
                assert bool(t.isnan().all()) == expected and bool(t.isnan().any()) == expected
        assert torch.equal(rows[:, :, 0], bad[:, None, 0].expand(-1, 4, -1))


@pytest.mark.parametrize(
    ("seed", "offset", "concept_offset"),
    [((1 << 63) - 1, 0, 0), (1 << 40, (1 << 32) - 3, 7), (1, 1 << 31, (1 << 32) - 1), (2, 5, 3)],
)
def test_large_seeds_and_counters(seed, offset, concept_offset, device):
    e = embeddings(1, 4, 12)
    stream = {"offset": offset, "concept_offset": concept_offset}
    rows, alpha, beta, scale = draw(e, 3, NEIGHBOR, seed, **stream)
    got = ops.perturb(e.to(device), 3, *NEIGHBOR, seed, **stream)
    assert torch.equal(got[1].cpu(), beta)
    again = ops.perturb_rows(e.to(device), got[0], got[2], seed, **stream)
    assert torch.equal(again.cpu(), rows)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"embeddings": torch.zeros(2, 3)}, "embeddings"),
        ({"embeddings": torch.ones(2, 3, 4, dtype=torch.int64)}, "embeddings"),
        ({"samples": -1}, "offset"),
        ({"min_cosine": 0.9}, "max_cosine"),
        ({"min_cosine": -1.5}, "min_cosine"),
        ({"max_cosine": math.nan}, "max_cosine"),
        ({"max_distance": 0.0}, "max_distance"),
        ({"max_distance": math.inf}, "max_distance"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"offset": -1}, "offset"),
        ({"offset": (1 << 32) - 1}, "offset"),
        ({"concept_offset": (1 << 32) - 1}, "concept_offset"),
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
    }
    ops.perturb(**good)
    with pytest.raises(ValueError, match=f"^{name}"):
        ops.perturb(**(good | change))


def test_bad_scalars():
    e = embeddings(2, 3, 4)
    alpha, _, scale = ops.perturb(e, 2, *NEIGHBOR, 0)
    with pytest.raises(ValueError, match=r"^alpha: expected torch.float32 \[2, 2\]"):
        ops.perturb_rows(e, alpha.double(), scale, 0)
    with pytest.raises(ValueError, match=r"^scale: expected torch.float32 \[2, 2\]"):
        ops.perturb_rows(e, alpha, scale[:1], 0)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 5, 6), torch.float32),
        ((1, 3, 5), torch.bfloat16),
        ((1, 1, 4), torch.float64),
        ((0, 3, 4), torch.float16),
    ],
)
def test_opcheck(shape, dtype, device):
    e = embeddings(*shape).to(device, dtype)
    arguments = (e, 3, *NEIGHBOR, 7, 0, 1)
    torch.library.opcheck(torch.ops.realera_fast.perturb.default, arguments)
    alpha, _, scale = torch.ops.realera_fast.perturb(*arguments)
    torch.library.opcheck(torch.ops.realera_fast.perturb_rows.default, (e, alpha, scale, 7, 0, 1))


def test_the_operations_compile_into_one_graph():
    def f(e: Tensor) -> Tensor:
        alpha, _, scale = ops.perturb(e, 3, *NEIGHBOR, 7, offset=2)
        return ops.perturb_rows(e, alpha, scale, 7, offset=2) * 2

    e = embeddings(2, 5, 6)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(e), f(e))
