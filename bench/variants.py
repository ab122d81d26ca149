"""How well each variant of the method erases from the embedded model.

    python bench/variants.py --split tuning              # choose settings
    python bench/variants.py --split judged --seeds 2    # publish: rows for bench/report.py
    python bench/variants.py --table ablation --split judged --seeds 5 --dtype bfloat16

Every variant erases one thing or style in one call, the judge names pictures from the same seeds
before and after, and one row per erased concept and seed is appended to bench/results/.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import realera_fast
from realera_fast import Concept, EraseConfig, embedded
from realera_fast.demo import DemoConfig, judged, plan, scores_of
from realera_fast.verification import generate

RESULTS = Path(__file__).parent / "results"


def variants() -> dict[str, EraseConfig]:
    """The configurations that are compared; the first one is the default of the library."""
    base = EraseConfig()

    def change(aligned: bool = False, **mining: object) -> EraseConfig:
        return dataclasses.replace(
            base,
            mining=dataclasses.replace(base.mining, **mining),
            alignment=dataclasses.replace(base.alignment, enabled=aligned),
        )

    return {
        "default": base,
        "closed form, vocabulary": change(),
        "closed form, no mining": change(mode="none"),
        "closed form, gaussian (paper)": change(mode="gaussian"),
        "closed form, gaussian, no beyond": change(mode="gaussian", beyond_scale=0.0),
        "closed form, gaussian, 50 samples": change(mode="gaussian", samples=50),
        "closed form, covariance": change(mode="covariance"),
        "closed form, offset": change(mode="offset"),
        "both stages, gaussian": change(aligned=True, mode="gaussian"),
        "both stages, no mining": change(aligned=True, mode="none"),
    }


def ablation() -> dict[str, EraseConfig]:
    """RealEra's parts, one by one, without the check that would drop what does not help."""
    base = EraseConfig()

    def parts(
        *, closed: bool, aligned: bool, mode: str = "gaussian", neighbors: bool, beyond: bool
    ) -> EraseConfig:
        return dataclasses.replace(
            base,
            mining=dataclasses.replace(
                base.mining, mode=mode, neighbor_scale=float(neighbors),
                beyond_scale=base.mining.beyond_scale * beyond,
            ),
            closed_form=dataclasses.replace(base.closed_form, enabled=closed),
            alignment=dataclasses.replace(
                base.alignment, enabled=aligned, check_seeds=0,
                beyond_scale=base.alignment.beyond_scale * beyond,
            ),
        )  # fmt: skip

    stages = {"closed form": (True, False), "alignment": (False, True), "both": (True, True)}
    found = {
        f"{stage}{', neighbors' * neighbors}{', beyond' * beyond}": parts(
            closed=closed, aligned=aligned, neighbors=neighbors, beyond=beyond
        )
        for neighbors in (True, False)
        for beyond in (True, False)
        for stage, (closed, aligned) in stages.items()
    }
    for stage in ("closed form", "both"):
        closed, aligned = stages[stage]
        found[f"{stage}, vocabulary's neighbors"] = parts(
            closed=closed, aligned=aligned, mode="vocabulary", neighbors=True, beyond=True
        )
    return found


TABLES = {"variants": variants, "ablation": ablation}
PICTURES = {
    "variants": {"pictures": 12, "synonym_pictures": 6, "relative_pictures": 4},
    "ablation": {"pictures": 8, "synonym_pictures": 4, "relative_pictures": 3},
}
"""Per table: what is compared, and pictures of each kind."""


def provenance() -> dict[str, object]:
    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return run.stdout.strip()

    import diffusers
    import transformers

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "device": "cuda" if torch.cuda.is_available() else f"cpu {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", choices=list(TABLES), default="variants")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--split", choices=["tuning", "judged"], default="tuning")
    parser.add_argument("--things", nargs="*", help="only these things (default: all of the split)")
    parser.add_argument("--styles", nargs="*", help="only these styles")
    parser.add_argument("--variants", nargs="*", help="only these variants")
    parser.add_argument("--seeds", type=int, default=1, help="erasures per concept and variant")
    parser.add_argument("--out", type=Path, help="default: bench/results/TABLE.jsonl")
    arguments = parser.parse_args()
    out = arguments.out or RESULTS / f"{arguments.table}.jsonl"

    table = embedded.words()
    things = [t.name for t in table.things if t.split == arguments.split]
    styles = [s.name for s in table.styles if s.split == arguments.split and s.name != "color"]
    things = things if arguments.things is None else arguments.things
    styles = styles if arguments.styles is None else arguments.styles
    chosen = TABLES[arguments.table]()
    if arguments.variants:
        chosen = {name: chosen[name] for name in arguments.variants}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    pipe, judge = embedded.load_pipeline().to(device, dtype), embedded.load_judge()
    about = provenance()

    def draw(shots: list) -> list[str]:
        pictures = generate(
            pipe,
            [shot.prompt for shot in shots],
            [shot.seed for shot in shots],
            steps=table.sampling["steps"],
            guidance=table.sampling["guidance_scale"],
            height=table.sampling["height"],
            width=table.sampling["width"],
            batch_size=64,
            progress=False,
        )
        return judged(judge, shots, pictures)

    for kind, name in (*(("object", t) for t in things), *(("style", s) for s in styles)):
        for seed in range(arguments.seeds):
            demo = DemoConfig(
                thing=name if kind == "object" else "cat",
                style=name if kind == "style" else "mosaic",
                other_pictures=1, style_pictures=8, columns=1, seed=1000 + 100 * seed,
                **PICTURES[arguments.table],
            )  # fmt: skip
            shots = [shot for shot in plan(table, demo) if shot.erased == name]
            before = scores_of(shots, draw(shots), name)
            concept = Concept(
                name,
                anchor="color" if kind == "style" else None,
                kind="style" if kind == "style" else "object",
            )
            for variant, config in chosen.items():
                started = time.perf_counter()
                result = realera_fast.erase(
                    pipe.unet,
                    pipe.text_encoder,
                    [concept],
                    tokenizer=pipe.tokenizer,
                    scheduler=pipe.scheduler,
                    config=dataclasses.replace(config, seed=seed),
                    progress=False,
                )
                seconds = time.perf_counter() - started
                seen = draw(shots)
                result.restore_(pipe.unet)
                after = scores_of(shots, seen, name)
                row = {
                    "variant": variant,
                    "erased": name,
                    "kind": kind,
                    "dtype": arguments.dtype,
                    "split": arguments.split,
                    "seed": seed,
                    "pictures": len(shots),
                    "before": before.to_dict(),
                    "after": after.to_dict(),
                    "neighbors": result.report["neighbors"][name],
                    "alignment": result.report["alignment"],
                    "rank": result.report["solve"]["rank"],
                    "seconds": round(seconds, 3),
                    **about,
                }
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                percent = {
                    k: v if v is None else round(v, 1) for k, v in after.percentages().items()
                }
                kept = result.report["alignment"].get("kept")
                print(
                    f"{name:12} {variant:34} {percent} aligned={kept} {seconds:.1f} s", flush=True
                )


if __name__ == "__main__":
    sys.exit(main())
