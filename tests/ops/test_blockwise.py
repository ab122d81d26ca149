"""Projection and normal equations of perturbed rows against their plain definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import check, product_error
from torch import Tensor

from realera_fast import mining, ops
from realera_fast.ops import blockwise, perturb_reference, reference

NEIGHBOR = (0.5, 0.9, 1.6)
HEIGHTS = [(5,), (3, 5, 20), (1, 1), (32, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(
    heights: tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device, width: int = 13
) -> dict[str, Any]:
    """Weights of some layers, and LoRA factors whose part in the result is as large."""
    layers, total = len(heights), sum(heights)
    return {
        "weight": (normal(total, width) / width**0.5).to(device, dtype),
        "down": (normal(layers, rank, width, seed=1) / width**0.5).to(device, dtype),
        "up": (normal(total, rank, seed=2) / rank**0.5).to(device, dtype),
        "heights": heights,
        "scaling": 0.7,
    }


def wide(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()}


def projection_error(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, heights: tuple[int, ...], scaling: float
) -> Tensor:
    """`product_error` of a projection, which is ``x [I, A^T] [W^T; scaling B^T]``."""
    eye = torch.eye(x.shape[1]).to(x)
    blocks = torch.block_diag(*(scaling * part.mT for part in up.split(heights)))
    return product_error(
        x, torch.cat((eye, down.flatten(0, 1).mT), 1), torch.cat((weight.mT, blocks))
    )


def gradient_errors(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, heights: tuple[int, ...], scaling: float
) -> tuple[Tensor, Tensor]:
    """`product_error` of the gradients of ``down`` and ``up``, layer by layer."""
    layers = list(zip((scaling * grad).split(heights, 1), down, up.split(heights), strict=True))
    thin = [product_error(high.mT, g.mT, x) for g, _, high in layers]
    tall = [product_error(g.mT, x, low.mT) for g, low, _ in layers]
    return torch.stack(thin), torch.cat(tall)


def drawn(e: Tensor, samples: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    alpha, _, scale = ops.perturb(e, samples, *NEIGHBOR, seed)
    return alpha, scale


@pytest.mark.parametrize("heights", HEIGHTS)
@pytest.mark.parametrize("rank", [1, 4, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_project(heights, rank, dtype, device):
    values = problem(heights, rank, dtype, device)
    x = normal(7, 13).to(device, dtype)
    got = ops.project(x, **values)
    assert got.dtype == dtype and got.shape == (7, sum(heights))
    exact, plain = reference.project(x.double(), **wide(values)), reference.project(x, **values)
    check("project", got, exact, plain, floor=projection_error(x, **values))
    base, w = ops.project(x, values["weight"]), values["weight"].mT
    check("base", base, x.double() @ w.double(), x @ w, floor=product_error(x, w))
    assert not torch.allclose(base.float(), got.float(), atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_master_factors_may_be_float32(dtype, device):
    values = problem((3, 5), 4, dtype, device)
    x = normal(7, 13).to(device, dtype)
    master = values | {name: values[name].float() for name in ("down", "up")}
    if dtype == torch.float64:
        master = values
    got = {}
    for name, given in (("own", values), ("master", master)):
        factors = [given[f].clone().requires_grad_() for f in ("down", "up")]
        y = ops.project(x, **(given | {"down": factors[0], "up": factors[1]}))
        got[name] = (y, *torch.autograd.grad(y.float().square().sum(), factors))
    for own, wider in zip(got["own"], got["master"], strict=True):
        assert torch.equal(own, wider.to(dtype))
    assert got["master"][1].dtype == master["down"].dtype


@pytest.mark.parametrize("heights", HEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_project_gradients(heights, dtype, device):
    values = problem(heights, 4, dtype, device)
    x, grad = normal(7, 13).to(device, dtype), normal(7, sum(heights), seed=3).to(device, dtype)
    arguments = [values[n] for n in ("down", "up", "heights", "scaling")]
    got = torch.ops.realera_fast.project_backward(grad, x, *arguments)
    doubles = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    exact = reference.project_backward(grad.double(), x.double(), *doubles)
    plain = reference.project_backward(grad, x, *arguments)
    floors = gradient_errors(grad, x, *arguments)
    for name, g, e, p, floor in zip(("down", "up"), got, exact, plain, floors, strict=True):
        assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check(name, g, e, p, floor=floor)


def test_gradcheck(device):
    values = problem((3, 5), 2, torch.float64, device, width=6)
    x = normal(4, 6).to(device)
    e = normal(2, 3, 6).to(device)
    alpha, scale = drawn(e, 2)
    rest = {"heights": values["heights"], "scaling": values["scaling"]}

    def projected(down: Tensor, up: Tensor) -> Tensor:
        return ops.project(x, values["weight"], down=down, up=up, **rest)

    def perturbed(down: Tensor, up: Tensor) -> Tensor:
        return ops.perturb_project(e, alpha, scale, values["weight"], 5, down=down, up=up, **rest)

    factors = [values[n].clone().requires_grad_() for n in ("down", "up")]
    assert torch.autograd.gradcheck(projected, factors)
    assert torch.autograd.gradcheck(perturbed, factors)


def test_factors_with_any_strides(device):
    values = problem((3, 5), 4, torch.float32, device)
    x = normal(7, 13).float().to(device)
    strided = {n: values[n].mT.contiguous().mT for n in ("down", "up")}
    assert not strided["down"].is_contiguous() and not strided["up"].is_contiguous()
    results = []
    for factors in ({n: values[n] for n in strided}, strided):
        for factor in factors.values():
            factor.requires_grad_()
        y = ops.project(x, **(values | factors))
        results.append((y, *torch.autograd.grad(y.square().sum(), list(factors.values()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_has_no_weight_has_no_part(device):
    e, destination = (normal(2, 3, 4, seed=i).to(device) for i in range(2))
    weight = torch.ones(2, 3, device=device)
    weight[1, 2] = 0
    destination[1, 2] = torch.nan
    sums = [torch.zeros(4, 4, dtype=torch.float64, device=device) for _ in range(2)]
    ops.perturb_accumulate_(*sums, e, *drawn(e, 2), weight, 5, destination=destination)
    assert not any(s.isnan().any() for s in sums) and bool(sums[1].any())


def test_no_other_gradients(device):
    values = problem((3, 5), 2, torch.float32, device)
    x = normal(4, 13).float().to(device).requires_grad_()
    values["weight"].requires_grad_()
    values["up"].requires_grad_()
    y = ops.project(x, **values)
    y.sum().backward()
    assert x.grad is None and values["weight"].grad is None and values["up"].grad is not None
    e = normal(2, 3, 13).float().to(device).requires_grad_()
    assert not ops.perturb_project(e, *drawn(e, 2), values["weight"].detach(), 5).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("concepts", "samples", "tokens"), [(1, 1, 2), (3, 2, 5), (1, 4, 1)])
@pytest.mark.parametrize("block", [1, 600, 1 << 20])
def test_perturb_project(dtype, concepts, samples, tokens, block, device, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK_BYTES", {})
    monkeypatch.setattr(blockwise, "_BLOCK_BYTES_ELSEWHERE", block)
    values = problem((3, 5), 4, dtype, device)
    e = normal(concepts, tokens, 13).to(device, dtype)
    alpha, scale = drawn(e, samples)
    stream = (5, 0, 0)
    names = ("weight", "down", "up", "heights", "scaling")
    factors = {n: values[n].clone().requires_grad_() for n in ("down", "up")}
    got = ops.perturb_project(e, alpha, scale, seed=5, **(values | factors))
    assert got.shape == (concepts, samples, tokens, 8) and got.dtype == dtype
    rows = perturb_reference.perturb_rows(e, alpha, scale, 5)
    doubles = wide(values)
    exact = reference.project(rows.double().view(-1, 13), *(doubles[n] for n in names))
    plain = reference.perturb_project(e, alpha, scale, *(values[n] for n in names), *stream)
    floor = projection_error(rows.view(-1, 13), **values).view(plain.shape)
    check("y", got.detach(), exact.view(plain.shape), plain, floor=floor)
    grad = normal(*got.shape, seed=4).to(device, dtype)
    gradients = torch.autograd.grad(got, list(factors.values()), grad)
    flat = grad.view(-1, 8), rows.view(-1, 13)
    rest = [values[n] for n in names[1:]]
    exact_grads = reference.project_backward(
        *(t.double() for t in flat), *(doubles[n] for n in names[1:])
    )
    plain_grads = reference.project_backward(*flat, *rest)
    every = zip(gradients, exact_grads, plain_grads, gradient_errors(*flat, *rest), strict=True)
    for name, (g, x, p, floor) in zip(("down", "up"), every, strict=True):
        check(name, g, x, p.to(dtype), floor=floor)


def test_perturb_project_with_counters_and_strides(device):
    values = problem((3, 5), 4, torch.float32, device)
    e = normal(13, 4, 3).float().to(device).permute(2, 1, 0)
    stream = {"offset": 3, "concept_offset": 2}
    alpha, _, scale = ops.perturb(e, 4, *NEIGHBOR, 5, **stream)
    got = ops.perturb_project(e, alpha, scale, seed=5, **values, **stream)
    rows = ops.perturb_rows(e, alpha, scale, 5, **stream)
    expected = ops.project(rows.view(-1, 13), **values).view(3, 4, 4, 8)
    torch.testing.assert_close(got, expected)
    samples = ops.perturb_project(
        e[1:2],
        alpha[1:2, 2:],
        scale[1:2, 2:],
        seed=5,
        **values,
        offset=5,
        concept_offset=3,
    )
    torch.testing.assert_close(samples, expected[1:2, 2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["stay", "absolute", "relative"])
@pytest.mark.parametrize("block", [1, 3000, 1 << 20])
def test_perturb_accumulate(dtype, kind, block, device, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK_BYTES", {})
    monkeypatch.setattr(blockwise, "_BLOCK_BYTES_ELSEWHERE", block)
    e = normal(3, 5, 13).to(device, dtype)
    alpha, scale = drawn(e, 4)
    weight = torch.rand(3, 5, device=device)
    weight[1, 2:] = 0
    destination = None if kind == "stay" else normal(3, 5, 13, seed=2).to(device, dtype)
    sums = [normal(13, 13, seed=i).to(device) for i in (1, 2)]
    sums[0] = sums[0] @ sums[0].mT
    arguments = (e, alpha, scale, weight, destination, kind == "relative", 5, 0, 0)
    got, plain = ([s.clone() for s in sums] for _ in range(2))
    ops.perturb_accumulate_(
        *got, e, alpha, scale, weight, 5, destination=destination, relative=kind == "relative"
    )
    # In extended precision, and by PyTorch in the type of the rows.
    wide = e.to(perturb_reference.exact_dtype(dtype))
    rows = perturb_reference.perturb_rows(wide, alpha, scale, 5).view(-1, 13)
    w = weight[:, None].expand(3, 4, 5).reshape(-1, 1)
    y = torch.zeros_like(e) if destination is None else destination
    y = y[:, None].expand(3, 4, 5, 13).reshape(-1, 13).to(rows.dtype)
    x_, w_, y_, *exact = (
        t.cpu().double().numpy().astype(np.longdouble) for t in (rows, w, y, *sums)
    )
    exact[0] = exact[0] + x_.T @ (w_ * x_)
    plain[0] += rows.mT @ (w.to(rows.dtype) * rows)
    floors = [product_error(rows.mT.double(), w.double() * rows.double())] * 2
    if destination is not None:
        exact[1] = exact[1] + (w_ * (y_ if kind == "relative" else y_ - x_)).T @ x_
        moved = y if kind == "relative" else y - rows
        plain[1] += (w.to(rows.dtype) * moved).mT @ rows
        floors[1] = product_error((w.double() * moved.double()).mT, rows.double())
    defined = [s.clone() for s in sums]
    reference.perturb_accumulate_(*defined, *arguments)
    every = zip(got, defined, exact, plain, floors, strict=True)
    for name, (g, d, x, p, floor) in zip(("gram", "cross"), every, strict=True):
        rounded = torch.from_numpy(x.astype(np.float64)).to(device)
        check(name, g, rounded, p, floor=floor)
        check(f"{name} of the reference", d, rounded, p, floor=floor)
    if kind == "stay":
        assert torch.equal(got[1], sums[1])


@pytest.mark.parametrize(
    "region", [mining.MiningConfig().neighbor_region, mining.MiningConfig().beyond_region]
)
def test_sums_converge_to_the_expectation_at_the_root_of_the_samples(region, device):
    """docs/method.md, section 3.2: the error of the mean over s samples falls as 1 / sqrt(s)."""
    e = normal(1, 6, 8).to(device)
    width = 8
    limit = mining.moments(e[:, 1:].numel(), region)
    flat = e[0, 1:]
    square = flat.square().sum()
    outer = flat.mT @ flat
    identity = torch.eye(width, dtype=torch.float64, device=device)
    expected = limit.second * outer + limit.noise * (5 * square * identity - outer)
    first = limit.first * flat
    destination = normal(1, 6, 8, seed=1).to(device)
    weight = torch.ones(1, 6, device=device, dtype=torch.float64)
    weight[0, 0] = 0
    counts = [1 << k for k in range(4, 13, 2)]
    errors = []
    for count in counts:
        squares = []
        for seed in range(12):
            gram, cross = (torch.zeros(width, width, dtype=torch.float64, device=device),) * 2
            gram, cross = gram.clone(), cross.clone()
            alpha, _, scale = ops.perturb(e, count, *vars(region).values(), seed)
            ops.perturb_accumulate_(
                gram, cross, e, alpha, scale, weight / count, seed, destination=destination
            )
            moved = destination[0, 1:].mT @ first - expected
            squares.append(float((gram - expected).square().sum() / expected.square().sum()))
            squares.append(float((cross - moved).square().sum() / moved.square().sum()))
        errors.append(math.sqrt(sum(squares) / len(squares)))
    x = torch.tensor(counts, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert -0.58 < slope < -0.42, (slope, errors)
    assert errors[-1] < errors[0] / 10


def test_memory_does_not_grow_with_the_samples(device):
    """Everything at once would be 80 times the block that is held."""
    if device.type != "cuda":
        pytest.skip("needs the allocator's statistics of a GPU")
    e = torch.randn(4, 77, 768, device=device)
    alpha, scale = drawn(e, 500)
    gram, cross = (torch.zeros(768, 768, dtype=torch.float64, device=device) for _ in range(2))
    weight = torch.ones(4, 77, device=device)
    ops.perturb_accumulate_(gram, cross, e, alpha, scale, weight, 5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.perturb_accumulate_(gram, cross, e, alpha, scale, weight, 5)
    assert torch.cuda.max_memory_allocated() - before < 128 << 20


@pytest.mark.parametrize("samples", [1, 5, 400])
def test_blocks_cover_every_sample_once(samples, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK_BYTES_ELSEWHERE", 4 * 7 * 60)
    e = torch.zeros(9, 7, 4)
    seen = torch.zeros(9, samples, dtype=torch.int)
    for c, s in blockwise._blocks(e, samples, 4):
        seen[c, s] += 1
        assert (c.stop - c.start) * (s.stop - s.start) <= 15
    assert bool((seen == 1).all())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 1, 4), (2, 3, 4)])
@pytest.mark.parametrize("samples", [0, 2])
def test_empty(shape, samples, device):
    e = normal(*shape).float().to(device)
    values = problem((3, 5), 2, torch.float32, device, width=shape[2])
    alpha, scale = drawn(e, samples)
    y = ops.perturb_project(e, alpha, scale, seed=5, **values)
    assert y.shape == (shape[0], samples, shape[1], 8)
    sums = [torch.zeros(4, 4, dtype=torch.float64, device=device) for _ in range(2)]
    ops.perturb_accumulate_(*sums, e, alpha, scale, torch.ones(shape[:2], device=device), 5)
    for weight, rows in ((values["weight"][:0], e), (values["weight"][:, :0], e[..., :0])):
        drawn_rows = ops.perturb_project(rows, alpha, scale, weight, 5)
        assert drawn_rows.shape == (shape[0], samples, shape[1], len(weight))
        assert not drawn_rows.any()
    none = [torch.zeros(0, 0, dtype=torch.float64, device=device) for _ in range(2)]
    ops.perturb_accumulate_(
        *none, e[..., :0], alpha, scale, torch.ones(shape[:2], device=device), 5
    )
    if 0 in (shape[0], samples):
        assert not sums[0].any()
    assert ops.project(torch.zeros(0, 4, device=device), **values).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"weight": v["weight"].double()}, r"^weight: expected torch.float32 \[m, 13\]"),
        (lambda v: {"weight": v["weight"][:, :5]}, r"^weight: expected torch.float32 \[m, 13\]"),
        (lambda v: {"heights": (3, 4)}, r"^heights: expected numbers that sum to the 8 rows"),
        (lambda v: {"up": None}, r"^down, up: expected both"),
        (lambda v: {"up": v["up"][:, :1]}, r"^up: expected torch.float32 or float32 \[8, 2\]"),
        (lambda v: {"down": v["down"][:1]}, r"^down: expected .* \[2, 2, 13\]"),
        (lambda v: {"down": v["down"].half()}, r"^down: expected"),
    ],
)
def test_mistakes(change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    values = problem((3, 5), 2, torch.float32, torch.device("cpu"))
    wrong = values | change(values)
    with pytest.raises(ValueError, match=message):
        ops.project(torch.zeros(4, 13), **wrong)
    e = torch.ones(2, 3, 13)
    with pytest.raises(ValueError, match=message):
        ops.perturb_project(e, *drawn(e, 2), seed=5, **wrong)


def test_mistakes_in_sums() -> None:
    e = torch.ones(2, 3, 4)
    alpha, scale = drawn(e, 2)
    gram = torch.zeros(4, 4, dtype=torch.float64)
    weight = torch.ones(2, 3)

    def accumulate(**changes: Any) -> None:
        given = {"gram": gram, "cross": gram.clone(), "weight": weight} | changes
        ops.perturb_accumulate_(
            given["gram"],
            given["cross"],
            e,
            alpha,
            scale,
            given["weight"],
            5,
            destination=given.get("destination"),
        )

    accumulate()
    for message, changes in (
        (r"^gram: expected a float64 tensor of shape \[4, 4\]", {"gram": gram.float()}),
        (
            r"^cross: expected a contiguous",
            {"cross": torch.zeros(4, 8, dtype=torch.float64)[:, ::2]},
        ),
        (r"^weight: expected \[2, 3\]", {"weight": weight[0]}),
        (r"^destination: expected", {"destination": e[:1]}),
    ):
        with pytest.raises(ValueError, match=message):
            accumulate(**changes)


def test_opcheck(device):
    values = problem((3, 5), 2, torch.float32, device)
    namespace = torch.ops.realera_fast
    x, e = normal(4, 13).float().to(device), normal(2, 3, 13).float().to(device)
    alpha, scale = drawn(e, 2)
    factors = [values[n].clone().requires_grad_() for n in ("down", "up")]
    rest = ((3, 5), 0.7)
    torch.library.opcheck(namespace.project.default, (x, values["weight"], *factors, *rest))
    torch.library.opcheck(namespace.project.default, (x, values["weight"], None, None, *rest))
    y = torch.empty(4, 8, device=device)
    plain = [f.detach() for f in factors]
    torch.library.opcheck(namespace.project_into.default, (y, x, values["weight"], *plain, *rest))
    torch.library.opcheck(namespace.project_backward.default, (y.zero_(), x, *plain, *rest))
    arguments = (e, alpha, scale, values["weight"], *factors, *rest, 5, 0, 0)
    torch.library.opcheck(namespace.perturb_project.default, arguments)
    grad = torch.ones(2, 2, 3, 8, device=device)
    torch.library.opcheck(
        namespace.perturb_project_backward.default,
        (grad, e, alpha, scale, *plain, *rest, 5, 0, 0),
    )
    sums = [torch.zeros(13, 13, dtype=torch.float64, device=device) for _ in range(2)]
    weight = torch.ones(2, 3, device=device)
    torch.library.opcheck(
        namespace.perturb_accumulate_.default,
        (*sums, e, alpha, scale, weight, e.clone(), False, 5, 0, 0),
    )
    torch.library.opcheck(namespace.gram_.default, (sums[0], x, torch.ones(4, device=device)))


def test_one_graph():
    values = problem((3, 5), 2, torch.float32, torch.device("cpu"))
    e = normal(2, 3, 13).float()

    def loss(down: Tensor, up: Tensor) -> Tensor:
        alpha, _, scale = ops.perturb(e, 2, *NEIGHBOR, 5)
        y = ops.perturb_project(
            e, alpha, scale, values["weight"], 5, down=down, up=up, heights=(3, 5), scaling=0.7
        )
        return y.square().sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        factors = [values[n].clone().requires_grad_() for n in ("down", "up")]
        results.append(torch.autograd.grad(f(*factors), factors))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_capture_all_of_it():
    device = torch.device("cuda")
    values = problem((32, 64), 4, torch.bfloat16, device, width=64)
    e = normal(2, 5, 64).to(device, torch.bfloat16)
    sums = [torch.zeros(64, 64, dtype=torch.float64, device=device) for _ in range(2)]
    weight = torch.ones(2, 5, device=device)

    def run() -> tuple[Tensor, ...]:
        alpha, _, scale = ops.perturb(e, 3, *NEIGHBOR, 5)
        for s in sums:
            s.zero_()
        ops.perturb_accumulate_(*sums, e, alpha, scale, weight, 5, destination=e)
        return ops.perturb_project(e, alpha, scale, seed=5, **values), *sums

    expected = [t.clone() for t in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
