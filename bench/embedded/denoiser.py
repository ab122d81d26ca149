"""The training that every denoiser shares: phases, averaged weights, checkpoints, processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embedded.common import cosine, load, log, resume, save
from embedded.examples import Examples, Phase
from embedded.world import World, world_of

TRAIN = dict(batch=64, average=0.9995)
CHECKPOINT_SECONDS = 300
SNAPSHOT_SECONDS = 900


@dataclass(frozen=True)
class Denoiser:
    """What one kind of denoiser differs by from another."""

    name: str
    """Of its stage and its files."""
    phases: Mapping[str, Phase]
    seed: int
    """Added to the world's; every phase adds five more."""
    build: Callable[[World], Any]
    ready: Callable[[Any], None]
    """Gets a module into the form in which it is trained, compiled."""
    examples: Callable[[Path, int, Phase], Examples]
    loss: Callable[[Callable[..., Any], tuple[Tensor, ...]], tuple[Tensor, Tensor]]
    """Of the module and a batch: what is minimized, and the plain error."""
    export: Callable[[Path, dict[str, Tensor], Path], None]
    """Writes averaged weights as the folder that is loaded."""

    def weights(self, work: Path, phase: str | None = None) -> Path:
        """Where the weights of a phase are, the last if none is named."""
        return work / f"{self.name}.{phase or [*self.phases][-1]}.pt"


def train(work: Path, denoiser: Denoiser) -> None:
    """Train in phases, each from the averaged weights of the one before."""
    before, seed = None, world_of(work).seed + denoiser.seed
    for number, name in enumerate(denoiser.phases):
        _phase(work, denoiser, name, before, seed + 5 * number)
        before = denoiser.weights(work, name)


def generators(seed: int, step: int, rank: int) -> np.random.Generator:
    """Seed torch for one step; a resumed training then draws what an unbroken one does.

    Returns:
        The generator of the step's examples.
    """
    own, theirs = np.random.SeedSequence([seed, step, rank]).spawn(2)
    torch.manual_seed(int(own.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return np.random.default_rng(theirs)


def _phase(work: Path, denoiser: Denoiser, phase: str, before: Path | None, seed: int) -> None:
    """One phase; leaves checkpoints and snapshots on the way.

    Under ``torchrun`` every process takes its part of a batch; the gradients are averaged.
    """
    path, settings = denoiser.weights(work, phase), denoiser.phases[phase]
    name, steps = path.stem, settings["steps"]
    if path.exists():
        return log(name, "already there")
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    world = world_of(work)
    module, average = denoiser.build(world).train(), denoiser.build(world).requires_grad_(False)
    denoiser.ready(module)
    if before is not None:
        module.load_state_dict(load(before)["averaged"])
    average.load_state_dict(module.state_dict())
    optimizer = torch.optim.AdamW(
        module.parameters(), settings["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, steps, settings["warmup"])
    )
    training = resume(path.with_suffix(".resume.pt"), module, average, optimizer, schedule)
    denoise = DistributedDataParallel(module) if ranks > 1 else module
    examples = denoiser.examples(work, TRAIN["batch"] // ranks, settings)
    start, recent, kept, shot = time.time(), 0.0, time.time(), time.time()
    for step in range(training.first, steps):
        rng = generators(seed, step, rank)
        loss, error = denoiser.loss(denoise, examples.batch(step / steps, rng))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if rank > 0:
            continue
        decay = min(TRAIN["average"], (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_([*average.parameters()], [*module.parameters()], 1 - decay)
        recent += error.item()
        if step % 100 == 99:
            pace = (time.time() - start) / (step + 1 - training.first)
            log(name, f"step {step + 1} error {recent / 100:.4f} {pace:.3f} s/step")
            recent = 0.0
        if time.time() - kept > CHECKPOINT_SECONDS:
            training.save(step + 1)
            kept = time.time()
        if time.time() - shot > SNAPSHOT_SECONDS:
            denoiser.export(work, average.state_dict(), work / f"snapshot.{denoiser.name}")
            log(name, f"snapshot at step {step + 1}")
            shot = time.time()
    if rank == 0:
        save(path, {"averaged": average.state_dict(), "steps": steps})
        denoiser.export(work, average.state_dict(), work / f"snapshot.{denoiser.name}")
        training.finish()
    if ranks > 1:
        dist.barrier()  # the next phase starts from what was saved
