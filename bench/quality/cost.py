"""Seconds and peak memory of erasing, a process for each erasure."""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from harness import RESULTS
from harness.provenance import provenance
from harness.rows import read
from harness.tables import FAST

from quality import methods
from quality.studio import Studio
from realera_fast import Concept

REPEATS = 2


def cost(name: str, count: int, dtype: str, threads: int) -> dict[str, float]:
    """Seconds and additional peak memory of one erasure, in a process of its own."""
    torch.set_num_threads(threads)
    studio = Studio(getattr(torch, dtype))
    gone = [t for t in studio.table.things if t.split == "judged"][:count]
    concepts = [Concept(thing.name) for thing in gone]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status["VmRSS"].split()[0])
    started, used = time.perf_counter(), time.process_time()
    methods.costed(count)[name].erase(studio.pipe, concepts, 0, ())
    seconds, used = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(used, 3),
        "peak_mb": round((peak - before) / 1024, 1),
    }


def costs(arguments: argparse.Namespace) -> None:
    """Every method on 1 and 10 things, one after the other; rows that are there stay."""
    about = provenance() | {"dtype": arguments.dtype, "table": "costs"}
    out = arguments.out or RESULTS / "costs.jsonl"
    context = multiprocessing.get_context("spawn")

    def measured(name: str, count: int) -> dict[str, float]:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(cost, name, count, arguments.dtype, torch.get_num_threads()).result()

    made = {(r["method"], r["concepts"]) for r in read(out)} if out.exists() else set()
    # Fills what the library keeps on the disk for this text encoder.
    measured(FAST, 1)
    for count in (1, 10):
        for name in methods.costed(count):
            if arguments.methods and not any(fnmatch.fnmatch(name, p) for p in arguments.methods):
                continue
            if (name, count) in made:
                continue
            for repeat in range(REPEATS):
                found = measured(name, count)
                row = {"method": name, "concepts": count, "seed": repeat, **found, **about}
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            print(count, name, found, flush=True)
