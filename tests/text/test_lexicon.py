"""The lexicon: what its file holds, how words are found in it, what is related to them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import ModuleType

import pytest

from realera_fast.text import Lexicon, lexicon_file, run_together

ROOT = Path(__file__).parents[2]
FILE = ROOT / "realera_fast" / "text" / "lexicon.bin"
LICENSE = ROOT / "realera_fast" / "text" / "lexicon.LICENSE"
WORDNET = Path("/usr/share/wordnet")
MOST_BYTES = 3_000_000
MOST_SECONDS = 0.3


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.load()


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "build_lexicon", ROOT / "tools" / "build_lexicon.py"
    )
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.skipif(
    not (WORDNET / "data.noun").is_file(),
    reason="needs WordNet's files: apt install wordnet-base",
)
def test_the_file_is_what_wordnet_says() -> None:
    """What it holds, not its compression, which another zlib may do otherwise."""
    tool = builder()
    data = tool.payload(WORDNET)
    assert data == zlib.decompress(FILE.read_bytes())
    assert tool.license(WORDNET) == LICENSE.read_text(encoding="ascii")
    assert tool.compressed(data) == tool.compressed(bytes(data))


def test_the_file_is_small_and_has_its_license_beside_it() -> None:
    assert FILE.stat().st_size + LICENSE.stat().st_size < MOST_BYTES
    notice = LICENSE.read_text(encoding="ascii")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice
    page = (ROOT / "docs" / "reference" / "text.md").read_text(encoding="utf-8")
    assert notice.strip() in page


def test_loading_takes_no_torch_and_little_time(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from realera_fast.text import Lexicon\n"
        "before = time.process_time()\n"
        "lexicon = Lexicon.load()\n"
        "lexicon.synonyms('cat'), lexicon.hyponyms('cat'), lexicon.siblings('cat')\n"
        "print(time.process_time() - before, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    least = float("inf")
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        seconds, *loaded = result.stdout.split()
        assert loaded == ["False", "False"]
        least = min(least, float(seconds))
    assert least < MOST_SECONDS


def test_it_is_read_once(lexicon: Lexicon) -> None:
    before = time.process_time()
    assert Lexicon.load() is lexicon
    assert time.process_time() - before < 0.01


def test_a_file_of_another_format_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "lexicon.bin"
    other.write_bytes(zlib.compress(b'{"format":2,"columns":[]}\n'))
    monkeypatch.setattr(lexicon_file, "_FILE", other)
    with pytest.raises(RuntimeError, match="lexicon.bin: expected format 1, got 2"):
        Lexicon.load.__wrapped__(Lexicon)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("van Gogh", "vangogh"),
        ("T-shirt", "tshirt"),
        ("jack-o'-lantern", "jackolantern"),
        ("Dalí", "dali"),
        ("Dali\N{COMBINING ACUTE ACCENT}", "dali"),
        ("McDonald\N{RIGHT SINGLE QUOTATION MARK}s", "mcdonalds"),
        ("ＣＡＴ", "cat"),
        ("猫", "猫"),
        ("が", "が"),
        ("か", "か"),
        ("🐱", "🐱"),
        ("C++", "c++"),
        ("--", ""),
    ],
)
def test_run_together(text: str, key: str) -> None:
    assert run_together(text) == key


@pytest.mark.parametrize(
    "word",
    ["cat", "Cat", "CATS", "knives", "van gogh", "VanGogh", "Van-Gogh", "Dalí", "running", "nicer"]
    + ["sports car", "sports cars", "t-shirt", "fire engine", "quickly", "went", "cat's", "geese"],
)
def test_words_are_known_however_they_are_written(lexicon: Lexicon, word: str) -> None:
    assert lexicon.knows(word)


@pytest.mark.parametrize("word", ["tion", "ments", "猫", "🐱", "", "-", "banksy", "a" * 500])
def test_what_is_no_english_word_is_not_known(lexicon: Lexicon, word: str) -> None:
    assert not lexicon.knows(word)
    assert lexicon.synonyms(word) == lexicon.hyponyms(word) == lexicon.siblings(word) == ()
    assert lexicon.kinds(word) == () and lexicon.uses(word) == 0


def test_every_word_is_found(lexicon: Lexicon) -> None:
    assert len(lexicon.words) > 140_000
    for place in range(0, len(lexicon.words), 97):
        assert place in lexicon.entries(lexicon.words[place])


def test_synonyms(lexicon: Lexicon) -> None:
    assert set(lexicon.synonyms("car")) == {"auto", "automobile", "machine", "motorcar"}
    assert lexicon.synonyms("cars")[:1] == ("car",)
    assert set(lexicon.synonyms("Vincent van Gogh", "style")) == {"van Gogh", "Gogh"}
    assert "Norma Jean Baker" in lexicon.synonyms("Marilyn Monroe", "person")


def test_rare_meanings_are_not_meant(lexicon: Lexicon) -> None:
    """A cat is no gossip and no whip, a rake no blood; a bike is two things, a hot dog food."""
    assert lexicon.synonyms("cat") == ("true cat",)
    assert "rake" not in lexicon.synonyms("blood", "explicit")
    assert {"motorcycle", "bicycle"} <= set(lexicon.synonyms("bike"))
    assert "frankfurter" in lexicon.synonyms("hot dog")
    # What is drawn though nobody met it.
    assert "pixie" in lexicon.hyponyms("fairy") and "fag" not in lexicon.synonyms("fairy")
    assert "ogress" in lexicon.hyponyms("ogre")


def test_a_kind_chooses_the_meaning(lexicon: Lexicon) -> None:
    assert lexicon.synonyms("trump", "person") == ()
    assert "Abraham Lincoln" in lexicon.synonyms("Lincoln", "person")
    assert {"nude", "naked", "nakedness"} <= set(lexicon.synonyms("nudity", "explicit"))


def test_another_meaning_of_a_word_is_told_apart(lexicon: Lexicon) -> None:
    assert "sorcerer" in lexicon.homonyms("wizard") and "sorcerer" not in lexicon.synonyms("wizard")
    assert lexicon.homonyms("hatchback") == ()
    usual, seldom = (lexicon.hyponyms("automobile", usual=usual) for usual in (True, False))
    # WordNet has a bus that is an old car; a person who says bus means another thing.
    assert "bus" in seldom and {"race car", "taxi", "hatchback"} <= set(usual)
    assert not {*usual} & {*seldom}
    assert "swallow" in lexicon.hyponyms("bird", usual=False)
    # No meaning of "cob" is usual, so that each may be meant.
    assert "cob" in lexicon.hyponyms("swan")


def test_hyponyms(lexicon: Lexicon) -> None:
    near = lexicon.hyponyms("cat", 1)
    assert {"domestic cat", "house cat", "wildcat"} <= set(near) and "tabby" not in near
    assert {"tabby", "kitty", "Siamese cat"} <= set(lexicon.hyponyms("cat"))
    assert len(lexicon.hyponyms("animal", 3, most=50)) == 50
    assert {"Picasso", "Monet"} <= set(lexicon.hyponyms("painter", kind="person"))


def test_siblings_are_relatives_and_nothing_of_ones_own(lexicon: Lexicon) -> None:
    car = set(lexicon.siblings("car"))
    assert {"truck", "motorcycle"} <= car
    own = {*lexicon.synonyms("car"), *lexicon.hyponyms("car", 16), *lexicon.hypernyms("car")}
    assert not own & car
    assert {"dog", "fox", "bear"} <= set(lexicon.siblings("cat", 2))
    assert "Picasso" in lexicon.siblings("van Gogh", kind="style")[:2]
    assert "watercolorist" not in lexicon.siblings("van Gogh", kind="style")


def test_hypernyms(lexicon: Lexicon) -> None:
    assert lexicon.hypernyms("cat") == ("feline", "felid")
    assert lexicon.hypernyms("van Gogh", kind="style") == ("painter",)


@pytest.mark.parametrize(
    ("word", "forms"),
    [
        ("cat", ("cats", "cat's")),
        ("cats", ("cat", "cats'")),
        ("knife", ("knives", "knife's")),
        ("knives", ("knife", "knives'")),
        ("box", ("boxes", "box's")),
        ("pony", ("ponies", "pony's")),
        ("toy", ("toys", "toy's")),
        ("sports car", ("sports cars", "sports car's")),
        ("T-shirt", ("T-shirts", "T-shirt's")),
        ("glass", ("glasses", "glass's")),
        ("Kennedy", ("Kennedies", "Kennedys", "Kennedy's")),
        ("McDonald's", ("McDonald",)),
        ("Elon Musk", ("Elon Musks", "Elon Musk's")),
        ("猫", ()),
        ("🐱", ()),
        ("", ()),
        ("R2-D2", ()),
    ],
)
def test_inflections(lexicon: Lexicon, word: str, forms: tuple[str, ...]) -> None:
    assert lexicon.inflections(word) == forms


def test_kinds(lexicon: Lexicon) -> None:
    assert lexicon.kinds("dog")[0] == "animal"
    assert lexicon.kinds("van Gogh") == ("person",)
    assert lexicon.kinds("gun")[0] == "artifact"
    assert "adjective" in lexicon.kinds("nude")
    assert lexicon.is_physical("cat") and lexicon.is_physical("van Gogh")
    assert not lexicon.is_physical("freedom") and not lexicon.is_physical("xyzzy")


def test_uses_count_every_part_of_speech(lexicon: Lexicon) -> None:
    assert lexicon.uses("go") > 500 > lexicon.uses("cat") > 0
