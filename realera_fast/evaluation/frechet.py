"""Fréchet distances between sets of images: FID, and the same on CLIP's features.

FID (Heusel et al. 2017, arXiv 1706.08500) is the distance of two Gaussians that have the means and
covariances of two sets of features,

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

with features of InceptionV3. On CLIP's image embeddings it agrees better with people (Kynkäänniemi
et al. 2022, arXiv 2203.06026). torchmetrics keeps the moments and takes the distance.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from realera_fast.evaluation.html import Table
from realera_fast.evaluation.images import Row

STAYS = ("relative", "untouched")
"""Groups whose images should look as before."""
BATCH = 32


class FeatureModel(Protocol):
    """Anything that maps images to vectors; `ClipJudge` and `InceptionFeatures` do."""

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """`[n]` images to `[n, d]` features."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What it takes to compute the same again."""
        ...


@dataclass(frozen=True, kw_only=True)
class FrechetDistances:
    """How far sets of images are from each other; lower is nearer."""

    before: float
    """From the reference to the images of the original model."""

    after: float
    """From the reference to the images of the edited model."""

    between: float
    """From the images of the original model to those of the edited one."""

    pictures: int
    """Images on each side."""

    reference: int
    """Images of the reference."""

    width: int
    """Length of a feature."""

    model: Mapping[str, Any]
    """Whose features they are: classes, versions, hashes."""

    def warnings(self) -> Iterator[str]:
        """What a reader must not overlook."""
        fewest = min(self.pictures, self.reference)
        if fewest <= self.width:
            yield (
                f"Fréchet distances of {fewest} pictures and {self.width} features are biased "
                "upwards; compare them only with those of as many pictures (10,000 are usual)"
            )

    def table(self) -> Table:
        """What the page shows."""
        return Table(
            title="Fréchet distances of what should stay",
            header=("", "distance"),
            rows=(
                ("reference to before", round(self.before, 3)),
                ("reference to after", round(self.after, 3)),
                ("before to after", round(self.between, 3)),
            ),
            note=f"Features: {self.model['name']}. {self.pictures} pictures a side, "
            f"{self.reference} of the reference; lower is nearer.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "model": dict(self.model)}


class FrechetReference:
    """Images that a good model's look like, as the moments of their features."""

    def __init__(self, images: Iterable[Image.Image], model: FeatureModel) -> None:
        """
        Args:
            images: in any sizes; read once, in batches.
            model: gives the features.

        Raises:
            ValueError: fewer than two images.
            ModuleNotFoundError: ``torchmetrics`` is not installed.
        """
        _need("torchmetrics")
        self._model, self.count = model, 0
        self._metric: Any = None
        for batch in _batches(images):
            features = model.features(batch).double()
            if self._metric is None:
                self._metric = _metric(features.shape[1])
            self._metric.update(features, real=True)
            self.count += len(batch)
        _check_count("images", self.count, "name a folder with more")

    def distances(self, rows: Iterable[Row]) -> FrechetDistances:
        """Distances of the images that should stay, before and after.

        Args:
            rows: what `verify` drew; relatives and untouched prompts count, the erased ones do not.

        Raises:
            ValueError: fewer than two such images on a side.
        """
        kept = [row for row in rows if row.group in STAYS]
        before, after = (
            [self._model.features(batch).double() for batch in _batches(images)]
            for images in ([i for r in kept for i in r.before], [i for r in kept for i in r.after])
        )
        count = sum(map(len, before))
        _check_count("rows", count, "draw more relatives and untouched prompts, or more seeds")
        width = before[0].shape[1]
        own = _metric(width)
        for part in before:
            own.update(part, real=True)
        return FrechetDistances(
            before=_distance(self._metric, before),
            after=_distance(self._metric, after),
            between=_distance(own, after),
            pictures=count,
            reference=self.count,
            width=width,
            model={
                **self._model.identity(),
                "torchmetrics": importlib.metadata.version("torchmetrics"),
            },
        )


class InceptionFeatures:
    """The 2,048 features of InceptionV3 that FID is defined on, from weights of the user's.

    The network and its resizing (bilinear, antialiased) are torchmetrics' and torch-fidelity's.
    Figures of tools that resize otherwise differ.
    """

    def __init__(self, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> None:
        """
        Args:
            path: InceptionV3 as torch-fidelity publishes it: the file
                ``weights-inception-2015-12-05-6726825d.pth``, a state dict.
            device: where it runs.

        Raises:
            ModuleNotFoundError: ``torchmetrics`` or ``torch-fidelity`` is not installed.
            ValueError: the file holds other weights, or anything that is no tensor.
        """
        _need("torchmetrics")
        _need("torch_fidelity")
        from torchmetrics.image.fid import NoTrainInceptionV3

        expected = "expected the state dict of InceptionV3 that torch-fidelity publishes"
        try:
            # torch-fidelity unpickles whatever the file holds; a pickle can run anything.
            torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            raise ValueError(f"path: {path} holds no weights alone; {expected}") from error
        try:
            self._network = NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=["2048"],
                feature_extractor_weights_path=os.fspath(path),
            ).to(device)
        except (RuntimeError, TypeError, AttributeError) as error:
            told = " ".join(str(error).split())[:200]
            raise ValueError(f"path: {path} holds other weights ({told}); {expected}") from error
        self._path, self._device = Path(path), device

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """`[n]` images of any sizes to `[n, 2048]` float32 features on the CPU."""
        found = [torch.zeros(0, 2048)]
        with torch.no_grad():
            for image in images:
                red_green_blue = image.convert("RGB")
                pixels = torch.frombuffer(bytearray(red_green_blue.tobytes()), dtype=torch.uint8)
                pixels = pixels.reshape(1, red_green_blue.height, red_green_blue.width, 3)
                found.append(self._network(pixels.movedim(3, 1).to(self._device)).float().cpu())
        return torch.cat(found)

    def identity(self) -> dict[str, Any]:
        """What it takes to compute the same again: versions and the weights' SHA-256."""
        return {
            "name": "inception-v3, 2048",
            "torch-fidelity": importlib.metadata.version("torch-fidelity"),
            "weights_sha256": hashlib.sha256(self._path.read_bytes()).hexdigest(),
        }


def pictures_in(folder: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The images of a folder, in the order of their names, read one by one as RGB.

    Raises:
        ValueError: it holds none, or one that can't be read.
    """
    Image.init()
    known = {suffix for suffix, form in Image.EXTENSION.items() if form in Image.OPEN}
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in known)
    if not paths:
        raise ValueError(f"folder: {folder} holds no pictures; expected files such as .png, .jpg")
    for path in paths:
        try:
            with Image.open(path) as image:
                yield image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"folder: {path} is not a picture that can be read") from error


def _batches(images: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    left = iter(images)
    while batch := list(islice(left, BATCH)):
        yield batch


def _check_count(name: str, count: int, advice: str) -> None:
    if count < 2:
        raise ValueError(
            f"{name}: a Fréchet distance needs at least 2 pictures a side, got {count}; {advice}"
        )


def _distance(metric: Any, features: Iterable[Tensor]) -> float:
    """From the moments that a metric holds to these features'."""
    metric.reset()
    for part in features:
        metric.update(part, real=False)
    return float(metric.compute())


def _metric(width: int) -> Any:
    """torchmetrics' FID on features that are given to it in place of images; `reset` keeps those of
    the reference."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = torch.nn.Identity()
    given.num_features = width  # type: ignore[assignment]
    # Each process has all the pictures: summed over processes they would count several times.
    return FrechetInceptionDistance(feature=given, reset_real_features=False, sync_on_compute=False)


def _need(package: str) -> None:
    """
    Raises:
        ModuleNotFoundError: a package is not installed, with what to do.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        # Of torch-fidelity, too, torchvision may be what is missing: no extra names that, for
        # its builds belong to one torch each.
        missing = (error.name or package).split(".")[0].replace("_", "-")
        what = "'realera_fast[eval]'" if missing == "torchmetrics" else missing
        raise ModuleNotFoundError(
            f"Fréchet distances need a package that is not here; run `pip install {what}`",
            name=error.name,
        ) from error
