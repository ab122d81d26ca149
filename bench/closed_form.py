"""The closed form, from rows in memory to updated weights, beside the baselines and its floor.

The floor of a point comes from rates measured in the same run (MKL or cuBLAS, same threads):

    f64 flops / f64 rate + max(f32 flops / f32 rate, bytes / in-place rate)

where bytes is every weight read and written once, and the in-place rate is that of `w *= 1` over
the same weights (stricter than a copy). For n rows, all moved, d features, m outputs, k = min(n,d):

    dual system    n^2 d (one triangle of X X^T) + n^3 / 3 + 2 n^2 d
    primal system  n d^2 (one triangle) + 2 n d^2 (D) + d^3 / 3 + 2 d^3
    update         min(4 m d k, 2 m d^2)

With k < d rows moved and others preserved, the primal system needs 2 k d^2 in place of D and 2 d^3.

and the cheaper system counts. With rows of their own for each matrix, systems are counted as often.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from baselines import Rows, batched, low_rank, mace, uce
from torch import Tensor

from realera_fast import closed_form, ops
from realera_fast.closed_form import NormalEquations, Pairs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "closed_form.jsonl"
QUICK = ROOT / "out" / "closed_form.jsonl"

BASELINES = {"uce": uce.edit, "mace": mace.edit, "batched": batched.edit}
STAGES = ("solve", "update", "total")
NORM = 28.0
"""Length of a token's embedding in CLIP ViT-L/14."""
SYSTEMS_AT_ONCE = 8
"""Systems that are held at once on a CPU: each is 150 MB at d = 3072."""
QUICK_SECONDS = 36.0
"""After that, a quick run starts no further point."""


@dataclass(frozen=True)
class Shape:
    """The projections of a model."""

    name: str
    width: int
    heights: tuple[int, ...]
    own_rows: bool = False
    """Whether every matrix has rows, and so a system, of its own."""
    preserved: int = 0
    """Rows that keep their place, beside those of the concepts."""


SD = Shape("SD 1.4", 768, (320,) * 10 + (640,) * 10 + (1280,) * 12)
SDXL = Shape("SDXL", 2048, (640,) * 20 + (1280,) * 120)
KEPT = replace(SD, name="SD 1.4, 2,000 rows preserved", preserved=2000)
FLUX = Shape("FLUX-like", 3072, (3072,) * 57, own_rows=True)


@dataclass(frozen=True)
class Point:
    """One problem, given to every candidate."""

    shape: Shape
    concepts: int
    tokens: int = 1
    """Rows of a concept: UCE's last token, or 30 prompts of 75 tokens as in MACE."""
    ridge: float = 0.5
    """UCE's; 1e3 is MACE's."""
    dtype: torch.dtype = torch.float32
    matrices: int | None = None
    """How many of the shape's matrices are edited, if not all."""

    @property
    def rows(self) -> int:
        """Rows that move."""
        return self.concepts * self.tokens

    @property
    def total(self) -> int:
        return self.rows + self.shape.preserved

    @property
    def heights(self) -> list[int]:
        """Heights in an order whose every beginning looks like the whole."""
        heights = self.shape.heights
        golden = (math.sqrt(5) - 1) / 2
        order = sorted(range(len(heights)), key=lambda i: (i * golden + 0.4) % 1)
        return [heights[i] for i in order][: self.matrices]


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
class Rates:
    """What the machine does at best, a second."""

    float32: float
    float64: float
    in_place: float = 0.0
    copy: float = 0.0


def floors(point: Point, rates: Rates, matrices: int | None = None) -> dict[str, float]:
    """Milliseconds that no code gets below, by stage, for the first ``matrices`` of the point."""
    heights = point.heights[:matrices]
    n, k, d, m = point.total, point.rows, point.shape.width, sum(heights)
    dual = n * n * d + n**3 / 3 + 2 * n * n * d
    few = 2 * k * d * d
    primal = n * d * d + d**3 / 3 + (few if k < d else few + 2 * d**3)
    systems = len(heights) if point.shape.own_rows else 1
    flops = min(4 * m * d * min(k, d), 2 * m * d * d)
    memory = 2 * m * d * point.dtype.itemsize
    solve = systems * min(dual, primal) / rates.float64
    update = max(flops / rates.float32, memory / rates.in_place)
    return {"solve": 1e3 * solve, "update": 1e3 * update, "total": 1e3 * (solve + update)}


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

    def solve() -> list[closed_form.Solution]:
        if isinstance(rows, Rows):
            return [equations(rows).solve(ridge=point.ridge, rank_tolerance=0.0)]
        size = SYSTEMS_AT_ONCE if device.type == "cpu" else len(rows)
        found: list[closed_form.Solution] = []
        for start in range(0, len(rows), size):
            part = [equations(own) for own in rows[start : start + size]]
            found += closed_form.solve_layers(part, ridge=point.ridge, rank_tolerance=0.0)
        return found

    def edit(weights: list[Tensor], found: list[closed_form.Solution]) -> list[Tensor]:
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


class Clock:
    """Times one run: two steps and the whole, milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(
        self, candidate: Candidate, weights: list[Tensor]
    ) -> tuple[tuple[float, float, float], Sequence[Tensor], Any]:
        if self.cuda:
            torch.cuda.synchronize()
        start = self._mark()
        state = candidate.solve()
        middle = self._mark()
        edited = candidate.edit(weights, state)
        end = self._mark()
        if self.cuda:
            torch.cuda.synchronize()
            return (
                (start.elapsed_time(middle), middle.elapsed_time(end), start.elapsed_time(end)),
                edited,
                state,
            )
        return (1e3 * (middle - start), 1e3 * (end - middle), 1e3 * (end - start)), edited, state


def best_seconds(
    run: Callable[[], object], device: torch.device, repetitions: int, least: float = 0.0
) -> float:
    """The 20th percentile of the repetitions, of at least ``least`` seconds of them."""
    clock = Clock(device)
    candidate = Candidate(lambda: None, lambda *_: [run()], 0)  # type: ignore[list-item]
    clock(candidate, [])
    taken: list[float] = []
    while len(taken) < repetitions or sum(taken) < least and len(taken) < 200:
        taken.append(clock(candidate, [])[0][2] / 1e3)
    return percentiles(taken)[0]


def gemm_rates(device: torch.device) -> Rates:
    def rate(dtype: torch.dtype, size: int) -> float:
        a = torch.randn(size, size, dtype=dtype, device=device)
        out = torch.empty_like(a)
        return 2 * size**3 / best_seconds(lambda: torch.mm(a, a, out=out), device, 5)

    large = device.type == "cuda"
    return Rates(
        rate(torch.float32, 8192 if large else 2048), rate(torch.float64, 8192 if large else 1536)
    )


def with_memory_rates(
    rates: Rates, work: list[Tensor], weights: list[Tensor], device: torch.device
) -> Rates:
    size = 2 * sum(weight.nbytes for weight in weights)
    in_place = best_seconds(lambda: torch._foreach_mul_(work, 1.0), device, 5, 0.1)
    copy = best_seconds(lambda: torch._foreach_copy_(work, weights), device, 5, 0.1)
    return replace(rates, in_place=size / in_place, copy=size / copy)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(values)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.2), at(0.5), at(0.8)


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
        return clock(candidate, weights)[0][2] / 1e3

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


def measure(
    point: Point, rates: Rates, device: torch.device, effort: Effort
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one point, every candidate and stage; and what was left out."""
    rows, weights = random_rows(point, device), random_weights(point, device)
    work = [weight.clone() for weight in weights]
    rates = with_memory_rates(rates, work, weights, device)
    clock = Clock(device)
    first = rows if isinstance(rows, Rows) else rows[0]
    truth, change = exact(weights[0], first, point.ridge)

    candidates: dict[str, Candidate] = {
        "library": library(point, rows, device),
        "composition": composition(point, rows),
    }
    notes, repetitions, about = [], {}, {}
    for name in BASELINES:
        found, once = baseline(name, point, rows, weights, effort, clock)
        if found is None:
            notes.append(f"{name} not measured: {once:.0f} s for one matrix")
        else:
            candidates[name] = found
            repetitions[name] = effort.repetitions(once, effort.least)

    def run(name: str) -> tuple[tuple[float, float, float], Sequence[Tensor], Any]:
        candidate = candidates[name]
        if candidate.in_place:
            torch._foreach_copy_(work, weights)
        return clock(candidate, work if candidate.in_place else weights)

    for name in ("library", "composition"):
        once = run(name)[0][2] / 1e3
        once = min(once, run(name)[0][2] / 1e3) if once < 2 else once
        repetitions[name] = effort.repetitions(once)
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in candidates}
    for turn in range(max(repetitions.values())):
        if turn > 0 and time.perf_counter() > effort.deadline:
            break
        for name in candidates:
            if turn >= repetitions[name]:
                continue
            if turn == 0 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            times, edited, state = run(name)
            taken[name].append(times)
            if turn == 0:
                error = float((edited[0].double() - truth).abs().max()) / change
                about[name] = {"error": error}
                if device.type == "cuda":
                    about[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - held
                if name == "library":
                    infos = [solution.info for solution in state]
                    about[name]["residual_ratio"] = max(info.residual_ratio for info in infos)
                    about[name]["method"] = infos[0].method
            del edited, state

    measured = []
    for name, candidate in candidates.items():
        floor = floors(point, rates, candidate.matrices)
        for i, stage in enumerate(STAGES):
            if stage != "total" and not candidate.staged:
                continue
            p20, p50, p80 = percentiles([times[i] for times in taken[name]])
            measured.append(
                {
                    "case": "closed_form",
                    "shape": point.shape.name,
                    "concepts": point.concepts,
                    "rows": point.rows,
                    "preserved": point.shape.preserved,
                    "candidate": name,
                    "dtype": str(point.dtype).removeprefix("torch."),
                    "stage": stage,
                    "repetitions": len(taken[name]),
                    "p20_ms": p20,
                    "p50_ms": p50,
                    "p80_ms": p80,
                    "floor_ms": floor[stage],
                    "matrices_measured": candidate.matrices,
                    "matrices": len(point.shape.heights),
                    **about[name],
                    "bytes": 2 * sum(w.nbytes for w in weights[: candidate.matrices]),
                    "float32_gflops": rates.float32 / 1e9,
                    "float64_gflops": rates.float64 / 1e9,
                    "in_place_gbs": rates.in_place / 1e9,
                    "copy_gbs": rates.copy / 1e9,
                }
            )
    return measured, notes


Key = tuple[str, int, int, str]


def by_point(rows: Sequence[Mapping[str, Any]]) -> dict[Key, dict[tuple[str, str], Any]]:
    """Rows by (shape, concepts, rows, dtype), then by (candidate, stage)."""
    points: dict[Key, dict[tuple[str, str], Any]] = {}
    for row in rows:
        key = row["shape"], row["concepts"], row["rows"], row["dtype"]
        points.setdefault(key, {})[row["candidate"], row["stage"]] = row
    return points


def ratio(found: Mapping[tuple[str, str], Any], name: str, stage: str = "total") -> float | None:
    """How many times as long as the library the candidate takes for a matrix."""
    if (name, stage) not in found:
        return None
    a, b = found[name, stage], found["library", stage]
    return (a["p50_ms"] / a["matrices_measured"]) / (b["p50_ms"] / b["matrices_measured"])


def title(key: Key) -> str:
    shape, concepts, rows, dtype = key
    tokens = f" x {rows // concepts} rows" if rows > concepts else ""
    return f"{shape} {concepts:,}{tokens}{'' if dtype == 'float32' else ' ' + dtype}"


def missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every target that the rows don't meet."""
    points = by_point(rows)
    found: list[str] = []

    def want(key: Key, met: bool, text: str) -> None:
        if not met:
            found.append(f"{title(key)}: {text}")

    for key, point in points.items():
        whole, update = point["library", "total"], point["library", "update"]
        above = whole["p50_ms"] / whole["floor_ms"]
        times = ratio(point, "composition") or 0.0
        want(key, times > 1, f"{times:.2f}x composition, wanted above 1")
        if above > 1.1:
            want(key, times >= 1.3, f"{times:.2f}x composition at {above:.2f}x floor, wanted 1.3")
        want(key, above <= 1.5, f"{above:.2f}x floor, wanted 1.5")
        error, other = whole["error"], point["composition", "total"]["error"]
        want(key, error <= 2 * other, f"error {error:.2g}, composition {other:.2g}")
        want(key, whole["residual_ratio"] < 30, f"residual ratio {whole['residual_ratio']:.3g}")
        if whole["device"] != "cpu":
            memory = update["bytes"] / update["in_place_gbs"] / 1e6
            if memory >= 0.999 * update["floor_ms"]:
                share = update["bytes"] / update["p50_ms"] / 1e6 / update["copy_gbs"]
                want(key, share >= 0.85, f"update at {share:.0%} of copy bandwidth, wanted 85%")
            times = ratio(point, "batched") or math.inf
            want(key, times >= 5, f"{times:.1f}x batched, wanted 5")
            limit = {"SD 1.4": 1.5, "SDXL": 6.0}.get(key[0])
            known = any(card in whole["device"] for card in ("H100", "H200"))
            if known and limit and key[1:] == (100, 100, "float32"):
                want(key, whole["p50_ms"] < limit, f"{whole['p50_ms']:.2f} ms, wanted {limit}")
    for key, point in points.items():
        shape, concepts, count, dtype = key
        before = points.get((shape, 1000, 1000, dtype))
        if concepts == count == 10_000 and before:
            a, b = point["library", "total"], before["library", "total"]
            growth = a["p50_ms"] / b["p50_ms"] * b["matrices_measured"] / a["matrices_measured"]
            want(key, growth <= 11.5, f"{growth:.1f}x the time of 1,000, wanted 11.5")
    return found


def line(key: Key, point: Mapping[tuple[str, str], Any]) -> str:
    whole = point["library", "total"]
    cells = [f"{title(key):28}", f"{whole['p50_ms']:9.2f} ms", f"{stage_floors(point):>22}"]
    for name in (*BASELINES, "composition"):
        times = ratio(point, name)
        cells.append(f"{name} {'-' if times is None else f'{times:.3g}x':>6}{part(point, name)}")
    return "  ".join(cells) + part(point, "library")


def stage_floors(point: Mapping[tuple[str, str], Any]) -> str:
    total, solve, update = (
        point["library", stage]["p50_ms"] / point["library", stage]["floor_ms"]
        for stage in ("total", "solve", "update")
    )
    return f"{total:.2f}x floor ({solve:.3g}, {update:.2f})"


def part(point: Mapping[tuple[str, str], Any], name: str) -> str:
    """Says so where not all matrices were measured."""
    row = point.get((name, "total"))
    if row is None or row["matrices_measured"] == row["matrices"]:
        return ""
    return f" ({row['matrices_measured']} of {row['matrices']} matrices)"


def provenance(device: torch.device, threads: int) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    processor = next(
        (
            text.partition(":")[2].strip()
            for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if text.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": processor,
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        import plots

        plots.closed_form()
        return 0
    started = time.perf_counter()
    # run.py has set the threads: torch.set_num_threads would make MKL's batched LU hang (seen).
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    effort = (
        Effort(0.2, 1.5, 2, started + QUICK_SECONDS + 8)
        if arguments.quick
        else Effort(4.0, 60.0, 5)
    )
    points = QUICK_POINTS if arguments.quick else POINTS
    about = provenance(device, arguments.threads)
    print(*(f"{name}: {value}" for name, value in about.items()), sep=", ")
    rates = gemm_rates(device)
    print(
        f"float32 {rates.float32 / 1e9:.0f} GFLOP/s, float64 {rates.float64 / 1e9:.0f} GFLOP/s; "
        "x floor: whole (solve, update); others: times the library, per matrix",
        flush=True,
    )
    out = arguments.out or (QUICK if arguments.quick else RESULTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Half a run must not pass for a whole one.
    unfinished = out.with_suffix(".unfinished")
    rows: list[dict[str, Any]] = []
    late = []
    for point in points:
        if arguments.quick and time.perf_counter() - started > QUICK_SECONDS:
            late.append(f"{point.shape.name} {point.concepts:,}: no time to measure it")
            continue
        measured, notes = measure(point, rates, device, effort)
        rows += [row | about for row in measured]
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for key, found in by_point(measured).items():
            print(line(key, found), f"[{time.perf_counter() - started:.0f} s]", flush=True)
        for note in notes:
            print(f"    {note}", flush=True)
    unfinished.replace(out)
    for text in late:
        print(text)
    failures = missed(rows)
    print("targets missed: " + "; ".join(failures) if failures else "targets met")
    return 0
