"""Text encoder and tokenizer as one thing: prompts in, embeddings and token positions out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realera_fast import progress as progress_bars

logger = logging.getLogger(__name__)


def find_tokenizer(text_encoder: Any) -> Any:
    """The tokenizer that belongs to a text encoder, from beside its own folder or cache entry.

    Diffusers keeps `tokenizer/` next to `text_encoder/`; a plain transformers checkpoint keeps both
    in one folder. Files on disk are tried first; the network only for a hub id that is not cached.

    Raises:
        ValueError: none was found; says what to pass.
    """
    from transformers import AutoTokenizer

    config = getattr(text_encoder, "config", None)
    name = getattr(text_encoder, "name_or_path", "") or getattr(config, "_name_or_path", "")
    places: list[tuple[str, dict[str, Any]]] = []
    if name:
        path = Path(name)
        if path.exists():
            places = [(str(path.parent / "tokenizer"), {}), (str(path / "tokenizer"), {})]
            places += [(str(path), {})]
            places = [(p, kw) for p, kw in places if Path(p).is_dir()]
        else:
            places = [(name, {"subfolder": "tokenizer"}), (name, {})]
    local = [(p, {**kw, "local_files_only": True}) for p, kw in places]
    remote = [] if name and Path(name).exists() else places
    for place, options in (*local, *remote):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.debug("no tokenizer at %s %s: %s", place, options, error)
            continue
        if 2 < len(tokenizer) <= getattr(config, "vocab_size", len(tokenizer)):
            return tokenizer
        logger.debug("the tokenizer at %s does not fit the text encoder's vocabulary", place)
    raise ValueError(
        "tokenizer: none was found beside the text encoder "
        f"({name or 'which was not loaded from a folder'}); pass tokenizer=pipe.tokenizer"
    )


class TextModel:
    """A frozen text encoder with its tokenizer.

    Args:
        text_encoder: a CLIP-like text encoder; called as diffusers calls it,
            `text_encoder(input_ids, attention_mask=...)[0]`.
        tokenizer: its tokenizer; `None` looks beside the encoder (`find_tokenizer`).
    """

    def __init__(self, text_encoder: Any, tokenizer: Any = None) -> None:
        for argument, value in (("text_encoder", text_encoder), ("tokenizer", tokenizer)):
            if isinstance(value, tuple | list):
                raise TypeError(
                    f"{argument}: expected one, got {len(value)}; models with several text "
                    "encoders (SDXL, SD3, FLUX) are not supported yet"
                )
        if not callable(text_encoder) or not hasattr(text_encoder, "config"):
            raise TypeError(
                "text_encoder: expected a transformers text model such as pipe.text_encoder, "
                f"got {type(text_encoder).__name__}"
            )
        self.encoder = text_encoder
        self.tokenizer = find_tokenizer(text_encoder) if tokenizer is None else tokenizer
        if not callable(self.tokenizer):
            raise TypeError(
                "tokenizer: expected a transformers tokenizer such as pipe.tokenizer, "
                f"got {type(tokenizer).__name__}"
            )
        parameter = next(text_encoder.parameters())
        if parameter.is_meta:
            raise ValueError(
                "text_encoder: its weights are on the meta device (offloaded or never loaded); "
                "load them, or remove the offload hooks, before erasing"
            )
        self.device: torch.device = parameter.device
        config = text_encoder.config
        self.width: int = int(config.hidden_size)
        positions = getattr(config, "max_position_embeddings", self.tokenizer.model_max_length)
        self.max_tokens: int = int(min(self.tokenizer.model_max_length, positions))
        self._use_mask = bool(getattr(config, "use_attention_mask", False))

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text alone, without begin- and end-of-text, never cut."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def overflow(self, prompt: str) -> str:
        """The end of a prompt that the encoder would not see; `""` if it sees all."""
        tokens = self.token_ids(prompt)
        room = self.max_tokens - 2
        return self.tokenizer.decode(tokens[room:]).strip() if len(tokens) > room else ""

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t]` int64 token ids, padded and cut to the encoder's length as diffusers does."""
        return self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        batch_size: int = 64,
        progress: bool | None = False,
        desc: str = "encode",
    ) -> Tensor:
        """`[p, t, d]` float32 embeddings of the prompts, on the encoder's device.

        The encoder runs in its own dtype and in evaluation mode; its mode is put back.
        """
        if not prompts:
            return torch.zeros(0, self.max_tokens, self.width, device=self.device)
        training = {module: module.training for module in self.encoder.modules()}
        self.encoder.eval()
        hidden = []
        try:
            with progress_bars.bar(total=len(prompts), desc=desc, progress=progress) as bar:
                for start in range(0, len(prompts), batch_size):
                    ids = self.tokenize(prompts[start : start + batch_size]).to(self.device)
                    mask = ids.ne(self.tokenizer.pad_token_id).long() if self._use_mask else None
                    hidden.append(self.encoder(ids, attention_mask=mask)[0].float())
                    bar.update(len(ids))
        finally:
            for module, flag in training.items():
                module.training = flag
        rows = torch.cat(hidden)
        if rows.shape[-1] != self.width or not torch.isfinite(rows).all():
            raise ValueError(
                f"text_encoder: expected finite embeddings of width {self.width}, got shape "
                f"{tuple(rows.shape)}" + ("" if torch.isfinite(rows).all() else " with NaN or Inf")
            )
        return rows

    def end_of_text(self, ids: Tensor) -> Tensor:
        """`[p]` position of the first end-of-text token of each `[t]` row of ids."""
        return ids.eq(self.tokenizer.eos_token_id).int().argmax(dim=-1)

    def words(self, count: int) -> tuple[str, ...]:
        """Up to `count` whole words of the tokenizer's own vocabulary, most common first.

        CLIP's byte-pair vocabulary marks a token that ends a word with `</w>` and numbers merges by
        frequency, so the lowest ids are the most common words. Other tokenizers have no such mark
        and give no words.
        """
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        words: list[str] = []
        for token, _ in vocabulary:
            if len(words) >= count:
                break
            word = token.removesuffix("</w>")
            if token.endswith("</w>") and len(word) >= 3 and word.isascii() and word.isalpha():
                words.append(word)
        return tuple(words)

    def fingerprint(self) -> str:
        """SHA-256 over the encoder's weights and the tokenizer's vocabulary: the cache key."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            data = tensor.detach().cpu().contiguous()
            digest.update(
                data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
            )
        for token, index in sorted(self.tokenizer.get_vocab().items()):
            digest.update(f"{token}\0{index}\0".encode())
        return digest.hexdigest()
