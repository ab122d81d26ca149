"""Which erasures a model carries, in order: applying one, undoing it, taking it out again.

What edits a model here is called by the verbs of `Erasure`, alone on that model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from realera_fast.erasure.attachment import attached_to
from realera_fast.erasure.base_model import BaseModelMismatchError, check_base, layers_of
from realera_fast.erasure.edit import edit_of, is_same
from realera_fast.models import (
    LoraFactors,
    UnreadableWeightError,
    base_hashes,
    dense_weight,
    projections,
    transaction,
    weights_hash,
    write_,
)
from realera_fast.runtime import exclusive, folded, unwrapped

if TYPE_CHECKING:
    from realera_fast.erasure.erasure import Erasure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Application:
    """One edit of one model in this process."""

    erasure: Erasure
    originals: Mapping[str, Tensor]
    """Weights of the edited projections before, on the CPU."""
    before: Mapping[str, str]
    """Hash of every layer that the erasure is about, before."""
    after: Mapping[str, str]
    """The same after."""


histories: WeakKeyDictionary[nn.Module, list[Application]] = WeakKeyDictionary()
"""What was applied to each living model, in order. It is what makes a bit-exact undo possible.

A list belongs to whoever works on its model (`states.exclusive`), the dictionary to all threads."""
history_lock = threading.Lock()


def applications_of(model: nn.Module) -> list[Application]:
    """What was applied to a model, to be read or changed."""
    with history_lock:
        return histories.setdefault(unwrapped(model), [])


def history_entry(erasure: Erasure, action: str = "erased") -> dict[str, Any]:
    """An erasure in the history of another."""
    return {
        "action": action,
        "concepts": [concept.target for concept in erasure.concepts],
        "fingerprint": erasure.fingerprint,
        "seed": erasure.provenance.get("seed"),
        "version": erasure.provenance.get("versions", {}).get("realera_fast"),
    }


class WeightStates:
    """Hashes of a model's layers as they are stored now, each made when first asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._found: dict[str, str] = {}

    def of(self, names: Iterable[str]) -> dict[str, str]:
        """Of these layers, by name."""
        return {name: self._hash(name) for name in names}

    def are(self, expected: Mapping[str, str]) -> bool:
        """Whether the layers named there are as it says."""
        return all(self._hash(name) == value for name, value in expected.items())

    def _hash(self, name: str) -> str:
        if name not in self._found:
            layer: Any = self._model.get_submodule(name)
            # An adapter around it changes no weight.
            layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            try:
                weight = dense_weight(layer)
            except UnreadableWeightError:
                # Whatever it was before, it is something else now.
                self._found[name] = ""
            else:
                self._found[name] = weights_hash({name: weight}, weight.dtype)
        return self._found[name]


def place_of(history: list[Application], now: WeightStates) -> int | None:
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


def forget_undone(history: list[Application], now: WeightStates) -> None:
    """Drops applications that were undone behind our back, as by an outer transaction."""
    place = place_of(history, now)
    if place is not None:
        del history[place + 1 :]


def is_last(erasure: Erasure, model: nn.Module) -> bool:
    """Whether the weights of now are what this erasure made, with none applied after it."""
    history = applications_of(model)
    place = place_of(history, WeightStates(model))
    return place is not None and place >= 0 and is_same(history[place].erasure, erasure)


@exclusive
def applied(model: nn.Module) -> tuple[Erasure, ...]:
    """The erasures that are applied to a model object in this process, in order.

    Those that were undone since are left out; where the weights were changed by something else,
    nothing is known of them. One that is attached as an adapter is the last.
    """
    history, attached = applications_of(model), attached_to(model)
    place = place_of(history, WeightStates(model)) if history else None
    written = history[: 0 if place is None else place + 1]
    return (*(entry.erasure for entry in written), *((attached,) if attached else ()))


@exclusive
def originals_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the layers that the applied erasures changed, before all of them, by module name.

    Empty where nothing is applied, and where the weights were changed by something else.
    """
    history = applications_of(model)
    place = place_of(history, WeightStates(model)) if history else None
    found: dict[str, Tensor] = {}
    for entry in reversed(history[: 0 if place is None else place + 1]):
        found |= entry.originals
    return found


def history_of(model: nn.Module) -> list[dict[str, Any]]:
    """What was erased from a model before, for the provenance of the next erasure."""
    return [history_entry(erasure) for erasure in applied(model)]


def check_stack(model: nn.Module, erasures: Sequence[Erasure]) -> None:
    """Refuses erasures that were not made for a model, as it is or before what is applied to it.

    One may also have been made after others, which are applied or come before it here.

    Raises:
        BaseModelMismatchError: one was made for other weights, or they can't be compared.
        ValueError: one does not say for which.
    """
    before = applied(model)
    # It was compared with the weights when it was applied.
    bases = [entry.provenance.get("base_hashes") for entry in before[:1]]
    known = {entry.fingerprint for entry in before}
    for each in erasures:
        entries = each.provenance.get("history", [])
        earlier = {e.get("fingerprint") for e in entries if e.get("action") == "erased"}
        expected = each.provenance.get("base_hashes")
        if expected not in bases and not (earlier and earlier <= known):
            check_base(model, expected, edit_of(each).takes)
            bases.append(expected)
        known |= {each.fingerprint, *earlier}


def apply_(erasure: Erasure, model: nn.Module) -> nn.Module:
    """Edits a model in place, as `Erasure.apply_`."""
    projections(model, edit_of(erasure).takes)
    return _apply(erasure, model)


def _apply(erasure: Erasure, model: nn.Module) -> nn.Module:
    """`apply_`, however the model runs its layers."""
    edit = edit_of(erasure)
    layers = layers_of(model, edit)
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    history = applications_of(model)
    now = WeightStates(model)
    forget_undone(history, now)
    before = now.of(layers)
    top = history[-1] if history else None
    if top and now.are(top.after) and top.after != top.before and is_same(top.erasure, erasure):
        raise BaseModelMismatchError("model: this erasure is already applied to it")
    check_base(model, erasure.provenance.get("base_hashes"), edit.takes)
    edited = edit.edited(weights)
    originals = {name: weights[name].to("cpu", copy=True) for name in edited if edit.changes(name)}
    record: Application | None = None
    try:
        with transaction(model, layers):
            for name in originals:
                write_(layers[name].weight, edited[name])
            after = WeightStates(model).of(layers)
            record = Application(erasure, originals, before, after)
            history.append(record)
    except BaseException:
        if record in history:
            history.remove(record)
        raise
    logger.info("applied %r to %d layers", erasure, len(originals))
    return model


def restore_(erasure: Erasure, model: nn.Module, *, force: bool = False) -> nn.Module:
    """Undoes an erasure bit for bit, as `Erasure.restore_`."""
    layers = layers_of(model, edit_of(erasure))
    history = applications_of(model)
    known = any(is_same(entry.erasure, erasure) for entry in history)
    place = place_of(history, WeightStates(model))
    if not known:
        raise ValueError(
            "model: this erasure was not applied to this model in this process, or was undone "
            "since (also by one that extends it), so there is nothing to go back to; restore what "
            "erasure.applied(model) names, or reload the base model"
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
    if not is_same(entry.erasure, erasure):
        raise ValueError(f"model: {entry.erasure!r} was applied last; restore that one first")
    with transaction(model, layers):
        for name, original in entry.originals.items():
            write_(layers[name].weight, original)
    del history[place:]
    return model


def edited_state(erasure: Erasure, model: nn.Module) -> dict[str, Tensor]:
    """The edited tensors alone, as `Erasure.state_dict`."""
    edit = edit_of(erasure)
    weights = {name: layer.weight.detach() for name, layer in layers_of(model, edit).items()}
    if not is_last(erasure, model):
        check_base(model, erasure.provenance.get("base_hashes"), edit.takes)
        weights = edit.edited(weights)
    return {f"{n}.weight": w.clone() for n, w in weights.items() if edit.changes(n)}


def rebase(erasure: Erasure, model: nn.Module) -> Erasure:
    """The same factors for other weights, as `Erasure.rebase`."""
    kind, lora = type(unwrapped(model)).__name__, erasure.lora
    moved = bool((erasure.report.get("scales") or {}).get("values"))
    if kind != erasure.provenance.get("model_class", kind):
        if moved:
            raise ValueError(
                f"model: this erasure moves outputs of a {erasure.provenance['model_class']}'s own "
                f"layers, which a {kind} has not; erase with closed_form=ClosedFormConfig("
                'space="text"), whose factors fit every model that is shown the same text'
            )
        if lora:
            logger.warning(
                "the alignment factors were trained for a %s: left out for the %s",
                erasure.provenance["model_class"],
                kind,
            )
        lora = {}
    elif lora:
        logger.warning("factors of single layers were made for other weights: kept as they are")
    history = [history_entry(entry.erasure) for entry in applications_of(model)]
    provenance = {
        **erasure.provenance,
        "model_class": kind,
        "base_hashes": base_hashes(model, edit_of(erasure).takes),
        "history": history,
    }
    rebased = dataclasses.replace(erasure, provenance=provenance, lora=lora)
    layers_of(model, edit_of(rebased), "adapter")
    return rebased


def withdraw_(erasure: Erasure, model: nn.Module) -> tuple[Erasure, ...]:
    """Takes an erasure out from under those applied after it, as `Erasure.withdraw_`."""
    history = applications_of(model)
    places = [i for i, entry in enumerate(history) if is_same(entry.erasure, erasure)]
    if not places or place_of(history, WeightStates(model)) != len(history) - 1:
        raise ValueError(
            "model: this erasure is not applied to it, or its weights changed since; reload "
            "the base model, and apply the others to it with rebase"
        )
    kept = list(history)
    layers: dict[str, nn.Linear] = {}
    for entry in history:
        layers |= layers_of(model, edit_of(entry.erasure))
    remaining = []
    try:
        with transaction(model, layers):
            for entry in reversed(kept[places[-1] :]):
                entry.erasure.restore_(model)
            for entry in kept[places[-1] + 1 :]:
                again = entry.erasure.rebase(model)
                withdrawn = [*again.provenance["history"], history_entry(erasure, "withdrawn")]
                provenance = {**again.provenance, "history": withdrawn}
                again = dataclasses.replace(again, provenance=provenance)
                _apply(again, model)
                remaining.append(again)
    except BaseException:
        history[:] = kept
        raise
    return tuple(remaining)


def check_extended(model: nn.Module, erasures: Sequence[Erasure]) -> list[Application]:
    """Those of the erasures that are applied to a model, as `taken_off` undoes them.

    Raises:
        BaseModelMismatchError: one that is not applied was made for other weights.
        ValueError: one is attached as an adapter, others were applied after one of them or took the
            same, or the weights changed since.
    """
    attached, history = attached_to(model), applications_of(model)
    if attached is not None:
        raise ValueError(
            f"model: {attached!r} is attached to it as an adapter; take it out with restore_ first "
            "(extends= takes erasures that are not applied too)"
        )
    place = place_of(history, WeightStates(model)) if history else -1
    if place is None:
        raise ValueError(
            "model: its weights (or their dtype) changed since erasures were applied to it, so "
            "these can't be undone; load the base model and pass them as extends= to it"
        )
    own: list[Application] = []
    words = {folded(w) for each in erasures for c in each.concepts for w in c.words}
    for entry in history[: place + 1]:
        if any(is_same(entry.erasure, each) for each in erasures):
            own.append(entry)
            continue
        if own:
            raise ValueError(
                f"model: {entry.erasure!r} was applied after {own[-1].erasure!r}; name it in "
                "extends= as well, or take it out with withdraw_"
            )
        if both := words & {folded(w) for c in entry.erasure.concepts for w in c.words}:
            raise ValueError(
                f"model: {entry.erasure!r} is applied to it and took {min(both)!r} too; undo it "
                "with restore_ first, or name it itself in extends="
            )
    # In the order in which they were made, whatever order they were named in.
    applied_ones = [entry.erasure for entry in own]
    rest = [e for e in erasures if not any(is_same(e, each) for each in applied_ones)]
    check_stack(model, [*applied_ones, *rest])
    return own


@contextlib.contextmanager
def taken_off(model: nn.Module, erasures: Sequence[Erasure]) -> Iterator[None]:
    """Runs with erasures undone, those of them that are applied; they are back if it fails.

    Raises:
        ValueError: see `check_extended`.
    """
    history = applications_of(model)
    kept, own = list(history), check_extended(model, erasures)
    layers: dict[str, nn.Linear] = {}
    for entry in own:
        layers |= layers_of(model, edit_of(entry.erasure))
    try:
        with transaction(model, layers):
            for entry in reversed(own):
                restore_(entry.erasure, model)
            yield
    except BaseException:
        history[:] = kept
        raise


def then(erasure: Erasure, later: Erasure) -> Erasure:
    """Two erasures as one, as `Erasure.then`."""
    made_on = [entry.get("fingerprint") for entry in later.provenance.get("history", [])]
    if erasure.fingerprint not in made_on and later.provenance.get(
        "base_hashes"
    ) != erasure.provenance.get("base_hashes"):
        raise ValueError("later: it was made on another model than this erasure, or than left")
    own = edit_of(erasure)
    either = own.self_attention or edit_of(later).self_attention
    edit, lora = dataclasses.replace(edit_of(later), self_attention=either), dict(later.lora)
    for name, factors in erasure.lora.items():
        taken = edit.map_of(name)
        # (W T + up down) T' = W T T' + up (down T')
        down = factors.down
        if taken is not None:
            down = down + (down @ taken.left.to(down)) @ taken.right.to(down)
        moved = LoraFactors(down.contiguous(), factors.up)
        lora[name] = moved + lora[name] if name in lora else moved
    maps = {
        # Weights are edited from the right: W T T' is the later map first.
        stream: edit.maps[stream].compose(concept_map).compressed()
        for stream, concept_map in own.maps.items()
        if stream in edit.maps
    }
    return type(erasure)(
        maps["sequence"],
        lora,
        (*erasure.concepts, *later.concepts),
        later.config,
        {
            **erasure.provenance,
            **({"self_attention": True} if either else {}),
            "preserve": [
                *erasure.provenance.get("preserve", []),
                *later.provenance.get("preserve", []),
            ],
            "history": [
                *erasure.provenance.get("history", []),
                history_entry(erasure),
                history_entry(later),
            ],
        },
        {"parts": [erasure.report, later.report]},
        pooled_map=maps.get("pooled"),
    )
