"""The result of an erasure: small factors that can be applied, undone, saved and shared.

    W' = W + (W L) R + up @ down

L and R are the closed form's map, shared by all projections of the token sequence (those of a
pooled vector have one of their own); up and down the alignment's LoRA factors of each, and of
queries and outputs where these were trained. The sum is made in float32 (float64 for float64
weights) and rounded once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from realera_fast import ops
from realera_fast.erasure.adapters import Layout, in_layout
from realera_fast.erasure.file import (
    FORMAT_VERSION,
    LORA_FILE,
    MAX_FILE_BYTES,
    METADATA_FIELDS,
    SYSTEM_FIELDS,
    ErasureFileError,
    check_name,
    check_provenance,
    concepts_of,
    names_with_lora,
    parse_field,
    read_file,
)
from realera_fast.erasure.history import (
    Application,
    BaseModelMismatchError,
    WeightStates,
    applications_of,
    forget_undone,
    histories,
    history_entry,
    history_lock,
    place_of,
)
from realera_fast.erasure.model_card import Use, write_card
from realera_fast.erasure.single_file import find_weights
from realera_fast.models import (
    ENTRANCES,
    STREAMS,
    Family,
    LoraFactors,
    Maps,
    base_hashes,
    check_width,
    projections,
    queries_and_outputs,
    stream_of,
    streams,
    transaction,
    write_,
)
from realera_fast.runtime import (
    MAX_HEADER_BYTES,
    composed,
    encode_json,
    exclusive,
    folder_atomically,
    ordinary,
    patch,
    tensor_bytes,
    unwrapped,
    valid,
    write,
)
from realera_fast.solver import ConceptMap, IncrementalSystem, PromptMap
from realera_fast.text import Concept

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Erasure:
    """What was erased and how: everything needed to do it again on the same base model."""

    map: ConceptMap
    """The closed form, T = I + L R, for every projection of the token sequence."""
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
    pooled_map: ConceptMap | None = None
    """The closed form of the pooled vector, for models that take one (SDXL, SD3, FLUX)."""
    pooled_system: IncrementalSystem | None = None
    """Its equations, kept with `system`."""

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
            concept_map = self._map_of(name)
            if concept_map is not None and factors.down.shape[1] != concept_map.width:
                raise ValueError(
                    f"lora[{name!r}]: expected down of shape [r, {concept_map.width}] like the "
                    f"map, got {list(factors.down.shape)}"
                )
        targets = [concept.target for concept in self.concepts]
        for field, system, concept_map in (
            ("system", self.system, self.map),
            ("pooled_system", self.pooled_system, self.pooled_map),
        ):
            if system is not None and (
                concept_map is None
                or list(system.concepts) != targets
                or system.width != concept_map.width
            ):
                raise ValueError(
                    f"{field}: expected the equations of {targets}, got {system.concepts}"
                )
        for name, tensor in self._tensors().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: holds NaN or infinity")

    def __repr__(self) -> str:
        shown = [f"{c.target!r} -> {c.anchor_name!r}" for c in self.concepts[:8]]
        words = ", ".join(shown + ["..."] * (len(self.concepts) > 8))
        return f"Erasure({words or 'nothing'}; rank {self.map.rank}, LoRA on {len(self.lora)})"

    @property
    def reading(self) -> Family | None:
        """How the model that it was made for reads text: the prompts that it holds for. None in
        files of releases that did not write it down."""
        found = self.provenance.get("reading")
        return None if found is None else Family.from_dict(found)

    # Editing a model

    @ordinary()
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
        for concept_map in self._maps():
            mapped = [name for name in changed if self._map_of(name) is concept_map]
            if not (concept_map.rank and mapped):
                continue
            device = edited[mapped[0]].device
            left, right = concept_map.left.to(device), concept_map.right.to(device)
            # The text's features come first; what else a weight takes stays as it is.
            parts = [edited[name][:, : concept_map.width].contiguous() for name in mapped]
            ops.low_rank_update_(parts, left, right)
            for name, part in zip(mapped, parts, strict=True):
                if part.data_ptr() != edited[name].data_ptr():
                    edited[name][:, : concept_map.width] = part
        for name in changed:
            if name in self.lora:
                wide_weight, factors = edited[name], self.lora[name]
                up, down = factors.up.to(wide_weight), factors.down.to(wide_weight)
                # Not `addmm_`: some BLAS would round at the weight's magnitude with every term.
                wide_weight[:, : down.shape[1]] += up @ down
                edited[name] = wide_weight.to(weights[name].dtype)
            if not edited[name].isfinite().all():
                raise ValueError(
                    f"{name}.weight overflows {weights[name].dtype} when edited; "
                    "convert the model to bfloat16 or float32 first"
                )
        return edited

    @exclusive
    def apply_(self, model: nn.Module) -> nn.Module:
        """Edits the model in place; any failure leaves it bit-identical to before.

        An erasure of nothing (rank 0, no LoRA) writes nothing.

        Args:
            model: The base model that the erasure was made for, in any dtype of at most its width.

        Returns:
            The same `model`.

        Raises:
            BaseModelMismatchError: other weights, or already edited ones.
            ValueError: the model can't be edited (see :func:`realera_fast.models.projections`).
        """
        projections(model, self._text_maps)
        return self._apply(model)

    def _apply(self, model: nn.Module) -> nn.Module:
        """`apply_`, however the model runs its layers."""
        layers = self._layers(model)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        history = applications_of(model)
        now = WeightStates(model)
        forget_undone(history, now)
        before = now.of(layers)
        top = history[-1] if history else None
        if top and now.are(top.after) and top.after != top.before and self._is_same(top.erasure):
            raise BaseModelMismatchError("model: this erasure is already applied to it")
        self._check_base(model)
        edited = self.edited_weights(weights)
        originals = {
            name: weights[name].to("cpu", copy=True) for name in edited if self._changes(name)
        }
        record: Application | None = None
        try:
            with transaction(model, layers):
                for name in originals:
                    write_(layers[name].weight, edited[name])
                after = WeightStates(model).of(layers)
                record = Application(self, originals, before, after)
                history.append(record)
        except BaseException:
            if record in history:
                history.remove(record)
            raise
        logger.info("applied %r to %d layers", self, len(originals))
        return model

    @exclusive
    def restore_(self, model: nn.Module, *, force: bool = False) -> nn.Module:
        """Undoes this erasure bit for bit, if it was the last one applied to `model`.

        Args:
            force: put the original weights back also where something else changed the weights
                since, such as an adapter that was merged into them; that change is lost.

        Returns:
            The same `model`.

        Raises:
            ValueError: it is not the last one, the weights changed since, or it was not applied
                to this model object in this process.
        """
        layers = self._layers(model)
        history = applications_of(model)
        known = any(self._is_same(entry.erasure) for entry in history)
        place = place_of(history, WeightStates(model))
        if not known:
            raise ValueError(
                "model: this erasure was not applied to this model in this process, so its "
                "original weights are not known; reload the base model"
            )
        if place == -1:
            raise ValueError(
                "model: its weights changed since the erasure was applied: they are as before it, "
                "so there is nothing to undo"
            )
        if place is None and force:
            place = len(history) - 1
        if place is None:
            raise ValueError(
                "model: its weights (or their dtype) changed since the erasure was applied, so "
                "undoing it would lose that change; restore_(model, force=True) does so, or reload "
                "the base model"
            )
        entry = history[place]
        if not self._is_same(entry.erasure):
            raise ValueError(f"model: {entry.erasure!r} was applied last; restore that one first")
        with transaction(model, layers):
            for name, original in entry.originals.items():
                write_(layers[name].weight, original)
        del history[place:]
        return model

    @exclusive
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The edited tensors alone, for ``model.load_state_dict(..., strict=False)``.

        Args:
            model: The base model, or the model this erasure was applied to last.

        Returns:
            Copies by ``"<module>.weight"``; empty if nothing changes.
        """
        layers = self._layers(model)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        history = applications_of(model)
        place = place_of(history, WeightStates(model))
        if place is None or place < 0 or not self._is_same(history[place].erasure):
            self._check_base(model)
            weights = self.edited_weights(weights)
        return {f"{n}.weight": w.clone() for n, w in weights.items() if self._changes(n)}

    @ordinary()
    def without(self, *targets: str) -> Erasure:
        """The same erasure, but for some of its concepts: others stay erased.

        The closed form is solved again from the kept factorisation: the map is that of the
        remaining concepts' rows and of the same preserve prior. Alignment factors were
        trained for all concepts together, so they are left out. Without any concept nothing is
        left: `apply_` then writes nothing. To use it, undo the old one first::

            erasure.restore_(model)
            erasure.without("cat").apply_(model)

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
        # Files of earlier releases hold names as they were typed.
        kept_as = {composed(target): target for target in erased} | {t: t for t in erased}
        targets = tuple(valid(target, "targets") for target in targets)
        targets = tuple(kept_as.get(t, kept_as.get(composed(t), t)) for t in targets)
        unknown = [target for target in targets if target not in erased]
        if unknown:
            raise ValueError(f"targets: {unknown[0]!r} is not erased here; {erased} are")
        tolerance = self.config.get("closed_form", {}).get("rank_tolerance", 1e-6)
        solved: list[tuple[ConceptMap, IncrementalSystem]] = []
        # What was measured was measured on the whole.
        report: dict[str, Any] = {"withdrawn": list(targets)}
        for field, kept in (("solve", self.system), ("solve_pooled", self.pooled_system)):
            if kept is not None:
                system = kept.copy()
                for target in dict.fromkeys(targets):
                    system.remove(target)
                solution = system.solve(rank_tolerance=tolerance)
                report[field] = dataclasses.asdict(solution.info)
                solved.append((solution.map.to("cpu"), system))
        if self.lora:
            logger.warning("the alignment factors were trained for all concepts: left out")
        pooled = solved[1] if len(solved) > 1 else (None, None)
        return Erasure(
            solved[0][0],
            {},
            tuple(concept for concept in self.concepts if concept.target not in targets),
            self.config,
            self.provenance,
            report,
            solved[0][1],
            *pooled,
        )

    # Files

    @ordinary()
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file, atomically: the factors, and all else in its header.

        Equal erasures give equal bytes. Missing folders are made.

        Returns:
            The path written; a model card is written beside it.

        Raises:
            OSError: the folder can't be written or the disk is full; an older file stays as it was.
        """
        for concept_map in self._maps():
            if concept_map.rank > concept_map.width:
                raise ValueError(
                    f"map: its rank {concept_map.rank} exceeds its width; save a compressed() one"
                )
        for name in (*self.lora, *(self._text_maps or ())):
            check_name(name)
        metadata = {
            "format": "pt",
            "realera_fast": str(FORMAT_VERSION),
            "concepts": encode_json([concept.to_dict() for concept in self.concepts]),
            **{
                field: encode_json(getattr(self, field))
                for field in METADATA_FIELDS
                if field != "concepts"
            },
        }
        tensors = self._tensors()
        for field in SYSTEM_FIELDS:
            system: IncrementalSystem | None = getattr(self, field)
            if system is None:
                continue
            metadata[field] = encode_json(system.state())
            tensors |= {f"{field}.{name}": t for name, t in system.tensors().items()}
            size = sum(tensor.nbytes for tensor in tensors.values())
            if size > MAX_FILE_BYTES - MAX_HEADER_BYTES:
                raise ValueError(
                    f"system: {size} bytes of equations, more than the {MAX_FILE_BYTES} of a file "
                    "that can be loaded; save dataclasses.replace(erasure, system=None, "
                    "pooled_system=None)"
                )
        path = write(Path(path), tensors, metadata)
        write_card(path, self, use="factors", component=self._component())
        return path

    @classmethod
    @ordinary()
    def load(cls, path: str | os.PathLike[str]) -> Erasure:
        """Reads what :meth:`save` wrote. The file is not trusted: everything in it is checked.

        Raises:
            FileNotFoundError: there is no such file.
            ErasureFileError: it is not a valid erasure.
        """
        path = Path(path)
        try:
            metadata, tensors = read_file(path)
            fields = {field: parse_field(field, metadata[field]) for field in METADATA_FIELDS}
            concepts = concepts_of(fields.pop("concepts"))
            check_provenance(fields["provenance"])
            lora = {
                name: LoraFactors(tensors[f"lora.{name}.down"], tensors[f"lora.{name}.up"])
                for name in names_with_lora(tensors)
            }
            concept_map = ConceptMap(tensors["map.left"], tensors["map.right"])
            pooled = None
            if "pooled.left" in tensors:
                pooled = ConceptMap(tensors["pooled.left"], tensors["pooled.right"])
            systems: dict[str, Any] = {}
            for field in SYSTEM_FIELDS:
                if field in metadata:
                    start = f"{field}."
                    inner = {
                        key.removeprefix(start): tensor
                        for key, tensor in tensors.items()
                        if key.startswith(start)
                    }
                    state = parse_field(field, metadata[field])
                    systems[field] = IncrementalSystem.from_tensors(inner, state)
            return cls(concept_map, lora, concepts, **fields, pooled_map=pooled, **systems)
        except ErasureFileError as error:
            raise ErasureFileError(f"{path}: {error}") from error.__cause__
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ErasureFileError(f"{path}: {error}") from error

    @exclusive
    def save_lora(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        layout: Layout = "diffusers",
    ) -> Path:
        """Writes the edit as an adapter that stock ``pipe.load_lora_weights`` loads.

        ``(W L) R + up @ down = [W L, up] [R; down]``: the update is a LoRA of rank k + r, exactly,
        for the base model and no other. Where that is not less than a full matrix's rank, the
        layer's update is decomposed (singular values) and written at the rank it has.

        Args:
            path: A folder (the file gets the name diffusers looks for), or a ``.safetensors`` file.
            model: The base model, or the one this erasure was applied to. Not needed for a model
                that it is applied to right now, or without a closed form.
            layout: Names of the keys: "diffusers", or "kohya" for A1111, ComfyUI and kohya's
                scripts (Stable Diffusion 1, 2, XL and FLUX.1; needs `model`). Diffusers loads the
                latter too, but for FLUX.1, whose text layers it leaves out.

        Returns:
            The path of the file written; a model card is written beside it.

        Raises:
            ValueError: nothing to save, the base weights are not known, or the architecture has no
                adapters.
            BaseModelMismatchError: `model` is another model.
        """
        if not self.lora and not any(concept_map.rank for concept_map in self._maps()):
            raise ValueError("this erasure changes nothing, so there is no adapter to save")
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / LORA_FILE
        kind = self.provenance.get("model_class")
        if self._component() == "controlnet":
            raise ValueError(
                f"{kind}: no pipeline loads adapters into a ControlNet; use save (factors), "
                "save_weights (edited tensors) or save_pretrained (the whole model)"
            )
        if not _loads_adapters(kind, model):
            raise ValueError(
                f"{kind}: diffusers loads no adapters for it; use save (factors), save_weights "
                "(edited tensors) or save_pretrained (the whole model)"
            )
        options = None if model is None else getattr(unwrapped(model), "config", None)
        if layout == "kohya" and options is None:
            raise ValueError("model: pass it, layout='kohya' names layers after its configuration")
        factors = self._adapter_factors(self._base_weights(model))
        tensors, metadata = in_layout(factors, layout, self._component(), options)
        write(file, tensors, metadata | self.metadata())
        use: Use = "lora-kohya" if layout == "kohya" else "lora-diffusers"
        write_card(file, self, use=use, component=self._component(), alone=file != path)
        return file

    @exclusive
    def save_weights(self, path: str | os.PathLike[str], model: nn.Module) -> Path:
        """Writes the edited tensors alone, for any program that knows the base model.

        ``model.load_state_dict(safetensors.torch.load_file(path), strict=False)`` needs nothing of
        this library, and checks nothing; :meth:`save` is smaller, and checked.

        Args:
            path: A ``.safetensors`` file.
            model: The base model, or the one this erasure was applied to last.

        Returns:
            The path written; a model card is written beside it.
        """
        path = Path(path)
        tensors = self.state_dict(model)
        if not tensors:
            raise ValueError("this erasure changes nothing, so there are no tensors to save")
        write(path, tensors, {"format": "pt", **self.metadata()})
        write_card(path, self, use="weights", component=self._component())
        return path

    @exclusive
    def save_single_file(
        self,
        path: str | os.PathLike[str],
        checkpoint: str | os.PathLike[str],
        model: nn.Module | None = None,
    ) -> Path:
        """Writes a single-file checkpoint with the edit in it, in the key layout that it came in.

        The edited tensors are found in `checkpoint` by their values, so every layout that
        ``from_single_file`` loads will do; all other bytes are copied as they are. They are edited
        in the dtype that they are stored in.

        Args:
            path: The file to write.
            checkpoint: The ``.safetensors`` file that the base model was loaded from.
            model: As for :meth:`save_lora`.

        Returns:
            The path written; a model card is written beside it.

        Raises:
            BaseModelMismatchError: `checkpoint` does not hold the base model's weights.
            SafetensorsFileError: it is not a safetensors file.
        """
        path, checkpoint = Path(path), Path(checkpoint)
        if path.exists() and path.samefile(checkpoint):
            raise ValueError(f"path: {path} is the checkpoint itself; name another file")
        base = self._base_weights(model)
        replaced: dict[str, Tensor] = {}
        for name, keys in find_weights(checkpoint, base).items():
            if not keys:
                raise BaseModelMismatchError(
                    f"checkpoint: {checkpoint} does not hold the weight of {name}; expected the "
                    "file that this model was loaded from (from_single_file)"
                )
            for key, tensor in keys.items():
                edited = self.edited_weights({name: tensor})[name]
                if key in replaced and not torch.equal(replaced[key], edited):
                    raise ValueError(
                        f"checkpoint: {key} is the weight of several layers that are edited "
                        "differently, so it can't be told whose it is"
                    )
                replaced[key] = edited
        patch(checkpoint, path, replaced, self.metadata())
        write_card(path, self, use="single-file", component=self._component())
        return path

    @exclusive
    def save_pretrained(self, folder: str | os.PathLike[str], model: nn.Module) -> Path:
        """Writes the whole edited model as diffusers does, for ``from_pretrained``.

        Unlike ``model.save_pretrained``, the folder is complete or absent, every file says what was
        erased, and a model card is beside them.

        Args:
            folder: A new or empty folder.
            model: The model this erasure is applied to.

        Returns:
            The folder.

        Raises:
            ValueError: the erasure is not the last one applied to `model`.
            FileExistsError: the folder is not empty.
        """
        history = applications_of(model)
        place = place_of(history, WeightStates(model))
        if place is None or place < 0 or not self._is_same(history[place].erasure):
            raise ValueError("model: this erasure is not what was applied to it last; apply_ it")
        with folder_atomically(Path(folder)) as staged:
            whole: Any = unwrapped(model)
            whole.save_pretrained(staged, safe_serialization=True)
            self.annotate(staged)
        return Path(folder)

    def annotate(self, folder: str | os.PathLike[str]) -> None:
        """Writes what was erased into a folder that diffusers saved an edited model to.

        Each of its safetensors files gets the metadata, and the folder a model card.
        """
        folder = Path(folder)
        for file in sorted(folder.glob("*.safetensors")):
            patch(file, file, {}, self.metadata())
        write_card(folder, self, use="component", component=self._component())

    def metadata(self) -> dict[str, str]:
        """What every exported file says about itself, as text: concepts with their anchors, config,
        versions, seed and base hashes, the solve with its residual, and the report's SHA-256."""
        values = {
            "concepts": [concept.to_dict() for concept in self.concepts],
            "config": self.config,
            "provenance": self.provenance,
            "solve": self.report.get("solve"),
            "report_sha256": hashlib.sha256(encode_json(self.report).encode()).hexdigest(),
        }
        return {f"realera_fast.{name}": encode_json(value) for name, value in values.items()}

    # Without weights, and together with others

    @ordinary()
    def prompt_map(self) -> PromptMap:
        """The same erasure as a small module on prompt embeddings; the weights stay as they are.

        Raises:
            ValueError: noise alignment changed the layers one by one, which no map of prompts can.
        """
        if self.lora:
            raise ValueError(
                "this erasure has alignment factors, which act layer by layer and not on the "
                "prompt; erase with EraseConfig(alignment=AlignmentConfig(enabled=False))"
            )
        return PromptMap(self.map, self.pooled_map)

    @exclusive
    def rebase(self, model: nn.Module) -> Erasure:
        """The same factors for other weights that are shown the same text.

        These are another state of the model, as after withdrawing an earlier erasure, or a
        ControlNet beside it. The closed form does not depend on the weights, so it is what erasing
        there would give. Alignment factors were trained on the old state and fit the new one
        about; for a model of another class they are left out.

        Args:
            model: with the same text encoders; not changed.
        """
        kind, lora = type(unwrapped(model)).__name__, self.lora
        if kind != self.provenance.get("model_class", kind):
            if lora:
                logger.warning(
                    "the alignment factors were trained for a %s: left out for the %s",
                    self.provenance["model_class"],
                    kind,
                )
            lora = {}
        elif lora:
            logger.warning("the alignment factors were trained on other weights: kept as they are")
        history = [history_entry(applied.erasure) for applied in applications_of(model)]
        provenance = {
            **self.provenance,
            "model_class": kind,
            "base_hashes": base_hashes(model, self._text_maps),
            "history": history,
        }
        rebased = dataclasses.replace(self, provenance=provenance, lora=lora)
        rebased._layers(model)
        return rebased

    @exclusive
    def withdraw_(self, model: nn.Module) -> tuple[Erasure, ...]:
        """Takes this erasure out from under those that were applied after it.

        The weights become what the others alone make of the base model. Without alignment that is
        what erasing them alone gives.

        Returns:
            Those that were applied later, in order, for the weights as they are now: use these in
            place of the old ones to undo or save them.

        Raises:
            ValueError: it is not applied to this model object in this process, or the weights
                changed since.
        """
        history = applications_of(model)
        places = [i for i, entry in enumerate(history) if self._is_same(entry.erasure)]
        if not places or place_of(history, WeightStates(model)) != len(history) - 1:
            raise ValueError(
                "model: this erasure is not applied to it, or its weights changed since; reload "
                "the base model, and apply the others to it with rebase"
            )
        kept = list(history)
        layers = {name: layer for e in history for name, layer in e.erasure._layers(model).items()}
        remaining = []
        try:
            with transaction(model, layers):
                for entry in reversed(kept[places[-1] :]):
                    entry.erasure.restore_(model)
                for entry in kept[places[-1] + 1 :]:
                    again = entry.erasure.rebase(model)
                    withdrawn = [*again.provenance["history"], history_entry(self, "withdrawn")]
                    provenance = {**again.provenance, "history": withdrawn}
                    again = dataclasses.replace(again, provenance=provenance)
                    again._apply(model)
                    remaining.append(again)
        except BaseException:
            history[:] = kept
            raise
        return tuple(remaining)

    @ordinary()
    def then(self, later: Erasure) -> Erasure:
        """This erasure, then a later one, as one: a single file to apply to the base model.

        Args:
            later: made on the model that this one edited, or on the same base model.

        Raises:
            ValueError: it was made on another model.
        """
        made_on = [entry.get("fingerprint") for entry in later.provenance.get("history", [])]
        if self.fingerprint not in made_on and later.provenance.get(
            "base_hashes"
        ) != self.provenance.get("base_hashes"):
            raise ValueError("later: it was made on another model than this erasure, or than left")
        lora = dict(later.lora)
        for name, factors in self.lora.items():
            taken = later._map_of(name)
            # (W T + up down) T' = W T T' + up (down T')
            down = factors.down
            if taken is not None:
                down = down + (down @ taken.left.to(down)) @ taken.right.to(down)
            up = factors.up
            if name in lora:
                down, up = torch.cat((down, lora[name].down)), torch.cat((up, lora[name].up), 1)
            lora[name] = LoraFactors(down.contiguous(), up.contiguous())
        pooled = None
        if self.pooled_map is not None and later.pooled_map is not None:
            pooled = later.pooled_map.compose(self.pooled_map).compressed()
        return Erasure(
            # Weights are edited from the right: W T T' is the later map first.
            later.map.compose(self.map).compressed(),
            lora,
            (*self.concepts, *later.concepts),
            later.config,
            {
                **self.provenance,
                "history": [
                    *self.provenance.get("history", []),
                    history_entry(self),
                    history_entry(later),
                ],
            },
            {"parts": [self.report, later.report]},
            pooled_map=pooled,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the factors and of the base model that they are for."""
        digest = hashlib.sha256(encode_json(self.provenance.get("base_hashes")).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    # Inside

    def _maps(self) -> list[ConceptMap]:
        return [self.map, *([] if self.pooled_map is None else [self.pooled_map])]

    def _map_of(self, name: str) -> ConceptMap | None:
        """The map of what a layer takes; None for one that takes no text."""
        stream = stream_of(name) if self._text_maps is None else self._text_maps.get(name)
        return {"sequence": self.map, "pooled": self.pooled_map}[stream] if stream else None

    @property
    def _text_maps(self) -> Maps | None:
        """What each map takes, where the caller said it; None is what is known of the class."""
        return (self.provenance.get("reading") or {}).get("maps")

    def _changes(self, name: str) -> bool:
        concept_map = self._map_of(name)
        return name in self.lora or (concept_map is not None and concept_map.rank > 0)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"map.left": self.map.left, "map.right": self.map.right}
        if self.pooled_map is not None:
            tensors |= {"pooled.left": self.pooled_map.left, "pooled.right": self.pooled_map.right}
        for name, factors in self.lora.items():
            tensors[f"lora.{name}.down"] = factors.down
            tensors[f"lora.{name}.up"] = factors.up
        return tensors

    def _is_same(self, other: Erasure) -> bool:
        """The same factors for the same base: a loaded copy may undo what the original did."""
        return self is other or self.fingerprint == other.fingerprint

    def _component(self) -> str:
        """What a pipeline calls the model."""
        kind = self.provenance.get("model_class", "UNet")
        if "ControlNet" in kind and kind not in ENTRANCES:
            return "controlnet"
        return "unet" if kind[:4] == "UNet" else "transformer"

    def _layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers of a model that this erasure is about, if it fits them in shape."""
        maps = self._text_maps
        layers = projections(model, maps, as_run=False)
        pooled = "pooled" in streams(model, maps).values()
        if pooled != (self.pooled_map is not None):
            raise BaseModelMismatchError(
                f"model: it takes {'a' if pooled else 'no'} pooled vector of the text, the erasure "
                f"is for one that takes {'none' if pooled else 'one'}"
            )
        for stream, concept_map in zip(STREAMS, self._maps(), strict=False):
            try:
                check_width(model, stream, concept_map.width, maps)
            except ValueError as error:
                raise BaseModelMismatchError(
                    f"model: it takes text of another width than {concept_map.width}, which the "
                    "erasure is for"
                ) from error
        if not all(stream_of(name) for name in self.lora):
            layers |= queries_and_outputs(model)
        for name, factors in self.lora.items():
            if name not in layers:
                raise BaseModelMismatchError(f"model: it has no projection {name!r}")
            layer = layers[name]
            taken = self._map_of(name)
            takes = layer.in_features if taken is None else taken.width
            got = (layer.out_features, takes)
            wanted = (factors.up.shape[0], factors.down.shape[1])
            if got != wanted:
                raise BaseModelMismatchError(
                    f"model: {name} has {got[0]} output and {got[1]} input features, the erasure "
                    f"expects {wanted[0]} and {wanted[1]}"
                )
        return layers

    def _check_base(self, model: nn.Module) -> None:
        expected = self.provenance.get("base_hashes")
        if not expected:
            raise ValueError(
                "provenance: holds no base_hashes, so the base model can't be recognized"
            )
        got = base_hashes(model, self._text_maps)
        # The widest dtype that both know (base_hashes lists it first): the narrower ones can't
        # tell weights apart whose difference is rounded away.
        common = next((dtype for dtype in got if dtype in expected), None)
        if common is None:
            raise BaseModelMismatchError(
                f"model: the erasure was made for weights in {', '.join(expected)}, which can't be "
                f"compared with {', '.join(got)}; load the model in one of the former"
            )
        if got[common] != expected[common]:
            raise BaseModelMismatchError(
                f"model: its projections have the {common} hash {got[common][:16]}, but the "
                f"erasure was made for {expected[common][:16]}; load the base model it was "
                "made for, without other edits"
            )

    def _base_weights(self, model: nn.Module | None) -> dict[str, Tensor]:
        """Un-edited weights of what changes, from the model or from what was kept at its edit."""
        if model is None and not any(concept_map.rank for concept_map in self._maps()):
            return {}
        with history_lock:
            living = [list(entries) for entries in histories.values()]
        for entries in living if model is None else [applications_of(model)]:
            for entry in entries:
                if self._is_same(entry.erasure):
                    return dict(entry.originals)
        if model is None:
            raise ValueError(
                "model: the adapter is made from the base model's weights, and this erasure is not "
                "applied to a model in this process; pass model=, the base model"
            )
        layers = self._layers(model)
        self._check_base(model)
        return {n: layer.weight.detach() for n, layer in layers.items() if self._changes(n)}

    def _adapter_factors(self, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """`[o, q]` and `[q, d]` float32 factors of the whole update of each changed projection."""
        found = {}
        for name in weights or self.lora:
            ups, downs = [], []
            concept_map = self._map_of(name)
            if concept_map is not None and concept_map.rank:
                weight = weights[name].to("cpu", torch.float64)
                ups.append(weight[:, : concept_map.width] @ concept_map.left.to(weight))
                downs.append(concept_map.right.to(weight))
            if name in self.lora:
                ups.append(self.lora[name].up.to("cpu", torch.float64))
                downs.append(self.lora[name].down.to("cpu", torch.float64))
            up, down = torch.cat(ups, 1), torch.cat(downs, 0)
            if name in weights:
                down = nn.functional.pad(down, (0, weights[name].shape[1] - down.shape[1]))
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


def _loads_adapters(kind: str | None, model: nn.Module | None) -> bool:
    """Whether diffusers loads adapters into a model of that class; None is not known, so it may."""
    import diffusers

    if model is not None:
        return hasattr(unwrapped(model), "load_lora_adapter")
    return kind is None or hasattr(getattr(diffusers, kind, None), "load_lora_adapter")


@exclusive
def applied(model: nn.Module) -> tuple[Erasure, ...]:
    """The erasures that are applied to a model object in this process, in order.

    Those that were undone since are left out; where the weights were changed by something else,
    nothing is known and the result is empty.
    """
    history = applications_of(model)
    if not history:
        return ()
    place = place_of(history, WeightStates(model))
    return () if place is None else tuple(entry.erasure for entry in history[: place + 1])


def history_of(model: nn.Module) -> list[dict[str, Any]]:
    """What was erased from a model before, for the provenance of the next erasure."""
    return [history_entry(erasure) for erasure in applied(model)]
