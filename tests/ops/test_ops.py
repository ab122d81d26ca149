"""Every operation against the reference and a more exact result, on every device and dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from matrices import exact_matmul, residual_factors, spd
from threads import NATIVE, same_for_threads
from tolerance import check, product_error
from torch import Tensor
from torch.library import opcheck

from realera_fast import ops
from realera_fast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows_for(n: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """`[n, d]` source and destination, a third of them moving, and `[n]` weights."""
    source = torch.randn(n, d, device=device).to(dtype)
    destination = source.clone()
    destination[::3] = torch.randn(len(destination[::3]), d, device=device).to(dtype)
    return source, destination, torch.rand(n, device=device)


@pytest.fixture
def device(device_and_tiles: torch.device) -> torch.device:
    return device_and_tiles


class TestNormalEquations:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("n", "d"),
        [(1, 1), (7, 33), (40, 7), (129, 64), (1100, 5), (65, 300), (20, 401)],
        ids=str,
    )
    def test_sums(self, n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        x, y, w = rows_for(n, d, dtype, device)
        gram, cross = (torch.zeros(d, d, dtype=torch.float64, device=device) for _ in range(2))
        ops.normal_equations_(gram, cross, x, y, w)
        x64, y64, w64 = x.double(), y.double(), w.double()[:, None]
        moved = w64 * (y64 - x64)
        for name, got, a, b in (("gram", gram, x64.mT, w64 * x64), ("cross", cross, moved.mT, x64)):
            check(name, got.cpu(), exact_matmul(a, b), (a @ b).cpu(), floor=product_error(a, b))
        assert torch.equal(gram, gram.mT)

    def test_adds_to_what_is_there(self, device: torch.device) -> None:
        x, y, w = rows_for(20, 8, torch.float32, device)
        start = spd(8, device)
        gram, cross = start.clone(), torch.ones_like(start)
        ops.normal_equations_(gram, cross, x, y, w)
        alone, alone_cross = torch.zeros_like(start), torch.zeros_like(start)
        ops.normal_equations_(alone, alone_cross, x, y, w)
        torch.testing.assert_close(gram - start, alone)
        torch.testing.assert_close(cross - 1, alone_cross)

    def test_strided_rows(self, device: torch.device) -> None:
        x, y, w = rows_for(30, 24, torch.float32, device)
        results = []
        for view in (lambda t: t[::2, 1::3], lambda t: t[::2, 1::3].contiguous()):
            gram, cross = (torch.zeros(8, 8, dtype=torch.float64, device=device) for _ in range(2))
            ops.normal_equations_(gram, cross, view(x), view(y), w[::2])
            results.append((gram, cross))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])

    def test_rows_that_stay_leave_cross_untouched(self, device: torch.device) -> None:
        x, y, w = rows_for(600, 16, torch.bfloat16, device)
        gram, cross = (torch.zeros(16, 16, dtype=torch.float64, device=device) for _ in range(2))
        ops.normal_equations_(gram, cross, x, x.clone(), w)
        assert not cross.any()
        ops.normal_equations_(gram, cross, x, y, w)
        assert cross.any()

    @pytest.mark.parametrize("moving", [0, 1, 600, 1300])
    def test_any_number_of_rows_moves(self, moving: int, device: torch.device) -> None:
        x, y, w = rows_for(1300, 40, torch.float32, device)
        y = torch.where((torch.randperm(1300, device=device) < moving)[:, None], y + 1, x)
        gram, cross = (torch.zeros(40, 40, dtype=torch.float64, device=device) for _ in range(2))
        ops.normal_equations_(gram, cross, x, y, w)
        moved = w.double()[:, None] * (y.double() - x.double())
        torch.testing.assert_close(cross, moved.mT @ x.double())
        torch.testing.assert_close(gram, x.double().mT @ (w.double()[:, None] * x.double()))

    def test_not_a_number_is_passed_on(self, device: torch.device) -> None:
        x, y, w = rows_for(30, 8, torch.float32, device)
        x[4, 3] = y[4, 3] = torch.nan
        gram, cross = (torch.zeros(8, 8, dtype=torch.float64, device=device) for _ in range(2))
        ops.normal_equations_(gram, cross, x, y, w)
        assert gram[3].isnan().all() and cross[3].isnan().all()

    def test_same_bits_with_any_number_of_threads(self, tiles: str) -> None:
        x, y, w = rows_for(700, 200, torch.float32, torch.device("cpu"))

        def sums() -> list[Tensor]:
            totals = [torch.zeros(200, 200, dtype=torch.float64) for _ in range(2)]
            ops.normal_equations_(*totals, x, y, w)
            return totals

        same_for_threads(sums)

    def test_no_rows(self, device: torch.device) -> None:
        x, y, w = rows_for(0, 5, torch.float32, device)
        gram, cross = (torch.ones(5, 5, dtype=torch.float64, device=device) for _ in range(2))
        ops.normal_equations_(gram, cross, x, y, w)
        assert torch.equal(gram, torch.ones_like(gram)) and torch.equal(cross, gram)

    def test_float32_sums_would_be_worse(self, device: torch.device) -> None:
        x, y, w = rows_for(500, 16, torch.float32, device)
        gram, cross = (torch.zeros(16, 16, dtype=torch.float64, device=device) for _ in range(2))
        ops.normal_equations_(gram, cross, x, y, w)
        exact = exact_matmul(x.double().mT, w.double()[:, None] * x.double())
        ours = (gram.cpu() - exact).abs().max()
        assert ours < 1e-5 * ((x.mT @ (w[:, None] * x)).double().cpu() - exact).abs().max()

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("gram", lambda a: a.update(gram=a["gram"].float())),
            ("gram", lambda a: a.update(gram=torch.zeros(3, 3, dtype=torch.float64))),
            ("gram", lambda a: a.update(gram=torch.zeros(8, 4, dtype=torch.float64)[::2])),
            ("cross", lambda a: a.update(cross=a["cross"][:2])),
            ("source", lambda a: a.update(source=a["source"].int())),
            ("source", lambda a: a.update(source=a["source"][0])),
            ("destination", lambda a: a.update(destination=a["destination"][1:])),
            ("destination", lambda a: a.update(destination=a["destination"].half())),
            ("weight", lambda a: a.update(weight=a["weight"][1:])),
            ("weight", lambda a: a.update(weight=a["weight"].int())),
            ("destination", lambda a: a.update(destination=a["destination"].to("meta"))),
        ],
    )
    def test_mistakes(self, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
        x, y, w = rows_for(6, 4, torch.float32, torch.device("cpu"))
        arguments = {
            "gram": torch.zeros(4, 4, dtype=torch.float64),
            "cross": torch.zeros(4, 4, dtype=torch.float64),
            "source": x,
            "destination": y,
            "weight": w,
        }
        ops.normal_equations_(**arguments)
        change(arguments)
        with pytest.raises(ValueError, match=f"^{name}: "):
            ops.normal_equations_(**arguments)


class TestSolveSpd:
    @pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
    @pytest.mark.parametrize(("o", "d"), [(1, 1), (3, 17), (40, 33), (5, 130), (0, 4)], ids=str)
    def test_solution(self, o: int, d: int, condition: float, device: torch.device) -> None:
        gram = spd(d, device, condition)
        rhs = torch.randn(o, d, dtype=torch.float64, device=device)
        solution, info, _ = ops.solve_spd(gram, rhs)
        assert info.dtype == torch.int32 and int(info) == 0
        # The measure of a stable solver is its residual; the error also holds the condition number.
        plain = torch.linalg.solve(gram, rhs.mT).mT
        product = exact_matmul(solution, gram)
        check(
            "residual",
            product,
            rhs.cpu(),
            exact_matmul(plain, gram),
            floor=product_error(*residual_factors(solution, gram)),
        )

    @pytest.mark.parametrize("condition", [1.0, 1e2, 1e5, 1e10])
    def test_condition_estimate(self, condition: float, device: torch.device) -> None:
        gram = spd(60, device, condition)
        _, _, reciprocal = ops.solve_spd(gram, gram[:1])
        true = 1 / float(torch.linalg.cond(gram, 1))
        # An estimate never exceeds the condition number and is rarely below a third of it.
        assert true * (1 - 1e-4) <= float(reciprocal) <= 3 * true

    def test_ill_conditioned_by_one_direction(self, device: torch.device) -> None:
        gram = torch.eye(40, dtype=torch.float64, device=device)
        gram[7, 7] = 1e-12
        assert float(ops.solve_spd(gram, gram[:1])[2]) == pytest.approx(1e-12)

    def test_not_positive_definite(self, device: torch.device) -> None:
        gram = torch.eye(5, dtype=torch.float64, device=device)
        gram[3, 3] = -1
        _, info, reciprocal = ops.solve_spd(gram, gram)
        assert int(info) == 4 and float(reciprocal) == 0

    def test_inputs_are_left_alone(self, device: torch.device) -> None:
        gram, rhs = spd(9, device), torch.randn(4, 9, dtype=torch.float64, device=device)
        before = gram.clone(), rhs.clone()
        ops.solve_spd(gram, rhs)
        assert torch.equal(gram, before[0]) and torch.equal(rhs, before[1])

    def test_strided(self, device: torch.device) -> None:
        gram = spd(8, device)
        rhs = torch.randn(16, 8, dtype=torch.float64, device=device)[::2]
        solution, _, _ = ops.solve_spd(gram.mT, rhs)
        torch.testing.assert_close(solution, ops.solve_spd(gram, rhs.contiguous())[0])

    @pytest.mark.parametrize(("systems", "o", "d"), [(1, 1, 1), (3, 2, 5), (2, 7, 65), (0, 2, 3)])
    def test_batch_is_system_by_system(
        self, systems: int, o: int, d: int, device: torch.device
    ) -> None:
        gram = torch.stack([spd(d, device, 10.0**i) for i in range(systems)] or [torch.empty(0)])
        gram = gram.to(device, torch.float64).reshape(systems, d, d)
        rhs = torch.randn(systems, o, d, dtype=torch.float64, device=device)
        solution, info, reciprocal = ops.solve_spd(gram, rhs)
        assert solution.shape == (systems, o, d) and info.shape == reciprocal.shape == (systems,)
        assert info.dtype == torch.int32 and reciprocal.dtype == torch.float64
        for i in range(systems):
            for got, alone in zip(
                (solution[i], info[i], reciprocal[i]), ops.solve_spd(gram[i], rhs[i]), strict=True
            ):
                torch.testing.assert_close(got, alone)

    def test_batch_with_one_bad_system(self, device: torch.device) -> None:
        gram = torch.eye(50, dtype=torch.float64, device=device).repeat(3, 1, 1)
        gram[1, 3, 3] = -1
        solution, info, reciprocal = ops.solve_spd(gram, gram)
        assert info.tolist() == [0, 4, 0] and reciprocal.tolist() == pytest.approx([1, 0, 1])
        assert torch.equal(solution[::2], gram[::2])

    def test_strided_batch(self, device: torch.device) -> None:
        gram = torch.stack([spd(70, device) for _ in range(4)])
        rhs = torch.randn(70, 6, 4, dtype=torch.float64, device=device).permute(2, 1, 0)
        solution, _, _ = ops.solve_spd(gram.mT[::2], rhs[::2])
        expected = ops.solve_spd(gram[::2].contiguous(), rhs[::2].contiguous())[0]
        torch.testing.assert_close(solution, expected)

    @pytest.mark.parametrize("d", [2, 3, 7, 40, 65, 190])
    def test_condition_of_any_width(self, d: int, device: torch.device) -> None:
        gram = spd(d, device, 1e4)
        torch.testing.assert_close(
            ops.solve_spd(gram, gram[:1])[2], reference.solve_spd(gram, gram[:1])[2]
        )

    def test_batch_has_the_same_bits_with_any_number_of_threads(self, tiles: str) -> None:
        cpu = torch.device("cpu")
        gram = torch.stack([spd(90, cpu) for _ in range(5)])
        same_for_threads(lambda: list(ops.solve_spd(gram, gram[:, :7])))

    def test_mistakes(self) -> None:
        gram = spd(4, torch.device("cpu"))
        with pytest.raises(ValueError, match="^gram: expected square matrices"):
            ops.solve_spd(gram[:3], gram)
        with pytest.raises(ValueError, match="^gram: expected float64 matrices"):
            ops.solve_spd(gram.float(), gram)
        with pytest.raises(ValueError, match="^rhs: expected float64 matrices"):
            ops.solve_spd(gram, gram[0])
        with pytest.raises(ValueError, match="^rhs: expected float64 matrices"):
            ops.solve_spd(gram[None], gram)
        with pytest.raises(ValueError, match="^rhs: expected shape"):
            ops.solve_spd(gram, gram[:, :3])
        with pytest.raises(ValueError, match="^rhs: expected shape"):
            ops.solve_spd(gram.repeat(2, 1, 1), gram[None])


class TestLowRankUpdate:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("d", "k"),
        [(1, 1), (33, 5), (64, 64), (300, 17), (500, 1), (70, 11), (410, 170), (130, 129)],
        ids=str,
    )
    def test_update(self, d: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        weights = [torch.randn(o, d, device=device).to(dtype) for o in (1, 7, 130, 0, 300)]
        left = torch.randn(d, k, device=device) / d
        right = torch.randn(k, d, device=device)
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        l_, r_ = left.to(accumulate), right.to(accumulate)
        expected = []
        for w in weights:
            full = w.double() + exact_matmul(exact_matmul(w, l_), r_).to(device)
            plain = (w.to(accumulate) + (w.to(accumulate) @ l_) @ r_).to(dtype)
            expected.append((full.cpu(), plain.cpu(), (w.clone(), l_, r_)))
        ops.low_rank_update_(weights, left, right)
        for i, (w, (full, plain, factors)) in enumerate(zip(weights, expected, strict=True)):
            check(f"weights[{i}]", w.cpu(), full, plain, floor=product_error(*factors))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("factor", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("moved", [False, True], ids=["no offset", "offset"])
    def test_a_factor_for_each_layer(
        self, moved: bool, factor: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> None:
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        weights, left, right, offset = [], [], [], []
        # Of every kind: none, one, few, many and more than the width.
        for o, k in ((9, 0), (70, 1), (33, 12), (5, 50), (30, 170), (65, 230), (0, 4)):
            weights.append(torch.randn(o, 210, device=device).to(dtype))
            left.append(torch.randn(210, k, device=device).to(factor) / 210)
            right.append(torch.randn(k, 210, device=device).to(factor) / max(k, 1))
            offset.append(torch.randn(o, k, device=device).to(factor))
        expected = []
        for w, a, b, c in zip(weights, left, right, offset, strict=True):
            thin = exact_matmul(w, a.to(accumulate)) + moved * c.cpu().double()
            full = w.cpu().double() + exact_matmul(thin, b.to(accumulate))
            a_, b_, c_ = a.to(accumulate), b.to(accumulate), c.to(accumulate)
            plain = w.to(accumulate) + (w.to(accumulate) @ a_ + moved * c_) @ b_
            # W left + offset is a product as well, of [W, offset] and left with the identity below.
            eye = torch.eye(c.shape[1]).to(c_)
            factors = (torch.cat((w.to(accumulate), moved * c_), 1), torch.cat((a_, eye)), b_)
            expected.append((full, plain.to(dtype).cpu(), factors))
        ops.low_rank_update_(weights, left, right, offset if moved else ())
        for i, (w, (full, plain, factors)) in enumerate(zip(weights, expected, strict=True)):
            check(f"weights[{i}]", w.cpu(), full, plain, floor=product_error(*factors))

    @pytest.mark.parametrize("k", [2, 200])
    def test_shared_factors_with_offsets(self, k: int, device: torch.device) -> None:
        left = torch.randn(210, k, device=device) / 210
        right = torch.randn(k, 210, device=device) / k
        weights = [
            torch.randn(o, 210, device=device).to(dt)
            for o, dt in zip((3, 80), DTYPES[:2], strict=True)
        ]
        offset = [torch.randn(len(w), k, device=device) for w in weights]
        expected = [w.clone() for w in weights]
        reference.low_rank_update_(expected, [left], [right], offset)
        ops.low_rank_update_(weights, left, right, offset)
        for weight, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, other)

    @pytest.mark.parametrize("k", [3, 60, 200])
    def test_a_row_does_not_depend_on_the_others(self, k: int, tiles: str) -> None:
        left, right = torch.randn(120, k) / 120, torch.randn(k, 120) / k
        if k == 200 or (k == 60 and tiles == "baseline"):
            # A product of torch's own: only lists of weights, not parts of one, are comparable.
            whole = [torch.randn(700, 120), torch.randn(90, 120)]
            apart = [w.clone() for w in whole]
            ops.low_rank_update_(whole, left, right)
            for weight in apart:
                ops.low_rank_update_([weight], left, right)
        else:
            matrix = torch.randn(150, 120)
            apart = [row.clone()[None] for row in matrix]
            ops.low_rank_update_(apart, left, right)
            ops.low_rank_update_([matrix], left, right)
            whole = [row[None] for row in matrix]
        for together, alone in zip(whole, apart, strict=True):
            assert torch.equal(together, alone)

    @pytest.mark.parametrize("k", [3, 60, 200])
    def test_same_bits_with_any_number_of_threads(self, k: int, tiles: str) -> None:
        left, right = torch.randn(120, k) / 120, torch.randn(k, 120) / k
        weights = [torch.randn(o, 120).to(dtype) for o in (1, 150, 700) for dtype in DTYPES]

        def updated() -> list[Tensor]:
            copies = [w.clone() for w in weights]
            ops.low_rank_update_(copies, left, right)
            return copies

        same_for_threads(updated)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_every_value_survives_conversion(
        self, dtype: torch.dtype, device: torch.device
    ) -> None:
        # All 65536 of them, infinities, NaN, subnormal numbers and both zeros too.
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device)
        every = every.to(torch.int16).view(dtype).reshape(-1, 1)
        weight = every.clone()
        ops.low_rank_update_(
            [weight], torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device)
        )
        expected = every + every * 0
        assert torch.equal(weight.isnan(), expected.isnan())
        assert torch.equal(weight.nan_to_num(1), expected.nan_to_num(1))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("columns", [1, 37], ids=["one", "many"])
    def test_rounds_like_torch(
        self, columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Magnitudes from below the smallest number to beyond the greatest, in a weight of zeros.
        move = torch.randn(3000, columns, device=device)
        move *= 2.0 ** torch.randint(-30, 18, (3000, 1), device=device)
        weight = torch.zeros(3000, columns, dtype=dtype, device=device)
        identity = torch.eye(columns, device=device)
        ops.low_rank_update_([weight], torch.zeros_like(identity), identity, [move])
        assert torch.equal(weight, move.to(dtype))

    @pytest.mark.parametrize("k", [20, 180])
    def test_a_factor_that_is_part_of_a_weight(self, k: int, device: torch.device) -> None:
        weight = torch.randn(400, 400, device=device)
        left, right = torch.randn(400, k, device=device) / 400, weight[100 : 100 + k]
        expected = weight.double() + weight.double() @ left.double() @ right.double()
        plain, factors = weight + weight @ left @ right, (weight.clone(), left, right.clone())
        ops.low_rank_update_([weight], left, right)
        check("weight", weight, expected, plain, floor=product_error(*factors))

    def test_a_dense_map_needs_no_product(self, device: torch.device) -> None:
        # Rank d > 40: by the product of both factors, which for the identity is the other one.
        left, eye = torch.randn(50, 50, device=device) / 50, torch.eye(50, device=device)
        for right in (eye, eye.roll(1, 0), eye * 2, torch.ones_like(eye)):
            weight = torch.randn(9, 50, device=device)
            expected = weight.double() + weight.double() @ left.double() @ right.double()
            plain, factors = weight + weight @ left @ right, (weight.clone(), left, right)
            ops.low_rank_update_([weight], left, right)
            check("weight", weight, expected, plain, floor=product_error(*factors))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_rounds_once_to_nearest_even(self, dtype: torch.dtype, device: torch.device) -> None:
        # 1 + ulp / 2 is a tie and goes to 1; 1 + 3 ulp / 2 is one too and goes to 1 + 2 ulp.
        ulp = torch.finfo(dtype).eps
        left = torch.tensor([[1.0], [0.0]], device=device)
        right = torch.tensor([[0.0, ulp / 2]], device=device)
        weight = torch.tensor([[1.0, 1.0], [1.0, 1 + ulp]], device=device).to(dtype)
        ops.low_rank_update_([weight], left, right)
        assert weight[:, 1].tolist() == [1.0, 1 + 2 * ulp]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_strided(self, dtype: torch.dtype, device: torch.device) -> None:
        left, right = torch.randn(24, 3, device=device) / 24, torch.randn(3, 24, device=device)
        base = torch.randn(300, 80, device=device).to(dtype)
        views = [base[:, 2:50:2], base[:7, 51:75]]
        transposed = torch.randn(24, 200, device=device).to(dtype).mT
        copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
        untouched = base[:, 1:50:2].clone()
        transposed_copy = transposed.contiguous()
        ops.low_rank_update_([*views, transposed], left, right)
        ops.low_rank_update_([*copies, transposed_copy], left, right)
        for view, copy in zip([*views, transposed], [*copies, transposed_copy], strict=True):
            assert torch.equal(view, copy)
        assert torch.equal(base[:, 1:50:2], untouched)

    def test_mixed_dtypes_in_one_call(self, device: torch.device) -> None:
        left, right = torch.randn(8, 2, device=device), torch.randn(2, 8, device=device)
        weights = [torch.randn(5, 8, device=device).to(dtype) for dtype in DTYPES]
        apart = [w.clone() for w in weights]
        ops.low_rank_update_(weights, left, right)
        for weight, alone in zip(weights, apart, strict=True):
            ops.low_rank_update_([alone], left, right)
            assert torch.equal(weight, alone)

    def test_rank_zero_is_bit_identical(self, device: torch.device) -> None:
        weight = torch.randn(5, 8, device=device)
        weight[0, 0] = -0.0
        before = weight.clone()
        ops.low_rank_update_(
            [weight], torch.zeros(8, 0, device=device), torch.zeros(0, 8, device=device)
        )
        assert torch.equal(weight.view(torch.int32), before.view(torch.int32))

    def test_parameters(self, device: torch.device) -> None:
        layer = torch.nn.Linear(8, 300, bias=False, device=device)
        expected = layer.weight.detach().clone()
        left, right = torch.randn(8, 2, device=device), torch.randn(2, 8, device=device)
        reference.low_rank_update_([expected], [left], [right], [])
        ops.low_rank_update_([layer.weight], left, right)
        torch.testing.assert_close(layer.weight.detach(), expected)
        assert layer.weight.requires_grad and layer.weight.grad is None

    def test_raises_the_version_of_the_weight(self, device: torch.device) -> None:
        # Autograd must notice that a weight it saved for the backward pass has changed.
        weight = torch.randn(5, 8, device=device)
        before = weight._version
        left, right = torch.randn(8, 2, device=device), torch.randn(2, 8, device=device)
        ops.low_rank_update_([weight], left, right)
        assert weight._version > before

    def test_mistakes(self) -> None:
        weight, left, right = torch.randn(5, 8), torch.randn(8, 2), torch.randn(2, 8)
        ops.low_rank_update_([], left, right)
        with pytest.raises(ValueError, match=r"^weights\[1\]: expected shape"):
            ops.low_rank_update_([weight, weight[:, :4]], left, right)
        with pytest.raises(ValueError, match=r"^weights\[0\]: expected a matrix"):
            ops.low_rank_update_([weight.to(torch.int8)], left, right)
        with pytest.raises(ValueError, match=r"^weights\[1\]: shares its memory with weights\[0\]"):
            ops.low_rank_update_([weight, weight], left, right)
        with pytest.raises(ValueError, match=r"^weights\[1\]: shares its memory with weights\[0\]"):
            ops.low_rank_update_([weight[:3], weight[2:]], left, right)
        with pytest.raises(TypeError, match=r"^weights: expected a list of tensors, got one"):
            ops.low_rank_update_(weight, left, right)
        with pytest.raises(ValueError, match=r"^weights\[0\]: is an expanded view"):
            ops.low_rank_update_([weight[:1].expand(5, 8)], left, right)
        with pytest.raises(ValueError, match="^right: expected"):
            ops.low_rank_update_([weight], left, right[:1])
        with pytest.raises(ValueError, match="^left: expected a matrix of float32"):
            ops.low_rank_update_([weight], left.half(), right.half())
        with pytest.raises(ValueError, match="^left, right: expected two tensors or two lists"):
            ops.low_rank_update_([weight], [left], right)
        with pytest.raises(ValueError, match="^left: expected 1 tensors, one for each weight"):
            ops.low_rank_update_([weight], [left, left], [right, right])
        with pytest.raises(ValueError, match="^offset: expected 1 tensors"):
            ops.low_rank_update_([weight], left, right, [weight, weight])
        with pytest.raises(ValueError, match=r"^right\[0\]: expected torch.float32 \[2, 8\]"):
            ops.low_rank_update_([weight], [left], [right.double()])
        with pytest.raises(ValueError, match=r"^offset\[0\]: expected torch.float32 \[5, 2\]"):
            ops.low_rank_update_([weight], left, right, [weight])


def test_opcheck(device: torch.device) -> None:
    namespace = torch.ops.realera_fast
    x, y, w = rows_for(9, 6, torch.bfloat16, device)
    gram = spd(6, device)
    opcheck(namespace.normal_equations_.default, (gram.clone(), gram.clone(), x, y, w))
    opcheck(namespace.solve_spd.default, (gram, gram[:2].clone()))
    opcheck(namespace.solve_spd.default, (gram.repeat(3, 1, 1), gram[:2].repeat(3, 1, 1)))
    left, right = torch.randn(6, 2, device=device), torch.randn(2, 6, device=device)
    opcheck(namespace.low_rank_update_.default, ([x, y.float()], [left], [right], []))
    offset = [torch.randn(9, k, device=device) for k in (2, 1)]
    each = [left, left[:, :1].clone()], [right, right[:1].clone()]
    opcheck(namespace.low_rank_update_.default, ([x, y.float()], *each, offset))


def test_the_native_library_agrees_with_the_reference(tiles: str) -> None:
    if not NATIVE:
        pytest.skip("the native library is not built")
    cpu = torch.device("cpu")
    x, y, w = rows_for(700, 300, torch.bfloat16, cpu)
    ours, theirs = ([torch.zeros(300, 300, dtype=torch.float64) for _ in range(2)] for _ in "ab")
    ops.normal_equations_(*ours, x, y, w)
    reference.normal_equations_(*theirs, x, y, w)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)
    gram = ours[0] + torch.eye(300, dtype=torch.float64)
    for got, expected in zip(
        ops.solve_spd(gram, ours[1]), reference.solve_spd(gram, ours[1]), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_implementations_name_every_operation_and_device() -> None:
    found = ops.implementations()
    assert {"low_rank_update_", "normal_equations_", "perturb", "project", "solve_spd"} < set(found)
    for devices in found.values():
        assert set(devices) == {"cpu", "cuda"}
        assert set(devices.values()) <= {"native", "triton", "streamed", "reference"}
    assert found["perturb"]["cuda"] == "triton"
    assert found["solve_spd"]["cpu"] == ("native" if NATIVE else "reference")


def test_no_gradient_is_recorded(device: torch.device) -> None:
    gram = spd(4, device).requires_grad_()
    assert not ops.solve_spd(gram, gram)[0].requires_grad
