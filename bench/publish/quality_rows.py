"""Rows of the tables of quality, by method and seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.rows import committed
from harness.tables import DEFAULT, FAST, PRESETS, UNERASED, percent

Row = Mapping[str, Any]

QUALITY = "quality.jsonl"
"""Rows of all tables."""


class Found:
    """Rows of one table, by method."""

    def __init__(self, name: str, file: str = QUALITY, *, world: str | None = None) -> None:
        """
        Args:
            world: folder's name of another model than the shipped one (`run.py quality --world`).
        """
        rows = [row for row in committed(file) if row.get("world") == world]
        self.rows = [row for row in rows if row["table"] == name]
        self.methods = list(dict.fromkeys(row["method"] for row in self.rows))
        keys = [(r["method"], r["task"], r["seed"]) for r in self.rows]
        if len(set(keys)) != len(keys):
            raise SystemExit(f"{file} repeats rows of the table {name!r}: make it anew")

    def of(self, method: str) -> list[Row]:
        return [row for row in self.rows if row["method"] == method]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row["task"] for row in self.rows))

    @property
    def counts(self) -> list[str]:
        """Of tasks that are so many concepts at once, the fewest first."""
        return sorted(self.tasks, key=int)

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})

    def seeds_of(self, method: str) -> tuple[int, ...]:
        return tuple(sorted({row["seed"] for row in self.of(method)}))

    def by_seed(
        self, method: str, value: Callable[[Row], float | None], tasks: Sequence[str] = ()
    ) -> list[float]:
        """For every seed the mean over tasks: what is printed is their mean and spread."""
        found = []
        for seed in self.seeds:
            values = [
                value(row)
                for row in self.of(method)
                if row["seed"] == seed and (not tasks or row["task"] in tasks)
            ]
            known = [v for v in values if v is not None]
            if known:
                found.append(statistics.mean(known))
        return found

    def cell(
        self, method: str, value: Callable[[Row], float | None], tasks: Sequence[str] = ()
    ) -> str:
        """Mean and spread in percent, and of how many seeds where others have more."""
        found = self.by_seed(method, value, tasks)
        few = f" ({len(found)} seed{'s' * (len(found) > 1)})"
        return percent(found) + (few if 0 < len(found) < len(self.seeds) else "")

    def complete(self, method: str) -> bool:
        return len(self.of(method)) == max(len(self.of(m)) for m in self.methods)

    def ranked(self) -> list[str]:
        """Erasers, best mean H_o first."""
        own = [m for m in self.methods if m != UNERASED]
        return sorted(own, key=lambda m: -statistics.mean(self.by_seed(m, score("h_o"))))

    def note(self) -> str:
        """How the rows were made."""
        first = self.rows[0]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in self.rows))
        pictures = max(sum(row["pictures"] for row in self.of(m)) for m in self.methods)
        return (
            f"{len(self.seeds)} seeds, {pictures:,} pictures a method; percent, mean over "
            f"erasures ± standard deviation over seeds; {first['dtype']}, {first['device']}, "
            f"torch {first['torch']}, commit {commits}."
        )


def score(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["scores"][name]


def near(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if row["relatives"] is None else row["relatives"][name]


def part(name: str, key: str | None = None) -> Callable[[Row], float | None]:
    """A value that not every row has, or one inside of it."""

    def value(row: Row) -> float | None:
        found = row.get(name)
        return found[key] if key is not None and found is not None else found

    return value


def own_method(found: Found) -> str:
    """The library's rows: the default's where all of them are there, else its closed form's."""
    rows = found.of(DEFAULT)
    return DEFAULT if rows and found.complete(DEFAULT) else FAST


def bold(name: str) -> str:
    return f"**{name}**" if name in PRESETS else name


SUMMED = ("10", "100")
"""How many at once, where one table has all."""


def median_seconds(found: Found, method: str) -> str:
    return f"{statistics.median(row['seconds'] for row in found.of(method)):.1f}"


SCORES = ("acc_e", "acc_s", "acc_g", "h_o")
HEADER = ("Acc_e ↓", "Acc_s ↑", "Acc_g ↓", "H_o ↑")
"""Columns of `SCORES`."""

FURTHER: Mapping[str, Callable[[Row], float | None]] = {
    "Acc_g, said ↓": part("associated", "said"),
    "Acc_g, unsaid ↓": part("associated", "unsaid"),
    "relatives kept ↑": near("acc_s"),
    "H_o of these ↑": near("h_o"),
    "kinds drawn": part("kinds"),
    "scenes ↑": part("scenes"),
    "coherent ↑": part("coherence"),
}
"""Columns of tables whose rows have them."""
