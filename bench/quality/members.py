"""How members of categories differ from other words: in the text encoder, and as they are drawn.

    python bench/run.py members                 # rows: bench/results/members.jsonl

For each category the words near its name that the embedded model's table knows are drawn and
compared with the name. `MiningConfig.member_cosine` was chosen on the first four; *weapon* is what
`run.py quality unsafe` judges.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import RESULTS
from harness.provenance import add_dtype, provenance

from realera_fast import embedded
from realera_fast.alignment import AlignmentConfig
from realera_fast.mining import MiningConfig, guidance_cosine, read_known_words
from realera_fast.models import projections, text_streams, value_gram
from realera_fast.text import Concept

CATEGORIES = {
    "plant": ("plant",),
    "food": ("food", "fruit", "vegetable", "dessert"),
    "clothing": ("clothing",),
    "building": ("building",),
    "vehicle": ("vehicle",),
    "animal": ("animal", "sea creature", "bug"),
    "weapon": ("weapon",),
}
"""Names whose members are drawn, and which categories of the embedded model's table they are."""


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
    known = read_known_words(text, value_gram(pipe.unet, projections(pipe.unet), text.width))
    table = embedded.words()
    rows = []
    of_word = {word: t for t in table.things for word in (t.name, *table.held_out(t))}
    for category, kinds in CATEGORIES.items():
        near = known.candidates(Concept(category, kind="explicit"), MiningConfig().member_words)
        # Of other words nobody says whether they are members.
        words = [c.word for c in near if c.word in of_word and c.word != category]
        drawn = guidance_cosine(
            pipe.unet,
            pipe.scheduler,
            [category],
            words,
            text=text,
            empty=text.encode([""]),
            config=AlignmentConfig(),
        )
        alike = known.space.cosines(known.rows_of(words), known.rows_of([category]))[:, 0]
        rows += [
            {
                "category": category,
                "word": word,
                "member": of_word[word].category in kinds,
                "drawn": round(float(cosine), 4),
                "text": round(float(cosine_of_text), 4),
                **about,
            }
            for word, cosine, cosine_of_text in zip(words, drawn, alike, strict=True)
        ]
        print(category, sum(r["member"] for r in rows if r["category"] == category), flush=True)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0
