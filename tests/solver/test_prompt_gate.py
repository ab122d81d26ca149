"""Gates of prompt maps: what stays bit-identical, what is refused, and several at once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from realera_fast.runtime.safetensors_file import write
from realera_fast.solver import ConceptMap, PromptGate, PromptMap, is_prompt_map

WIDTH = 8


def a_map(seed: int) -> ConceptMap:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(WIDTH, 2, generator=generator)
    return ConceptMap(left, torch.randn(2, WIDTH, generator=generator))


def gate(axis: int, threshold: float = 0.9) -> PromptGate:
    """Opens for rows along an axis, seen from a point beside the origin."""
    directions = torch.eye(WIDTH)[axis : axis + 1] * 3.0
    return PromptGate(torch.full((WIDTH,), 0.5), directions, torch.tensor([threshold]))


def prompts(*axes: int, tokens: int = 5) -> torch.Tensor:
    """One prompt for each axis; its third row lies along it, the others nowhere near any."""
    rows = -1.0 - torch.rand(len(axes), tokens, WIDTH, generator=torch.Generator().manual_seed(3))
    for number, axis in enumerate(axes):
        rows[number, 2] = 0.5 + 2.0 * torch.eye(WIDTH)[axis]
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_prompt_of_a_batch_is_mapped_or_left_bit_identical(dtype):
    gated = PromptMap(a_map(0), gates=[gate(1)])
    given = prompts(0, 1, 2).to(dtype)
    mapped = gated(given)
    assert mapped.dtype == dtype and gated.opened(given).tolist() == [False, True, False]
    assert torch.equal(mapped[0], given[0]) and torch.equal(mapped[2], given[2])
    assert torch.equal(mapped[1:2], PromptMap(a_map(0))(given)[1:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated(given), mapped)


def test_the_pooled_vector_goes_with_its_prompt():
    gated = PromptMap(a_map(0), a_map(1), [gate(1)])
    given, pooled = prompts(1, 0), torch.randn(2, WIDTH)
    sequence, vector = gated(given, pooled)
    plain = PromptMap(a_map(0), a_map(1))(given, pooled)
    assert torch.equal(sequence[0], plain[0][0]) and torch.equal(vector[0], plain[1][0])
    assert torch.equal(sequence[1], given[1]) and torch.equal(vector[1], pooled[1])


def test_prompts_of_nothing_open_no_gate():
    gated = PromptMap(a_map(0), gates=[gate(1, threshold=-0.9)])
    assert gated(torch.zeros(0, 5, WIDTH)).shape == (0, 5, WIDTH)
    assert gated(torch.zeros(2, 0, WIDTH)).shape == (2, 0, WIDTH)
    # Pipelines put zeros in place of the prompts of an encoder that is not there.
    assert not gated.opened(torch.zeros(2, 3, WIDTH)).any()
    assert gated.opened(prompts(4)).all()


def test_composed_gates_see_the_prompt_as_it_came():
    first, second = PromptMap(a_map(0), gates=[gate(1)]), PromptMap(a_map(1), gates=[gate(2)])
    both = first.compose(second)
    given = prompts(0, 1, 2)
    # This one holds both: the second map must not hide it from the first one's gate.
    together = torch.cat((given[1:2], given[2:3]), 1)
    assert torch.equal(both(given)[0], given[0])
    assert torch.equal(both(given)[1:2], first(given)[1:2])
    assert torch.equal(both(given)[2:3], second(given)[2:3])
    plain = a_map(0)(a_map(1)(together))
    assert torch.equal(both(together), plain)
    third = PromptMap(a_map(2))
    assert torch.allclose(both.compose(third)(together), a_map(0)(a_map(1)(a_map(2)(together))))
    assert torch.equal(both.compose(third)(given)[0:1], third(given)[0:1])
    assert both.compose(third).opened(given).all()
    assert torch.equal(third.compose(both)(given)[0:1], third(given)[0:1])


def test_gates_are_copied_pickled_and_loaded():
    gated = PromptMap(a_map(0), gates=[gate(1)]).compose(PromptMap(a_map(1), gates=[gate(2)]))
    given = prompts(0, 1, 2)
    blank = PromptMap(a_map(5), gates=[gate(3)]).compose(PromptMap(a_map(6), gates=[gate(3)]))
    blank.load_state_dict(gated.state_dict())
    for again in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated)), blank):
        assert torch.equal(again(given), gated(given))


def test_what_no_gate_can_judge_is_refused():
    gated = PromptMap(a_map(0), gates=[gate(1)])
    broken = prompts(0, 1)
    broken[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="prompt_embeds: holds NaN or infinity"):
        gated(broken)
    with pytest.raises(ValueError, match=r"expected shape \[b, t, 8\], got \[2, 5, 7\]"):
        gated.opened(prompts(0, 1)[..., :7])
    with pytest.raises(ValueError, match="a gate needs whole prompts"):
        gated(prompts(0)[0])
    with pytest.raises(ValueError, match="expected a floating dtype"):
        gated(torch.zeros(1, 2, WIDTH, dtype=torch.long))
    pooled = PromptMap(a_map(0), a_map(1), [gate(1)])
    with pytest.raises(ValueError, match="pooled_prompt_embeds: holds NaN"):
        pooled(prompts(0), torch.full((1, WIDTH), torch.inf))
    with pytest.raises(ValueError, match="one vector a prompt"):
        pooled(prompts(0), torch.zeros(2, WIDTH))


def test_gates_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match=r"\[d\], \[n, d\] and \[n\]"):
        PromptGate(torch.zeros(3), torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="points nowhere"):
        PromptGate(torch.zeros(3), torch.zeros(1, 3), torch.ones(1))
    with pytest.raises(ValueError, match="of width 8"):
        PromptMap(a_map(0), gates=[PromptGate(torch.zeros(3), torch.ones(1, 3), torch.ones(1))])


@pytest.mark.parametrize("pooled", [None, a_map(5)])
def test_a_saved_map_is_the_same_map(tmp_path, pooled):
    first = PromptMap(a_map(0), pooled, gates=[gate(1), gate(3, 0.7)])
    composed = PromptMap(a_map(1), pooled).compose(first)
    for number, each in enumerate((PromptMap(a_map(2), pooled), first, composed)):
        path = each.save(tmp_path / f"{number}.safetensors")
        again = PromptMap.load(path)
        given = [prompts(0, 1, 2, 3)] + ([] if pooled is None else [torch.randn(4, WIDTH)])
        expected, found = each(*given), again(*given)
        pairs = [(expected, found)] if pooled is None else zip(expected, found, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert is_prompt_map(path) and again.state_dict().keys() == each.state_dict().keys()


def test_another_file_is_no_prompt_map(tmp_path):
    write(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    assert not is_prompt_map(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: not a prompt map"):
        PromptMap.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        PromptMap.load(tmp_path / "none.safetensors")
