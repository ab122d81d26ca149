"""Vectors in place of tokens: the word's own give the prompt's own embedding, with gradients."""

import pytest
import torch
from tiny_families import sdxl
from tiny_models import tiny_pipeline

from realera_fast.text import FreePrompts, JoinedText, TextModel, TextWithPooled


def of_one():
    pipe = tiny_pipeline()
    return TextModel(pipe.text_encoder, pipe.tokenizer)


def of_two():
    pipe = sdxl()
    pairs = [(pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)]
    sequence = JoinedText([TextModel(*pair, output="penultimate") for pair in pairs])
    return TextWithPooled(sequence, TextModel(*pairs[1], output="pooled"))


@pytest.mark.parametrize("text", [of_one, of_two])
@pytest.mark.parametrize("template", ["a photo of a {}", "{}", "the {} on a table"])
def test_the_words_own_vectors_are_the_prompt(text, template):
    text = text()
    prompts = FreePrompts.of(text, template, "cat dog", 3)
    assert len(prompts) == 3
    with torch.no_grad():
        found = text.encode_free(prompts)
    expected = text.encode([prompts.prompt])
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-6)


def test_an_encoder_that_is_read_twice_has_its_vectors_once():
    text = of_two()
    assert len(text.models) == 3
    assert len(FreePrompts.of(text, "a {}", "cat", 2).vectors) == 2


@pytest.mark.parametrize("text", [of_one, of_two])
def test_the_gradient_is_that_of_finite_differences(text):
    text = text()
    prompts = FreePrompts.of(text, "a photo of a {}", "cat dog", 2)
    generator = torch.Generator().manual_seed(3)
    vectors = [v.clone().requires_grad_() for v in prompts.vectors.values()]
    ways = [torch.randn(v.shape, generator=generator) for v in vectors]
    seen = torch.randn(text.encode(["a"]).shape, generator=generator)

    def value(step: float) -> torch.Tensor:
        moved = [v.detach() + step * w for v, w in zip(vectors, ways, strict=True)]
        return (text.encode_free(prompts.with_vectors(moved)) * seen).sum()

    total = (text.encode_free(prompts.with_vectors(vectors)) * seen).sum()
    slopes = torch.autograd.grad(total, vectors)
    found = sum((s * w).sum() for s, w in zip(slopes, ways, strict=True))
    with torch.no_grad():
        expected = (value(1e-2) - value(-1e-2)) / 2e-2
    assert expected.abs() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


def test_the_encoder_is_as_it_was():
    text = of_one()
    before = text.encode(["a cat"])
    prompts = FreePrompts.of(text, "a {}", "cat", 1)
    with torch.no_grad():
        other = text.encode_free(prompts.with_vectors([next(iter(prompts.vectors.values())) + 1.0]))
    assert not torch.equal(other, before)
    assert torch.equal(text.encode(["a cat"]), before)
