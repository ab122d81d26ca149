"""Noise alignment beside a plain diffusers and peft training loop, and pictures with `fuse`.

Operations, all from the same draws and with the same loss terms:

    step    one optimizer step, z_t and the library's cached teacher given
    worst step   the same on the worst neighbors: one signed gradient step before it, by the plain
            loop with autograd through its student
    train   the whole training divided by its steps: trajectories, teacher, steps
    image   one picture of 20 guided steps, without the VAE: fused and as it was

Candidates:

    library            `realera_fast`
    library compiled   the same with `AlignmentConfig(compile=True)`
    plain              two models, peft adapters, teacher and student in every step, z_t from the
                       same replay of trajectories
    plain compiled     the same, both models through torch.compile
    plain, new z_t     the same without replay: every step denoises its z_t, half a picture

Compiling is not part of the times; it is in the rows as `compile_s`. A step passes the model once
forward and once back (the library) or once more for the teacher (plain): no more than 3/2 can be
had from that. `flops` are counted by PyTorch on the library's step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from harness.points import Candidates, Comparison, Key, Points, times
from harness.provenance import provenance
from harness.rows import file_for, measured
from harness.timing import Clock, percentiles

from realera_fast.runtime import fastest_dtype
from speed.alignment_problem import FLOW, Point, Problem
from speed.full_size import Memory, trim


def cpu_points(quick: bool) -> list[Point]:
    dtypes = list(dict.fromkeys((torch.float32, fastest_dtype("cpu"))))
    points = [Point("step", "embedded", dtype, compiled=not quick) for dtype in dtypes]
    points += [Point("worst step", "embedded", dtype) for dtype in dtypes]
    points += [] if quick else [Point("train", "embedded", dtype) for dtype in dtypes]
    points += [Point(kind, FLOW, dtype) for kind in ("step", "worst step") for dtype in dtypes]
    return [*points, *(Point("image", "embedded", dtype) for dtype in dtypes)]


def gpu_points(quick: bool) -> list[Point]:
    half = torch.bfloat16
    return [
        Point("step", "SD 1.4", half, 6, compiled=not quick),
        Point("worst step", "SD 1.4", half, 6),
        *([] if quick else [Point("train", "SD 1.4", half, 6)]),
        Point("image", "SD 1.4", half),
        Point("step", "embedded", half, compiled=not quick),
        Point("step", FLOW, half),
        Point("worst step", FLOW, half),
    ]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of a large product, the best of some."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    return 2 * size**3 / min(clock.milliseconds(lambda: a @ b) / 1e3 for _ in range(8))


def profile(point: Point, device: torch.device) -> str:
    """The slowest operators of the library's and the plain step, as tables."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
        key = "self_cuda_time_total"
    problem, clock = Problem(point, device), Clock(device)
    tables = []
    for name, run in (("library", problem.library_step()), ("plain", problem.plain_step())):
        clock.milliseconds(run)
        with record(activities=kinds) as recorded:
            clock.milliseconds(run)
        table = recorded.key_averages().table(sort_by=key, row_limit=25)
        tables.append(f"{point.title}, {name}\n{table}\n")
    return "\n".join(tables)


def growth(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a run takes at its peak beyond what was there, models and optimizer: activations
    and gradients. On a CPU the most of some runs, as memory is looked at every 10 ms."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    memory, found = Memory(device), [0]
    for _ in range(3):
        trim()
        before = psutil.Process().memory_info().rss
        memory.peak()
        run()
        found.append(round(memory.peak() * 2**20 - before))
    memory.stop()
    return max(found)


def measure(point: Point, device: torch.device, least: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of all candidates, measured in turns."""
    problem, clock = Problem(point, device), Clock(device)
    runs = problem.candidates()
    error, flops = problem.error(), problem.flops()
    rate = matmul_rate(device, point.dtype) if point.operation == "step" else None
    first = {name: clock.milliseconds(run) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    peak: dict[str, int] = {}
    started = time.perf_counter()
    while len(taken["library"]) < least or time.perf_counter() - started < seconds:
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken[name].append(clock.milliseconds(run))
            if device.type == "cuda":
                peak[name] = torch.cuda.max_memory_allocated()
        if len(taken["library"]) == 50:
            break
    grown = {name: growth(run, device) for name, run in runs.items()}
    found = []
    for name, each in taken.items():
        steps = problem.config.steps if point.operation == "train" and "new" not in name else 1
        spread = percentiles([t / steps for t in each])
        compiled = "compiled" in name
        found.append(
            {
                "case": "alignment",
                "operation": point.operation,
                "model": point.model,
                "dtype": str(point.dtype).removeprefix("torch."),
                "rows": problem.rows,
                "candidate": name,
                "repetitions": len(each),
                **spread.milliseconds(),
                "compile_s": (first[name] - spread.p50) / 1e3 if compiled else None,
                "error": error if name == "library" else None,
                "peak_bytes": peak.get(name),
                "step_bytes": grown[name],
                "flops": flops,
                "matmul_flops_per_s": rate,
            }
        )
    return found


def title(key: Key) -> str:
    operation, model, dtype, _ = key
    return f"{operation} {model} {dtype}"


def targets(key: Key, points: Points) -> Iterator[str]:
    """What a point misses."""
    point = points[key]
    own, plain = point["library"], times(point, "plain")
    assert plain is not None
    cuda = own["peak_bytes"] is not None
    if key[0] == "image":
        if own["error"] > 0:
            yield f"differs by {own['error']:.1g}, wanted 0"
        return
    # Both go once more through the student and back: what is saved is the teacher alone.
    wanted = 1.0 if key[0] == "worst step" else 2.0 if cuda else 1.5
    if plain < wanted:
        yield f"{plain:.2f}x the plain loop, wanted {wanted}"
    if cuda and key[0] == "step" and key[1] != "embedded":
        share = own["flops"] / (own["p50_ms"] / 1e3) / own["matmul_flops_per_s"]
        if share < 0.45:
            yield f"{share:.0%} of the matrix peak, wanted 45%"
        memory = own["peak_bytes"] / point["plain"]["peak_bytes"]
        if memory > 0.6:
            yield f"{memory:.0%} of the memory, wanted 60%"


def cells(point: Candidates) -> Iterator[str]:
    """What is printed of a point."""
    yield f"{point['library']['p50_ms']:10.1f} ms"
    for name in point:
        if name != "library":
            yield f"{name} {times(point, name):.2f}x"
    own, plain = (point[name]["step_bytes"] / 2**20 for name in ("library", "plain"))
    yield f"{own:,.0f} MiB beside {plain:,.0f}"
    error = point["library"]["error"]
    if error is not None:
        yield f"error {error:.1g}"


COMPARED = Comparison(
    fields=("operation", "model", "dtype", "rows"),
    title=title,
    cells=cells,
    targets=targets,
    width=26,
)


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of_device = gpu_points if device.type == "cuda" else cpu_points
    if arguments.profile:
        arguments.profile.parent.mkdir(parents=True, exist_ok=True)
        arguments.profile.write_text(profile(of_device(True)[0], device), encoding="utf-8")
        return 0
    effort = (3, 1.0) if arguments.quick else (5, 10.0)
    rows = measured(
        of_device(arguments.quick),
        lambda point: measure(point, device, *effort),
        COMPARED.lines,
        provenance(arguments.threads),
        file_for("alignment", arguments.out, quick=arguments.quick),
    )
    print(COMPARED.verdict(rows))
    return 0
