"""The rule of `check`: what it lets pass and what it must not, on products as the library makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from matrices import exact_matmul, residual_factors, spd
from tolerance import check, product_error
from torch import Tensor

SIZES = [(1, 33, 5), (65, 210, 230), (300, 130, 129)]


def summed(a: Tensor, b: Tensor, order: Tensor) -> Tensor:
    """``a b``, term after term in an order, each rounded."""
    total = torch.zeros(len(a), b.shape[1], dtype=a.dtype)
    for i in order.tolist():
        total += a[:, i, None] * b[None, i]
    return total


def in_halves(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, summed pairwise."""
    n = a.shape[1]
    if n == 1:
        return a * b
    return in_halves(a[:, : n // 2], b[: n // 2]) + in_halves(a[:, n // 2 :], b[n // 2 :])


ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forwards": lambda a, b: summed(a, b, torch.arange(len(b))),
    "backwards": lambda a, b: summed(a, b, torch.arange(len(b)).flip(0)),
    "smallest first": lambda a, b: summed(a, b, (a.abs().sum(0) * b.abs().sum(1)).argsort()),
    "in halves": in_halves,
}


def drop_a_row(w: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return w + w[:, 1:] @ left[1:] @ right


def one_wrong_element(w: Tensor, left: Tensor, right: Tensor) -> Tensor:
    # As far off as one term of its sum: what a kernel does that skips or repeats an element.
    thin = w @ left
    got = w + thin @ right
    got[-1, 0] += thin[-1, 0] * right[0, 0]
    return got


def narrower(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def update(w: Tensor, left: Tensor, right: Tensor) -> Tensor:
        thin = w @ left
        return w + thin.to(dtype).to(thin.dtype) @ right

    return update


def onto_the_weight(w: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Every term is added to the weight: right, and worse than it need be."""
    total, thin = w.clone(), w @ left
    for i in range(len(right)):
        total += thin[:, i, None] * right[None, i]
    return total


class Update:
    """``W + W left right`` as the library's maps are: a small part beside the weight."""

    def __init__(self, o: int, d: int, k: int, dtype: torch.dtype) -> None:
        self.w = torch.randn(o, d).to(dtype)
        self.left, self.right = (torch.randn(d, k) / d).to(dtype), (torch.randn(k, d) / k).to(dtype)

    def check(self, got: Tensor) -> None:
        w, left, right = self.w, self.left, self.right
        exact = w.double() + exact_matmul(exact_matmul(w, left), right)
        floor = product_error(w, left, right)
        check("update", got, exact, w + (w @ left) @ right, floor=floor)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("o", "d", "k"), SIZES)
def test_any_order_of_summation_passes(
    o: int, d: int, k: int, dtype: torch.dtype, order: str
) -> None:
    problem, multiply = Update(o, d, k, dtype), ORDERS[order]
    thin = multiply(problem.w, problem.left)
    problem.check(problem.w + multiply(thin, problem.right))
    # And where PyTorch is lucky: exact in every element.
    a, b = problem.w, problem.left
    exact = exact_matmul(a, b)
    check("product", multiply(a, b), exact, exact.to(dtype), floor=product_error(a, b))


FAULTS: dict[str, tuple[torch.dtype, Callable[..., Tensor]]] = {
    "float32, a row dropped": (torch.float32, drop_a_row),
    "float64, a row dropped": (torch.float64, drop_a_row),
    "float32, a wrong element": (torch.float32, one_wrong_element),
    "float64, a wrong element": (torch.float64, one_wrong_element),
    "float32 through bfloat16": (torch.float32, narrower(torch.bfloat16)),
    "float32 through float16": (torch.float32, narrower(torch.float16)),
    "float64 through float32": (torch.float64, narrower(torch.float32)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("o", "d", "k"), SIZES)
def test_planted_errors_fail(o: int, d: int, k: int, fault: str) -> None:
    dtype, wrong = FAULTS[fault]
    problem = Update(o, d, k, dtype)
    with pytest.raises(AssertionError, match="update: error"):
        problem.check(wrong(problem.w, problem.left, problem.right))


def test_sums_onto_the_weight_fail() -> None:
    """Twenty times PyTorch's error, though each operation is rounded as it should be."""
    problem = Update(65, 210, 230, torch.float64)
    with pytest.raises(AssertionError, match="update: error"):
        problem.check(onto_the_weight(problem.w, problem.left, problem.right))


@pytest.mark.parametrize("fault", ["none", "element", "float32", "dropped row"])
@pytest.mark.parametrize("condition", [1.0, 1e8])
@pytest.mark.parametrize(("o", "d"), [(3, 17), (40, 33)])
def test_residuals(o: int, d: int, condition: float, fault: str) -> None:
    gram, rhs = spd(d, torch.device("cpu"), condition), torch.randn(o, d, dtype=torch.float64)
    solution = torch.cholesky_solve(rhs.mT, torch.linalg.cholesky(gram)).mT
    if fault == "element":
        solution[0, 0] *= 1 + 1e-9
    elif fault == "float32":
        solution = solution.float().double()
    elif fault == "dropped row":
        solution[:, 0] = 0
    floor = product_error(*residual_factors(solution, gram))

    def judge() -> None:
        # A solver without any residual: the most lucky one.
        check("residual", exact_matmul(solution, gram), rhs, rhs, floor=floor)

    if fault == "none":
        judge()
        return
    with pytest.raises(AssertionError, match="residual: error"):
        judge()


def test_bad_numbers_and_shapes_fail() -> None:
    right = torch.ones(2, 3)
    check("right", right, right.double(), right)
    with pytest.raises(AssertionError, match="NaN or infinity"):
        check("bad", right.clone().fill_(torch.nan), right.double(), right)
    with pytest.raises(AssertionError, match="shape"):
        check("bad", right[:1], right.double(), right)
