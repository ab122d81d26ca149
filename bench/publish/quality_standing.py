"""Where the library is ahead of all others, tied and behind, table by table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harness.rows import committed
from harness.tables import PRESETS, percent, table
from quality.methods import BASELINES

from publish.quality_rows import QUALITY, Found, Row, bold, near, own_method, score
from realera_fast.embedded.flow import FLOW

OTHERS = (*BASELINES, "RealEra")
"""How the names of all others begin."""
SINGLE = {
    "styles": "styles",
    "characters": "characters",
    "unsafe": "a category by its name",
    "long": "long prompts",
}
"""Tables of one thing at a time, and what their rows are called here."""


@dataclass(frozen=True)
class Contest:
    """One number of one table, by which all methods are compared."""

    title: str
    found: Found
    value: Callable[[Row], float | None]
    tasks: tuple[str, ...] = ()

    def means(self, method: str) -> dict[int, float]:
        """Of each seed that has all the erasures that any method has of it."""
        most: dict[int, int] = {}
        for other in self.found.methods:
            for seed, rows in self._rows(other).items():
                most[seed] = max(most.get(seed, 0), len(rows))
        means = {}
        for seed, rows in self._rows(method).items():
            values = [found for row in rows if (found := self.value(row)) is not None]
            if values and len(rows) == most[seed]:
                means[seed] = statistics.mean(values)
        return means

    def _rows(self, method: str) -> dict[int, list[Row]]:
        rows: dict[int, list[Row]] = {}
        for row in self.found.of(method):
            if not self.tasks or row["task"] in self.tasks:
                rows.setdefault(row["seed"], []).append(row)
        return rows

    def best_preset(self) -> str:
        """The highest mean, of those that have the most seeds."""
        means = {m: found for m in PRESETS if (found := self.means(m))}
        seeds = max(map(len, means.values()))
        most = [method for method, found in means.items() if len(found) == seeds]
        return max(most, key=lambda method: statistics.mean(means[method].values()))

    def rival(self, own: str) -> tuple[str, list[float]] | None:
        """Of all others the one that is furthest ahead of a method, or the least behind; and by
        how much the method is ahead of it, of every seed that both have."""
        mine, found = self.means(own), {}
        for method in self.found.methods:
            if not any(method == name or method.startswith(f"{name},") for name in OTHERS):
                continue
            its = self.means(method)
            if both := sorted(set(mine) & set(its)):
                found[method] = [mine[seed] - its[seed] for seed in both]
        if not found:
            return None
        name = min(found, key=lambda method: statistics.mean(found[method]))
        return name, found[name]


def verdict(differences: Sequence[float]) -> str:
    """Ahead or behind where the mean is more than its standard deviation, else tied."""
    if len(differences) < 2:
        return "one seed"
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    if abs(mean) <= spread:
        return "tied"
    return "ahead" if mean > 0 else "**behind**"


def contests() -> Iterator[Contest]:
    """Every table in which others stand beside the library."""
    worlds = [row["world"] for row in committed(QUALITY) if "world" in row]
    for world in (None, *dict.fromkeys(worlds)):
        mark = {None: "", FLOW: "flow matching: "}.get(world, f"{world}: ")
        objects, several = Found("objects", world=world), Found("several", world=world)
        if objects.rows:
            yield Contest(f"{mark}objects", objects, score("h_o"))
            yield Contest(f"{mark}relatives", objects, near("h_o"))
        for count in several.counts:
            yield Contest(f"{mark}{count} at once", several, score("h_o"), (count,))
        for name, title in SINGLE.items():
            found = Found(name, world=world)
            if found.rows:
                yield Contest(f"{mark}{title}", found, score("h_o"))


def _cells(contest: Contest, own: str) -> list[str]:
    if own not in contest.found.methods or (found := contest.rival(own)) is None:
        return ["–"] * 3
    name, differences = found
    few = f" ({len(differences)} seeds)" if len(differences) > 1 else ""
    return [name, percent(differences) + few, verdict(differences)]


def standing_lines() -> list[str]:
    """The default and the best preset of each table, each beside its hardest rival."""
    body = []
    for contest in contests():
        best = contest.best_preset()
        body.append(
            [
                contest.title,
                *_cells(contest, own_method(contest.found)),
                bold(best),
                *_cells(contest, best),
            ]
        )
    if not body:
        return []
    return [
        "H_o against the hardest rival: of all others the one furthest ahead or least behind, by "
        "points on the words and seeds that both have, mean ± standard deviation over seeds. "
        "*Ahead* and *behind*: the mean is more than that deviation; else *tied*. One seed has "
        "none, and decides nothing. The default is its closed form where it has no row of its own.",
        "",
        *table(
            (
                "table",
                "the default against",
                "points",
                "it is",
                "the best preset",
                "against",
                "points",
                "it is",
            ),
            body,
        ),
        "",
    ]
