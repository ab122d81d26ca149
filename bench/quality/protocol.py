"""The field's tables of an eraser, with one command for any model.

    python bench/run.py protocol objects --model embedded
    python bench/run.py protocol objects --model ./stable-diffusion-v1-4 --clip ./clip-vit-l-14
    python bench/run.py protocol objects --model ./sd14 --clip ./clip --methods strict UCE OCE
    python bench/run.py protocol explicit --model ./sd14 --prompts i2p.csv --detector nudenet

A protocol (bench/protocols/*.json) says what is erased, what is drawn and how that is scored. Every
picture is drawn before and after from the same seed; what was not named to the eraser ("unnamed")
is only ever drawn. Every method that is asked for erases the same and is drawn from the same seeds;
baselines have their authors' settings, on the embedded model those of their sweeps. Results: one
row per erasure and method, with settings, sampler, seeds, versions and the hashes of the evaluators
in it, and one page with the means and the pictures of the first seeds.

The embedded model has words of its own: with `--model embedded` the lists of a protocol are taken
from its table (objects: the same ten classes; people: its characters; styles: its styles; explicit:
its weapons) and its own judge says what the pictures show.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import OUT
from harness.provenance import provenance
from harness.tables import DEFAULT
from PIL import Image

from quality import methods
from quality.editing import Editable
from quality.methods import Method
from quality.protocol_cases import FOLDER, Case, Shot, cases, read_prompts, read_protocol
from realera_fast import EraseConfig, embedded
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

COLUMNS = 4
"""Seeds that are shown."""


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
    method: str = "",
    columns: int = COLUMNS,
) -> list[Row]:
    """What the page shows: the first seeds of each prompt, and after which method if there are
    several."""
    names = {"erased": "erased", "unnamed": "synonym", "kept": "untouched"}
    places: dict[tuple[str, str], list[int]] = {}
    for i, shot in enumerate(shots):
        places.setdefault((shot.group, shot.prompt), []).append(i)
    rows = []
    for (group, prompt), found in places.items():
        shown = found[:columns]
        rows.append(
            Row(
                group=names[group],
                prompt=f"{method}: {prompt}" if method else prompt,
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
    methods: Mapping[str, Method]
    """Who erases, by name."""
    seed: int
    """Of whatever a method draws."""
    batch_size: int
    out: Path
    """A folder."""
    keep_pictures: bool
    """Whether every picture is written, for FID."""
    accelerator: Any = None
    """Its processes share the pictures, and the first one writes; None is this one."""

    @property
    def first(self) -> bool:
        """Whether this process judges and writes."""
        return self.accelerator is None or self.accelerator.is_main_process

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
            "seed": self.seed,
        }

    def save_pictures(self, number: int, side: str, pictures: Sequence[Image.Image]) -> None:
        """Writes the pictures of a case: those before, or those after a method."""
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
        each = [
            (
                row["method"],
                ", ".join(row["erased"]),
                *(row[side].get(k) for k in measures for side in sides),
            )
            for row in rows
        ]
        header = ("method", "erased", *(f"{k} {side}" for k in measures for side in sides))
        means = [
            (name, *(found.get(k) for k in measures), *found["of"])
            for name, found in means_of(rows).items()
        ]
        tables = [
            Table(
                title="Methods",
                header=("method", *measures, "erasures", "seconds"),
                rows=tuple(means),
                note=MEANS,
            ),
            Table(title="Scores", header=header, rows=tuple(each)),
        ]
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        write_html(
            self.out / f"{self.name}.html",
            title=f"Protocol: {self.name}",
            summary=self.protocol["about"],
            rows=shown,
            warnings=[f"{name}: {text}" for name, text in about["stopped by an error"].items()],
            tables=tables,
            provenance=about,
        )


MEANS = (
    "Means over the erasures that each method made; seconds of one erasure, median. A method with "
    "fewer erasures than others was stopped by an error, with which the page begins."
)
"""Under the first table of the page."""


def means_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method: the mean of each measure that all its rows have; "of": how many and seconds."""
    means: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        known = [k for k in own[0]["after"] if all(row["after"].get(k) is not None for row in own)]
        means[name] = {k: statistics.mean(row["after"][k] for row in own) for k in known}
        means[name]["of"] = len(own), statistics.median(row["seconds"] for row in own)
    return means


def run(job: Job, pipe: Any, found: Sequence[Case]) -> list[dict[str, Any]]:
    """Every case of a protocol: samples, erases, samples, undoes, each method in turn; writes rows
    and the page. A method that fails is left out from then on, and said to be."""
    protocol, sampling = job.protocol, job.sampling
    if "scheduler" in protocol["sampler"]:
        import diffusers

        scheduler = getattr(diffusers, protocol["sampler"]["scheduler"])
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    settings = {name: dict(method.settings) for name, method in job.methods.items()}
    failed: dict[str, str] = {}
    about = job.about(pipe)
    page = about | {"settings": settings, "stopped by an error": failed}
    own = components_of(pipe)
    editable = Editable(
        pipe,
        (own.model, *own.text_encoders),
        copied=any(
            method.drawn is None and name.split(",")[0] in methods.BASELINES
            for name, method in job.methods.items()
        ),
    )
    drawn: dict[Shot, Image.Image] = {}
    rows: list[dict[str, Any]] = []
    shown: list[Row] = []
    for number, case in enumerate(found, start=1):
        note = f"{number}/{len(found)}"
        new = [shot for shot in case.shots if shot not in drawn]
        pictures = draw(pipe, new, sampling, f"{note} before:", job.accelerator)
        drawn |= dict(zip(new, pictures, strict=True))
        before = [drawn[shot] for shot in case.shots]
        seen = scored(protocol, case.shots, before, job.judge, job.detectors)
        if job.keep_pictures and job.first:
            job.save_pictures(number, "before", before)
        for name, method in job.methods.items():
            if name in failed:
                continue

            def work(edited: Any, told: str = f"{note} {name}:", shots: Any = case.shots) -> Any:
                return draw(edited, shots, sampling, told, job.accelerator)

            try:
                after, seconds, erasure = editable.erased(method, case.concepts, job.seed, work)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                print(f"{name}: stopped by an error, and left out from here: {error}", flush=True)
                continue
            if not job.first:
                continue
            scores, said = scored(protocol, case.shots, after, job.judge, job.detectors)
            rows.append(
                {
                    "protocol": job.name,
                    "method": name,
                    "erased": [c.target for c in case.concepts],
                    "pictures": len(case.shots),
                    "before": seen[0],
                    "after": scores,
                    "seconds": seconds,
                    "aligned": bool(erasure is not None and erasure.report["alignment"]["kept"]),
                    "settings": settings[name],
                    **about,
                }
            )
            print(_line(rows[-1]), flush=True)
            told = name if len(job.methods) > 1 else ""
            few = max(1, COLUMNS // len(job.methods))
            shown += rows_of(case.shots, before, after, (seen[1], said), told, few)
            if job.keep_pictures:
                job.save_pictures(number, name, after)
            # Rewritten each time: a run of days shows what it has.
            job.write(rows, shown, page)
    if failed and rows and job.first:
        job.write(rows, shown, page)
    if len(rows) > len(job.methods):
        for name, means in means_of(rows).items():
            of = means.pop("of")
            values = ", ".join(f"{k} {_told(v)}" for k, v in means.items())
            print(f"mean of {of[0]}, {name}: {values}")
    return rows


def _line(row: Mapping[str, Any]) -> str:
    changes = (f"{k} {_told(row['before'][k])} -> {_told(v)}" for k, v in row["after"].items())
    return f"{', '.join(row['erased'])}, {row['method']}: {', '.join(changes)}"


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


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
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[DEFAULT],
        metavar="NAME",
        help=f"who erases, by names or patterns of the tables (default: {DEFAULT})",
    )
    parser.add_argument(
        "--config", type=Path, help=f"JSON with the fields of EraseConfig, of {DEFAULT}"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=Path, default=OUT / "protocol")
    parser.add_argument("--save-pictures", action="store_true", help="all of them, for FID")
    parser.add_argument(
        "--shared", action="store_true", help="with the processes of `accelerate launch`"
    )
    return parser


def methods_of(
    arguments: argparse.Namespace, config: EraseConfig, accelerator: Any
) -> dict[str, Method]:
    """Who erases.

    Raises:
        SystemExit: a name that nobody has, or what can't be done as was asked.
    """
    found = methods.named(arguments.methods, tuned=arguments.model == "embedded")
    if arguments.config and DEFAULT not in found:
        raise SystemExit(f"--config is of {DEFAULT}, which --methods leaves out; add it there")
    if accelerator is not None and list(found) != [DEFAULT]:
        raise SystemExit(f"--shared: expected {DEFAULT} alone in --methods, got {', '.join(found)}")
    if DEFAULT in found:
        found[DEFAULT] = methods.library(config, accelerator=accelerator, progress=True)
    return found


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
    chosen = methods_of(arguments, config, accelerator)
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
        methods=chosen,
        seed=config.seed,
        batch_size=arguments.batch_size,
        out=arguments.out,
        keep_pictures=arguments.save_pictures,
        accelerator=accelerator,
    )
    rows = run(job, pipe, found)
    if not job.first:
        return 0
    if not rows:
        print("nothing was erased: see the errors above")
        return 1
    print(f"wrote {arguments.out / arguments.protocol}.jsonl and .html")
    return 0
