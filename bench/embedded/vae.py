"""The `AutoencoderKL` between pictures and latents."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedded.bank import Bank, Sampler, open_bank, render_all, scenes
from embedded.common import as_batch, autocast, cosine, load, log, resume, save
from embedded.drawing import SIZE
from embedded.world import world_of

VAE = dict(
    channels=(32, 48, 96, 128),
    latent=24,
    batch=16,
    joint_steps=2000,
    steps=7000,
    lr=1e-3,
    warmup=200,
    noise=0.1,
    edges=1.0,
    pull=0.05,
    pull_steps=1500,
)


def build_vae(seed: int, scaling_factor: float = 1.0):
    """Eightfold smaller and 24 channels deep: an eighth of the picture's numbers."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    levels = len(VAE["channels"])
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=VAE["channels"],
        layers_per_block=1,
        latent_channels=VAE["latent"],
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=scaling_factor,
    )
    with torch.no_grad():  # start nearly without noise: unit noise hides the picture for long
        vae.quant_conv.weight[VAE["latent"] :] *= 0.1
        vae.quant_conv.bias[VAE["latent"] :] = -5.0
    return vae


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def fit_basis(pictures: np.ndarray, seed: int) -> dict[str, Tensor]:
    """The leading principal components of 8x8 patches, as a strided convolution.

    The components are scaled by the fourth root of their variance: half-way to white, so that
    coarse structure still emerges before detail when noise is taken away.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(pictures))[:4000])
    patches = F.unfold(as_batch(pictures[rows]), 8, stride=8).transpose(1, 2).reshape(-1, 192)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    values, vectors = values.flip(0)[: VAE["latent"]], vectors.flip(1)[:, : VAE["latent"]]
    # The sign of an eigenvector is arbitrary and depends on the number of threads.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    log("vae", f"components keep {values.sum() / patches.var(0).sum():.3f} of the variance")
    scale = values**-0.25 / values.sqrt().mean().sqrt()
    weight = (vectors * scale).T
    return {"weight": weight.reshape(-1, 3, 8, 8).contiguous(), "bias": -weight @ mean}


def project(basis: dict[str, Tensor], x: Tensor) -> Tensor:
    """Pictures to the latents that the encoder starts from, ``[n, 24, 8, 8]``."""
    return F.conv2d(x, basis["weight"], basis["bias"], stride=8)


def pull(step: int) -> float:
    """Weight of the start: all at first, then little, so that latents stay smooth and scaled."""
    return VAE["pull"] + (1 - VAE["pull"]) * max(0.0, 1 - step / VAE["pull_steps"])


def stage_vae(work: Path) -> None:
    """Encoder and decoder together, begun from principal components.

    Trained from nothing an autoencoder loses the hues for long; begun from components it has them
    at once, and what the components cannot hold (edges, above all) is learned from there. The
    encoder is done first: the denoiser can be trained on its latents while the decoder goes on.
    """
    if (work / "vae.pt").exists():
        return log("vae", "already there")
    bank, seed = open_bank(work), world_of(work).seed
    basis = fit_basis(bank.pictures, seed)
    vae = build_vae(seed).to(memory_format=torch.channels_last).train()
    log("vae", f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(
        vae.parameters(), VAE["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, VAE["steps"], VAE["warmup"])
    )
    training = resume(work / "vae.resume.pt", vae, optimizer, schedule)
    sampler = Sampler(bank.scenes, seed + 4 + training.first)
    start, recent = time.time(), np.zeros(3)
    for step in range(training.first, VAE["steps"]):
        x = as_batch(bank.pictures[np.sort(sampler(VAE["batch"]))])
        if step == max(VAE["joint_steps"], training.first):
            finish_encoder(work, vae, bank)
        joint = step < VAE["joint_steps"]
        target = project(basis, x)
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(), torch.set_grad_enabled(joint):
            posterior = vae.encode(x).latent_dist
        with autocast():
            # Noise on the latents: a denoiser's latents are never exact.
            z = posterior.mean + VAE["noise"] * torch.randn_like(posterior.mean)
            y = vae.decode(z).sample.float()
        apart = F.l1_loss(y, x)
        square = F.mse_loss(y, x)
        edges = [F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True)]
        drift = F.mse_loss(posterior.mean.float(), target)
        spread = (posterior.logvar.float() - 2 * math.log(VAE["noise"])).square().mean()
        loss = apart + square + VAE["edges"] * sum(edges)
        if joint:
            loss = loss + pull(step) * drift + 0.001 * spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += (apart.item(), square.item(), drift.item())
        if step % 100 == 99:
            pace = (time.time() - start) / (step + 1 - training.first)
            decibel = 10 * math.log10(4 / (recent[1] / 100))
            log(
                "vae",
                f"step {step + 1} l1 {recent[0] / 100:.4f} psnr {decibel:.2f} drift "
                f"{recent[2] / 100:.3f} {pace:.3f} s/step",
            )
            recent[:] = 0
        if step % 500 == 499:
            training.save(step + 1)
    training.save(VAE["steps"])
    (work / "vae.json").write_text(json.dumps(reconstruction(work)))
    # The weights stand for a finished stage, so that they come last.
    save(work / "vae.pt", load(work / "encoder.pt") | {"vae": vae.state_dict()})
    training.finish()


def finish_encoder(work: Path, vae, bank: Bank) -> None:
    """The encoder stays as it is from now on; its latents are scaled to unit spread."""
    for module in (vae.encoder, vae.quant_conv):
        module.requires_grad_(False)
    if not (work / "encoder.pt").exists():
        seed = world_of(work).seed
        rows = np.sort(np.random.default_rng(seed).permutation(len(bank.pictures))[:2000])
        scale = 1 / encode(vae, bank.pictures[rows]).std().item()
        save(work / "encoder.pt", {"vae": vae.state_dict(), "scaling_factor": scale})
        log("vae", f"encoder done, scaling factor {scale:.3f}")


@torch.no_grad()
def encode(vae, pictures: np.ndarray) -> Tensor:
    """Latents ``[n, 24, 8, 8]`` before scaling."""
    out = []
    for i in range(0, len(pictures), 128):
        with autocast():
            out.append(vae.encode(as_batch(pictures[i : i + 128])).latent_dist.mean.float())
    return torch.cat(out)


def trained_vae(work: Path):
    """The autoencoder, frozen; while its decoder is still in training, as far as that has come."""
    done, draft = work / "vae.pt", work / "vae.resume.pt"
    state = load(done if done.exists() else work / "encoder.pt")
    if not done.exists() and draft.exists():
        state["vae"] = load(draft)["parts"][0]
    vae = build_vae(world_of(work).seed, state["scaling_factor"])
    vae.load_state_dict(state["vae"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def reconstruction(work: Path) -> dict[str, float]:
    """What the autoencoder alone loses of fresh renderings (decibels)."""
    vae, seed = trained_vae(work), world_of(work).seed + 2000
    pictures = render_all(scenes(seed, 1, 0, 300), seed)
    x = as_batch(pictures)
    y = torch.cat([vae.decode(z).sample for z in encode(vae, pictures).split(64)]).clamp(-1, 1)
    square = (x - y).square().mean((1, 2, 3))
    found = {
        "pictures": len(x),
        "psnr": (10 * torch.log10(4 / square)).mean().item(),
    }
    log("vae", f"held-out {found}")
    return found
