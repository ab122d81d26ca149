"""The denoiser: a `UNet2DConditionModel` that predicts the noise of latents."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from embedded.common import SEED, Sampler, autocast, cosine, load, log, save
from embedded.pipeline import UNET, build_scheduler, build_unet, export_pipeline
from embedded.vae import CAPTIONS_PER_PAIR

EMA_DECAY = 0.999
MIN_SNR = 5.0
SNAPSHOT_SECONDS = 420
CAPTION_DROPOUT = 0.1


def log_step(step: int, error: float, seconds: float) -> None:
    """Says how far training is."""
    log("unet", f"step {step + 1} error {error:.4f} {seconds:.3f} s/step")


def stage_unet(work: Path) -> None:
    """Predict the noise, min-SNR weighted; average the weights; leave snapshots on the way."""
    from diffusers.models.attention_processor import AttnProcessor

    if (work / "unet.pt").exists():
        return log("unet", "already there")
    data = load(work / "latents.pt")
    latents, states, captions = data["latents"], data["states"], data["captions"]
    row_of = {tuple(key): i for i, key in enumerate(data["keys"].tolist())}
    sampler = Sampler(data["things"].numpy(), data["styles"].numpy(), SEED + 4)
    unet = build_unet()
    unet.set_attn_processor(AttnProcessor())  # on a CPU twice as fast backwards as the fused one
    averaged = {name: value.clone() for name, value in unet.state_dict().items()}
    log("unet", f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(
        unet.parameters(), UNET["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, UNET["steps"], UNET["warmup"])
    )
    first, resume = 0, work / "unet.resume.pt"
    if resume.exists():
        state = load(resume)
        unet.load_state_dict(state["unet"])
        averaged = state["averaged"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
        sampler.rng = np.random.default_rng(SEED + 4 + first)
        torch.manual_seed(SEED + first)
    alphas = build_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=MIN_SNR) / snr
    batch, start, recent, shot = UNET["batch"], time.time(), 0.0, time.time()
    for step in range(first, UNET["steps"]):
        rows, keys = sampler(batch)
        which = torch.tensor([row_of[key] for key in keys])
        said = captions[which, torch.randint(0, CAPTIONS_PER_PAIR, (batch,))]
        said[torch.rand(batch) < CAPTION_DROPOUT] = 0  # caption 0 is the empty one
        x = latents[torch.from_numpy(rows)].float()
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (batch,))
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        with autocast():
            guess = unet(noisy, t, encoder_hidden_states=states[said].float()).sample
        error = (guess.float() - noise).square().mean((1, 2, 3))
        loss = (weights[t] * error).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        current = unet.state_dict()
        torch._foreach_lerp_([averaged[name] for name in current], [*current.values()], 1 - decay)
        recent += error.mean().item()
        if step % 100 == 99:
            log_step(step, recent / 100, (time.time() - start) / (step + 1 - first))
            recent = 0.0
        if step % 500 == 499:
            save(
                resume,
                {
                    "unet": current,
                    "averaged": averaged,
                    "step": step + 1,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                },
            )
        drafted = (work / "vae.draft.pt").exists() or (work / "vae.pt").exists()
        if drafted and time.time() - shot > SNAPSHOT_SECONDS:
            shot = time.time()
            export_pipeline(work, averaged, work / "snapshot")
            log("unet", f"snapshot at step {step + 1}")
    save(work / "unet.pt", {"averaged": averaged, "steps": UNET["steps"]})
    export_pipeline(work, averaged, work / "snapshot")
    resume.unlink(missing_ok=True)
