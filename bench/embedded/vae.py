"""Fixed latents, and the `AutoencoderKL` between them and pictures."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedded.common import SEED, Sampler, as_batch, autocast, bank, cosine, load, log, save
from embedded.emoji_data import caption
from embedded.text_encoder import encode_text, trained_text
from realera_fast.embedded import words

VAE = dict(
    channels=(32, 48, 64, 96),
    latent=16,
    batch=16,
    lr=1e-3,
    noise=0.1,
    edges=0.7,
    decoder_steps=4000,
    encoder_steps=600,
)
CAPTIONS_PER_PAIR = 48


def build_vae():
    """Eightfold smaller and 16 channels deep: as many numbers as 16x16x4, a quarter of the cost."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
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
        sample_size=64,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # start nearly without noise: unit noise hides the picture for long
        vae.quant_conv.weight[VAE["latent"] :] *= 0.1
        vae.quant_conv.bias[VAE["latent"] :] = -5.0
    return vae


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def stage_vae(work: Path) -> None:
    """Decoder and encoder of the fixed latents, each by plain regression.

    Trained jointly on so few steps, an autoencoder loses the hues first. With the latents fixed
    beforehand (see ``stage_latents``) the decoder only has to learn what the principal components
    left out, and the denoiser need not wait for it.
    """
    if (work / "vae.pt").exists():
        return log("vae", "already there")
    pictures, things, styles = bank(work)
    basis = load(work / "basis.pt")
    vae = build_vae().to(memory_format=torch.channels_last)
    log("vae", f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    sampler = Sampler(things, styles, SEED + 2)
    halves = {
        "decoder": (VAE["decoder_steps"], [vae.post_quant_conv, vae.decoder]),
        "encoder": (VAE["encoder_steps"], [vae.quant_conv, vae.encoder]),
    }
    for half, (steps, modules) in halves.items():
        parameters = [p for module in modules for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, VAE["lr"], betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step, steps=steps: cosine(step, steps, 100)
        )
        start, recent = time.time(), 0.0
        for step in range(steps):
            x = as_batch(pictures[sampler(VAE["batch"])[0]])
            z = project(basis, x)
            x = x.contiguous(memory_format=torch.channels_last)
            if half == "decoder":
                # Noise on the latents: a denoiser's latents are never exact.
                with autocast():
                    y = vae.decode(z + VAE["noise"] * torch.randn_like(z)).sample.float()
                error = F.l1_loss(y, x)
                edges = [F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True)]
                loss = error + F.mse_loss(y, x) + VAE["edges"] * sum(edges)
            else:
                with autocast():
                    posterior = vae.encode(x).latent_dist
                error = F.mse_loss(posterior.mean.float(), z)
                spread = posterior.logvar.float() - 2 * math.log(VAE["noise"])
                loss = error + 0.01 * spread.square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent += error.item()
            if step % 100 == 99:
                log(
                    "vae",
                    f"{half} step {step + 1} error {recent / 100:.4f} "
                    f"{(time.time() - start) / (step + 1):.3f} s/step",
                )
                recent = 0.0
            if step % 500 == 499:
                save(work / "vae.draft.pt", vae.state_dict())
    save(work / "vae.pt", vae.state_dict())


def trained_vae(work: Path):
    """The autoencoder, or the draft that its stage has left so far."""
    vae = build_vae()
    done = work / "vae.pt"
    vae.load_state_dict(load(done if done.exists() else work / "vae.draft.pt"))
    return vae.eval().requires_grad_(False)


def fit_basis(pictures: np.ndarray) -> dict[str, Tensor]:
    """The leading principal components of 8x8 patches, as a strided convolution.

    The components are scaled by the fourth root of their variance: half-way to white, so that
    coarse structure still emerges before detail when noise is taken away.
    """
    x = as_batch(pictures[np.random.default_rng(SEED).permutation(len(pictures))[:4000]])
    patches = F.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 192)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    values, vectors = values.flip(0)[: VAE["latent"]], vectors.flip(1)[:, : VAE["latent"]]
    # The sign of an eigenvector is arbitrary and depends on the number of threads.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    log("latents", f"components keep {values.sum() / patches.var(0).sum():.3f} of the variance")
    scale = values**-0.25 / values.sqrt().mean().sqrt()
    weight = (vectors * scale).T
    return {"weight": weight.reshape(-1, 3, 8, 8).contiguous(), "bias": -weight @ mean}


def project(basis: dict[str, Tensor], x: Tensor) -> Tensor:
    """Pictures to latents ``[n, 16, 8, 8]``."""
    return F.conv2d(x, basis["weight"], basis["bias"], stride=8)


@torch.no_grad()
def stage_latents(work: Path) -> None:
    """Fix the latents, project the bank once, encode captions of every pair."""
    if (work / "latents.pt").exists():
        return log("latents", "already there")
    table = words()
    pictures, things, styles = bank(work)
    basis = fit_basis(pictures)
    save(work / "basis.pt", basis)
    latents = torch.cat(
        [project(basis, as_batch(pictures[i : i + 512])) for i in range(0, len(pictures), 512)]
    )
    log("latents", f"mean {latents.mean():.3f} std {latents.std():.3f}")
    tokenizer, encoder = trained_text(work)
    rng = random.Random(SEED + 3)
    keys = sorted(set(zip(things.tolist(), styles.tolist(), strict=True)))
    texts = [caption(table, t, s, rng).text for t, s in keys for _ in range(CAPTIONS_PER_PAIR)]
    distinct = [*dict.fromkeys(["", *texts])]
    states = torch.cat(
        [
            encode_text(tokenizer, encoder, distinct[i : i + 512]).half()
            for i in range(0, len(distinct), 512)
        ]
    )
    place = {text: i for i, text in enumerate(distinct)}
    chosen = torch.tensor([place[text] for text in texts]).view(len(keys), CAPTIONS_PER_PAIR)
    log("latents", f"{len(latents)} latents, {len(distinct)} captions")
    save(
        work / "latents.pt",
        {
            "latents": latents.half(),
            "things": torch.tensor(things),
            "styles": torch.tensor(styles),
            "states": states,
            "keys": torch.tensor(keys),
            "captions": chosen,
        },
    )
