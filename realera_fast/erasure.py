"""The result of an erasure: small factors that can be applied, undone, saved and shared.

    W' = W + (W L) R + up @ down

L and R are the closed form's map, shared by all text projections; up and down the alignment's LoRA
factors of each, and of queries and outputs where these were trained. The sum is made in float32
(float64 for float64 weights) and rounded once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from realera_fast import ops
from realera_fast.concept_map import ConceptMap
from realera_fast.concepts import Concept
from realera_fast.files import write_atomically
from realera_fast.incremental import IncrementalSystem
from realera_fast.lora import LoraFactors
from realera_fast.unet import (
    base_hashes,
    projections,
    queries_and_outputs,
    transaction,
    unwrapped,
    weights_hash,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised when older files can no longer be read."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Where ``load_lora_weights`` looks in a folder."""

_MAX_FILE_BYTES = 2 << 30
_MAX_HEADER_BYTES = 16 << 20
_MAX_DEPTH = 32
_MAX_NAME = 256
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_HASH = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("concepts", "config", "provenance", "report")
_DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64"}


class BaseModelMismatchError(ValueError):
    """The model is not the one the erasure was made for."""


class ErasureFileError(ValueError):
    """The file is not a valid saved erasure. The message says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class _Application:
    """One edit of one model in this process."""

    erasure: Erasure
    originals: Mapping[str, Tensor]
    """Weights of the edited projections before, on the CPU."""
    before: Mapping[str, str]
    """Hash of every layer that the erasure is about, before."""
    after: Mapping[str, str]
    """The same after."""


_history: WeakKeyDictionary[nn.Module, list[_Application]] = WeakKeyDictionary()
"""What was applied to each living model, in order. It is what makes a bit-exact undo possible."""


@dataclass(frozen=True, eq=False, repr=False)
class Erasure:
    """What was erased and how: everything needed to do it again on the same base model."""

    map: ConceptMap
    """The closed form, T = I + L R, for every projection."""
    lora: Mapping[str, LoraFactors]
    """Alignment factors by layer name; empty without that stage."""
    concepts: tuple[Concept, ...]
    """What was erased."""
    config: Mapping[str, Any]
    """All settings, as plain JSON values."""
    provenance: Mapping[str, Any]
    """Library versions, seed, and ``base_hashes`` of the model the factors belong to."""
    report: Mapping[str, Any]
    """How it went, as plain JSON values."""
    system: IncrementalSystem | None = None
    """The factored equations, for `without`; kept where ``closed_form.keep_system`` asks for it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", dict(self.lora))
        object.__setattr__(self, "concepts", tuple(self.concepts))
        for field in ("config", "provenance", "report"):
            value = getattr(self, field)
            try:
                # A copy of plain values: the caller's later changes don't reach a frozen object.
                plain = json.loads(json.dumps(dict(value)))
            except (TypeError, ValueError) as error:
                raise TypeError(f"{field}: expected plain JSON values: {error}") from error
            object.__setattr__(self, field, plain)
        if not all(isinstance(concept, Concept) for concept in self.concepts):
            raise TypeError("concepts: expected Concept objects")
        for name, factors in self.lora.items():
            if _takes_text(name) and factors.down.shape[1] != self.map.width:
                raise ValueError(
                    f"lora[{name!r}]: expected down of shape [r, {self.map.width}] like the map, "
                    f"got {list(factors.down.shape)}"
                )
        if self.system is not None:
            targets = [concept.target for concept in self.concepts]
            if list(self.system.concepts) != targets or self.system.width != self.map.width:
                raise ValueError(
                    f"system: expected the equations of {targets}, got {self.system.concepts}"
                )
        for name, tensor in self._tensors().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: holds NaN or infinity")

    def __repr__(self) -> str:
        words = ", ".join(f"{c.target!r} -> {c.anchor_name!r}" for c in self.concepts)
        return f"Erasure({words or 'nothing'}; rank {self.map.rank}, LoRA on {len(self.lora)})"

    # Editing a model

    def edited_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The edited weights, without a model and without changing the given ones.

        Args:
            weights: `[o, d]` un-edited weight of each layer name; any may be left out.

        Returns:
            New tensors of the same dtype; where nothing changes, the given tensor itself.
        """
        edited = dict(weights)
        changed = [name for name in weights if self._changes(name)]
        for name in changed:
            weight = weights[name]
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            # The dtype that the sum is made in: with LoRA to come it must not be rounded between.
            dtype = wide if name in self.lora else weight.dtype
            edited[name] = weight.detach().to(dtype, copy=True)
        mapped = [name for name in changed if _takes_text(name)]
        if self.map.rank and mapped:
            device = edited[mapped[0]].device
            left, right = self.map.left.to(device), self.map.right.to(device)
            ops.low_rank_update_([edited[name] for name in mapped], left, right)
        for name in changed:
            if name in self.lora:
                wide_weight, factors = edited[name], self.lora[name]
                up, down = factors.up.to(wide_weight), factors.down.to(wide_weight)
                edited[name] = wide_weight.addmm_(up, down).to(weights[name].dtype)
            if not edited[name].isfinite().all():
                raise ValueError(
                    f"{name}.weight overflows {weights[name].dtype} when edited; "
                    "convert the model to bfloat16 or float32 first"
                )
        return edited

    def apply_(self, unet: nn.Module) -> nn.Module:
        """Edits the model in place; any failure leaves it bit-identical to before.

        An erasure of nothing (rank 0, no LoRA) writes nothing.

        Args:
            unet: The base model that the erasure was made for, in any dtype of at most its width.

        Returns:
            The same `unet`.

        Raises:
            BaseModelMismatchError: other weights, or already edited ones.
            ValueError: the model can't be edited (see :func:`realera_fast.unet.projections`).
        """
        layers = self._layers(unet)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        history = _history.setdefault(unwrapped(unet), [])
        now = _States(unet)
        _forget_undone(history, now)
        before = now.of(layers)
        top = history[-1] if history else None
        if top and now.are(top.after) and top.after != top.before and self._is_same(top.erasure):
            raise BaseModelMismatchError("unet: this erasure is already applied to it")
        self._check_base(unet)
        edited = self.edited_weights(weights)
        originals = {
            name: weights[name].to("cpu", copy=True) for name in edited if self._changes(name)
        }
        record: _Application | None = None
        try:
            with transaction(unet, layers):
                with torch.no_grad():
                    for name in originals:
                        layers[name].weight.copy_(edited[name])
                after = _States(unet).of(layers)
                record = _Application(self, originals, before, after)
                history.append(record)
        except BaseException:
            if record in history:
                history.remove(record)
            raise
        logger.info("applied %r to %d layers", self, len(originals))
        return unet

    def restore_(self, unet: nn.Module) -> nn.Module:
        """Undoes this erasure bit for bit, if it was the last one applied to `unet`.

        Returns:
            The same `unet`.

        Raises:
            ValueError: it is not the last one, the weights changed since, or it was not applied
                to this model object in this process.
        """
        layers = self._layers(unet)
        history = _history.get(unwrapped(unet), [])
        known = any(self._is_same(entry.erasure) for entry in history)
        place = _place(history, _States(unet))
        if not known:
            raise ValueError(
                "unet: this erasure was not applied to this model in this process, so its original "
                "weights are not known; reload the base model"
            )
        if place is None or place < 0:
            raise ValueError(
                "unet: its weights (or their dtype) changed since the erasure was applied, so "
                "undoing it would lose that change; reload the base model"
            )
        entry = history[place]
        if not self._is_same(entry.erasure):
            raise ValueError(f"unet: {entry.erasure!r} was applied last; restore that one first")
        with transaction(unet, layers), torch.no_grad():
            for name, original in entry.originals.items():
                layers[name].weight.copy_(original)
        del history[place:]
        return unet

    def state_dict(self, unet: nn.Module) -> dict[str, Tensor]:
        """The edited tensors alone, for ``unet.load_state_dict(..., strict=False)``.

        Args:
            unet: The base model, or the model this erasure was applied to last.

        Returns:
            Copies by ``"<module>.weight"``; empty if nothing changes.
        """
        layers = self._layers(unet)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        history = _history.get(unwrapped(unet), [])
        place = _place(history, _States(unet))
        if place is None or place < 0 or not self._is_same(history[place].erasure):
            self._check_base(unet)
            weights = self.edited_weights(weights)
        return {f"{n}.weight": w.clone() for n, w in weights.items() if self._changes(n)}

    def without(self, *targets: str) -> Erasure:
        """The same erasure, but for some of its concepts: others stay erased.

        The closed form is solved again from the kept factorisation: the map is that of the
        remaining concepts' rows and of the same preserve prior. Alignment factors were
        trained for all concepts together, so they are left out. Without any concept nothing is
        left: `apply_` then writes nothing. To use it, undo the old one first::

            erasure.restore_(unet)
            erasure.without("cat").apply_(unet)

        Args:
            targets: what each withdrawn concept's `target` is.

        Raises:
            ValueError: no equations were kept, or a target is not among the concepts.
        """
        if self.system is None:
            raise ValueError(
                "system: the equations of this erasure were not kept; erase with "
                "EraseConfig(closed_form=ClosedFormConfig(keep_system=True))"
            )
        erased = [concept.target for concept in self.concepts]
        unknown = [target for target in targets if target not in erased]
        if unknown:
            raise ValueError(f"targets: {unknown[0]!r} is not erased here; {erased} are")
        system = self.system.copy()
        for target in dict.fromkeys(targets):
            system.remove(target)
        tolerance = self.config.get("closed_form", {}).get("rank_tolerance", 1e-6)
        solution = system.solve(rank_tolerance=tolerance)
        if self.lora:
            logger.warning("the alignment factors were trained for all concepts: left out")
        return Erasure(
            solution.map.to("cpu"),
            {},
            tuple(concept for concept in self.concepts if concept.target not in targets),
            self.config,
            self.provenance,
            # What was measured was measured on the whole.
            {"solve": dataclasses.asdict(solution.info), "withdrawn": list(targets)},
            system,
        )

    # Files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file, atomically: the factors, and all else in its header.

        Equal erasures give equal bytes. Missing folders are made.

        Returns:
            The path written.

        Raises:
            OSError: the folder can't be written or the disk is full; an older file stays as it was.
        """
        if self.map.rank > self.map.width:
            raise ValueError(
                f"map: its rank {self.map.rank} exceeds its width; save a compressed() one"
            )
        for name in self.lora:
            _check_name(name)
        metadata = {
            "format": "pt",
            "realera_fast": str(FORMAT_VERSION),
            "concepts": _json([concept.to_dict() for concept in self.concepts]),
            **{field: _json(getattr(self, field)) for field in _FIELDS if field != "concepts"},
        }
        tensors = self._tensors()
        if self.system is not None:
            metadata["system"] = _json(self.system.state())
            tensors |= {f"system.{name}": t for name, t in self.system.tensors().items()}
            size = sum(tensor.nbytes for tensor in tensors.values())
            if size > _MAX_FILE_BYTES - _MAX_HEADER_BYTES:
                raise ValueError(
                    f"system: {size} bytes of equations, more than the {_MAX_FILE_BYTES} of a file "
                    "that can be loaded; save dataclasses.replace(erasure, system=None)"
                )
        return _write(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Erasure:
        """Reads what :meth:`save` wrote. The file is not trusted: everything in it is checked.

        Raises:
            FileNotFoundError: there is no such file.
            ErasureFileError: it is not a valid erasure.
        """
        path = Path(path)
        try:
            metadata, tensors = _read(path)
            fields = {field: _parsed(field, metadata[field]) for field in _FIELDS}
            concepts = _concepts(fields.pop("concepts"))
            _check_provenance(fields["provenance"])
            lora = {
                name: LoraFactors(tensors[f"lora.{name}.down"], tensors[f"lora.{name}.up"])
                for name in _lora_names(tensors)
            }
            concept_map = ConceptMap(tensors["map.left"], tensors["map.right"])
            system = None
            if "system" in metadata:
                inner = {k[7:]: t for k, t in tensors.items() if k.startswith("system.")}
                system = IncrementalSystem.from_tensors(
                    inner, _parsed("system", metadata["system"])
                )
            return cls(concept_map, lora, concepts, **fields, system=system)
        except ErasureFileError as error:
            raise ErasureFileError(f"{path}: {error}") from error.__cause__
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ErasureFileError(f"{path}: {error}") from error

    def save_lora(self, path: str | os.PathLike[str], unet: nn.Module | None = None) -> Path:
        """Writes the edit as an adapter that stock ``pipe.load_lora_weights`` loads.

        ``(W L) R + up @ down = [W L, up] [R; down]``: the update is a LoRA of rank k + r, exactly,
        for the base model and no other. Where that is not less than a full matrix's rank, the
        layer's update is decomposed (singular values) and written at the rank it has.

        Args:
            path: A folder (the file gets the name diffusers looks for), or a ``.safetensors`` file.
            unet: The base model, or the one this erasure was applied to. Not needed for a model
                that it is applied to right now, or without a closed form.

        Returns:
            The path of the file written.

        Raises:
            ValueError: nothing to save, or the base weights are not known.
            BaseModelMismatchError: `unet` is another model.
        """
        if self.map.rank == 0 and not self.lora:
            raise ValueError("this erasure changes nothing, so there is no adapter to save")
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / LORA_FILE
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for name, (up, down) in self._adapter_factors(self._base_weights(unet)).items():
            ranks[name] = down.shape[0]
            tensors[f"unet.{name}.lora_A.weight"] = down
            tensors[f"unet.{name}.lora_B.weight"] = up
        common = Counter(ranks.values()).most_common(1)[0][0]
        others = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
        # peft's LoraConfig, only what differs from its defaults: those fields exist in every
        # release, so that the file loads in older and newer ones. alpha = rank: the scaling is 1.
        adapter = {
            "r": common,
            "lora_alpha": common,
            "target_modules": sorted(ranks),
            "rank_pattern": others,
            "alpha_pattern": others,
        }
        metadata = {
            "format": "pt",
            "lora_adapter_metadata": _json({f"unet.{key}": adapter[key] for key in adapter}),
        }
        return _write(file, tensors, metadata)

    # Inside

    def _changes(self, name: str) -> bool:
        return name in self.lora or (self.map.rank > 0 and _takes_text(name))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"map.left": self.map.left, "map.right": self.map.right}
        for name, factors in self.lora.items():
            tensors[f"lora.{name}.down"] = factors.down
            tensors[f"lora.{name}.up"] = factors.up
        return tensors

    def _is_same(self, other: Erasure) -> bool:
        """The same factors for the same base: a loaded copy may undo what the original did."""
        return self is other or self._fingerprint() == other._fingerprint()

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(_json(self.provenance.get("base_hashes")).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()

    def _layers(self, unet: nn.Module) -> dict[str, nn.Linear]:
        """The layers of a model that this erasure is about, if it fits them in shape."""
        layers = projections(unet)
        width = next(iter(layers.values())).in_features
        if width != self.map.width:
            raise BaseModelMismatchError(
                f"unet: it takes text of width {width}, the erasure is for {self.map.width}"
            )
        if not all(_takes_text(name) for name in self.lora):
            layers |= queries_and_outputs(unet)
        for name, factors in self.lora.items():
            if name not in layers:
                raise BaseModelMismatchError(f"unet: it has no projection {name!r}")
            layer = layers[name]
            got = (layer.out_features, layer.in_features)
            wanted = (factors.up.shape[0], factors.down.shape[1])
            if got != wanted:
                raise BaseModelMismatchError(
                    f"unet: {name} has {got[0]} output and {got[1]} input features, the erasure "
                    f"expects {wanted[0]} and {wanted[1]}"
                )
        return layers

    def _check_base(self, unet: nn.Module) -> None:
        expected = self.provenance.get("base_hashes")
        if not expected:
            raise ValueError(
                "provenance: holds no base_hashes, so the base model can't be recognized"
            )
        got = base_hashes(unet)
        # The widest dtype that both know (base_hashes lists it first): the narrower ones can't
        # tell weights apart whose difference is rounded away.
        common = next((dtype for dtype in got if dtype in expected), None)
        if common is None:
            raise BaseModelMismatchError(
                f"unet: the erasure was made for weights in {', '.join(expected)}, which can't be "
                f"compared with {', '.join(got)}; load the model in one of the former"
            )
        if got[common] != expected[common]:
            raise BaseModelMismatchError(
                f"unet: its projections have the {common} hash {got[common][:16]}, but the erasure "
                f"was made for {expected[common][:16]}; load the base model it was made for, "
                "without other edits"
            )

    def _base_weights(self, unet: nn.Module | None) -> dict[str, Tensor]:
        """Un-edited weights of what changes, from the model or from what was kept at its edit."""
        if unet is None and self.map.rank == 0:
            return {}
        models = list(_history) if unet is None else [unwrapped(unet)]
        for model in models:
            for entry in _history.get(model, []):
                if self._is_same(entry.erasure):
                    return dict(entry.originals)
        if unet is None:
            raise ValueError(
                "unet: the adapter is made from the base model's weights, and this erasure is not "
                "applied to a model in this process; pass unet=, the base model"
            )
        layers = self._layers(unet)
        self._check_base(unet)
        return {n: layer.weight.detach() for n, layer in layers.items() if self._changes(n)}

    def _adapter_factors(self, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """`[o, q]` and `[q, d]` float32 factors of the whole update of each changed projection."""
        found = {}
        for name in weights or self.lora:
            ups, downs = [], []
            if self.map.rank and _takes_text(name):
                weight = weights[name].to("cpu", torch.float64)
                ups.append(weight @ self.map.left.to(weight))
                downs.append(self.map.right.to(weight))
            if name in self.lora:
                ups.append(self.lora[name].up.to("cpu", torch.float64))
                downs.append(self.lora[name].down.to("cpu", torch.float64))
            up, down = torch.cat(ups, 1), torch.cat(downs, 0)
            if down.shape[0] >= min(up.shape[0], down.shape[1]):
                u, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
                floor = s[0] * torch.finfo(torch.float64).eps * max(up.shape[0], down.shape[1])
                rank = max(1, int((s > floor).sum()))
                up, down = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
            # Equal sizes on both sides, for fp16's narrow range; powers of two round nothing.
            ratio = down.norm(dim=1) / up.norm(dim=0)
            usable = ratio.isfinite() & (ratio > 0)
            scale = torch.where(usable, ratio, 1.0).sqrt().log2().round().exp2()
            found[name] = ((up * scale).float(), (down / scale[:, None]).float())
        return found


def _takes_text(name: str) -> bool:
    """Whether a layer's input is text, so that the closed form is about it."""
    return name.endswith((".to_k", ".to_v"))


class _States:
    """Hashes of a model's layers as they are stored now, each made when first asked for."""

    def __init__(self, unet: nn.Module) -> None:
        self._layers: Mapping[str, nn.Linear] = projections(unet)
        self._unet = unet
        self._found: dict[str, str] = {}

    def of(self, names: Iterable[str]) -> dict[str, str]:
        """Of these layers, by name."""
        return {name: self._hash(name) for name in names}

    def are(self, expected: Mapping[str, str]) -> bool:
        """Whether the layers named there are as it says."""
        return all(self._hash(name) == value for name, value in expected.items())

    def _hash(self, name: str) -> str:
        if name not in self._found:
            if name not in self._layers:
                self._layers = {**self._layers, **queries_and_outputs(self._unet)}
            weight = self._layers[name].weight.detach()
            self._found[name] = weights_hash({name: weight}, weight.dtype)
        return self._found[name]


def _place(history: list[_Application], now: _States) -> int | None:
    """Number of the latest application that led to the weights of now.

    -1 where they are as before all of them, None where something else changed them. Applications
    may be about different layers: what one does not touch is as the nearest other one left it.
    """
    for place in reversed(range(-1, len(history))):
        expected: dict[str, str] = {}
        for later in reversed(history[place + 1 :]):
            expected |= later.before
        for entry in history[: place + 1]:
            expected |= entry.after
        if now.are(expected):
            return place
    return None


def _forget_undone(history: list[_Application], now: _States) -> None:
    """Drops applications that were undone behind our back, as by an outer transaction."""
    place = _place(history, now)
    if place is not None:
        del history[place + 1 :]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data


def _check_name(name: str) -> None:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(f"not a module name: {name[:_MAX_NAME]!r}")


# Writing


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes a safetensors file that is complete or absent.

    The format is made here, not by the safetensors package, which orders the metadata by chance.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    chunks = []
    end = 0
    # Widest dtype first, like the safetensors package: all data is then aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        data = _bytes(tensor)
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        end += len(data)
        chunks.append(data)
    encoded = _json(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER_BYTES:
        raise ValueError(
            f"report, config: {len(encoded)} bytes of JSON, at most {_MAX_HEADER_BYTES} are saved"
        )
    # A link keeps pointing where it did: its target is replaced.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"path: {path} is a folder; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, len(encoded).to_bytes(8, "little"), encoded, *chunks)
    except OSError as error:
        raise OSError(
            error.errno, f"could not save, no file was changed: {error.strerror}", str(path)
        ) from error
    return path


# Reading: nothing in a file is trusted


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, with sizes, keys, shapes and dtypes checked before data is read."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise ErasureFileError("is a folder, expected a file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
    if len(start) < 8:
        raise ErasureFileError(f"is truncated: {size} bytes")
    if size > _MAX_FILE_BYTES:
        raise ErasureFileError(f"is too large: {size} bytes, at most {_MAX_FILE_BYTES} are read")
    header = int.from_bytes(start, "little")
    if header > min(size - 8, _MAX_HEADER_BYTES):
        raise ErasureFileError(
            f"is truncated or not a safetensors file: a header of {header} bytes in {size}"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            shapes = {}
            for name in file.keys():  # noqa: SIM118, not a dictionary
                view = file.get_slice(name)
                shapes[name] = (view.get_dtype(), tuple(view.get_shape()))
            _check_metadata(metadata)
            inner = {key: shapes.pop(key) for key in list(shapes) if key.startswith("system.")}
            if bool(inner) > ("system" in metadata):
                raise ErasureFileError("has tensors of a system, but no description of it")
            for key, (dtype, shape) in inner.items():
                if dtype != "F64" or len(shape) != 2:
                    raise ErasureFileError(f"{key} has dtype {dtype}, shape {list(shape)}")
            _check_shapes(shapes)
            shapes |= inner
            tensors = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ErasureFileError(f"is truncated or not a safetensors file: {error}") from error
    return metadata, tensors


def _check_metadata(metadata: Mapping[str, str]) -> None:
    version = metadata.get("realera_fast")
    if version is None:
        raise ErasureFileError("is not an erasure (another safetensors file?)")
    if version != str(FORMAT_VERSION):
        raise ErasureFileError(
            f"has format version {version[:20]!r}, this release reads {FORMAT_VERSION}; update it"
        )
    expected = {"format", "realera_fast", *_FIELDS}
    if set(metadata) - {"system"} != expected:
        odd = sorted((set(metadata) - {"system"}) ^ expected)[:5]
        raise ErasureFileError(f"has missing or unknown metadata: {odd}")


def _lora_names(tensors: Iterable[str]) -> list[str]:
    found = {key.removeprefix("lora.").rpartition(".")[0] for key in tensors if key[:5] == "lora."}
    return sorted(found)


def _check_shapes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    names = _lora_names(shapes)
    expected = {"map.left", "map.right"}
    for name in names:
        _check_name(name)
        expected |= {f"lora.{name}.down", f"lora.{name}.up"}
    if set(shapes) != expected:
        odd = [key[:_MAX_NAME] for key in sorted(set(shapes) ^ expected)[:5]]
        raise ErasureFileError(f"has missing or unknown tensors: {odd}")
    for key, (dtype, shape) in shapes.items():
        allowed = ("F32", "F64") if key.startswith("map.") else ("F32",)
        if dtype not in allowed:
            raise ErasureFileError(f"{key} has dtype {dtype}, expected {' or '.join(allowed)}")
        if len(shape) != 2:
            raise ErasureFileError(f"{key} has shape {list(shape)}, expected a matrix")
    (left_dtype, left), (right_dtype, right) = shapes["map.left"], shapes["map.right"]
    width, rank = left
    if right != (rank, width) or right_dtype != left_dtype or width < 1 or rank > width:
        raise ErasureFileError(
            f"map.left {left_dtype} {list(left)} and map.right {right_dtype} {list(right)} "
            "don't make a map [d, k] [k, d] with k <= d"
        )
    for name in names:
        down, up = shapes[f"lora.{name}.down"][1], shapes[f"lora.{name}.up"][1]
        features = width if _takes_text(name) else down[1]
        fits = down[1] == features and up[1] == down[0] and min(features, up[0]) >= 1
        if not fits or not 1 <= down[0] <= max(features, up[0]):
            raise ErasureFileError(
                f"lora.{name}: down {list(down)}, up {list(up)} don't make an update "
                f"[o, {features}]"
            )


def _parsed(field: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ErasureFileError(f"its {field} is not JSON: {str(error)[:100]}") from error
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            raise ErasureFileError(f"its {field} is nested deeper than {_MAX_DEPTH} levels")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1
    kind = list if field == "concepts" else dict
    if not isinstance(value, kind):
        raise ErasureFileError(f"its {field} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _concepts(values: list[Any]) -> tuple[Concept, ...]:
    for value in values:
        fields = value if isinstance(value, dict) else {}
        synonyms = fields.get("synonyms")
        typed = (
            isinstance(fields.get("target"), str)
            and isinstance(fields.get("anchor"), str | None)
            and isinstance(fields.get("kind"), str)
            and isinstance(synonyms, list)
            and all(isinstance(word, str) for word in synonyms)
        )
        if not typed:
            raise ErasureFileError(f"holds a concept that is none: {str(value)[:100]}")
    return tuple(Concept.from_dict(value) for value in values)


def _check_provenance(provenance: Mapping[str, Any]) -> None:
    hashes = provenance.get("base_hashes")
    valid = (
        isinstance(hashes, dict)
        and hashes
        and all(
            key in ("float64", "float32", "float16", "bfloat16")
            and isinstance(value, str)
            and _HASH.fullmatch(value)
            for key, value in hashes.items()
        )
    )
    if not valid:
        raise ErasureFileError("its provenance holds no valid base_hashes")
