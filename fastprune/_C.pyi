from collections.abc import Sequence
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
def masked_conv_instructions() -> list[str]: ...
def packed_conv_size(algorithm: str, instructions: str, weight_size: Sequence[int]) -> int: ...
def pack_masked_conv(
    algorithm: str,
    instructions: str,
    weight: SupportsDLPack,
    scale: SupportsDLPack | None,
    transposed: bool,
    packed: SupportsDLPack,
    num_threads: int = 0,
) -> None: ...
def masked_conv(
    algorithm: str,
    instructions: str,
    x: SupportsDLPack,
    packed: SupportsDLPack,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shift: SupportsDLPack | None,
    mask: SupportsDLPack | None,
    residual: SupportsDLPack | None,
    lowest: float,
    highest: float,
    y: SupportsDLPack | None,
    saved: SupportsDLPack | None,
    num_threads: int = 0,
) -> None: ...
