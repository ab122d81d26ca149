"""The closed form where value projections speak: what it edits, what it says, what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_state import same, weights
from tiny_erase import CLOSED, CONFIG, run
from tiny_families import pixart_alpha, sd3, sdxl
from tiny_models import tiny_pipeline
from torch.testing import assert_close

import realera_fast
from realera_fast import Concept, EraseConfig, Erasure, embedded
from realera_fast.mining import MiningConfig
from realera_fast.mining.known_words import read_words
from realera_fast.solver import ClosedFormConfig
from realera_fast.text import PairsConfig, TextModel, VocabularyConfig

VALUES = dataclasses.replace(CLOSED, closed_form=ClosedFormConfig(space="values"))


def guided(guidance):
    closed_form = dataclasses.replace(VALUES.closed_form, value_guidance=guidance)
    return dataclasses.replace(VALUES, closed_form=closed_form)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_named_words_say_what_their_anchors_say(guidance, monkeypatch):
    # Random encoders see all words alike: nothing would stay.
    monkeypatch.setattr("realera_fast.values._ENOUGH", 0.0)
    monkeypatch.setattr("realera_fast.values._TOO_FEW", 0.0)
    pipe = tiny_pipeline()
    before = weights(pipe.unet)
    result = run(pipe, [Concept("cat", "dog"), Concept("ship", "tree")], guided(guidance))
    text = TextModel(pipe.text_encoder, pipe.tokenizer)
    rows = read_words(text, ["cat", "dog", "ship", "tree"]).float()
    for (name, layer), old in zip(pipe.unet.named_parameters(), before.values(), strict=True):
        if not name.endswith(".to_v.weight") or ".attn2." not in name:
            assert torch.equal(layer, old)
            continue
        for word, anchor in ((0, 1), (2, 3)):
            goal = (1 + guidance / 2) * rows[anchor] - guidance * rows[word]
            assert_close(layer @ rows[word], old @ goal, rtol=2e-2, atol=2e-2)
    assert result.map.rank == 0 and len(result.lora) == sum(".to_v" in name for name in result.lora)
    assert all(factors.rank == 2 for factors in result.lora.values())
    result.restore_(pipe.unet)
    assert same(pipe.unet, before)


def test_it_is_saved_exported_and_applied_as_any_erasure(tmp_path):
    pipe = tiny_pipeline()
    result = run(pipe, ["cat=dog"], guided(1.0))
    edited = weights(pipe.unet)
    result.save(tmp_path / "delta.safetensors")
    result.restore_(pipe.unet)
    Erasure.load(tmp_path / "delta.safetensors").apply_(pipe.unet)
    assert same(pipe.unet, edited)
    with pytest.raises(ValueError, match="factors that act layer by layer"):
        result.prompt_map()


def test_the_report_measures_the_layers_that_speak():
    pipe = embedded.load_pipeline()
    result = realera_fast.erase(pipe, ["cat"], config=EraseConfig.strict(), progress=False)
    word = next(w for w in result.report["words"] if w["role"] == "target")
    # Half of an anchor and all of the word past the anchor.
    assert word["word"] == "cat" and word["moved"] > 1.0
    assert result.report["alignment"]["stopped"] == "not run"
    moved = {name for name, share in result.report["layers"].items() if share}
    assert moved and all(name.endswith(".to_v") for name in moved)


def test_warnings_name_the_settings_that_count():
    result = run(tiny_pipeline(), ["cat=dog"], VALUES)
    # Random layers say of a prompt little of what they say of its word.
    assert any("raise closed_form.value_guidance" in text for text in result.report["warnings"])
    assert not any("erase_scale" in text for text in result.report["warnings"])


def test_sdxl_moves_the_pooled_vector_by_its_own_map():
    pipe = sdxl()
    before = weights(pipe.unet)
    result = realera_fast.erase(pipe, ["cat=dog"], config=VALUES, progress=False)
    assert result.map.rank == 0 and result.pooled_map.rank > 0
    assert all(name.endswith(".to_v") for name in result.lora)
    result.restore_(pipe.unet)
    assert same(pipe.unet, before)


def test_of_several_words_less_is_taken_and_of_too_many_none():
    """Rather than the rest of the model."""
    table = embedded.words()
    pipe = embedded.load_pipeline()
    before = weights(pipe.unet)
    names = [thing.name for thing in table.things if thing.split == "tuning"]
    taken = []
    for count in (1, 5):
        result = realera_fast.erase(
            pipe, names[:count], config=EraseConfig.strict(), progress=False
        )
        taken.append(result.report["scales"]["values"]["value_guidance"])
        result.restore_(pipe.unet)
    assert taken[0] == 1.0 and taken[1] < 1.0
    with pytest.raises(ValueError, match="16 words go together; erase fewer at once"):
        realera_fast.erase(pipe, names[:16], config=EraseConfig.strict(), progress=False)
    assert same(pipe.unet, before)


def test_the_preset_runs():
    config = dataclasses.replace(EraseConfig.strict(), vocabulary=VALUES.vocabulary)
    assert config.closed_form.space == "values" and not config.alignment.enabled
    pipe = tiny_pipeline()
    assert run(pipe, ["cat=dog"], config).lora


@pytest.mark.parametrize("make", [sd3, pixart_alpha])
def test_a_model_without_value_projections_of_text_is_refused(make):
    pipe = make()
    before = weights(pipe.transformer)
    with pytest.raises(ValueError, match='space="values" runs on models whose cross-attention'):
        realera_fast.erase(pipe, ["cat=dog"], config=VALUES, progress=False)
    assert same(pipe.transformer, before)


def test_settings_that_do_not_go_together_are_refused():
    values = ClosedFormConfig(space="values")
    with pytest.raises(ValueError, match="takes no prompts that attacks find"):
        EraseConfig(closed_form=values, mining=MiningConfig(attack_rounds=1))
    with pytest.raises(ValueError, match="takes no noise"):
        EraseConfig(closed_form=values, mining=MiningConfig(mode="gaussian"))
    with pytest.raises(ValueError, match="keep_system"):
        ClosedFormConfig(space="values", keep_system=True)
    with pytest.raises(ValueError, match="ClosedFormConfig.space must be one of"):
        ClosedFormConfig(space="keys")
    for guidance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="value_guidance"):
            ClosedFormConfig(value_guidance=guidance)
    with pytest.raises(ValueError, match="value_ridge"):
        ClosedFormConfig(value_ridge=0.0)
    for name in ("value_ridge", "value_guidance", "value_neighbors"):
        with pytest.raises(ValueError, match=f'{name} must be finite and at least 0, or "auto"'):
            ClosedFormConfig(**{name: "much"})


def test_few_words_leave_their_names_to_the_values_and_many_to_the_text():
    pipe = embedded.load_pipeline()
    names = [thing.name for thing in embedded.words().things if thing.split == "tuning"]
    for count, moves in ((1, True), (16, False)):
        result = realera_fast.erase(pipe, names[:count], config=EraseConfig.fast(), progress=False)
        chosen = result.report["scales"]["values"]
        assert (chosen is not None) == (result.map.rank == 0) == bool(result.lora) == moves
        if moves:
            best = max(point["worth"] for point in chosen["curve"])
            taken = [p for p in chosen["curve"] if all(p[k] == chosen[k] for k in KEYS)]
            assert [p["worth"] for p in taken] == [best] and best > 0.9
        result.restore_(pipe.unet)


def test_a_category_goes_with_its_members_by_the_values():
    """Past its anchor, and with words that the preset against attacks leaves out of a thing."""
    pipe = embedded.load_pipeline()
    category, thing = Concept("plant", kind="explicit"), Concept("plant")

    def erased(config, *concepts):
        result = realera_fast.erase(pipe, concepts, config=config, progress=False)
        result.restore_(pipe.unet)
        ranks = {factors.rank for factors in result.lora.values()}
        return result.report["scales"]["values"], max(ranks, default=0)

    fast = EraseConfig.fast()
    chosen, rank = erased(fast, category)
    assert chosen["value_guidance"] == 1.0 and rank > 32
    assert erased(fast, thing)[0]["value_guidance"] < 1.0
    for concept, most in ((category, rank), (thing, 1)):
        strict, found = erased(EraseConfig.strict(), concept)
        assert strict["value_neighbors"] == 0.0 and found == most
    assert erased(fast, category, "cat") == (None, 0)


KEYS = ("value_ridge", "value_guidance", "value_neighbors")


@pytest.mark.parametrize(
    "asked",
    [
        {"pairs": PairsConfig(negative_guidance=0.75)},
        {"vocabulary": VocabularyConfig(preserve_scale=5.0)},
        {"mining": MiningConfig(mode="gaussian")},
        {"mining": MiningConfig(attack_rounds=1)},
        {"closed_form": ClosedFormConfig(keep_system=True)},
        {"erase_scale": 2.0},
    ],
)
def test_what_only_the_text_has_is_solved_in_the_text(asked):
    assert not EraseConfig().asks_for_text and not EraseConfig.strict().asks_for_text
    assert EraseConfig(**asked).asks_for_text


def test_the_second_stage_starts_from_moved_values():
    """Its factors are added to them."""
    pipe = tiny_pipeline()
    config = dataclasses.replace(VALUES, alignment=CONFIG.alignment)
    result = run(pipe, ["cat=dog"], config)
    assert result.report["alignment"]["kept"] and result.report["scales"]["values"]
    ranks = {name: factors.rank for name, factors in result.lora.items()}
    moved = result.lora[next(name for name in ranks if name.endswith(".to_v"))].rank
    own = {rank for name, rank in ranks.items() if name.endswith(".to_k")}
    assert own == {config.alignment.r} and moved > config.alignment.r


def test_a_word_that_the_user_keeps_stays():
    pipe = embedded.load_pipeline()
    drifts = {}
    for preserve in ((), ("lion",)):
        result = realera_fast.erase(
            pipe, ["cat"], preserve=preserve, config=EraseConfig.fast(), progress=False
        )
        assert result.report["scales"]["values"]
        words = {w["word"]: w["drift"] for w in result.report["words"]}
        drifts[preserve] = words.get("lion")
        result.restore_(pipe.unet)
    assert drifts[("lion",)] < 0.5 and (drifts[()] is None or drifts[("lion",)] < drifts[()])


def test_another_class_takes_no_moved_values():
    result = run(tiny_pipeline(), ["cat=dog"], VALUES)
    other = sdxl().unet
    other.__class__ = type("ControlNetModel", (type(other),), {})
    with pytest.raises(ValueError, match='space="text"'):
        result.rebase(other)


def test_the_text_is_taken_where_values_cannot_be_judged_or_lose_the_rest(monkeypatch):
    """Without a message about a setting that nobody made."""
    config = dataclasses.replace(
        CLOSED,
        pairs=dataclasses.replace(CLOSED.pairs, negative_guidance="auto"),
        vocabulary=VocabularyConfig(cache=False),
    )
    assert not config.asks_for_text
    # A tokenizer of few words names nothing by which to judge.
    assert run(tiny_pipeline(), ["cat=dog"], config).map.rank
    pipe = embedded.load_pipeline()
    monkeypatch.setattr("realera_fast.values._TOO_FEW", 1.1)
    result = realera_fast.erase(pipe, ["cat"], config=EraseConfig.fast(), progress=False)
    assert result.map.rank and result.report["scales"]["values"] is None
    result.restore_(pipe.unet)


def test_halves_of_mined_words_are_halves_of_what_is_looked_at():
    """Whatever the stride with which these were taken."""
    pipe = embedded.load_pipeline()
    curves = []
    for stride in (256, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("realera_fast.scales._MINED", stride)
            result = realera_fast.erase(pipe, ["dog"], config=EraseConfig.fast(), progress=False)
        curves.append(result.report["scales"]["values"]["curve"])
        result.restore_(pipe.unet)
    for curve in curves:
        shares = {p["value_neighbors"]: p["unlisted"] for p in curve if p["value_ridge"] == 1.0}
        assert shares[1.0] > shares[0.0] + 0.01
