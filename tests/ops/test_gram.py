"""`gram_`: the Triton kernel, interpreted on the CPU or native on a GPU; and the operation."""

from __future__ import annotations

import pytest
import torch
from matrices import exact_matmul
from threads import same_for_threads
from tolerance import check, product_error
from torch import Tensor
from torch.library import opcheck

from realera_fast import ops
from realera_fast.ops import reference

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported)",
)

from realera_fast.kernels import gram as kernel  # noqa: E402

HALF = (torch.float32, torch.bfloat16, torch.float16)


def rows_for(
    n: int, d: int, dtype: torch.dtype = torch.float32, device: torch.device | str = DEVICE
) -> tuple[Tensor, Tensor]:
    """`[n, d]` rows and `[n]` weights, some of them negative."""
    return torch.randn(n, d).to(device, dtype), torch.randn(n).to(device)


def zeros(d: int, device: torch.device | str = DEVICE) -> Tensor:
    return torch.zeros(d, d, dtype=torch.float64, device=device)


def summed(x: Tensor, w: Tensor) -> Tensor:
    total = zeros(x.shape[1])
    kernel.gram_(total, x, w)
    return total


def check_sums(got: Tensor, x: Tensor, w: Tensor) -> None:
    """Against float64, by the error of PyTorch's float32 product."""
    exact, plain = x.double(), x.float()
    check(
        "gram",
        got.float(),
        exact.mT @ (w.double()[:, None] * exact),
        plain.mT @ (w.float()[:, None] * plain),
    )


@triton.jit
def _tiles(out_ptr, side):
    index = tl.program_id(0)
    i, j = kernel._tile_of(index, side)
    tl.store(out_ptr + 2 * index, i)
    tl.store(out_ptr + 2 * index + 1, j)


@triton.jit
def _parts(x_ptr, out_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    high, middle, low = kernel._split(tl.load(x_ptr + place))
    tl.store(out_ptr + place, high.to(tl.float32))
    tl.store(out_ptr + COUNT + place, middle.to(tl.float32))
    tl.store(out_ptr + 2 * COUNT + place, low.to(tl.float32))


@needs_triton
class TestKernel:
    @pytest.mark.parametrize("side", range(1, 7))
    def test_every_tile_of_the_triangle_once(self, side: int) -> None:
        count = side * (side + 1) // 2
        out = torch.full((count, 2), -1, dtype=torch.int32, device=DEVICE)
        _tiles[(count,)](out, side)
        expected = {(i, j) for i in range(side) for j in range(i + 1)}
        assert {tuple(pair) for pair in out.tolist()} == expected

    def test_three_parts_hold_every_bit(self) -> None:
        x = torch.randn(512, device=DEVICE) * torch.logspace(-20, 20, 512, device=DEVICE)
        parts = torch.empty(3, 512, device=DEVICE)
        _parts[(1,)](x, parts, COUNT=512)
        assert torch.equal(parts.bfloat16().float(), parts)
        assert torch.equal(parts.double().sum(0), x.double())
        assert (parts[1].abs() <= x.abs() * 2**-8).all()
        assert (parts[2].abs() <= x.abs() * 2**-15).all()

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize(
        ("n", "d"), [(1, 1), (1, 130), (17, 7), (40, 33), (100, 130), (64, 128)], ids=str
    )
    def test_sums(self, n: int, d: int, dtype: torch.dtype) -> None:
        x, w = rows_for(n, d, dtype)
        got = summed(x, w)
        check_sums(got, x, w)
        assert torch.equal(got, got.mT)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_weights_of_other_types(self, dtype: torch.dtype) -> None:
        x, w = rows_for(20, 9)
        check_sums(summed(x, w.to(dtype)), x, w.to(dtype))

    @pytest.mark.parametrize("n", [15, 16, 17, 48, 70])
    def test_many_slices_and_launches(self, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = kernel.Shape(block=16, height=16, depth=16, stages=2, warps=4, resident=1)
        monkeypatch.setattr(kernel, "_shape", lambda source: shape)
        monkeypatch.setattr(kernel, "_SLICE", 16)
        # Room for two slices of the six tiles.
        monkeypatch.setattr(kernel, "_PARTIAL", 2 * 6 * 4 * 16 * 16)
        x, w = rows_for(n, 40)
        got = summed(x, w)
        check_sums(got, x, w)
        assert torch.equal(got, got.mT)

    def test_bands_of_a_tile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = kernel.Shape(block=64, height=16, depth=16, stages=2, warps=4, resident=1)
        x, w = rows_for(20, 80)
        expected = summed(x, w)
        monkeypatch.setattr(kernel, "_shape", lambda source: shape)
        got = summed(x, w)
        check_sums(got, x, w)
        torch.testing.assert_close(got.float(), expected.float())

    @pytest.mark.parametrize(("n", "d"), [(0, 5), (3, 0), (0, 0)])
    def test_nothing_to_add(self, n: int, d: int) -> None:
        x, w = rows_for(n, d)
        total = torch.ones(d, d, dtype=torch.float64, device=DEVICE)
        kernel.gram_(total, x, w)
        assert torch.equal(total, torch.ones_like(total))

    def test_adds_to_what_is_there(self) -> None:
        x, w = rows_for(20, 33)
        start = summed(*rows_for(50, 33))
        total = start.clone()
        kernel.gram_(total, x, w)
        assert torch.equal(total, start + summed(x, w))

    def test_same_bits_twice(self) -> None:
        x, w = rows_for(50, 130)
        assert torch.equal(summed(x, w), summed(x, w))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_memory_around_the_rows_is_not_read(self, dtype: torch.dtype) -> None:
        x, w = rows_for(21, 13, dtype)
        padded = torch.full((30, 20), torch.nan, dtype=dtype, device=DEVICE)
        weights = torch.full((60,), torch.nan, device=DEVICE)
        padded[3:24, 2:15], weights[4:46:2] = x, w
        assert torch.equal(summed(padded[3:24, 2:15], weights[4:46:2]), summed(x, w))

    def test_strided_rows(self) -> None:
        x, w = rows_for(30, 24)
        expected = summed(x[::2, 1::3].contiguous(), w[::2].contiguous())
        assert torch.equal(summed(x[::2, 1::3], w[::2]), expected)
        x, _ = rows_for(24, 30)
        assert torch.equal(summed(x.mT, w), summed(x.mT.contiguous(), w))

    def test_one_weight_for_all(self) -> None:
        x, w = rows_for(20, 9)
        assert torch.equal(summed(x, w[:1].expand(20)), summed(x, w[:1].repeat(20)))

    # NumPy, in the interpreter
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_is_passed_on(self, value: float) -> None:
        x, w = rows_for(20, 9)
        x[4, 3] = value
        finite = summed(x, w).isfinite()
        expected = torch.ones_like(finite)
        expected[3] = expected[:, 3] = False
        assert torch.equal(finite, expected)

    @pytest.mark.parametrize("tiles", [1, 3, 21, 136, 528])
    @pytest.mark.parametrize("rows", [1, 100, 834, 10_000, 100_003])
    def test_slices_cover_the_rows_and_fit_their_memory(self, rows: int, tiles: int) -> None:
        for shape in (kernel._HOPPER, kernel._BLACKWELL, kernel._OTHER):
            splits, size = kernel._plan(rows, tiles, shape, 132)
            assert splits >= 1 and size % shape.depth == 0
            assert size <= kernel._SLICE
            one = 4 * shape.block**2 * tiles
            assert splits * one <= max(kernel._PARTIAL, one)
            assert (splits - 1) * size < rows

    def test_the_plan_fills_a_gpu(self) -> None:
        # 21 tiles of 6 slices on 132 multiprocessors.
        assert kernel._plan(10_000, 21, kernel._HOPPER, 132) == (6, 1696)
        # Fewer slices than programs could take, rather than empty ones.
        assert kernel._plan(20, 1, kernel._HOPPER, 132) == (1, 32)

    @pytest.mark.skipif(INTERPRETED, reason="needs a GPU: the interpreter has no tensor cores")
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize(("n", "d"), [(10_000, 768), (5_000, 2048), (30_000, 65)], ids=str)
    def test_large_sums(self, n: int, d: int, dtype: torch.dtype) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            # Sums of one sign show a rounding that leans to one side.
            x, w = rows_for(n, d, dtype)
            got = summed(x, w.abs())
            check_sums(got, x, w.abs())
            assert torch.equal(got, got.mT)
            assert torch.equal(got, summed(x, w.abs()))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    @pytest.mark.skipif(INTERPRETED, reason="needs a GPU: only CUDA tensors are sent here")
    def test_cuda_op_is_the_kernel_and_can_be_captured(self) -> None:
        x, w = rows_for(300, 130)
        expected = summed(x, w)
        total = zeros(130)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.gram_(total, x, w)
        graph.replay()
        assert torch.equal(total, expected)


@pytest.fixture
def device(device_and_tiles: torch.device) -> torch.device:
    return device_and_tiles


class TestOperation:
    @pytest.mark.parametrize("dtype", [*HALF, torch.float64], ids=str)
    @pytest.mark.parametrize(
        ("n", "d"),
        [(1, 1), (7, 33), (40, 7), (129, 64), (1100, 5), (65, 300), (20, 401)],
        ids=str,
    )
    def test_sums(self, n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        x, w = rows_for(n, d, dtype, device)
        total, plain = zeros(d, device), zeros(d, device)
        ops.gram_(total, x, w)
        if device.type == "cuda" and dtype != torch.float64:
            check_sums(total, x, w)
        else:
            reference.gram_(plain, x, w)
            factors = x.double().mT, w.double()[:, None] * x.double()
            exact, floor = exact_matmul(*factors), product_error(*factors)
            check("gram", total.cpu(), exact, plain.cpu(), floor=floor)
        assert torch.equal(total, total.mT)

    def test_adds_to_what_is_there(self, device: torch.device) -> None:
        x, w = rows_for(20, 8, device=device)
        total, alone = torch.eye(8, dtype=torch.float64, device=device), zeros(8, device)
        ops.gram_(total, x, w)
        ops.gram_(alone, x, w)
        torch.testing.assert_close(total - torch.eye(8, device=device), alone)

    def test_strided_rows(self, device: torch.device) -> None:
        x, w = rows_for(30, 24, device=device)
        strided, dense = zeros(8, device), zeros(8, device)
        ops.gram_(strided, x[::2, 1::3], w[::2])
        ops.gram_(dense, x[::2, 1::3].contiguous(), w[::2].contiguous())
        assert torch.equal(strided, dense)

    @pytest.mark.parametrize(("n", "d"), [(0, 5), (3, 0)])
    def test_nothing_to_add(self, n: int, d: int, device: torch.device) -> None:
        x, w = rows_for(n, d, device=device)
        total = torch.ones(d, d, dtype=torch.float64, device=device)
        ops.gram_(total, x, w)
        assert torch.equal(total, torch.ones_like(total))

    def test_not_a_number_is_passed_on(self, device: torch.device) -> None:
        x, w = rows_for(30, 8, device=device)
        x[4, 3] = torch.nan
        total = zeros(8, device)
        ops.gram_(total, x, w)
        assert total[3].isnan().all() and not total[:3, :3].isnan().any()

    @pytest.mark.parametrize("n", [20, 1300])
    def test_on_the_cpu_equal_to_normal_equations_without_a_move(self, n: int, tiles: str) -> None:
        x, w = rows_for(n, 130, torch.bfloat16, "cpu")
        alone, both, cross = (zeros(130, "cpu") for _ in range(3))
        ops.gram_(alone, x, w)
        ops.normal_equations_(both, cross, x, x.clone(), w)
        assert torch.equal(alone, both)

    def test_same_bits_with_any_number_of_threads(self, tiles: str) -> None:
        x, w = rows_for(700, 200, device="cpu")

        def sums() -> list[Tensor]:
            total = zeros(200, "cpu")
            ops.gram_(total, x, w)
            return [total]

        same_for_threads(sums)

    def test_opcheck(self, device: torch.device) -> None:
        x, w = rows_for(9, 6, torch.bfloat16, device)
        opcheck(torch.ops.realera_fast.gram_.default, (zeros(6, device), x, w))
