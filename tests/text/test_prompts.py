"""Rows of a concept meet the right rows of its anchor."""

import pytest
import torch
from tiny_families import FAMILIES
from tiny_models import tiny_text_encoder, tiny_tokenizer

from realera_fast.models import components_of, text_streams
from realera_fast.text import (
    Concept,
    ConceptPrompts,
    PairsConfig,
    TextModel,
    align,
    concept_prompts,
    fill,
    read_text_rows,
)
from realera_fast.text.padding import shared_paddings


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
    words = ["tree", "ship", "horse", "dog"]
    concept = Concept("van gogh", "art", "style")
    (pairs,) = ConceptPrompts(text, [concept], {}, config, words=words)
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


def test_mined_words_stand_for_themselves(text):
    """Named words stand beside others, mined ones do not; both go to what was chosen for them."""
    concept = Concept("cat")
    words = ConceptPrompts(
        text,
        [concept],
        {"cat": ["kitten"]},
        PairsConfig(context_words=2),
        words=["tree", "ship", "horse"],
        anchors={"cat": ("dog",)},
    )
    named, mined = words
    assert {p for p in named.prompts if "next to" in p} == {
        "a cat next to a tree",
        "a cat next to a ship",
    }
    assert len(mined.prompts) == 7 and not any("next to" in p for p in mined.prompts)
    assert "a photo of a dog" in named.anchor_prompts and "a photo of a dog" in mined.anchor_prompts
    assert named.weight.sum() == pytest.approx(1.0) and mined.weight.sum() == pytest.approx(1.0)
    # They are encoded once.
    assert words[0] is named


def test_an_anchor_of_several_words_is_their_mean(text):
    config = PairsConfig(templates={"object": ["a photo of a {}"]})
    both = ConceptPrompts(text, [Concept("cat")], {}, config, anchors={"cat": ("dog", "ship")})
    rows = text.encode(["a photo of a dog", "a photo of a ship"]).mean(dim=0)
    torch.testing.assert_close(both[0].anchor[0], rows)


def moments(words):
    """Summed products of sources with themselves, and of ways with sources, of prompts."""
    gram, cross = 0.0, 0.0
    for word in words:
        x, y = word.source.double(), word.destination.double()
        weighted = word.weight.double()[..., None] * x
        gram = gram + torch.einsum("ptd,pte->de", weighted, x)
        cross = cross + torch.einsum("ptd,pte->de", weighted, y - x)
    return torch.stack((gram, cross))


def test_padding_that_is_left_out_is_made_up_for(text):
    """Over the words whatever is read to its end sums up to what all of it would."""
    templates, context = PairsConfig().of("object")[-1:], ["tree", "ship", "horse", "art"] * 4
    whole = align(text, "cat", "dog", templates, context=context)
    some = [
        align(text, "cat", "dog", templates, context=context, number=number) for number in range(8)
    ]
    for part in some:
        assert_read_in_part(text, part, whole)
        assert float(part.weight.sum()) == pytest.approx(1.0, rel=0.1)
    torch.testing.assert_close(
        moments(some) / 8, moments([whole]), rtol=1e-4, atol=1e-5 * float(whole.source.norm())
    )


def test_one_row_of_a_mined_words_padding_stands_for_all(text):
    templates = PairsConfig().of("object")[:-1]
    whole = align(text, "cat", "dog", templates)
    part = align(text, "cat", "dog", templates, number=3, mined=True)
    assert_read_in_part(text, part, whole)
    for row, end in enumerate(text.ends(part.prompts)):
        torch.testing.assert_close(part.weight[row, : end + 1], whole.weight[row, : end + 1])
        torch.testing.assert_close(part.weight[row, end + 1], whole.weight[row, end + 1 :].sum())
        assert not part.weight[row, end + 2 :].any()
        torch.testing.assert_close(
            part.destination[row, : end + 2], whole.destination[row, : end + 2]
        )


def test_mined_words_stand_in_some_of_the_templates_in_turns(text):
    words = ConceptPrompts(
        text, [Concept("cat", "dog")], {"cat": ("ship", "tree")}, PairsConfig(), whole=False
    )
    plain = len(PairsConfig().of("object")) - 1
    named, ship, tree = (word.prompts for word in words)
    assert len(named) >= plain > len(ship) == len(tree) > 1
    assert {p.replace("ship", "") for p in ship} != {p.replace("tree", "") for p in tree}


@pytest.mark.parametrize("room", [1 << 28, 0])
@pytest.mark.parametrize("others", [(), ("tree", "van", "gogh", "horse", "puppy", "sky", "moon")])
def test_a_word_is_measured_in_the_first_of_its_prompts(text, room, others, monkeypatch):
    monkeypatch.setattr(concept_prompts, "_KEPT_BYTES", room)
    named = [Concept("cat", "dog"), *(Concept(name, "dog") for name in others)]
    words = ConceptPrompts(text, named, {"cat": ("ship", "kitten")}, PairsConfig(), whole=False)
    whole = list(words)
    for number in (len(words) - 1, len(words) - 2, *range(words.named)):
        count = 3 if number < words.named else 1
        brief, full = words.brief(number), whole[number]
        assert brief.prompts == full.prompts[:count]
        assert brief.anchor_prompts == full.anchor_prompts[:count]
        # Of each prompt what carries text, and one row of padding: the same for every word.
        for row, end in enumerate(text.ends(brief.prompts)):
            kept = brief.weight[row] > 0
            assert kept.nonzero().flatten().tolist() == list(range(1, min(end + 2, len(kept))))
            for name in ("source", "destination"):
                seen = getattr(brief, name)[row][kept]
                torch.testing.assert_close(seen, getattr(full, name)[row][1 : len(seen) + 1])


def test_what_was_read_before_does_not_change_a_word(text):
    concepts = [Concept("cat", "dog"), Concept("ship", "dog")]
    mined = {"cat": ("kitten",), "ship": ("tree", "van")}

    def fresh(whole):
        return ConceptPrompts(text, concepts, mined, PairsConfig(), words=["sky"], whole=whole)

    for whole in (True, False):
        in_order = list(fresh(whole))
        backwards = fresh(whole)
        for number in reversed(range(len(backwards))):
            word = backwards[number]
            # Mined words are read with the next ones, where all are asked for in order.
            for name in ("source", "destination", "anchor") if whole else ("anchor",):
                assert torch.equal(getattr(word, name), getattr(in_order[number], name)), number


def assert_read_in_part(text, part, whole):
    assert (part.source == 0).all(dim=-1).any() and part.prompts == whole.prompts
    for row, end in enumerate(text.ends(part.prompts)):
        torch.testing.assert_close(part.source[row, : end + 2], whole.source[row, : end + 2])
    assert (part.weight[(part.source == 0).all(dim=-1)] == 0).all()


@pytest.mark.parametrize("count", [1, 3, 8, 10, 30])
def test_every_prompt_has_its_share_of_padding(count):
    shared = [shared_paddings(count, number) for number in range(8 * count)]
    assert [sum(part) / len(shared) for part in zip(*shared, strict=True)] == [1.0] * count


@pytest.mark.parametrize("family", ["sd1", "pixart_sigma", "sana"])
def test_no_prompts_have_no_rows(family):
    parts = components_of(FAMILIES[family]())
    (text,) = text_streams(parts.model, parts.text_encoders, parts.tokenizers)["sequence"]
    rows, carries = read_text_rows(text, [])
    assert len(rows) == len(carries) == 0 and text.ends([]) == []


def test_whoever_draws_from_prompts_reads_all_of_them(text):
    config = PairsConfig(context_words=2)
    for whole in (True, False):
        words = ConceptPrompts(
            text, [Concept("cat")], {"cat": ["kitten"]}, config, words=["tree"], whole=whole
        )
        read = (words[1].source != 0).any(dim=-1)
        assert bool(read.all()) == whole


@pytest.mark.parametrize("guidance", [-0.1, float("nan"), float("inf")])
def test_bad_guidance_is_refused(guidance):
    with pytest.raises(ValueError, match="negative_guidance"):
        PairsConfig(negative_guidance=guidance)


def test_templates_are_read_once():
    for several in (iter(["{}", "a {}"]), ["{}", "a {}"]):
        config = PairsConfig(templates={"object": several})
        assert config.of("object") == config.of("object") == ("{}", "a {}")
