"""Noise alignment: LoRA on the cross-attention projections (RealEra, stage 2).

The original U-Net teaches the edited one: one module, which is handed the text's keys and values of
either (`text_path`). Training (`training`) draws from windows of trajectories (`trajectories`). At
the end both variants, closed form alone and with the factors, draw held-back seeds of the *named*
words: the factors stay only where they bring these closer to the anchor's pictures without moving
the preserved ones further (docs/method.md, section 6.3).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from realera_fast import checkpoint, mining
from realera_fast import progress as progress_bars
from realera_fast.concept_map import ConceptMap
from realera_fast.denoiser import Structure, projections, queries_and_outputs, unwrapped
from realera_fast.lora import LoraFactors, LoraParameters
from realera_fast.pairs import AlignedPrompts
from realera_fast.processes import Processes
from realera_fast.text_path import Model, TextPath
from realera_fast.training import AlignmentConfig, DivergedError, Terms, Trainer
from realera_fast.trajectories import Denoiser, Window, WindowFiller

logger = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 30.0
"""Least time between two checkpoints: a kill loses no more than that and one step."""


class Prompts(Protocol):
    """Prompts of all words, encoded when asked for; the named words come first."""

    named: int

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> AlignedPrompts: ...


@dataclass(frozen=True)
class AlignmentScore:
    """What the original model still sees in held-back pictures (0 is perfect)."""

    target: float
    """Where pictures of named words are between the original's pictures of their anchors (0) and of
    the words (1), by how much better the word than the anchor fits them; beyond the anchor is 0."""
    neighbor: float
    """The same for words of the tokenizer near them that nobody named; random neighbors of the
    named words where there are none."""
    preserve: float
    """|x'(P) - x(P)|^2 over the spread of the original's pictures."""

    @property
    def left(self) -> float:
        """What is left of the concept, named or not."""
        return (self.target + self.neighbor) / 2


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
        latents: `[n, c, h, w]` encoded pictures by word (VAE latents times its scaling factor);
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
    path = TextPath(
        unet,
        concept_map,
        lora,
        pooled_map=pooled_map,
        mixed_precision=config.mixed_precision,
        compiled=config.compile,
    )

    def denoiser(steps: int) -> Denoiser:
        return Denoiser(
            path,
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
        path,
        config,
        mining_config.neighbor_region if drawn else None,
        seed=seed,
        processes=processes,
    )
    filler = WindowFiller(
        denoiser(config.sampling_steps),
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
    check = _Check(
        denoiser(config.check_sampling_steps),
        watched or prompts,
        preserve,
        mining_config.neighbor_region,
        config,
        seed,
        progress,
    )
    before = after = None
    with _prepared(unet, config), path.installed():
        found = keeper.load(device) if resume else None
        if config.check_seeds:
            before = check.score("edited")
        # Nothing can be better than nothing: what is left decides for all processes alike.
        if before is not None and processes.agreed(before.left <= _GONE, device):
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


_HARM = 0.1
"""So much drift of preserved pictures is taken for unharmed, in units of their spread (ours)."""
_GAIN, _GONE = 0.05, 0.1
"""Less of the concept than that is no gain, is nothing left: the measure is as noisy (ours)."""


def is_better(before: AlignmentScore, after: AlignmentScore) -> bool:
    """Whether less of the concept is left and the rest is not harmed."""
    gain = before.left - after.left
    return gain > _GAIN and after.preserve <= max(before.preserve, _HARM)


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

    def fill(number: int, model: Model, *, held_back: bool = False) -> Window:
        what = "held-back trajectories" if held_back else "trajectories"
        with progress_bars.bar(total=filler.passes, desc=what, progress=progress) as bar:
            return filler.fill(number, model, bar, held_back=held_back)

    held_back = fill(0, "edited", held_back=True) if looks else None
    window, number = None, -1
    if found is not None:
        tensors, state = found
        trainer.restore(tensors, state)
        number = int(state["window"])
        parts = {k[7:]: v for k, v in tensors.items() if k.startswith("window.")}
        window = Window.from_tensors(parts, trainer.path.device)
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


class _Check:
    """What the original model sees in pictures from seeds that training never saw."""

    def __init__(
        self,
        denoiser: Denoiser,
        watched: Prompts,
        preserve: Tensor,
        region: mining.Region,
        config: AlignmentConfig,
        seed: int,
        progress: bool | None,
    ) -> None:
        self._denoiser, self._progress = denoiser, progress
        if not config.check_seeds:
            return

        def plain(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            """`[w, t, d]` prompts of some words and of their anchors."""
            words = [watched[number] for number in numbers]
            prompts = torch.stack([word.source[word.plain] for word in words])
            return prompts, torch.stack([word.anchor[word.plain] for word in words])

        def repeat(states: Tensor) -> Tensor:
            return states.repeat_interleave(config.check_seeds, dim=0)

        named, words = watched.named, len(watched)
        source, anchor = plain(_spread(0, named, config.check_words))
        if words > named:
            near, near_anchor = plain(_spread(named, words, config.check_words))
        else:
            near = mining.sample(source, region, samples=1, seed=seed).rows()[:, 0]
            near_anchor = anchor
        chosen = _spread(0, len(preserve), max(4, len(source)))
        kept = preserve[torch.tensor(chosen, device=preserve.device)].to(source)
        self._prompts = [repeat(states) for states in (source, near, kept)]
        self._anchors = [repeat(states) for states in (anchor, near_anchor)]
        self._first = seed + _CHECK_STARTS

    @functools.cached_property
    def _original(self) -> Sequence[Tensor]:
        return self._draw(self._prompts, "original")

    @functools.cached_property
    def _ends(self) -> list[tuple[Tensor, Tensor]]:
        """`[w]` margins of the original's pictures of each group's words, and of their anchors."""
        anchored = self._draw(self._anchors, "original")
        words, anchors = self._margins(self._original), self._margins(anchored)
        return list(zip(words, anchors, strict=True))

    def score(self, model: Model) -> AlignmentScore:
        """Of the closed form alone ("edited"), or with the factors as they are ("aligned")."""
        pictures, original = self._draw(self._prompts, model), self._original
        left = []
        for seen, (word, anchor) in zip(self._margins(pictures), self._ends, strict=True):
            way = float((word - anchor).mean())
            # Where the original can't tell the two apart, nothing is known to be gone.
            place = (seen - anchor.mean()) / way if way > 0 else torch.ones_like(seen)
            left.append(float(place.clamp_min(0.0).mean()))
        moved = float((pictures[2] - original[2]).square().mean())
        spread = float((original[2] - original[2].mean(dim=0)).square().mean())
        return AlignmentScore(left[0], left[1], moved / max(spread, 1e-12))

    def _draw(self, groups: Sequence[Tensor], model: Model) -> Sequence[Tensor]:
        states = torch.cat(list(groups))
        total = self._denoiser.passes * self._denoiser.batches(len(states))
        seeds = range(self._first, self._first + len(states))
        with progress_bars.bar(
            total=total, desc=f"alignment check, {model}", progress=self._progress
        ) as bar:
            run = self._denoiser.run(states, seeds, model, bar)
        return run.latents[-1].split([len(group) for group in groups])

    def _margins(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """`[w]` how much better the words than their anchors fit, for named and for near words."""
        return [
            self._denoiser.margin(x, states, other)
            for x, states, other in zip(pictures, self._prompts, self._anchors, strict=False)
        ]


_CHECK_STARTS = 20_000
"""Seeds from here on start checked pictures."""


def _spread(start: int, stop: int, count: int) -> list[int]:
    """`count` numbers of the range, evenly over it; all of it if there are fewer."""
    count = min(count, stop - start)
    return [start + i * (stop - start) // count for i in range(count)]


def find_scheduler(unet: Any) -> Any | None:
    """The noise scheduler beside the U-Net's own files, of the class that they name; None if none.

    Raises:
        ValueError: there is one, but none that diffusers can make.
    """
    import diffusers

    name = str(getattr(unwrapped(unet).config, "_name_or_path", "") or "")
    if not name:
        return None
    place = str(Path(name).parent) if Path(name).exists() else name
    try:
        config = diffusers.DDIMScheduler.load_config(
            place, subfolder="scheduler", local_files_only=True
        )
    except (OSError, ValueError) as error:
        logger.debug("no scheduler beside %s: %s", name, error)
        return None
    why = "it is no scheduler of diffusers, or one that needs a package which is not installed"
    kind = str(config.get("_class_name") if isinstance(config, Mapping) else config)
    try:
        found = getattr(diffusers, kind, None)
        if isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin):
            # What a file leaves out is the default of its own class, not of another.
            return found.from_config(config)
    except Exception as error:
        # The file is anybody's, and so is what a class makes of it.
        why = str(error)
    raise ValueError(
        f"scheduler: {kind!r}, named beside the U-Net's files, can't be made ({why}); pass "
        "scheduler=pipe.scheduler"
    )


ASSUMED = (
    "scheduler: none was given or found beside the U-Net, so Stable Diffusion's schedule was "
    "assumed (scaled linear, 1000 steps, noise prediction): pass scheduler=pipe.scheduler"
)
"""Warning where `assumed_scheduler` had to stand in."""


def assumed_scheduler() -> Any:
    """Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    logger.warning(ASSUMED)
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


_DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Schedulers of few steps, for weights that were trained to need no more."""


def distilled(scheduler: Any, config: AlignmentConfig) -> str | None:
    """What to say where trajectories are denoised in another way than the scheduler suggests."""
    name = type(scheduler).__name__
    if name not in _DISTILLED or config.guidance_scale <= 1.0:
        return None
    return (
        f"scheduler: {name} is for weights that are distilled to few steps; alignment denoised in "
        f"{config.sampling_steps} steps with guidance {config.guidance_scale}: if the U-Net is "
        "distilled, set AlignmentConfig(sampling_steps=4, guidance_scale=1.0)"
    )
