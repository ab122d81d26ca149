"""Runs a benchmark.

python bench/run.py closed_form            # full: bench/results/closed_form.jsonl, minutes
python bench/run.py closed_form --quick    # under a minute; says last which targets were met
python bench/run.py closed_form --plot     # docs/closed_form.png from the committed rows

The same for `perturb`, `alignment`, and without a plot `full_size` and `entry_maps`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

CASES = ("closed_form", "perturb", "alignment", "full_size", "entry_maps")
"""Modules beside this file, each with `main(arguments) -> int`."""


def bind_threads(threads: int) -> None:
    """Starts this process again with every OpenMP thread bound to a core of its own.

    Unbound threads were seen to share one core here, and OpenMP reads its settings only at start.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "cores",
    }
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--quick", action="store_true", help="fewer points; rows go to out/")
    parser.add_argument("--out", type=Path, help="file of rows, overwritten")
    parser.add_argument("--threads", type=int, help="default: every core this process may use")
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="alignment: slowest operators of a step"
    )
    arguments = parser.parse_args()
    if not arguments.plot:
        arguments.threads = arguments.threads or len(os.sched_getaffinity(0))
        bind_threads(arguments.threads)
    return importlib.import_module(arguments.case).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
