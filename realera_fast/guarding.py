"""A pipeline whose prompts are mapped on their way to the denoiser, request by request.

The prompt is caught where stock pipelines make it, in ``encode_prompt``. A callback at the end of a
step would come after the first step, which decides what the picture is of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from realera_fast.erasure import BaseModelMismatchError, Erasure, applied, check_stack
from realera_fast.models import components_of
from realera_fast.runtime import listed, refuse_offloading
from realera_fast.solver import PromptMap


class GuardedPipeline:
    """Draws as a pipeline does, without what was erased; made by `guard`.

    Each call runs on a shallow copy of the pipeline, with a scheduler of its own, as the pipeline's
    was when this was made: threads may call it, and the pipeline itself, at the same time.
    """

    def __init__(self, pipe: Any, prompt_map: PromptMap) -> None:
        """
        Args:
            pipe: a stock pipeline of diffusers; never changed.
            prompt_map: of all erasures, on the device of the prompts best.

        Raises:
            ValueError: it has no ``encode_prompt``, or moves its modules while it draws
                (``enable_model_cpu_offload``, ``enable_sequential_cpu_offload``).
        """
        if not callable(getattr(pipe, "encode_prompt", None)) or not callable(pipe):
            raise ValueError(
                f"pipe: {type(pipe).__name__} has no encode_prompt to guard; map its prompt "
                "embeddings yourself, with erasure.prompt_map()"
            )
        _check_hooks(pipe)
        self._pipe, self._map = pipe, prompt_map
        # Later on the pipeline may be drawing, with its scheduler half way.
        self._scheduler = copy.deepcopy(getattr(pipe, "scheduler", None))

    @property
    def prompt_map(self) -> PromptMap:
        """What the prompts go through."""
        return self._map

    def pipeline(self) -> Any:
        """A pipeline of the same class for one request: its modules are the same objects, what a
        call changes is its own.

        Raises:
            ValueError: the pipeline moves its modules while it draws by now.
        """
        _check_hooks(self._pipe)
        own = copy.copy(self._pipe)
        if self._scheduler is not None:
            own.scheduler = copy.deepcopy(self._scheduler)
        own.encode_prompt = self._guarded(own.encode_prompt)
        return own

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Calls a pipeline of its own with these arguments."""
        return self.pipeline()(*arguments, **options)

    def _guarded(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def encode_prompt(*arguments: Any, **options: Any) -> Any:
            if options.get("clip_skip") is not None:
                raise ValueError(
                    "clip_skip: the erasure was made for prompts as the text encoder's usual layer "
                    "gives them; leave it out"
                )
            found = encode(*arguments, **options)
            mapped = self._mapped(found if isinstance(found, tuple) else (found,))
            return mapped if isinstance(found, tuple) else mapped[0]

        return encode_prompt

    def _mapped(self, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `encode_prompt` gave, positive and negative prompts alike, with masks as they are.

        Raises:
            ValueError: no prompt is among it, or no pooled vector for each.
        """
        pooled = self._map.pooled
        sequences = _places(parts, 3, self._map.sequence.width)
        vectors = [] if pooled is None else _places(parts, 2, pooled.width)
        if not sequences or (pooled is not None and len(vectors) != len(sequences)):
            shapes = [list(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
            wanted = f"[b, t, {self._map.sequence.width}]"
            if pooled is not None:
                wanted += f" and [b, {pooled.width}] for each"
            raise ValueError(
                f"pipe: encode_prompt gave {shapes}, expected prompts of shape {wanted}; pass the "
                "pipeline that the erasure was made for"
            )
        mapped = list(parts)
        for number, place in enumerate(sequences):
            if pooled is None:
                mapped[place] = self._map(parts[place])
            else:
                at = vectors[number]
                mapped[place], mapped[at] = self._map(parts[place], parts[at])
        return tuple(mapped)


def guard(
    pipe: Any, erasure: Erasure | PromptMap | Sequence[Erasure | PromptMap], *, gate: bool = True
) -> GuardedPipeline:
    """Erasures for some requests of a pipeline, while it draws others as ever.

    The weights stay as they are, and so does `pipe`. Map and gate are made once; a call of what
    comes back costs a shallow copy of the pipeline, and threads may call it at the same time::

        guarded = realera_fast.guard(pipe, erasure)
        image = guarded("a photo of a cat", num_inference_steps=25).images[0]

    Args:
        pipe: a stock pipeline of diffusers with an ``encode_prompt``, un-edited or with earlier
            erasures, and without ``enable_model_cpu_offload``.
        erasure: what to leave out: an erasure, a prompt map, or several, in the order in which they
            were erased. Erasures are compared with the projections of `pipe` as `apply_` does it; a
            prompt map does not say which model it is for, and only its width is checked.
        gate: calibrate gates, so that other prompts come out bit-identical. A `PromptMap` keeps the
            gates that it has.

    Returns:
        Something to call in place of `pipe`.

    Raises:
        BaseModelMismatchError: an erasure was made for other weights than those of `pipe`, and not
            for these with the erasures before it.
        ValueError: an erasure has no prompt map (`Erasure.prompt_map`), is applied to the weights
            of `pipe` already, or none is given; the pipeline has no ``encode_prompt``, or moves
            its modules while it draws.
    """
    given = (erasure,) if isinstance(erasure, Erasure | PromptMap) else listed(erasure, "erasure")
    if not given:
        raise ValueError("erasure: expected one at least, got none")
    _check_hooks(pipe)
    _check_given(pipe, given)
    prompt_map: PromptMap | None = None
    for each in given:
        if isinstance(each, Erasure):
            each = each.prompt_map(gate=gate, pipe=pipe if gate else None)
        # Weights are edited from the right: the later map goes first.
        prompt_map = each if prompt_map is None else prompt_map.compose(each)
    assert prompt_map is not None
    device = getattr(pipe, "device", None)
    if device is not None:
        prompt_map = copy.deepcopy(prompt_map).to(device)
    return GuardedPipeline(pipe, prompt_map)


def _check_given(pipe: Any, given: Sequence[Any]) -> None:
    """
    Raises:
        BaseModelMismatchError: an erasure is of another model.
        TypeError: something is neither an erasure nor a prompt map.
        ValueError: an erasure is in the weights already.
    """
    model = components_of(pipe).model
    written = {each.fingerprint for each in applied(model)}
    for each in given:
        if not isinstance(each, Erasure | PromptMap):
            raise TypeError(
                f"erasure: expected an Erasure or a PromptMap, got {type(each).__name__}"
            )
        if isinstance(each, Erasure) and each.fingerprint in written:
            raise ValueError(
                f"erasure: {each!r} is applied to this pipeline's weights already; "
                "restore_ it first"
            )
    try:
        check_stack(model, [each for each in given if isinstance(each, Erasure)])
    except BaseModelMismatchError as error:
        raise BaseModelMismatchError(
            f"erasure: {error}; one that was made after others needs them before it; for other "
            "weights that are shown the same text, pass erasure.rebase(model)"
        ) from error


def _check_hooks(pipe: Any) -> None:
    """
    Raises:
        ValueError: weights move during a call, or the end of each call sets the hooks of modules
            anew, which another thread may be running.
    """
    for name, part in getattr(pipe, "components", {}).items():
        if isinstance(part, nn.Module):
            refuse_offloading(part, f"pipe.{name}")
    if getattr(pipe, "_all_hooks", None):
        raise ValueError(
            "pipe: enable_model_cpu_offload moves its modules at the end of each call, under "
            "requests that still draw; call pipe.remove_all_hooks(), and move it to one device"
        )


def _places(parts: Sequence[Any], dimensions: int, width: int) -> list[int]:
    """Which of several values are embeddings of so many features; masks and ids are none."""
    return [
        place
        for place, part in enumerate(parts)
        if isinstance(part, Tensor)
        and part.is_floating_point()
        and part.dim() == dimensions
        and part.shape[-1] == width
    ]
