"""The result of an erasure: small factors that can be applied, undone, saved and shared.

What they do to weights is in `edit`, what a model carries in `history`, the file in `file`, and
what other programs read in `export`.
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

from torch import Tensor, nn

from realera_fast.erasure import attachment, export, file, gating, history
from realera_fast.erasure.adapters import Layout
from realera_fast.erasure.edit import edit_of
from realera_fast.erasure.hub import OnHub
from realera_fast.erasure.model_card import write_card
from realera_fast.erasure.report import anchor_name, anchors_of, neighbors_of
from realera_fast.models import Family, LoraFactors, Stream, Target, check_target
from realera_fast.runtime import composed, encode_json, exclusive, ordinary, tensor_bytes, valid
from realera_fast.solver import ConceptMap, IncrementalSystem, PromptMap
from realera_fast.text import Concept

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Erasure(OnHub):
    """What was erased and how: everything needed to do it again on the same base model."""

    map: ConceptMap
    """The closed form, T = I + L R, for every projection of the token sequence."""
    lora: Mapping[str, LoraFactors]
    """Factors of single layers by name: values that moved, and those of the alignment."""
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
        edit = edit_of(self)
        for name, factors in self.lora.items():
            concept_map = edit.map_of(name)
            if concept_map is not None and factors.down.shape[1] != concept_map.width:
                raise ValueError(
                    f"lora[{name!r}]: expected down of shape [r, {concept_map.width}] like the "
                    f"map, got {list(factors.down.shape)}"
                )
        targets = [concept.target for concept in self.concepts]
        for stream, system in self._systems.items():
            concept_map, field = edit.maps.get(stream), file.SYSTEM_FIELDS[stream]
            if (
                concept_map is None
                or list(system.concepts) != targets
                or system.width != concept_map.width
            ):
                raise ValueError(
                    f"{field}: expected the equations of {targets}, got {system.concepts}"
                )
        for name, tensor in edit.tensors().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: holds NaN or infinity")

    def __repr__(self) -> str:
        anchors = anchors_of(self.report)
        shown = [f"{c.target!r} -> {anchor_name(c, anchors)!r}" for c in self.concepts[:8]]
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
        return edit_of(self).edited(weights)

    @exclusive
    def apply_(self, model: nn.Module, *, target: Target = "weights") -> nn.Module:
        """Edits the model in place; any failure leaves it bit-identical to before.

        An erasure of nothing (rank 0, no LoRA) writes nothing.

        Args:
            model: The base model that the erasure was made for, in any dtype of at most its width.
            target: "weights" are edited, or an "adapter" named "erasure" is attached with peft and
                every weight stays, of quantized and offloaded layers too.

        Returns:
            The same `model`.

        Raises:
            BaseModelMismatchError: other weights, or already edited ones.
            ValueError: the model can't be edited (see :func:`realera_fast.models.projections`).
        """
        check_target(target)
        if target == "adapter":
            return attachment.attach_(self, model)
        return history.apply_(self, model)

    @exclusive
    def restore_(self, model: nn.Module, *, force: bool = False) -> nn.Module:
        """Undoes this erasure bit for bit, if it was the last one applied to `model`; one that is
        attached as an adapter is taken out, and other adapters stay.

        Args:
            force: put the original weights back also where something else changed the weights
                since, such as an adapter that was merged into them; that change is lost.

        Returns:
            The same `model`.

        Raises:
            ValueError: it is not the last one, the weights changed since, or it was not applied
                to this model object in this process.
        """
        if attachment.detached(self, model):
            return model
        return history.restore_(self, model, force=force)

    @exclusive
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The edited tensors alone, for ``model.load_state_dict(..., strict=False)``.

        Args:
            model: The base model, or the model this erasure was applied to last.

        Returns:
            Copies by ``"<module>.weight"``; empty if nothing changes.
        """
        return history.edited_state(self, model)

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
        maps: dict[Stream, ConceptMap] = {}
        systems: dict[Stream, IncrementalSystem] = {}
        # What was measured was measured on the whole.
        anchors = {t: a for t, a in anchors_of(self.report).items() if t not in targets}
        near = {t: w for t, w in neighbors_of(self.report).items() if t not in targets}
        report: dict[str, Any] = {
            "withdrawn": list(targets),
            "anchors": anchors,
            "neighbors": near,
        }
        for stream, kept in self._systems.items():
            system = kept.copy()
            for target in dict.fromkeys(targets):
                system.remove(target)
            solution = system.solve(rank_tolerance=tolerance)
            field = "solve" if stream == "sequence" else f"solve_{stream}"
            report[field] = dataclasses.asdict(solution.info)
            maps[stream], systems[stream] = solution.map.to("cpu"), system
        if self.lora:
            logger.warning("the alignment factors were trained for all concepts: left out")
        return Erasure(
            maps["sequence"],
            {},
            tuple(concept for concept in self.concepts if concept.target not in targets),
            self.config,
            self.provenance,
            report,
            systems["sequence"],
            maps.get("pooled"),
            systems.get("pooled"),
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
        fields = {
            "concepts": [concept.to_dict() for concept in self.concepts],
            "config": self.config,
            "provenance": self.provenance,
            "report": self.report,
        }
        written = file.save(Path(path), edit_of(self), fields, self._systems)
        component = export.component_of(self.provenance)
        write_card(written, self, use="factors", component=component)
        return written

    @classmethod
    @ordinary()
    def load(cls, path: str | os.PathLike[str]) -> Erasure:
        """Reads what :meth:`save` wrote. The file is not trusted: everything in it is checked.

        Raises:
            FileNotFoundError: there is no such file.
            ErasureFileError: it is not a valid erasure.
        """
        return file.load(Path(path), cls)

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
        return export.save_lora(self, Path(path), model, layout)

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
        return export.save_weights(self, Path(path), model)

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
        return export.save_single_file(self, Path(path), Path(checkpoint), model)

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
        return export.save_pretrained(self, Path(folder), model)

    def annotate(self, folder: str | os.PathLike[str]) -> None:
        """Writes what was erased into a folder that diffusers saved an edited model to.

        Each of its safetensors files gets the metadata, and the folder a model card.
        """
        export.annotate(self, Path(folder))

    def metadata(self) -> dict[str, str]:
        """What every exported file says about itself, as text: concepts with their anchors, config,
        versions, seed and base hashes, the solve with its residual, and the report's SHA-256."""
        values = {
            "concepts": [concept.to_dict() for concept in self.concepts],
            "config": self.config,
            "provenance": self.provenance,
            "anchors": anchors_of(self.report),
            "solve": self.report.get("solve"),
            "report_sha256": hashlib.sha256(encode_json(self.report).encode()).hexdigest(),
        }
        return {f"realera_fast.{name}": encode_json(value) for name, value in values.items()}

    # Without weights, and together with others

    @ordinary()
    def prompt_map(self, *, gate: bool = False, pipe: Any = None) -> PromptMap:
        """The same erasure as a small module on prompt embeddings; the weights stay as they are.

        Args:
            gate: leave prompts without the concepts bit-identical. Where the gates open is
                calibrated on prompts of what goes and of what stays, which takes seconds.
            pipe: for the gate, the pipeline: its text encoders read these prompts. That they are
                those it was made for is the caller's word; only their width is compared.

        Raises:
            ValueError: `gate` without `pipe`, or with one whose text has another width; layers were
                changed one by one, by noise alignment or where values are moved
                (`ClosedFormConfig.space`), which no map of prompts can; or the model has a norm
                before its map (`models.Family.norm`).
        """
        if self.lora:
            raise ValueError(
                "this erasure has factors that act layer by layer and not on the prompt; erase "
                "with EraseConfig(alignment=AlignmentConfig(enabled=False), closed_form="
                'ClosedFormConfig(space="text"))'
            )
        norm = (self.provenance.get("reading") or {}).get("norm")
        if norm is not None:
            raise ValueError(
                f"this model passes prompt embeddings through its {norm} before the map that is "
                "edited, and what was erased is erased behind it: no map of prompt embeddings does "
                "the same; use apply_, or save_lora for an adapter"
            )
        if not gate:
            return PromptMap(self.map, self.pooled_map)
        if pipe is None:
            raise ValueError(
                "pipe: gate=True needs the text encoders to calibrate the gate on; pass the "
                "pipeline, prompt_map(gate=True, pipe=pipe)"
            )
        return PromptMap(self.map, self.pooled_map, gating.calibrated(self, pipe))

    @exclusive
    def rebase(self, model: nn.Module) -> Erasure:
        """The same factors for other weights that are shown the same text.

        These are another state of the model, as after withdrawing an earlier erasure, or a
        ControlNet beside it. A closed form of the text does not depend on the weights, so it is
        what erasing there would give. Factors of single layers were made for the old state and fit
        the new one about; for a model of another class those of alignment are left out.

        Args:
            model: with the same text encoders; not changed.

        Raises:
            ValueError: values of a model of another class moved (`ClosedFormConfig.space`).
        """
        return history.rebase(self, model)

    @exclusive
    def withdraw_(self, model: nn.Module) -> tuple[Erasure, ...]:
        """Takes this erasure out from under those that were applied after it.

        The weights become what the others alone make of the base model. Where these are solved in
        the text, without alignment, that is what erasing them alone gives.

        Returns:
            Those that were applied later, in order, for the weights as they are now: use these in
            place of the old ones to undo or save them.

        Raises:
            ValueError: it is not applied to this model object in this process, or the weights
                changed since.
        """
        return history.withdraw_(self, model)

    @ordinary()
    def then(self, later: Erasure) -> Erasure:
        """This erasure, then a later one, as one: a single file to apply to the base model.

        Args:
            later: made on the model that this one edited, or on the same base model.

        Raises:
            ValueError: it was made on another model.
        """
        return history.then(self, later)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the factors and of the base model that they are for."""
        digest = hashlib.sha256(encode_json(self.provenance.get("base_hashes")).encode())
        for name, tensor in sorted(edit_of(self).tensors().items()):
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    @property
    def _systems(self) -> dict[Stream, IncrementalSystem]:
        """The kept equations, by the text that they are about."""
        systems: dict[Stream, IncrementalSystem | None] = {
            "sequence": self.system,
            "pooled": self.pooled_system,
        }
        return {stream: system for stream, system in systems.items() if system is not None}
