"""Erasing more from a model that was erased from before, all of it in one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from edits import CLOSED
from model_state import equal, weights
from tiny_alignment import UNCHECKED
from tiny_families import denoise, flux, sd1, sdxl

from realera_fast import EraseConfig, Erasure, dry_run, erase
from realera_fast.config import VocabularyConfig
from realera_fast.erasure import BaseModelMismatchError, ErasureFileError, applied
from realera_fast.runtime import Checkpoint


def erased(pipe, concepts, **more):
    return erase(pipe, concepts, progress=False, **{"config": CLOSED, **more})


@pytest.mark.parametrize("build", [sd1, sdxl, flux])
def test_it_is_what_one_call_makes(build):
    pipe, once = build(), build()
    model, other = ((p.unet if hasattr(p, "unet") else p.transformer) for p in (pipe, once))
    base = weights(model)
    first = erased(pipe, "cat=dog", preserve=["lion"])
    both = erased(pipe, ["ship=tree"], extends=first)
    same = erased(once, ["cat=dog", "ship=tree"], preserve=["lion"])
    assert equal(weights(model), weights(other))
    assert both.fingerprint == same.fingerprint and both.config == same.config
    assert [c.target for c in both.concepts] == ["cat", "ship"]
    assert both.provenance["preserve"] == ["lion"] and not both.provenance["history"]
    assert torch.equal(denoise(pipe), denoise(once))
    assert applied(model) == (both,)
    both.restore_(model)
    assert equal(weights(model), base)


def test_of_several_and_of_loaded_ones(tmp_path):
    pipe, once = sd1(), sd1()
    first = erased(pipe, "cat=dog")
    second = erased(pipe, "ship=tree")
    first.save(tmp_path / "first.safetensors")
    three = erased(pipe, "van=art", extends=[first, second])
    assert [c.target for c in three.concepts] == ["cat", "ship", "van"]
    erased(once, ["cat=dog", "ship=tree", "van=art"])
    assert equal(weights(pipe.unet), weights(once.unet))
    fresh, both = sd1(), sd1()
    erased(fresh, "ship=tree", extends=Erasure.load(tmp_path / "first.safetensors"))
    erased(both, ["cat=dog", "ship=tree"])
    assert equal(weights(fresh.unet), weights(both.unet)), "it need not be applied"


def test_erasures_below_stay():
    pipe, beside = sd1(), sd1()
    below, first = erased(pipe, "van=art"), erased(pipe, "cat=dog")
    both = erased(pipe, "ship=tree", extends=first)
    erased(beside, "van=art")
    erased(beside, ["cat=dog", "ship=tree"])
    assert equal(weights(pipe.unet), weights(beside.unet))
    assert applied(pipe.unet) == (below, both)


def test_settings_go_on_unless_others_are_given():
    pipe = sd1()
    own = dataclasses.replace(CLOSED, vocabulary=VocabularyConfig(preserve_scale=7.0))
    first = erased(pipe, "cat=dog", config=own)
    both = erased(pipe, "ship=tree", extends=first, config=None)
    assert EraseConfig.from_dict(both.config) == own
    assert EraseConfig.from_dict(erased(pipe, "van=art", extends=both).config) == CLOSED


def test_a_word_that_was_preserved_may_go_now():
    pipe = sd1()
    first = erased(pipe, "cat=dog", preserve=["lion", "ship"])
    both = erased(pipe, "ship=tree", preserve=["lion"], extends=first)
    assert both.provenance["preserve"] == ["lion"]


def test_a_failure_leaves_everything_as_it_was(monkeypatch):
    pipe = sd1()
    first, second = erased(pipe, "cat=dog"), erased(pipe, "ship=tree")
    before = weights(pipe.unet)

    def broken(self, model, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Erasure, "apply_", broken)
    with pytest.raises(KeyboardInterrupt):
        erased(pipe, "van=art", extends=[first, second])
    monkeypatch.undo()
    assert equal(weights(pipe.unet), before) and applied(pipe.unet) == (first, second)
    with pytest.raises(ValueError, match="'dog' of 'cat' is itself erased"):
        erased(pipe, "dog=tree", extends=[first, second])
    assert equal(weights(pipe.unet), before) and applied(pipe.unet) == (first, second)
    second.restore_(pipe.unet)
    first.restore_(pipe.unet)


def test_what_can_not_be_extended_is_refused():
    pipe = sd1()
    first, second = erased(pipe, "cat=dog"), erased(pipe, "ship=tree")
    before = weights(pipe.unet)
    for extends, error, message in (
        (first, ValueError, r"was applied after .*; name it in extends= as well"),
        ("cat", TypeError, r"extends: expected an Erasure or several .*, got str"),
        (7, TypeError, r"extends: expected an Erasure or several .*, got int"),
    ):
        with pytest.raises(error, match=message):
            erased(pipe, "van=art", extends=extends)
    assert equal(weights(pipe.unet), before) and applied(pipe.unet) == (first, second)
    other = sd1()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(1.5)
    foreign = erased(other, "tree=art")
    with pytest.raises(BaseModelMismatchError):
        erased(sd1(), "van=art", extends=foreign)
    attached = sd1()
    adapter = erased(attached, "cat=dog", target="adapter")
    with pytest.raises(ValueError, match="attached to it as an adapter; take it out"):
        erased(attached, "van=art", extends=adapter, target="adapter")
    adapter.restore_(attached.unet)
    both = erased(attached, "van=art", extends=adapter, target="adapter")
    assert applied(attached.unet) == (both,)


def test_a_failure_at_the_very_end_leaves_everything_as_it_was(monkeypatch):
    pipe = sd1()
    first = erased(pipe, "cat=dog")
    before = weights(pipe.unet)
    wider = dataclasses.replace(
        CLOSED, alignment=dataclasses.replace(UNCHECKED, target_modules=("to_k", "to_q"))
    )

    def broken(self, stage):
        raise PermissionError(stage)

    monkeypatch.setattr(Checkpoint, "remove", broken)
    for extends in ((), first):
        with pytest.raises(PermissionError):
            erased(pipe, "ship=tree", extends=extends, config=wider)
        assert equal(weights(pipe.unet), before) and applied(pipe.unet) == (first,)
    first.restore_(pipe.unet)


def test_erasures_that_took_the_same_are_refused():
    pipe = sd1()
    first, second = erased(pipe, "cat=dog"), erased(pipe, "ship=tree")
    with pytest.raises(ValueError, match="is applied to it and took 'cat' too; undo it"):
        erased(pipe, "van=art", extends=first.then(second))
    assert applied(pipe.unet) == (first, second)
    three = erased(pipe, "van=art", extends=[second, first])
    assert [c.target for c in three.concepts] == ["ship", "cat", "van"], "in the order given"
    pipe.unet.half()
    with pytest.raises(ValueError, match="or their dtype.* changed since erasures were applied"):
        erased(pipe, "tree=art", extends=three)


def test_a_concept_named_again_replaces_the_one_of_before(caplog):
    pipe, once = sd1(), sd1()
    first = erased(pipe, ["cat=dog", "ship=tree"])
    again = erased(pipe, "cat=van", extends=first)
    assert [(c.target, c.anchor) for c in again.concepts] == [("ship", "tree"), ("cat", "van")]
    assert "'cat' is in it already" in caplog.text
    erased(once, ["ship=tree", "cat=van"])
    assert equal(weights(pipe.unet), weights(once.unet))
    two = [erased(sd1(), c) for c in (["cat=dog", "ship=tree"], ["cat=van"])]
    both = erased(sd1(), "horse=art", extends=two[1:] + two[:1])
    assert [(c.target, c.anchor) for c in both.concepts][:2] == [("cat", "dog"), ("ship", "tree")]
    # To T5 these are two names.
    pipe = flux()
    first = erased(pipe, ["cat=dog", "Cat=dog"])
    both = erased(pipe, "ship=tree", extends=first)
    assert [c.target for c in both.concepts] == ["cat", "Cat", "ship"]


def test_preserved_words_are_told_apart_as_the_model_does(tmp_path, caplog):
    for build, kept in ((flux, ["Cat", "lion"]), (sd1, ["lion"])):
        pipe = build()
        first = erased(pipe, "ship=tree", preserve=["Cat", "lion"])
        both = erased(pipe, "cat=dog", extends=first)
        assert both.provenance["preserve"] == kept, build.__name__
    pipe = sd1()
    first, second = (erased(pipe, c, preserve=[p]) for c, p in (("cat", "lion"), ("ship", "art")))
    assert first.then(second).provenance["preserve"] == ["lion", "art"]
    older = dataclasses.replace(
        first, provenance={k: v for k, v in first.provenance.items() if k != "preserve"}
    )
    erased(sd1(), "van=art", extends=older)
    assert "kept no preserved words" in caplog.text
    for broken in (5, [3], "lion"):
        file = tmp_path / "broken.safetensors"
        bad = dataclasses.replace(first, provenance={**first.provenance, "preserve": broken})
        bad.save(file)
        with pytest.raises(ErasureFileError, match="preserved words that are none"):
            Erasure.load(file)


def test_nothing_changes_with_nothing_to_extend():
    pipe, plain = sd1(), sd1()
    erased(pipe, "cat=dog", extends=[])
    erased(plain, "cat=dog")
    assert equal(weights(pipe.unet), weights(plain.unet))


def test_a_preview_names_the_words_of_all():
    pipe = sd1()
    first = erased(pipe, "cat=dog")
    shown = dry_run.preview(pipe, "ship=tree", extends=first, config=CLOSED, progress=False)
    assert {*shown.neighbors} == {"cat", "ship"}
    assert applied(pipe.unet) == (first,)
    erased(pipe, "van=art")
    with pytest.raises(ValueError, match="was applied after"):
        dry_run.preview(pipe, "ship=tree", extends=first, config=CLOSED, progress=False)
