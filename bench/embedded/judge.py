"""The classifier of things and styles that says what pictures show."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.common import SEED, Sampler, as_batch, autocast, bank, cosine, load, log
from embedded.emoji_data import Fonts, render_all
from embedded.vae import project, trained_vae

JUDGE = dict(batch=128, steps=1200, lr=3e-3, latent_noise=0.2)


def soften(x: Tensor, rng: np.random.Generator) -> Tensor:
    """What separates a sample from a rendering: softness, noise, slightly wrong light."""
    if rng.random() < 0.4:
        kernel = torch.ones(3, 1, 3, 3) / 9
        soft = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
        x = torch.lerp(x, soft, float(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.3:
        size = int(rng.integers(28, 56))
        x = F.interpolate(F.interpolate(x, size=size, mode="area"), size=64, mode="bilinear")
    contrast = 1 + 0.15 * torch.randn(len(x), 1, 1, 1)
    light = 0.1 * torch.randn(len(x), 3, 1, 1)
    x = x * contrast + light + 0.15 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")
    top, left = rng.integers(0, 9, 2)
    return x[..., top : top + 64, left : left + 64].clamp(-1, 1)


@torch.no_grad()
def through_vae(work: Path, pictures: np.ndarray, noise: float) -> np.ndarray:
    """Pictures after projection, some noise and the decoder."""
    vae, basis, out = trained_vae(work), load(work / "basis.pt"), []
    for i in range(0, len(pictures), 64):
        z = project(basis, as_batch(pictures[i : i + 64]))
        with autocast():
            y = vae.decode(z + noise * torch.randn_like(z)).sample.float()
        out.append(((y.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


def judge_accuracy(judge, pictures: np.ndarray, things: np.ndarray, styles: np.ndarray):
    right_thing = right_style = 0
    for i in range(0, len(pictures), 256):
        said = judge.probabilities((as_batch(pictures[i : i + 256]) + 1) / 2)
        right_thing += (said[0].argmax(1).numpy() == things[i : i + 256]).sum()
        right_style += (said[1].argmax(1).numpy() == styles[i : i + 256]).sum()
    return right_thing / len(pictures), right_style / len(pictures)


def stage_judge(work: Path) -> None:
    """Renderings, a third of them passed through the autoencoder; tested on fresh ones."""
    from safetensors.torch import save_file

    from realera_fast.embedded.judge import Judge

    if (work / "judge.safetensors").exists():
        return log("judge", "already there")
    pictures, things, styles = bank(work)
    rng = np.random.default_rng(SEED + 5)
    passed = np.sort(rng.permutation(len(pictures))[: len(pictures) // 3])
    pictures[passed] = through_vae(work, pictures[passed], JUDGE["latent_noise"])
    sampler = Sampler(things, styles, SEED + 5)
    judge = Judge().train().to(memory_format=torch.channels_last)
    log("judge", f"{sum(p.numel() for p in judge.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(judge.parameters(), JUDGE["lr"], weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, JUDGE["steps"], 100)
    )
    start = time.time()
    for step in range(JUDGE["steps"]):
        rows, keys = sampler(JUDGE["batch"])
        x = soften(as_batch(pictures[rows]), rng)
        target = torch.tensor(keys)
        with autocast():
            thing, style = judge(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(thing.float(), target[:, 0], label_smoothing=0.05)
        loss = loss + 0.5 * F.cross_entropy(style.float(), target[:, 1], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            log(
                "judge",
                f"step {step + 1} loss {loss.item():.3f} "
                f"{(time.time() - start) / (step + 1):.3f} s/step",
            )
    judge = judge.to(memory_format=torch.contiguous_format).eval()
    state = {
        name: value.half().contiguous()
        for name, value in judge.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(state, work / "judge.part")
    os.replace(work / "judge.part", work / "judge.safetensors")
    judge = Judge.load(work / "judge.safetensors")
    fresh, things, styles = render_all(Fonts.find(), 20, 8, seed=SEED + 1000)
    found = {"count": len(fresh)}
    for name, seen in (("renderings", fresh), ("decoded", through_vae(work, fresh, 0.1))):
        every = judge_accuracy(judge, seen, things, styles)
        plain = styles == 0
        color = judge_accuracy(judge, seen[plain], things[plain], styles[plain])
        found[name] = {
            "things": float(every[0]),
            "styles": float(every[1]),
            "things_color": float(color[0]),
        }
        log("judge", f"held-out {name}: {found[name]}")
    (work / "judge.json").write_text(json.dumps(found))
