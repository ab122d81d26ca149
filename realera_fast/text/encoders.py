"""Text encoders with their tokenizers: prompts in, embeddings and the places of words out."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import itertools
import logging
import math
import pickle
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from realera_fast.runtime import locked, progress_bar, refuse_offloading, uncompiled, unwrapped
from realera_fast.text.packing import PackedReader
from realera_fast.text.prompt_frame import PromptFrame, chat_frame, cleaned

if TYPE_CHECKING:
    from realera_fast.text.free_prompts import FreePrompts

logger = logging.getLogger(__name__)

Output = Literal["last", "penultimate", "pooled"]

_BLOCK = 1 << 25
"""Numbers of embeddings that are made together: 128 MiB."""
_LONGEST = 1 << 16
"""Tokens; a tokenizer that knows no limit says so with a far larger number."""


def find_tokenizer(text_encoder: Any) -> Any:
    """The tokenizer that belongs to a text encoder, from beside its own folder or cache entry.

    Diffusers keeps `tokenizer/` next to `text_encoder/`; a plain transformers checkpoint keeps both
    in one folder. Files on disk are tried first; the network only for a hub id that is not cached.

    Raises:
        ValueError: none was found, or words were added to the encoder since it was loaded; says
            what to pass.
    """
    from transformers import AutoTokenizer

    config = getattr(text_encoder, "config", None)
    name = getattr(text_encoder, "name_or_path", "") or getattr(config, "_name_or_path", "")
    places: list[tuple[str, dict[str, Any]]] = []
    if name:
        path = Path(name)
        if path.exists():
            # "tokenizer_2" belongs to "text_encoder_2".
            own = path.name.replace("text_encoder", "tokenizer")
            beside = dict.fromkeys((path.parent / own, path.parent / "tokenizer"))
            places = [(str(p), {}) for p in (*beside, path / "tokenizer", path) if p.is_dir()]
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
        saved = _saved_words(name, options)
        # Rows beyond the tokenizer's words are padding (T5 has 28) if they were saved with it.
        if 2 < len(tokenizer) <= (saved or len(tokenizer)):
            _check_words(text_encoder, saved or len(tokenizer), tokenizer, place)
            return tokenizer
        logger.debug("the tokenizer at %s does not fit the text encoder's vocabulary", place)
    raise ValueError(
        "tokenizer: none was found beside the text encoder "
        f"({name or 'which was not loaded from a folder'}); pass tokenizer=pipe.tokenizer"
    )


def _saved_words(name: str, options: Mapping[str, Any]) -> int | None:
    """How many words a text encoder had when it was saved; None where nothing says so."""
    from transformers import PretrainedConfig

    local = {"local_files_only": options.get("local_files_only", False)}
    for where in ({}, {"subfolder": "text_encoder"}):
        try:
            values, _ = PretrainedConfig.get_config_dict(name, **where, **local)
        except (OSError, ValueError):
            continue
        for part in (values, values.get("text_config") or {}):
            if isinstance(part.get("vocab_size"), int):
                return int(part["vocab_size"])
    return None


def _rows(text_encoder: Any) -> int | None:
    """How many words a text encoder knows now; None where it can't be told."""
    table = getattr(text_encoder, "get_input_embeddings", lambda: None)()
    return getattr(table, "num_embeddings", None)


def _check_words(text_encoder: Any, saved: int, tokenizer: Any, place: str) -> None:
    """Refuses a tokenizer from disk where the encoder's words changed since it was saved."""
    rows = _rows(text_encoder)
    if rows not in (None, saved):
        raise ValueError(
            f"tokenizer: the text encoder has {rows} words, and {saved} where it was loaded from, "
            f"so the tokenizer in {place} ({len(tokenizer)} words) may not know some of them, such "
            "as those of a textual inversion; pass tokenizer=pipe.tokenizer"
        )


@dataclass(frozen=True)
class Span:
    """Where a word stands in the rows of an embedded prompt."""

    start: int
    stop: int
    """One past its last row; equal to `start` for an empty word."""


class Text(Protocol):
    """What the pairs, the vocabulary and the mining need of a source of text embeddings."""

    width: int
    """Features d of a row."""
    max_tokens: int
    """Rows t of a prompt."""
    device: torch.device

    @property
    def first(self) -> TextModel:
        """The encoder whose tokenizer says what words there are."""
        ...

    @property
    def models(self) -> tuple[TextModel, ...]:
        """All encoders; one that is read in two ways is there twice."""
        ...

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text alone, without special ones, never cut."""
        ...

    def name_key(self, name: str) -> Hashable:
        """Equal for names that are the same tokens to every encoder; empty for one of none."""
        ...

    def control_token(self, text: str) -> str | None:
        """A control token of a tokenizer (end-of-text, padding) that the text holds, if any."""
        ...

    def unknown(self, name: str) -> bool:
        """Whether a tokenizer has no token of its own for a part of the name."""
        ...

    def overflow(self, prompt: str) -> str:
        """The end of a prompt that would not be seen; `""` if all is."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t, d]` float32 embeddings."""
        ...

    def encode_visible(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t, d]` float32: the rows of `encode` that the denoiser sees, and any others."""
        ...

    def encode_free(self, prompts: FreePrompts) -> Tensor:
        """`[j, t, d]` float32 embeddings, with gradients of their vectors where these ask for
        them."""
        ...

    reads_unpadded: bool
    """Whether words are read without padding: of an encoder that is causal, or from which it is
    hidden."""
    parameters_per_token: int
    """Parameters that a token is multiplied with (count)."""

    @property
    def is_causal(self) -> bool:
        """Whether a row depends on what stands before it alone, and there is one a token."""
        ...

    def first_rows(self, prompts: Sequence[str], counts: Sequence[int]) -> Tensor:
        """`[sum of counts, d]` float32: of each prompt so many rows, for causal encoders."""
        ...

    def last_rows(self, prompts: Sequence[str], *, progress: bool | None = False) -> Tensor:
        """`[p, d]` float32 rows of the last token of each prompt."""
        ...

    def span(self, before: str, word: str) -> Span:
        """Rows of a word that follows the text `before` in a prompt."""
        ...

    def ends(self, prompts: Sequence[str]) -> list[int]:
        """Row of the last token of each prompt: end-of-text where the tokenizer has one."""
        ...

    def shares(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t]` float64 weights of the rows, a sum of 1 each; 0 for rows that carry no text."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 of everything that the embeddings depend on."""
        ...


def _remembered(split: Any) -> Callable[[str], tuple[int, ...]]:
    """Tokens of a text without special ones: a name is asked about tens of times in a call."""

    # It holds the tokenizer alone: a cycle with the encoder would keep its memory.
    @functools.lru_cache(maxsize=1 << 14)
    def plain_ids(text: str) -> tuple[int, ...]:
        return tuple(split(text, add_special_tokens=False, verbose=False).input_ids)

    return plain_ids


class TextModel:
    """A frozen text encoder with its tokenizer, read as one family of pipelines reads it.

    Args:
        text_encoder: a transformers text encoder.
        tokenizer: its tokenizer; `None` looks beside the encoder (`find_tokenizer`).
        output: "last" hidden states; "penultimate" ones (SDXL, SD3); or the "pooled" vector, one
            row a prompt.
        layers: hidden states that stand side by side in each row, by number as transformers gives
            them, in place of `output` (FLUX.2).
        max_tokens: rows of a prompt; `None` is what encoder and tokenizer hold.
        masked: padding is hidden from the encoder and from the denoiser, so it carries no weight.
        encoder_mask: whether it is hidden from the encoder, where that differs from the denoiser:
            FLUX.2's is shown it, LTX-Video's is not.
        front_padding: prompts are filled up in front to a multiple of so many tokens, which the
            encoder reads (CogView4); their rows come behind those of the prompt here.
        visible_padding: rows of padding behind the prompt that the denoiser sees all the same
            (Chroma).
        lowercase: prompts are lowercased and stripped first (PixArt, Sana).
        clean: HTML entities and doubled spaces are taken out of prompts first (Wan).
        instruction: text that stands before every prompt; in a chat, the system message.
        suffix: text that stands behind every prompt.
        chat: arguments of the tokenizer's chat template, which is put around every prompt; None
            uses none.
        dropped: rows that are cut out at the start (Qwen-Image); None cuts out the instruction but
            for its last token, behind the row of begin-of-text (Sana).
        multi_vector: a textual inversion of several vectors is expanded to all of its tokens, as
            diffusers' pipelines do.
        norm: of the denoiser, which the rows pass before the map that is edited (Qwen-Image); the
            rows are what it gives.
        name: what a pipeline calls the encoder, for messages.
    """

    def __init__(
        self,
        text_encoder: Any,
        tokenizer: Any = None,
        *,
        output: Output = "last",
        layers: Sequence[int] = (),
        max_tokens: int | None = None,
        masked: bool = False,
        encoder_mask: bool | None = None,
        front_padding: int = 0,
        visible_padding: int = 0,
        lowercase: bool = False,
        clean: bool = False,
        instruction: str = "",
        suffix: str = "",
        chat: Mapping[str, Any] | None = None,
        dropped: int | None = None,
        multi_vector: bool = False,
        norm: nn.Module | None = None,
        name: str = "text_encoder",
    ) -> None:
        for argument, value in (("text_encoder", text_encoder), ("tokenizer", tokenizer)):
            if isinstance(value, tuple | list):
                raise TypeError(
                    f"{argument}: expected one, got {len(value)}; several text encoders are read "
                    "together by realera_fast.models.text_streams"
                )
        outer = plain = text_encoder
        if isinstance(text_encoder, nn.Module):
            outer = plain = unwrapped(text_encoder)
            refuse_offloading(plain, name)
            for own, tensor in (*plain.named_parameters(), *plain.named_buffers()):
                if tensor.is_meta:
                    raise ValueError(
                        f"{name}: {own} is on the meta device (offloaded, or never loaded); load "
                        "the text encoder without device_map and offloading"
                    )
        if hasattr(plain, "merge_and_unload"):
            # peft's wrapper answers like the encoder, but for its class.
            plain = plain.get_base_model()
        if not callable(text_encoder) or not hasattr(plain, "config"):
            raise TypeError(
                f"{name}: expected a transformers text model such as pipe.text_encoder, "
                f"got {type(text_encoder).__name__}"
            )
        self.encoder, self._plain, self._name = outer, plain, name
        given = find_tokenizer(plain) if tokenizer is None else tokenizer
        if not callable(given):
            raise TypeError(
                "tokenizer: expected a transformers tokenizer such as pipe.tokenizer, "
                f"got {type(tokenizer).__name__}"
            )
        # A processor holds the tokenizer beside what it needs for pictures.
        self.tokenizer = getattr(given, "tokenizer", given)
        # A fast tokenizer holds the padding of its last call, and another thread may draw with it.
        # Only what is set for a call is in the copy for sure: decoding stays with the original.
        fast = getattr(self.tokenizer, "is_fast", False)
        self._split = copy.deepcopy(self.tokenizer) if fast else self.tokenizer
        self._plain_ids = _remembered(self._split)
        # Packed weights are no parameters.
        tensors = (*text_encoder.parameters(), *text_encoder.buffers())
        self.device: torch.device = tensors[0].device if tensors else torch.device("cpu")
        self.output, self._layers, self._norm = output, tuple(layers), norm
        self._lowercase, self._clean = lowercase, clean
        self._visible_padding, self._front_padding = visible_padding, front_padding
        # Diffusers counts a further vector of the word X as the added token X_1.
        added = getattr(self.tokenizer, "added_tokens_encoder", None) or {}
        self._expand = multi_vector and any(f"{token}_1" in added for token in added)
        head = getattr(text_encoder, "get_output_embeddings", None)
        self._has_head = callable(head) and head() is not None
        hidden = masked if encoder_mask is None else encoder_mask
        # In front of the prompt, hidden padding is the same vector everywhere.
        in_front = bool(encoder_mask) and getattr(self.tokenizer, "padding_side", "") == "left"
        self.masked = masked or in_front
        of_text = self._read_sizes(max_tokens)
        self._use_mask = hidden or bool(getattr(plain.config, "use_attention_mask", False))
        # What follows a row in a causal encoder does not change it, so that it needs no padding.
        causal = getattr(of_text, "model_type", "") == "clip_text_model"
        causal = causal and not (instruction or suffix or chat)
        self._causal = causal and not self._use_mask
        self.reads_unpadded = self._causal or hidden or bool(front_padding)
        if chat is None:
            self._frame = PromptFrame(instruction, suffix)
        else:
            self._frame = chat_frame(given, instruction, chat)
        self.parameters_per_token = _parameters_per_token(self._plain)
        """Parameters that a token is multiplied with (count): all but the tables of embeddings."""
        self._fingerprint: str | None = None
        # Flash attention reads every mask as one of padding.
        attention = getattr(plain.config, "_attn_implementation", None)
        self._reader = PackedReader(
            longest=self.rows, numbers=_BLOCK // 8, packs=attention in ("sdpa", "eager")
        )
        # A few templates come before all words.
        self._tokens_before = functools.lru_cache(maxsize=1024)(self._count)
        self._place_prompts(0 if dropped is None and chat is not None else dropped)

    def _read_sizes(self, max_tokens: int | None) -> Any:
        """Reads width and rows off the configuration; that of the text, which it gives back."""
        config = self._plain.config
        # A vision-language model keeps that of its text apart.
        of_text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.width: int = int(of_text.hidden_size) * max(1, len(self._layers))
        if self.output == "pooled" and "Projection" in type(self._plain).__name__:
            self.width = int(config.projection_dim)
        positions = getattr(of_text, "max_position_embeddings", self.tokenizer.model_max_length)
        rows = min(self.tokenizer.model_max_length, positions, max_tokens or math.inf)
        if rows > _LONGEST:
            raise ValueError(
                f"reading: neither {self._name} nor its tokenizer says how many tokens a prompt "
                "has; name max_tokens"
            )
        self.rows = int(rows)
        """Tokens of a prompt, padding included."""
        self.max_tokens: int = 1 if self.output == "pooled" else self.rows
        return of_text

    def _place_prompts(self, dropped: int | None) -> None:
        """Finds where prompts stand among the tokens and among the rows.

        Raises:
            ValueError: the rows that are cut out are more than those before a prompt.
        """
        frame = self._frame
        plain, special = self.token_ids("a"), self._ids("a")
        places = range(len(special) - len(plain) + 1)
        self._lead = next((i for i in places if special[i : i + len(plain)] == plain), 0)
        self._specials = len(special) - len(plain)
        self._in_front = self._plain_ids(frame.before)
        self._before = self._start("a")
        self._after = len(self._plain_ids(frame.after)) if frame.after else 0
        if dropped is None:
            # Of the instruction's tokens one stays, in front of the prompt's.
            self._cut, self._kept = max(0, self._lead + len(self._in_front) - 2), 1
        else:
            self._cut, self._kept = dropped, 0
        if self._cut > self._lead + self._before:
            raise ValueError(
                f"tokenizer: {self._lead + self._before} tokens stand before a prompt, but the "
                f"pipeline cuts {self._cut} rows out; pass the tokenizer of this model"
            )

    @property
    def first(self) -> TextModel:
        """The encoder itself: its tokenizer says what words there are."""
        return self

    @property
    def models(self) -> tuple[TextModel, ...]:
        """The encoder itself."""
        return (self,)

    @property
    def is_causal(self) -> bool:
        """Whether a row depends on what stands before it alone, and there is one a token."""
        return self._causal and self.output != "pooled"

    @property
    def input_embeddings(self) -> Tensor:
        """`[v, d]` embeddings of the tokens, before the encoder mixes them."""
        weight: Tensor = self._plain.get_input_embeddings().weight
        return weight

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text alone, without special ones, never cut."""
        return list(self._plain_ids(self._prepared(text)))

    def name_key(self, name: str) -> Hashable:
        """The tokens of a name: equal for names that are the same to the encoder.

        Raises:
            ValueError: the encoder does not know one of them.
        """
        found = tuple(self.token_ids(name))
        words = _rows(self.encoder)
        if words is not None and max(found, default=0) >= words:
            raise ValueError(
                f"tokenizer: {name!r} has token {max(found)}, the text encoder knows {words}: pass "
                "the tokenizer that belongs to it"
            )
        return found

    def control_token(self, text: str) -> str | None:
        """A control token of the tokenizer (end-of-text, padding) that the text holds, if any."""
        text = self._prepared(text)
        # By number too: a tokenizer may know them in other cases.
        ids = set(self._plain_ids(text))
        return next((t for t, number in self._controls.items() if t in text or number in ids), None)

    def unknown(self, name: str) -> bool:
        """Whether the tokenizer has no token of its own for a part of the name."""
        token = getattr(self.tokenizer, "unk_token", None)
        # One that knows every byte may name another of its tokens here, as CLIP's does.
        if token is None or self._controls.get(str(token)) is not None:
            return False
        return self.tokenizer.unk_token_id in self.token_ids(name)

    @functools.cached_property
    def _controls(self) -> dict[str, int | None]:
        """Control tokens with their numbers; unknown words have none.

        A single character is no control token: Stable Diffusion 2 pads with "!".
        """
        tokenizer = self.tokenizer
        special = [str(token) for token in getattr(tokenizer, "all_special_tokens", ())]
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special += [token.content for token in added if getattr(token, "special", False)]
        ends = {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad")}
        unknown = getattr(tokenizer, "unk_token_id", None)
        numbers: dict[str, int | None] = {}
        for token in special:
            number = tokenizer.convert_tokens_to_ids(token)
            if len(token) > 1:
                # What is no word to the tokenizer gets this number as well.
                numbers[token] = number if number != unknown or token in ends else None
        return numbers

    def overflow(self, prompt: str) -> str:
        """The end of a prompt that the encoder would not see; `""` if it sees all."""
        tokens = self.token_ids(prompt)
        room = self.rows + self._cut - self._specials - self._before - self._after
        return self.tokenizer.decode(tokens[room:]).strip() if len(tokens) > room else ""

    def span(self, before: str, word: str) -> Span:
        """Rows of a word that follows the text `before` in a prompt."""
        if self.output == "pooled":
            return Span(0, 1)
        place = self.token_span(before, word)
        return Span(place.start - self._cut, place.stop - self._cut)

    def token_span(self, before: str, word: str) -> Span:
        """Tokens of a word that follows the text `before` in a prompt, as `tokenize` has them."""
        before = before if before.strip() else ""
        start = self._tokens_before(before.rstrip()) if before else self._start(word)
        stop = self._count(before + word) if word else start
        return Span(start + self._lead, stop + self._lead)

    def ends(self, prompts: Sequence[str]) -> list[int]:
        """Row of the last token of each prompt: end-of-text where the tokenizer has one."""
        if self.output == "pooled" or not prompts:
            return [0] * len(prompts)
        found: list[int] = (self.tokenize(prompts)[1].sum(dim=1) - 1 - self._cut).tolist()
        return found

    def shares(self, prompts: Sequence[str]) -> Tensor:
        """`[p, t]` float64 weights of the rows, a sum of 1 each; 0 for rows that carry no text."""
        if self.output == "pooled":
            return torch.ones(len(prompts), 1, dtype=torch.float64, device="cpu")
        # What stands before every prompt is the same vector in all of them, where the encoder is
        # causal; a bidirectional one (T5) puts nothing before.
        first = self._lead + self._before - self._cut
        counts = torch.zeros(len(prompts), self.max_tokens, dtype=torch.float64, device="cpu")
        counts[:, first:] = 1.0
        if self.masked:
            rows = torch.arange(self.max_tokens, device="cpu")
            last = torch.tensor(self.ends(prompts), device="cpu") + self._visible_padding
            counts *= rows <= last.unsqueeze(1)
        return counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`[p, n]` int64 token ids, padded and cut as the family does, and `[p, n]` their mask."""
        tokens = self._split(
            [self._frame.around(self._prepared(prompt)) for prompt in prompts],
            padding="max_length",
            max_length=self.rows + self._cut,
            truncation=True,
            return_tensors="pt",
            padding_side="right",
            add_special_tokens=self._frame.special_tokens,
        )
        return tokens.input_ids, tokens.attention_mask

    def encode(
        self,
        prompts: Sequence[str],
        *,
        batch_size: int | None = None,
        progress: bool | None = False,
        desc: str = "encode",
    ) -> Tensor:
        """`[p, t, d]` float32 embeddings of the prompts, on the encoder's device.

        The encoder runs in its own dtype and in evaluation mode; its mode is put back.

        Args:
            batch_size: prompts encoded together; `None` is 64, or fewer where they are long.
        """
        return self._encode(prompts, False, batch_size, progress, desc)

    def encode_visible(self, prompts: Sequence[str]) -> Tensor:
        """The rows of `encode` that the denoiser sees; where padding is hidden from it, zeros or
        anything for the rest, which is not computed beyond the longest prompt."""
        return self._encode(prompts, self.masked and self.output != "pooled", None, False, "")

    @torch.no_grad()
    def _encode(
        self,
        prompts: Sequence[str],
        visible: bool,
        batch_size: int | None,
        progress: bool | None,
        desc: str,
    ) -> Tensor:
        if not prompts:
            return torch.zeros(
                0, self.max_tokens, self.width, dtype=torch.float32, device=self.device
            )
        if batch_size is None:
            batch_size = max(1, min(64, _BLOCK // (self.rows * self.width)))
        hidden = []
        with self._reading(), progress_bar(total=len(prompts), desc=desc, progress=progress) as bar:
            for start in range(0, len(prompts), batch_size):
                ids, mask = self.tokenize(prompts[start : start + batch_size])
                if visible:
                    longest = int(mask.sum(dim=1).max()) + self._visible_padding
                    ids, mask = ids[:, :longest], mask[:, :longest]
                states = self._states(ids.to(self.device), mask.to(self.device)).to(self.device)
                rest = self.max_tokens - states.shape[1]
                hidden.append(nn.functional.pad(states, (0, 0, 0, rest)) if rest else states)
                bar.update(len(ids))
        return self._finite(torch.cat(hidden))

    def encode_free(self, prompts: FreePrompts) -> Tensor:
        """`[j, t, d]` float32 embeddings, with gradients of their vectors where these ask for
        them."""
        vectors = prompts.vectors[self.encoder]
        place = self.token_span(prompts.before, prompts.word)

        own = threading.get_ident()

        def replaced(module: nn.Module, arguments: Any, rows: Tensor) -> Tensor:
            if threading.get_ident() != own:
                return rows  # someone who draws in another thread
            parts = (rows[:, :start], vectors.to(rows), rows[:, stop:])
            return torch.cat(parts, dim=1)

        one = self.tokenize([prompts.prompt])
        ids, mask = (x.to(self.device).expand(len(vectors), -1) for x in one)
        filled = int(self._filling(mask)[0]) if self._front_padding else 0
        start, stop = place.start + filled, place.stop + filled
        with self._reading():
            hook = self._plain.get_input_embeddings().register_forward_hook(replaced)
            try:
                return self._states(ids, mask).to(self.device)
            finally:
                hook.remove()

    @torch.no_grad()
    def first_rows(self, prompts: Sequence[str], counts: Sequence[int]) -> Tensor:
        """`[sum of counts, d]` float32: so many rows of each prompt, those of `encode` to rounding.

        A causal encoder does not compute what comes after them.
        """
        if not prompts:
            return torch.zeros(0, self.width, dtype=torch.float32, device=self.device)
        ids = self.tokenize(prompts)[0]
        tokens = [row[:count] for row, count in zip(ids.tolist(), counts, strict=True)]
        with self._reading():
            found = dict(self._reader.rows(tokens, self._states, self.input_embeddings))
        return self._finite(torch.cat([found[place] for place in range(len(prompts))]))

    @torch.no_grad()
    def last_rows(
        self,
        prompts: Sequence[str],
        *,
        progress: bool | None = False,
    ) -> Tensor:
        """`[p, d]` float32 rows of the last token of each prompt: of end-of-text where there is
        one, or the pooled vectors; words are compared by them.

        An encoder that is causal, or from which padding is hidden, reads prompts without it: the
        rows are those of `encode`, to rounding, in a tenth of the time. An instruction, which is
        many times as long as a word, is left out where begin-of-text stands before the word.
        """
        if not prompts:
            return torch.zeros(0, self.width, dtype=torch.float32, device=self.device)
        if not self.reads_unpadded:
            rows = []
            for start in range(0, len(prompts), 64):
                few = prompts[start : start + 64]
                last = torch.tensor(self.ends(few), dtype=torch.long, device=self.device)
                rows.append(self.encode(few)[torch.arange(len(few), device=self.device), last])
            return torch.cat(rows)
        # The first token of a language model is like no other, whatever it is.
        before = "" if self._lead else self._frame.before
        ids = self._split(
            [before + self._prepared(prompt) for prompt in prompts],
            max_length=self.rows + self._cut,
            truncation=True,
            add_special_tokens=self._frame.special_tokens,
        ).input_ids
        of_length: dict[int, list[int]] = {}
        for place, tokens in enumerate(ids):
            of_length.setdefault(len(tokens), []).append(place)
        found = torch.zeros(len(prompts), self.width, dtype=torch.float32, device=self.device)
        with (
            self._reading(),
            progress_bar(total=len(prompts), desc="words", progress=progress) as bar,
        ):
            if self.is_causal:
                read = self._reader.rows(ids, self._states, self.input_embeddings)
                for place, states in read:
                    found[place] = states[-1]
                    bar.update(1)
                return self._finite(found)
            for length, places in of_length.items():
                for part in _blocks(places, length * self.width):
                    given = torch.tensor([ids[place] for place in part], device=self.device)
                    found[part] = self._states(given, torch.ones_like(given), alone=True)[:, -1]
                    bar.update(len(part))
        return self._finite(found)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The encoder is in evaluation mode inside; its mode is put back."""
        # Another model's erasure may use the same encoder: it must not see this one's mode end.
        with locked(self.encoder), uncompiled(self.encoder):
            training = {module: module.training for module in self.encoder.modules()}
            self.encoder.eval()
            try:
                yield
            finally:
                for module, flag in training.items():
                    module.training = flag

    def _finite(self, rows: Tensor) -> Tensor:
        if rows.shape[-1] != self.width or not torch.isfinite(rows).all():
            raise ValueError(
                f"{self._name}: expected finite embeddings of width {self.width}, got shape "
                f"{tuple(rows.shape)}" + ("" if torch.isfinite(rows).all() else " with NaN or Inf")
            )
        return rows

    def fingerprint(self) -> str:
        """SHA-256 over the encoder's weights, how it is read, and the tokenizer's vocabulary.

        Raises:
            ValueError: the encoder holds weights that can't be read.
        """
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for name, value in sorted(self._plain.state_dict().items()):
            try:
                _add(digest, name, value)
            except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
                raise ValueError(
                    f"{self._name}: its {name}, {type(value).__name__}, can't be read ({error}); "
                    "load the text encoder without quantization"
                ) from error
        if _has_more_than_weights(self._plain):
            # Adapters with their strengths, hooks, functions in the place of methods.
            _add(digest, "probe", self.encode([_PROBE]))
        for token, index in sorted(self.tokenizer.get_vocab().items()):
            digest.update(f"{token}\0{index}\0".encode())
        read = (self.output, self._layers, self.rows, self.masked, self._use_mask)
        made = (self._lowercase, self._clean, self._frame, self._cut, self._kept, self._expand)
        padded = (self._visible_padding, self._front_padding)
        digest.update(repr((*read, *made, *padded)).encode())
        for name, value in {} if self._norm is None else self._norm.state_dict().items():
            _add(digest, f"norm {name}", value)
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    # Inside

    def _start(self, word: str) -> int:
        """Tokens before a word that begins a prompt: a space may have become a part of it."""
        followed = self._plain_ids(self._frame.before + self._prepared(word))
        same = (one == other for one, other in zip(self._in_front, followed, strict=False))
        return sum(1 for _ in itertools.takewhile(bool, same))

    def _count(self, text: str) -> int:
        return len(self._plain_ids(self._frame.before + self._prepared(text)))

    def _ids(self, text: str) -> list[int]:
        special = self._frame.special_tokens
        return list(self._split(text, verbose=False, add_special_tokens=special).input_ids)

    def _prepared(self, prompt: str) -> str:
        if self._expand:
            from diffusers.loaders import TextualInversionLoaderMixin

            mixin = TextualInversionLoaderMixin()
            prompt = str(mixin.maybe_convert_prompt(prompt, self.tokenizer))
        if self._clean:
            prompt = cleaned(prompt)
        return prompt.lower().strip() if self._lowercase else prompt

    def _states(
        self, ids: Tensor, mask: Tensor, *, alone: bool = False, positions: Tensor | None = None
    ) -> Tensor:
        """`[p, n, d]` states of tokens; of those of the instruction, which are not there where
        prompts stand alone, the first.

        Args:
            positions: `[p, n]` where tokens stand, if not one after the other; the mask is then
                what is added to attention's scores.
        """
        # A language model with a head gives logits in place of its last states.
        has_states = self.output == "penultimate" or self._has_head or bool(self._layers)
        options: dict[str, Any] = {"output_hidden_states": True} if has_states else {}
        if self._has_head and "logits_to_keep" in _arguments(type(self._plain)):
            options["logits_to_keep"] = 1  # of a hundred thousand words at every token
        count = ids.shape[1]
        if self._front_padding:
            # A causal encoder does not read what fills the shorter ones up behind.
            filled = self._filling(mask)[:, None]
            places = torch.arange(count + self._front_padding - 1, device=ids.device) - filled
            inside = (places >= 0) & (places < count)
            taken = ids.gather(1, places.clamp(0, count - 1))
            ids = torch.where(inside, taken, self.tokenizer.pad_token_id)
        try:
            if positions is not None:
                options["position_ids"] = positions
            is_used = self._use_mask or positions is not None
            output = self.encoder(ids, attention_mask=mask if is_used else None, **options)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"{self._name}: it fails when it is called ({type(error).__name__}: {error}); try "
                "whether the pipeline draws with it, and load it as it was trained"
            ) from error
        if self.output == "pooled":
            embeds = getattr(output, "text_embeds", None)
            pooled: Tensor = output.pooler_output if embeds is None else embeds
            return pooled.float().unsqueeze(1)
        hidden: Tensor
        if self._layers:
            hidden = torch.cat([output.hidden_states[layer] for layer in self._layers], dim=-1)
        elif has_states:
            hidden = output.hidden_states[-2 if self.output == "penultimate" else -1]
        else:
            hidden = output[0]
        if self._front_padding:
            rows = torch.arange(count, device=hidden.device) + filled.to(hidden.device)
            hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        if self._cut and not alone:
            kept = hidden[:, : self._kept]
            hidden = torch.cat((kept, hidden[:, self._kept + self._cut :]), dim=1)
        return self._normed(hidden).float()

    def _filling(self, mask: Tensor) -> Tensor:
        """`[p]` int64, tokens of padding in front of each prompt."""
        return -mask.sum(dim=1) % self._front_padding

    def _normed(self, hidden: Tensor) -> Tensor:
        """What the denoiser's norm makes of states, where it has one before its map."""
        if self._norm is None:
            return hidden
        normed: Tensor = self._norm(hidden.to(next(self._norm.parameters(), hidden)))
        return normed.to(hidden.device)


def _arguments(kind: type) -> frozenset[str]:
    """Names of what a model is called with."""
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _parameters_per_token(encoder: Any) -> int:
    tables = {id(m.weight) for m in encoder.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in encoder.parameters() if id(p) not in tables)


def _blocks(places: Sequence[int], numbers: int) -> Iterator[list[int]]:
    """Places whose prompts are read together, each of so many numbers of embeddings."""
    together = max(1, min(1024, _BLOCK // (8 * numbers)))
    for start in range(0, len(places), together):
        yield list(places[start : start + together])


def _add(digest: Any, name: str, value: Any) -> None:
    """Adds an entry of a state to a hash: tensors of any kind, and what quantizers pack."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        inner, context = value.__tensor_flatten__()
        _add(digest, f"{name} {type(value).__name__}", context)
        for part in inner:
            _add(digest, f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        data = value.detach().as_subclass(Tensor)
        data = data.dequantize() if data.is_quantized else data
        data = data.to_dense() if data.layout != torch.strided else data
        data = data.cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    elif isinstance(value, tuple | list):
        for place, part in enumerate(value):
            _add(digest, f"{name}[{place}]", part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _add(digest, f"{name}[{key!r}]", part)
    elif isinstance(value, torch.ScriptObject):
        _add(digest, name, value.__getstate__())
    elif value is None or isinstance(value, str | bytes | int | float | torch.dtype | torch.device):
        digest.update(f"{name}={value!r}".encode())
    else:
        digest.update(name.encode() + pickle.dumps(value))


_PROBE = "a photo of a cat"


def _has_more_than_weights(encoder: nn.Module) -> bool:
    """Whether something acts on the embeddings that the weights don't tell."""
    for module in encoder.modules():
        functions = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not (hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")):
            functions += [vars(module)["forward"]] if "forward" in vars(module) else []
        # Transformers' own hooks collect outputs, PyTorch's make weights of other weights.
        roots = {getattr(f, "__module__", type(f).__module__).split(".")[0] for f in functions}
        if hasattr(module, "base_layer") or roots - {"transformers", "torch"}:
            return True
    return False
