"""Candidates of a concept: what a person would list, on CLIP's tokenizer and on small ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_vocabulary import clip_tokenizer
from tiny_models import tiny_tokenizer

from realera_fast.mining.candidates import Candidate, TokenSpace, related_words
from realera_fast.text import Concept, Lexicon, TokenWords, read_token_words

LISTS = json.loads(
    (Path(__file__).parent / "data" / "expected_candidates.json").read_text(encoding="utf-8")
)
CONCEPTS = LISTS["concepts"]
NAMED_MOST = 0.85
"""Share of what a person lists that relations name; the rest are words of the tokenizer alone."""


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.load()


@pytest.fixture(scope="module")
def clip(lexicon: Lexicon) -> TokenWords:
    return read_token_words(clip_tokenizer(), lexicon)


@pytest.fixture(scope="module")
def small(lexicon: Lexicon) -> TokenWords:
    words = ("cat", "cats", "kitty", "catering", "dog", "art", "artichoke", "catoftheday", "sword")
    return read_token_words(tiny_tokenizer(words), lexicon)


def all_candidates(concept: Concept, tokens: TokenWords, lexicon: Lexicon) -> tuple[Candidate, ...]:
    """What is related to a concept, then every word of the tokenizer: where all of it is read."""
    own = related_words(concept, tokens, lexicon)
    known = {candidate.word.casefold() for candidate in own}
    rest = (word for word in tokens.words if word.casefold() not in known)
    return (*own, *(Candidate(word, "token", "word") for word in rest))


def words_of(found: Sequence[Candidate], *relations: str) -> set[str]:
    return {c.word.casefold() for c in found if not relations or c.relation in relations}


@pytest.mark.parametrize("name", CONCEPTS)
def test_what_a_person_lists_is_among_them(name: str, clip: TokenWords, lexicon: Lexicon) -> None:
    concept = Concept(name, kind=CONCEPTS[name]["kind"])
    found = words_of(all_candidates(concept, clip, lexicon))
    assert not [word for word in CONCEPTS[name]["expected"] if word.casefold() not in found]
    assert not found & set(LISTS["endings"])


def test_most_of_it_is_named_by_a_relation(clip: TokenWords, lexicon: Lexicon) -> None:
    """Without those that are words of the tokenizer: what is left when only a few are encoded."""
    listed = named = 0
    for name, of_concept in CONCEPTS.items():
        found = words_of(related_words(Concept(name, kind=of_concept["kind"]), clip, lexicon))
        listed += len(of_concept["expected"])
        named += sum(word.casefold() in found for word in of_concept["expected"])
    assert len(CONCEPTS) == 40 and listed > 180
    assert named >= NAMED_MOST * listed


@pytest.mark.parametrize("name", LISTS["not_joined"])
def test_accidental_substrings_are_no_handles(
    name: str, clip: TokenWords, lexicon: Lexicon
) -> None:
    for kind in ("object", "person", "style", "explicit"):
        concept = Concept(name, kind=kind, anchor="thing")
        found = words_of(related_words(concept, clip, lexicon), "joined")
        assert not found & set(LISTS["not_joined"][name])


@pytest.mark.parametrize(
    ("name", "kind", "handles"),
    [
        ("Donald Trump", "person", {"realdonaldtrump", "trumptrain", "nevertrump"}),
        ("cat", "object", {"catsofinstagram", "catsoftwitter"}),
        ("Nike", "object", {"nikeplus"}),
        ("truck", "object", {"foodtruck"}),
        ("Barack Obama", "person", {"obamacare"}),
    ],
)
def test_handles(
    name: str, kind: str, handles: set[str], clip: TokenWords, lexicon: Lexicon
) -> None:
    assert handles <= words_of(related_words(Concept(name, kind=kind), clip, lexicon), "joined")


def test_common_last_names_and_first_names_stand_for_nobody(
    clip: TokenWords, lexicon: Lexicon
) -> None:
    west = related_words(Concept("Kanye West", kind="person"), clip, lexicon)
    assert not words_of(west, "joined")
    taylor = related_words(Concept("Taylor Swift", kind="person"), clip, lexicon)
    assert not [word for word in words_of(taylor, "joined") if "swift" not in word]


def test_sources(small: TokenWords, lexicon: Lexicon) -> None:
    found = {c.word: c for c in all_candidates(Concept("cat", synonyms=["kitty"]), small, lexicon)}
    assert found["cat"] == Candidate("cat", "user", "named")
    assert found["kitty"] == Candidate("kitty", "user", "named")
    assert found["cats"] == Candidate("cats", "inflection", "form")
    assert found["true cat"] == Candidate("true cat", "lexicon", "synonym")
    assert found["Siamese cat"] == Candidate("Siamese cat", "lexicon", "hyponym")
    assert found["catoftheday"] == Candidate("catoftheday", "token", "joined")
    assert found["catering"] == Candidate("catering", "token", "word")
    assert found["dog"] == Candidate("dog", "token", "word")


def test_what_a_name_seldom_means_is_no_kind_of_it(clip: TokenWords, lexicon: Lexicon) -> None:
    """Only the model says whether it knows that meaning."""
    car = {c.word: c for c in related_words(Concept("automobile"), clip, lexicon)}
    assert car["bus"] == Candidate("bus", "token", "homonym")
    assert car["taxi"].relation == "hyponym"
    wizard = related_words(Concept("wizard"), clip, lexicon)
    assert "sorcerer" in words_of(wizard, "homonym")


def test_each_word_comes_once_and_the_nearest_relation_first(
    small: TokenWords, lexicon: Lexicon
) -> None:
    found = all_candidates(Concept("sword"), small, lexicon)
    assert len(words_of(found)) == len(found)
    relations = list(dict.fromkeys(c.relation for c in found))
    assert relations[:3] == ["named", "form", "synonym"] and relations[-1] == "word"


@pytest.mark.parametrize(
    ("name", "kind", "wanted", "unwanted"),
    [
        # A brand that is a fruit: the lexicon knows the fruit alone; who wants the brand says so.
        ("apple", "object", {"apples", "apple's", "crab apple"}, {"pineapple", "grapple"}),
        ("Prince", "person", {"prince's"}, {"crown prince", "archduke"}),
        ("prince", "person", {"princes", "crown prince"}, {"princeton"}),
        ("Rose", "person", {"rose's"}, {"rosebush", "tea rose"}),
        ("rose", "object", {"roses", "tea rose"}, {"prose", "arose", "primrose"}),
        ("art", "style", {"arts", "streetart", "fine art"}, {"artichoke", "artis", "party"}),
        ("cats", "object", {"cat", "kitty", "catsoftwitter"}, set()),
        ("CATS", "object", {"cat", "cats'", "kitty"}, {"cats's"}),
        ("Beyoncé", "person", {"beyonce", "beyoncé's"}, set()),
        ("Salvador Dalí", "style", {"salvador dali", "dali", "salvadordali"}, set()),
        ("café", "object", {"cafe", "coffeehouse"}, set()),
        ("Spider-Man", "object", {"spiderman", "spider man", "spider-man's"}, set()),
        ("jack-o'-lantern", "object", {"jackolantern", "jack-o'-lanterns"}, set()),
        ("McDonald\N{RIGHT SINGLE QUOTATION MARK}s", "object", {"mcdonalds", "mcdonald"}, set()),
        ("O'Brien", "person", {"obrien", "o'brien's"}, set()),
        ("50 Cent", "person", {"50cent", "50 cent's"}, {"50"}),
        ("R2-D2", "object", {"r2d2", "r2 d2"}, set()),
        ("nude", "explicit", {"naked", "nudes", "bare"}, {"nakeds", "bares"}),
    ],
)
def test_hostile_words(
    name: str, kind: str, wanted: set[str], unwanted: set[str], clip: TokenWords, lexicon: Lexicon
) -> None:
    related = related_words(Concept(name, kind=kind, anchor="thing"), clip, lexicon)
    found = words_of(tuple(c for c in related if c.relation != "sibling"))
    assert wanted <= found and not unwanted & found


@pytest.mark.parametrize(
    "name", ["猫", "東京タワー", "🐱", "Москва", "'", "-", "C++", "हाथी", "x" * 300]
)
def test_what_the_lexicon_cannot_know_is_itself_alone_or_its_forms(
    name: str, clip: TokenWords, lexicon: Lexicon
) -> None:
    found = related_words(Concept(name), clip, lexicon)
    assert found[0] == Candidate(name, "user", "named")
    assert {c.relation for c in found} <= {"named", "form", "spelling"}
    assert all(c.word.strip() for c in found)


def test_a_name_of_twelve_words(clip: TokenWords, lexicon: Lexicon) -> None:
    name = "Pablo Diego José Francisco de Paula Juan Nepomuceno María Remedios Ruiz Picasso"
    found = related_words(Concept(name, kind="style"), clip, lexicon)
    words = words_of(found)
    assert {f"{name}'s".casefold(), "picasso", "pablo"} <= words
    assert "de" not in words and not words_of(found, "joined", "hyponym")
    assert len(found) < 20


def test_a_category_has_no_more_than_a_few_hundred(clip: TokenWords, lexicon: Lexicon) -> None:
    assert len(related_words(Concept("animal"), clip, lexicon)) < 800


def test_a_hundred_concepts_take_seconds(clip: TokenWords, lexicon: Lexicon) -> None:
    before = time.process_time()
    for name in (*CONCEPTS, *list(clip.words)[1000:1060]):
        related_words(Concept(name, kind="object"), clip, lexicon)
    assert time.process_time() - before < 5


# Nearness


def ids_by(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)


def test_near_tokens_stay_and_far_ones_go(
    lexicon: Lexicon, small: TokenWords, device: torch.device
) -> None:
    tokenizer = tiny_tokenizer(("cat", "cats", "kitty", "catering", "dog", "art", "sword"))
    tokens = read_token_words(tokenizer, lexicon)
    table = torch.randn(len(tokenizer), 16)
    number = dict(zip(tokens.words, tokens.ids, strict=True))
    table[number["dog"]] = table[number["cat"]] + 0.01
    space = TokenSpace(tokens, ids_by(tokenizer), table.to(device))
    kept = len(
        [
            c
            for c in related_words(Concept("cat"), tokens, lexicon)
            if c.relation in ("named", "form", "spelling", "synonym")
        ]
    )
    found = space.nearest(Concept("cat"), lexicon, most=kept + 1)
    assert found[:2] == (Candidate("cat", "user", "named"), Candidate("cats", "inflection", "form"))
    assert Candidate("true cat", "lexicon", "synonym") in found
    assert found[-1] == Candidate("dog", "token", "word") and len(found) == kept + 1


def test_what_must_stay_stays_however_few_may(lexicon: Lexicon, small: TokenWords) -> None:
    tokenizer = tiny_tokenizer(("cat", "dog"))
    tokens = read_token_words(tokenizer, lexicon)
    space = TokenSpace(tokens, ids_by(tokenizer), torch.randn(len(tokenizer), 8))
    found = space.nearest(Concept("cat"), lexicon, most=0)
    assert {c.relation for c in found} == {"named", "form", "synonym"}


def test_kinds_that_are_tokens_come_before_those_that_are_not(lexicon: Lexicon) -> None:
    """However far they lie, until they fill half of the room."""
    tokenizer = tiny_tokenizer(("cat", "tabby", "dog", "sword", "kitty"))
    tokens = read_token_words(tokenizer, lexicon)
    space = TokenSpace(tokens, ids_by(tokenizer), torch.randn(len(tokenizer), 8))
    kept = len(space.nearest(Concept("cat"), lexicon, most=0))
    found = space.nearest(Concept("cat"), lexicon, most=kept + 6)[kept:]
    assert {c.word for c in found[:2]} == {"tabby", "kitty"}
    assert [c.relation for c in found[:3]] == ["hyponym"] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_directions(lexicon: Lexicon, dtype: torch.dtype) -> None:
    tokenizer = tiny_tokenizer(("cat", "dog", "sword"))
    tokens = read_token_words(tokenizer, lexicon)
    table = torch.randn(len(tokenizer), 8).to(dtype).requires_grad_()
    space = TokenSpace(tokens, ids_by(tokenizer), table)
    found = space.directions(["cat", "cat dog", ""])
    assert found.dtype == torch.float32 and not found.requires_grad
    cat, dog, sword = table[list(tokens.ids)].detach().float()
    mean = (cat + dog + sword) / 3
    expected = torch.nn.functional.normalize(torch.stack([cat, (cat + dog) / 2]) - mean, dim=-1)
    torch.testing.assert_close(found[:2], expected)
    assert found[2].eq(0).all()


def test_a_tokenizer_without_words(lexicon: Lexicon) -> None:
    tokens = TokenWords((), (), (), 0.0, False)
    tokenizer = tiny_tokenizer(("cat",))
    space = TokenSpace(tokens, ids_by(tokenizer), torch.randn(len(tokenizer), 8))
    assert "kitty" in words_of(space.nearest(Concept("cat"), lexicon))


def test_embeddings_of_another_encoder_are_refused(lexicon: Lexicon, small: TokenWords) -> None:
    for table in (torch.randn(3, 8), torch.randn(5000)):
        with pytest.raises(ValueError, match="embeddings: expected"):
            TokenSpace(small, lambda text: [], table)


def test_clips_words_are_compared_in_seconds(clip: TokenWords, lexicon: Lexicon) -> None:
    tokenizer = clip_tokenizer()
    table = torch.randn(len(tokenizer), 64)
    before = time.process_time()
    space = TokenSpace(clip, ids_by(tokenizer), table)
    found = space.nearest(Concept("cat"), lexicon)
    assert len(found) == 300
    assert time.process_time() - before < 3
