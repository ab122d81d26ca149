"""Every operation against the reference and a more exact result, on every device and dtype."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import check
from torch import Tensor
from torch.library import opcheck

from realera_fast import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("realera_fast::solve_spd", "CPU")


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product in extended precision, rounded once to float64."""
    wide = a.cpu().double().numpy().astype(np.longdouble) @ b.cpu().double().numpy().astype(
        np.longdouble
    )
    return torch.from_numpy(wide.astype(np.float64))


def rows_for(n: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """`[n, d]` source and destination, a third of them moving, and `[n]` weights."""
    source = torch.randn(n, d, device=device).to(dtype)
    destination = source.clone()
    destination[::3] = torch.randn(len(destination[::3]), d, device=device).to(dtype)
    return source, destination, torch.rand(n, device=device)


def spd(d: int, device: torch.device, condition: float = 1e3) -> Tensor:
    """`[d, d]` symmetric positive definite matrix of a given condition number."""
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device=device))
    values = torch.logspace(0, -np.log10(condition), d, dtype=torch.float64, device=device)
    gram = (basis * values) @ basis.mT
    return (gram + gram.mT) / 2


class TestNormalEquations:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("n", "d"), [(1, 1), (7, 33), (40, 7), (129, 64), (1100, 5), (65, 300)], ids=str
    )
    def test_sums(self, n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        x, y, w = rows_for(n, d, dtype, device)
        gram, cross = (torch.zeros(d, d, dtype=torch.float64, device=device) for _ in range(2))
        ops.normal_equations_(gram, cross, x, y, w)
        x64, y64, w64 = x.double(), y.double(), w.double()[:, None]
        check("gram", gram.cpu(), exact_matmul(x64.mT, w64 * x64), (x64.mT @ (w64 * x64)).cpu())
        moved = w64 * (y64 - x64)
        check("cross", cross.cpu(), exact_matmul(moved.mT, x64), (moved.mT @ x64).cpu())
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
        check("residual", product, rhs.cpu(), exact_matmul(plain, gram))

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

    def test_mistakes(self) -> None:
        gram = spd(4, torch.device("cpu"))
        with pytest.raises(ValueError, match="^gram: expected a square"):
            ops.solve_spd(gram[:3], gram)
        with pytest.raises(ValueError, match="^gram: expected a matrix of float64"):
            ops.solve_spd(gram.float(), gram)
        with pytest.raises(ValueError, match="^rhs: expected shape"):
            ops.solve_spd(gram, gram[:, :3])


class TestLowRankUpdate:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("d", "k"), [(1, 1), (33, 5), (64, 64), (300, 17)], ids=str)
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
            expected.append((full.cpu(), plain.cpu()))
        ops.low_rank_update_(weights, left, right)
        for i, (w, (full, plain)) in enumerate(zip(weights, expected, strict=True)):
            check(f"weights[{i}]", w.cpu(), full, plain)

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
        reference.low_rank_update_([expected], left, right)
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
        with pytest.raises(ValueError, match=r"^weights\[0\]: is an expanded view"):
            ops.low_rank_update_([weight[:1].expand(5, 8)], left, right)
        with pytest.raises(ValueError, match="^right: expected"):
            ops.low_rank_update_([weight], left, right[:1])
        with pytest.raises(ValueError, match="^left: expected a matrix of float32"):
            ops.low_rank_update_([weight], left.half(), right.half())


def test_opcheck(device: torch.device) -> None:
    namespace = torch.ops.realera_fast
    x, y, w = rows_for(9, 6, torch.bfloat16, device)
    gram = spd(6, device)
    opcheck(namespace.normal_equations_.default, (gram.clone(), gram.clone(), x, y, w))
    opcheck(namespace.solve_spd.default, (gram, gram[:2].clone()))
    left, right = torch.randn(6, 2, device=device), torch.randn(2, 6, device=device)
    opcheck(namespace.low_rank_update_.default, ([x, y.float()], [left], [right], []))


def test_the_native_library_agrees_with_the_reference() -> None:
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
    assert set(found) == {"low_rank_update_", "normal_equations_", "perturb", "solve_spd"}
    for devices in found.values():
        assert set(devices) == {"cpu", "cuda"}
        assert set(devices.values()) <= {"native", "triton", "reference"}
    assert found["perturb"]["cuda"] == "triton"
    assert found["solve_spd"]["cpu"] == ("native" if NATIVE else "reference")


def test_no_gradient_is_recorded(device: torch.device) -> None:
    gram = spd(4, device).requires_grad_()
    assert not ops.solve_spd(gram, gram)[0].requires_grad
