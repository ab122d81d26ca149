"""Many concepts: bounded memory, progress, and going on after a run was cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from child import child_environment
from many_concepts import LIST, ONE
from tiny_families import FAMILIES, flux, sd1
from torch.testing import assert_close

from realera_fast import Concept, Erasure, erase
from realera_fast import equations as equations_module
from realera_fast.mining import MiningConfig, vocabulary_neighbors
from realera_fast.runtime import CheckpointError, checkpoint
from realera_fast.solver import NormalEquations, Pairs
from realera_fast.text import ConceptFileError, TextModel, Vocabulary, align, read_concepts

RUN = """
import os, resource, signal, sys
from many_concepts import LIST, ONE
from tiny_families import FAMILIES
from realera_fast.runtime import checkpoint
from realera_fast import erase
from realera_fast.text.concept_file import read_concepts

def run(family, concepts, folder, kill_at):
    count = 0
    save = checkpoint.Checkpoint.save
    def counting(*arguments):
        nonlocal count
        save(*arguments)
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.Checkpoint.save = counting
    checkpoint.SECONDS = 0.0
    pipe = FAMILIES[family]()
    return erase(pipe, concepts, config=ONE, checkpoint_dir=folder, resume=True, progress=False)
"""


KILLED = [("sd1", 1), ("sd1", 33), ("flux", 25), ("flux", 61)]
"""A family, and after how many checkpoints its run is killed."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs that were killed, each in a process of its own."""
    folders = {case: tmp_path_factory.mktemp("killed") / "c" for case in KILLED}
    code = """
for family, kill_at, folder in CASES:
    child = os.fork()
    if child == 0:
        try:
            run(family, LIST, folder, kill_at)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, family
"""
    cases = [(*case, str(folder)) for case, folder in folders.items()]
    script = RUN + code.replace("CASES", repr(cases))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folders


@pytest.mark.parametrize(("family", "kill_at"), KILLED)
def test_a_killed_run_goes_on_and_ends_the_same(killed, family, kill_at):
    folder = killed[family, kill_at]
    left = sorted(p.name for p in folder.iterdir())
    assert left == (
        ["pooled.safetensors", "sequence.safetensors"] if kill_at > 40 else ["sequence.safetensors"]
    )
    resumed, whole = FAMILIES[family](), FAMILIES[family]()
    seen = []
    original = equations_module.add_named_word

    def counting(*arguments, **options):
        seen.append(1)
        return original(*arguments, **options)

    equations_module.add_named_word = counting
    try:
        got = erase(resumed, LIST, config=ONE, checkpoint_dir=folder, resume=True, progress=False)
    finally:
        equations_module.add_named_word = original
    streams = 2 if family == "flux" else 1
    assert len(seen) == streams * len(LIST) - kill_at, "what was read is not read again"
    expected = erase(whole, LIST, config=ONE, progress=False)
    assert torch.equal(got.map.left, expected.map.left)
    assert torch.equal(got.map.right, expected.map.right)
    if got.pooled_map is not None and expected.pooled_map is not None:
        assert torch.equal(got.pooled_map.left, expected.pooled_map.left)
    assert os.listdir(folder) == [], "nothing is left behind"


def test_a_checkpoint_of_another_list_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint.Checkpoint, "remove", lambda self, name: None)
    erase(sd1(), LIST[:5], config=ONE, checkpoint_dir=tmp_path, progress=False)
    assert os.listdir(tmp_path) == ["sequence.safetensors"]
    pipe = sd1()
    before = pipe.unet.state_dict()["conv_in.weight"].clone()
    with pytest.raises(CheckpointError, match="of another run"):
        erase(pipe, LIST[:6], config=ONE, checkpoint_dir=tmp_path, resume=True, progress=False)
    assert torch.equal(before, pipe.unet.state_dict()["conv_in.weight"])
    # Without resume it is replaced.
    erase(sd1(), LIST[:6], config=ONE, checkpoint_dir=tmp_path, progress=False)


def test_three_thousand_concepts_take_no_more_memory_than_ten(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c + "q" for a in letters for b in letters for c in letters]
    for count in (10, 3_000):
        (tmp_path / f"{count}.csv").write_text(
            "target,anchor\n" + "".join(f"{word},dog\n" for word in words[:count])
        )
    code = """
from tiny_models import tiny_text_encoder, tiny_tokenizer
name, target = sys.argv[1:3]
pipe = FAMILIES["sd1"]()
# Prompts of few tokens: it is their number that counts here.
pipe.tokenizer = tiny_tokenizer(length=16)
pipe.text_encoder = tiny_text_encoder(tokenizer=pipe.tokenizer)
found = erase(pipe, read_concepts(name), config=ONE, progress=True)
found.save(target)
print(len(found.concepts), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    script = tmp_path / "run.py"
    script.write_text(RUN + code)
    peaks = {}
    for count in (10, 3_000):
        result = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                script,
                tmp_path / f"{count}.csv",
                tmp_path / f"{count}.safetensors",
            ],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        number, peak = result.stdout.split()
        assert int(number) == count
        peaks[count] = int(peak) / 1024
        if count == 3_000:
            assert "concepts:" in result.stderr and "/3000" in result.stderr
    # The prompts alone would be 3,000 x 16 x 32 float32, 6 MB, and their float64 rows, what they
    # move by, their anchors and the word's neighbors several times that.
    assert peaks[3_000] < peaks[10] + 12
    loaded = Erasure.load(tmp_path / "3000.safetensors")
    assert len(loaded.concepts) == 3_000 and loaded.map.rank <= 32


def test_a_bad_line_stops_before_anything_is_written(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("target,anchor\n" + "\n".join(f"a{i},dog" for i in range(50)) + "\nx,x\n")
    with pytest.raises(ConceptFileError, match="line 52: .*equals its anchor"):
        erase(sd1(), read_concepts(path), config=ONE, checkpoint_dir=tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["list.csv"]


@pytest.mark.parametrize("count", [3, 30])
def test_equations_come_back_from_their_tensors(count):
    generator = torch.Generator().manual_seed(0)

    def rows(number):
        return torch.randn(number, 8, generator=generator)

    whole = NormalEquations(8)
    for _ in range(3):
        source = rows(count)
        whole.update(Pairs(source, rows(count), torch.rand(count, generator=generator)))
        stay = rows(2)
        whole.update(Pairs(stay, stay, torch.ones(2)))
    again = NormalEquations(8)
    again.load_tensors({k: v.clone() for k, v in whole.tensors().items()}, whole.rows)
    first, second = (e.solve(ridge=0.5) for e in (whole, again))
    assert torch.equal(first.map.left, second.map.left) and first.info == second.info
    assert_close(whole.gram, again.gram, rtol=0, atol=0)
    empty = NormalEquations(8)
    empty.load_tensors(NormalEquations(8).tensors(), 0)
    assert empty.is_empty


def test_kept_systems_take_no_checkpoint(tmp_path):
    config = replace(ONE, closed_form=replace(ONE.closed_form, keep_system=True))
    erase(flux(), LIST[:3], config=config, checkpoint_dir=tmp_path, progress=False)
    assert os.listdir(tmp_path) == []


def test_a_second_look_finds_what_the_neighbors_point_at(monkeypatch):
    """`far` is nearer to the concept with its neighbors than to the concept alone."""
    rows = {
        "target": [1.0, 0.0, 0.0, 0.0],
        "near": [0.8, 0.6, 0.0, 0.0],
        "far": [0.5, 0.8, 0.33, 0.0],
        "other": [-1.0, 0.2, 0.5, 0.0],
        "opposite": [-0.7, -1.3, -0.6, 0.0],
    }
    words = ("near", "far", "other", "opposite")
    descriptors = torch.tensor([rows[word] for word in words])
    gram = torch.zeros(4, 4, dtype=torch.float64)
    vocabulary = Vocabulary(words, descriptors, gram, 1, "")
    monkeypatch.setattr(
        vocabulary_neighbors,
        "describe",
        lambda text, asked: torch.tensor([rows[word] for word in asked]),
    )
    alone = vocabulary.similarity(torch.tensor(rows["target"]))
    threshold = float(alone[1]) + 0.02
    assert float(alone[0]) > threshold

    def found(keep=()):
        config = MiningConfig(word_cosine=threshold)
        concepts = [Concept("target")]
        return vocabulary_neighbors.neighbor_words(None, vocabulary, concepts, config, keep=keep)

    assert found().near["target"] == ("near", "far")
    # A kept word is no neighbor, so it points at nothing.
    assert found(keep=["near"]).near["target"] == ()


@pytest.mark.parametrize("kind", ["object", "explicit"])
@pytest.mark.parametrize("asked", [0, 2, 256])
def test_members_of_a_category_are_those_that_the_model_draws_as_it(monkeypatch, kind, asked):
    """Far from the name in text, so that nothing else finds them; only the nearest are drawn."""
    descriptors = torch.tensor([[0.5, 0.8, 0.2], [-1.0, 0.2, 0.1], [0.3, -1.0, -0.4], [1.0, 0, 0]])
    gram = torch.zeros(3, 3, dtype=torch.float64)
    vocabulary = Vocabulary(("member", "other", "opposite", "kept"), descriptors, gram, 1, "")
    monkeypatch.setattr(
        vocabulary_neighbors, "describe", lambda text, asked: torch.tensor([[1.0, 0.1, 0.0]])
    )
    config = MiningConfig(word_cosine=0.99, member_words=asked, member_cosine=0.4)
    shown = []

    def members(concept, words):
        assert concept.target == "name"
        shown.extend(words)
        return torch.tensor([{"member": 0.5, "opposite": 0.39}.get(word, 0.1) for word in words])

    found = vocabulary_neighbors.neighbor_words(
        None,
        vocabulary,
        [Concept("name", anchor="x", kind=kind)],
        config,
        keep=["kept"],
        members=members,
    )
    drawn = kind == "explicit" and asked > 0
    assert found.near["name"] == (("member",) if drawn else ())
    assert shown == (["member", "opposite", "other"][:asked] if drawn else [])


def around(scores, concepts, config, drawn=None, monkeypatch=None):
    """Neighborhoods of words by their cosine with the first axis, on which every concept lies."""
    values = torch.tensor(list(scores.values()))
    rest = (1 - values.square()).sqrt()
    signs = torch.tensor([(-1.0) ** i for i in range(len(scores))])
    descriptors = torch.stack([values, signs * rest, 0 * rest], dim=1)
    gram = torch.zeros(3, 3, dtype=torch.float64)
    vocabulary = Vocabulary(tuple(scores), descriptors, gram, 1, "")
    monkeypatch.setattr(
        vocabulary_neighbors,
        "describe",
        lambda text, asked: torch.tensor([[1.0, 0.0, 0.0]] * len(asked)),
    )
    return vocabulary_neighbors.neighbor_words(
        None,
        vocabulary,
        concepts,
        config,
        members=drawn and (lambda concept, words: torch.tensor([drawn[w] for w in words])),
    )


FAR = {"one": 0.1, "two": 0.0, "three": -0.1, "four": -0.2}


@pytest.mark.parametrize(
    ("options", "drawn", "inside"),
    [
        ({}, 0.0, 0),
        ({"word_cosine": 1.0}, 0.0, 0),
        ({"word_cosine": 1.0}, 0.5, 4),
        ({"member_cosine": -0.1}, -1.0, 0),
        ({"word_cosine": 0.7, "member_cosine": 0.5}, 0.5, 4),
        ({"member_cosine": 1.0}, 0.999, 0),
    ],
)
def test_the_cosine_of_members_alone_decides_who_is_one(monkeypatch, options, drawn, inside):
    concepts = [Concept("name", kind="explicit")]
    config = MiningConfig(**{"word_cosine": 0.99} | options)
    found = around(FAR, concepts, config, dict.fromkeys(FAR, drawn), monkeypatch)
    assert len(found.near["name"]) == inside


def test_a_word_of_two_concepts_goes_to_the_nearer_one(monkeypatch):
    """A member by a wide margin is nearer than a word just inside the text's threshold."""
    concepts = [Concept("thing"), Concept("name", kind="explicit")]
    config = MiningConfig(word_cosine=-0.5, member_cosine=0.4)
    drawn = {"one": 0.95, "two": 0.41, "three": 0.0, "four": 0.9}
    found = around(FAR, concepts, config, drawn, monkeypatch)
    assert set(found.near["name"]) == {"one", "four"}
    assert set(found.near["thing"]) == {"two", "three"}


def test_words_that_are_too_many_are_neither_erased_nor_kept(monkeypatch):
    words = {f"word{i}": 0.99 - 0.001 * i for i in range(10)} | {"far": -0.9, "away": -0.8}
    config = MiningConfig(max_words=4, word_cosine=0.6)
    found = around(words, [Concept("name")], config, None, monkeypatch)
    near, surplus = found.near["name"], found.surplus["name"]
    assert len(near) == 4 and "word0" in near
    assert {*near, *surplus} == {f"word{i}" for i in range(10)} and len(surplus) == 6
    assert set(found.relatives["name"]) == {"far", "away"}


@pytest.mark.parametrize("mode", ["none", "gaussian", "offset"])
@pytest.mark.parametrize("samples", [None, 3])
def test_noise_weighs_what_its_word_weighs(mode, samples):
    """`erase_scale` holds for the neighbors and the beyond of a named word too."""
    pipe = sd1()
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    word = align(text, "cat", "dog", ["a photo of a {}"])
    config = replace(ONE, mining=MiningConfig(mode=mode, samples=samples))
    grams = [
        equations_module.add_named_word(
            NormalEquations(text.width), word, replace(config, erase_scale=scale), number=0
        ).gram
        for scale in (1.0, 10.0)
    ]
    assert_close(grams[1], 10.0 * grams[0])
