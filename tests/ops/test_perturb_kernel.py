"""The Triton kernels of `perturb` against its definition: interpreted, or natively on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from realera_fast.ops import perturb_reference, philox  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1 before it is imported)",
    ),
    # NumPy, in the interpreter, where lanes that are not used divide by zero.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

from realera_fast.kernels import perturb as kernel  # noqa: E402

NEIGHBOR = (0.5, 0.9, 1.6)
BEYOND = (-1.0, 0.5, 1.6)


def embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


@triton.jit
def _words(out_ptr, seed: tl.int64, start, COUNT: tl.constexpr):
    offset = start + tl.arange(0, COUNT)
    w0, w1, w2, w3 = tl.randint4x(seed, offset)
    place = out_ptr + tl.arange(0, COUNT)
    tl.store(place, w0.to(tl.int64))
    tl.store(place + COUNT, w1.to(tl.int64))
    tl.store(place + 2 * COUNT, w2.to(tl.int64))
    tl.store(place + 3 * COUNT, w3.to(tl.int64))


@triton.jit
def _stock(out_ptr, seed: tl.int64, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    n0, n1, n2, n3 = tl.randn4x(seed, offset)
    u0, u1, u2, u3 = tl.rand4x(seed, offset)
    place = out_ptr + offset
    tl.store(place, n0)
    tl.store(place + COUNT, n1)
    tl.store(place + 2 * COUNT, n2)
    tl.store(place + 3 * COUNT, n3)
    tl.store(place + 4 * COUNT, u0)
    tl.store(place + 5 * COUNT, u1)
    tl.store(place + 6 * COUNT, u2)
    tl.store(place + 7 * COUNT, u3)


@triton.jit
def _noise(out_ptr, seed: tl.int64, first, sample, concept, groups, BLOCK: tl.constexpr):
    z = kernel._tile_noise(seed, first, sample.to(tl.uint32), concept.to(tl.uint32), groups, BLOCK)
    tl.store(out_ptr + tl.arange(0, 4 * BLOCK), z)


@pytest.mark.parametrize("seed", [0, 3, 0x123456789ABCDEF, (1 << 63) - 1])
@pytest.mark.parametrize("start", [0, 10, (1 << 33) + 5])
def test_words_equal_tritons_bit_by_bit(seed, start):
    out = torch.zeros(4, 256, dtype=torch.int64, device=DEVICE)
    _words[(1,)](out, seed, start, COUNT=256)
    words = torch.stack(philox.randint4x(seed, start + torch.arange(256, device=DEVICE)))
    assert torch.equal(out & 0xFFFFFFFF, words)


def test_uniforms_equal_tritons_and_normals_do_up_to_rounding():
    out = torch.zeros(8, 4096, device=DEVICE)
    _stock[(1,)](out, 5, COUNT=4096)
    offset = torch.arange(4096, device=DEVICE)
    words = philox.randint4x(5, offset)
    uniforms = [philox.uniform(word) for word in words]
    assert torch.equal(out[4:], torch.stack(uniforms))
    # `tl.randn4x` multiplies by 2 pi before it reduces the turn: 3e-7 of angle at radius 5.7.
    ours = torch.stack(philox.randn4x(5, offset))
    assert (out[:4] - ours).abs().max() < 4e-6


def test_noise_of_a_tile_to_the_bit():
    """Any tile: here groups 7 to 70 of a prompt of width 13 (4 groups a token)."""
    out = torch.zeros(256, device=DEVICE)
    _noise[(1,)](out, 7, 7, 11, 2, 4, BLOCK=64)
    concept, sample = torch.tensor([2], device=DEVICE), torch.tensor([11], device=DEVICE)
    expected = philox.normals(7, concept, sample, 18, 16).flatten()[12:268]
    assert torch.equal(out, expected)


def kernel_draw(e, samples, region, seed, offset=0, concept_offset=0):
    """Rows, alpha, beta, scale of the kernels."""
    stream = (seed, offset, concept_offset)
    scalars = kernel.perturb(e, samples, *region, *stream)
    rows = kernel.perturb_rows(e, scalars[0], scalars[2], *stream)
    return rows, *scalars


def defined_draw(e, samples, region, seed, offset=0, concept_offset=0):
    stream = (seed, offset, concept_offset)
    scalars = perturb_reference.perturb(e, samples, *region, *stream)
    rows = perturb_reference.perturb_rows(e, scalars[0], scalars[2], *stream)
    return rows, *scalars


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        assert torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize(
    ("shape", "samples"),
    [
        ((1, 2, 24), 1),
        ((2, 5, 7), 3),
        ((3, 9, 33), 2),
        ((1, 77, 64), 2),
        ((2, 3, 130), 1),
        ((1, 30, 160), 2),  # more than one tile
    ],
)
@pytest.mark.parametrize("region", [NEIGHBOR, BEYOND, (-1.0, 1.0, 0.7)])
def test_perturb_equals_its_definition_to_the_bit(shape, samples, region):
    e = embeddings(*shape)
    assert_same(kernel_draw(e, samples, region, 5, 3, 4), defined_draw(e, samples, region, 5, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_perturb_in_other_types(dtype):
    e = embeddings(2, 5, 18, dtype=dtype)
    assert_same(kernel_draw(e, 3, NEIGHBOR, 5), defined_draw(e, 3, NEIGHBOR, 5))


@pytest.mark.parametrize("tile", [4, 16, 64])
def test_tiles_change_no_bit(tile, monkeypatch):
    e = embeddings(1, 9, 33)
    whole = kernel_draw(e, 2, NEIGHBOR, 4)
    monkeypatch.setattr(kernel, "_BLOCK", tile)
    assert_same(kernel_draw(e, 2, NEIGHBOR, 4), whole)


@pytest.mark.parametrize("region", [NEIGHBOR, BEYOND, (0.5, 0.5001, 1.6)])
def test_every_sample_lies_in_its_region(region):
    e = embeddings(2, 9, 33)
    rows = kernel_draw(e, 20, region, 11)[0]
    base, x = e[:, None, 1:].flatten(2).double(), rows[:, :, 1:].flatten(2).double()
    cosine = torch.cosine_similarity(base.expand_as(x), x, dim=-1)
    assert cosine.min() >= region[0] and cosine.max() <= region[1]
    assert ((x - base).norm(dim=-1) <= region[2] * base.norm(dim=-1)).all()


def test_splitting_samples_or_concepts_changes_no_bit():
    e = embeddings(3, 6, 10)
    whole = kernel_draw(e, 5, NEIGHBOR, 4, 2)
    parts = [kernel_draw(e, n, NEIGHBOR, 4, o) for n, o in ((1, 2), (4, 3))]
    assert_same([torch.cat(split, 1) for split in zip(*parts, strict=True)], whole)
    parts = [kernel_draw(e[c : c + 1], 5, NEIGHBOR, 4, 2, c) for c in range(3)]
    assert_same([torch.cat(split) for split in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize(
    ("seed", "offset", "concept_offset"),
    [((1 << 63) - 1, 0, 0), (1 << 40, (1 << 32) - 3, 7), (1, 1 << 31, (1 << 32) - 1)],
)
def test_large_seeds_and_counters(seed, offset, concept_offset):
    e = embeddings(1, 4, 12)
    arguments = (e, 3, NEIGHBOR, seed, offset, concept_offset)
    assert_same(kernel_draw(*arguments), defined_draw(*arguments))


def test_non_contiguous_embeddings():
    e = embeddings(5, 12, 4).permute(2, 0, 1)[::2]
    assert not e.is_contiguous()
    assert_same(kernel_draw(e, 3, NEIGHBOR, 1), kernel_draw(e.contiguous(), 3, NEIGHBOR, 1))


def test_memory_behind_the_embeddings_is_not_read():
    padded = torch.full((2, 6, 16), torch.nan, device=DEVICE)
    view = padded[:, :5, :13]
    view.copy_(embeddings(2, 5, 13))
    got = kernel_draw(view, 2, NEIGHBOR, 1)
    assert not any(t.isnan().any() for t in got)
    assert_same(got, kernel_draw(view.contiguous(), 2, NEIGHBOR, 1))


@pytest.mark.parametrize(
    ("shape", "samples"),
    [((2, 1, 8), 3), ((0, 4, 8), 3), ((2, 4, 8), 0), ((2, 4, 0), 3), ((2, 0, 8), 3)],
)
def test_nothing_moves(shape, samples):
    e = embeddings(*shape)
    assert_same(kernel_draw(e, samples, NEIGHBOR, 1), defined_draw(e, samples, NEIGHBOR, 1))


def test_directions_without_an_accepted_point_are_nan():
    partly = embeddings(2, 4, 8)
    partly[1, 2, 3] = torch.nan
    for bad in (
        embeddings(1, 2, 1),
        torch.zeros(1, 4, 8, device=DEVICE),
        torch.full((1, 4, 8), torch.inf, device=DEVICE),
        partly,
    ):
        got = kernel_draw(bad, 2, NEIGHBOR, 1)
        assert got[1].isnan().any() and got[0][-1, :, 1:].isnan().all()
        assert_same(got, defined_draw(bad, 2, NEIGHBOR, 1))


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: the dispatcher sends only CUDA tensors here")
def test_cuda_op_is_the_kernel_and_can_be_captured():
    from realera_fast import ops

    e = embeddings(2, 9, 33)
    expected = kernel_draw(e, 3, NEIGHBOR, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        alpha, beta, scale = ops.perturb(e, 3, *NEIGHBOR, 1)
        rows = ops.perturb_rows(e, alpha, scale, 1)
    graph.replay()
    assert_same((rows, alpha, beta, scale), expected)
