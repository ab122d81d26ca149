"""Applying, undoing, saving and sharing an erasure."""

from __future__ import annotations

import copy
import dataclasses
import errno
import gc
import json
import os
import stat
import subprocess
import sys
import unicodedata
import weakref

import pytest
import torch
from child import child_environment
from model_state import same, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline, tiny_unet
from tolerance import check
from typer.testing import CliRunner

from realera_fast.cli import app
from realera_fast.erasure import (
    BaseModelMismatchError,
    Erasure,
    ErasureFileError,
    history,
    read_description,
)
from realera_fast.erasure import file as file_format
from realera_fast.erasure.edit import edit_of
from realera_fast.models import (
    Family,
    LoraFactors,
    Reading,
    base_hashes,
    projections,
    queries_and_outputs,
    transaction,
)
from realera_fast.runtime import safetensors_file
from realera_fast.solver import ConceptMap, IncrementalSystem, NormalEquations, Pairs
from realera_fast.text import Concept, parse_concepts

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAT = Concept("cat", "dog", synonyms=("kitten",))


def make(unet, *, rank=3, lora_rank=2, layers=None, seed=0, hidden=False) -> Erasure:
    """A random erasure of about the size of a real one; with `hidden`, queries and outputs too."""
    generator = torch.Generator().manual_seed(seed)
    found = projections(unet)
    names = list(found) if layers is None else list(found)[:layers]
    width = next(iter(found.values())).in_features

    def noise(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    lora = {
        n: LoraFactors(noise(lora_rank, width), noise(found[n].out_features, lora_rank))
        for n in names
        if lora_rank
    }
    if hidden:
        lora |= {
            n: LoraFactors(noise(lora_rank, m.in_features), noise(m.out_features, lora_rank))
            for n, m in queries_and_outputs(unet).items()
        }
    return Erasure(
        ConceptMap(noise(width, rank), noise(rank, width)),
        lora,
        (CAT,),
        {"seed": 3, "mining": {"mode": "vocabulary", "samples": None}},
        {"base_hashes": base_hashes(unet), "seed": 3},
        {"condition": 12.5, "warnings": ["none"]},
    )


def exact(erasure, name, weight):
    """`[o, d]` float64 edited weight by the formula."""
    wide = weight.double()
    wide = wide + wide @ erasure.map.left.double() @ erasure.map.right.double()
    if name in erasure.lora:
        factors = erasure.lora[name]
        wide = wide + factors.up.double() @ factors.down.double()
    return wide


def inputs(dtype, seed=3):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    return latents, 5, torch.randn(2, 7, 32, generator=generator).to(dtype)


# Editing


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_apply_follows_the_formula_and_rounds_once(dtype, lora_rank):
    unet = tiny_unet(dtype=dtype)
    erasure = make(unet, lora_rank=lora_rank, layers=3)
    before = weights(unet)
    places = {n: (id(m.weight), m.weight.data_ptr()) for n, m in projections(unet).items()}
    assert erasure.apply_(unet) is unet
    for name, layer in projections(unet).items():
        old = before[f"{name}.weight"]
        reference = exact(erasure, name, old)
        # In float32 throughout, then one cast: what a careful user of PyTorch would do.
        left, right = erasure.map.left, erasure.map.right
        wide = torch.promote_types(dtype, torch.float32)
        plain = old.to(wide) + old.to(wide) @ left.to(wide) @ right.to(wide)
        if name in erasure.lora:
            plain = plain + erasure.lora[name].delta.to(wide)
        check(name, layer.weight.detach(), reference, plain.to(dtype))
        assert (id(layer.weight), layer.weight.data_ptr()) == places[name]
        assert layer.weight.requires_grad
    others = {n: t for n, t in unet.state_dict().items() if n.removesuffix(".weight") not in places}
    assert all(torch.equal(before[n], t) for n, t in others.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_bit_exact_and_apply_works_again(dtype):
    unet = tiny_unet(dtype=dtype)
    erasure = make(unet)
    before = weights(unet)
    erasure.apply_(unet)
    edited = weights(unet)
    assert not same(unet, before)
    assert erasure.restore_(unet) is unet
    assert same(unet, before)
    erasure.apply_(unet)
    assert same(unet, edited)


def test_erasing_nothing_writes_nothing():
    unet = tiny_unet()
    nothing = make(unet, rank=0, lora_rank=0)
    before = weights(unet)
    versions = [p._version for p in unet.parameters()]
    nothing.apply_(unet)
    nothing.apply_(unet)
    nothing.restore_(unet)
    assert same(unet, before) and versions == [p._version for p in unet.parameters()]
    assert nothing.state_dict(unet) == {}
    make(unet).apply_(unet)
    assert versions != [p._version for p in unet.parameters()]


def test_only_adapted_layers_change_without_a_map():
    unet = tiny_unet()
    erasure = make(unet, rank=0, layers=2)
    before = weights(unet)
    erasure.apply_(unet)
    changed = {n for n, t in unet.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{name}.weight" for name in erasure.lora} == set(erasure.state_dict(unet))
    erasure.restore_(unet)
    assert same(unet, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", [1, 4, 8, 9])
def test_a_failure_at_any_write_leaves_the_model_bit_identical(monkeypatch, error, at):
    unet = tiny_unet()
    erasure = make(unet)
    before = weights(unet)
    if at == 9:
        hashes = []
        original = history.weights_hash

        def fail(*args):
            hashes.append(1)
            if len(hashes) == 2:
                raise error("after the last write")
            return original(*args)

        monkeypatch.setattr(history, "weights_hash", fail)
    else:
        broken = list(projections(unet).values())[at - 1].weight
        copy_ = torch.Tensor.copy_
        failed = []

        def fail(self, *args):
            if self is broken and not failed:
                failed.append(1)
                raise error("in the middle")
            return copy_(self, *args)

        monkeypatch.setattr(torch.Tensor, "copy_", fail)
    with pytest.raises(error):
        erasure.apply_(unet)
    monkeypatch.undo()
    assert same(unet, before)
    with pytest.raises(ValueError, match="was not applied to this model"):
        erasure.restore_(unet)
    erasure.apply_(unet)
    erasure.restore_(unet)
    assert same(unet, before)


def test_an_outer_transaction_undoes_an_application_and_its_record():
    unet = tiny_unet()
    before = weights(unet)
    first, second = make(unet), make(unet, seed=1)
    with pytest.raises(RuntimeError), transaction(unet):
        first.apply_(unet)
        raise RuntimeError
    assert same(unet, before)
    with pytest.raises(ValueError, match="changed since"):
        first.restore_(unet)
    second.apply_(unet)
    with pytest.raises(ValueError, match="was not applied to this model"):
        first.restore_(unet)
    second.restore_(unet)
    assert same(unet, before)


def test_erasures_stack_and_come_off_in_reverse_order():
    unet = tiny_unet()
    states = [weights(unet)]
    first = make(unet)
    first.apply_(unet)
    states.append(weights(unet))
    second = make(unet, seed=1)
    second.apply_(unet)
    with pytest.raises(ValueError, match="was applied last; restore that one first"):
        first.restore_(unet)
    second.restore_(unet)
    assert same(unet, states[1])
    first.restore_(unet)
    assert same(unet, states[0])


def test_restore_refuses_what_it_can_not_do_exactly():
    unet = tiny_unet()
    erasure = make(unet)
    with pytest.raises(ValueError, match="not applied to this model in this process"):
        erasure.restore_(unet)
    erasure.apply_(unet)
    with pytest.raises(ValueError, match="not applied to this model in this process"):
        erasure.restore_(copy.deepcopy(unet))
    name, layer = next(iter(projections(unet).items()))
    with torch.no_grad():
        kept = layer.weight[0, 0].item()
        layer.weight[0, 0] += 1
    edited = weights(unet)
    with pytest.raises(ValueError, match="changed since the erasure was applied"):
        erasure.restore_(unet)
    assert same(unet, edited)
    with torch.no_grad():
        layer.weight[0, 0] = kept
    with pytest.raises(ValueError, match=r"\(or their dtype\) changed"):
        erasure.restore_(unet.to(torch.bfloat16))


def test_nothing_keeps_a_model_alive():
    # Models of other tests may be waiting to be collected, and count until then.
    gc.collect()
    unet = tiny_unet()
    make(unet).apply_(unet)
    alive, entries = weakref.ref(unet), len(history.histories)
    del unet
    gc.collect()
    assert alive() is None and len(history.histories) == entries - 1


def test_apply_refuses_another_base_and_names_both_hashes():
    unet, other = tiny_unet(), tiny_unet(seed=5)
    erasure = make(unet)
    before = weights(other)
    with pytest.raises(BaseModelMismatchError) as caught:
        erasure.apply_(other)
    assert base_hashes(unet)["float32"][:16] in str(caught.value)
    assert base_hashes(other)["float32"][:16] in str(caught.value)
    assert same(other, before)
    with pytest.raises(BaseModelMismatchError, match="already applied"):
        erasure.apply_(unet) and erasure.apply_(unet)
    # A copy has no history: there the weights alone tell.
    with pytest.raises(BaseModelMismatchError, match="float32 hash"):
        erasure.apply_(copy.deepcopy(unet))
    with pytest.raises(BaseModelMismatchError, match="text of another width than 32"):
        erasure.apply_(tiny_unet(48))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_apply_accepts_the_same_base_in_another_dtype(dtype):
    wide, narrow = tiny_unet(), tiny_unet(dtype=dtype)
    make(wide).apply_(narrow)
    make(tiny_unet(dtype=dtype)).apply_(wide)
    with pytest.raises(BaseModelMismatchError):
        make(wide).apply_(tiny_unet(seed=5, dtype=dtype))
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(BaseModelMismatchError, match="can't be compared"):
        make(tiny_unet(dtype=dtype)).apply_(tiny_unet(dtype=other))


def test_apply_refuses_an_overflow_in_float16():
    unet = tiny_unet(dtype=torch.float16)
    erasure = make(unet, rank=1)
    huge = Erasure(
        ConceptMap(erasure.map.left * 1e4, erasure.map.right * 1e4),
        {},
        (CAT,),
        {},
        erasure.provenance,
        {},
    )
    before = weights(unet)
    with pytest.raises(ValueError, match=r"attn2\.to_k\.weight overflows torch\.float16"):
        huge.apply_(unet)
    assert same(unet, before)


def test_apply_refuses_lora_that_does_not_fit():
    unet = tiny_unet()
    name = next(iter(projections(unet)))
    parts = (ConceptMap.identity(32), (CAT,), {}, {"base_hashes": base_hashes(unet)}, {})
    for lora, match in (
        (
            {"mid.to_k": LoraFactors(torch.ones(1, 32), torch.ones(16, 1))},
            "no projection 'mid.to_k'",
        ),
        (
            {name: LoraFactors(torch.ones(1, 32), torch.ones(9, 1))},
            "16 output and 32 input features",
        ),
    ):
        with pytest.raises(BaseModelMismatchError, match=match):
            Erasure(parts[0], lora, *parts[1:]).apply_(unet)


def test_an_erasure_checks_and_copies_its_parts():
    unet = tiny_unet()
    config = {"steps": [1, 2]}
    erasure = Erasure(ConceptMap.identity(32), {}, (CAT,), config, {}, {})
    config["steps"].append(3)
    assert erasure.config == {"steps": [1, 2]}
    assert "'cat' -> 'dog'" in repr(erasure)
    with pytest.raises(ValueError, match="no base_hashes"):
        erasure.apply_(unet)
    with pytest.raises(TypeError, match="report: expected plain JSON"):
        Erasure(ConceptMap.identity(32), {}, (), {}, {}, {"x": torch.ones(1)})
    with pytest.raises(TypeError, match="expected Concept"):
        Erasure(ConceptMap.identity(32), {}, ("cat",), {}, {}, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"down of shape \[r, 32\]"):
        factors = LoraFactors(torch.ones(1, 31), torch.ones(16, 1))
        Erasure(ConceptMap.identity(32), {"a.to_k": factors}, (), {}, {}, {})
    with pytest.raises(ValueError, match="map.left: holds NaN"):
        nan = ConceptMap(torch.full((32, 1), float("nan")), torch.ones(1, 32))
        Erasure(nan, {}, (), {}, {}, {})


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_turns_a_base_into_the_edited_model(dtype):
    unet, base = tiny_unet(dtype=dtype), tiny_unet(dtype=dtype)
    erasure = make(unet)
    from_base = erasure.state_dict(unet)
    before = weights(unet)
    erasure.apply_(unet)
    from_edited = erasure.state_dict(unet)
    assert list(from_base) == list(from_edited) == [f"{n}.weight" for n in projections(unet)]
    assert all(torch.equal(from_base[n], from_edited[n]) for n in from_base)
    assert not base.load_state_dict(from_base, strict=False).unexpected_keys
    assert same(base, weights(unet)) and not same(base, before)
    with pytest.raises(BaseModelMismatchError):
        erasure.state_dict(tiny_unet(seed=5, dtype=dtype))


# Queries and outputs


def all_layers(unet):
    return projections(unet) | queries_and_outputs(unet)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_outputs_get_their_factors_alone(dtype):
    unet = tiny_unet(dtype=dtype)
    erasure = make(unet, hidden=True)
    before = weights(unet)
    erasure.apply_(unet)
    for name in queries_and_outputs(unet):
        old = before[f"{name}.weight"]
        factors = erasure.lora[name]
        wide = old.double() + factors.up.double() @ factors.down.double()
        plain = (old.float() + factors.delta).to(dtype)
        check(name, unet.get_submodule(name).weight.detach(), wide, plain)
    changed = {n for n, t in unet.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{name}.weight" for name in all_layers(unet)}
    assert erasure.state_dict(unet).keys() == changed
    erasure.restore_(unet)
    assert same(unet, before)


def test_queries_and_outputs_survive_the_file(tmp_path):
    unet = tiny_unet()
    erasure = make(unet, hidden=True)
    loaded = Erasure.load(erasure.save(tmp_path / "x.safetensors"))
    before = weights(unet)
    erasure.apply_(unet)
    edited = weights(unet)
    loaded.restore_(unet)
    assert same(unet, before)
    loaded.apply_(unet)
    assert same(unet, edited)


def test_queries_and_outputs_survive_as_an_adapter(tmp_path):
    pipe = tiny_pipeline()
    erasure = make(pipe.unet, hidden=True)
    erasure.save_lora(tmp_path, pipe.unet)
    other = tiny_pipeline()
    other.load_lora_weights(tmp_path)
    erasure.apply_(pipe.unet)
    exact_unet = tiny_unet(dtype=torch.float64)
    for name, layer in all_layers(exact_unet).items():
        wide = layer.weight.data
        if name in projections(tiny_unet()):
            wide = exact(erasure, name, wide)
        else:
            wide = wide + erasure.lora[name].up.double() @ erasure.lora[name].down.double()
        layer.weight.data = wide
    with torch.no_grad():
        reference = exact_unet(*inputs(torch.float64)).sample
        edited, adapted = (p.unet(*inputs(torch.float32)).sample for p in (pipe, other))
    check("adapter", adapted, reference, edited)


@pytest.mark.parametrize("alone", [False, True])
def test_erasures_with_and_without_them_stack(monkeypatch, alone):
    unet = tiny_unet()
    first = make(unet, seed=1)
    # `alone`: the second one leaves keys and values as the first one made them.
    second = make(unet, seed=2, hidden=True, rank=0 if alone else 3, layers=0 if alone else None)
    states = [weights(unet)]
    first.apply_(unet)
    states.append(weights(unet))
    # Its base check is about the original model: this stacks on an edited one.
    monkeypatch.setattr(history, "check_base", lambda *_: None)
    second.apply_(unet)
    with pytest.raises(BaseModelMismatchError, match="already applied"):
        second.apply_(unet)
    with pytest.raises(ValueError, match="was applied last"):
        first.restore_(unet)
    with torch.no_grad():
        layer = next(iter(queries_and_outputs(unet).values()))
        old = layer.weight.clone()
        layer.weight.mul_(2)
    for erasure in (first, second):
        with pytest.raises(ValueError, match="changed since"):
            erasure.restore_(unet)
    with torch.no_grad():
        layer.weight.copy_(old)
    second.restore_(unet)
    assert same(unet, states[1])
    first.restore_(unet)
    assert same(unet, states[0])


def test_what_an_outer_transaction_undid_is_forgotten():
    unet = tiny_unet()
    before = weights(unet)
    erasure = make(unet, hidden=True)
    with pytest.raises(KeyboardInterrupt), transaction(unet, all_layers(unet)):
        erasure.apply_(unet)
        raise KeyboardInterrupt
    assert same(unet, before)
    erasure.apply_(unet)
    erasure.restore_(unet)
    assert same(unet, before)


def test_a_failed_edit_of_queries_leaves_every_bit(monkeypatch):
    unet = tiny_unet()
    before = weights(unet)

    done: list[int] = []
    states = history.WeightStates.of

    def counted(self, names):
        done.append(1)
        # The first time is before the edit.
        if len(done) > 1:
            raise KeyboardInterrupt
        return states(self, names)

    monkeypatch.setattr(history.WeightStates, "of", counted)
    with pytest.raises(KeyboardInterrupt):
        make(unet, hidden=True).apply_(unet)
    assert same(unet, before)


def test_factors_of_another_shape_are_refused():
    unet = tiny_unet()
    erasure = make(unet, hidden=True)
    name = next(iter(queries_and_outputs(unet)))
    factors = LoraFactors(torch.zeros(2, 99), erasure.lora[name].up)
    wrong = Erasure(
        erasure.map,
        {**erasure.lora, name: factors},
        (CAT,),
        erasure.config,
        erasure.provenance,
        erasure.report,
    )
    with pytest.raises(BaseModelMismatchError, match="99"):
        wrong.apply_(unet)


# Files


@pytest.mark.parametrize("rank,lora_rank", [(3, 2), (0, 2), (3, 0), (0, 0), (32, 2)])
def test_a_saved_erasure_comes_back_whole(tmp_path, rank, lora_rank):
    unet = tiny_unet()
    erasure = make(unet, rank=rank, lora_rank=lora_rank)
    path = erasure.save(tmp_path / "new" / "cat.safetensors")
    loaded = Erasure.load(path)
    expected, tensors = edit_of(erasure).tensors(), edit_of(loaded).tensors()
    assert set(tensors) == set(expected)
    assert all(torch.equal(t, tensors[n]) for n, t in expected.items())
    for field in ("concepts", "config", "provenance", "report"):
        assert getattr(loaded, field) == getattr(erasure, field)
    assert loaded.save(tmp_path / "again").read_bytes() == path.read_bytes()
    other = tiny_unet()
    before = weights(unet)
    erasure.apply_(unet)
    loaded.apply_(other)
    assert same(unet, weights(other))
    # A loaded copy undoes what the original did.
    loaded.restore_(unet)
    assert same(unet, before)


def of_an_earlier_release(unet, *targets) -> Erasure:
    """What was saved before names were cleaned, with its equations."""
    generator = torch.Generator().manual_seed(1)
    system = IncrementalSystem(NormalEquations(32), ridge=0.1)
    for target in targets:
        here, there = torch.randn(2, 4, 32, generator=generator)
        pairs = Pairs(here, there, torch.ones(4))
        system.add(target, NormalEquations(32).update(pairs))
    written = {"anchor": "the\u0301", "kind": "object", "synonyms": ["Chat\u200b"]}
    concepts = [Concept.from_dict({"target": target, **written}) for target in targets]
    plain = make(unet, lora_rank=0)
    solved = system.solve().map
    return dataclasses.replace(plain, concepts=concepts, map=solved, system=system)


@pytest.mark.parametrize(
    "target", ["cafe\u0301", "Cafe\u200b", "a  cat ", "\u1100\u1161", "\x1b[2J"]
)
def test_names_in_files_stay_as_earlier_releases_wrote_them(tmp_path, target):
    unet = tiny_unet()
    erasure = of_an_earlier_release(unet, "dog", target)
    path = erasure.save(tmp_path / "old.safetensors")
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["concepts"])[1]["target"] == target
        assert json.loads(file.metadata()["system"])["concepts"] == ["dog", target]
    loaded = Erasure.load(path)
    assert loaded.concepts == erasure.concepts
    assert [c.words for c in loaded.concepts] == [("dog", "Chat\u200b"), (target, "Chat\u200b")]
    assert loaded.fingerprint == erasure.fingerprint
    assert loaded.save(tmp_path / "again").read_bytes() == path.read_bytes()
    described = read_description(path)
    assert [concept["target"] for concept in described["concepts"]] == ["dog", target]
    told = CliRunner().invoke(app, ["info", str(path)])
    assert told.exit_code == 0 and "dog" in told.output and "\x1b" not in told.output
    before = weights(unet)
    loaded.apply_(unet)
    assert not same(unet, before)
    loaded.restore_(unet)
    assert same(unet, before)
    for named in (target, unicodedata.normalize("NFC", target)):
        left = loaded.without(named)
        assert left.system.concepts == ("dog",) == tuple(c.target for c in left.concepts)
    with pytest.raises(ValueError, match="'catfish' is not erased here"):
        loaded.without("catfish")


def test_names_of_a_file_are_cleaned_before_they_are_erased_again(tmp_path):
    path = of_an_earlier_release(tiny_unet(), "cafe\u0301").save(tmp_path / "old.safetensors")
    (concept,) = Erasure.load(path).concepts
    with pytest.raises(ValueError, match=r"Concept.synonyms: .*U\+200B"):
        parse_concepts([concept])
    typed = dataclasses.replace(concept, synonyms=())
    assert parse_concepts([typed]) == (Concept("caf\u00e9", "th\u00e9"),)


def test_what_a_name_of_a_layer_may_be_is_the_same_in_both_directions(tmp_path):
    erasure = make(tiny_unet(), lora_rank=0)
    for name, fits in (("text_in", True), ("blocks.0.to_k", True), ("a/b", False), ("é", False)):
        reading = Family("X", ((Reading(0),),), maps={name: "sequence"})
        written = {**erasure.provenance, "reading": reading.to_dict()}
        mapped = dataclasses.replace(erasure, provenance=written)
        if fits:
            assert Erasure.load(mapped.save(tmp_path / "a")).provenance == mapped.provenance
        else:
            with pytest.raises(ValueError, match="not a module name"):
                mapped.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


SAVE = """
import resource, sys, torch
from realera_fast.solver.concept_map import ConceptMap
from realera_fast.erasure.erasure import Erasure
parts = {"a": 1, "b": [1.5, None], "base_hashes": {"float32": "0" * 64}}
erasure = Erasure(ConceptMap(torch.ones(64, 9), torch.ones(9, 64)), {}, (), parts, parts, parts)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
erasure.save(sys.argv[1])
"""


def save_elsewhere(path, *limit, hash_seed="0"):
    """Saves one and the same erasure in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", SAVE, str(path), *limit],
        capture_output=True,
        text=True,
        env=child_environment(PYTHONHASHSEED=hash_seed),
    )


def test_saved_bytes_are_the_same_in_another_process(tmp_path):
    for seed in ("1", "2"):
        run = save_elsewhere(tmp_path / seed, hash_seed=seed)
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_the_safetensors_package_reads_our_files(tmp_path):
    erasure = make(tiny_unet())
    path = erasure.save(tmp_path / "a")
    assert set(load_file(path)) == set(edit_of(erasure).tensors())
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["concepts"]) == [CAT.to_dict()]
        assert file.metadata()["format"] == "pt"


def test_permissions_and_links_are_those_of_an_ordinary_file(tmp_path):
    erasure = make(tiny_unet())
    (tmp_path / "plain").write_bytes(b"")
    path = erasure.save(tmp_path / "a")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    erasure.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and Erasure.load(tmp_path / "real")
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        erasure.save(tmp_path)


@pytest.mark.parametrize("name", ["a.md", "a.MD", "A.Md"])
def test_a_card_does_not_take_the_place_of_its_file(tmp_path, name):
    erasure = make(tiny_unet())
    erasure.save(tmp_path / name)
    assert Erasure.load(tmp_path / name).concepts == erasure.concepts
    assert (tmp_path / f"{name}.md").read_text().startswith("---")
    for version in ("v1", "v2"):
        erasure.save(tmp_path / f"cat.{version}")
        assert (tmp_path / f"cat.{version}.md").is_file()


@pytest.mark.parametrize(
    "name", ["x" * 255, "x" * 243 + ".safetensors", "\u5154" * 81 + ".safetensors", 'a"\n']
)
def test_long_and_odd_names_are_saved(tmp_path, name):
    path = make(tiny_unet()).save(tmp_path / name)
    assert path.name == name
    assert Erasure.load(path).concepts == (CAT,)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="path: .*is not valid text"):
        make(tiny_unet()).save(tmp_path / "caf\udce9")
    assert not list(tmp_path.iterdir())


def test_special_files_stay(tmp_path):
    erasure = make(tiny_unet())
    os.mkfifo(tmp_path / "pipe")
    before = (tmp_path / "pipe").lstat()
    for save in (erasure.save, lambda path: erasure.save_weights(path, tiny_unet())):
        with pytest.raises(OSError, match="no file was changed: is a pipe or a device; name a"):
            save(tmp_path / "pipe")
    assert (tmp_path / "pipe").lstat().st_ino == before.st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_field_twice_in_a_file_is_refused(tmp_path):
    path = make(tiny_unet()).save(tmp_path / "a")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for field, twice in (
        ("concepts", metadata["concepts"].replace('"target"', '"target":"dog","target"', 1)),
        ("config", '{"seed":1,"seed":2}'),
        ("provenance", metadata["provenance"].replace('"seed"', '"seed":5,"seed"', 1)),
    ):
        save_file(tensors, path, {**metadata, field: twice})
        with pytest.raises(ErasureFileError, match=f"its {field} is not JSON: names the field"):
            Erasure.load(path)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step, kind):
    unet = tiny_unet()
    path = make(unet).save(tmp_path / "a")
    old = path.read_bytes()

    def fail(*_args, **_options):
        raise OSError(kind, os.strerror(kind))

    if step == "write":
        fdopen = os.fdopen

        def full(handle, mode):
            file = fdopen(handle, mode, buffering=0)

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *_args):
                    file.close()

                def write(self, data):
                    file.write(data[:10])
                    fail()

            return Full()

        monkeypatch.setattr(os, "fdopen", full)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="could not save, no file was changed") as caught:
        make(unet, seed=1).save(path)
    assert caught.value.errno == kind and str(path) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["a", "a.md"] and path.read_bytes() == old


def test_a_real_write_limit_leaves_no_partial_file(tmp_path):
    run = save_elsewhere(tmp_path / "a", "4096")
    assert run.returncode == 1 and "could not save, no file was changed" in run.stderr
    assert os.listdir(tmp_path) == []


def test_an_interrupted_save_leaves_no_partial_file(tmp_path, monkeypatch):
    def interrupt(_handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tiny_unet()).save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    erasure = make(tiny_unet())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="could not save") as caught:
        erasure.save(tmp_path / "file" / "a" / "b")
    assert str(tmp_path / "file" / "a" / "b") in str(caught.value)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    erasure = make(tiny_unet())

    # Simulated, because root may write everywhere.
    def refuse(*_args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="no file was changed: Permission denied"):
        erasure.save(tmp_path / "a")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    whole = make(tiny_unet(), layers=1).save(tmp_path / "a").read_bytes()
    path = tmp_path / "b"
    header = 8 + int.from_bytes(whole[:8], "little")
    offsets = {*range(12), *range(0, len(whole), 97), header - 1, header, header + 1}
    for offset in sorted({*offsets, len(whole) - 1}):
        path.write_bytes(whole[:offset])
        with pytest.raises(ErasureFileError, match="truncated"):
            Erasure.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ErasureFileError):
        Erasure.load(path)
    path.write_bytes(whole)
    assert Erasure.load(path)


def test_any_changed_header_byte_is_refused_or_harmless(tmp_path):
    erasure = make(tiny_unet(), layers=1)
    whole = erasure.save(tmp_path / "a").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    path = tmp_path / "b"
    refused = 0
    for at in range(0, 8 + header, 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        try:
            Erasure.load(path)
        except ErasureFileError:
            refused += 1
    assert refused


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(FileNotFoundError):
        Erasure.load(path)
    with pytest.raises(ErasureFileError, match="is a folder"):
        Erasure.load(tmp_path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ErasureFileError, match="not a safetensors file"):
        Erasure.load(path)
    for header in (b"null", b"[1]", b"{" * 100, b'{"a": 1}', b"\xff\xfe\x00\x01", b" "):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ErasureFileError):
            Erasure.load(path)
    path.write_bytes((2**63).to_bytes(8, "little") + b"x" * 100)
    with pytest.raises(ErasureFileError, match="truncated or not a safetensors file"):
        Erasure.load(path)
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ErasureFileError, match="is not an erasure"):
        Erasure.load(path)


def test_files_that_are_too_large(tmp_path, monkeypatch):
    path = make(tiny_unet()).save(tmp_path / "a")
    monkeypatch.setattr(file_format, "MAX_FILE_BYTES", path.stat().st_size)
    assert Erasure.load(path)
    monkeypatch.setattr(file_format, "MAX_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(ErasureFileError, match="is too large"):
        Erasure.load(path)
    monkeypatch.undo()
    monkeypatch.setattr(file_format, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ErasureFileError, match="header of"):
        Erasure.load(path)
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100 are saved"):
        make(tiny_unet()).save(path)


NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
ODD = (
    lambda t, m: t.pop("map.left"),
    lambda t, m: t.update(extra=torch.ones(1)),
    lambda t, m: t.pop(f"lora.{NAME}.up"),
    lambda t, m: t.update({"map.left": t["map.left"].half()}),
    lambda t, m: t.update({"map.left": t["map.left"].double()}),
    lambda t, m: t.update({"map.left": t["map.left"][:, :1].contiguous()}),
    lambda t, m: t.update({"map.left": t["map.left"][:8].contiguous()}),
    lambda t, m: t.update({"map.left": t["map.left"].flatten()}),
    lambda t, m: t.update({"map.left": torch.ones(32, 33), "map.right": torch.ones(33, 32)}),
    lambda t, m: t.update({"map.left": torch.ones(0, 0), "map.right": torch.ones(0, 0)}),
    lambda t, m: t["map.right"].__setitem__((0, 0), float("nan")),
    lambda t, m: t[f"lora.{NAME}.up"].__setitem__((0, 0), float("inf")),
    lambda t, m: t.update({f"lora.{NAME}.up": t[f"lora.{NAME}.up"].double()}),
    lambda t, m: t.update({f"lora.{NAME}.up": torch.ones(32, 5)}),
    lambda t, m: t.update({f"lora.{NAME}.down": torch.ones(2, 31)}),
    lambda t, m: t.update({"lora.a/b.up": torch.ones(4, 1), "lora.a/b.down": torch.ones(1, 32)}),
    lambda t, m: t.update({f"lora.{NAME}.up": torch.ones(0, 2)}),
    lambda t, m: t.update(
        {"lora.a.to_q.up": torch.ones(4, 2), "lora.a.to_q.down": torch.ones(2, 0)}
    ),
    lambda t, m: t.update(
        {"lora.a.to_q.up": torch.ones(4, 3), "lora.a.to_q.down": torch.ones(2, 9)}
    ),
    lambda t, m: t.update({"lora.up": torch.ones(4, 1), "lora.down": torch.ones(1, 32)}),
    lambda t, m: m.update(realera_fast="2"),
    lambda t, m: m.update(extra="x"),
    lambda t, m: m.pop("report"),
    lambda t, m: m.update(config="{"),
    lambda t, m: m.update(config="[]"),
    lambda t, m: m.update(config="[" * 100_000),
    lambda t, m: m.update(report='{"a":' * 40 + "1" + "}" * 40),
    lambda t, m: m.update(report='{"a":' + "9" * 10_000 + "}"),
    lambda t, m: m.update(concepts="{}"),
    lambda t, m: m.update(concepts="[1]"),
    lambda t, m: m.update(concepts='[{"target": 3}]'),
    lambda t, m: m.update(concepts='[{"target":"","anchor":null,"kind":"object","synonyms":[]}]'),
    lambda t, m: m.update(concepts='[{"target":"a","anchor":null,"kind":"x","synonyms":[]}]'),
    lambda t, m: m.update(concepts='[{"target":"a","anchor":null,"kind":"object","synonyms":[1]}]'),
    lambda t, m: m.update(provenance="{}"),
    lambda t, m: m.update(provenance='{"base_hashes": {"float32": "abc"}}'),
    lambda t, m: m.update(provenance='{"base_hashes": {"int8": "' + "a" * 64 + '"}}'),
)


@pytest.mark.parametrize("number", range(len(ODD)))
def test_hostile_contents_are_refused(tmp_path, number):
    path = make(tiny_unet()).save(tmp_path / "a")
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file(tensors, path, metadata)
    assert Erasure.load(path), "unchanged, it loads"
    ODD[number](tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ErasureFileError, match=str(path)):
        Erasure.load(path)


# Adapters


def prediction(unet, dtype):
    with torch.no_grad():
        return unet(*inputs(dtype)).sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank,lora_rank,layers", [(3, 2, None), (3, 2, 3), (0, 2, 3), (3, 0, 0)])
def test_stock_diffusers_loads_the_adapter_and_it_is_the_edit(
    tmp_path, dtype, rank, lora_rank, layers
):
    pipe = tiny_pipeline(dtype=dtype)
    unet = tiny_unet(dtype=dtype)
    erasure = make(unet, rank=rank, lora_rank=lora_rank, layers=layers)
    erasure.apply_(unet)
    file = erasure.save_lora(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", file.name]

    reference = tiny_unet(dtype=dtype).to(torch.float64)
    for name, layer in projections(reference).items():
        layer.weight.data = exact(erasure, name, layer.weight.detach())
    reference = prediction(reference, torch.float64)
    edited, base = prediction(unet, dtype), prediction(pipe.unet, dtype)
    pipe.load_lora_weights(tmp_path)
    adapted = prediction(pipe.unet, dtype)
    check("adapter", adapted, reference, edited)
    with pytest.raises(AssertionError):
        check("base", base, reference, edited)
    pipe.unload_lora_weights()
    assert torch.equal(prediction(pipe.unet, dtype), base)


@pytest.mark.parametrize("rank,lora_rank", [(14, 4), (32, 0), (31, 8)])
def test_a_rank_beyond_a_full_matrix_is_decomposed_layer_by_layer(tmp_path, rank, lora_rank):
    pipe, unet = tiny_pipeline(), tiny_unet()
    erasure = make(unet, rank=rank, lora_rank=lora_rank)
    tensors = load_file(erasure.save_lora(tmp_path / "x.safetensors", unet))
    ranks = {n: t.shape[0] for n, t in tensors.items() if n.endswith("lora_A.weight")}
    # Layers of 16 and of 32 features: never more than a matrix has.
    assert set(ranks.values()) == ({16, 18} if rank == 14 else {16, 32})
    reference = tiny_unet(dtype=torch.float64)
    for name, layer in projections(reference).items():
        layer.weight.data = exact(erasure, name, layer.weight.detach())
    erasure.apply_(unet)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    check(
        "adapter",
        prediction(pipe.unet, torch.float32),
        prediction(reference, torch.float64),
        prediction(unet, torch.float32),
    )


def test_the_adapter_comes_from_base_edited_model_or_memory_alike(tmp_path):
    unet, base = tiny_unet(), tiny_unet()
    erasure = make(unet)
    with pytest.raises(ValueError, match="pass model=, the base model"):
        erasure.save_lora(tmp_path / "none")
    erasure.apply_(unet)
    files = [
        erasure.save_lora(tmp_path / "memory"),
        erasure.save_lora(tmp_path / "edited", unet),
        erasure.save_lora(tmp_path / "base", base),
        Erasure.load(erasure.save(tmp_path / "a")).save_lora(tmp_path / "loaded"),
    ]
    assert len({file.read_bytes() for file in files}) == 1
    with pytest.raises(BaseModelMismatchError):
        erasure.save_lora(tmp_path / "other", tiny_unet(seed=5))
    with pytest.raises(ValueError, match="no adapter to save"):
        make(base, rank=0, lora_rank=0).save_lora(tmp_path / "other")
    assert not (tmp_path / "none").exists() and not (tmp_path / "other").exists()


def test_the_adapter_stays_within_float16_for_badly_scaled_factors(tmp_path):
    unet = tiny_unet()
    erasure = make(unet, lora_rank=0)
    scaled = Erasure(
        ConceptMap(erasure.map.left * 2.0**-30, erasure.map.right * 2.0**30),
        {},
        (CAT,),
        {},
        erasure.provenance,
        {},
    )
    tensors = load_file(scaled.save_lora(tmp_path, unet))
    plain = load_file(erasure.save_lora(tmp_path, unet))
    assert all(torch.equal(t, tensors[n]) for n, t in plain.items())


def test_the_adapter_names_what_peft_needs(tmp_path):
    unet = tiny_unet()
    erasure = make(unet, layers=2)
    with safe_open(erasure.save_lora(tmp_path, unet), framework="pt") as file:
        found = json.loads(file.metadata()["lora_adapter_metadata"])
    names = list(projections(unet))
    assert found["unet.r"] == found["unet.lora_alpha"] == 3
    assert found["unet.target_modules"] == sorted(names)
    assert found["unet.rank_pattern"] == found["unet.alpha_pattern"]
    assert found["unet.rank_pattern"] == {f"^{name}": 5 for name in names[:2]}
