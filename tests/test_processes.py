"""Several processes train the factors that one does."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_alignment import UNCHECKED, run
from tiny_models import tiny_pipeline

from realera_fast.checkpoint import ALIGNMENT, CheckpointError, load_together
from realera_fast.processes import Processes
from realera_fast.text import TextModel

SCRIPT = """
    import dataclasses, json, sys
    from pathlib import Path
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from safetensors.torch import save_file
    sys.path[:0] = [{tests!r}]
    import test_alignment as t

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

    if {tracked!r}:
        accelerator = Accelerator(cpu=True, log_with=Lines())
        accelerator.init_trackers("alignment")
    else:
        accelerator = Accelerator(cpu=True)
    pipe = t.tiny_pipeline()
    # Two processes' batches, so that the last digits agree.
    config = dataclasses.replace(
        t.UNCHECKED, sampling_batch_size=4, evaluation_steps=4, refresh_steps=8,
        gradient_accumulation_steps=2 // accelerator.num_processes,
    )
    result = t.run(
        (pipe, t.TextModel(pipe.text_encoder, pipe.tokenizer)), config, mode="gaussian",
        words=("cat", "kitten", "horse"), accelerator=accelerator,
        checkpoint_dir=Path({folder!r}) / "checkpoint", run="a",
    )
    factors = {{f"{{n}}.down": f.down for n, f in result.lora.items()}}
    factors |= {{f"{{n}}.up": f.up for n, f in result.lora.items()}}
    factors["losses"] = torch.tensor(result.losses, dtype=torch.float64)
    factors["held_back"] = torch.tensor(result.held_back, dtype=torch.float64)
    save_file(factors, f"{folder}/rank{{accelerator.process_index}}.safetensors")
    accelerator.end_training()
"""


def launch(
    folder: Path, count: int, tracked: bool = False, script_text: str = SCRIPT
) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    script = folder / "train.py"
    text = script_text.format(tests=str(Path(__file__).parent), folder=str(folder), tracked=tracked)
    script.write_text(textwrap.dedent(text))
    done = subprocess.run(
        [
            # What `accelerate launch` starts where there are GPUs; for CPUs it would need MPI.
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(count)),
            str(script),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(count)]


def test_two_processes_train_the_factors_of_one(tmp_path):
    first, second = launch(tmp_path / "two", 2)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    (one,) = launch(tmp_path / "one", 1)
    assert one.keys() == first.keys()
    torch.testing.assert_close(one.pop("held_back"), first["held_back"])
    for name, value in one.items():
        # The same parts are added up in the same order: by processes, or one after the other.
        assert torch.equal(value, first[name]), f"{name}: {(value - first[name]).abs().max()}"


def test_trackers_of_the_accelerator_get_the_losses(tmp_path):
    launch(tmp_path / "logged", 2, tracked=True)
    lines = (tmp_path / "logged" / "log.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
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
    result = run((pipe, TextModel(pipe.text_encoder, pipe.tokenizer)), UNCHECKED,
                 accelerator=accelerator)  # fmt: skip
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
    with pytest.raises(ValueError, match=r"batch_size: 4 rows can't be shared by 8 processes"):
        run((pipe, TextModel(pipe.text_encoder, pipe.tokenizer)), UNCHECKED,
            accelerator=Accelerator())  # fmt: skip


def test_one_process_alone_exchanges_nothing():
    processes = Processes()
    values = torch.ones(3)
    processes.sum_([values])
    assert torch.equal(values, torch.ones(3)) and processes.gather(values) is values
    assert processes.is_main and processes.agreed(True, values.device)
    assert not processes.agreed(False, values.device)
    assert processes.share(5) == slice(0, 5)


ERASE = """
    import sys
    import torch
    from accelerate import Accelerator
    from safetensors.torch import save_file
    sys.path[:0] = [{tests!r}]
    import test_erase as t

    accelerator = Accelerator(cpu=True)
    pipe = t.tiny_pipeline()
    config = t.dataclasses.replace(
        t.CONFIG, alignment=t.dataclasses.replace(t.FAST, check_seeds=0, steps=3)
    )
    concepts = ["cat=dog", t.Concept("ship", kind="explicit")]
    t.run(pipe, concepts, config, accelerator=accelerator)
    save_file(pipe.unet.state_dict(), f"{folder}/rank{{accelerator.process_index}}.safetensors")
    accelerator.end_training()
"""


def test_every_process_gets_the_same_erased_model(tmp_path):
    first, second = launch(tmp_path / "two", 2, script_text=ERASE)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    plain = tiny_pipeline().unet.state_dict()
    assert any(not torch.equal(value, plain[name]) for name, value in first.items())


class Beside:
    """An accelerator whose other process adds what it is told to."""

    process_index, num_processes, trackers = 0, 2, ()

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
    with pytest.raises(CheckpointError, match=message):
        load_together(tmp_path, "a", ALIGNMENT, Processes(beside), torch.device("cpu"))
    # Whoever fails says so first: the other one would wait.
    assert beside.sums == 1
