"""An erasure as a technique of eval-unlearn, which its benchmarks run.

eval-unlearn finds it by the entry point ``eval_unlearn.techniques`` under the name
``realera_fast``. Nothing of eval-unlearn is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from realera_fast.erasure import Erasure
from realera_fast.evaluation.images import Sampling, generate
from realera_fast.models import DTYPES, components_of, load_pipeline
from realera_fast.runtime import folded

if TYPE_CHECKING:
    from PIL import Image

_SAMPLING = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "height": "height",
    "width": "width",
    "batch_size": "batch_size",
}
"""Their names of what `Sampling` holds."""


class UnlearnTechnique:
    """Draws from a model that something was erased from."""

    def __init__(
        self,
        model: str,
        *,
        delta: str | os.PathLike[str] | None = None,
        erase_concept: str | None = None,
        dtype: str = "fp32",
        device: str | None = None,
        **sampling: Any,
    ) -> None:
        """
        Args:
            model: a pipeline folder, the id of a cached one, or a single `.safetensors` checkpoint.
            delta: a file that `Erasure.save` wrote. Without it `erase_concept` is erased, with the
                default settings.
            erase_concept: the concept by the name that eval-unlearn checks metrics against; one
                that `delta` erases, where both are given.
            dtype: "fp32", "bf16" or "fp16".
            device: "cuda", "cpu" ...; None is the first GPU, or the CPU.
            sampling: `num_inference_steps` (50), `guidance_scale` (7.5), `height`, `width` and
                `batch_size` (4).

        Raises:
            TypeError: an argument has no such name.
            ValueError: neither a delta nor a concept, a delta of other concepts, or no such dtype.
        """
        if delta is None and not erase_concept:
            raise ValueError("delta: expected a file, or erase_concept with what is to be erased")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self._sampling = {"steps": 50, **_sampling_of(sampling)}
        Sampling(**self._sampling)
        loaded = None if delta is None else Erasure.load(delta)
        if loaded is not None and erase_concept:
            _check_erased(loaded, erase_concept)
        self.pipe = load_pipeline(model, dtype=DTYPES[dtype], device=device)
        if loaded is not None:
            self.erasure = loaded
            self.erasure.apply_(components_of(self.pipe).model)
        else:
            from realera_fast.eraser import erase

            self.erasure = erase(self.pipe, [str(erase_concept)])

    def generate(
        self, prompts: Sequence[str], seed: int | None = None, **sampling: Any
    ) -> list[Image.Image]:
        """Draws image i of prompt i from the seed `seed + i`.

        Args:
            prompts: `[n]` prompts.
            seed: None takes seeds of torch's own generator.
            sampling: of this call; named as for the class.

        Returns:
            `[n]` RGB images.
        """
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        settings = Sampling(**{**self._sampling, **_sampling_of(sampling)})
        seeds = range(seed, seed + len(prompts))
        return generate(self.pipe, prompts, seeds, settings, progress=False)


def _check_erased(erasure: Erasure, name: str) -> None:
    """
    Raises:
        ValueError: scores of this concept would be those of another.
    """
    words = [word for concept in erasure.concepts for word in concept.words]
    if folded(name.replace("_", " ")) not in {folded(word.replace("_", " ")) for word in words}:
        shown = ", ".join(map(repr, words[:8])) + (", ..." if len(words) > 8 else "")
        raise ValueError(
            f"erase_concept: expected one that the delta erases ({shown or 'none'}), got {name!r}; "
            "pass the delta of this concept, or no delta to erase it now"
        )


def _sampling_of(given: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(given.keys() - _SAMPLING.keys())
    if unknown:
        raise TypeError(f"{unknown[0]}: no such setting; expected one of {', '.join(_SAMPLING)}")
    return {_SAMPLING[name]: value for name, value in given.items()}
