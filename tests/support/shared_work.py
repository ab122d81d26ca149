"""Work that the processes of an accelerator share: what comes of it, and who did how much."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import torch
from many_concepts import ONE
from threads import using_threads
from tiny_erase import CLOSED, run
from tiny_models import WORDS, tiny_pipeline
from torch import Tensor, nn

from realera_fast import equations
from realera_fast.evaluation import verify
from realera_fast.mining import MiningConfig, read_known_words
from realera_fast.models import projections
from realera_fast.runtime import Processes
from realera_fast.text import TextModel, VocabularyConfig, encode_vocabulary

MANY = [f"{'abcdefgh'[i % 8]}{'ijklmnop'[i // 8]}=dog" for i in range(40)]
"""More concepts than the tiny text has features."""
PROMPTS = ("a photo of a cat", "a photo of a kitten", "a photo of a ship", "a tree")
SEEDS = (0, 1)


class _Counted:
    """A judge that counts what it is shown."""

    def __init__(self) -> None:
        self.pictures = 0

    def classify(self, pictures: Any) -> tuple[list[str], list[str]]:
        self.pictures += len(pictures)
        means = [f"{np.asarray(picture).mean():.3f}" for picture in pictures]
        return means, means


def _counter(module: nn.Module) -> list[int]:
    """How many rows a module reads, one entry a call."""
    counts: list[int] = []

    def count(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = given[0] if given else named["input_ids"]
        counts.append(len(first))

    module.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def _erased(pipe: Any, accelerator: Any) -> tuple[Tensor, int]:
    """The weights of a layer after many concepts, and of how many this process read the prompts."""
    config = dataclasses.replace(ONE, mining=MiningConfig(mode="none"))
    with mock.patch.object(equations, "add_named_word", wraps=equations.add_named_word) as added:
        erasure = run(pipe, MANY, config, accelerator=accelerator)
    edited = next(iter(projections(pipe.unet).values())).weight.detach().clone()
    erasure.restore_(pipe.unet)
    return edited, added.call_count


def shared_work(accelerator: Any = None) -> dict[str, Tensor]:
    """Reads words and draws pictures, with one thread, as the orders of sums depend on it.

    Returns:
        Rows of words, sums of the prior, pictures, what the judge saw, edited weights; and how much
        of it this process did.
    """
    processes = Processes(accelerator)
    pipe = tiny_pipeline()
    with using_threads(1):
        erasure = run(pipe, ["cat=ship"], CLOSED)
        erasure.restore_(pipe.unet)
        edited, concepts = _erased(pipe, accelerator)
        text = TextModel(pipe.text_encoder, pipe.tokenizer)
        # Words share what they begin with, so the encoder's own rows do not tell how many.
        with mock.patch.object(text, "last_rows", wraps=text.last_rows) as asked:
            known = read_known_words(
                text, torch.eye(text.width), cache=False, progress=False, processes=processes
            )
        words = sum(len(call.args[0]) for call in asked.call_args_list)
        read, drawn = _counter(pipe.text_encoder), _counter(pipe.vae.decoder)
        with mock.patch("realera_fast.text.vocabulary.prompts_at_a_time", lambda _: 4):
            prior = encode_vocabulary(
                text, VocabularyConfig(cache=False), words=WORDS, processes=processes
            )
        prompts = sum(read)
        judge = _Counted()
        found = verify(
            pipe,
            erasure,
            PROMPTS,
            seeds=SEEDS,
            steps=2,
            batch_size=1,
            judge=judge,
            progress=False,
            accelerator=accelerator,
        )
    pictures = [p for row in found.rows for side in (row.before, row.after) for p in side]
    seen = [float(s) for row in found.rows for s in (*row.seen_before, *row.seen_after)]
    return {
        "rows": known.read.rows,
        "gram": prior.gram,
        "pictures": torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])),
        "seen": torch.tensor(seen),
        "edited": edited,
        "amounts": torch.tensor([words, prompts, sum(drawn), judge.pictures, concepts]),
    }
