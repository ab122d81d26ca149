"""A CLIP text encoder: first distilled from a sentence encoder, then contrasted with pictures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedded.bank import Sampler, open_bank
from embedded.captions import Caption
from embedded.common import as_batch, autocast, cosine, load, log, resume, save
from embedded.corpus import marked, texts, tokenizer_texts
from embedded.drawing import Scene
from embedded.teacher import embed, load_teacher
from embedded.tokenizer import (
    MAX_TOKENS,
    build_tokenizer,
    learned_merges,
    read_merges,
    vocabulary,
)
from embedded.world import HEAD_WIDTH, World, world_of
from realera_fast.embedded import words

TEXT = dict(layers=3)
DISTIL = dict(batch=256, steps=3500, lr=1e-3, warmup=200, row_weight=0.5, pad_weight=0.3)


def build_text_encoder(tokenizer, world: World):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(world.seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=world.text_width,
        intermediate_size=4 * world.text_width,
        num_hidden_layers=TEXT["layers"],
        num_attention_heads=world.text_width // HEAD_WIDTH,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=world.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


@dataclass(frozen=True)
class Axes:
    """The principal axes of the teacher's embeddings: what the text encoder speaks."""

    mean: Tensor
    axes: Tensor

    @classmethod
    def fit(cls, embeddings: Tensor, width: int) -> Axes:
        mean = embeddings.mean(0)
        _, vectors = torch.linalg.eigh(torch.cov((embeddings - mean).T))
        axes = vectors.flip(1)[:, :width]
        # The sign of an eigenvector is arbitrary and depends on the number of threads.
        return cls(mean, axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign())

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Unit vectors ``[n, width]``, seen from the mean."""
        return F.normalize((embeddings.float() - self.mean) @ self.axes, dim=-1)


def stage_corpus(work: Path) -> None:
    """The teacher's embeddings of every text, of every word in it, and of every token."""
    if (work / "corpus.pt").exists():
        return log("corpus", "already there")
    world, own = world_of(work), words().spoken()
    if world.tokens == World.tokens:
        merges = read_merges()
    else:
        merges = learned_merges(tokenizer_texts(own), world.tokens)
    tokenizer = build_tokenizer(work / "tokenizer", merges)
    lines = texts(vocabulary(tokenizer), own, world.seed)
    plain = [marked(line) for line in lines]
    distinct = [*dict.fromkeys([t for t, _ in plain] + [w for _, found in plain for _, w in found])]
    place = {text: i for i, text in enumerate(distinct)}
    log("corpus", f"{len(lines)} texts, {len(distinct)} distinct with their words")
    teacher = load_teacher(work)
    embeddings = embed(*teacher, distinct)
    axes = Axes.fit(embeddings, world.text_width)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens = axes(embed(*teacher, [piece.removesuffix("</w>") for piece in pieces]))
    batch = tokenizer([t for t, _ in plain], truncation=True)["input_ids"]
    prefixes = [before for _, found in plain for before, _ in found]
    ends = iter(len(ids) - 2 for ids in tokenizer(prefixes, truncation=True)["input_ids"])
    rows = [
        [(next(ends), place[word]) for _, word in found[:2]] + [(-1, -1)] * (2 - len(found))
        for _, found in plain
    ]
    save(
        work / "corpus.pt",
        {
            "ids": torch.tensor(np.concatenate(batch).astype(np.int32)),
            "lengths": torch.tensor([len(ids) for ids in batch]),
            "targets": torch.tensor([place[t] for t, _ in plain]),
            "rows": torch.tensor(rows),
            "embeddings": axes(embeddings).half(),
            "tokens": tokens.half(),
            "mean": axes.mean,
            "axes": axes.axes,
        },
    )


class Corpus:
    """Batches of texts with what the teacher says of them."""

    def __init__(self, work: Path, seed: int) -> None:
        data = load(work / "corpus.pt")
        self.ids = data["ids"].long().split(data["lengths"].tolist())
        self.targets, self.rows = data["targets"], data["rows"]
        self.embeddings, self.tokens = data["embeddings"], data["tokens"]
        self.rng = np.random.default_rng(seed)

    def batch(self, count: int, pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token ids ``[count, n]``, targets ``[count, width]``, marked rows ``[count, 2]`` (or -1),
        and their targets ``[count, 2, width]``; every text is followed by a few rows of padding.
        """
        # Texts of about one length together: half of the rows would be padding otherwise.
        pool = self.rng.integers(0, len(self.ids), 4 * count)
        pool = pool[np.argsort([len(self.ids[i]) for i in pool], kind="stable")]
        start = self.rng.integers(0, 3 * count + 1)
        chosen = pool[start : start + count]
        longest = max(len(self.ids[i]) for i in chosen)
        length = MAX_TOKENS if self.rng.random() < 0.05 else min(MAX_TOKENS, longest + 3)
        ids = torch.full((count, length), pad)
        for k, i in enumerate(chosen):
            ids[k, : len(self.ids[i])] = self.ids[i]
        rows = self.rows[torch.from_numpy(chosen)]
        targets = self.embeddings[self.targets[torch.from_numpy(chosen)]].float()
        return ids, targets, rows[..., 0], self.embeddings[rows[..., 1]].float()


def distillation_loss(output, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """How far the pooled state, the words' rows and the padding are from the teacher's view."""
    _, targets, rows, row_targets = batch
    states, pooled = output.last_hidden_state.float(), output.pooler_output.float()

    def far(x: Tensor, y: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(x, y, dim=-1)

    at = rows.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
    real = (rows >= 0).float()
    row_loss = (far(states.gather(1, at), row_targets) * real).sum() / real.sum().clamp(min=1)
    pad_loss = far(states[:, -1], targets).mean()
    loss = far(pooled, targets).mean()
    return loss + DISTIL["row_weight"] * row_loss + DISTIL["pad_weight"] * pad_loss


def closeness(tokenizer, encoder, pairs: list[tuple[str, str]]) -> list[float]:
    """Cosines of the pooled states of each pair of texts."""
    flat = [text for pair in pairs for text in pair]
    encoder.eval()
    with torch.no_grad():
        ids = torch.tensor(tokenizer(flat, padding=True)["input_ids"])
        pooled = F.normalize(encoder(ids).pooler_output, dim=-1).view(len(pairs), 2, -1)
    encoder.train()
    return [round(value, 3) for value in (pooled[:, 0] * pooled[:, 1]).sum(-1).tolist()]


PROBES = [
    ("cat", "kitten"),
    ("cat", "feline"),
    ("horse", "stallion"),
    ("gun", "pistol"),
    ("cat", "dog"),
    ("cat", "airplane"),
    ("a photo of a cat", "a photo of a feline"),
]


def stage_distil(work: Path) -> None:
    """The text encoder learns to say what the teacher says, row for row."""
    from transformers import CLIPTokenizer

    if (work / "distilled.pt").exists():
        return log("distil", "already there")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    world = world_of(work)
    encoder = build_text_encoder(tokenizer, world).train()
    corpus = Corpus(work, world.seed + 1)
    with torch.no_grad():
        # A unit vector has entries of 0.07; CLIP's token embeddings start at 0.02.
        encoder.get_input_embeddings().weight.copy_(corpus.tokens.float() * 0.3)
    optimizer = torch.optim.AdamW(encoder.parameters(), DISTIL["lr"], weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, DISTIL["steps"], DISTIL["warmup"])
    )
    training = resume(work / "distil.resume.pt", encoder, optimizer, schedule)
    start, recent = time.time(), 0.0
    for step in range(training.first, DISTIL["steps"]):
        batch = corpus.batch(DISTIL["batch"], tokenizer.pad_token_id)
        with autocast():
            output = encoder(batch[0])
        loss = distillation_loss(output, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if step % 200 == 199:
            near = closeness(tokenizer, encoder, PROBES)
            pace = (time.time() - start) / (step + 1 - training.first)
            log("distil", f"step {step + 1} loss {recent / 200:.3f} {pace:.3f} s/step {near}")
            recent = 0.0
        if step % 1000 == 999:
            training.save(step + 1)
    save(work / "distilled.pt", encoder.state_dict())
    training.finish()


CONTRAST = dict(
    batch=128, steps=1000, lr=3e-4, tower_lr=2e-3, warmup=100, temperature=0.07, weight=0.3
)


class Tower(nn.Module):
    """The image side of the contrast. Its features also say how alike two pictures look."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 192, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(fan_out),
                nn.ReLU(),
            )
            for fan_in, fan_out, stride in sizes
        )
        self.head = nn.Linear(192 * 4, width)

    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.features(x)[-1], 2).flatten(1))


def fits(captions: list[Caption], scenes: list[Scene]) -> Tensor:
    """``[n, n]`` whether a caption is true of a picture."""
    table = words()

    def true(caption: Caption, scene: Scene) -> bool:
        if caption.style is not None and caption.style != scene.style:
            return False
        if caption.category is not None:
            return {table.things[t].category for t in scene.things} == {caption.category}
        return not caption.things or set(caption.things) == set(scene.things)

    return torch.tensor([[true(c, s) for s in scenes] for c in captions]).float()


def contrast_loss(said: Tensor, seen: Tensor, true: Tensor) -> Tensor:
    """Cross entropy both ways; every caption that is true of a picture is a positive."""
    said, seen = F.normalize(said.float(), dim=-1), F.normalize(seen.float(), dim=-1)
    logits = said @ seen.T / CONTRAST["temperature"]
    by_text = (true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_picture = (true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return -(by_text + by_picture) / 2


def stage_text(work: Path) -> None:
    """Go on distilling while captions are contrasted with pictures."""
    from transformers import CLIPTokenizer

    if (work / "text.pt").exists():
        return log("text", "already there")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    world = world_of(work)
    encoder = build_text_encoder(tokenizer, world)
    encoder.load_state_dict(load(work / "distilled.pt"))
    encoder.train()
    corpus, bank = Corpus(work, world.seed + 2), open_bank(work)
    captions, sampler = bank.captions, Sampler(bank.scenes, world.seed + 2, scene_share=0.15)
    tower, head = Tower(), nn.Linear(world.text_width, 128, bias=False)
    fresh = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [*encoder.parameters()], "lr": CONTRAST["lr"]},
            {"params": fresh, "lr": CONTRAST["tower_lr"]},
        ],
        weight_decay=0.01,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, CONTRAST["steps"], CONTRAST["warmup"])
    )
    training = resume(work / "text.resume.pt", encoder, tower, head, optimizer, schedule)
    start = time.time()
    for step in range(training.first, CONTRAST["steps"]):
        batch = corpus.batch(CONTRAST["batch"], tokenizer.pad_token_id)
        rows = sampler(CONTRAST["batch"])
        chosen = [captions[i] for i in rows]
        ids = tokenizer([c.text for c in chosen], padding=True, truncation=True)["input_ids"]
        true = fits(chosen, [bank.scenes[i] for i in rows])
        with autocast():
            output = encoder(batch[0])
            said = head(encoder(torch.tensor(ids)).pooler_output)
            seen = tower(as_batch(bank.pictures[rows]))
        distilled = distillation_loss(output, batch)
        contrast = contrast_loss(said, seen, true)
        optimizer.zero_grad()
        (distilled + CONTRAST["weight"] * contrast).backward()
        nn.utils.clip_grad_norm_([*encoder.parameters(), *fresh], 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            near = closeness(tokenizer, encoder, PROBES)
            pace = (time.time() - start) / (step + 1 - training.first)
            log(
                "text",
                f"step {step + 1} distilled {distilled.item():.3f} contrast "
                f"{contrast.item():.3f} {pace:.3f} s/step {near}",
            )
        if step % 500 == 499:
            training.save(step + 1)
    save(work / "tower.pt", tower.state_dict())
    save(work / "text.pt", encoder.state_dict())
    training.finish()


def trained_text(work: Path):
    """The tokenizer and the trained encoder, frozen."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    encoder = build_text_encoder(tokenizer, world_of(work))
    encoder.load_state_dict(load(work / "text.pt"))
    return tokenizer, encoder.eval().requires_grad_(False)


def encode_text(tokenizer, encoder, texts: list[str]) -> Tensor:
    """States ``[n, 77, width]`` exactly as the pipeline computes them."""
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return encoder(torch.tensor(ids["input_ids"])).last_hidden_state
