"""Neighbors of prompts: drawn, projected and summed, beside what the published codes do.

Candidates of an operation:

    library     `realera_fast.ops`
    eager       randn, scale and add, then one product (and LoRA pair) for each layer
    compiled    torch.compile of the plain definition; CUDA only: on a CPU it was not through
                compiling after minutes
    ceiling     what no code gets below: the write of the rows; the bare product, of the same shape
                and type, with no rows drawn; the float64 product of the rows

Rows are written once; a product of n rows takes 2 n d m operations, its LoRA parts of rank r
2 n r (l d + m), sums of n rows n d^2 in float64 (one triangle).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness.points import Candidates, Comparison, Key, Points, times
from harness.provenance import provenance
from harness.rows import file_for, measured
from harness.shapes import SD, SDXL, Shape
from harness.timing import Clock, percentiles
from torch import Tensor
from torch.nn import functional

from realera_fast import ops
from realera_fast.ops.perturb_reference import perturb, perturb_rows
from realera_fast.ops.reference import perturb_accumulate_, perturb_project
from realera_fast.runtime import multiplies_natively

REGION = (0.5, 0.9, 1.6)
TOKENS = 77
RANK = 4
QUICK_SECONDS = 36.0
OPERATIONS = ("rows", "project", "lora", "backward", "accumulate")


@dataclass(frozen=True)
class Point:
    """One problem, given to every candidate."""

    operation: str
    shape: Shape
    concepts: int
    samples: int
    dtype: torch.dtype = torch.float32

    @property
    def prompts(self) -> int:
        return self.concepts * self.samples

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation} {self.shape.name} {self.concepts} x {self.samples} {dtype}"


CPU_QUICK = (
    *(Point("rows", SD, 1, samples) for samples in (1, 16, 256)),
    Point("project", SD, 1, 4),
    Point("lora", SD, 1, 4),
    Point("backward", SD, 1, 4),
    Point("accumulate", SD, 1, 64),
)
CPU_FULL = (
    *(Point("rows", SD, 1, samples) for samples in (1, 16, 256)),
    Point("rows", SD, 10, 16),
    Point("rows", SD, 1, 256, torch.bfloat16),
    *(Point("rows", SDXL, 1, samples) for samples in (1, 64)),
    *(Point(o, SD, 1, n) for o in ("project", "lora", "backward") for n in (1, 16)),
    *(Point("accumulate", SD, 1, samples) for samples in (16, 256)),
    Point("accumulate", SD, 10, 16),
    Point("accumulate", SDXL, 1, 32),
)
CPU_PRODUCTS = (
    *(Point(o, SD, 1, 16, torch.bfloat16) for o in ("project", "lora", "backward")),
    Point("lora", SDXL, 1, 2, torch.bfloat16),
)
"""For a processor that multiplies bfloat16 natively; others take minutes for one."""
GPU_QUICK = tuple(
    Point(operation, SD, concepts, samples, torch.bfloat16)
    for operation in OPERATIONS
    for concepts, samples in ((1, 16), (1, 256))
)
GPU_FULL = tuple(
    Point(operation, shape, concepts, samples, torch.bfloat16)
    for operation in OPERATIONS
    for shape in (SD, SDXL)
    for concepts, samples in ((1, 1), (1, 16), (1, 256), (10, 16), (100, 1))
) + (Point("accumulate", SD, 10_000, 100),)


class Problem:
    """Inputs of a point; the weights of a shape are made once."""

    def __init__(self, point: Point, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shape, dtype = point.shape, point.dtype

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device, dtype)

        width, self.heights = shape.width, shape.heights
        self.point, self.device = point, device
        self.embeddings = normal(point.concepts, TOKENS, width)
        if point.operation in ("project", "lora", "backward"):
            # A gigabyte of random numbers would take longer than the point.
            base = normal(max(self.heights), width) / width**0.5
            self.weight = torch.cat([base[:height] for height in self.heights])
        if point.operation in ("lora", "backward"):
            self.down = (normal(len(self.heights), RANK, width) / width**0.5).float()
            self.up = 0.05 * normal(sum(self.heights), RANK).float()
            for factor in (self.down, self.up):
                factor.requires_grad_(point.operation == "backward")
        if point.operation == "backward":
            self.grad = 1e-3 * normal(sum(self.heights))
        if point.operation == "accumulate":
            self.token_weight = torch.ones(point.concepts, TOKENS, device=device)
            self.destination = normal(point.concepts, TOKENS, width)

    @property
    def lora(self) -> dict[str, Any]:
        if self.point.operation == "project":
            return {}
        return {"down": self.down, "up": self.up, "heights": self.heights}

    def library(self) -> Any:
        e, point = self.embeddings, self.point
        alpha, _, scale = ops.perturb(e, point.samples, *REGION, 7)
        if point.operation == "rows":
            return ops.perturb_rows(e, alpha, scale, 7)
        if point.operation == "accumulate":
            gram, cross = self.sums()
            ops.perturb_accumulate_(
                gram, cross, e, alpha, scale, self.token_weight, 7, destination=self.destination
            )
            return gram, cross
        return self.graded(ops.perturb_project(e, alpha, scale, self.weight, 7, **self.lora))

    def sums(self) -> tuple[Tensor, Tensor]:
        size = (self.point.shape.width,) * 2
        gram, cross = (torch.zeros(size, dtype=torch.float64, device=self.device) for _ in range(2))
        return gram, cross

    def graded(self, y: Tensor) -> Any:
        if self.point.operation != "backward":
            return y
        grad = self.grad.expand_as(y)
        return torch.autograd.grad(y, (self.down, self.up), grad)

    def eager_rows(self, embeddings: Tensor) -> Tensor:
        """A draw, its direction and a step along it, for every sample: no test of the region."""
        e = embeddings[:, None, 1:]
        v = (
            torch.randn(
                e.shape[0], self.point.samples, *e.shape[2:], dtype=e.dtype, device=self.device
            )
            * e.square().mean().sqrt()
        )
        step = v - e
        norms = step.flatten(2).norm(dim=-1)[..., None, None]
        rho = torch.rand(norms.shape, dtype=e.dtype, device=self.device) * e.norm()
        x = e + rho / norms * step
        start = embeddings[:, None, :1].expand(-1, self.point.samples, -1, -1)
        return torch.cat((start, x), 2)

    def eager_project(self, x: Tensor) -> Tensor:
        x = x.view(-1, x.shape[-1])
        outputs, start = [], 0
        for layer, height in enumerate(self.heights):
            part = slice(start, start + height)
            y = functional.linear(x, self.weight[part])
            if self.point.operation != "project":
                down, up = self.down[layer].to(x.dtype), self.up[part].to(x.dtype)
                y = y + functional.linear(functional.linear(x, down), up)
            outputs.append(y)
            start += height
        if self.point.operation != "backward":
            return outputs  # type: ignore[return-value]
        grads = [g.expand(len(x), -1) for g in self.grad.split(list(self.heights))]
        return torch.autograd.grad(outputs, (self.down, self.up), grads)  # type: ignore

    def eager(self) -> Any:
        if self.point.operation == "accumulate":
            return self.eager_sums()
        rows = self.eager_rows(self.embeddings)
        return rows if self.point.operation == "rows" else self.eager_project(rows)

    def eager_sums(self) -> Any:
        gram, cross = self.sums()
        for e, a in zip(self.embeddings.float(), self.destination, strict=True):
            x = self.eager_rows(e[None]).flatten(0, 2).double()
            y = a.double().repeat(self.point.samples, 1)
            gram += x.mT @ x
            cross += (y - x).mT @ x
        return gram, cross

    def defined(self) -> Any:
        e, point = self.embeddings, self.point
        alpha, _, scale = perturb(e, point.samples, *REGION, 7)
        if point.operation == "rows":
            return perturb_rows(e, alpha, scale, 7)
        if point.operation == "accumulate":
            gram, cross = self.sums()
            perturb_accumulate_(
                gram,
                cross,
                e,
                alpha,
                scale,
                self.token_weight,
                self.destination,
                False,
                7,
                0,
                0,
            )
            return gram, cross
        factors = (None, None) if point.operation == "project" else (self.down, self.up)
        y = perturb_project(e, alpha, scale, self.weight, *factors, self.heights, 1.0, 7, 0, 0)
        return self.graded(y)

    def ceiling(self) -> Callable[[], Any]:
        point = self.point
        n, width = point.prompts * TOKENS, point.shape.width
        if point.operation == "rows":
            rows = torch.empty(n, width, dtype=point.dtype, device=self.device)
            return lambda: rows.fill_(1.0)
        if point.operation == "accumulate":
            # Half of a product of two matrices: see `work`.
            x = torch.randn(min(n, 4096), width, dtype=torch.float64, device=self.device)
            return lambda: x.mT @ x
        x = torch.randn(n, width, device=self.device).to(point.dtype)
        # Its output is fresh as well: on a CPU, pages of a large one cost as much as a few layers.
        return lambda: torch.mm(x, self.weight.mT)

    def ceiling_share(self) -> float:
        """The ceiling's time is this many times that of what it runs."""
        if self.point.operation != "accumulate":
            return 1.0
        n = self.point.prompts * TOKENS
        return 0.5 * n / min(n, 4096)


def greatest_error(got: Any, exact: Any) -> float:
    pairs = zip(got, exact, strict=True) if isinstance(got, tuple) else [(got, exact)]
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300))
        for a, b in pairs
    )


def measure(point: Point, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    problem = Problem(point, device)
    clock = Clock(device)
    large = point.prompts > 10_000
    runs: dict[str, Callable[[], Any]] = {"library": problem.library}
    if not large:
        runs["eager"] = problem.eager
        if device.type == "cuda" and point.prompts <= 256:
            runs["compiled"] = torch.compile(problem.defined, dynamic=False)
    runs["ceiling"] = problem.ceiling()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    peak: dict[str, int] = {}

    def once(name: str) -> float:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        milliseconds = clock.milliseconds(runs[name])
        if device.type == "cuda":
            peak[name] = torch.cuda.max_memory_allocated() - held
        return milliseconds

    for name in runs:
        once(name)
    started = time.perf_counter()
    while len(taken["library"]) < 3 or time.perf_counter() - started < seconds:
        for name in runs:
            taken[name].append(once(name))
        if len(taken["library"]) == 50:
            break
    error = None
    if point.prompts <= 16:
        error = greatest_error(problem.library(), problem.defined())
    found = []
    for name, each in taken.items():
        share = problem.ceiling_share() if name == "ceiling" else 1.0
        found.append(
            {
                "case": "perturb",
                "operation": point.operation,
                "shape": point.shape.name,
                "concepts": point.concepts,
                "samples": point.samples,
                "tokens": TOKENS,
                "rank": RANK if point.operation in ("lora", "backward") else 0,
                "dtype": str(point.dtype).removeprefix("torch."),
                "candidate": name,
                "repetitions": len(each),
                **percentiles([share * t for t in each]).milliseconds(),
                "error": error if name == "library" else None,
                "peak_bytes": peak.get(name),
            }
        )
    return found


def title(key: Key) -> str:
    operation, shape, concepts, samples, dtype = key
    return f"{operation} {shape} {concepts:,} x {samples} {dtype}"


def targets(key: Key, points: Points) -> Iterator[str]:
    """What a point misses."""
    point = points[key]
    eager, compiled, ceiling = (times(point, n) for n in ("eager", "compiled", "ceiling"))
    if eager is not None and not eager >= 1.3:
        yield f"{eager:.2f}x eager, wanted 1.3"
    if compiled is not None and not compiled >= 1.0:
        yield f"{compiled:.2f}x compiled, wanted 1"
    if key[0] in ("project", "lora") and ceiling is not None and not ceiling >= 0.8:
        yield f"{ceiling:.0%} of the bare product's rate, wanted 80%"
    error = point["library"]["error"]
    if key[0] == "rows" and error is not None and error != 0.0:
        yield f"differs from the definition by {error:.2g}, wanted the same bits"


def cells(point: Candidates) -> Iterator[str]:
    """What is printed of a point."""
    yield f"{point['library']['p50_ms']:9.3f} ms"
    for name in ("eager", "compiled", "ceiling"):
        factor = times(point, name)
        yield f"{name} {'-' if factor is None else f'{factor:.2f}x':>7}"
    error = point["library"]["error"]
    if error is not None:
        yield f"error {error:.1g}"


COMPARED = Comparison(
    fields=("operation", "shape", "concepts", "samples", "dtype"),
    title=title,
    cells=cells,
    targets=targets,
    width=38,
)


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        points = GPU_QUICK if arguments.quick else GPU_FULL
    else:
        products = CPU_PRODUCTS if multiplies_natively(torch.bfloat16) else ()
        points = CPU_QUICK if arguments.quick else (*CPU_FULL, *products)
    rows = measured(
        points,
        lambda point: measure(point, device, 0.6 if arguments.quick else 4.0),
        COMPARED.lines,
        provenance(arguments.threads),
        file_for("perturb", arguments.out, quick=arguments.quick),
        seconds=QUICK_SECONDS if arguments.quick else float("inf"),
    )
    print(COMPARED.verdict(rows))
    return 0
