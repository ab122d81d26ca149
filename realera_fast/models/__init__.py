"""Architectures: where text enters a denoiser, how a pipeline reads text, edits that are undone."""

from typing import TYPE_CHECKING

from realera_fast.models.places import LoadError, check_model
from realera_fast.runtime import on_demand

if TYPE_CHECKING:
    from realera_fast.models.components import component_name, components_of, is_pipeline
    from realera_fast.models.dense import (
        Target,
        UnreadableWeightError,
        Weights,
        check_target,
        dense_weight,
        execution_device,
    )
    from realera_fast.models.entrances import (
        ENTRANCES,
        Maps,
        Stream,
        check_drawable,
        check_runnable,
        check_trainable,
        check_width,
        class_of,
        is_self_attention,
        projections,
        queries_and_outputs,
        self_attention,
        stream_of,
        streams,
    )
    from realera_fast.models.families import (
        as_read,
        family_of,
        text_streams,
        why_not_aligned,
        why_not_run,
    )
    from realera_fast.models.fingerprint import base_hashes, weights_hash
    from realera_fast.models.joint_attention import (
        PACKED,
        TEXT_STREAM,
        is_joint,
        latent_shape,
        patch_side,
        text_projections,
    )
    from realera_fast.models.lora_factors import LoraFactors
    from realera_fast.models.pipelines import DTYPES, find_device, load_pipeline
    from realera_fast.models.reading import Family, Reading
    from realera_fast.models.refusals import RefusedModelError, refuse_adapters
    from realera_fast.models.transactions import Structure, transaction, write_
    from realera_fast.models.value_metric import output_maps, value_gram
else:
    __getattr__ = on_demand(
        __name__,
        {
            "components": ("component_name", "components_of", "is_pipeline"),
            "dense": (
                "Target",
                "UnreadableWeightError",
                "Weights",
                "check_target",
                "dense_weight",
                "execution_device",
            ),
            "entrances": (
                "ENTRANCES",
                "Maps",
                "Stream",
                "check_drawable",
                "check_runnable",
                "check_trainable",
                "check_width",
                "class_of",
                "is_self_attention",
                "projections",
                "queries_and_outputs",
                "self_attention",
                "stream_of",
                "streams",
            ),
            "families": (
                "as_read",
                "family_of",
                "text_streams",
                "why_not_aligned",
                "why_not_run",
            ),
            "fingerprint": ("base_hashes", "weights_hash"),
            "joint_attention": (
                "PACKED",
                "TEXT_STREAM",
                "is_joint",
                "latent_shape",
                "patch_side",
                "text_projections",
            ),
            "lora_factors": ("LoraFactors",),
            "pipelines": ("DTYPES", "find_device", "load_pipeline"),
            "reading": ("Family", "Reading"),
            "refusals": ("RefusedModelError", "refuse_adapters"),
            "transactions": ("Structure", "transaction", "write_"),
            "value_metric": ("output_maps", "value_gram"),
        },
    )

__all__ = [
    "DTYPES",
    "ENTRANCES",
    "Family",
    "LoadError",
    "LoraFactors",
    "Maps",
    "PACKED",
    "Reading",
    "RefusedModelError",
    "Stream",
    "Structure",
    "TEXT_STREAM",
    "Target",
    "UnreadableWeightError",
    "Weights",
    "as_read",
    "base_hashes",
    "check_drawable",
    "check_model",
    "check_runnable",
    "check_target",
    "check_trainable",
    "check_width",
    "class_of",
    "component_name",
    "components_of",
    "dense_weight",
    "execution_device",
    "family_of",
    "find_device",
    "is_joint",
    "is_pipeline",
    "is_self_attention",
    "latent_shape",
    "load_pipeline",
    "output_maps",
    "patch_side",
    "projections",
    "queries_and_outputs",
    "refuse_adapters",
    "self_attention",
    "stream_of",
    "streams",
    "text_projections",
    "text_streams",
    "transaction",
    "value_gram",
    "weights_hash",
    "why_not_aligned",
    "why_not_run",
    "write_",
]
