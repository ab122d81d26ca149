"""Prompts that begin alike are read together, and are what they are alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES
from tiny_models import tiny_text_encoder, tiny_tokenizer

from realera_fast.models import components_of, text_streams
from realera_fast.text import TextModel
from realera_fast.text.packing import Pack, packs_of
from realera_fast.text.padding import read_rows

PROMPTS = [
    template.format(word)
    for template in ("a photo of a {}", "a painting of {}", "{}")
    for word in ("cat", "kitten", "ship", "van gogh", "tree")
]


def seen_by(pack: Pack, number: int) -> list[int]:
    return [pack.tokens[place] for place in pack.paths[number]]


@pytest.mark.parametrize("longest", [6, 9, 40])
def test_every_prompt_is_whole_in_one_pack(longest: int) -> None:
    prompts = [p for n in range(1, 5) for p in itertools.product((7, 8, 9), repeat=n)]
    prompts += [(1, 2, 3, 4, 5, 6), (7, 8), (1, 2, 3, 4, 5, 6)]
    packs = packs_of(prompts, longest)
    assert all(len(pack.tokens) <= longest for pack in packs)
    assert sorted(n for pack in packs for n in pack.paths) == list(range(len(prompts)))
    for pack in packs:
        for number, path in pack.paths.items():
            assert seen_by(pack, number) == list(prompts[number])
            assert [pack.depths[place] for place in path] == list(range(len(path)))
            assert [pack.parents[place] for place in path[1:]] == path[:-1]
    assert sum(len(pack.tokens) for pack in packs) < sum(map(len, prompts))
    assert packs_of([], longest) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("output", ["last", "penultimate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_prompts_alone(attention: str, output: Any, dtype: torch.dtype) -> None:
    encoder = tiny_text_encoder(dtype=dtype)
    encoder.set_attn_implementation(attention)
    text = TextModel(encoder, tiny_tokenizer(), output=output)
    counts = [end + 2 for end in text.ends(PROMPTS)]
    counts[3] = text.max_tokens
    rows, last = text.first_rows(PROMPTS, counts), text.last_rows(PROMPTS)
    assert text._reader._packs
    whole = text.encode(PROMPTS)
    expected = torch.cat([part[:count] for part, count in zip(whole, counts, strict=True)])
    near = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(rows, expected, atol=near, rtol=near)
    ends = torch.tensor(text.ends(PROMPTS))
    torch.testing.assert_close(last, whole[torch.arange(len(whole)), ends], atol=near, rtol=near)


@pytest.mark.parametrize("fault", ["raises", "sees everything", "sees the last", "no places"])
@pytest.mark.parametrize("output", ["last", "penultimate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_that_takes_no_packs_reads_prompts_one_by_one(
    fault: str, output: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_text_encoder(dtype=dtype)
    text = TextModel(encoder, tiny_tokenizer(), output=output)
    expected = TextModel(encoder, tiny_tokenizer(), output=output).encode(PROMPTS)
    forward = type(encoder).forward

    def faulty(self: Any, ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        if "position_ids" in options:
            if fault == "raises":
                raise TypeError("no masks of four dimensions")
            if fault == "sees everything":
                attention_mask = torch.zeros_like(attention_mask)
            elif fault == "sees the last":
                # The causal mask of one prompt.
                attention_mask = torch.full_like(attention_mask, -1e9).triu(1)
            else:
                del options["position_ids"]
        return forward(self, ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(type(encoder), "forward", faulty)
    counts = [end + 1 for end in text.ends(PROMPTS)]
    rows = text.first_rows(PROMPTS, counts)
    assert text._reader._packs is False
    whole = torch.cat([part[:count] for part, count in zip(expected, counts, strict=True)])
    near = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(rows, whole, atol=near, rtol=near)


def test_it_is_decided_on_prompts_that_part(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TextModel(tiny_text_encoder(), tiny_tokenizer())
    for prompts in (["a cat"], ["a cat", "a cat"]):
        text.first_rows(prompts, [2] * len(prompts))
        assert text._reader._packs is None
    one = text.last_rows(["a cat"])
    text.last_rows(PROMPTS)
    assert text._reader._packs and torch.equal(text.last_rows(["a cat"]), one)
    flash = tiny_text_encoder()
    flash.config._attn_implementation = "flash_attention_2"
    assert TextModel(flash, tiny_tokenizer())._reader._packs is False


def test_what_goes_wrong_in_the_encoder_itself_is_said() -> None:
    encoder = tiny_text_encoder()
    text = TextModel(encoder, tiny_tokenizer())
    encoder.forward = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(ValueError, match="broken"):
        text.first_rows(PROMPTS, [2] * len(PROMPTS))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_pooled_vectors_are_read_without_padding(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = components_of(FAMILIES[family]())
    texts = text_streams(parts.model, parts.text_encoders, parts.tokenizers)["pooled"]
    whole = texts[0].encode(PROMPTS)
    monkeypatch.setattr(type(texts[0]), "encode_visible", None)
    for paddings in (None, [0.0] * len(PROMPTS), [1.0] * len(PROMPTS)):
        torch.testing.assert_close(read_rows(texts[0], PROMPTS, paddings), whole)
