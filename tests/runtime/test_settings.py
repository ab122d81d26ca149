"""Settings: whichever package their numbers are of, they are plain values; others are refused."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from fractions import Fraction
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from realera_fast.alignment import AlignmentConfig
from realera_fast.cli.demo_plan import DemoConfig
from realera_fast.config import EraseConfig
from realera_fast.mining import MiningConfig
from realera_fast.solver import ClosedFormConfig
from realera_fast.text import PairsConfig, VocabularyConfig

KINDS = (
    *(EraseConfig, PairsConfig, VocabularyConfig, MiningConfig, ClosedFormConfig),
    *(AlignmentConfig, DemoConfig),
)
FIELDS = [
    pytest.param(kind, field.name, id=f"{kind.__name__}.{field.name}")
    for kind in KINDS
    for field in dataclasses.fields(kind)
]
SINGLE = [p for p in FIELDS if isinstance(getattr(p.values[0](), p.values[1]), int | float | str)]


def numbers(value: Any) -> list[Any]:
    """The same value as other packages hold it."""
    array = np.array(value)
    found = [array[()], array]
    if isinstance(value, int | float):
        found.append(torch.tensor(value, dtype=torch.float64 if type(value) is float else None))
    if type(value) is float:
        found.append(array.astype(np.float32)[()])
    elif type(value) is int:
        found += [np.int32(value), np.uint64(value)]
    return found


@pytest.mark.parametrize(("kind", "name"), SINGLE)
def test_numbers_of_other_packages_become_plain_ones(kind: Any, name: str) -> None:
    value = getattr(kind(), name)
    for given in numbers(value):
        made = kind(**{name: given})
        assert type(getattr(made, name)) is type(value)
        assert getattr(made, name) == type(value)(given)
        json.dumps(dataclasses.asdict(made))


@pytest.mark.parametrize(("kind", "name"), SINGLE)
def test_a_value_of_another_type_is_refused_by_name(kind: Any, name: str) -> None:
    value = getattr(kind(), name)
    wrong: list[Any] = [None, [value], np.array([value, value]), b"1", 1j, Decimal(1), object()]
    if not isinstance(value, str):
        wrong += ["1", Fraction(1)]
    # A number will do in the place of "auto".
    number = isinstance(value, float) or float in get_args(get_type_hints(kind)[name])
    if not number:
        wrong += [1.5, np.float32(1)]
    wrong.append(1 if isinstance(value, bool | str) and not number else True)
    for given in wrong:
        with pytest.raises(TypeError, match=f"{kind.__name__}.{name} must be "):
            kind(**{name: given})


def test_whole_numbers_will_do_for_others_and_none_where_it_is_allowed() -> None:
    assert EraseConfig(erase_scale=2).erase_scale == 2
    assert MiningConfig(samples=None).samples is None
    assert type(MiningConfig(samples=np.int64(3)).samples) is int
    assert type(AlignmentConfig(latent_size=torch.tensor(8)).latent_size) is int
    for wrong in (1.5, "8", True):
        with pytest.raises(TypeError, match="latent_size must be an integer or None, got"):
            AlignmentConfig(latent_size=wrong)  # type: ignore[arg-type]


def test_settings_of_a_stage_are_of_its_class() -> None:
    for wrong in (None, {"mode": "none"}, PairsConfig()):
        with pytest.raises(TypeError, match="EraseConfig.mining must be a MiningConfig, got"):
            EraseConfig(mining=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("several", [list, tuple, np.array, iter, set])
def test_names_of_layers_come_in_any_form_that_has_items(several: Any) -> None:
    config = AlignmentConfig(target_modules=several(["to_k", "to_out.0"]))
    assert config.target_modules == ("to_k", "to_out.0")
    assert all(type(name) is str for name in config.target_modules)
    assert VocabularyConfig(exclude=several(["a", "b"])).exclude == ("a", "b")
    json.dumps(EraseConfig(alignment=config).to_dict())


@pytest.mark.parametrize("wrong", [None, "to_k", 3, {"to_k": 1}, [3], b"to_k", np.array("to_k")])
def test_names_of_layers_are_strings(wrong: Any) -> None:
    with pytest.raises(TypeError, match="AlignmentConfig.target_modules"):
        AlignmentConfig(target_modules=wrong)
    if not isinstance(wrong, bytes | np.ndarray):
        with pytest.raises(ValueError, match="AlignmentConfig.target_modules"):
            EraseConfig.from_dict({"alignment": {"target_modules": wrong}})


def test_types_in_a_file_are_checked() -> None:
    with pytest.raises(ValueError, match=r"EraseConfig.alignment: .*enabled must be True or False"):
        EraseConfig.from_dict({"alignment": {"enabled": "false"}})
    with pytest.raises(ValueError, match=r"EraseConfig: .*seed must be an integer, got 1.5"):
        EraseConfig.from_dict({"seed": 1.5})
