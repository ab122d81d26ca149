"""Concepts from files, which are not trusted."""

from __future__ import annotations

import json
import random
import time

import pytest
import yaml

from realera_fast.text import Concept, ConceptFileError, parse_concepts, read_concepts

EXPECTED = (
    Concept("cat", "dog", synonyms=("kitten", "tabby cat")),
    Concept("Van Gogh", None, "style"),
    Concept("ship", ""),
)
FILES = {
    "a.csv": "target,anchor,kind,synonyms\ncat,dog,,kitten | tabby cat\n\n"
    "Van Gogh,,style,\nship,-,object,\n",
    "a.tsv": "kind\ttarget\tsynonyms\tanchor\n\tcat\tkitten|tabby cat\tdog\n"
    "style\tVan Gogh\n\tship\t\t-\n",
    "a.json": json.dumps([c.to_dict() for c in EXPECTED], indent=1),
    "a.jsonl": "\n".join(json.dumps(c.to_dict()) for c in EXPECTED) + "\n\n",
    "a.yaml": yaml.safe_dump([c.to_dict() for c in EXPECTED]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same(tmp_path, name):
    path = tmp_path / name
    for start in ("", "\ufeff"):
        path.write_text(start + FILES[name], encoding="utf-8")
        assert read_concepts(path) == EXPECTED


def test_lines_and_strings_are_the_shorthand(tmp_path):
    (tmp_path / "a.txt").write_text("# animals\n\ncat=dog\n  Van Gogh=art  \n")
    expected = parse_concepts(["cat=dog", "Van Gogh=art"])
    assert read_concepts(tmp_path / "a.txt") == expected
    (tmp_path / "a.json").write_text('["cat=dog", "Van Gogh=art"]')
    assert read_concepts(tmp_path / "a.json") == expected
    (tmp_path / "a.yml").write_text("- cat=dog\n- Van Gogh=art\n")
    assert read_concepts(tmp_path / "a.yml") == expected
    assert read_concepts(tmp_path / "a.txt", kind="style")[0].kind == "style"


def test_yaml_words_stay_words(tmp_path):
    (tmp_path / "a.yaml").write_text("- no\n- 1984\n- {target: on, anchor: 'yes'}\n")
    assert [c.target for c in read_concepts(tmp_path / "a.yaml")] == ["no", "1984", "on"]


BAD = [
    ("a.csv", "target,anchor\ncat,cat\n", "line 2: .*equals its anchor"),
    ("a.csv", "target\ncat\ndog\n cat\n", r"line 4: 'cat' is named in line 2 already"),
    ("a.csv", "name\ncat\n", "line 1: expected a first line that names the columns"),
    ("a.csv", "target,colour\ncat,red\n", "line 1: .*'colour'"),
    ("a.csv", "target\ncat,dog\n", "line 2: has 2 cells for 1 columns"),
    ("a.csv", 'target\n"cat\ndog\n', "line 2: is not a row of this table"),
    ("a.csv", "target,kind\ncat,beast\n", "line 2: .*kind must be one of"),
    ("a.csv", "target,anchor\nship,cat\ncat,dog\n", "line 2: its anchor 'cat' is erased in line 3"),
    ("a.csv", "target\n", "holds no concept"),
    ("a.csv", 'target\n"a\nb"\n,\n\ncat,x,y\n', "line 6: has 3 cells"),
    ("a.json", '[\n"cat",\n{"target": 5}\n]', "line 3: expected strings, got 5"),
    ("a.json", '[\n"cat",\n{"target": "a", "colour": 1}\n]', "line 3: unknown field 'colour'"),
    ("a.json", '[\n"cat",\n\n[1]\n]', "line 4: expected a string or an object"),
    ("a.json", '["cat"\n"dog"]', "line 2: expected a comma"),
    ("a.json", '["cat",\n nope]', "line 2: is not JSON"),
    ("a.json", '{"target": "cat"}', r"line 1: expected a list"),
    ("a.json", "[" * 100_000, "line 1: is not JSON"),
    ("a.json", '["cat"] x', "line 1: expected a comma or the end"),
    ("a.json", '["cat\\u0000"]', r"line 1: .*U\+0000"),
    ("a.txt", "dog\nc\0at\n", "line 2: holds a NUL"),
    ("a.txt", "dog\nc\u200bat\n", r"line 2: .*U\+200B ZERO WIDTH SPACE, at position 2"),
    ("a.json", '["dog",\n"\\ud83d"]', "line 2: .*not valid text"),
    ("a.json", '["dog",\n{"target": "a", "target": "b"}]', "line 2: names the field 'target' tw"),
    ("a.json", '["dog",\n{"target": NaN}]', "line 2: holds NaN"),
    ("a.json", '["dog",\n-Infinity]', "line 2: holds -Infinity"),
    ("a.jsonl", '"dog"\n{"target": "a", "target": "b"}', "line 2: names the field 'target' tw"),
    ("a.jsonl", '"dog"\n{"target": "a", "anchor": NaN}', "line 2: holds NaN"),
    ("a.yaml", "- dog\n- target: a\n  target: b\n", "line 2: has a field without a name, or one"),
    ("a.yaml", "- a\u2028b\n- \x85c\n- {x: 1}\n", "line 3: unknown field"),
    ("a.yaml", "- a\n- b\n- 'c\x07'\n", "line 3: is not YAML"),
    ("a.json", '["a",\r\n\r"b", 1]', "line 3: expected a string or an object"),
    ("a.csv", "target\rcat\r\rdog,x\r", "line 4: has 2 cells"),
    ("a.txt", "cat\r=dog\r\n", "line 2: .*target is empty"),
    ("a.jsonl", '"cat"\n{"target": "", "anchor": null}\n', "line 2: .*target is empty"),
    ("a.jsonl", '"cat"\n{\n', "line 2: is not JSON"),
    ("a.jsonl", '{"target": "cat", "synonyms": "kitten"}', "line 1: synonyms: expected a list"),
    ("a.yaml", "- cat\n- target: dog\n  synonyms: [a, [b]]\n", "line 2: expected strings"),
    ("a.yaml", "cat: 1\n", "line 1: expected a list"),
    ("a.yaml", "- cat\n- [dog\n", "line 3: is not YAML"),
    ("a.yaml", "- !!python/object/apply:os.system [ls]\n", "line 1: expected a string or an obj"),
    ("a.yaml", "- {a: &a [x], b: &b [*a, *a], c: [*b, *b]}\n", "line 1: unknown field 'a'"),
    ("a.txt", "cat\n=dog\n", "line 2: .*target is empty"),
    ("a.txt", "", "holds no concept"),
    ("a.doc", "cat", "expected a file that ends in"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_entries_are_reported_with_their_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text.encode())
    with pytest.raises(ConceptFileError, match=message) as caught:
        read_concepts(path)
    assert str(path) in str(caught.value)


def test_all_bad_entries_are_reported_at_once(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("target,anchor\n" + "".join(f"w{i},w{i}\n" for i in range(14)))
    with pytest.raises(ConceptFileError) as caught:
        read_concepts(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and "line 11: " in lines[9] and lines[10] == "and 4 more bad entries"


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_concepts(tmp_path / "a.csv")
    path = tmp_path / "a.txt"
    path.write_bytes(b"cat\ndog\nsh\xffip\n")
    with pytest.raises(ConceptFileError, match="line 3: is not UTF-8"):
        read_concepts(path)
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes("cat\ndog\n".encode(encoding))
        with pytest.raises(ConceptFileError, match="UTF-16 or UTF-32, not UTF-8; save it as UTF-8"):
            read_concepts(path)
    path.write_bytes("cat\ndog\n".encode("utf-16-le"))
    with pytest.raises(ConceptFileError, match="line 1: holds a NUL character, as UTF-16 does"):
        read_concepts(path)
    monkeypatch.setattr("realera_fast.text.concept_file._MAX_BYTES", 3)
    with pytest.raises(ConceptFileError, match="at most 3 are read"):
        read_concepts(path)


@pytest.mark.parametrize("suffix", ["csv", "json", "yaml", "txt", "jsonl"])
def test_ten_thousand_entries(tmp_path, suffix):
    entries = [
        {"target": f"thing {i}", "anchor": "dog", "synonyms": [f"item {i}"]} for i in range(10_000)
    ]
    path = tmp_path / f"a.{suffix}"
    path.write_text(
        {
            "csv": "target,anchor,synonyms\n"
            + "".join(f"{e['target']},dog,{e['synonyms'][0]}\n" for e in entries),
            "json": json.dumps(entries),
            "jsonl": "".join(json.dumps(e) + "\n" for e in entries),
            "yaml": "".join(f"- {json.dumps(e)}\n" for e in entries),
            "txt": "".join(f"{e['target']}=dog\n" for e in entries),
        }[suffix]
    )
    started = time.process_time()
    found = read_concepts(path)
    assert len(found) == 10_000 and found[-1].target == "thing 9999"
    assert time.process_time() - started < 20


@pytest.mark.parametrize("suffix", ["csv", "json", "yaml", "txt", "jsonl", "tsv"])
def test_garbage_is_an_error_and_nothing_else(tmp_path, suffix):
    chance = random.Random(suffix)
    path = tmp_path / f"a.{suffix}"
    alphabet = b'[]{},:"\\-| \n\tab=#&*!\x00\xff1'
    for _ in range(300):
        path.write_bytes(bytes(chance.choice(alphabet) for _ in range(chance.randrange(60))))
        try:
            read_concepts(path)
        except ConceptFileError:
            continue


@pytest.mark.parametrize("inside", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e")
def test_lines_end_only_where_editors_end_them(tmp_path, inside):
    name = f"polar{inside}bear"
    files = {
        "a.csv": f"target,anchor\n{name},art\nship,\n",
        "a.tsv": f"target\tanchor\n{name}\tart\nship\n",
        "a.txt": f"{name}=art\nship\n",
    }
    if inside > "\x1f":  # JSON and YAML escape the others
        files |= {
            "a.json": f'["{name}=art", "ship"]',
            "a.jsonl": f'"{name}=art"\n"ship"\n',
            "a.yaml": f"- {name}=art\n- ship\n",
        }
    for file, text in files.items():
        (tmp_path / file).write_bytes(text.encode())
        assert read_concepts(tmp_path / file) == (Concept("polar bear", "art"), Concept("ship"))


def test_every_end_of_line_is_one(tmp_path):
    files = {
        "a.csv": "target\ncat\ndog\n",
        "a.txt": "cat\ndog\n",
        "a.json": '["cat",\n"dog"]',
        "a.jsonl": '"cat"\n"dog"\n',
        "a.yaml": "- cat\n- dog\n",
    }
    for end in ("\n", "\r\n", "\r"):
        for name, text in files.items():
            (tmp_path / name).write_bytes(text.replace("\n", end).encode())
            assert read_concepts(tmp_path / name) == (Concept("cat"), Concept("dog"))
