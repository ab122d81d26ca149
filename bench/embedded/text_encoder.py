"""A CLIP text encoder, by contrast with a small image tower that is thrown away."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedded.common import SEED, Sampler, as_batch, autocast, bank, cosine, load, log, save
from embedded.emoji_data import caption
from embedded.tokenizer import MAX_TOKENS, build_tokenizer
from realera_fast.embedded import words

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
