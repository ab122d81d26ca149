"""An erasure inside ComfyUI: on a model, or on a conditioning.

ComfyUI keeps a model in a patcher, which clones itself and adds patches to weights when it loads
them, and a prompt as a list of embeddings with a dictionary each. Nothing of it is imported here:
both are duck-typed, and `tools/comfyui_nodes.py` passes what ComfyUI has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from realera_fast.erasure.adapters import adapter_factors
from realera_fast.erasure.base_model import BaseModelMismatchError
from realera_fast.erasure.edit import edit_of
from realera_fast.models import is_self_attention, stream_of, weights_hash
from realera_fast.solver import PromptMap

if TYPE_CHECKING:
    from realera_fast.erasure.erasure import Erasure

PREFIX = "diffusion_model."
_FIXED = {
    "label_emb.0.0": "add_embedding.linear_1",
    "txt_in": "context_embedder",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
}
"""Layers that read text and stand in no block: Stable Diffusion XL, FLUX.1."""
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.1\.(transformer_blocks\..+)")
_MIDDLE = "middle_block.1."


def comfyui_model(
    model: Any,
    erasure: Erasure,
    load_lora: Callable[[Mapping[str, Tensor], Mapping[str, str]], Mapping[str, Any]],
    strength: float = 1.0,
) -> Any:
    """A clone of a model with an erasure on it; the model itself stays as it is.

    Args:
        model: ComfyUI's patcher of a Stable Diffusion 1, 2, XL or FLUX.1.
        erasure: of that base model.
        load_lora: ``comfy.lora.load_lora``, which makes patches of low-rank factors.
        strength: 1 is the erasure; other values scale its change of the weights.

    Raises:
        BaseModelMismatchError: the model is another one, or its weights can't be compared.
    """
    edit = edit_of(erasure)
    weights, keys = {}, {}
    for key, name, weight in _layers(model):
        if _reads_text(name) or name in edit.lora:
            weights[name], keys[name] = weight, key
    _check(erasure, weights)
    missing = sorted(edit.lora.keys() - weights.keys())
    if missing:
        raise BaseModelMismatchError(f"model: it has no projection {missing[0]!r}")
    changed = {name: weight for name, weight in weights.items() if edit.changes(name)}
    clone = model.clone()
    if not changed:
        return clone
    tensors = {}
    for name, (up, down) in adapter_factors(edit, changed).items():
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    patches = load_lora(tensors, {name: keys[name] for name in changed})
    taken = set(clone.add_patches(patches, strength))
    left = sorted({keys[name] for name in changed} - taken)
    if left:
        raise RuntimeError(
            f"ComfyUI took no patch for {left[0]} ({len(left)} of {len(changed)} left out): this "
            "release of it is not known; save_lora(..., layout='kohya') writes a file for its "
            "LoRA loader"
        )
    return clone


def comfyui_conditioning(
    conditioning: Sequence[Sequence[Any]], erasure: Erasure | PromptMap
) -> list[list[Any]]:
    """A conditioning whose embeddings are erased; the given one stays as it is.

    The same as the erasure of the model, if the negative prompt is mapped too.

    Args:
        conditioning: ComfyUI's: pairs of `[b, t, d]` embeddings and a dictionary, which holds the
            pooled vector `[b, q]` as "pooled_output".
        erasure: solved in the text, without a second stage; or its prompt map, which may have gates
            (`PromptMap.load`): prompts without the concept come out bit-identical then.

    Raises:
        ValueError: there is no such map (`Erasure.prompt_map` says why), a pooled vector is
            missing, or a width does not fit.
    """
    erased = erasure if isinstance(erasure, PromptMap) else erasure.prompt_map()
    found = []
    for embeds, options in conditioning:
        erased.to(embeds.device)
        pooled = options.get("pooled_output")
        if erased.pooled is None:
            # Stable Diffusion 1 and 2: ComfyUI hands one on that the model does not read.
            found.append([erased(embeds), dict(options)])
        elif pooled is None:
            raise ValueError("conditioning: it has no pooled_output, which this model reads")
        else:
            mapped, vector = erased(embeds, pooled.to(embeds.device))
            found.append([mapped, {**options, "pooled_output": vector.to(pooled.device)}])
    return found


def _layers(model: Any) -> Iterator[tuple[str, str, Tensor]]:
    """(ComfyUI's key, diffusers' name, un-patched weight) of each attention and entry layer."""
    entries = model.get_key_patches(PREFIX)
    downs = [_number(key) for key in entries if key.endswith(".0.op.weight")]
    inputs = [_number(key) for key in entries if key.startswith(f"{PREFIX}input_blocks.")]
    # The first block that shrinks ends the first level; without one there is a single level.
    per_block = min(downs, default=max(inputs, default=0))
    for key, entry in entries.items():
        name = diffusers_name(key, per_block)
        if name is not None:
            # Newer releases put a function that converts it beside the weight.
            first = entry[0]
            weight = first[0] if isinstance(first, tuple) else first
            if weight.dim() == 2 and weight.is_floating_point():
                yield key, name, weight.detach()


def diffusers_name(key: str, per_block: int) -> str | None:
    """What diffusers calls the layer of a weight; None for what is no layer of attention or text.

    Args:
        key: such as ``diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight``.
        per_block: numbers that a level has among the input blocks: its residual blocks and one.
    """
    if not (key.startswith(PREFIX) and key.endswith(".weight")):
        return None
    layer = key.removeprefix(PREFIX).removesuffix(".weight")
    if layer in _FIXED:
        return _FIXED[layer]
    if layer.startswith(f"{_MIDDLE}transformer_blocks."):
        return f"mid_block.attentions.0.{layer.removeprefix(_MIDDLE)}"
    found = _BLOCK.fullmatch(layer)
    if found is None or not per_block:
        return None
    side, number, rest = found[1], int(found[2]) - (found[1] == "input"), found[3]
    block, place = divmod(number, per_block)
    return f"{'down' if side == 'input' else 'up'}_blocks.{block}.attentions.{place}.{rest}"


def _reads_text(name: str) -> bool:
    # Self-attention has projections of the same names.
    return stream_of(name) is not None and not is_self_attention(name)


def _number(key: str) -> int:
    return int(key.removeprefix(f"{PREFIX}input_blocks.").split(".")[0])


def _check(erasure: Erasure, weights: Mapping[str, Tensor]) -> None:
    """Refuses a model of other weights, as `apply_` does.

    Raises:
        BaseModelMismatchError: with what to do.
    """
    read = {name: weight for name, weight in weights.items() if _reads_text(name)}
    if not read:
        raise BaseModelMismatchError(
            "model: no layer of it is known to read text; expected Stable Diffusion 1, 2, XL or "
            "FLUX.1"
        )
    expected = erasure.provenance.get("base_hashes") or {}
    widest = max((weight.dtype for weight in read.values()), key=lambda dtype: dtype.itemsize)
    dtypes = {getattr(torch, name): wanted for name, wanted in expected.items()}
    # The widest first: the narrower ones can't tell weights apart that round alike.
    for dtype, wanted in sorted(dtypes.items(), key=lambda pair: -pair[0].itemsize):
        if dtype == widest or dtype.itemsize < widest.itemsize:
            if weights_hash(read, dtype) == wanted:
                return
            break
    else:
        raise BaseModelMismatchError(
            f"model: the erasure was made for weights in {', '.join(expected)}, which can't be "
            f"compared with {widest}; load the model in one of the former (--force-fp32 ...), or "
            "erase from the model as ComfyUI loads it"
        )
    raise BaseModelMismatchError(
        "model: its text projections are not those that the erasure was made for; load the "
        "checkpoint that it was made for"
    )
