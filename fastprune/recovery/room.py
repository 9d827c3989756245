"""The memory that the values of a walk may take; what exceeds it lies in files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastprune.host.memory import free_memory, is_in_file, to_file

log = logging.getLogger(__name__)

SMALL = 65536  # bytes; a file would cost more than it gains
SHARE = 0.5  # of the free memory; fits and their products need some, too


class Room:
    """A bound on the memory of values.

    Args:
        device: device of the values.
        gib: the bound in GiB; None = half of the memory that is free now.
        fixed: whether values must stay where they are, since operators write into them.

    Raises:
        ValueError: for a negative bound.
    """

    def __init__(self, device: torch.device, gib: float | None = None, *, fixed: bool = False) -> None:
        if gib is not None and not gib >= 0:
            raise ValueError(f"memory: got {gib}; a number of GiB from 0 on is needed")
        self.limit = int(SHARE * free_memory(device) if gib is None else gib * 2**30)
        self.device, self.fixed, self.told = device, fixed, False
        self.used = 0
        self._held: set[int] = set()

    def count(self, values: Iterable[Any]) -> None:
        """Count the memory of all values that are held; views of one memory count once."""
        sizes: dict[int, int] = {}
        for x in pytree.tree_leaves(list(values)):
            if isinstance(x, Tensor) and not is_in_file(x):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        self._held, self.used = set(sizes), sum(sizes.values())

    def place(self, value: Any) -> Any:
        """Return a new value, in files as far as there is no room for it."""
        return pytree.tree_map_only(Tensor, self._place, value)

    def _place(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if is_in_file(x) or storage.data_ptr() in self._held:
            return x
        if self.used + storage.nbytes() > self.limit and storage.nbytes() >= SMALL:
            self.tell()
            if not self.fixed:
                return to_file(x)
        self._held.add(storage.data_ptr())
        self.used += storage.nbytes()
        return x

    def fetch(self, value: Any) -> Any:
        """Return a value on the device."""
        if self.device.type == "cpu":
            return value
        return pytree.tree_map_only(Tensor, lambda x: x.to(self.device) if is_in_file(x) else x, value)

    def tell(self) -> None:
        """Say once that the bound is reached."""
        if self.told:
            return
        self.told = True
        bound = f"compensate: the values between layers take more than {self.limit / 2**30:.1f} GiB (memory=)"
        if self.fixed:
            log.warning("%s, and operators that write in place keep them there", bound)
        else:
            log.warning("%s; the others go to files in %s", bound, tempfile.gettempdir())
