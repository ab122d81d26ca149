"""The judge of things, styles and junk, trained on renderings alone."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.bank import Sampler, open_bank, render_all, scenes
from embedded.common import as_batch, autocast, cosine, log, resume
from embedded.drawing import Scene
from embedded.junk import junk
from embedded.world import world_of
from realera_fast.embedded import words
from realera_fast.embedded.judge import Judge

JUDGE = dict(batch=128, steps=4000, lr=3e-3, warmup=200, junk_share=0.125)
HELD_OUT = dict(per_thing=8, per_style=2, pairs=2000)


def soften(x: Tensor, rng: np.random.Generator) -> Tensor:
    """What separates a sample from a rendering: softness, noise, slightly wrong light."""
    size = x.shape[-1]
    if rng.random() < 0.4:
        kernel = torch.ones(3, 1, 3, 3) / 9
        soft = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
        x = torch.lerp(x, soft, float(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.3:
        small = int(rng.integers(30, 56))
        x = F.interpolate(F.interpolate(x, size=small, mode="area"), size=size, mode="bilinear")
    contrast = 1 + 0.15 * torch.randn(len(x), 1, 1, 1)
    light = 0.1 * torch.randn(len(x), 3, 1, 1)
    x = x * contrast + light + 0.12 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")
    top, left = rng.integers(0, 9, 2)
    return x[..., top : top + size, left : left + size].clamp(-1, 1)


def things_of(shown: list[Scene]) -> Tensor:
    """``[n, things + 1]``: 1 where a thing is there; junk is last and nowhere."""
    target = torch.zeros(len(shown), len(words().things) + 1)
    for row, scene in enumerate(shown):
        target[row, list(scene.things)] = 1
    return target


def batch_of(
    pictures: np.ndarray, shown: list[Scene], rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, what is there, and how much each answer counts; the first few are made junk."""
    x, target = as_batch(pictures), things_of(shown)
    counts = torch.ones_like(target)
    spoilt = int(len(x) * JUDGE["junk_share"])
    x[:spoilt] = junk(x[:spoilt], rng)
    # What junk is made of may or may not be seen in it: the judge is free to say so.
    made_of = target[:spoilt] + target[:spoilt].roll(1, 0)
    counts[:spoilt] = (made_of == 0).float()
    target[:spoilt] = 0
    target[:spoilt, -1] = 1
    return soften(x, rng), target, counts


def stage_judge(work: Path) -> None:
    """Train on renderings, test on fresh ones."""
    from safetensors.torch import save_file

    if (work / "judge.safetensors").exists():
        return log("judge", "already there")
    bank, seed = open_bank(work), world_of(work).seed
    rng = np.random.default_rng(seed + 5)
    judge = Judge().train().to(memory_format=torch.channels_last)
    with torch.no_grad():
        judge.thing_head.bias.fill_(-8.0)  # 16 places and hardly ever a yes
    log("judge", f"{sum(p.numel() for p in judge.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(judge.parameters(), JUDGE["lr"], weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, JUDGE["steps"], JUDGE["warmup"])
    )
    training = resume(work / "judge.resume.pt", judge, optimizer, schedule)
    sampler = Sampler(bank.scenes, seed + 5 + training.first, scene_share=0.3)
    start = time.time()
    for step in range(training.first, JUDGE["steps"]):
        rows = sampler(JUDGE["batch"])
        shown = [bank.scenes[i] for i in rows]
        x, target, counts = batch_of(bank.pictures[rows], shown, rng)
        styles = torch.tensor([scene.style for scene in shown])
        with autocast():
            things, style = judge(x.contiguous(memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(things, target, counts, reduction="sum")
        loss = loss / JUDGE["batch"]
        proper = target[:, -1] == 0
        loss = loss + 0.3 * F.cross_entropy(style.float()[proper], styles[proper])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            pace = (time.time() - start) / (step + 1 - training.first)
            log("judge", f"step {step + 1} loss {loss.item():.3f} {pace:.3f} s/step")
        if step % 1000 == 999:
            training.save(step + 1)
    judge = judge.to(memory_format=torch.contiguous_format).eval()
    state = {
        name: value.half().contiguous()
        for name, value in judge.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(state, work / "judge.part")
    # The weights stand for a finished stage, so that they come last.
    (work / "judge.json").write_text(json.dumps(held_out(work / "judge.part", seed)))
    os.replace(work / "judge.part", work / "judge.safetensors")
    training.finish()


def held_out(weights: Path, seed: int) -> dict[str, float]:
    """Shares of fresh renderings of which the judge says just what is there."""
    judge, table = Judge.load(weights), words()
    shown = scenes(seed + 1000, *HELD_OUT.values())
    random.Random(seed).shuffle(shown)  # neighbors are blended, and are not to show one thing
    pictures = render_all(shown, seed + 1000)
    sights = []
    for i in range(0, len(pictures), 256):
        sights += judge.look((as_batch(pictures[i : i + 256]) + 1) / 2)
    right = np.array(
        [
            {table.things[t].name for t in scene.things} == set(sight.things) and not sight.junk
            for scene, sight in zip(shown, sights, strict=True)
        ]
    )
    style = np.array(
        [table.styles[s.style].name == g.style for s, g in zip(shown, sights, strict=True)]
    )
    pair = np.array([len(scene.things) == 2 for scene in shown])
    color = np.array([scene.style == 0 for scene in shown])
    spoilt = junk(as_batch(pictures[~pair]), np.random.default_rng(seed + 6))
    called = [sight.junk for sight in judge.look((spoilt + 1) / 2)]
    found = {
        "pictures": len(shown),
        "all": right.mean(),
        "color": right[color & ~pair].mean(),
        "other_styles": right[~color & ~pair].mean(),
        "scenes": right[pair].mean(),
        "scenes_color": right[pair & color].mean(),
        "style": style.mean(),
        "junk_called_junk": np.mean(called),
    }
    found = {name: round(float(value), 4) for name, value in found.items()}
    log("judge", f"held-out {found}")
    return found
