from collections.abc import Sequence
from typing import Any, Protocol

class SupportsDLPack(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

def build_info() -> dict[str, Any]: ...
def cuda_available() -> bool: ...
def cuda_device_count() -> int: ...
def fused_conv_candidates() -> list[dict[str, Any]]: ...
def fused_conv_workspace(
    x: SupportsDLPack,
    weight: SupportsDLPack,
    y: SupportsDLPack,
    saved: SupportsDLPack | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    candidate: int,
) -> int | None: ...
def fused_conv(
    x: SupportsDLPack,
    weight: SupportsDLPack,
    scale: SupportsDLPack | None,
    shift: SupportsDLPack | None,
    mask: SupportsDLPack | None,
    y: SupportsDLPack,
    saved: SupportsDLPack | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    candidate: int,
    workspace: SupportsDLPack | None = None,
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
