"""The Triton kernels of `project` against its definition: interpreted, or natively on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from tolerance import check
from torch import Tensor

from realera_fast.ops import reference

triton = pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported)",
)

from realera_fast.kernels import project as kernel  # noqa: E402

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)
SIZES = [
    (1, 7, (3, 5, 20), 1),
    (5, 16, (16, 32), 4),
    (40, 33, (3, 5, 20), 5),
    (17, 32, (70,), 16),
    (19, 40, (1, 17, 9), 20),
    (33, 1, (1, 60), 40),
]
"""n, d, heights, r."""


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=[False, True], ids=["hidden", "fused"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to hidden rows, whatever the number of rows."""
    monkeypatch.setattr(kernel, "_FUSED_ROWS", 1 << 30 if request.param else 0)
    return request.param


def small_tiles(monkeypatch: pytest.MonkeyPatch, m: int = 16, n: int = 16, k: int = 16) -> None:
    """Several tiles and steps for small sizes."""
    shape = kernel.Shape(m=m, n=n, k=k, warps=4, stages=2)
    monkeypatch.setattr(kernel, "_shape", lambda *_: shape)
    monkeypatch.setattr(kernel, "_backward_shape", lambda *_: shape)
    monkeypatch.setattr(kernel, "_ADD", shape)


def arguments(
    n: int, d: int, heights: Sequence[int], r: int, dtype: torch.dtype, factors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, down, up; float32 master factors if asked for."""
    m = sum(heights)
    x, weight = torch.randn(n, d).to(DEVICE, dtype), torch.randn(m, d).to(DEVICE, dtype)
    down, up = torch.randn(len(heights), r, d).to(DEVICE), torch.randn(m, r).to(DEVICE)
    return (x, weight, down, up) if factors else (x, weight, down.to(dtype), up.to(dtype))


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, shape).to(DEVICE, dtype)


def poisoned(matrix: Tensor) -> Tensor:
    """The same matrix as a view into rows that are longer and NaN around it."""
    around = torch.full(
        (matrix.shape[0] + 4, matrix.shape[1] + 5), torch.nan, dtype=matrix.dtype, device=DEVICE
    )
    view = around[2:-2, 3:-2]
    view.copy_(matrix)
    return view


def exactly(*tensors: Tensor, like: Tensor) -> list[Tensor]:
    """In float64, after the rounding to the dtype of ``like`` that factors go through."""
    return [t.to(like.dtype).double() for t in tensors]


def check_forward(
    got: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    heights: Sequence[int],
    scaling: float,
) -> None:
    assert got.dtype == x.dtype
    exact = reference.project(*exactly(x, weight, down, up, like=x), heights, scaling)
    check("y", got, exact, reference.project(x, weight, down, up, heights, scaling))


def check_backward(
    got: tuple[Tensor, Tensor],
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    heights: Sequence[int],
    scaling: float,
) -> None:
    exact = reference.project_backward(*exactly(grad, x, down, up, like=x), heights, scaling)
    plain = reference.project_backward(grad, x, down, up, heights, scaling)
    for name, *both in zip(("down", "up"), got, exact, plain, strict=True):
        assert both[0].dtype == both[2].dtype
        check(name, *both)


class TestForward:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize(("n", "d", "heights", "r"), SIZES, ids=str)
    def test_results(self, n, d, heights, r, dtype, fused) -> None:
        given = arguments(n, d, heights, r, dtype)
        check_forward(kernel.project(*given, heights, 0.7), *given, heights, 0.7)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("group", [1, 2, 8])
    def test_tiles_of_any_shape(self, dtype, group, fused, monkeypatch) -> None:
        small_tiles(monkeypatch, m=16, n=32)
        monkeypatch.setattr(kernel, "_GROUP", group)
        heights = (33, 5, 64)
        given = arguments(50, 40, heights, 4, dtype)
        check_forward(kernel.project(*given, heights, 2.0), *given, heights, 2.0)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_sums_of_integers_are_exact_but_for_the_last_rounding(self, dtype, fused) -> None:
        heights = (16, 3, 70)
        x, weight = integers(20, 90, dtype=dtype), integers(89, 90, dtype=dtype)
        # A few rows and ranks, so that hidden rows are exact in bfloat16 as well.
        down, up = integers(3, 5, 90, dtype=dtype), integers(89, 5, dtype=dtype)
        down[..., 40:] = 0
        got = kernel.project(x, weight, down, up, heights, 3.0)
        exact = reference.project(*exactly(x, weight, down, up, like=x), heights, 3.0)
        assert torch.equal(got, exact.to(dtype))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_master_factors_are_rounded_first(self, dtype, fused) -> None:
        x, weight, down, up = arguments(9, 20, (4, 9), 4, dtype, factors=True)
        got = kernel.project(x, weight, down, up, (4, 9), 0.5)
        assert torch.equal(
            got, kernel.project(x, weight, down.to(dtype), up.to(dtype), (4, 9), 0.5)
        )

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_memory_around_is_neither_read_nor_written(self, dtype, fused) -> None:
        heights = (3, 5, 20)
        x, weight, down, up = arguments(21, 13, heights, 5, dtype)
        expected = kernel.project(x, weight, down, up, heights, 0.7)
        around = torch.full((30, 40), torch.nan, dtype=dtype, device=DEVICE)
        y = around[4:25, 6:34]
        kernel.project_into(y, poisoned(x), poisoned(weight), down, up, heights, 0.7)
        # A library may take another way for other strides.
        check_forward(y, x, weight, down, up, heights, 0.7)
        if dtype in HALF and fused:
            assert torch.equal(y, expected)
        assert int(around.isnan().sum()) == around.numel() - y.numel()

    def test_what_is_beyond_the_end_is_not_read(self, monkeypatch) -> None:
        """A second row would be terabytes away: outside of all memory."""
        monkeypatch.setattr(kernel, "_FUSED_ROWS", 1)
        x, weight, down, up = arguments(1, 12, (1,), 4, torch.bfloat16)
        far = [torch.as_strided(t, (1, 12), (1 << 40, 1)) for t in (x, weight)]
        got = kernel.project(*far, down, up, (1,), 0.7)
        assert torch.equal(got, kernel.project(x, weight, down, up, (1,), 0.7))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_strides(self, dtype, fused) -> None:
        heights = (4, 9)
        x, weight, down, up = arguments(11, 12, heights, 4, dtype)
        y = torch.empty(13, 11, dtype=dtype, device=DEVICE).mT
        columns = [t.mT.contiguous().mT for t in (x, weight, down, up)]
        kernel.project_into(y, *columns, heights, 0.7)
        check_forward(y, x, weight, down, up, heights, 0.7)
        row = x[:1].expand(11, 12)
        got = kernel.project(row, weight, down, up, heights, 0.7)
        check_forward(got, row, weight, down, up, heights, 0.7)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_without_lora(self, dtype) -> None:
        x, weight, down, up = arguments(9, 20, (4, 9), 4, dtype)
        expected = torch.mm(x, weight.mT)
        for thin, high in ((None, None), (down[:, :0], up[:, :0])):
            assert torch.equal(kernel.project(x, weight, thin, high, (4, 9), 0.7), expected)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_scaled_by_zero(self, dtype, fused) -> None:
        x, weight, down, up = arguments(9, 20, (4, 9), 4, dtype)
        got = kernel.project(x, weight, down, up, (4, 9), 0.0)
        check("y", got, x.double() @ weight.double().mT, x @ weight.mT)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_nothing(self, dtype, fused) -> None:
        for n, d, heights in ((0, 8, (4, 9)), (3, 8, (0, 0)), (3, 8, ())):
            given = arguments(n, d, heights, 4, dtype)
            got = kernel.project(*given, heights, 0.7)
            assert got.shape == (n, sum(heights)) and got.dtype == dtype
        given = arguments(3, 0, (4, 9), 4, dtype)
        assert torch.equal(kernel.project(*given, (4, 9), 0.7), given[0].new_zeros(3, 13))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_empty_layers(self, dtype, fused) -> None:
        heights = (0, 4, 0, 9, 0)
        given = arguments(6, 8, heights, 4, dtype)
        check_forward(kernel.project(*given, heights, 0.7), *given, heights, 0.7)

    # NumPy, in the interpreter
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_what_is_not_a_number_stays_in_its_row_and_column(self, dtype, fused) -> None:
        # The last ones: what is beyond the end reads them again.
        heights = (5, 20)
        x, weight, down, up = arguments(10, 9, heights, 4, dtype)
        x[9, 3] = weight[4, 2] = up[24, 1] = torch.nan
        expected = torch.zeros(10, 25, dtype=torch.bool, device=DEVICE)
        expected[9] = expected[:, 4] = expected[:, 24] = True
        assert torch.equal(kernel.project(x, weight, down, up, heights, 0.7).isnan(), expected)
        down[0, 0, 0] = torch.nan
        expected[:, :5] = True
        assert torch.equal(kernel.project(x, weight, down, up, heights, 0.7).isnan(), expected)


class TestBackward:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize(("n", "d", "heights", "r"), SIZES, ids=str)
    def test_results(self, n, d, heights, r, dtype) -> None:
        x, _, down, up = arguments(n, d, heights, r, dtype)
        grad = torch.randn(n, sum(heights)).to(DEVICE, dtype)
        got = kernel.project_backward(grad, x, down, up, heights, 0.7)
        check_backward(got, grad, x, down, up, heights, 0.7)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("slices", [1, 2, 100])
    def test_slices_of_several_blocks(self, dtype, slices, monkeypatch) -> None:
        small_tiles(monkeypatch)
        monkeypatch.setattr(kernel, "_FEWEST_SLICES", slices)
        monkeypatch.setattr(kernel, "_PARTIAL", 1 << 30)
        heights = (33, 5, 16)
        x, _, down, up = arguments(70, 9, heights, 5, dtype)
        grad = torch.randn(70, 54).to(DEVICE, dtype)
        got = kernel.project_backward(grad, x, down, up, heights, 2.0)
        check_backward(got, grad, x, down, up, heights, 2.0)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_sums_of_integers_are_exact(self, dtype) -> None:
        heights = (16, 3, 40)
        x, down, up = (
            integers(20, 30, dtype=dtype),
            integers(3, 5, 30, dtype=dtype),
            integers(59, 5, dtype=dtype),
        )
        grad = integers(20, 59, dtype=dtype)
        got = kernel.project_backward(grad, x, down, up, heights, 0.5)
        expected = reference.project_backward(*exactly(grad, x, down, up, like=x), heights, 0.5)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.double(), b)

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_sums_are_not_rounded_to_16_bits(self, dtype) -> None:
        x, _, down, up = arguments(60, 16, (8, 16), 4, dtype)
        grad = torch.randn(60, 24).to(DEVICE, dtype)
        for part in kernel.project_backward(grad, x, down, up, (8, 16), 1.0):
            assert not torch.equal(part.to(dtype).float(), part)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_memory_around_is_not_read(self, dtype) -> None:
        heights = (3, 5, 20)
        x, _, down, up = arguments(21, 13, heights, 5, dtype)
        grad = torch.randn(21, 28).to(DEVICE, dtype)
        got = kernel.project_backward(poisoned(grad), poisoned(x), down, up, heights, 0.7)
        check_backward(got, grad, x, down, up, heights, 0.7)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_strides(self, dtype) -> None:
        heights = (4, 9)
        x, _, down, up = arguments(11, 12, heights, 4, dtype)
        grad = torch.randn(11, 13).to(DEVICE, dtype)
        columns = [t.mT.contiguous().mT for t in (grad, x, down, up)]
        got = kernel.project_backward(*columns, heights, 0.7)
        check_backward(got, grad, x, down, up, heights, 0.7)
        # What the gradient of a sum looks like.
        one = grad[:1, :1].expand(11, 13)
        got = kernel.project_backward(one, x, down, up, heights, 0.7)
        check_backward(got, one, x, down, up, heights, 0.7)

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_master_factors_are_rounded_first(self, dtype) -> None:
        x, _, down, up = arguments(9, 20, (4, 9), 4, dtype, factors=True)
        grad = torch.randn(9, 13).to(DEVICE, dtype)
        got = kernel.project_backward(grad, x, down, up, (4, 9), 0.5)
        expected = kernel.project_backward(grad, x, down.to(dtype), up.to(dtype), (4, 9), 0.5)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize(
        ("n", "heights", "r"), [(0, (4, 9), 4), (3, (0, 0), 4), (3, (), 4), (3, (4, 9), 0)], ids=str
    )
    def test_nothing(self, n, heights, r, dtype) -> None:
        x, _, down, up = arguments(n, 8, heights, r, dtype)
        grad = torch.randn(n, sum(heights)).to(DEVICE, dtype)
        got = kernel.project_backward(grad, x, down, up, heights, 0.7)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(got[0], torch.zeros_like(down, dtype=exact))
        assert torch.equal(got[1], torch.zeros_like(up, dtype=exact))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_empty_layers(self, dtype) -> None:
        heights = (0, 4, 0, 9, 0)
        x, _, down, up = arguments(6, 8, heights, 4, dtype)
        grad = torch.randn(6, 13).to(DEVICE, dtype)
        got = kernel.project_backward(grad, x, down, up, heights, 0.7)
        check_backward(got, grad, x, down, up, heights, 0.7)

    # NumPy, in the interpreter
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_what_is_not_a_number_stays_in_its_layer_and_column(self, dtype) -> None:
        x, _, down, up = arguments(10, 9, (5, 20), 4, dtype)
        grad = torch.randn(10, 25).to(DEVICE, dtype)
        grad[9, 24] = torch.nan
        got = kernel.project_backward(grad, x, down, up, (5, 20), 0.7)
        assert not got[0][0].isnan().any() and got[0][1].isnan().all()
        assert not got[1][:24].isnan().any() and got[1][24].isnan().all()


class TestPlan:
    @pytest.mark.parametrize("block", [16, 128, 256])
    @pytest.mark.parametrize("heights", [(320, 640, 1280), (3, 0, 129, 128), (1,), (0,)], ids=str)
    def test_every_column_is_in_one_tile_of_its_layer(self, heights, block) -> None:
        tiles = kernel._tiles(heights, block, torch.device(DEVICE)).tolist()
        found = [(layer, c) for layer, start, end, _ in tiles for c in range(start, end)]
        assert [c for _, c in found] == list(range(sum(heights)))
        layers = [layer for layer, height in enumerate(heights) for _ in range(height)]
        assert [layer for layer, _ in found] == layers
        assert all(0 < end - start <= block for _, start, end, _ in tiles)

    def test_layers_that_take_longest_come_first(self) -> None:
        layers = kernel._layers((320, 0, 1280, 640), torch.device(DEVICE)).tolist()
        assert layers == [[2, 320, 1600, 0], [3, 1600, 2240, 0], [0, 0, 320, 0]]

    def test_lists_are_made_once(self) -> None:
        """A captured graph goes on reading them, and copies can't be captured."""
        device = torch.device(DEVICE)
        first = kernel._tiles((7, 8), 16, device)
        for height in range(1000):
            kernel._tiles((height,), 16, device)
        assert kernel._tiles((7, 8), 16, device) is first

    @pytest.mark.parametrize("rank", [1, 4, 16, 100])
    @pytest.mark.parametrize("rows", [1, 64, 616, 4235, 21_845, 1_000_000])
    def test_slices_cover_the_rows_and_fit_their_memory(self, rows, rank) -> None:
        for item_size in (2, 4):
            slices, size = kernel._slices(rows, rank, 64, item_size)
            assert size % 64 == 0 and (slices - 1) * size < rows <= slices * size
            fitting = slices * rank * 4 * kernel._PARTIAL <= rows * item_size
            assert fitting or slices <= kernel._FEWEST_SLICES

    def test_alignment(self) -> None:
        assert kernel._alignment((320, 640, 16)) == 16
        assert kernel._alignment((320, 8)) == 1
        matrix = torch.zeros(4, 48, dtype=torch.bfloat16, device=DEVICE)
        assert kernel._aligned((16, 32), matrix[:, :32])
        assert not kernel._aligned((16, 8), matrix)
        assert not kernel._aligned((), matrix[:, :17])
        assert not kernel._aligned((), matrix[:, 1:33])
        assert not kernel._aligned((), torch.zeros(4, 40, device=DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: the interpreter has no tensor cores")
class TestNative:
    HEIGHTS = (320, 640, 1280, 320)

    @pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
    @pytest.mark.parametrize("r", [4, 16, 40])
    @pytest.mark.parametrize("n", [1, 64, 65, 600, 4235])
    def test_real_sizes(self, n, r, dtype) -> None:
        x, weight, down, up = arguments(n, 768, self.HEIGHTS, r, dtype)
        down = down / 768**0.5
        got = kernel.project(x, weight, down, up, self.HEIGHTS, 0.7)
        check_forward(got, x, weight, down, up, self.HEIGHTS, 0.7)
        assert torch.equal(got, kernel.project(x, weight, down, up, self.HEIGHTS, 0.7))
        grad = torch.randn_like(got)
        parts = kernel.project_backward(grad, x, down, up, self.HEIGHTS, 0.7)
        check_backward(parts, grad, x, down, up, self.HEIGHTS, 0.7)
        again = kernel.project_backward(grad, x, down, up, self.HEIGHTS, 0.7)
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("n", [20, 700])
    def test_captured(self, n, dtype) -> None:
        x, weight, down, up = arguments(n, 64, (32, 48), 4, dtype)
        grad = torch.randn(n, 80).to(DEVICE, dtype)

        def both() -> tuple[Tensor, Tensor, Tensor]:
            y = kernel.project(x, weight, down, up, (32, 48), 0.7)
            return y, *kernel.project_backward(grad, x, down, up, (32, 48), 0.7)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            both()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = both()
        # The graph computes again, with what is there by then.
        x.normal_()
        graph.replay()
        check_forward(got[0], x, weight, down, up, (32, 48), 0.7)
        check_backward(got[1:], grad, x, down, up, (32, 48), 0.7)
