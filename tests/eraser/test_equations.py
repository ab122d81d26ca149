"""Many concepts: bounded memory, progress, and going on after a run was cut off."""

from __future__ import annotations

import functools
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

from realera_fast import Erasure, erase, scales
from realera_fast import equations as equations_module
from realera_fast.mining import MiningConfig
from realera_fast.runtime import CheckpointError, checkpoint
from realera_fast.solver import NormalEquations, Pairs
from realera_fast.text import (
    ConceptFileError,
    TextModel,
    VocabularyConfig,
    align,
    read_concepts,
)

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


KILLED = [("sd1", 1), ("sd1", 17), ("flux", 13), ("flux", 31)]
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


@functools.cache
def never_killed(family):
    return erase(FAMILIES[family](), LIST, config=ONE, progress=False)


@pytest.mark.parametrize(("family", "kill_at"), KILLED)
def test_a_killed_run_goes_on_and_ends_the_same(killed, family, kill_at):
    folder = killed[family, kill_at]
    left = sorted(p.name for p in folder.iterdir())
    assert left == (
        ["pooled.safetensors", "sequence.safetensors"]
        if kill_at > len(LIST)
        else ["sequence.safetensors"]
    )
    resumed = FAMILIES[family]()
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
    expected = never_killed(family)
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


def test_five_hundred_concepts_take_no_more_memory_than_ten(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c + "q" for a in letters for b in letters for c in letters]
    for count in (10, 500):
        (tmp_path / f"{count}.csv").write_text(
            "target,anchor\n" + "".join(f"{word},dog\n" for word in words[:count])
        )
    code = """
from realera_fast.text import concept_prompts
# What is kept so that the report need not encode it again has a budget of its own.
concept_prompts._KEPT_BYTES = 1 << 20
name, target = sys.argv[1:3]
found = erase(FAMILIES["sd1"](), read_concepts(name), config=ONE, progress=True)
found.save(target)
print(len(found.concepts), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    script = tmp_path / "run.py"
    script.write_text(RUN + code)
    peaks = {}
    for count in (10, 500):
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
        if count == 500:
            assert "concepts:" in result.stderr and "/500" in result.stderr
    # The prompts alone would be 500 x 77 x 32 float32, 5 MB, and their float64 rows, what they
    # move by, their anchors and the word's neighbors several times that; it takes 6 MB in all.
    assert peaks[500] < peaks[10] + 10
    loaded = Erasure.load(tmp_path / "500.safetensors")
    assert len(loaded.concepts) == 500 and loaded.map.rank <= 32


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


def test_mined_words_are_halved_as_the_choice_of_scales_takes_them(monkeypatch):
    """Word by word in turn, whatever the number of named words before them."""
    found = {}
    add = equations_module.add_mined_word
    choose = scales.choose_scales

    def added(sums, word):
        found.setdefault(id(sums), []).append(word.word)
        return add(sums, word)

    def chosen(equations, space, looked, **options):
        found["halves"] = [found.get(id(half), []) for half in equations.halves]
        found["odd"] = looked.mined_odd.tolist()
        return choose(equations, space, looked, **options)

    monkeypatch.setattr(equations_module, "add_mined_word", added)
    monkeypatch.setattr(scales, "choose_scales", chosen)
    pipe = sd1()
    config = replace(
        ONE,
        mining=MiningConfig(word_cosine=-1.0, max_words=3),
        vocabulary=VocabularyConfig(cache=False),
    )
    result = erase(pipe, ["cat=dog"], config=config, progress=False)
    mined = list(result.report["neighbors"]["cat"])
    assert len(mined) == 3
    assert found["halves"] == [mined[::2], mined[1::2]] and found["odd"] == [False, True, False]
    assert result.report["scales"]["curve"]
