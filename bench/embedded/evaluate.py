"""What the judge sees in the pictures of the trained model."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS
from torch import Tensor

from embedded.common import load, log
from embedded.emoji_data import Fonts, pairs
from realera_fast.embedded import Words, words

EVALUATE = dict(seed=9000, seeds_per_thing=5, per_style=20)


def draw(pipe, prompts: list[str], seeds: list[int], steps: int, guidance: float) -> Tensor:
    """Samples ``[n, 3, 64, 64]`` in 0..1, each from its own seed."""
    out = []
    for i in range(0, len(prompts), 32):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + 32]]
        out.append(
            pipe(
                prompts[i : i + 32],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=64,
                width=64,
                generator=generators,
                output_type="pt",
            ).images
        )
    return torch.cat(out)


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    from PIL import Image

    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(pixels[i : i + columns], 1) for i in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def stage_sweep(work: Path) -> None:
    """Compare guidance and step counts on the tuning things; the table keeps the winner."""
    from realera_fast.embedded import load_judge, load_pipeline

    pipe, judge = load_pipeline(), load_judge()
    names = [thing.name for thing in words().things if thing.split == "tuning"]
    prompts = [f"a photo of a {name}" for name in names for _ in range(4)]
    expected = [name for name in names for _ in range(4)]
    for steps, guidance in [(20, g) for g in (2.0, 3.0, 4.0, 5.5, 7.0)] + [(12, 4.0), (25, 4.0)]:
        images = draw(pipe, prompts, [5000 + i for i in range(len(prompts))], steps, guidance)
        seen, styles = judge.classify(images)
        right = sum(a == b for a, b in zip(seen, expected, strict=True)) / len(seen)
        log(
            "sweep",
            f"steps {steps} guidance {guidance}: things {right:.3f}, "
            f"color {styles.count('color') / len(styles):.3f}",
        )


def share(seen: list[str], wanted: list[str]) -> float:
    """Fraction of the pictures that show what was asked for."""
    return sum(a == b for a, b in zip(seen, wanted, strict=True)) / len(seen)


def things_by_style(table: Words, styles: list[str]) -> list[tuple[str, str]]:
    """(thing, style) of the pictures that judge styles; ink only of what has a line drawing."""
    found = []
    inked = {t for t, s in pairs(Fonts.find()) if table.styles[s].name == "ink"}
    for style in styles:
        for i in range(EVALUATE["per_style"]):
            t = (7 * i) % len(table.things)
            t = t if style != "ink" or t in inked else 0
            found.append((table.things[t].name, style))
    return found


def stage_evaluate(work: Path) -> None:
    """How often the judge sees in the un-erased model's pictures what the prompt asked for."""
    import diffusers
    import transformers

    from realera_fast.embedded import load_judge, load_pipeline

    pipe, judge, table = load_pipeline(), load_judge(), words()
    steps, guidance = table.sampling["steps"], table.sampling["guidance_scale"]
    names = [thing.name for thing in table.things]
    per = EVALUATE["seeds_per_thing"]

    def run(prompts: list[str]) -> tuple[Tensor, list[str], list[str]]:
        seeds = [EVALUATE["seed"] + i for i in range(len(prompts))]
        images = draw(pipe, prompts, seeds, steps, guidance)
        return images, *judge.classify(images)

    wanted = [name for name in names for _ in range(per)]
    images, seen, styles = run([f"a photo of a {name}" for name in wanted])
    save_grid(images.view(len(names), per, 3, 64, 64)[:, :2].flatten(0, 1), 20, work / "things.png")
    per_thing = {
        name: share(seen[i * per : (i + 1) * per], [name] * per) for i, name in enumerate(names)
    }
    confused = sorted({(a, b) for a, b in zip(wanted, seen, strict=True) if a != b})
    synonyms = [(thing.name, word) for thing in table.things for word in thing.synonyms]
    _, seen_synonyms, _ = run([f"a photo of a {word}" for _, word in synonyms])
    style_names = [style.name for style in table.styles if style.name != "color"]
    drawable = things_by_style(table, style_names)
    style_images, style_things, style_seen = run(
        [f"a {style} picture of a {name}" for name, style in drawable]
    )
    save_grid(style_images, EVALUATE["per_style"], work / "styles.png")
    found = {
        "date": f"{datetime.datetime.now():%Y-%m-%d}",
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "sampling": {"sampler": "DDIM", "steps": steps, "guidance_scale": guidance},
        "seed": EVALUATE["seed"],
        "training": {
            **json.loads((work / "exported.json").read_text()),
            "text_cosine": load(work / "text.pt")["closeness"],
        },
        "judge_held_out": json.loads((work / "judge.json").read_text()),
        "things": {
            "prompt": "a photo of a {}",
            "pictures": len(wanted),
            "accuracy": share(seen, wanted),
            "style_is_color": styles.count("color") / len(styles),
            "per_thing": per_thing,
            "confused": confused,
        },
        "synonyms": {
            "pictures": len(synonyms),
            "accuracy": share(seen_synonyms, [n for n, _ in synonyms]),
        },
        "styles": {
            "prompt": "a {style} picture of a {}",
            "pictures": len(drawable),
            "accuracy": share(style_seen, [style for _, style in drawable]),
            "thing_accuracy": share(style_things, [name for name, _ in drawable]),
            "per_style": {
                style: share(
                    [a for a, (_, s) in zip(style_seen, drawable, strict=True) if s == style],
                    [style] * EVALUATE["per_style"],
                )
                for style in style_names
            },
        },
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "embedded_model.json").write_text(
        json.dumps(found, indent=2) + "\n", encoding="utf-8"
    )
    log(
        "evaluate",
        f"things {found['things']['accuracy']:.3f}, synonyms "
        f"{found['synonyms']['accuracy']:.3f}, styles {found['styles']['accuracy']:.3f}",
    )
    log("evaluate", f"confused: {confused}")
