"""Several processes train the factors that one does."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from child import child_environment
from safetensors.torch import load_file
from shared_work import shared_work
from tiny_alignment import UNCHECKED, run
from tiny_models import tiny_pipeline

from realera_fast.runtime import Checkpoint, CheckpointError, Execution, Processes
from realera_fast.runtime.checkpoint import ALIGNMENT
from realera_fast.text import TextModel

SCRIPT = """
    import dataclasses, json
    from pathlib import Path
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from safetensors.torch import save_file
    from realera_fast.text.encoders import TextModel
    from tiny_alignment import UNCHECKED, kept_in, run
    from tiny_models import tiny_pipeline

    class Lines(GeneralTracker):
        name, requires_logging_directory = "lines", False

        def __init__(self):
            super().__init__()
            self.file = open({folder!r} + "/log.jsonl", "a")

        @property
        def tracker(self):
            return self.file

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **options):
            self.file.write(json.dumps({{"step": step, **values}}) + "\\n")
            self.file.flush()

    accelerator = Accelerator(cpu=True, log_with=Lines())
    accelerator.init_trackers("alignment")
    pipe = tiny_pipeline()
    # Two processes' batches, so that the last digits agree.
    config = dataclasses.replace(
        UNCHECKED, sampling_batch_size=4, evaluation_steps=4, refresh_steps=8,
        gradient_accumulation_steps=2 // accelerator.num_processes,
    )
    result = run(
        (pipe, TextModel(pipe.text_encoder, pipe.tokenizer)), config, mode="gaussian",
        words=("cat", "kitten", "horse"),
        execution=kept_in(Path({folder!r}) / "checkpoint", accelerator=accelerator),
    )
    factors = {{f"{{n}}.down": f.down for n, f in result.lora.items()}}
    factors |= {{f"{{n}}.up": f.up for n, f in result.lora.items()}}
    factors["losses"] = torch.tensor(result.losses, dtype=torch.float64)
    factors["held_back"] = torch.tensor(result.held_back, dtype=torch.float64)
    save_file(factors, f"{folder}/rank{{accelerator.process_index}}.safetensors")
"""


ERASE = """
    import tiny_erase
    from realera_fast import Concept

    accelerator.trackers = []
    pipe = tiny_pipeline()
    config = dataclasses.replace(
        tiny_erase.CONFIG,
        mining=dataclasses.replace(tiny_erase.CONFIG.mining, member_words=16),
        alignment=dataclasses.replace(tiny_erase.FAST, check_seeds=0, steps=3),
    )
    concepts = ["cat=dog", Concept("ship", kind="explicit")]
    tiny_erase.run(pipe, concepts, config, accelerator=accelerator)
    save_file(pipe.unet.state_dict(), f"{folder}/unet{{accelerator.process_index}}.safetensors")
"""


SHARE = """
    from shared_work import shared_work

    save_file(shared_work(accelerator), f"{folder}/shared{{accelerator.process_index}}.safetensors")
"""


def launch(folder: Path, count: int, *more: str) -> Path:
    """Runs `SCRIPT`, and more behind it, in so many processes; returns the folder of its files."""
    script = folder / "train.py"
    parts = [textwrap.dedent(text) for text in (SCRIPT, *more, "accelerator.end_training()")]
    script.write_text("".join(parts).format(folder=str(folder)))
    command = [sys.executable, str(script)]
    if count > 1:
        # What `accelerate launch` starts where there are GPUs; for CPUs it would need MPI.
        run = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
        command[1:1] = run
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote that trained, then erased, then read words and drew pictures."""
    return launch(tmp_path_factory.mktemp("two"), 2, ERASE, SHARE)


def of_both(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{name}{rank}.safetensors") for rank in range(2)]


def test_two_processes_train_the_factors_of_one(two, tmp_path):
    first, second = of_both(two, "rank")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    one = load_file(launch(tmp_path, 1) / "rank0.safetensors")
    assert one.keys() == first.keys()
    torch.testing.assert_close(one.pop("held_back"), first["held_back"])
    for name, value in one.items():
        # The same parts are added up in the same order: by processes, or one after the other.
        assert torch.equal(value, first[name]), f"{name}: {(value - first[name]).abs().max()}"


def test_trackers_of_the_accelerator_get_the_losses(two):
    logged = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    # One process logs for both.
    losses = [entry["step"] for entry in logged if "alignment/loss" in entry]
    assert losses == list(range(UNCHECKED.steps))


def test_any_tracker_gets_loss_terms_by_step():
    class Accelerator:
        process_index, num_processes = 0, 1
        trackers = ("one",)
        logged: list = []

        def log(self, values, step):
            self.logged.append((step, values))

    accelerator = Accelerator()
    pipe = tiny_pipeline()
    execution = Execution(Processes(accelerator), progress=False)
    result = run(
        (pipe, TextModel(pipe.text_encoder, pipe.tokenizer)), UNCHECKED, execution=execution
    )
    losses = [(s, v["alignment/loss"]) for s, v in accelerator.logged if "alignment/loss" in v]
    assert losses == list(enumerate(result.losses))
    assert {"alignment/target", "alignment/beyond", "alignment/preserve"} <= set(
        accelerator.logged[0][1]
    )
    assert any("alignment/held_back" in values for _, values in accelerator.logged)
    json.dumps(accelerator.logged)


def test_more_processes_than_rows_are_refused():
    class Accelerator:
        process_index, num_processes, trackers = 0, 8, ()

    pipe = tiny_pipeline()
    execution = Execution(Processes(Accelerator()), progress=False)
    with pytest.raises(ValueError, match=r"batch_size: 4 rows can't be shared by 8 processes"):
        run(
            (pipe, TextModel(pipe.text_encoder, pipe.tokenizer)),
            UNCHECKED,
            execution=execution,
        )


def test_one_process_alone_exchanges_nothing():
    processes = Processes()
    values = torch.ones(3)
    processes.sum_([values])
    assert torch.equal(values, torch.ones(3)) and processes.gather(values) is values
    assert processes.is_main and processes.agreed(True, values.device)
    assert not processes.agreed(False, values.device)
    assert processes.share(5) == slice(0, 5)
    assert processes.everywhere(True, values.device)
    assert not processes.everywhere(False, values.device)
    assert processes.joined("abc") == ["a", "b", "c"]
    assert processes.summed(values, values.device) is values


def test_tensors_elsewhere_are_exchanged_on_the_accelerators_device():
    class Accelerator:
        process_index, num_processes, device = 0, 2, torch.device("meta")

        def reduce(self, values, reduction):
            assert values.device == self.device, "NCCL has no tensors of the CPU"
            return torch.full(values.shape, 2.0)

        def gather(self, values):
            assert values.device == self.device, "NCCL has no tensors of the CPU"
            return torch.full((2 * len(values),), 3.0)

    processes, cpu = Processes(Accelerator()), torch.device("cpu")
    values = [torch.ones(2), torch.ones(1, 3)]
    processes.sum_(values)
    assert all(bool((value == 2).all()) for value in values)
    assert processes.everywhere(True, cpu)
    assert processes.summed(torch.ones(3), cpu).tolist() == [2.0] * 3
    assert processes.gather(torch.ones(2)).tolist() == [3.0] * 4


def test_every_process_gets_the_same_erased_model(two):
    first, second = of_both(two, "unet")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    plain = tiny_pipeline().unet.state_dict()
    assert any(not torch.equal(value, plain[name]) for name, value in first.items())


def test_two_processes_read_draw_and_judge_half_of_it_each(two):
    first, second = of_both(two, "shared")
    one = shared_work()
    amounts = [found.pop("amounts") for found in (first, second, one)]
    # Words that stand in a block with others differ in the last digit.
    torch.testing.assert_close(first["rows"], one["rows"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first["gram"], one["gram"], rtol=1e-12, atol=1e-10)
    assert torch.equal(first["pictures"], one["pictures"]) and torch.equal(
        first["seen"], one["seen"]
    )
    assert len(first["pictures"].unique(dim=0)) > 8, "the pictures are all alike"
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    torch.testing.assert_close(first["edited"], one["edited"])
    # Words, prompts of the prior, pictures drawn, pictures judged, concepts. Each process reads
    # one prompt more for itself, and a block of four can't be divided.
    assert (amounts[0] + amounts[1] - amounts[2]).tolist() == [0, 1, 0, 0, 0]
    assert ((amounts[0] - amounts[1]).abs() <= torch.tensor([1, 4, 0, 0, 0])).all(), amounts


class Beside:
    """An accelerator whose other process adds what it is told to."""

    process_index, num_processes, trackers = 0, 2, ()
    device = torch.device("cpu")

    def __init__(self, *other: float) -> None:
        self.other, self.sums = torch.tensor(other), 0

    def reduce(self, values, reduction):
        self.sums += 1
        return values + self.other


@pytest.mark.parametrize(
    ("content", "other", "message"),
    [
        (b"nonsense", (0.0, 1.0), "is not a checkpoint of this library"),
        (None, (1.0, 0.0), "another process can't read .*alignment.safetensors"),
        (None, (0.0, 1.0), "not the same folder for all processes"),
    ],
)
def test_a_checkpoint_that_one_process_can_not_read_stops_all(tmp_path, content, other, message):
    if content is not None:
        (tmp_path / "alignment.safetensors").write_bytes(content)
    beside = Beside(*other)
    checkpoint = Checkpoint(tmp_path, "a", resume=True)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_together(ALIGNMENT, Processes(beside), torch.device("cpu"))
    # Whoever fails says so first: the other one would wait.
    assert beside.sums == 1
