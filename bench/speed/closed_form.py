"""The closed form, from rows in memory to updated weights, beside the baselines and its floor."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from baselines import Rows, batched, low_rank, mace, uce
from harness.points import Candidates, Comparison, Key, Points, times
from harness.provenance import provenance
from harness.rows import file_for, measured
from harness.shapes import FLUX, KEPT, SD, SDXL
from harness.timing import Clock, percentiles
from torch import Tensor

from realera_fast import ops
from realera_fast.solver import NormalEquations, Pairs, Solution, solve_layers
from speed.floors import Point, Rates, floors, gemm_rates, with_memory_rates

BASELINES = {"uce": uce.edit, "mace": mace.edit, "batched": batched.edit}
STAGES = ("solve", "update", "total")
NORM = 28.0
"""Length of a token's embedding in CLIP ViT-L/14."""
SYSTEMS_AT_ONCE = 8
"""Systems that are held at once on a CPU: each is 150 MB at d = 3072."""
QUICK_SECONDS = 36.0
"""After that, a quick run starts no further point."""


MACE_TOKENS = 30 * mace.TOKENS
QUICK_POINTS = (
    *(Point(SD, concepts) for concepts in (1, 10, 100, 1000, 10_000)),
    Point(SD, 1, MACE_TOKENS, ridge=1e3),
    Point(FLUX, 10, matrices=4),
    Point(SDXL, 100),
)
POINTS = (
    *(Point(SD, concepts) for concepts in (1, 10, 100, 1000, 10_000)),
    *(Point(SD, concepts, dtype=torch.bfloat16) for concepts in (1, 100, 10_000)),
    *(Point(SD, concepts, MACE_TOKENS, ridge=1e3) for concepts in (1, 10)),
    *(Point(SDXL, concepts) for concepts in (1, 10, 100, 1000, 10_000)),
    Point(SDXL, 100, dtype=torch.bfloat16),
    *(Point(KEPT, concepts) for concepts in (10, 50)),
    *(Point(FLUX, concepts) for concepts in (1, 10, 100)),
    Point(FLUX, 1000, matrices=4),
    Point(FLUX, 10_000, matrices=2),
)


@dataclass(frozen=True)
class Candidate:
    """One way to edit: `edit(weights, solve())`."""

    solve: Callable[[], Any]
    edit: Callable[[list[Tensor], Any], Sequence[Tensor]]
    matrices: int
    """How many of the point's matrices it is measured on."""
    in_place: bool = False
    staged: bool = False
    """Whether the two steps mean something alone."""


def library(point: Point, rows: Rows | list[Rows], device: torch.device) -> Candidate:
    def equations(own: Rows) -> NormalEquations:
        return NormalEquations(point.shape.width, device=device).update(Pairs(*own))

    def solve() -> list[Solution]:
        if isinstance(rows, Rows):
            return [equations(rows).solve(ridge=point.ridge, rank_tolerance=0.0)]
        size = SYSTEMS_AT_ONCE if device.type == "cpu" else len(rows)
        found: list[Solution] = []
        for start in range(0, len(rows), size):
            part = [equations(own) for own in rows[start : start + size]]
            found += solve_layers(part, ridge=point.ridge, rank_tolerance=0.0)
        return found

    def edit(weights: list[Tensor], found: list[Solution]) -> list[Tensor]:
        maps = [solution.map for solution in found]
        if point.shape.own_rows:
            ops.low_rank_update_(weights, [m.left for m in maps], [m.right for m in maps])
        else:
            ops.low_rank_update_(weights, maps[0].left, maps[0].right)
        return weights

    return Candidate(solve, edit, len(point.heights), in_place=True, staged=True)


def composition(point: Point, rows: Rows | list[Rows]) -> Candidate:
    def solve() -> low_rank.Factors | list[low_rank.Factors]:
        if isinstance(rows, Rows):
            return low_rank.factors(rows, point.ridge)
        return low_rank.factors_of_layers(rows, point.ridge)

    def edit(weights: list[Tensor], found: Any) -> list[Tensor]:
        low_rank.update_(weights, found)
        return weights

    return Candidate(solve, edit, len(point.heights), in_place=True, staged=True)


def random_rows(point: Point, device: torch.device) -> Rows | list[Rows]:
    generator = torch.Generator().manual_seed(point.total)

    def one() -> Rows:
        x, y = (
            torch.nn.functional.normalize(
                torch.randn(point.total, point.shape.width, generator=generator)
            )
            * NORM
            for _ in range(2)
        )
        y[point.rows :] = x[point.rows :]
        weight = torch.ones(point.total, device=device)
        return Rows(x.to(device, point.dtype), y.to(device, point.dtype), weight)

    return [one() for _ in point.heights] if point.shape.own_rows else one()


def random_weights(point: Point, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heights, width = point.heights, point.shape.width
    base = 0.02 * torch.randn(max(heights), width, generator=generator)
    # Drawing a gigabyte of random numbers takes longer than many of the points.
    return [
        (base[:h] * (1 + i / len(heights))).to(device, point.dtype) for i, h in enumerate(heights)
    ]


def exact(weight: Tensor, rows: Rows, ridge: float) -> tuple[Tensor, float]:
    """The edited weight in float64, by LU instead of Cholesky, and the greatest change in it."""
    w, x, y = weight.double(), rows.source.double(), rows.destination.double()
    scale = rows.weight.double()[:, None]
    if len(x) < x.shape[1]:
        root = scale.sqrt() * x
        gram = root @ root.mT + ridge * torch.eye(len(x), dtype=x.dtype, device=x.device)
        change = (w @ (scale.sqrt() * (y - x)).mT) @ torch.linalg.solve(gram, root)
    else:
        gram = (scale * x).mT @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        cross = w @ ((scale * (y - x)).mT @ x)
        change = torch.linalg.solve(gram, cross, left=False)
    return w + change, float(change.abs().max())


class Run(NamedTuple):
    """One run of a candidate."""

    milliseconds: Mapping[str, float]
    """By stage."""
    edited: Sequence[Tensor]
    state: Any
    """What its first step answered."""


def timed(candidate: Candidate, weights: list[Tensor], clock: Clock) -> Run:
    """Runs a candidate once."""
    kept: dict[str, Any] = {}

    def solve() -> None:
        kept["state"] = candidate.solve()

    def edit() -> None:
        kept["edited"] = candidate.edit(weights, kept["state"])

    laps = dict(zip(STAGES, clock.laps(solve, edit), strict=True))
    return Run(laps, kept["edited"], kept["state"])


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    """For the repetitions of one candidate at one point."""
    longest: float
    """A run of a baseline that would take longer is left out."""

    least: int
    """Repetitions of a baseline's run of less than two seconds."""
    deadline: float = math.inf
    """Value of `time.perf_counter()` after which nothing is repeated."""

    def repetitions(self, once: float, least: int = 5) -> int:
        least, most = (least, 25) if once < 2 else (1, 3)
        return max(least, min(most, int(self.seconds / max(once, 1e-9))))


def baseline(
    name: str,
    point: Point,
    rows: Rows | list[Rows],
    weights: list[Tensor],
    effort: Effort,
    clock: Clock,
) -> tuple[Candidate | None, float]:
    """A baseline on as many matrices as there is time for; and the seconds that one run takes."""

    def made(matrices: int, count: int | None = None) -> Candidate:
        cut = [
            Rows(*(tensor[:count] for tensor in own))
            for own in (rows[:matrices] if isinstance(rows, list) else [rows])
        ]
        given = cut if isinstance(rows, list) else cut[0]
        return Candidate(
            lambda: None, lambda w, _: BASELINES[name](w[:matrices], given, point.ridge), matrices
        )

    def seconds(candidate: Candidate) -> float:
        return timed(candidate, weights, clock).milliseconds["total"] / 1e3

    some = max(6, int(150 * (768 / point.shape.width) ** 2))
    few = some // 3
    if point.total > some and name != "batched":
        # The loops take time in proportion to the rows: two short runs tell what a long one takes.
        seconds(made(1, few))
        first, second = seconds(made(1, few)), seconds(made(1, some))
        one = first + max(0.0, second - first) * (point.total - few) / (some - few)
        if one > effort.longest:
            return None, one
        if one > effort.seconds:
            return made(1), one
    one = seconds(made(1))
    if one < effort.seconds / 10:
        one = min(one, seconds(made(1)))
    matrices = max(1, min(len(weights), int(effort.seconds / (effort.least + 1) / one)))
    return made(matrices), one * matrices


class Contest:
    """Every candidate of one point, and the weights that they edit."""

    def __init__(self, point: Point, device: torch.device, effort: Effort) -> None:
        self.point, self.device = point, device
        self.rows, self.weights = random_rows(point, device), random_weights(point, device)
        self.work = [weight.clone() for weight in self.weights]
        self.clock = Clock(device)
        first = self.rows if isinstance(self.rows, Rows) else self.rows[0]
        self.truth, self.change = exact(self.weights[0], first, point.ridge)
        self.candidates: dict[str, Candidate] = {
            "library": library(point, self.rows, device),
            "composition": composition(point, self.rows),
        }
        self.repetitions: dict[str, int] = {}
        self.notes: list[str] = []
        """What was left out."""
        for name in BASELINES:
            found, once = baseline(name, point, self.rows, self.weights, effort, self.clock)
            if found is None:
                self.notes.append(f"{name} not measured: {once:.0f} s for one matrix")
            else:
                self.candidates[name] = found
                self.repetitions[name] = effort.repetitions(once, effort.least)
        for name in ("library", "composition"):
            once = self.run(name).milliseconds["total"] / 1e3
            if once < 2:
                once = min(once, self.run(name).milliseconds["total"] / 1e3)
            self.repetitions[name] = effort.repetitions(once)

    def run(self, name: str) -> Run:
        """One run of a candidate, on weights as they were."""
        candidate = self.candidates[name]
        if candidate.in_place:
            torch._foreach_copy_(self.work, self.weights)
        return timed(candidate, self.work if candidate.in_place else self.weights, self.clock)

    def first_run(self, name: str) -> tuple[Run, dict[str, Any]]:
        """One run, and what a row says of it beside its time."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        run = self.run(name)
        error = float((run.edited[0].double() - self.truth).abs().max()) / self.change
        about: dict[str, Any] = {"error": error}
        if cuda:
            about["peak_bytes"] = torch.cuda.max_memory_allocated() - held
        if name == "library":
            infos = [solution.info for solution in run.state]
            about["residual_ratio"] = max(info.residual_ratio for info in infos)
            about["method"] = infos[0].method
        return run, about


def measure(
    point: Point, rates: Rates, device: torch.device, effort: Effort
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one point, every candidate and stage; and what was left out."""
    contest = Contest(point, device, effort)
    rates = with_memory_rates(rates, contest.work, contest.weights, device)
    taken: dict[str, list[Mapping[str, float]]] = {name: [] for name in contest.candidates}
    about: dict[str, dict[str, Any]] = {}
    for turn in range(max(contest.repetitions.values())):
        if turn > 0 and time.perf_counter() > effort.deadline:
            break
        for name in contest.candidates:
            if turn >= contest.repetitions[name]:
                continue
            if turn == 0:
                run, about[name] = contest.first_run(name)
            else:
                run = contest.run(name)
            taken[name].append(run.milliseconds)
            del run
    rows = [
        row_of(point, rates, name, candidate, stage, taken[name])
        | about[name]
        | {
            "bytes": 2 * sum(w.nbytes for w in contest.weights[: candidate.matrices]),
            "float32_gflops": rates.float32 / 1e9,
            "float64_gflops": rates.float64 / 1e9,
            "in_place_gbs": rates.in_place / 1e9,
            "copy_gbs": rates.copy / 1e9,
        }
        for name, candidate in contest.candidates.items()
        for stage in STAGES
        if stage == "total" or candidate.staged
    ]
    return rows, contest.notes


def row_of(
    point: Point,
    rates: Rates,
    name: str,
    candidate: Candidate,
    stage: str,
    taken: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """A row of one candidate and stage."""
    return {
        "case": "closed_form",
        "shape": point.shape.name,
        "concepts": point.concepts,
        "rows": point.rows,
        "preserved": point.shape.preserved,
        "candidate": name,
        "dtype": str(point.dtype).removeprefix("torch."),
        "stage": stage,
        "repetitions": len(taken),
        **percentiles([found[stage] for found in taken]).milliseconds(),
        "floor_ms": floors(point, rates, candidate.matrices)[stage],
        "matrices_measured": candidate.matrices,
        "matrices": len(point.shape.heights),
    }


def title(key: Key) -> str:
    shape, concepts, rows, dtype = key
    tokens = f" x {rows // concepts} rows" if rows > concepts else ""
    return f"{shape} {concepts:,}{tokens}{'' if dtype == 'float32' else ' ' + dtype}"


def targets(key: Key, points: Points) -> Iterator[str]:
    """What a point misses."""
    point = points[key]
    whole = point["library"]
    above = whole["p50_ms"] / whole["floor_ms"]
    factor = times(point, "composition") or 0.0
    if not factor > 1:
        yield f"{factor:.2f}x composition, wanted above 1"
    if above > 1.1 and not factor >= 1.3:
        yield f"{factor:.2f}x composition at {above:.2f}x floor, wanted 1.3"
    if not above <= 1.5:
        yield f"{above:.2f}x floor, wanted 1.5"
    error, other = whole["error"], point["composition"]["error"]
    if not error <= 2 * other:
        yield f"error {error:.2g}, composition {other:.2g}"
    if not whole["residual_ratio"] < 30:
        yield f"residual ratio {whole['residual_ratio']:.3g}"
    if whole["device"] != "cpu":
        yield from targets_of_a_gpu(key, point)
    shape, concepts, count, dtype = key
    before = points.get((shape, 1000, 1000, dtype))
    if concepts == count == 10_000 and before:
        a, b = whole, before["library"]
        growth = a["p50_ms"] / b["p50_ms"] * b["matrices_measured"] / a["matrices_measured"]
        if not growth <= 11.5:
            yield f"{growth:.1f}x the time of 1,000, wanted 11.5"


def targets_of_a_gpu(key: Key, point: Candidates) -> Iterator[str]:
    """What a point misses that is wanted of GPUs alone."""
    whole, update = point["library"], point["library update"]
    memory = update["bytes"] / update["in_place_gbs"] / 1e6
    if memory >= 0.999 * update["floor_ms"]:
        share = update["bytes"] / update["p50_ms"] / 1e6 / update["copy_gbs"]
        if not share >= 0.85:
            yield f"update at {share:.0%} of copy bandwidth, wanted 85%"
    factor = times(point, "batched") or math.inf
    if not factor >= 5:
        yield f"{factor:.1f}x batched, wanted 5"
    limit = {"SD 1.4": 1.5, "SDXL": 6.0}.get(key[0])
    known = any(card in whole["device"] for card in ("H100", "H200"))
    if known and limit and key[1:] == (100, 100, "float32") and not whole["p50_ms"] < limit:
        yield f"{whole['p50_ms']:.2f} ms, wanted {limit}"


def cells(point: Candidates) -> Iterator[str]:
    """What is printed of a point."""
    yield f"{point['library']['p50_ms']:9.2f} ms"
    yield f"{stage_floors(point):>22}"
    for name in (*BASELINES, "composition"):
        factor = times(point, name)
        yield f"{name} {'-' if factor is None else f'{factor:.3g}x':>6}{part(point, name)}"
    if part(point, "library"):
        yield part(point, "library").strip()


def stage_floors(point: Candidates) -> str:
    total, solve, update = (
        point[name]["p50_ms"] / point[name]["floor_ms"]
        for name in ("library", "library solve", "library update")
    )
    return f"{total:.2f}x floor ({solve:.3g}, {update:.2f})"


def part(point: Candidates, name: str) -> str:
    """Says so where not all matrices were measured."""
    row = point.get(name)
    if row is None or row["matrices_measured"] == row["matrices"]:
        return ""
    return f" ({row['matrices_measured']} of {row['matrices']} matrices)"


COMPARED = Comparison(
    fields=("shape", "concepts", "rows", "dtype"),
    title=title,
    cells=cells,
    targets=targets,
    width=28,
)


def main(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    # run.py has set the threads: torch.set_num_threads would make MKL's batched LU hang (seen).
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = arguments.quick
    effort = Effort(0.2, 1.5, 2, started + QUICK_SECONDS + 8) if quick else Effort(4.0, 60.0, 5)
    rates = gemm_rates(device)
    notes: list[str] = []

    def one(point: Point) -> list[dict[str, Any]]:
        rows, notes[:] = measure(point, rates, device, effort)
        return rows

    def show(rows: list[dict[str, Any]]) -> Iterator[str]:
        yield from COMPARED.lines(rows)
        yield from (f"    {note}" for note in notes)

    rows = measured(
        QUICK_POINTS if quick else POINTS,
        one,
        show,
        provenance(arguments.threads),
        file_for("closed_form", arguments.out, quick=quick),
        seconds=QUICK_SECONDS - (time.perf_counter() - started) if quick else math.inf,
        legend=(
            f"float32 {rates.float32 / 1e9:.0f} GFLOP/s, float64 {rates.float64 / 1e9:.0f} "
            "GFLOP/s; x floor: whole (solve, update); others: times the library, per matrix"
        ),
    )
    print(COMPARED.verdict(rows))
    return 0
