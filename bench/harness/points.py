"""Rows of timed candidates, grouped into points and held against targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Key = tuple[Any, ...]
"""The values of the fields that tell a point from others."""
Candidates = Mapping[str, Mapping[str, Any]]
"""Rows of one point, by candidate; of a stage, by candidate and stage ("library solve")."""
Points = Mapping[Key, Candidates]


def by_point(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> dict[Key, Any]:
    """Rows by the fields that tell their points apart, then by candidate."""
    points: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        stage = row.get("stage", "total")
        name = row["candidate"] if stage == "total" else f"{row['candidate']} {stage}"
        points.setdefault(tuple(row[field] for field in fields), {})[name] = row
    return points


def times(point: Candidates, name: str) -> float | None:
    """How many times as long as the library a candidate takes, for a matrix where those count."""
    if name not in point:
        return None
    each, own = (
        row["p50_ms"] / row.get("matrices_measured", 1) for row in (point[name], point["library"])
    )
    return float(each / own)


@dataclass(frozen=True)
class Comparison:
    """How the rows of one benchmark are read: its points, what is printed, what is wanted."""

    fields: tuple[str, ...]
    """What tells a point from others."""
    title: Callable[[Key], str]
    """A point's name, of the values of `fields`."""
    cells: Callable[[Candidates], Iterable[str]]
    """What is printed of a point, beside its name."""
    targets: Callable[[Key, Points], Iterable[str]]
    """What a point misses, of all points."""
    width: int
    """Columns of a name."""

    def by_point(self, rows: Iterable[Mapping[str, Any]]) -> dict[Key, Any]:
        """Rows by point, then by candidate."""
        return by_point(rows, self.fields)

    def line(self, key: Key, point: Candidates) -> str:
        """One printed line."""
        return "  ".join([self.title(key).ljust(self.width), *self.cells(point)])

    def lines(self, rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
        """A printed line for each point."""
        return (self.line(key, point) for key, point in self.by_point(rows).items())

    def missed(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """Every target that the rows don't meet."""
        points = self.by_point(rows)
        return [
            f"{self.title(key)}: {text}" for key in points for text in self.targets(key, points)
        ]

    def verdict(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """The last line of a run."""
        failures = self.missed(rows)
        return "targets missed: " + "; ".join(failures) if failures else "targets met"
