"""Noise alignment: LoRA on the cross-attention projections (RealEra, stage 2).

The original U-Net teaches the edited one: one module, which is handed the text's keys and values of
either (`SharedUNet`). Training (`trainer`) draws from windows of trajectories (`windows`). At
the end both variants, closed form alone and with the factors, draw held-back seeds of the *named*
words: the factors stay only where they bring these closer to the anchor's images without moving
the preserved ones further (docs/method.md, section 6.3).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera_fast import mining
from realera_fast.alignment.check import GONE, AlignmentScore, HeldOutCheck, Prompts, is_better
from realera_fast.alignment.config import AlignmentConfig
from realera_fast.alignment.trainer import DivergedError, Terms, Trainer
from realera_fast.alignment.windows import Window, WindowFiller
from realera_fast.models import LoraFactors, Structure, projections, queries_and_outputs
from realera_fast.runtime import Processes, checkpoint, unwrapped
from realera_fast.runtime import progress as progress_bars
from realera_fast.solver import ConceptMap
from realera_fast.unet import DDIMSampler, LoraParameters, SharedUNet, Variant

logger = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 30.0
"""Least time between two checkpoints: a kill loses no more than that and one step."""


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
    """Loss of held-back prompts at each look; the first is the closed form's."""
    stopped: str
    """Why training ended."""
    seconds: float

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
            "seconds": self.seconds,
        }


NOT_ALIGNED = Alignment({}, False, None, None, (), (), "not run", 0.0)
"""The outcome where the stage is off."""


def align_noise(
    unet: Any,
    scheduler: Any,
    concept_map: ConceptMap,
    *,
    prompts: Prompts,
    watched: Prompts | None = None,
    preserve: Tensor,
    empty: Tensor,
    config: AlignmentConfig,
    mining_config: mining.MiningConfig,
    pooled_map: ConceptMap | None = None,
    latents: Mapping[str, Tensor] | None = None,
    seed: int,
    accelerator: Any = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    run: str = "",
    progress: bool | None = None,
) -> Alignment:
    """Trains LoRA factors on top of the closed form; the U-Net is unchanged on return.

    Memory does not grow with the number of words: a window of trajectories holds a few.

    Args:
        unet: the original `UNet2DConditionModel`.
        scheduler: its noise scheduler (a diffusers one; only its config is used).
        concept_map: the closed form, T = I + L R.
        prompts: of the words that the user named, then of mined neighbors.
        watched: the same for the check: named words, then words near them, mined or not; None is
            `prompts`.
        preserve: `[p, t, d]` prompts that keep their prediction.
        empty: `[1, t, d]` embedding of the empty prompt, for guidance.
        pooled_map: the closed form of the pooled vector, for SDXL; every prompt then has the vector
            as its last row (`text.TextWithPooled`).
        latents: `[n, c, h, w]` encoded images by word (VAE latents times its scaling factor);
            z_t of these words is noised from them in place of a trajectory.
        seed: all randomness comes from it.
        accelerator: an `accelerate.Accelerator`; its processes share the work, its trackers get the
            losses.
        checkpoint_dir: folder of a checkpoint, replaced as training goes on.
        resume: continue from that checkpoint if there is one.
        run: identifies model, concepts and settings, so that no other run is continued.

    Raises:
        CheckpointError: the checkpoint can't be read or is of another run.
        ValueError: more processes than rows in a batch.
    """
    started = time.perf_counter()
    processes = Processes(accelerator)
    if config.batch_size < processes.count * config.gradient_accumulation_steps:
        raise ValueError(
            f"AlignmentConfig.batch_size: {config.batch_size} rows can't be shared by "
            f"{processes.count} processes in {config.gradient_accumulation_steps} parts; raise it"
        )
    # Bars of other processes would draw over this one's.
    progress = progress if processes.is_main else False
    text_layers = {
        name: layer
        for name, layer in projections(unet).items()
        if name.endswith(tuple(f".{leaf}" for leaf in config.target_modules))
    }
    hidden_layers = {
        name: layer
        for name, layer in queries_and_outputs(unet).items()
        if name.endswith(tuple(f".{leaf}" for leaf in config.target_modules))
    }
    device = next(iter(projections(unet).values())).weight.device
    lora = LoraParameters(
        text_layers,
        hidden_layers,
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        seed=seed,
        device=device,
    )
    shared = SharedUNet(
        unet,
        concept_map,
        lora,
        pooled_map=pooled_map,
        mixed_precision=config.mixed_precision,
        compiled=config.compile,
    )

    def sampler(steps: int) -> DDIMSampler:
        return DDIMSampler(
            shared,
            scheduler,
            empty,
            steps=steps,
            guidance_scale=config.guidance_scale,
            latent_size=config.latent_size,
            batch_size=config.sampling_batch_size,
        )

    drawn = mining_config.mode in ("gaussian", "offset")
    drawn = drawn and mining_config.neighbor_scale > 0
    trainer = Trainer(
        shared,
        config,
        mining_config.neighbor_region if drawn else None,
        seed=seed,
        processes=processes,
    )
    filler = WindowFiller(
        sampler(config.sampling_steps),
        prompts,
        preserve,
        trajectories=-(-config.trajectories // processes.count) * processes.count,
        min_timestep=config.min_timestep,
        negative_guidance=config.negative_guidance,
        beyond_region=mining_config.beyond_region if config.beyond_scale else None,
        latents=latents or {},
        seed=seed,
        processes=processes,
    )
    keeper = _Checkpoints(checkpoint_dir, run, processes)
    check = HeldOutCheck(
        sampler(config.check_sampling_steps),
        watched or prompts,
        preserve,
        mining_config.neighbor_region,
        config,
        seed,
        progress,
    )
    before = after = None
    with _prepared(unet, config), shared.installed():
        found = keeper.load(device) if resume else None
        if config.check_seeds:
            before = check.score("edited")
        # Nothing can be better than nothing: what is left decides for all processes alike.
        if before is not None and processes.agreed(before.left <= GONE, device):
            stopped, kept = "the closed form left nothing to remove", False
        else:
            stopped = _train(trainer, filler, keeper, found, progress)
            trainer.use_best()
            kept = not config.evaluation_steps or trainer.best_look > 0
            if before is not None and kept:
                after = check.score("aligned")
                kept = is_better(before, after)
            if not kept:
                logger.info("alignment did not improve held-back prompts: closed form alone")
        factors = lora.factors()
    # Processes may differ in the last digits; they must not differ in what they return.
    kept = processes.agreed(kept, device)
    return Alignment(
        factors if kept else {},
        kept,
        before,
        after,
        tuple(trainer.losses),
        tuple(trainer.held_back),
        stopped,
        time.perf_counter() - started,
    )


@contextlib.contextmanager
def _prepared(unet: Any, config: AlignmentConfig) -> Iterator[None]:
    """Evaluation mode, frozen weights and checkpointing as asked for; all as before afterwards."""
    model: Any = unwrapped(unet)
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


class _Checkpoints:
    """Writes the checkpoint of a run now and then; does nothing without a folder."""

    def __init__(self, folder: Path | None, run: str, processes: Processes) -> None:
        self._folder, self._run, self._processes = folder, run, processes
        self._last = time.monotonic()

    def load(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was written last, the same for every process.

        Raises:
            CheckpointError: it is broken, of another run, or not there for every process.
        """
        if self._folder is None:
            return None
        return checkpoint.load_together(
            self._folder, self._run, checkpoint.ALIGNMENT, self._processes, device
        )

    def offer(
        self, trainer: Trainer, window: Window | None, number: int, *, always: bool = False
    ) -> None:
        """Writes if it is time. Every process holds the same, so one writes."""
        now = time.monotonic()
        if self._folder is None or window is None or not self._processes.is_main:
            return
        if always or now - self._last >= _CHECKPOINT_SECONDS:
            tensors = trainer.tensors() | {f"window.{k}": v for k, v in window.tensors().items()}
            state = {**trainer.state(), "window": number}
            checkpoint.save(self._folder, tensors, state, self._run, checkpoint.ALIGNMENT)
            self._last = now


def _train(
    trainer: Trainer,
    filler: WindowFiller,
    keeper: _Checkpoints,
    found: tuple[dict[str, Tensor], dict[str, Any]] | None,
    progress: bool | None,
) -> str:
    """All steps that are left. Returns why it ended."""
    config = trainer.config
    windows = filler.windows(config.steps, config.refresh_steps)
    refresh = -(-config.steps // windows)
    looks = config.evaluation_steps

    def fill(number: int, variant: Variant, *, held_back: bool = False) -> Window:
        what = "held-back trajectories" if held_back else "trajectories"
        with progress_bars.bar(total=filler.passes, desc=what, progress=progress) as bar:
            return filler.fill(number, variant, bar, held_back=held_back)

    held_back = fill(0, "edited", held_back=True) if looks else None
    window, number = None, -1
    if found is not None:
        tensors, state = found
        trainer.restore(tensors, state)
        number = int(state["window"])
        parts = {k[7:]: v for k, v in tensors.items() if k.startswith("window.")}
        window = Window.from_tensors(parts, trainer.shared.device)
        logger.info("resumed after step %d", len(trainer.losses))
    elif held_back is None:
        trainer.keep()
    else:
        trainer.look(held_back)
    done = len(trainer.losses)
    with progress_bars.bar(
        total=config.steps, initial=done, desc="alignment", progress=progress
    ) as bar:
        for step in range(done, config.steps):
            if looks and trainer.is_exhausted:
                return f"no improvement on held-back prompts after {len(trainer.losses)} steps"
            if window is None or step // refresh != number:
                number = step // refresh
                # Before the first step the factors change nothing.
                window = fill(number, "aligned" if number else "edited")
                keeper.offer(trainer, window, number)
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
            keeper.offer(trainer, window, number)
    keeper.offer(trainer, window, number, always=True)
    return "all steps done"


def _shown(terms: Terms) -> dict[str, str]:
    return {name: f"{value:.2e}" for name, value in terms.to_dict().items()}


def _log_look(trainer: Trainer, loss: float) -> None:
    trainer.processes.log({"alignment/held_back": loss}, len(trainer.losses) - 1)
    logger.debug("held-back loss %.3e after %d steps", loss, len(trainer.losses))
