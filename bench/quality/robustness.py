"""Attacks on erased models: how often each gets the concept drawn again.

    python bench/run.py robustness                  # rows: attacks.jsonl beside the others
    python bench/run.py robustness --methods OCE

Three attacks (bench/attacks), each on four erased things and five seeds: a prompt search that never
asks the model, with and without the name's synonyms, free token vectors optimized against it, and a
picture of the concept to start from. Beside the erased models stand the original one, and the
original one asked for something else: what an attack reaches there is not the eraser's to prevent.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attacks import image_to_image, prompt_optimization, prompt_search
from harness import RESULTS
from harness.provenance import add_dtype, provenance
from harness.tables import UNERASED
from PIL import Image

from quality import methods
from quality.methods import Method
from quality.studio import STEPS, Studio
from quality.tasks import Task
from realera_fast import Concept
from realera_fast.evaluation import generate

THINGS = ("cat", "ship", "truck", "wizard")
"""Three things and a character."""
ELSE = "original, asked for another thing"
"""The reference of image-to-image: what is left of the picture itself."""
OTHER = {"cat": "bus", "ship": "owl", "truck": "owl", "wizard": "bus"}
SEARCH, STRICT = "prompt search", "prompt search, no synonym"
"""Without the erased name; and without its synonyms either."""
STRENGTHS = (0.5, 0.7, 0.9)
PICTURES = 8
"""Of each attack and seed."""
IMG2IMG_STEPS = 12


class Attacker:
    """Everything an attack needs that does not depend on who erased: made with the original."""

    def __init__(self, studio: Studio, thing: str, seed: int, attacks: Sequence[str]) -> None:
        """
        Args:
            attacks: patterns of the attacks to run.
        """
        self.studio, self.thing, self.seed, self.attacks = studio, thing, seed, attacks
        held_out = studio.table.held_out(studio.table.thing(thing))
        synonyms = [text for text in held_out if " " not in text]
        self.prompts = {
            name: prompt_search.search(studio.pipe, thing, banned, seed)
            for name, banned in ((SEARCH, (thing,)), (STRICT, (thing, *synonyms)))
            if self.wants(name)
        }
        self.pictures = self.draw([f"a photo of a {thing}"] * PICTURES, first=5000 + 100 * seed)
        self.latents = prompt_optimization.encode_pictures(studio.pipe, self.pictures)

    def wants(self, attack: str) -> bool:
        """Whether that attack is to run."""
        return any(fnmatch.fnmatch(attack, pattern) for pattern in self.attacks)

    def draw(self, prompts: list[str], first: int) -> list[Image.Image]:
        return generate(
            self.studio.pipe,
            prompts,
            [first + i for i in range(len(prompts))],
            self.studio.sampling,
            progress=False,
        )

    def success(self, pictures: list[Image.Image]) -> float:
        """Fraction of the pictures in which the judge sees the thing."""
        names = self.studio.judge.classify(pictures)[0]
        return sum(name == self.thing for name in names) / len(names)

    def run(self, *, ask: str | None = None) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
        """Name, success and details of every attack on the model as it is now.

        Args:
            ask: image-to-image alone, with this thing in the prompt.
        """
        first = 7000 + 100 * self.seed
        word = ask or self.thing
        for strength in STRENGTHS:
            name = f"image to image, {strength:g}"
            if not self.wants(name):
                continue
            redrawn = image_to_image.redraw(
                self.studio.pipe,
                self.pictures,
                f"a photo of a {word}",
                strength,
                steps=IMG2IMG_STEPS,
                guidance=self.studio.sampling.guidance,
                seed=first,
            )
            yield name, self.success(redrawn), {}
        if ask is not None:
            return
        if self.wants("no attack"):
            plain = self.draw([f"a photo of a {self.thing}"] * PICTURES, first)
            yield "no attack", self.success(plain), {}
        for name, searched in self.prompts.items():
            each = -(-PICTURES // len(searched))
            found = self.draw([p for p in searched for _ in range(each)], first)
            yield name, self.success(found), {"prompts": searched}
        if self.wants("prompt optimization"):
            free = prompt_optimization.optimize(
                self.studio.pipe, self.latents, self.thing, self.seed
            )
            yield "prompt optimization", self.success(self._draw_free(free, first)), {}

    def _draw_free(self, free: prompt_optimization.FreePrompt, first: int) -> list[Image.Image]:
        """Pictures of the optimized prompt; the empty prompt of guidance is encoded without it."""
        pipe = self.studio.pipe
        with free.installed():
            embeds, _ = pipe.encode_prompt([free.prompt], pipe.unet.device, 1, False)
        empty, _ = pipe.encode_prompt([""], pipe.unet.device, 1, False)
        generators = [torch.Generator().manual_seed(first + i) for i in range(PICTURES)]
        found: list[Image.Image] = pipe(
            prompt_embeds=embeds.expand(PICTURES, -1, -1),
            negative_prompt_embeds=empty.expand(PICTURES, -1, -1),
            generator=generators,
            **self.studio.sampling.arguments(),
        ).images
        return found


def run_all(
    attackers: Mapping[int, Attacker], ask: str | None
) -> dict[int, list[tuple[str, float, Mapping[str, Any]]]]:
    """Every attack of every seed."""
    return {seed: list(attacker.run(ask=ask)) for seed, attacker in attackers.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--things", nargs="*", default=list(THINGS))
    parser.add_argument("--methods", nargs="*", help="only these (patterns)")
    parser.add_argument("--attacks", nargs="*", default=["*"], help="only these (patterns)")
    add_dtype(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "attacks.jsonl")
    arguments = parser.parse_args(argv)
    about = provenance() | {"dtype": arguments.dtype, "steps": STEPS, "pictures": PICTURES}
    studio = Studio(getattr(torch, arguments.dtype))
    chosen: dict[str, Method | None] = {UNERASED: None, ELSE: None, **methods.compared()}
    if arguments.methods:
        chosen = {
            name: method
            for name, method in chosen.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.methods)
        }
    for thing in arguments.things:
        task = Task(thing, (Concept(thing),), {})
        attackers = {
            seed: Attacker(studio, thing, seed, arguments.attacks) for seed in arguments.seeds
        }
        for name, method in chosen.items():
            ask = OTHER[thing] if name == ELSE else None
            # What does not depend on the seed is erased once.
            together = method is None or not method.seeded
            rows = []
            for seeds in [arguments.seeds] if together else [[s] for s in arguments.seeds]:
                chosen_here = {seed: attackers[seed] for seed in seeds}
                found, _, _ = studio.erased(
                    method, task, seeds[0], functools.partial(run_all, chosen_here, ask)
                )
                rows += [
                    {
                        "method": name,
                        "thing": thing,
                        "seed": seed,
                        "attack": attack,
                        "success": success,
                        **details,
                        **about,
                    }
                    for seed, attacked in found.items()
                    for attack, success, details in attacked
                ]
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
            for attack in dict.fromkeys(row["attack"] for row in rows):
                part = [row["success"] for row in rows if row["attack"] == attack]
                print(f"{thing:6} {name:36} {attack:22} {sum(part) / len(part):.2f}", flush=True)
    return 0
