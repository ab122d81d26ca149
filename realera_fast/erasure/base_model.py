"""Whether a model is the one that an erasure was made for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from realera_fast.erasure.edit import Edit
from realera_fast.models import (
    Maps,
    Target,
    base_hashes,
    check_width,
    is_joint,
    projections,
    queries_and_outputs,
    self_attention,
    stream_of,
    streams,
    text_projections,
)


class BaseModelMismatchError(ValueError):
    """The model is not the one the erasure was made for."""


def layers_of(model: nn.Module, edit: Edit, target: Target = "weights") -> dict[str, nn.Linear]:
    """The layers of a model that an edit is about, by name.

    Args:
        target: what they are wanted for, as for `projections`.

    Raises:
        BaseModelMismatchError: the edit does not fit them in shape.
        ValueError: the model can't be edited.
    """
    maps = edit.takes
    layers = projections(model, maps, as_run=False, target=target)
    pooled = "pooled" in streams(model, maps).values()
    if pooled != ("pooled" in edit.maps):
        raise BaseModelMismatchError(
            f"model: it takes {'a' if pooled else 'no'} pooled vector of the text, the erasure "
            f"is for one that takes {'none' if pooled else 'one'}"
        )
    for stream, concept_map in edit.maps.items():
        try:
            check_width(model, stream, concept_map.width, maps)
        except ValueError as error:
            raise BaseModelMismatchError(
                f"model: it takes text of another width than {concept_map.width}, which the "
                "erasure is for"
            ) from error
    if not all(stream_of(name) for name in edit.lora):
        joint = is_joint(model)
        further = text_projections(model, as_run=False, target=target) if joint else None
        layers |= further or queries_and_outputs(model, target=target)
    if edit.self_attention:
        layers |= self_attention(model, target=target)
    for name, factors in edit.lora.items():
        if name not in layers:
            raise BaseModelMismatchError(f"model: it has no projection {name!r}")
        layer = layers[name]
        taken = edit.map_of(name)
        takes = layer.in_features if taken is None else taken.width
        got = (layer.out_features, takes)
        wanted = (factors.up.shape[0], factors.down.shape[1])
        if got != wanted:
            raise BaseModelMismatchError(
                f"model: {name} has {got[0]} output and {got[1]} input features, the erasure "
                f"expects {wanted[0]} and {wanted[1]}"
            )
    return layers


def check_base(model: nn.Module, expected: Mapping[str, str] | None, takes: Maps | None) -> None:
    """Refuses a model of other weights.

    Args:
        expected: `base_hashes` of the model that the erasure was made for.
        takes: which text each layer takes, where the caller said it.

    Raises:
        BaseModelMismatchError: its weights have other hashes, or can't be compared.
        ValueError: nothing is expected.
    """
    if not expected:
        raise ValueError("provenance: holds no base_hashes, so the base model can't be recognized")
    got = base_hashes(model, takes)
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
