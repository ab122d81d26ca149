"""A pipeline under methods that edit it: each edit is drawn from, and taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from quality.methods import Method
from realera_fast import Concept, Erasure


class Editable:
    """A pipeline whose models are as they were after every edit, bit for bit."""

    def __init__(self, pipe: Any, edited: Sequence[nn.Module], *, copied: bool = True) -> None:
        """
        Args:
            edited: Models that methods may edit, the denoiser first.
            copied: Whether their weights are copied, as baselines can't undo what they do. Without
                a copy only what gives an erasure or edits nothing can be taken back.
        """
        self.pipe, self.edited = pipe, tuple(edited)
        self._weights: list[dict[str, Tensor]] = []
        if copied:
            self._weights = [
                {k: v.to("cpu", copy=True) for k, v in m.state_dict().items()} for m in edited
            ]

    def erased(
        self,
        method: Method,
        concepts: Sequence[Concept],
        seed: int,
        work: Callable[[Any], Any],
        exclude: Sequence[str] = (),
    ) -> tuple[Any, float, Erasure | None]:
        """What `work` makes of the edited pipeline, seconds of the edit, and what it gave.

        Args:
            work: draws from the pipeline that it is given.
            exclude: words that the tokenizer is not to list.
        """
        started = time.perf_counter()
        erasure: Erasure | None = None
        applied = False
        try:
            result = method.erase(self.pipe, concepts, seed, exclude)
            erasure = result if isinstance(result, Erasure) else None
            applied = erasure is not None
            drawing = self.pipe
            if method.drawn and result is not None:
                if erasure is not None:
                    erasure.restore_(self.edited[0])
                    applied = False
                drawing = method.drawn(self.pipe, result)
            seconds = time.perf_counter() - started
            found = work(drawing)
        finally:
            if applied and erasure is not None:
                erasure.restore_(self.edited[0])
            self._put_back()
        return found, seconds, erasure

    def _put_back(self) -> None:
        for model, weights in zip(self.edited, self._weights, strict=False):
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                # Whatever is drawn from now on would be of another model.
                raise SystemExit(
                    f"a method left a model that can't be put back: {error}"
                ) from error
