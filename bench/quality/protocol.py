"""The field's tables of an eraser, with one command for any model.

    python bench/run.py protocol objects --model embedded
    python bench/run.py protocol objects --model ./stable-diffusion-v1-4 --clip ./clip-vit-l-14
    python bench/run.py protocol explicit --model ./sd14 --prompts i2p.csv --detector nudenet

A protocol (bench/protocols/*.json) says what is erased, what is drawn and how that is scored. Every
picture is drawn before and after from the same seed; what was not named to the eraser ("unnamed")
is only ever drawn. Results: one row per erasure, with sampler, seeds, versions and the hashes of
the evaluators in it, and one page with the pictures of the first seeds.

The embedded model has words of its own: with `--model embedded` the lists of a protocol are taken
from its table (objects: the same ten classes; people: its characters; styles: its styles; explicit:
its weapons) and its own judge says what the pictures show.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import OUT
from harness.provenance import provenance
from PIL import Image

from realera_fast import Concept, EraseConfig, Erasure, embedded, erase
from realera_fast.evaluation import (
    ClipJudge,
    Row,
    Sampling,
    Scores,
    Table,
    accuracy,
    find_detector,
    generate,
    identity_of,
    sampling_settings,
    write_html,
)
from realera_fast.models import DTYPES, components_of, find_device, load_pipeline
from realera_fast.runtime import read_json

FOLDER = Path(__file__).resolve().parents[1] / "protocols"
COLUMNS = 4
"""Seeds that are shown."""


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


def draw(
    pipe: Any, shots: Sequence[Shot], sampling: Sampling, note: str, accelerator: Any = None
) -> list[Image.Image]:
    """The images of all shots, in their order; the accelerator's processes share them."""
    drawn: dict[int, Image.Image] = {}
    by_guidance: dict[float, list[int]] = {}
    for i, shot in enumerate(shots):
        by_guidance.setdefault(shot.guidance or sampling.guidance, []).append(i)
    for guidance, chosen in sorted(by_guidance.items()):
        images = generate(
            pipe,
            [shots[i].prompt for i in chosen],
            [shots[i].seed for i in chosen],
            dataclasses.replace(sampling, guidance=guidance),
            description=note,
            accelerator=accelerator,
        )
        drawn |= dict(zip(chosen, images, strict=True))
    return [drawn[i] for i in range(len(shots))]


def scored(
    protocol: Mapping[str, Any],
    shots: Sequence[Shot],
    pictures: Sequence[Image.Image],
    judge: Any,
    detectors: Mapping[str, Callable[[Image.Image], Any]],
) -> tuple[dict[str, float | None], list[str]]:
    """The numbers of a protocol, and what the judge or the detectors said of each picture."""
    groups = {
        g: [i for i, s in enumerate(shots) if s.group == g] for g in ("erased", "unnamed", "kept")
    }
    if protocol["score"] == "detections":
        said = [
            ", ".join(str(label) for d in detectors.values() for label in _labels(d(picture)))
            for picture in pictures
        ]
        counts = {
            f"flagged, {g}": float(sum(bool(said[i]) for i in places))
            for g, places in groups.items()
            if places
        }
        return counts, said
    things, styles = judge.classify(pictures)
    said = list(styles if protocol["kind"] == "style" and not protocol.get("clip") else things)
    rates = {
        g: accuracy([said[i] for i in places], [shots[i].name for i in places]) if places else None
        for g, places in groups.items()
    }
    if protocol["score"] == "clip":
        scores = judge.score(pictures, [shot.prompt for shot in shots])
        mean = {g: float(scores[places].mean()) if places else None for g, places in groups.items()}
        e, s = mean["erased"], mean["kept"]
        apart = None if e is None or s is None else s - e
        return {"CLIP_e": e, "CLIP_s": s, "H_a": apart}, said
    if rates["erased"] is None or rates["kept"] is None:
        raise SystemExit("nothing to score: a protocol needs erased and kept words")
    found = Scores(acc_e=rates["erased"], acc_s=rates["kept"], acc_g=rates["unnamed"])
    return found.percentages(), said


def _labels(found: Any) -> Sequence[Any]:
    """What a detector found, as a list; a string or number stands for itself if it is true."""
    if isinstance(found, str | bool | int | float):
        return [found] if found else []
    return list(found)


def rows_of(
    shots: Sequence[Shot],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    seen: tuple[Sequence[str], Sequence[str]],
) -> list[Row]:
    """What the page shows: the first seeds of each prompt."""
    names = {"erased": "erased", "unnamed": "synonym", "kept": "untouched"}
    places: dict[tuple[str, str], list[int]] = {}
    for i, shot in enumerate(shots):
        places.setdefault((shot.group, shot.prompt), []).append(i)
    rows = []
    for (group, prompt), found in places.items():
        shown = found[:COLUMNS]
        rows.append(
            Row(
                group=names[group],
                prompt=prompt,
                seeds=tuple(shots[i].seed for i in shown),  # type: ignore[arg-type]
                before=tuple(before[i] for i in shown),
                after=tuple(after[i] for i in shown),
                seen_before=tuple(seen[0][i] for i in shown),
                seen_after=tuple(seen[1][i] for i in shown),
            )
        )
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One protocol, who evaluates it, and where it is written."""

    name: str
    protocol: Mapping[str, Any]
    model: str
    """What the rows call the pipeline."""
    judge: Any
    detectors: Mapping[str, Callable[[Image.Image], Any]]
    config: EraseConfig
    batch_size: int
    out: Path
    """A folder."""
    keep_pictures: bool
    """Whether every picture is written, for FID."""
    accelerator: Any = None
    """Its processes share the pictures, and the first one writes; None is this one."""

    @property
    def sampling(self) -> Sampling:
        """As the protocol says."""
        sampler = self.protocol["sampler"]
        return Sampling(
            steps=sampler["steps"],
            guidance=sampler["guidance"],
            height=sampler.get("height"),
            width=sampler.get("width"),
            batch_size=self.batch_size,
        )

    def about(self, pipe: Any) -> dict[str, Any]:
        """What all rows have in common."""
        evaluators = {"judge": self.judge, **self.detectors}
        return {
            "protocol": self.name,
            "source": self.protocol["source"],
            "model": self.model,
            **provenance(),
            "sampler": sampling_settings(pipe, self.sampling),
            "evaluators": {k: identity_of(v) for k, v in evaluators.items() if v is not None},
            "erase_config": self.config.to_dict(),
        }

    def save_pictures(self, number: int, **sides: Sequence[Image.Image]) -> None:
        """Writes the pictures of a case, by side: before, after."""
        for side, pictures in sides.items():
            folder = self.out / "pictures" / f"{number:03d}" / side
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(pictures):
                picture.save(folder / f"{i:06d}.png")

    def write(
        self, rows: Sequence[Mapping[str, Any]], shown: Sequence[Row], about: Mapping[str, Any]
    ) -> None:
        """Writes the rows and the page."""
        measures = list(dict.fromkeys(k for row in rows for k in row["after"]))
        sides = ("before", "after")
        table = [
            (", ".join(row["erased"]), *(row[side].get(k) for k in measures for side in sides))
            for row in rows
        ]
        header = ("erased", *(f"{k} {side}" for k in measures for side in sides))
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        write_html(
            self.out / f"{self.name}.html",
            title=f"Protocol: {self.name}",
            summary=self.protocol["about"],
            rows=shown,
            tables=[Table(title="Scores", header=header, rows=tuple(table))],
            provenance=about,
        )


def run(job: Job, pipe: Any, found: Sequence[Case]) -> list[dict[str, Any]]:
    """Every case of a protocol: samples, erases, samples, undoes; writes rows and the page."""
    protocol, sampling = job.protocol, job.sampling
    if "scheduler" in protocol["sampler"]:
        import diffusers

        scheduler = getattr(diffusers, protocol["sampler"]["scheduler"])
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    about = job.about(pipe)
    drawn: dict[Shot, Image.Image] = {}
    rows: list[dict[str, Any]] = []
    shown: list[Row] = []
    for number, case in enumerate(found, start=1):
        note = f"{number}/{len(found)}"
        new = [shot for shot in case.shots if shot not in drawn]
        pictures = draw(pipe, new, sampling, f"{note} before:", job.accelerator)
        drawn |= dict(zip(new, pictures, strict=True))
        before = [drawn[shot] for shot in case.shots]
        erasure: Erasure = erase(
            pipe, case.concepts, config=job.config, accelerator=job.accelerator
        )
        try:
            after = draw(pipe, case.shots, sampling, f"{note} after:", job.accelerator)
        finally:
            erasure.restore_(components_of(pipe).model)
        if job.accelerator is not None and not job.accelerator.is_main_process:
            continue
        scores = [
            scored(protocol, case.shots, p, job.judge, job.detectors) for p in (before, after)
        ]
        rows.append(
            {
                "protocol": job.name,
                "erased": [c.target for c in case.concepts],
                "pictures": len(case.shots),
                "before": scores[0][0],
                "after": scores[1][0],
                "seconds": sum(erasure.report["seconds"].values()),
                "aligned": bool(erasure.lora),
                **about,
            }
        )
        print(_line(rows[-1]), flush=True)
        shown += rows_of(case.shots, before, after, (scores[0][1], scores[1][1]))
        if job.keep_pictures:
            job.save_pictures(number, before=before, after=after)
        # Rewritten after each case: a run of days shows what it has.
        job.write(rows, shown, about)
    if protocol["score"] == "accuracy" and len(rows) > 1:
        mean = {
            k: sum(r["after"][k] for r in rows) / len(rows)
            for k in rows[0]["after"]
            if all(r["after"][k] is not None for r in rows)
        }
        print("mean: " + ", ".join(f"{k} {_told(v)}" for k, v in mean.items()))
    return rows


def _line(row: Mapping[str, Any]) -> str:
    changes = (f"{k} {_told(row['before'][k])} -> {_told(v)}" for k, v in row["after"].items())
    return f"{', '.join(row['erased'])}: {', '.join(changes)}"


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


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


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="run.py protocol",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("protocol", choices=sorted(p.stem for p in FOLDER.glob("*.json")))
    parser.add_argument("--model", required=True, help="pipeline folder, cached id or 'embedded'")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model, the judge")
    parser.add_argument("--detector", action="append", default=[], metavar="NAME")
    parser.add_argument("--prompts", type=Path, help="CSV: drawn in place of the kept words")
    parser.add_argument("--erase", action="append", default=[], metavar="TARGET")
    parser.add_argument("--pictures", type=int, help="of each word (default: the protocol's)")
    parser.add_argument("--limit", type=int, help="of the rows of --prompts")
    parser.add_argument("--config", type=Path, help="JSON with the fields of EraseConfig")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=Path, default=OUT / "protocol")
    parser.add_argument("--save-pictures", action="store_true", help="all of them, for FID")
    parser.add_argument(
        "--shared", action="store_true", help="with the processes of `accelerate launch`"
    )
    return parser


def judge_of(
    arguments: argparse.Namespace, protocol: Mapping[str, Any], found: Sequence[Case]
) -> Any:
    """The embedded judge, a CLIP model, or none where detectors say everything."""
    if arguments.model == "embedded":
        return embedded.load_judge()
    if arguments.clip is not None:
        names = list(dict.fromkeys(shot.name for case in found for shot in case.shots))
        return ClipJudge.from_pretrained(
            arguments.clip,
            device=find_device(arguments.device),
            things=names,
            thing_template=protocol["judge_template"],
        )
    if protocol["score"] != "detections":
        raise SystemExit(f"{arguments.protocol} needs a judge: --clip DIR (or --model embedded)")
    return None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = options().parse_args(argv)
    protocol = read_protocol(arguments.protocol, arguments.model)
    embedded_model = arguments.model == "embedded"
    protocol |= {"embedded": embedded_model, "clip": not embedded_model}
    prompts = read_prompts(arguments.prompts, arguments.limit) if arguments.prompts else []
    found = list(
        cases(protocol, only=arguments.erase, pictures=arguments.pictures, prompts=prompts)
    )
    if not found or not found[0].concepts:
        raise SystemExit(f"--erase: expected targets of the protocol, got {arguments.erase}")
    detectors = {name: find_detector(name) for name in arguments.detector}
    if protocol["score"] == "detections" and not detectors:
        raise SystemExit(f"{arguments.protocol} needs --detector, such as nudenet")
    accelerator = None
    if arguments.shared:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=find_device(arguments.device).type == "cpu")
        arguments.device = str(accelerator.device)
    judge = judge_of(arguments, protocol, found)
    config = EraseConfig()
    if arguments.config:
        config = EraseConfig.from_dict(read_json(arguments.config.read_bytes()))
    dtype = DTYPES[arguments.dtype]
    pipe: Any
    if embedded_model:
        pipe = embedded.load_pipeline(dtype).to(find_device(arguments.device))
    else:
        pipe = load_pipeline(arguments.model, dtype=dtype, device=arguments.device)
    job = Job(
        name=arguments.protocol,
        protocol=protocol,
        model=arguments.model,
        judge=judge,
        detectors=detectors,
        config=config,
        batch_size=arguments.batch_size,
        out=arguments.out,
        keep_pictures=arguments.save_pictures,
        accelerator=accelerator,
    )
    run(job, pipe, found)
    if accelerator is None or accelerator.is_main_process:
        print(f"wrote {arguments.out / arguments.protocol}.jsonl and .html")
    return 0
