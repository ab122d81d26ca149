"""What knows transformers with joint attention and flow matching: variants, LoRA, Euler steps."""

from realera_fast.transformer.flow_sampler import EulerSampler, euler_of
from realera_fast.transformer.shared_transformer import JointConditioning, SharedTransformer

__all__ = [
    "EulerSampler",
    "JointConditioning",
    "SharedTransformer",
    "euler_of",
]
