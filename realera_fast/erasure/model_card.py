"""A model card beside every exported file, by the conventions of the Hugging Face Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from realera_fast.erasure.report import anchor_name, anchors_of
from realera_fast.models import Family
from realera_fast.runtime import write_atomically
from realera_fast.text import Concept

logger = logging.getLogger(__name__)

Use = Literal[
    "lora-diffusers",
    "lora-kohya",
    "lora-hub",
    "weights",
    "single-file",
    "component",
    "factors",
    "hub",
]

_HOW: Mapping[str, str] = {
    "lora-diffusers": (
        'pipe.load_lora_weights("{folder}", weight_name="{file}")\n'
        "# or, where the pipeline has no such method:\n"
        'pipe.{component}.load_lora_adapter("{folder}", weight_name="{file}", prefix="{component}")'
    ),
    "lora-kohya": 'pipe.load_lora_weights("{folder}", weight_name="{file}")',
    "weights": (
        'pipe.{component}.load_state_dict(safetensors.torch.load_file("{file}"), strict=False)'
    ),
    "single-file": 'pipe = DiffusionPipeline.from_single_file("{file}")',
    "component": 'pipe.{component} = type(pipe.{component}).from_pretrained("{folder}")',
    "hub": 'realera_fast.Erasure.from_pretrained("{repo}").apply_(pipe.{component}{target})',
    "lora-hub": (
        'pipe.load_lora_weights("{repo}", weight_name="pytorch_lora_weights.safetensors")\n'
        "# or, checked against the weights that it is for, with an undo:\n"
        'realera_fast.Erasure.from_pretrained("{repo}").apply_(pipe.{component}{target})'
    ),
    "factors": 'realera_fast.Erasure.load("{file}").apply_(pipe.{component}{target})',
}
_SHOWN = 100


class Described(Protocol):
    """What a card tells of an erasure."""

    @property
    def concepts(self) -> Sequence[Concept]:
        """What was erased."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Versions, seed and base hashes."""
        ...

    @property
    def report(self) -> Mapping[str, Any]:
        """How it went."""
        ...


def write_card(
    path: Path,
    erasure: Described,
    *,
    use: Use,
    component: str,
    alone: bool = False,
    repo: str = "",
) -> Path:
    """Writes the card of a file beside it (``NAME.md``), or of a folder into it (``README.md``).

    A file called ``NAME.md`` gets the card ``NAME.md.md``.

    A card that can't be written is warned of: the file that it is about is there.

    Args:
        path: the file or folder that the card is about.
        use: what it is; decides the line of code that loads it.
        component: "unet" or "transformer".
        alone: the file is what its folder is for: the card is the folder's.
        repo: the repository on the Hugging Face Hub that it is uploaded to.

    Returns:
        The path of the card.
    """
    from huggingface_hub import ModelCardData

    is_folder = path.is_dir()
    tags = ["concept-erasure", "realera_fast", "text-to-image"]
    if use.startswith("lora"):
        tags.insert(0, "lora")
    base = erasure.provenance.get("base_model")
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", tags=tags, base_model=base
    )
    # Inside of double quotes, whatever it is made of.
    name = repr(path.name)[1:-1].replace('"', '\\"')
    adapter = erasure.provenance.get("target") == "adapter"
    how = _HOW[use].format(
        folder="path/to/this/folder",
        file=name,
        component=component,
        repo=repo,
        target=', target="adapter"' if adapter else "",
    )
    neighbors, anchors = erasure.report.get("neighbors", {}), anchors_of(erasure.report)
    versions = erasure.provenance.get("versions", {})
    hashes = erasure.provenance.get("base_hashes", {})
    warnings = erasure.report.get("warnings", ())
    lines = [
        f"# Without {_plain(', '.join(c.target for c in erasure.concepts[:5]))}"
        + (" and others" if len(erasure.concepts) > 5 else ""),
        "",
        "Concepts were removed from a text-to-image diffusion model with realera_fast, an "
        "implementation of RealEra (arXiv 2410.09140).",
        "",
        "| erased | also named | neighbors that were mined | becomes | kind |",
        "|---|---|---|---|---|",
        *(
            f"| {_plain(c.target)} | {_plain(', '.join(c.synonyms))} | "
            f"{_plain(', '.join(neighbors.get(c.target, ())[:_SHOWN]))} | "
            f"{_plain(anchor_name(c, anchors))} | {c.kind} |"
            for c in erasure.concepts[:_SHOWN]
        ),
    ]
    if len(erasure.concepts) > _SHOWN:
        lines.append(f"\nand {len(erasure.concepts) - _SHOWN} more, in the file's metadata.")
    lines += ["", "```python", how, "```", ""]
    lines += ["It fits one base model and no other:", ""]
    lines += [f"- {dtype} SHA-256 `{value}`" for dtype, value in hashes.items()]
    if read := erasure.provenance.get("reading"):
        lines += ["", "It was made for what these show the model of a prompt:", ""]
        lines += [f"- {_plain(text)}" for text in Family.from_dict(read).explained()]
    lines += ["", f"Made with {', '.join(f'{k} {v}' for k, v in versions.items()) or 'unknown'}."]
    history = erasure.provenance.get("history", ())
    if history:
        lines += ["", "Before it:", ""]
        lines += [
            f"- {entry['action']} {_plain(', '.join(entry['concepts'][:_SHOWN]))}"
            for entry in history
        ]
    if warnings:
        lines += ["", "Warnings:", ""] + [f"- {_plain(text)}" for text in warnings]
    lines += [
        "",
        "Erasure is no guarantee: determined prompts, image prompts or further training may bring "
        "a concept back. Check it with `realera-fast verify`.",
        "",
    ]
    card = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)
    # Two files that differ in another suffix have two cards, and "NAME.md" is not its own.
    target = path.with_name(path.name.removesuffix(".safetensors") + ".md")
    if is_folder or alone:
        target = (path if is_folder else path.parent) / "README.md"
    try:
        write_atomically(target, card.encode(errors="replace"))
    except OSError as error:
        logger.warning("no model card was written to %s: %s", target, error.strerror)
    return target


def _plain(text: str) -> str:
    """Text that means nothing to Markdown or HTML."""
    safe = (f"&#{ord(c)};" if c in "\\`*_{}[]()#+!|<>&~" else c for c in text)
    return " ".join("".join(safe).split())
