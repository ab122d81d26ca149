"""Everything that is measured, judged, published or trained here, by one command.

python bench/run.py closed_form            # full: bench/results/closed_form.jsonl, minutes
python bench/run.py closed_form --quick    # under a minute; says last which targets were met
python bench/run.py closed_form --plot     # docs/results/closed_form.png from committed rows
python bench/run.py quality objects        # one table of quality
python bench/run.py CASE --help            # what a case takes
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One command."""

    module: str
    """Has `main`: of parsed options if it is timed, else of its own command line."""
    about: str
    timed: bool = False
    """Whether threads are bound, and the options are those of every timed case."""
    plot: bool = False
    """Whether its rows can be drawn."""


CASES = {
    "closed_form": Case("speed.closed_form", "time of the closed form", timed=True, plot=True),
    "perturb": Case("speed.perturb", "time of drawing neighbors", timed=True, plot=True),
    "alignment": Case("speed.alignment", "time of the noise alignment", timed=True, plot=True),
    "full_size": Case("speed.full_size", "closed forms at full size", timed=True, plot=True),
    "end_to_end": Case("speed.end_to_end", "whole erasures, with both stages", timed=True),
    "entry_maps": Case("quality.entry_maps", "where to edit joint attention", timed=True),
    "quality": Case("quality.evaluate", "tables of quality, on the embedded model"),
    "robustness": Case("quality.robustness", "attacks on erased models"),
    "members": Case("quality.members", "how members of categories differ from other words"),
    "protocol": Case("quality.protocol", "the field's tables, for any model"),
    "publish": Case("publish.pages", "README's and docs/results/'s numbers from committed rows"),
    "gallery": Case("publish.gallery", "pictures of each kind of erasure, for docs/gallery.md"),
    "embedded": Case("embedded.train", "train the embedded model: hours"),
}


INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
"""Sets of loops of `csrc/`, and what makes PyTorch, MKL and oneDNN use no more than these."""


def bind_threads(threads: int, instructions: str | None = None) -> None:
    """Starts this process again with every OpenMP thread bound to a core of its own.

    Unbound threads were seen to share one core here, and OpenMP reads its settings only at start;
    so do the libraries that are to use older instructions.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "cores",
        **(INSTRUCTIONS[instructions] if instructions else {}),
    }
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_loops(instructions: str) -> None:
    """Chooses among the loops of the native library, if that is built."""
    import torch

    from realera_fast import ops  # noqa: F401

    if hasattr(torch.ops.realera_fast, "_use_tile_set"):
        torch.ops.realera_fast._use_tile_set(instructions)


def run_timed(name: str, argv: Sequence[str]) -> int:
    """Runs a case that measures time; its module is loaded once threads are bound."""
    case = CASES[name]
    parser = argparse.ArgumentParser(prog=f"run.py {name}", description=case.about)
    parser.add_argument("--quick", action="store_true", help="fewer points; rows go to out/")
    parser.add_argument("--out", type=Path, help="file of rows, overwritten")
    parser.add_argument("--threads", type=int, help="default: every core this process may use")
    parser.add_argument(
        "--instructions",
        choices=INSTRUCTIONS,
        help="as on a processor that has no others (default: all that this one has)",
    )
    if case.plot:
        parser.add_argument("--plot", action="store_true", help="measure nothing, draw")
    if name == "alignment":
        parser.add_argument(
            "--profile", type=Path, metavar="FILE", help="the slowest operators of a step"
        )
    if name == "full_size":
        parser.add_argument(
            "--model", action="append", help="of SD 1.4, SDXL, FLUX (default: all); may be repeated"
        )
    arguments = parser.parse_args(argv)
    if case.plot and arguments.plot:
        getattr(importlib.import_module("publish.plots"), name)()
        return 0
    arguments.threads = arguments.threads or len(os.sched_getaffinity(0))
    bind_threads(arguments.threads, arguments.instructions)
    if arguments.instructions:
        use_loops(arguments.instructions)
    return int(importlib.import_module(case.module).main(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    listed = "\n".join(f"  {name:12} {case.about}" for name, case in CASES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\ncases:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", choices=CASES, metavar="CASE")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see CASE --help")
    arguments = parser.parse_args(argv)
    case = CASES[arguments.case]
    if case.timed:
        return run_timed(arguments.case, arguments.options)
    module = importlib.import_module(case.module)
    return int(module.main(arguments.options))


if __name__ == "__main__":
    sys.exit(main())
