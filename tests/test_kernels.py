"""Triton kernels against their definitions: interpreted on the CPU, or natively on a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import check
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from realera_fast import philox  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported)",
)

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
    assert torch.equal(out[4:], torch.stack([philox.uniform(word) for word in words]))
    u0, u1, u2, u3 = (philox.uniform(word) for word in words)
    plain = (
        *philox.box_muller(u0, u1, torch.float32),
        *philox.box_muller(u2, u3, torch.float32),
    )
    check("randn4x", out[:4], torch.stack(philox.randn4x(5, offset)).double(), torch.stack(plain))


def test_noise_of_a_tile():
    """Any tile: here groups 3 to 66 of a prompt of width 13 (4 groups a token)."""
    out = torch.zeros(256, device=DEVICE)
    _noise[(1,)](out, 7, 3, 11, 2, 4, BLOCK=64)
    concept, sample = torch.tensor([2], device=DEVICE), torch.tensor([11], device=DEVICE)
    exact = philox.normals(7, concept, sample, 18, 16).flatten()[12:268]
    plain = philox.normals(7, concept, sample, 18, 16, torch.float32).flatten()[12:268]
    check("noise", out, exact.double(), plain)


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
@pytest.mark.parametrize("region", [NEIGHBOR, (-1.0, 1.0, 0.7)])
def test_perturb_equals_its_definition(shape, samples, region):
    e = embeddings(*shape)
    got = kernel.perturb(e, samples, *region, seed=5, offset=3)
    exact = philox.perturb(e.double(), samples, *region, seed=5, offset=3)
    plain = philox.perturb(e, samples, *region, seed=5, offset=3, compute=torch.float32)
    for name, g, x, p in zip(("rows", "alpha", "beta"), got, exact, plain, strict=True):
        assert g.dtype == torch.float32 and g.shape == x.shape and g.is_contiguous()
        check(name, g, x, p)
    assert torch.equal(got[0][:, :, 0], e[:, None, 0].expand(-1, samples, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_perturb_in_other_types(dtype):
    e = embeddings(2, 5, 18, dtype=dtype)
    got = kernel.perturb(e, 3, *NEIGHBOR, seed=5)
    exact = philox.perturb(e.double(), 3, *NEIGHBOR, seed=5)
    plain = philox.perturb(e, 3, *NEIGHBOR, seed=5, compute=torch.float32)
    assert got[0].dtype == dtype
    assert (
        got[1].dtype == got[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    )
    for name, g, x, p in zip(("rows", "alpha", "beta"), got, exact, plain, strict=True):
        check(name, g, x, p)


@pytest.mark.parametrize("region", [NEIGHBOR, BEYOND, (0.5, 0.5001, 1.6)])
def test_every_sample_lies_in_its_region(region):
    e = embeddings(2, 9, 33)
    rows, _, _ = kernel.perturb(e, 20, *region, seed=11)
    base, x = e[:, None, 1:].flatten(2).double(), rows[:, :, 1:].flatten(2).double()
    cosine = torch.cosine_similarity(base.expand_as(x), x, dim=-1)
    assert cosine.min() >= region[0] and cosine.max() <= region[1]
    assert ((x - base).norm(dim=-1) <= region[2] * base.norm(dim=-1)).all()


def test_splitting_samples_or_concepts_changes_no_bit():
    e = embeddings(3, 6, 10)
    whole = kernel.perturb(e, 5, *NEIGHBOR, seed=4, offset=2)
    parts = [kernel.perturb(e, n, *NEIGHBOR, seed=4, offset=o) for n, o in ((1, 2), (4, 3))]
    for full, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(full, torch.cat(split, dim=1))
    for full, first in zip(
        whole, kernel.perturb(e[:1], 5, *NEIGHBOR, seed=4, offset=2), strict=True
    ):
        assert torch.equal(full[:1], first)
    assert not torch.equal(whole[2], kernel.perturb(e, 5, *NEIGHBOR, seed=5, offset=2)[2])


@pytest.mark.parametrize(
    ("seed", "offset"), [((1 << 63) - 1, 0), (1 << 40, (1 << 32) - 3), (1, 1 << 31)]
)
def test_large_seeds_and_counters(seed, offset):
    e = embeddings(1, 4, 12)
    got = kernel.perturb(e, 3, *NEIGHBOR, seed=seed, offset=offset)[2]
    exact = philox.perturb(e.double(), 3, *NEIGHBOR, seed=seed, offset=offset)[2]
    plain = philox.perturb(e, 3, *NEIGHBOR, seed=seed, offset=offset, compute=torch.float32)[2]
    check("beta", got, exact, plain)


def test_tiles_are_only_a_matter_of_rounding(monkeypatch):
    e = embeddings(1, 9, 33)
    whole = kernel.perturb(e, 2, *NEIGHBOR, seed=4)
    monkeypatch.setattr(kernel, "_BLOCK", 16)
    for a, b in zip(whole, kernel.perturb(e, 2, *NEIGHBOR, seed=4), strict=True):
        assert (a - b).abs().max() <= 4 * torch.finfo(torch.float32).eps * a.abs().max()


def test_non_contiguous_embeddings():
    e = embeddings(5, 12, 4).permute(2, 0, 1)[::2]
    assert not e.is_contiguous()
    for a, b in zip(
        kernel.perturb(e, 3, *NEIGHBOR, seed=1),
        kernel.perturb(e.contiguous(), 3, *NEIGHBOR, seed=1),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_memory_behind_the_embeddings_is_not_read():
    padded = torch.full((2, 6, 16), torch.nan, device=DEVICE)
    view = padded[:, :5, :13]
    view.copy_(embeddings(2, 5, 13))
    for a, b in zip(
        kernel.perturb(view, 2, *NEIGHBOR, seed=1),
        kernel.perturb(view.contiguous(), 2, *NEIGHBOR, seed=1),
        strict=True,
    ):
        assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize(
    ("shape", "samples"),
    [((2, 1, 8), 3), ((0, 4, 8), 3), ((2, 4, 8), 0), ((2, 4, 0), 3), ((2, 0, 8), 3)],
)
def test_nothing_moves(shape, samples):
    e = embeddings(*shape)
    for a, b in zip(
        kernel.perturb(e, samples, *NEIGHBOR, seed=1),
        philox.perturb(e, samples, *NEIGHBOR, seed=1),
        strict=True,
    ):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
def test_directions_without_an_accepted_point_are_nan():
    for bad in (embeddings(1, 2, 1), torch.zeros(1, 4, 8, device=DEVICE)):
        rows, alpha, beta = kernel.perturb(bad, 2, *NEIGHBOR, seed=1)
        assert alpha.isnan().all() and beta.isnan().all()
        assert rows[:, :, 1:].isnan().all() and not rows[:, :, 0].isnan().any()


def test_bad_arguments():
    with pytest.raises(ValueError, match="seed"):
        kernel.perturb(embeddings(1, 4, 8), 2, *NEIGHBOR, seed=-1)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: the dispatcher sends only CUDA tensors here")
def test_cuda_op_is_the_kernel_and_can_be_captured():
    from realera_fast import ops

    e = embeddings(2, 9, 33)
    expected = kernel.perturb(e, 3, *NEIGHBOR, seed=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.perturb(e, 3, *NEIGHBOR, seed=1)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
