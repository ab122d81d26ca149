"""The denoiser: a `UNet2DConditionModel` that predicts the velocity (v) of latents."""

from __future__ import annotations

import json
import random
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embedded.bank import Sampler, open_bank, render
from embedded.captions import Caption
from embedded.common import autocast, cosine, load, log, resume, save
from embedded.corpus import noun_lemmas
from embedded.drawing import Scene
from embedded.pipeline import build_scheduler, build_unet, export_pipeline
from embedded.text_encoder import encode_text, trained_text
from embedded.tokenizer import MAX_TOKENS
from embedded.vae import encode, trained_vae
from embedded.world import world_of
from realera_fast.embedded import words

TRAIN = dict(
    batch=64,
    caption_dropout=0.1,
    min_snr=5.0,
    average=0.9995,
)
PHASES = dict(
    # What things look like.
    things=dict(
        steps=12_000,
        lr=8e-4,
        warmup=500,
        captions="said",
        scene_share=0.25,
        styled_share=0.3,
        blend_from=0.7,
        blend_share=0.3,
        blend_most=0.6,
        blend_scenes=True,
    ),
    # What stands beside what.
    scenes=dict(
        steps=6_000,
        lr=5e-4,
        warmup=200,
        captions="said",
        scene_share=0.45,
        styled_share=0.4,
        blend_from=0.0,
        blend_share=0.7,
        blend_most=0.7,
        blend_scenes=False,
    ),
    # What further words mean, so that those mean something that nobody said.
    heard=dict(
        steps=10_000,
        lr=5e-4,
        warmup=200,
        captions="heard",
        scene_share=0.5,
        styled_share=0.3,
        blend_from=0.0,
        blend_share=0.5,
        blend_most=0.6,
        blend_scenes=False,
    ),
    # Two things again, by all words.
    beside=dict(
        steps=4_000,
        lr=4e-4,
        warmup=200,
        captions="heard",
        scene_share=0.65,
        styled_share=0.4,
        blend_from=0.0,
        blend_share=0.5,
        blend_most=0.6,
        blend_scenes=False,
    ),
)
UNRELATED = 3000
"""Captions of words that name nothing here, which are blended into the real ones at the end."""
SNAPSHOT_SECONDS = 900
CHUNK = 1000


def unrelated_captions(seed: int) -> list[str]:
    """Captions of WordNet's nouns that share no word with the table."""
    table, rng = words(), random.Random(seed + 7)
    texts = [text for t in table.things for text in (t.name, *t.said, *t.unsaid, t.category)]
    taken = {word for text in texts for word in text.split()}
    free = [word for word in noun_lemmas()[0] if not taken & set(word.split())]
    chosen = rng.sample(free, UNRELATED)
    return [rng.choice(table.templates["thing"]).format(w, a=f"a {w}") for w in chosen]


def encoded(work: Path, shown: list[Scene], first: int) -> np.ndarray:
    """float16 latents `[n, 24, 8, 8]` of pictures whose drawings are aligned to the latents' cells.

    The denoiser then learns a drawing once, and not once for every size and place.
    """
    torch.set_num_threads(1)
    vae = trained_vae(work)
    pictures = render(shown, world_of(work).seed + 8, first, aligned=True)
    return (encode(vae, pictures) * vae.config.scaling_factor).half().numpy()


@torch.no_grad()
def stage_latents(work: Path) -> None:
    """Encode a picture of every scene of the bank, every caption, and the unrelated ones, once."""
    bank = open_bank(work)
    if not (work / "latents.npy").exists():
        jobs = [(work, bank.scenes[i : i + CHUNK], i) for i in range(0, len(bank.scenes), CHUNK)]
        with get_context("spawn").Pool(torch.get_num_threads()) as pool:
            latents = np.concatenate(pool.starmap(encoded, jobs, chunksize=1))
        np.save(work / "latents.part.npy", latents)
        (work / "latents.part.npy").rename(work / "latents.npy")
        log("latents", f"{latents.shape}, std {latents.astype(np.float32).std():.3f}")
    _encode_captions(work, "said", bank.captions)
    _encode_captions(work, "heard", bank.heard_captions)


def _encode_captions(work: Path, name: str, captions: list[Caption]) -> None:
    """States of the empty caption, of unrelated ones and of these, and where each is."""
    if (work / f"{name}.npy").exists():
        return log("latents", f"captions of {name} words are already there")
    tokenizer, encoder = trained_text(work)
    texts = ["", *unrelated_captions(world_of(work).seed), *(c.text for c in captions)]
    distinct = [*dict.fromkeys(texts)]
    shape = (len(distinct), MAX_TOKENS, encoder.config.hidden_size)
    states = np.lib.format.open_memmap(work / f"{name}.part.npy", "w+", np.float16, shape)
    for i in range(0, len(distinct), 256):
        with autocast():
            rows = encode_text(tokenizer, encoder, distinct[i : i + 256])
        states[i : i + 256] = rows.half().numpy()
        if i // 256 % 50 == 49:
            log("latents", f"{i} of {len(distinct)} captions")
    states.flush()
    place = {text: i for i, text in enumerate(distinct)}
    (work / f"{name}.json").write_text(json.dumps([place[text] for text in texts]))
    (work / f"{name}.part.npy").rename(work / f"{name}.npy")


class Examples:
    """Batches of latents with the text states of their captions."""

    def __init__(self, work: Path, count: int, seed: int, phase: dict) -> None:
        bank = open_bank(work)
        self.count, self.phase = count, phase
        self.lone = np.array([len(scene.things) == 1 for scene in bank.scenes])
        self.latents = np.load(work / "latents.npy", mmap_mode="r")
        words_of = phase["captions"]
        self.states = np.load(work / f"{words_of}.npy", mmap_mode="r")
        places = np.array(json.loads((work / f"{words_of}.json").read_text()))
        self.empty, self.unrelated = places[0], places[1 : 1 + UNRELATED]
        self.captions = places[1 + UNRELATED :]
        self.sampler = Sampler(bank.scenes, seed, phase["scene_share"], phase["styled_share"])
        self.rng = self.sampler.rng

    def batch(self, done: float) -> tuple[Tensor, Tensor]:
        """Latents ``[b, 24, 8, 8]`` and states ``[b, 77, width]``; ``done`` is the share of steps.

        Rows of an unrelated word's caption are blended in: words that stand in no caption lie
        between those that do, and are to draw the nearest.
        """
        count = self.count
        rows = self.sampler(count)
        said = np.where(
            self.rng.random(count) < TRAIN["caption_dropout"], self.empty, self.captions[rows]
        )
        states = torch.from_numpy(self.states[said]).float()
        if done >= self.phase["blend_from"]:
            other = torch.from_numpy(self.states[self.rng.choice(self.unrelated, count)]).float()
            amount = self.phase["blend_most"] * self.rng.random(count)
            amount *= self.rng.random(count) < self.phase["blend_share"]
            amount *= (self.lone[rows] | self.phase["blend_scenes"]) & (said != self.empty)
            states = torch.lerp(states, other, torch.from_numpy(amount).float()[:, None, None])
        return torch.from_numpy(self.latents[rows]).float(), states


def trained_unet(work: Path) -> Path:
    """Where the weights of the last phase are."""
    return work / f"unet.{[*PHASES][-1]}.pt"


def stage_unet(work: Path) -> None:
    """Train in phases, each from the averaged weights of the one before."""
    before, seed = None, world_of(work).seed
    for number, (name, phase) in enumerate(PHASES.items()):
        path = work / f"unet.{name}.pt"
        _train(work, path, phase, before, seed + 4 + 5 * number)
        before = path


def _train(work: Path, path: Path, phase: dict, start_from: Path | None, seed: int) -> None:
    """Predict the velocity (v), min-SNR weighted; average the weights; leave snapshots on the way.

    Which thing it is, only the text says where noise hides the picture. There a noise prediction
    says next to nothing of the picture, while v is the picture itself.

    Under ``torchrun`` every process takes its part of a batch; the gradients are averaged.
    """
    from diffusers.models.attention_processor import AttnProcessor

    name = path.stem
    if path.exists():
        return log(name, "already there")
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    world = world_of(work)
    unet = build_unet(world).train()
    unet.set_attn_processor(AttnProcessor())  # on a CPU twice as fast backwards as the fused one
    if start_from is not None:
        unet.load_state_dict(load(start_from)["averaged"])
    average = build_unet(world).requires_grad_(False)
    average.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(
        unet.parameters(), phase["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, phase["steps"], phase["warmup"])
    )
    training = resume(path.with_suffix(".resume.pt"), unet, average, optimizer, schedule)
    denoise = torch.compile(DistributedDataParallel(unet) if ranks > 1 else unet)
    seed += ranks * training.first + rank
    torch.manual_seed(seed)
    examples = Examples(work, TRAIN["batch"] // ranks, seed, phase)
    alphas = build_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = (1 + snr).clamp(max=1 + TRAIN["min_snr"]) / (1 + snr)
    start, recent, shot = time.time(), 0.0, time.time()
    for step in range(training.first, phase["steps"]):
        x, states = examples.batch(step / phase["steps"])
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        a = alphas[t].view(-1, 1, 1, 1)
        with autocast():
            guess = denoise(
                a.sqrt() * x + (1 - a).sqrt() * noise, t, encoder_hidden_states=states
            ).sample
        velocity = a.sqrt() * noise - (1 - a).sqrt() * x
        error = (guess.float() - velocity).square().mean((1, 2, 3))
        optimizer.zero_grad()
        (weights[t] * error).mean().backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if rank > 0:
            continue
        decay = min(TRAIN["average"], (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_([*average.parameters()], [*unet.parameters()], 1 - decay)
        recent += error.mean().item()
        if step % 100 == 99:
            pace = (time.time() - start) / (step + 1 - training.first)
            log(name, f"step {step + 1} error {recent / 100:.4f} {pace:.3f} s/step")
            recent = 0.0
        if step % 500 == 499:
            training.save(step + 1)
        if time.time() - shot > SNAPSHOT_SECONDS:
            shot = time.time()
            export_pipeline(work, average.state_dict(), work / "snapshot")
            log(name, f"snapshot at step {step + 1}")
    if rank == 0:
        save(path, {"averaged": average.state_dict(), "steps": phase["steps"]})
        export_pipeline(work, average.state_dict(), work / "snapshot")
        training.finish()
    if ranks > 1:
        dist.barrier()  # the next phase starts from what was saved
