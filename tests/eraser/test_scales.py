"""Scales are chosen by what they do."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from realera_fast import EraseConfig
from realera_fast.equations import Equations, Leaving
from realera_fast.mining import MiningConfig
from realera_fast.mining.word_space import WordSpace
from realera_fast.scales import (
    GUIDANCE,
    NEIGHBORS,
    PRESERVE,
    Looked,
    Scales,
    choose_scales,
    scales_of,
)
from realera_fast.solver import ClosedFormConfig, NormalEquations, Pairs
from realera_fast.text import PairsConfig, VocabularyConfig

F64 = torch.float64
WIDTH = 12
RIDGE = ClosedFormConfig(ridge=1e-6)


def rows(*places):
    return torch.eye(WIDTH)[list(places)]


def equations(crowd):
    """One word of axis 0 goes to axis 1; `crowd` says how much the prior holds of axis 0."""
    prior = torch.diag(torch.tensor([crowd, *[1.0] * (WIDTH - 1)], dtype=F64)) / WIDTH

    def sums(*pairs):
        found = NormalEquations(WIDTH)
        for source, destination in pairs:
            found.update(Pairs(source, destination, torch.ones(len(source))))
        return found

    staying = sums().update_moments(prior)
    named = sums((rows(0), rows(1)))
    halves = (sums((rows(2), rows(1))), sums((rows(3), rows(1))))
    return Equations(staying, {"": Leaving(named, halves[0] + halves[1], sums())}, halves, prior)


def looked(relatives=(), mined=(2, 3)):
    aims = rows(*[1] * len(mined))
    odd = torch.tensor([place % 2 == 1 for place in mined], dtype=torch.bool)
    things = rows(*range(4, WIDTH))
    seen = (rows(0), rows(1), rows(*mined), aims, odd, rows(*relatives), things)
    least = torch.zeros(len(mined), dtype=F64)
    return Looked(*seen, torch.zeros(WIDTH, dtype=F64), 1, least)


SPACE = WordSpace(torch.zeros(WIDTH, dtype=F64), torch.eye(WIDTH, dtype=F64))


def chosen(given, seen, preserve=PRESERVE, guidance=GUIDANCE):
    return choose_scales(given, SPACE, seen, preserve=preserve, guidance=guidance, options=RIDGE)


def test_every_choice_is_what_the_solver_does():
    """Shares of the curve from the map that the library's own solver finds."""
    given, seen = equations(1.0), looked()
    for point in chosen(given, seen, (2.0,), (0.5,)).curve:
        total = given.staying.scaled(2.0) + given.leaving[""].total(0.5, 1.0)
        found = total.solve(ridge=given.ridge(RIDGE, 2.0), rank_tolerance=0.0, dtype=F64).map
        left = found(rows(0).double()) - rows(1).double()
        way = (rows(0) - rows(1)).double()
        share = max(0.0, float((left * way).sum() / way.square().sum()))
        assert point["named"] == pytest.approx(
            1 / (1 + 2.718281828 ** ((share - 0.6) / 0.05)), abs=2e-4
        )


def test_a_heavy_prior_gives_way_and_a_light_one_holds():
    """A relative that is half the name: where both go half the way the scale is s crowd / d = 1."""
    seen = dataclasses.replace(looked(mined=()), relatives=(rows(0) + rows(4)) / 2**0.5)
    for crowd, expected in ((0.1, (80, 160)), (1.0, (10, 20)), (10.0, (1, 2))):
        assert chosen(equations(crowd), seen, guidance=(0.0,)).preserve in expected


def test_the_curve_holds_every_choice_and_the_best_is_taken():
    found = chosen(equations(1.0), looked())
    assert len(found.curve) == len(PRESERVE) * len(GUIDANCE)
    best = max(found.curve, key=lambda point: point["worth"])
    assert (found.preserve, found.guidance) == (best["preserve_scale"], best["negative_guidance"])
    assert set(found.curve[0]) >= {"named", "unlisted", "things", "worth"}
    assert found.to_dict()["curve"][0] == found.curve[0]


def test_mined_words_weigh_less_where_they_stand_in_the_way():
    """A prior that holds the name firmly, and mined words near a thing that stays: at a scale at
    which the name goes, words of full weight take the thing along."""
    given = equations(8.0)
    near = (rows(4) + 0.5 * rows(2)) / 1.25**0.5
    crossing = NormalEquations(WIDTH).update(Pairs(near, rows(1), torch.ones(1)))
    halves = (crossing, crossing.scaled(1.0))
    leaving = Leaving(given.named, halves[0] + halves[1], NormalEquations(WIDTH))
    given = dataclasses.replace(given, leaving={"": leaving}, halves=halves)
    seen = dataclasses.replace(looked(mined=()), things=rows(4))
    found = choose_scales(
        given,
        SPACE,
        seen,
        preserve=PRESERVE,
        guidance=(0.0,),
        neighbors=NEIGHBORS,
        options=RIDGE,
    )
    assert found.neighbors == NEIGHBORS[-1]
    best = {
        weight: max(p["worth"] for p in found.curve if p["neighbor_scale"] == weight)
        for weight in NEIGHBORS
    }
    assert best[0.1] > best[1.0]
    total = leaving.total(0.5, found.neighbors)
    wanted = given.named.scaled(1.0, 1.5) + leaving.mined.scaled(found.neighbors)
    assert torch.equal(total.gram, wanted.gram) and torch.equal(total.cross, wanted.cross)


@pytest.mark.parametrize(("count", "weights"), [(1, (1.0,)), (2, NEIGHBORS)])
def test_of_one_concept_mined_words_weigh_what_they_are(monkeypatch, count, weights):
    monkeypatch.setattr("realera_fast.scales.looked_at", lambda known, selection: looked())
    selection = SimpleNamespace(concepts=("name",) * count)
    found = scales_of(EraseConfig(), equations(1.0), SimpleNamespace(space=SPACE), selection)
    assert dict.fromkeys(point["neighbor_scale"] for point in found.curve) == dict.fromkeys(weights)


def test_a_user_s_scales_are_taken_as_they_are():
    config = EraseConfig(
        vocabulary=VocabularyConfig(preserve_scale=3.0),
        pairs=PairsConfig(negative_guidance=0.25),
        mining=MiningConfig(neighbor_scale=0.5),
    )
    assert scales_of(config, None, None, None) == Scales(3.0, 0.25, 0.5)
    noise = dataclasses.replace(config.mining, mode="gaussian")
    config = dataclasses.replace(config, mining=noise, pairs=PairsConfig())
    assert scales_of(config, None, None, None) == Scales(3.0, 0.0, 0.5)


def test_rows_of_noise_that_are_past_the_anchor_are_not_sent_past_it_again(monkeypatch):
    """Their guidance is in the sums already, so that the preserve scale is chosen without it."""
    monkeypatch.setattr("realera_fast.scales.looked_at", lambda known, selection: looked())
    known = SimpleNamespace(space=SPACE)
    config = EraseConfig(
        mining=MiningConfig(mode="gaussian"), pairs=PairsConfig(negative_guidance=0.5)
    )
    given = equations(1.0)
    found = scales_of(config, given, known, None)
    wanted = choose_scales(
        given, SPACE, looked(), preserve=PRESERVE, guidance=(0.0,), options=config.closed_form
    )
    assert found == dataclasses.replace(wanted, guidance=0.5)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "much"])
def test_what_is_no_scale_is_refused(value):
    for make in (
        lambda: VocabularyConfig(preserve_scale=value),
        lambda: PairsConfig(negative_guidance=value),
    ):
        with pytest.raises(ValueError, match='must be finite and at least 0, or "auto"'):
            make()
