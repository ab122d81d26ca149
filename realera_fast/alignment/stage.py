"""Noise alignment: LoRA on the projections of text (RealEra, stage 2).

The original denoiser teaches the edited one: one module, run as either (`SharedDenoiser`). Training
(`trainer`) takes its points from windows of trajectories (`windows`). At the end both variants,
closed form alone and with the factors, generate images from held-out seeds of the *named* words
(`check`): the factors stay only where they bring these closer to the anchor's images, or with the
adversary "worst" hold an attack better, and the preserved ones hardly move (docs/method.md, section
6.3).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from realera_fast import mining
from realera_fast.alignment.adversary import (
    adversarial_target_of,
    adversary_of,
    worst_neighbor,
)
from realera_fast.alignment.check import THERE, AlignmentScore, HeldOutCheck, is_better
from realera_fast.alignment.config import AlignmentConfig
from realera_fast.alignment.denoisers import (
    ClosedForm,
    new_factors,
    sampler_of,
    shared_denoiser,
)
from realera_fast.alignment.prompts import AlignmentPrompts
from realera_fast.alignment.trainer import DivergedError, Terms, Trainer
from realera_fast.alignment.windows import Window, WindowFiller
from realera_fast.models import LoraFactors, Structure
from realera_fast.runtime import Execution, Processes, checkpoint, progress_bar, unwrapped
from realera_fast.unet import Sampler, Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alignment:
    """The outcome of the stage."""

    lora: Mapping[str, LoraFactors]
    """Factors by projection name; empty where the closed form alone was better."""
    kept: bool
    closed_form: AlignmentScore | None
    aligned: AlignmentScore | None
    losses: tuple[float, ...]
    """Training loss of each step."""
    held_back: tuple[float, ...]
    """Loss of held-out prompts at each evaluation; the first is the closed form's."""
    stopped: str
    """Why training ended."""
    seconds: float
    timesteps: tuple[float, ...] = ()
    """Time steps that targets were trained at."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for the report."""
        return {
            "kept": self.kept,
            "closed_form": None if self.closed_form is None else asdict(self.closed_form),
            "aligned": None if self.aligned is None else asdict(self.aligned),
            "first_loss": self.losses[0] if self.losses else None,
            "last_loss": self.losses[-1] if self.losses else None,
            "held_back": list(self.held_back),
            "steps": len(self.losses),
            "stopped": self.stopped,
            "timesteps": list(self.timesteps),
            "seconds": self.seconds,
        }


NOT_ALIGNED = Alignment({}, False, None, None, (), (), "not run", 0.0)
"""The outcome where the stage is off."""


def align_noise(
    model: Any,
    scheduler: Any,
    closed_form: ClosedForm,
    prompts: AlignmentPrompts,
    config: AlignmentConfig,
    mining_config: mining.MiningConfig,
    *,
    seed: int,
    execution: Execution,
) -> Alignment:
    """Trains LoRA factors on top of the closed form; the model is unchanged on return.

    Memory does not grow with the number of words: a window of trajectories holds a few.

    Args:
        model: the original `UNet2DConditionModel`, or a transformer of `models.is_joint`.
        scheduler: its scheduler (a diffusers one, which is not changed).
        closed_form: what the weights are edited by; with a map of the pooled vector (SDXL, SD3,
            FLUX.1) every prompt has the vector as its last row (`text.TextWithPooled`).
        seed: all randomness comes from it.
        execution: its processes share the work, and the accelerator's trackers get the losses; its
            checkpoint is replaced as training goes on.

    Raises:
        CheckpointError: the checkpoint can't be read or is of another run.
        ValueError: more processes than rows in a batch.
    """
    started = time.perf_counter()
    processes = execution.processes
    _check_batch(config, processes)
    lora = new_factors(model, config, seed, closed_form.moments)
    shared = shared_denoiser(model, closed_form, lora, config, zero_rows=prompts.zero_rows)

    def sampler(steps: int) -> Sampler:
        return sampler_of(shared, scheduler, prompts.empty, config, steps)

    adversary = adversary_of(shared, config, mining_config)
    moving = adversarial_target_of(shared, config, mining_config)
    trainer = Trainer(shared, config, adversary, target=moving, seed=seed, processes=processes)
    filler = WindowFiller(
        sampler(config.sampling_steps),
        prompts.trained,
        prompts.preserve,
        config,
        beyond_region=mining_config.beyond_region if config.beyond_scale else None,
        latents=prompts.latents,
        seed=seed,
        processes=processes,
    )

    def check_of(starts: int) -> HeldOutCheck:
        return HeldOutCheck(
            sampler(config.check_sampling_steps),
            prompts,
            mining_config.neighbor_region,
            worst_neighbor(shared, config, mining_config),
            dataclasses.replace(config, check_seeds=starts),
            seed,
            execution.main_progress,
        )

    check, counts_worst = check_of(config.check_seeds), config.adversary == "worst"
    before = after = None
    with prepared(model, config), shared.installed():
        saved = execution.checkpoint.load_together(checkpoint.ALIGNMENT, processes, shared.device)
        if config.check_seeds:
            # Most closed forms leave nothing; where it is plain, one start of each prompt shows it.
            # An adversary brings something back from each.
            brief = config.check_seeds > 1 and not counts_worst
            before = check_of(1).score("edited") if brief else None
            if before is None or not before.shows <= THERE / 2:
                before = check.score("edited")
        # What does not show is not worth minutes, but an attack finds what does not.
        # What is left decides for all processes alike.
        nothing = before is not None and not counts_worst and before.shows <= THERE
        if processes.agreed(nothing, shared.device):
            stopped, kept = "the closed form left nothing that shows", False
        else:
            stopped = _train(trainer, filler, execution, saved)
            trainer.use_best()
            kept = not config.evaluation_steps or trainer.best_look > 0
            if before is not None and kept:
                after = check.score("aligned")
                kept = is_better(before, after, worst=counts_worst)
            if not kept:
                logger.info("alignment did not improve held-back prompts: closed form alone")
        factors = shared.lora.factors()
    # Processes may differ in the last digits; they must not differ in what they return.
    kept = processes.agreed(kept, shared.device)
    return Alignment(
        factors if kept else {},
        kept,
        before,
        after,
        tuple(trainer.losses),
        tuple(trainer.held_back),
        stopped,
        time.perf_counter() - started,
        tuple(filler.sampler.timesteps[filler.trained].tolist()) if trainer.losses else (),
    )


def _check_batch(config: AlignmentConfig, processes: Processes) -> None:
    """Makes sure that every process has rows of every part of a batch."""
    if config.batch_size < processes.count * config.gradient_accumulation_steps:
        raise ValueError(
            f"AlignmentConfig.batch_size: {config.batch_size} rows can't be shared by "
            f"{processes.count} processes in {config.gradient_accumulation_steps} parts; raise it"
        )


@contextlib.contextmanager
def prepared(denoiser: Any, config: AlignmentConfig) -> Iterator[None]:
    """Evaluation mode, frozen weights and checkpointing as asked for; all as before afterwards."""
    model: Any = unwrapped(denoiser)
    structure = Structure(model)
    checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
    try:
        model.eval().requires_grad_(False)
        if config.gradient_checkpointing and not checkpointing:
            model.enable_gradient_checkpointing()
        yield
    finally:
        structure.restore()
        if config.gradient_checkpointing and not checkpointing:
            model.disable_gradient_checkpointing()


def _save(
    execution: Execution, trainer: Trainer, window: Window, number: int, *, always: bool = False
) -> None:
    """Writes the checkpoint if it is time. Every process holds the same, so one writes."""
    name, saved = checkpoint.ALIGNMENT, execution.checkpoint
    if execution.processes.is_main and saved.is_due(name, always=always):
        tensors = trainer.tensors() | {f"window.{k}": v for k, v in window.tensors().items()}
        saved.save(name, tensors, {**trainer.state(), "window": number})


def _train(
    trainer: Trainer,
    filler: WindowFiller,
    execution: Execution,
    saved: checkpoint.State | None,
) -> str:
    """All steps that are left. Returns why it ended."""
    config, progress = trainer.config, execution.main_progress
    windows = filler.windows(config.steps, config.refresh_steps)
    refresh = -(-config.steps // windows)
    looks = config.evaluation_steps

    def fill(number: int, variant: Variant, *, held_back: bool = False) -> Window:
        what = "held-back trajectories" if held_back else "trajectories"
        with progress_bar(
            total=filler.passes(held_back=held_back), desc=what, progress=progress
        ) as bar:
            return filler.fill(number, variant, bar, held_back=held_back)

    if config.timesteps == "discriminative":
        own = filler.trajectories // filler.processes.count
        total = filler.sampler.passes * filler.sampler.batches(own)
        with progress_bar(total=total, desc="time steps", progress=progress) as bar:
            filler.choose(bar)
    held_back = fill(0, "edited", held_back=True) if looks else None
    window, number = None, -1
    if saved is not None:
        trainer.restore(saved.tensors, saved.values)
        number = int(saved.values["window"])
        prefix = "window."
        parts = {
            name.removeprefix(prefix): tensor
            for name, tensor in saved.tensors.items()
            if name.startswith(prefix)
        }
        window = Window.from_tensors(parts, trainer.shared.device)
        logger.info("resumed after step %d", len(trainer.losses))
    elif held_back is None:
        trainer.keep()
    else:
        trainer.look(held_back)
    done = len(trainer.losses)
    with progress_bar(total=config.steps, initial=done, desc="alignment", progress=progress) as bar:
        for step in range(done, config.steps):
            if looks and trainer.is_exhausted:
                return f"no improvement on held-back prompts after {len(trainer.losses)} steps"
            if trainer.is_reached:
                return f"held-back prompts are where they should be after {step} steps"
            if window is None or step // refresh != number:
                number = step // refresh
                # Before the first step the factors change nothing.
                window = fill(number, "aligned" if number else "edited")
                _save(execution, trainer, window, number)
            try:
                terms = trainer.step(window, step)
                if held_back is None:
                    trainer.keep()
                elif (step + 1) % looks == 0 or step + 1 == config.steps:
                    _log_look(trainer, trainer.look(held_back))
            except DivergedError as error:
                logger.warning("alignment diverged, the last good factors stay: %s", error)
                return f"diverged: {error}"
            trainer.processes.log(
                {f"alignment/{name}": value for name, value in terms.to_dict().items()}, step
            )
            bar.set_postfix(_shown(terms))
            bar.update(1)
            _save(execution, trainer, window, number)
    if window is not None:
        _save(execution, trainer, window, number, always=True)
    return "all steps done"


def _shown(terms: Terms) -> dict[str, str]:
    return {name: f"{value:.2e}" for name, value in terms.to_dict().items()}


def _log_look(trainer: Trainer, loss: float) -> None:
    trainer.processes.log({"alignment/held_back": loss}, len(trainer.losses) - 1)
    logger.debug("held-back loss %.3e after %d steps", loss, len(trainer.losses))
