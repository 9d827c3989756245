from collections.abc import Sequence
from typing import Any, Protocol

class SupportsDLPack(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

def build_info() -> dict[str, Any]: ...
def cuda_available() -> bool: ...
def cuda_device_count() -> int: ...

class UnitTable:
    def __init__(
        self,
        slices: Sequence[tuple[SupportsDLPack, int, SupportsDLPack]],
        num_units: int,
        limits: Sequence[int] | None = None,
    ) -> None: ...
    def write_sizes(self, sizes: SupportsDLPack) -> None: ...
    @property
    def num_device_words(self) -> int: ...
    def write_device_words(self, words: SupportsDLPack) -> None: ...
    def attach(self, words: SupportsDLPack) -> None: ...

def group_prox(
    table: UnitTable, threshold: SupportsDLPack | None, norms: SupportsDLPack, num_threads: int = 0
) -> None: ...
def emulated_group_prox(
    table: UnitTable,
    threshold: SupportsDLPack | None,
    norms: SupportsDLPack,
    num_threads: int = 8,
    warp_size: int = 4,
) -> None: ...
def topk_mask(
    scores: SupportsDLPack,
    keep: SupportsDLPack,
    offsets: SupportsDLPack,
    window: SupportsDLPack | None,
    mask: SupportsDLPack,
    num_threads: int = 0,
) -> None: ...
def emulated_topk_mask(
    scores: SupportsDLPack,
    keep: SupportsDLPack,
    offsets: SupportsDLPack,
    window: SupportsDLPack | None,
    mask: SupportsDLPack,
    num_threads: int = 8,
    warp_size: int = 4,
    capacity: int = 8192,
) -> None: ...
