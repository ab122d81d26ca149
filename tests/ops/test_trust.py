"""A kernel serves after it has agreed with its definition: faults that are planted, and memory."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import spd
from planted_kernels import broken, plain, planted, unchecked
from tiles import TILE_SETS, using_tiles
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from realera_fast import ops
from realera_fast.ops import registry, trials, trust, verdicts

CPU = torch.device("cpu")
KERNELS = (
    "normal_equations_",
    "gram_",
    "solve_spd",
    "low_rank_update_",
    "perturb",
    "perturb_rows",
    "project_into",
    "project_backward",
)


@pytest.fixture(autouse=True)
def new_process(tmp_path: Path) -> Iterator[None]:
    with unchecked(tmp_path):
        yield


def served(name: str) -> str:
    return ops.implementations()[name]["cpu"]


def solve() -> Tensor:
    return ops.solve_spd(torch.eye(3, dtype=torch.float64), torch.ones(2, 3).double())[0]


def changed(name: str, change: Callable[[Tensor], object]) -> Callable[..., Any]:
    """The definition, and then a change of the last of its results that holds numbers."""

    def kernel(*arguments: Any) -> Any:
        returned = plain(name)(*arguments)
        if name in ("solve_spd", "perturb", "perturb_rows", "project_backward"):
            change(returned[0] if isinstance(returned, tuple) else returned)
        else:
            first = arguments[0]
            change(first[-1] if isinstance(first, list) else first)
        return returned

    return kernel


def one_element(result: Tensor) -> None:
    # As far off as one term of a sum of a hundred, or the last bit where all must be equal.
    place = result.view(-1)[-1:]
    place.mul_(1.1)


def last_bit(result: Tensor) -> None:
    place = result.view(-1)[-1:]
    place.copy_(torch.nextafter(place.double(), torch.full_like(place, torch.inf).double()))
    place.add_(torch.finfo(result.dtype).eps * place.abs())


def test_all_that_has_a_kernel_has_a_case() -> None:
    with_kernel = {
        op.name
        for op in registry.OPS
        if any(registry.has_kernel(op.name, device) for device in ("cpu", "cuda"))
    }
    assert with_kernel <= set(KERNELS)


@pytest.mark.parametrize("tile_set", TILE_SETS)
def test_the_kernels_that_are_built_agree(tile_set: str) -> None:
    with using_tiles(tile_set):
        checked = ops.check_kernels()
    assert [v.what_differed() for v in checked if not v.agrees] == []
    names = {v.op for v in checked if v.device == "cpu"}
    assert names == {op.name for op in registry.OPS if registry.has_kernel(op.name, "cpu")}
    assert all(v.milliseconds > 0 for v in checked)


@pytest.mark.parametrize("name", KERNELS)
def test_one_wrong_element_is_found(name: str) -> None:
    change = last_bit if name.startswith("perturb") else one_element
    for dtype in trials.dtypes_of(name):
        with planted(name, changed(name, change)):
            trust.believe(name, CPU, dtype)
            (verdict,) = (v for v in trust._found.values() if v.dtype == str(dtype)[6:])
            assert not verdict.agrees and verdict.error > verdict.limit, verdict
            assert served(name) in ("reference", "streamed")


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_right_is_not_accused(name: str) -> None:
    with planted(name, plain(name)):
        for dtype in (*trials.dtypes_of(name), torch.float64):
            trust.believe(name, CPU, dtype)
        assert ops.distrusted() == {} and served(name) == "native"


def test_a_kernel_that_raises_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with planted("solve_spd", broken):
        assert torch.equal(solve(), torch.ones(2, 3).double())
        (record,) = caplog.records
        message = record.getMessage()
        assert record.levelno == logging.WARNING
        assert "solve_spd on cpu (float64) raised ValueError: no such instruction:" in message
        assert "much more" not in message and "info --check" in message
        assert served("solve_spd") == "reference"
        assert list(ops.distrusted()) == ["solve_spd on cpu, float64"]
        solve()
        assert len(caplog.records) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_is_found(value: float) -> None:
    with planted("gram_", changed("gram_", lambda gram: gram[0, 0].fill_(value))):
        trust.believe("gram_", CPU, torch.float32)
        (verdict,) = trust._found.values()
        assert not verdict.agrees and "NaN" in verdict.what_differed()


def test_the_parts_of_an_operation_are_checked() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    down, up = torch.randn(1, 2, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    with planted("project_into", broken), planted("project_backward", broken):
        y = ops.project(x, weight, down=down.detach(), up=up.detach())
        assert {name for name, *_ in trust._found} == {"project_into"}
        torch.testing.assert_close(y, ops.project(x, weight, down=down, up=up).detach())
        assert {name for name, *_ in trust._found} == {"project_into", "project_backward"}
        ops.project(x, weight, down=down, up=up).sum().backward()
        assert down.grad is not None


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves one operation to check, which takes a tenth of the time."""
    monkeypatch.setattr(registry, "OPS", [op for op in registry.OPS if op.name == name])


def next_process(name: str) -> None:
    for known in (trust._judged, trust._found, trust._unchecked):
        known.clear()
    registry.serve_kernel(name, "cpu")


def test_the_next_process_remembers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("checked again")

    with planted("solve_spd", changed("solve_spd", one_element)):
        solve()
        before = dict(trust._found)
        registry.serve_kernel("solve_spd", "cpu")
        monkeypatch.setattr(trust, "_judged", set())
        monkeypatch.setattr(trust, "_found", {})
        monkeypatch.setattr(trials, "trials", fails)
        caplog.clear()
        solve()
        assert trust._found == before and served("solve_spd") == "reference"
        assert len(caplog.records) == 1


@pytest.mark.parametrize("check", [False, True])
def test_a_replaced_kernel_is_not_judged_by_what_replaced_it(
    check: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("gram_", monkeypatch)
    with planted("gram_", changed("gram_", one_element)):
        if check:
            ops.check_kernels()
        for dtype in trials.dtypes_of("gram_"):
            trust.believe("gram_", CPU, dtype)
        found = [verdict for verdict in trust._found.values() if verdict.op == "gram_"]
        assert len(found) == (len(trials.dtypes_of("gram_")) if check else 1)
        assert not any(verdict.agrees for verdict in found)
        # The last dtype alone, which the process before used after the kernel was replaced.
        next_process("gram_")
        trust.believe("gram_", CPU, trials.dtypes_of("gram_")[-1])
        assert served("gram_") != "native"


@pytest.mark.parametrize("agreed_before", [False, True])
def test_what_a_kernel_raised_is_not_remembered(
    agreed_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("solve_spd", monkeypatch)
    if agreed_before:
        with planted("solve_spd", plain("solve_spd")):
            ops.check_kernels()
    with planted("solve_spd", broken):
        if agreed_before:
            ops.check_kernels()
        solve()
        assert served("solve_spd") == "reference"
        assert "solve_spd" not in {name for name, _ in verdicts.remembered(CPU)}
    next_process("solve_spd")
    with planted("solve_spd", plain("solve_spd")):
        solve()
        assert served("solve_spd") == "native" and ops.distrusted() == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_during_a_check_can_check() -> None:
    held, done = threading.Event(), threading.Event()

    def check() -> None:
        with trust._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=check)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if trust._lock.acquire(timeout=1) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_other_code_is_checked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with planted("solve_spd", changed("solve_spd", one_element)):
        solve()
    registry.serve_kernel("solve_spd", "cpu")
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(trust, "_judged", set())
    monkeypatch.setattr(trust, "_found", {})
    monkeypatch.setattr(verdicts, "_code_hash", lambda: "of another library")
    with planted("solve_spd", plain("solve_spd")):
        solve()
    assert ops.distrusted() == {} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("text", ["[", "[1]", '[{"op": 3}]', "{}"])
def test_a_spoilt_memory_is_made_again(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with planted("solve_spd", plain("solve_spd")):
        solve()
        (path,) = tmp_path.iterdir()
        assert [entry["op"] for entry in json.loads(path.read_text())] == ["solve_spd"]
        path.write_text(text)
        trust._judged.clear()
        trust._found.clear()
        solve()
    assert "unreadable" in caplog.text or text == "{}"
    assert [entry["op"] for entry in json.loads(path.read_text())] == ["solve_spd"]


def test_a_folder_that_cannot_be_written_costs_time_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr("huggingface_hub.cached_assets_path", refused)
    with planted("solve_spd", plain("solve_spd")):
        solve()
    assert not caplog.records and len(trust._found) == 1


def test_a_call_after_the_first_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    solve()

    def fails(*_: object) -> None:
        raise AssertionError("looked again")

    monkeypatch.setattr(trust, "_first_use", fails)
    solve()


def test_a_mended_kernel_serves_again() -> None:
    with planted("solve_spd", changed("solve_spd", one_element)):
        solve()
        assert served("solve_spd") == "reference"
    with planted("solve_spd", plain("solve_spd")):
        trust._judged.clear()
        trust._found.clear()
        solve()
        assert served("solve_spd") == "reference", "the memory holds"
        assert all(verdict.agrees for verdict in ops.check_kernels())
        assert served("solve_spd") == "native" and ops.distrusted() == {}


def test_without_memory_for_it_there_is_no_verdict(tmp_path: Path) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("a full device")

    with planted("solve_spd", full):
        trust.believe("solve_spd", CPU, torch.float64)
        assert not trust._found and not trust._judged and not list(tmp_path.iterdir())


def test_where_pytorch_fails_a_kernel_serves_unchecked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    op = next(op for op in registry.OPS if op.name == "gram_")
    with planted("gram_", op.plain):
        monkeypatch.setattr(registry, "OPS", [dataclasses.replace(op, plain=broken)])
        for _ in range(2):
            trust.believe("gram_", CPU, torch.float32)
        assert "gram_ on cpu (float32) serves unchecked" in caplog.text
        assert len(caplog.records) == 1, "once"
        assert served("gram_") == "native" and not list(tmp_path.iterdir())


def test_a_device_that_a_kernel_has_broken_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError("the context is gone")
        return op.plain(*arguments)

    op = next(op for op in registry.OPS if op.name == "gram_")
    monkeypatch.setattr(registry, "OPS", [dataclasses.replace(op, plain=once)])
    with planted("gram_", broken):
        with pytest.raises(RuntimeError, match="cpu answers nothing since"):
            trust.believe("gram_", CPU, torch.float32)
        # The next process knows.
        assert not next(iter(verdicts.remembered(CPU).values())).agrees


def test_torchs_own_random_numbers_go_on_as_they_were() -> None:
    before = torch.get_rng_state()
    ops.check_kernels()
    assert torch.equal(torch.get_rng_state(), before)


MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "shapes alone": FakeTensorMode,
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_modes_have_no_part_in_it(mode: str) -> None:
    with planted("gram_", plain("gram_")):
        with MODES[mode]():
            total = torch.zeros(3, 3, dtype=torch.float64, device="cpu")
            ops.gram_(total, torch.zeros(2, 3, device="cpu"), torch.zeros(2, device="cpu"))
        (verdict,) = trust._found.values()
        assert verdict.agrees and verdict.op == "gram_"


def test_a_graph_that_is_traced_holds_no_check() -> None:
    gram, rhs = spd(5, CPU), torch.randn(2, 5, dtype=torch.float64)
    with planted("solve_spd", broken):
        compiled = torch.compile(
            lambda: ops.solve_spd(gram, rhs)[0], fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled() @ gram, rhs)
        assert served("solve_spd") == "reference" and len(trust._found) == 1


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr(trust, "_settled", fails)
    gpu = torch.device("cuda:1")
    # No GPU at all: tensors of shapes alone can be on one.
    monkeypatch.setattr(trust, "_gpus", lambda: 0)
    trust.believe("solve_spd", gpu, torch.float64)
    monkeypatch.setattr(trust, "_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    trust.believe("solve_spd", gpu, torch.float64)
    assert not trust._judged
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    if registry.has_kernel("gram_", "cuda"):
        with pytest.raises(AssertionError, match="checked"):
            trust.believe("gram_", gpu, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_of_a_gpu_agree() -> None:
    checked = [v for v in ops.check_kernels() if v.device.startswith("cuda")]
    assert checked and [v for v in checked if not v.agrees] == []
