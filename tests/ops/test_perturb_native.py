"""`perturb` and `perturb_rows` in C++ against their definition: equal to the last bit."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from threads import using_threads
from tiles import tile_sets
from torch import Tensor

from realera_fast import ops
from realera_fast.ops import perturb_reference, philox

NATIVE = ops.implementations()["perturb"]["cpu"] == "native"
pytestmark = pytest.mark.skipif(not NATIVE, reason="the native library has no `perturb`")

NEIGHBOR = (0.5, 0.9, 1.6)
BEYOND = (-1.0, 0.5, 1.6)
ANYWHERE = (-1.0, 1.0, 0.7)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 2, 1),
    (1, 2, 4),
    (2, 5, 7),
    (3, 9, 33),
    (1, 4, 64),
    (2, 3, 130),
    (1, 77, 64),
    (2, 12, 768),  # more than one block of tokens
    (1, 3, 1030),  # and of columns
    (1, 2, 9001),
    (17, 2, 5),
]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are equal: those of any NaN, and not those of zeros of two signs."""
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (x.nan_to_num(0.0, torch.inf, -torch.inf).contiguous() for x in (a, b))
    word = BITS[a.element_size()]
    return torch.equal(a.view(word), b.view(word))


def agree(
    e: Tensor,
    samples: int,
    region: tuple[float, float, float] = NEIGHBOR,
    seed: int = 5,
    offset: int = 0,
    concept_offset: int = 0,
) -> tuple[Tensor, ...]:
    """Draws with both, scalars and rows, and fails where they differ."""
    place = {"offset": offset, "concept_offset": concept_offset}
    got = ops.perturb(e, samples, *region, seed, **place)
    expected = perturb_reference.perturb(e, samples, *region, seed, **place)
    for name, a, b in zip(("alpha", "beta", "scale"), got, expected, strict=True):
        assert same(a, b), name
    rows = ops.perturb_rows(e, got[0], got[2], seed, **place)
    assert rows.is_contiguous()
    assert same(rows, perturb_reference.perturb_rows(e, got[0], got[2], seed, **place))
    return (*got, rows)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with using_threads(request.param):
        yield request.param


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    agree(embeddings(*shape, dtype=dtype), 3)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("region", [NEIGHBOR, BEYOND, ANYWHERE, (0.5, 0.5001, 1.6), (0.2, 1.0, 9)])
def test_regions(region: tuple[float, float, float]) -> None:
    agree(embeddings(2, 9, 33), 40, region)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("seed", [0, 1, (1 << 32) + 7, 0x123456789ABCDEF, (1 << 63) - 1])
@pytest.mark.parametrize(
    ("offset", "concept_offset"),
    [(0, 0), (3, 10), (1 << 31, (1 << 31) - 1), ((1 << 32) - 4, (1 << 32) - 2)],
)
def test_seeds_and_counters(seed: int, offset: int, concept_offset: int) -> None:
    agree(embeddings(2, 4, 12), 4, seed=seed, offset=offset, concept_offset=concept_offset)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 77, 768), (3, 25, 70), (700, 2, 3), (1, 2, 20_000)])
def test_threads(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    agree(embeddings(*shape, dtype=dtype), 2)


def test_many_prompts_and_samples() -> None:
    """More embeddings than are held in float32 at once, and many samples of few elements."""
    agree(embeddings(20, 77, 768, dtype=torch.bfloat16), 1)
    agree(embeddings(3, 2, 4), 20_000, ANYWHERE)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    views = [
        embeddings(5, 12, 4, dtype=dtype).permute(2, 0, 1)[::2],
        embeddings(4, 6, 20, dtype=dtype)[1:3, 1:, 2:15],
        embeddings(4, 6, 20, dtype=dtype)[:, ::2, ::3],
        embeddings(1, 6, 20, dtype=dtype).expand(3, 6, 20),
        embeddings(2, 1, 20, dtype=dtype).expand(2, 4, 20),
        embeddings(2, 4, 1, dtype=dtype).expand(2, 4, 9),
    ]
    for e in views:
        got = agree(e, 3)
        for a, b in zip(got, agree(e.contiguous(), 3), strict=True):
            assert same(a, b)


def test_scalars_of_any_stride() -> None:
    e = embeddings(2, 4, 12)
    alpha, _, scale = perturb_reference.perturb(e, 6, *NEIGHBOR, 5)
    whole = perturb_reference.perturb_rows(e, alpha, scale, 5)
    part = ops.perturb_rows(e, alpha[:, 2:5], scale[:, 2:5], 5, offset=2)
    assert same(part, whole[:, 2:5])
    turned = ops.perturb_rows(e, alpha.T.contiguous().T, scale, 5)
    assert same(turned, whole)


def test_memory_around_the_embeddings_is_not_read() -> None:
    padded = torch.full((2, 6, 16), torch.nan)
    view = padded[:, :5, :13]
    view.copy_(embeddings(2, 5, 13))
    assert not any(x.isnan().any() for x in agree(view, 2))


def test_leaves_that_need_gradients() -> None:
    agree(embeddings(2, 5, 13).requires_grad_(), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "samples"),
    [((2, 1, 8), 3), ((0, 4, 8), 3), ((2, 4, 8), 0), ((2, 4, 0), 3), ((2, 0, 8), 3)],
)
def test_nothing_moves(shape: tuple[int, ...], samples: int, dtype: torch.dtype) -> None:
    agree(embeddings(*shape, dtype=dtype), samples)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_of_what_is_zero_or_not_finite(dtype: torch.dtype) -> None:
    e = embeddings(6, 9, 33, dtype=dtype)
    e[1] = 0
    e[2, 3, 5] = torch.nan
    e[3, 8, 32] = torch.inf
    e[4, 1, 0] = -torch.inf
    e[5, 0] = torch.nan  # begin-of-text: no harm
    alpha, *_ = agree(e, 3)
    assert alpha.isnan().all(1).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_very_large_and_small_numbers(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    e = embeddings(5, 3, 9, dtype=torch.float64)
    e = e / e.abs().amax()
    scale = torch.tensor([info.max, info.tiny * 64, 1.0, info.max / 7, 1.0], dtype=torch.float64)
    e = (e * scale[:, None, None]).to(dtype)
    e[4, 1, 1] = info.max
    agree(e, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_without_an_inverse(dtype: torch.dtype) -> None:
    tiny = {torch.float32: 1e-42, torch.float64: 1e-315}[dtype]
    for result in ops.perturb(torch.full((1, 3, 8), tiny, dtype=dtype), 2, *NEIGHBOR, 1):
        assert result.isnan().all()


def test_directions_without_an_accepted_point() -> None:
    alpha, *_ = agree(embeddings(1, 2, 1), 5)
    assert alpha.isnan().all()


def test_the_most_elements() -> None:
    e = embeddings(1, 3, perturb_reference.MOST_ELEMENTS // 2)
    e[0, 1:, 1:] *= 1e-3  # nearly all of the norm in two elements
    agree(e, 1)
    with pytest.raises(ValueError, match="elements"):
        ops.perturb(embeddings(1, 2, perturb_reference.MOST_ELEMENTS + 1), 1, *NEIGHBOR, 1)


def test_arguments_that_the_code_relies_on() -> None:
    raw = torch.ops.realera_fast
    e, one = embeddings(2, 3, 8), torch.ones(2, 4)
    for call in (
        lambda: raw.perturb(e[0], 2, *NEIGHBOR, 1, 0, 0),
        lambda: raw.perturb(e.to(torch.int32), 2, *NEIGHBOR, 1, 0, 0),
        lambda: raw.perturb(e, -1, *NEIGHBOR, 1, 0, 0),
        lambda: raw.perturb_rows(e, one, one[:1], 1, 0, 0),
        lambda: raw.perturb_rows(e, one[0], one[0], 1, 0, 0),
        lambda: raw.perturb_rows(e, one.double(), one.double(), 1, 0, 0),
    ):
        with pytest.raises(RuntimeError):
            call()


# --- Every instruction set ---------------------------------------------------------------------

# A program can't choose: the library takes the best set of the processor. So its loops, which need
# nothing of torch, are compiled here once more, each set by itself.
SOURCE = """
#include "noise.h"
#include <vector>
namespace realera_fast { extern const NoiseKernels loops; }
using namespace realera_fast;
extern "C" void draw(uint64_t seed, uint32_t sample, uint32_t prompt, int64_t token, int64_t count,
                     int64_t width, float* out) {
  std::vector<float> zero(width);
  loops.rows({seed, sample, prompt}, token, width,
             {zero.data(), Kind::kFloat, count, 0, 1}, 0.0, 1.0, out);
}
extern "C" void moments(uint64_t seed, uint32_t sample, uint32_t prompt, int64_t token,
                        int64_t count, int64_t width, const float* e, Moments* out) {
  *out = loops.moments({seed, sample, prompt}, token, count, width, e);
}
extern "C" void rows(uint64_t seed, uint32_t sample, uint32_t prompt, int64_t token, int64_t count,
                     int64_t width, void* e, int kind, double alpha, double scale, void* out) {
  loops.rows({seed, sample, prompt}, token, width,
             {e, static_cast<Kind>(kind), count, width, 1}, alpha, scale, out);
}
extern "C" double largest(void* e, int kind, int64_t count, int64_t width) {
  return loops.largest({e, static_cast<Kind>(kind), count, width, 1}, width);
}
extern "C" uint64_t square_sum(void* e, int kind, int64_t count, int64_t width, double inverse) {
  return loops.square_sum({e, static_cast<Kind>(kind), count, width, 1}, width, inverse);
}
extern "C" void scaled(void* e, int kind, int64_t count, int64_t width, double inverse, float scale,
                       float* out) {
  loops.scaled({e, static_cast<Kind>(kind), count, width, 1}, width, inverse, scale, out);
}
"""
CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
"""In the order of `Kind`."""


@pytest.fixture(scope="module", params=FLAGS)
def loops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None or os.name != "posix" or not CSRC.is_dir():
        pytest.skip("needs g++ and the sources")
    if request.param not in tile_sets():
        pytest.skip("the processor has not these instructions")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "wrapper.cpp").write_text(SOURCE)
    command = [
        *(compiler, "-std=c++17", "-shared", "-fPIC", "-O3", "-ffp-contract=off", "-w"),
        *("-fno-math-errno", "-fno-trapping-math", *FLAGS[request.param], f"-I{CSRC}"),
        *("-DNOISE_KERNELS=loops", f'-DNOISE_NAME="{request.param}"'),
        *(CSRC / "noise.cpp", folder / "wrapper.cpp", "-o", folder / "loops.so"),
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "loops.so"))
    library.largest.restype = ctypes.c_double
    library.square_sum.restype = ctypes.c_int64
    return library


def counters(seed: int, sample: int, concept: int, token: int, count: int, width: int) -> list:
    i64, u32 = ctypes.c_int64, ctypes.c_uint32
    return [ctypes.c_uint64(seed), u32(sample), u32(concept), i64(token), i64(count), i64(width)]


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class TestInstructionSets:
    @pytest.mark.parametrize("width", [1, 3, 4, 15, 16, 33, 64, 65, 127, 768, 1024, 2050])
    @pytest.mark.parametrize(
        ("seed", "sample", "concept"), [(5, 0, 0), ((1 << 63) - 1, (1 << 32) - 1, (1 << 31) + 3)]
    )
    def test_noise(
        self, loops: ctypes.CDLL, width: int, seed: int, sample: int, concept: int
    ) -> None:
        at = torch.tensor([concept]), torch.tensor([sample])
        expected = philox.normals(seed, *at, 11, width)[0]
        out = torch.full((8, width), torch.nan)
        loops.draw(*counters(seed, sample, concept, 3, 7, width), pointer(out))
        assert same(out[:7], expected[2:9])
        assert out[7].isnan().all()
        e = embeddings(7, width)
        scale = perturb_reference.inner_scale(10 * width)
        fixed, sums = e * scale, torch.zeros(2, dtype=torch.int64)
        loops.moments(*counters(seed, sample, concept, 3, 7, width), pointer(fixed), pointer(sums))
        z = expected[2:9]
        assert int(sums[0]) == int((z * e * scale).to(torch.int32).sum(dtype=torch.int64))
        squares = z * z * perturb_reference.SQUARE_SCALE
        assert int(sums[1]) == int(squares.to(torch.int32).sum(dtype=torch.int64))

    def test_many_numbers(self, loops: ctypes.CDLL) -> None:
        """Half a million: rare branches of the logarithm's argument, quadrants, signs."""
        zero = torch.zeros(1, dtype=torch.int64)
        out = torch.empty(64, 8192)
        loops.draw(*counters(77, 0, 0, 1, 64, 8192), pointer(out))
        assert same(out, philox.normals(77, zero, zero, 65, 8192)[0])

    @pytest.mark.parametrize("dtype", KINDS)
    def test_rows_and_sums(self, loops: ctypes.CDLL, dtype: torch.dtype) -> None:
        kind, exact = KINDS.index(dtype), perturb_reference.exact_dtype(dtype)
        at = torch.tensor([2]), torch.tensor([9])
        for width in (1, 7, 16, 50, 768, 1100):
            e = embeddings(5, width, dtype=dtype)
            z = philox.normals(3, *at, 6, width)[0].to(exact)
            # Also subnormal and infinite results.
            for alpha, scale in ((0.3, 0.9), (1e-5, 3e-6), (3e38, 1e38), (torch.nan, 1.0)):
                a, s = (torch.tensor(x, dtype=exact) for x in (alpha, scale))
                out = torch.zeros_like(e)
                loops.rows(
                    *counters(3, 9, 2, 1, 5, width),
                    pointer(e),
                    kind,
                    ctypes.c_double(float(a)),
                    ctypes.c_double(float(s)),
                    pointer(out),
                )
                assert same(out, (a * e.to(exact) + s * z).to(dtype))
            size = kind, ctypes.c_int64(5), ctypes.c_int64(width)
            wide = e.to(torch.float64)
            assert loops.largest(pointer(e), *size) == float(wide.abs().max())
            inverse = 0.5 / float(wide.abs().max())
            fixed = ((wide * inverse).square() * perturb_reference.NORM_SCALE + 0.5).to(torch.int64)
            found = loops.square_sum(pointer(e), *size, ctypes.c_double(inverse))
            assert found == int(fixed.sum())
            out = torch.empty(5, width)
            third = torch.tensor(1 / 3, dtype=exact)
            loops.scaled(
                pointer(e), *size, ctypes.c_double(float(third)), ctypes.c_float(8.0), pointer(out)
            )
            assert same(out, (e.to(exact) * third).to(torch.float32) * 8.0)
            e[-1, -1] = torch.nan
            assert torch.tensor(loops.largest(pointer(e), *size)).isnan()
