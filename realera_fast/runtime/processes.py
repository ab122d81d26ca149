"""One process or many: sums and gathers that do nothing where there is only one.

Every process draws the same batch and works on its share of it; what is added up or gathered is the
same on all of them, so that all take the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Processes:
    """The processes that work together, through the caller's `accelerate.Accelerator`."""

    def __init__(self, accelerator: Any = None) -> None:
        """
        Args:
            accelerator: the caller's; None is this process alone.
        """
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index if accelerator else 0
        self.count: int = accelerator.num_processes if accelerator else 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws bars."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's consecutive part of `count` things; the parts differ by one at most."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes, in one exchange."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        # NCCL exchanges tensors of GPUs alone, and text encoders may be on the CPU.
        flat = self._accelerator.reduce(flat.to(self._accelerator.device), reduction="sum")
        for tensor, values in zip(
            tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.copy_(values.view_as(tensor))

    def gather(self, tensor: Tensor) -> Tensor:
        """The parts of all processes, equal in size, one after the other."""
        if self.count == 1:
            return tensor
        parts = tensor.contiguous().to(self._accelerator.device)
        return self._accelerator.gather(parts).to(tensor.device)

    def agreed(self, value: bool, device: torch.device) -> bool:
        """The main process's answer, for all."""
        answer = torch.tensor([float(value and self.is_main)], dtype=torch.float32, device=device)
        self.sum_([answer])
        return bool(answer)

    def everywhere(self, value: bool, device: torch.device) -> bool:
        """Whether it is so in all processes."""
        if self.count == 1:
            return value
        answers = torch.tensor([float(value)], dtype=torch.float32, device=device)
        self.sum_([answers])
        return int(answers) == self.count

    def joined(self, items: Sequence[Item]) -> list[Item]:
        """What all processes have, one after the other: any objects that can be pickled."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import gather_object

        # Of lists it makes one.
        return list(gather_object(list(items)))

    def summed(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The sum over all processes, which exchange it on a device; where `tensor` is."""
        if self.count == 1:
            return tensor
        total = tensor.to(device, copy=True)
        self.sum_([total])
        return total.to(tensor.device)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hands values to the accelerator's trackers, if it has some."""
        if self._accelerator is not None and self._accelerator.trackers:
            self._accelerator.log(dict(values), step=step)
