"""Writes every published number from committed rows, between the markers of its page.

python bench/run.py publish              # README.md, docs/results/speed.md and quality.md
python bench/run.py publish --check      # exit 1 if these are not what the rows say
python bench/run.py publish --plots      # and the plots of quality
python bench/run.py publish --pictures   # and the grid of pictures: draws anew, minutes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness import ROOT

from publish import quality_page, readme, speed_page

Blocks = Mapping[str, Callable[[], list[str]]]
"""Lines by the name of their markers: `<!-- results -->` to `<!-- /results -->`."""

PAGES: Mapping[Path, Blocks] = {
    ROOT / "README.md": {"headline": readme.headline, "results": readme.summary},
    ROOT / "docs" / "results" / "speed.md": {"results": speed_page.generated},
    ROOT / "docs" / "results" / "quality.md": {"results": quality_page.generated},
}


def filled(text: str, blocks: Blocks) -> str:
    """A page with its blocks made anew."""
    for name, lines in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, opened, rest = text.partition(start)
        _, closed, tail = rest.partition(end)
        if not opened or not closed:
            raise SystemExit(f"expected {start} and {end} in the page; put them where these belong")
        text = f"{head}{start}\n{chr(10).join(lines()).strip()}\n{end}{tail}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--plots", action="store_true", help="draw the plots of quality")
    parser.add_argument("--pictures", action="store_true", help="draw the grid of pictures")
    arguments = parser.parse_args(argv)
    if not arguments.check and (arguments.plots or arguments.pictures):
        from publish import quality_plots

        quality_page.FOLDER.mkdir(parents=True, exist_ok=True)
        if arguments.pictures:
            quality_plots.grid(quality_page.FOLDER / "pictures.png")
        if arguments.plots:
            quality_plots.draw(quality_page.FOLDER)
    stale = []
    for path, blocks in PAGES.items():
        text = path.read_text(encoding="utf-8")
        wanted = filled(text, blocks)
        if text != wanted:
            stale.append(path)
        if not arguments.check:
            path.write_text(wanted, encoding="utf-8")
    if arguments.check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(f"not what the rows say: {names}; run bench/run.py publish", file=sys.stderr)
        return 1
    return 0
