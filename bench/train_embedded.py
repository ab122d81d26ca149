"""Train the embedded model from nothing but two fonts, on a CPU.

Every stage reads its inputs from the work folder and leaves its result there, so a stopped run
continues with the same command::

    python bench/train_embedded.py --work build/embedded --stage all

==========  =====================================================================================
text        tokenizer and CLIP text encoder, by contrast with a small image tower
latents     latents (principal components of patches) of every picture, states of the captions
vae         ``AutoencoderKL`` between 64x64 pictures and those 8x8x16 latents
unet        ``UNet2DConditionModel``, noise prediction
judge       classifier of things and styles
export      the pipeline folder and the judge into the package
sweep       guidance and step counts compared; the table's ``sampling`` is chosen from it
evaluate    what the judge sees in the model's pictures
==========  =====================================================================================
"""

import argparse
import datetime
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_data import Fonts, caption, caption_words, pairs, render_all
from torch import Tensor, nn

from realera_fast import precision
from realera_fast.embedded import FOLDER, words

SEED = 20240
MAX_TOKENS = 32
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
RESULTS = Path(__file__).resolve().parent / "results" / "embedded_model.json"

BANK = dict(color_count=200, other_count=56)
TEXT = dict(
    width=192,
    layers=4,
    heads=6,
    batch=128,
    steps=700,
    lr=1e-3,
    temperature=0.07,
    word_weight=0.3,
    word_temperature=0.04,
)
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
UNET = dict(channels=(128, 144), layers=1, heads=4, batch=64, steps=4000, lr=1e-3, warmup=300)
JUDGE = dict(batch=128, steps=1200, lr=3e-3, latent_noise=0.2)
EVALUATE = dict(seed=9000, seeds_per_thing=5, per_style=20)
CAPTIONS_PER_PAIR = 48
EMA_DECAY = 0.999
MIN_SNR = 5.0
SNAPSHOT_SECONDS = 420
CAPTION_DROPOUT = 0.1
STYLE_SHARE = {"color": 0.45}  # the other styles share the rest evenly


# --- common ---------------------------------------------------------------------------------


def log(stage: str, text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} [{stage}] {text}", flush=True)


def save(path: Path, state: object) -> None:
    """Write a checkpoint that is either whole or absent."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def autocast() -> torch.autocast:
    """bfloat16 where the processor multiplies it natively; parameters stay float32."""
    native = precision.multiplies_natively(torch.bfloat16)
    return torch.autocast("cpu", torch.bfloat16, enabled=native)


def bank(work: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rendered pictures, thing and style indices; rendered on first use."""
    path = work / "bank.npz"
    if not path.exists():
        log("bank", "rendering")
        pictures, things, styles = render_all(Fonts.find(), seed=SEED, **BANK)
        part = work / "bank.part.npz"
        np.savez(part, pictures=pictures, things=things, styles=styles)
        os.replace(part, path)
    data = np.load(path)
    log("bank", f"{len(data['things'])} pictures")
    return data["pictures"], data["things"], data["styles"]


def as_batch(pictures: np.ndarray) -> Tensor:
    """uint8 ``[n, h, w, 3]`` to float ``[n, 3, h, w]`` in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class Sampler:
    """Draws bank rows: things evenly, styles by their share."""

    def __init__(self, things: np.ndarray, styles: np.ndarray, seed: int) -> None:
        table = words()
        self.rng = np.random.default_rng(seed)
        self.rows = {}
        for row, key in enumerate(zip(things.tolist(), styles.tolist(), strict=True)):
            self.rows.setdefault(key, []).append(row)
        self.keys = sorted(self.rows)
        others = (1 - sum(STYLE_SHARE.values())) / (len(table.styles) - len(STYLE_SHARE))
        share = np.array([STYLE_SHARE.get(table.styles[s].name, others) for _, s in self.keys])
        for t in range(len(table.things)):  # a thing without ink is drawn as often as the rest
            mine = np.array([key[0] == t for key in self.keys])
            share[mine] /= share[mine].sum()
        self.share = share / share.sum()

    def __call__(self, count: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        keys = [self.keys[i] for i in self.rng.choice(len(self.keys), count, p=self.share)]
        return np.array([self.rng.choice(self.rows[key]) for key in keys]), keys


# --- text -----------------------------------------------------------------------------------


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in keep}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(keep))
    return letters


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, commonest pair first, until every word is one token.

    Merging the whole list in step (instead of word by word) is what makes the merges agree: an
    early merge can never leave a later word in two pieces. A word's last letter is merged last, so
    that every token that ends a word is a word of the captions, never a fragment of one.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges = []
    while True:
        count: dict[tuple[str, str], int] = {}
        for parts in spelled:
            for pair in zip(parts, parts[1:], strict=False):
                if len(parts) == 2 or not pair[1].endswith("</w>"):
                    count[pair] = count.get(pair, 0) + 1
        if not count:
            return merges
        best = max(count, key=lambda pair: (count[pair], pair))
        merges.append(best)
        for parts in spelled:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1


def build_tokenizer(folder: Path):
    """A ``CLIPTokenizer`` with one token per caption word and bytes for everything else."""
    from transformers import CLIPTokenizer

    vocabulary = caption_words(words())
    letters = [*byte_letters().values()]
    merges = learn_merges(vocabulary)
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), *SPECIAL]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    again = CLIPTokenizer.from_pretrained(folder)
    for word in [*vocabulary, "catalog", "Zeppelin!"]:
        ours = tokenizer(word).input_ids
        if ours != again(word).input_ids or (word in ids and len(ours) != 3):
            raise AssertionError(f"tokenizer disagrees with itself on {word!r}")
        if word in vocabulary and len(ours) != 3:
            raise AssertionError(f"{word!r} is not one token: {ours}")
    return again


class Tower(nn.Module):
    """The image side of the contrast; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 192, 1)):
            layers += [
                nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(fan_out),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(192 * 4, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def build_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(SEED)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT["width"],
        intermediate_size=4 * TEXT["width"],
        num_hidden_layers=TEXT["layers"],
        num_attention_heads=TEXT["heads"],
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT["width"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def text_closeness(tokenizer, encoder) -> tuple[float, float]:
    """Mean cosine of the pooled state within a thing's words, and between things' names."""
    table = words()
    encoder.eval()

    def pooled(texts: list[str]) -> Tensor:
        ids = tokenizer([f"a photo of a {text}" for text in texts], padding=True)["input_ids"]
        with torch.no_grad():
            return F.normalize(encoder(torch.tensor(ids)).pooler_output, dim=-1)

    names = pooled([thing.name for thing in table.things])
    within = [
        (pooled([*thing.synonyms]) @ names[i]).mean().item() for i, thing in enumerate(table.things)
    ]
    between = names @ names.T
    count = len(names)
    return sum(within) / count, (between.sum().item() - count) / (count * (count - 1))


def content_words(table) -> list[str]:
    """Words that name a thing, a category or a style."""
    texts = [w for thing in table.things for w in (thing.name, thing.category, *thing.synonyms)]
    texts += [w for style in table.styles for w in (style.name, *style.synonyms)]
    return sorted({word for text in texts for word in text.split()})


def stage_text(work: Path) -> None:
    """Contrast captions with pictures; every caption that fits a picture is a positive."""
    if (work / "text.pt").exists():
        return log("text", "already there")
    table = words()
    pictures, things, styles = bank(work)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    log(
        "text",
        f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters, "
        f"vocabulary {len(tokenizer)}",
    )
    tower = Tower(128)
    text_head = nn.Linear(TEXT["width"], 128, bias=False)
    named = content_words(table)
    prototypes = nn.Parameter(torch.randn(len(named), TEXT["width"]))
    parameters = [*encoder.parameters(), *tower.parameters(), *text_head.parameters(), prototypes]
    optimizer = torch.optim.AdamW(parameters, TEXT["lr"], weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, TEXT["steps"], 100)
    )
    sampler, rng = Sampler(things, styles, SEED + 1), random.Random(SEED + 1)
    categories = sorted({thing.category for thing in table.things})
    of_thing = torch.tensor([categories.index(thing.category) for thing in table.things])
    start = time.time()
    for step in range(TEXT["steps"]):
        rows, keys = sampler(TEXT["batch"])
        captions = [caption(table, t, s, rng) for t, s in keys]
        ids = torch.tensor(tokenizer([c.text for c in captions], padding=True)["input_ids"])
        with autocast():
            seen = tower(as_batch(pictures[rows]))
            pooled = encoder(ids).pooler_output
            said = text_head(pooled)
        seen, said = F.normalize(seen.float(), dim=-1), F.normalize(said.float(), dim=-1)
        logits = said @ seen.T / TEXT["temperature"]
        t = torch.tensor([key[0] for key in keys])
        s = torch.tensor([key[1] for key in keys])
        said_t = torch.tensor([-1 if c.thing is None else c.thing for c in captions])[:, None]
        said_c = torch.tensor(
            [-1 if c.category is None else categories.index(c.category) for c in captions]
        )[:, None]
        fits = (s[:, None] == s) & ((said_t < 0) | (said_t == t))
        fits &= (said_c < 0) | (said_c == of_thing[t])
        fits = fits.float()
        loss = -(fits / fits.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
        loss -= (fits / fits.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
        # Synonyms share every picture here, and contrast alone makes them one point. On real data
        # no two words are used for quite the same pictures; asking which words were said keeps
        # them apart the same way.
        holds = torch.tensor(
            [[name in caption.split() for name in named] for caption in (c.text for c in captions)]
        ).float()
        words_said = F.normalize(pooled.float(), dim=-1) @ F.normalize(prototypes, dim=-1).T
        chance = (words_said / TEXT["word_temperature"]).log_softmax(1)
        loss -= (
            TEXT["word_weight"]
            * (holds / holds.sum(1, keepdim=True).clamp(1) * chance).sum(1).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == TEXT["steps"] - 1:
            within, between = text_closeness(tokenizer, encoder)
            encoder.train()
            log(
                "text",
                f"step {step} loss {loss.item():.3f} cosine of synonyms {within:.3f}, "
                f"of others {between:.3f}, {(time.time() - start) / (step + 1):.3f} s/step",
            )
    state = {"encoder": encoder.state_dict(), "closeness": text_closeness(tokenizer, encoder)}
    save(work / "text.pt", state)


# --- autoencoder ----------------------------------------------------------------------------


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


# --- latents and caption states -------------------------------------------------------------


def trained_vae(work: Path):
    """The autoencoder, or the draft that its stage has left so far."""
    vae = build_vae()
    done = work / "vae.pt"
    vae.load_state_dict(load(done if done.exists() else work / "vae.draft.pt"))
    return vae.eval().requires_grad_(False)


def trained_text(work: Path):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    encoder.load_state_dict(load(work / "text.pt")["encoder"])
    return tokenizer, encoder.eval().requires_grad_(False)


def encode_text(tokenizer, encoder, texts: list[str]) -> Tensor:
    """States ``[n, 32, width]`` exactly as the pipeline computes them."""
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return encoder(torch.tensor(ids["input_ids"])).last_hidden_state


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


# --- denoiser -------------------------------------------------------------------------------


def build_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(SEED)
    levels = len(UNET["channels"])
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=VAE["latent"],
        out_channels=VAE["latent"],
        block_out_channels=UNET["channels"],
        layers_per_block=UNET["layers"],
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=TEXT["width"],
        attention_head_dim=UNET["heads"],
        norm_num_groups=16,
    )


def build_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def pipeline(work: Path, unet):
    """The stock pipeline around a denoiser."""
    from diffusers import StableDiffusionPipeline

    tokenizer, encoder = trained_text(work)
    pipe = StableDiffusionPipeline(
        vae=trained_vae(work),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export_pipeline(work: Path, averaged: dict[str, Tensor], folder: Path) -> None:
    """Write the pipeline in float16 storage; the folder appears whole or not at all."""
    unet = build_unet()
    unet.load_state_dict(averaged)
    pipe = pipeline(work, unet)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.half()
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for stale in (part, old):
        shutil.rmtree(stale, ignore_errors=True)
    pipe.save_pretrained(part, safe_serialization=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
            log(
                "unet",
                f"step {step + 1} error {recent / 100:.4f} "
                f"{(time.time() - start) / (step + 1 - first):.3f} s/step",
            )
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


# --- judge ----------------------------------------------------------------------------------


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


# --- export and evaluation ------------------------------------------------------------------


def stage_export(work: Path) -> None:
    """Put the pipeline and the judge into the package (the table is already there)."""
    done = work / "unet.pt"
    state = load(done if done.exists() else work / "unet.resume.pt")
    export_pipeline(work, state["averaged"], FOLDER / "pipeline")
    step = state["steps"] if "steps" in state else state["step"]
    (work / "exported.json").write_text(json.dumps({"unet_steps": step, "planned": UNET["steps"]}))
    if (work / "judge.safetensors").exists():
        shutil.copyfile(work / "judge.safetensors", FOLDER / "judge.safetensors")
    files = [f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    for file in files:
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    log("export", f"{sum(f.stat().st_size for f in files) / 1e6:.2f} MB")


def draw(pipe, prompts: list[str], seeds: list[int], steps: int, guidance: float) -> Tensor:
    """Samples ``[n, 3, 64, 64]`` in 0..1, each from its own seed."""
    out = []
    for i in range(0, len(prompts), 32):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + 32]]
        out.append(
            pipe(
                prompts[i : i + 32],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=64,
                width=64,
                generator=generators,
                output_type="pt",
            ).images
        )
    return torch.cat(out)


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    from PIL import Image

    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(pixels[i : i + columns], 1) for i in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def stage_sweep(work: Path) -> None:
    """Compare guidance and step counts on the tuning things; the table keeps the winner."""
    from realera_fast.embedded import load_judge, load_pipeline

    pipe, judge = load_pipeline(), load_judge()
    names = [thing.name for thing in words().things if thing.split == "tuning"]
    prompts = [f"a photo of a {name}" for name in names for _ in range(4)]
    expected = [name for name in names for _ in range(4)]
    for steps, guidance in [(20, g) for g in (2.0, 3.0, 4.0, 5.5, 7.0)] + [(12, 4.0), (25, 4.0)]:
        images = draw(pipe, prompts, [5000 + i for i in range(len(prompts))], steps, guidance)
        seen, styles = judge.classify(images)
        right = sum(a == b for a, b in zip(seen, expected, strict=True)) / len(seen)
        log(
            "sweep",
            f"steps {steps} guidance {guidance}: things {right:.3f}, "
            f"color {styles.count('color') / len(styles):.3f}",
        )


def stage_evaluate(work: Path) -> None:
    """How often the judge sees in the un-erased model's pictures what the prompt asked for."""
    import diffusers
    import transformers

    from realera_fast.embedded import load_judge, load_pipeline

    pipe, judge, table = load_pipeline(), load_judge(), words()
    steps, guidance = table.sampling["steps"], table.sampling["guidance_scale"]
    names = [thing.name for thing in table.things]
    per = EVALUATE["seeds_per_thing"]

    def run(prompts: list[str]) -> tuple[Tensor, list[str], list[str]]:
        seeds = [EVALUATE["seed"] + i for i in range(len(prompts))]
        images = draw(pipe, prompts, seeds, steps, guidance)
        return images, *judge.classify(images)

    def share(seen: list[str], wanted: list[str]) -> float:
        return sum(a == b for a, b in zip(seen, wanted, strict=True)) / len(seen)

    wanted = [name for name in names for _ in range(per)]
    images, seen, styles = run([f"a photo of a {name}" for name in wanted])
    save_grid(images.view(len(names), per, 3, 64, 64)[:, :2].flatten(0, 1), 20, work / "things.png")
    per_thing = {
        name: share(seen[i * per : (i + 1) * per], [name] * per) for i, name in enumerate(names)
    }
    confused = sorted({(a, b) for a, b in zip(wanted, seen, strict=True) if a != b})
    synonyms = [(thing.name, word) for thing in table.things for word in thing.synonyms]
    _, seen_synonyms, _ = run([f"a photo of a {word}" for _, word in synonyms])
    style_names, drawable = [style.name for style in table.styles if style.name != "color"], []
    inked = {t for t, s in pairs(Fonts.find()) if table.styles[s].name == "ink"}
    for style in style_names:
        for i in range(EVALUATE["per_style"]):
            t = (7 * i) % len(names)
            t = t if style != "ink" or t in inked else 0
            drawable.append((names[t], style))
    style_images, style_things, style_seen = run(
        [f"a {style} picture of a {name}" for name, style in drawable]
    )
    save_grid(style_images, EVALUATE["per_style"], work / "styles.png")
    found = {
        "date": f"{datetime.datetime.now():%Y-%m-%d}",
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "sampling": {"sampler": "DDIM", "steps": steps, "guidance_scale": guidance},
        "seed": EVALUATE["seed"],
        "training": {
            **json.loads((work / "exported.json").read_text()),
            "text_cosine": load(work / "text.pt")["closeness"],
        },
        "judge_held_out": json.loads((work / "judge.json").read_text()),
        "things": {
            "prompt": "a photo of a {}",
            "pictures": len(wanted),
            "accuracy": share(seen, wanted),
            "style_is_color": styles.count("color") / len(styles),
            "per_thing": per_thing,
            "confused": confused,
        },
        "synonyms": {
            "pictures": len(synonyms),
            "accuracy": share(seen_synonyms, [n for n, _ in synonyms]),
        },
        "styles": {
            "prompt": "a {style} picture of a {}",
            "pictures": len(drawable),
            "accuracy": share(style_seen, [style for _, style in drawable]),
            "thing_accuracy": share(style_things, [name for name, _ in drawable]),
            "per_style": {
                style: share(
                    [a for a, (_, s) in zip(style_seen, drawable, strict=True) if s == style],
                    [style] * EVALUATE["per_style"],
                )
                for style in style_names
            },
        },
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    log(
        "evaluate",
        f"things {found['things']['accuracy']:.3f}, synonyms "
        f"{found['synonyms']['accuracy']:.3f}, styles {found['styles']['accuracy']:.3f}",
    )
    log("evaluate", f"confused: {confused}")


STAGES = {
    "text": stage_text,
    "latents": stage_latents,
    "vae": stage_vae,
    "unet": stage_unet,
    "judge": stage_judge,
    "export": stage_export,
    "sweep": stage_sweep,
    "evaluate": stage_evaluate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if arguments.stage in (name, "all"):
            torch.manual_seed(SEED)
            stage(arguments.work)


if __name__ == "__main__":
    main()
