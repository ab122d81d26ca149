"""How members of categories differ from other words: in the text encoder, and as they are drawn.

    python bench/run.py members                 # rows: bench/results/members.jsonl

For each category of the embedded model's words, every word of the tokenizer is drawn and compared
with the category's name. `MiningConfig.member_cosine` was chosen on the first four; *weapon* is
what `run.py quality unsafe` judges.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from harness import RESULTS
from harness.provenance import add_dtype, provenance

from realera_fast import embedded
from realera_fast.alignment import AlignmentConfig
from realera_fast.mining import guidance_cosine
from realera_fast.models import text_streams
from realera_fast.text import VocabularyConfig, describe, encode_vocabulary

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "plant": ("tree", "flower", "cactus"),
    "food": ("apple", "banana", "strawberry", "pizza", "cake"),
    "clothing": ("hat", "crown", "shoe"),
    "building": ("house", "castle"),
    "vehicle": (
        "airplane",
        "automobile",
        "ship",
        "truck",
        "bus",
        "taxi",
        "tractor",
        "motorcycle",
        "sailboat",
        "helicopter",
        "rocket",
        "train",
        "bicycle",
    ),
    "animal": (
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "tiger",
        "lion",
        "leopard",
        "wolf",
        "fox",
        "cow",
        "goat",
        "eagle",
        "owl",
        "duck",
        "penguin",
        "turtle",
        "snake",
        "rabbit",
        "pig",
        "bear",
        "elephant",
        "monkey",
        "whale",
        "shark",
        "butterfly",
    ),
    "weapon": ("knife", "dagger", "bomb", "gun", "bow", "sword", "axe"),
}
"""Things by category."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py members",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_dtype(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "members.jsonl")
    arguments = parser.parse_args(argv)
    about = provenance() | {"dtype": arguments.dtype}
    pipe = embedded.load_pipeline(getattr(torch, arguments.dtype))
    if torch.cuda.is_available():
        pipe.to("cuda")
    text = text_streams(pipe.unet, pipe.text_encoder, pipe.tokenizer)["sequence"][0]
    vocabulary = encode_vocabulary(text, VocabularyConfig())
    table = embedded.words()
    rows = []
    for category, things in CATEGORIES.items():
        named = {w for name in things for w in (name, *table.thing(name).synonyms)}
        # A part of a phrase ("red" of "red apple") says nothing of its own.
        parts = {w for t in table.things for s in t.synonyms if " " in s for w in s.split()}
        words = [w for w in vocabulary.words if w in named or w not in parts | {category}]
        drawn = guidance_cosine(
            pipe.unet,
            pipe.scheduler,
            [category],
            words,
            text=text,
            empty=text.encode([""]),
            config=AlignmentConfig(),
        )
        near = vocabulary.similarity(describe(text, [category])[0])
        places = {word: place for place, word in enumerate(vocabulary.words)}
        rows += [
            {
                "category": category,
                "word": word,
                "member": word in named,
                "drawn": round(float(cosine), 4),
                "text": round(float(near[places[word]]), 4),
                **about,
            }
            for word, cosine in zip(words, drawn, strict=True)
        ]
        print(category, sum(r["member"] for r in rows if r["category"] == category), flush=True)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0
