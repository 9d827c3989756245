from typing import Any, Protocol

class SupportsDLPack(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

def build_info() -> dict[str, Any]: ...
def cuda_available() -> bool: ...
def cuda_device_count() -> int: ...
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
