"""Every operation with fixed inputs, to be run in several threads and processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from realera_fast import ops


def calls(device: str = "cpu") -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Every operation with fixed inputs of several sizes; each call starts from the same state."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    found: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for n, d, dtype in ((70, 31, torch.float16), (900, 300, torch.bfloat16)):
        x, w = random(n, d, dtype=dtype), random(n).abs()
        y = x.clone()
        y[::3] = random(len(y[::3]), d, dtype=dtype)

        def sums(x: Tensor = x, y: Tensor = y, w: Tensor = w) -> tuple[Tensor, ...]:
            d = x.shape[1]
            gram, cross = (torch.zeros(d, d, dtype=torch.float64, device=device) for _ in "ab")
            ops.normal_equations_(gram, cross, x, y, w)
            return gram, cross

        found[f"normal_equations_ {n}x{d}"] = sums
        gram = sums()[0] + torch.eye(d, dtype=torch.float64, device=device)
        rhs = random(d + 3, d, dtype=torch.float64)

        def solve(gram: Tensor = gram, rhs: Tensor = rhs) -> tuple[Tensor, ...]:
            return ops.solve_spd(gram, rhs)

        found[f"solve_spd {d}"] = solve

        def batch(gram: Tensor = gram, rhs: Tensor = rhs) -> tuple[Tensor, ...]:
            return ops.solve_spd(torch.stack([gram, 2 * gram, gram + 1]), rhs.expand(3, -1, -1))

        found[f"solve_spd 3x{d}"] = batch
        weights = [
            random(o, d, dtype=kind)
            for o in (1, 37, 320, 640)
            for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        ]
        left, right = random(d, 19) / d, random(19, d)
        offset = [random(len(weight), 19) for weight in weights]

        def update(
            weights: list[Tensor] = weights,
            left: Tensor = left,
            right: Tensor = right,
            offset: tuple[Tensor, ...] | list[Tensor] = (),
        ) -> tuple[Tensor, ...]:
            edited = [weight.clone() for weight in weights]
            ops.low_rank_update_(edited, left, right, offset)
            return tuple(edited)

        def moved(
            update: Callable[..., tuple[Tensor, ...]] = update, offset: list[Tensor] = offset
        ) -> tuple[Tensor, ...]:
            return update(offset=offset)

        found[f"low_rank_update_ {d}"] = update
        found[f"low_rank_update_ {d} with offsets"] = moved
    return found
