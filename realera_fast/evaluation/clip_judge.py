"""What a CLIP model sees in images: a zero-shot judge, and the CLIP score.

The model is the user's: a folder with a transformers checkpoint, loaded offline from safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from realera_fast.runtime import valid_texts

if TYPE_CHECKING:
    from PIL import Image

THING = "a photo of a {}"
STYLE = "a picture in the style of {}"


class ClipJudge:
    """Names what images show by zero-shot classification, and scores them against prompts."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        things: Sequence[str] = (),
        styles: Sequence[str] = (),
        thing_template: str = THING,
        style_template: str = STYLE,
        batch_size: int = 16,
    ) -> None:
        """
        Args:
            model: a transformers ``CLIPModel`` in any dtype, on any device.
            processor: its ``CLIPProcessor``.
            things: names that an image's content is chosen from.
            styles: names that its style is chosen from.
            thing_template, style_template: prompts that the names are put into (MACE judges
                objects with "a photo of the {}"); ours are the default.
            batch_size: images or prompts encoded together.
        """
        for name, value in (("model", "get_image_features"), ("processor", "tokenizer")):
            got = {"model": model, "processor": processor}[name]
            if not hasattr(got, value):
                raise TypeError(
                    f"{name}: expected transformers' CLIP{name.capitalize()}, got "
                    f"{type(got).__name__}"
                )
        for template in (thing_template, style_template):
            if template.count("{}") != 1:
                raise ValueError(f"template: {template!r} needs exactly one {{}}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.things = valid_texts(things, "things")
        self.styles = valid_texts(styles, "styles")
        self._templates = (thing_template, style_template)
        self._labels: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> ClipJudge:
        """Loads a CLIP model from a folder or from the local cache; the network is not used.

        Args:
            path: a folder, or the id of a cached model.
            options: of the judge, such as `things`.

        Raises:
            ValueError: there is no CLIP model in safetensors.
        """
        from transformers import AutoProcessor, CLIPModel

        try:
            model = CLIPModel.from_pretrained(
                path, dtype=dtype, local_files_only=True, use_safetensors=True
            )
            processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"path: {path} holds no CLIP model that can be loaded offline from safetensors "
                f"({' '.join(str(error).split())[:200]}); expected a transformers checkpoint such "
                "as openai/clip-vit-large-patch14"
            ) from error
        return cls(model.eval().to(device), processor, **options)

    def classify(self, images: Sequence[Image.Image]) -> tuple[list[str], list[str]]:
        """The thing and the style of each of `[n]` images; "" where no names were given."""
        found = []
        features = self._image_features(images)
        for names, template in zip((self.things, self.styles), self._templates, strict=True):
            if not names:
                found.append([""] * len(images))
                continue
            scores = features @ self._label_features(names, template).mT
            found.append([names[i] for i in scores.argmax(dim=1).tolist()])
        return found[0], found[1]

    def probabilities(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """`[n, p]` float32 softmax over the prompts, with the model's own temperature."""
        scale = self.model.logit_scale.detach().float().exp().cpu()
        return (scale * self._image_features(images) @ self._text_features(prompts).mT).softmax(1)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """`[n]` float32 CLIP scores, 100 max(cos, 0), of image i and prompt i.

        Hessel et al. 2021 (arXiv 2104.08718) without its factor 2.5, as torchmetrics gives it.
        Prompts that are longer than the model reads are cut.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"prompts: expected one for each of {len(images)} pictures, got {len(prompts)}"
            )
        cosine = (self._image_features(images) * self._text_features(prompts)).sum(dim=1)
        return 100.0 * cosine.clamp_min(0.0)

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """`[n, d]` float32 image embeddings on the CPU, not normalized: what the Fréchet distance
        of CLIP's features is taken of."""
        found = [torch.zeros(0, self._width, dtype=torch.float32, device="cpu")]
        with self._evaluating():
            for start in range(0, len(images), self.batch_size):
                part = [image.convert("RGB") for image in images[start : start + self.batch_size]]
                pixels = self.processor.image_processor(part, return_tensors="pt").pixel_values
                pixels = pixels.to(self.model.device, self.model.dtype)
                found.append(_embedded(self.model.get_image_features(pixel_values=pixels)))
        return torch.cat(found)

    def identity(self) -> dict[str, Any]:
        """What it takes to judge the same again: class, names, templates, the weights' SHA-256."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return {
            "class": type(self.model).__name__,
            "name": str(getattr(self.model, "name_or_path", "")).rpartition("/")[2],
            "weights_sha256": digest.hexdigest(),
            "transformers": importlib.metadata.version("transformers"),
            "things": list(self.things),
            "styles": list(self.styles),
            "templates": list(self._templates),
        }

    # Inside

    def _label_features(self, names: tuple[str, ...], template: str) -> Tensor:
        if names not in self._labels:
            self._labels[names] = self._text_features([template.format(name) for name in names])
        return self._labels[names]

    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        found = []
        with self._evaluating():
            for start in range(0, len(prompts), self.batch_size):
                tokens = self.processor.tokenizer(
                    list(prompts[start : start + self.batch_size]),
                    padding=True,
                    truncation=True,
                    max_length=limit,
                    return_tensors="pt",
                ).to(self.model.device)
                found.append(_normalized(_embedded(self.model.get_text_features(**tokens))))
        return (
            torch.cat(found)
            if found
            else torch.zeros(0, self._width, dtype=torch.float32, device="cpu")
        )

    def _image_features(self, images: Sequence[Image.Image]) -> Tensor:
        return _normalized(self.features(images))

    @property
    def _width(self) -> int:
        return int(self.model.config.projection_dim)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, flag in training.items():
                module.training = flag


def _embedded(output: Any) -> Tensor:
    """`[n, d]` float32 rows on the CPU; newer releases wrap them in an output."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float().cpu()


def _normalized(features: Tensor) -> Tensor:
    return features / features.norm(dim=1, keepdim=True)
