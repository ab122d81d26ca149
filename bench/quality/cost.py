"""Seconds and peak memory of erasing, a process for each erasure."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from harness import RESULTS
from harness.provenance import provenance

from quality import methods
from quality.studio import Studio
from realera_fast import Concept


def cost(name: str, count: int, dtype: str, threads: int) -> dict[str, float]:
    """Seconds and additional peak memory of one erasure, in a process of its own."""
    torch.set_num_threads(threads)
    studio = Studio(getattr(torch, dtype))
    gone = [t for t in studio.table.things if t.split == "judged"][:count]
    concepts = [Concept(thing.name) for thing in gone]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status["VmRSS"].split()[0])
    started = time.perf_counter()
    methods.compared(count)[name].erase(studio.pipe, concepts, 0, ())
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 3), "peak_mb": round((peak - before) / 1024, 1)}


def costs(arguments: argparse.Namespace) -> None:
    """Every method on 1 and 10 things, one after the other in the same run."""
    about = provenance() | {"dtype": arguments.dtype, "table": "costs"}
    out = arguments.out or RESULTS / "costs.jsonl"
    context = multiprocessing.get_context("spawn")
    rows = []
    for count in (1, 10):
        for name in methods.compared(count):
            # The first repetition fills caches on disk.
            for seed in range(-1, 2):
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    found = pool.submit(
                        cost, name, count, arguments.dtype, torch.get_num_threads()
                    ).result()
                row = {"method": name, "concepts": count, "seed": seed, **found, **about}
                if seed >= 0:
                    rows.append(row)
            print(count, name, found, flush=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
