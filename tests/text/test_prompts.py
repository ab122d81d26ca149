"""Rows of a concept meet the right rows of its anchor."""

import pytest
import torch
from tiny_models import tiny_text_encoder, tiny_tokenizer

from realera_fast.text import Concept, ConceptPrompts, PairsConfig, TextModel, align, fill


@pytest.fixture(scope="module")
def text():
    return TextModel(tiny_text_encoder(), tiny_tokenizer())


def rows(text, prompt):
    return text.encode([prompt])[0]


def test_same_length_words_align_position_by_position(text):
    pairs = align(text, "cat", "dog", ["a photo of a {}"])
    assert pairs.prompts == ("a photo of a cat",)
    assert torch.equal(pairs.source[0], rows(text, "a photo of a cat"))
    assert torch.equal(pairs.destination[0], rows(text, "a photo of a dog"))
    assert torch.equal(pairs.anchor[0], rows(text, "a photo of a dog"))


def test_prefix_rows_already_agree(text):
    pairs = align(text, "cat", "dog", ["a photo of a {}"])
    assert torch.equal(pairs.source[0, :5], pairs.destination[0, :5])
    assert not torch.equal(pairs.source[0, 5:], pairs.destination[0, 5:])


def test_longer_target_repeats_the_last_anchor_token(text):
    pairs = align(text, "van gogh", "art", ["a picture by {}"])
    anchor = rows(text, "a picture by art")
    # <bos> a picture by van gogh <eos>: both tokens of the name meet "art" at position 4.
    assert torch.equal(pairs.destination[0, 4], anchor[4])
    assert torch.equal(pairs.destination[0, 5], anchor[4])
    assert torch.equal(pairs.destination[0, 6], anchor[5])  # end-of-text meets end-of-text
    assert torch.equal(pairs.destination[0, 7:76], anchor[6:75])  # padding, same distance


def test_words_after_the_concept_meet_themselves(text):
    pairs = align(text, "van gogh", "dog", ["{} in a tree"])
    anchor = rows(text, "dog in a tree")
    assert torch.equal(pairs.destination[0, 3:7], anchor[2:6])  # in a tree <eos>


def test_empty_anchor_is_the_prompt_without_the_concept(text):
    pairs = align(text, "cat", "", ["a photo of a {}"])
    anchor = rows(text, "a photo of a")
    assert pairs.anchor_prompts == ("a photo of a",)
    assert torch.equal(pairs.destination[0, 5], anchor[5])  # cat meets end-of-text
    assert torch.equal(pairs.destination[0, 6], anchor[5])  # so does end-of-text


def test_begin_of_text_has_no_weight_and_the_rest_sums_to_one(text):
    pairs = align(text, "cat", "dog", ["{}", "a {}"])
    assert torch.all(pairs.weight[:, 0] == 0)
    assert pairs.weight.sum().item() == pytest.approx(1.0, rel=1e-6)


def test_context_words_multiply_only_their_templates(text):
    config = PairsConfig(templates={"style": ("{}", "a {word} by {}")}, context_words=3)
    (pairs,) = ConceptPrompts(text, [Concept("van gogh", "art", "style")], {}, config)
    assert len(pairs.prompts) == 4
    assert len({p for p in pairs.prompts if p.endswith("by van gogh")}) == 3


def test_too_long_templates_are_left_out_and_a_too_long_word_is_an_error():
    text = TextModel(tiny_text_encoder(), tiny_tokenizer(length=6))
    pairs = align(text, "cat", "dog", ["{}", "a photo of the {}"])
    assert pairs.prompts == ("cat",)
    with pytest.raises(ValueError, match="'horse ship tree' would be cut"):
        align(text, "cat dog art of horse ship tree", "dog", ["{}"])


def test_templates_are_checked():
    with pytest.raises(ValueError, match="exactly one"):
        PairsConfig(templates={"object": ("a cat",)})
    with pytest.raises(ValueError, match="unknown kind"):
        PairsConfig(templates={"thing": ("{}",)})
    with pytest.raises(ValueError, match="non-empty tuple"):
        PairsConfig(templates={"object": "{}"})
    with pytest.raises(TypeError, match="templates must be a mapping"):
        PairsConfig(templates=["{}"])
    with pytest.raises(TypeError, match=r"templates\['object'\] must be a string, got int"):
        PairsConfig(templates={"object": [3]})
    with pytest.raises(ValueError, match=r"templates\['object'\]: .*U\+200B"):
        PairsConfig(templates={"object": ["a\u200b {}"]})


def test_fill_leaves_no_double_spaces():
    assert fill("a {} picture of a {word}", "", "dog") == "a picture of a dog"


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0])
def test_destinations_lie_past_the_anchor(text, guidance):
    plain = align(text, "cat", "dog", ["a photo of a {}"])
    past = align(text, "cat", "dog", ["a photo of a {}"], negative_guidance=guidance)
    wanted = plain.destination - guidance * (plain.source - plain.destination)
    torch.testing.assert_close(past.destination, wanted, rtol=1e-5, atol=1e-5)
    # The teacher of noise alignment is shown the anchor itself.
    assert torch.equal(past.anchor, plain.anchor) and torch.equal(past.source, plain.source)


def test_named_words_go_past_the_anchor_and_mined_ones_to_it(text):
    def prompts(guidance):
        concept = Concept("cat", synonyms=("bird",), anchor="dog")
        config = PairsConfig(negative_guidance=guidance)
        return list(ConceptPrompts(text, [concept], {"cat": ["horse"]}, config))

    for place, (none, some) in enumerate(zip(prompts(0.0), prompts(0.5), strict=True)):
        guidance = 0.5 if place < 2 else 0.0
        carries = none.weight > 0
        wanted = none.destination - guidance * (none.source - none.destination)
        torch.testing.assert_close(some.destination[carries], wanted[carries], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [-0.1, float("nan"), float("inf")])
def test_bad_guidance_is_refused(guidance):
    with pytest.raises(ValueError, match="negative_guidance"):
        PairsConfig(negative_guidance=guidance)


def test_templates_are_read_once():
    for several in (iter(["{}", "a {}"]), ["{}", "a {}"]):
        config = PairsConfig(templates={"object": several})
        assert config.of("object") == config.of("object") == ("{}", "a {}")
