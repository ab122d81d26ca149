"""What a protocol erases and draws."""

from __future__ import annotations

import csv
import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from realera_fast import Concept, embedded

FOLDER = Path(__file__).resolve().parents[1] / "protocols"


@dataclasses.dataclass(frozen=True)
class Case:
    """One erasure and everything that is drawn for it."""

    concepts: tuple[Concept, ...]
    shots: tuple[Shot, ...]


@dataclasses.dataclass(frozen=True)
class Shot:
    """One picture: prompt, seed, what group it counts for, and the name that a judge may give."""

    group: str
    prompt: str
    seed: int
    name: str
    guidance: float | None = None


def read_protocol(name: str, model: str) -> dict[str, Any]:
    """A protocol, with the embedded model's own words where that is the model."""
    protocol: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if model != "embedded":
        return protocol
    table = embedded.words()
    sampling = table.sampling
    protocol["sampler"] = {
        "steps": sampling["steps"],
        "guidance": sampling["guidance_scale"],
        "height": sampling["height"],
        "width": sampling["width"],
    }
    own = {"people": "character", "explicit": "weapon"}
    if name == "styles":
        judged = [s for s in table.styles if s.split == "judged" and s.name != "color"]
        protocol["concepts"] = [{"target": s.name, "unnamed": table.held_out(s)} for s in judged]
        protocol["kept"] = [s.name for s in table.styles if s not in judged and s.name != "color"]
        protocol |= {"score": "accuracy", "templates": ["a picture in the style of {}"]}
    elif name in own:
        things = [t for t in table.things if t.kind == own[name]]
        half = things[: max(1, len(things) // 2)]
        protocol["concepts"] = [{"target": t.name, "unnamed": table.held_out(t)} for t in half]
        protocol["kept"] = [t.name for t in table.things if t not in half][:20]
        protocol |= {"score": "accuracy", "templates": ["a photo of a {}"], "kind": "object"}
    elif name == "general":
        others = [t.name for t in table.things if t.name != "cat"]
        protocol |= {"score": "accuracy", "kept": others, "templates": ["a photo of a {}"]}
    return protocol


def cases(
    protocol: Mapping[str, Any],
    *,
    only: Sequence[str] = (),
    pictures: int | None = None,
    prompts: Sequence[Mapping[str, str]] = (),
) -> Iterator[Case]:
    """The erasures of a protocol.

    Args:
        only: targets to erase; all if empty.
        pictures: of each name, in place of the protocol's number.
        prompts: rows of the user's own file, drawn in place of the protocol's kept words.
    """
    anchor = "color" if protocol["kind"] == "style" and protocol.get("embedded") else None
    listed = protocol["concepts"]
    chosen = [c for c in listed if not only or c["target"] in only]
    each = protocol["erase"] == "each"
    for group in [[c] for c in chosen] if each else [chosen]:
        targets = [c["target"] for c in group]
        others = [c["target"] for c in listed if c["target"] not in targets] if each else []
        words = [("erased", c["target"], c["target"]) for c in group]
        words += [("unnamed", word, c["target"]) for c in group for word in c["unnamed"]]
        if not prompts:
            words += [("kept", name, name) for name in (*others, *protocol["kept"])]
        count = protocol["pictures"] if pictures is None else pictures
        templates = protocol["templates"]
        shots = [
            # Seeds depend on the word alone, so that runs of different cases share pictures.
            Shot(kind, templates[i % len(templates)].format(word), _seed(word, i), name)
            for kind, word, name in words
            for i in range(max(1, count))
        ]
        for number, row in enumerate(prompts):
            given = row.get("sd_seed") or row.get("evaluation_seed") or number
            guidance = row.get("sd_guidance_scale") or row.get("evaluation_guidance")
            shots.append(
                Shot(
                    "kept",
                    row["prompt"],
                    int(given),
                    row["prompt"],
                    float(guidance) if guidance else None,
                )
            )
        concepts = tuple(Concept(target, anchor, protocol["kind"]) for target in targets)
        yield Case(concepts, tuple(shots))


def _seed(word: str, number: int) -> int:
    return zlib.crc32(word.encode()) % 2**24 + number


def read_prompts(file: Path, limit: int | None) -> list[dict[str, str]]:
    """Rows of a CSV file with a column ``prompt`` (or ``caption``), names in lower case."""
    with open(file, encoding="utf-8-sig", newline="") as opened:
        rows = [
            {k.strip().lower(): v for k, v in row.items() if k} for row in csv.DictReader(opened)
        ]
    found = [{**row, "prompt": row.get("prompt") or row.get("caption") or ""} for row in rows]
    if not found or not all(row["prompt"] for row in found):
        raise SystemExit(f"--prompts {file}: expected a column 'prompt' with text in every row")
    return found[:limit]
