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
def masked_act(
    x: SupportsDLPack,
    scale: SupportsDLPack | None,
    shift: SupportsDLPack | None,
    mask: SupportsDLPack | None,
    activation: str,
    y: SupportsDLPack | None,
    saved: SupportsDLPack | None,
    num_threads: int = 0,
) -> None: ...
def emulated_masked_act(
    x: SupportsDLPack,
    scale: SupportsDLPack | None,
    shift: SupportsDLPack | None,
    mask: SupportsDLPack | None,
    activation: str,
    y: SupportsDLPack | None,
    saved: SupportsDLPack | None,
    num_threads: int = 8,
    warp_size: int = 4,
) -> None: ...
def masked_act_backward(
    dy: SupportsDLPack,
    saved: SupportsDLPack,
    x: SupportsDLPack | None,
    mask: SupportsDLPack | None,
    scale: SupportsDLPack | None,
    centre: SupportsDLPack | None,
    slope: SupportsDLPack | None,
    offset: SupportsDLPack | None,
    activation: str,
    dx: SupportsDLPack | None,
    dmask: SupportsDLPack | None,
    dshift: SupportsDLPack | None,
    dscale: SupportsDLPack | None,
    partials: SupportsDLPack | None,
    num_threads: int = 0,
) -> None: ...
def emulated_masked_act_backward(
    dy: SupportsDLPack,
    saved: SupportsDLPack,
    x: SupportsDLPack | None,
    mask: SupportsDLPack | None,
    scale: SupportsDLPack | None,
    centre: SupportsDLPack | None,
    slope: SupportsDLPack | None,
    offset: SupportsDLPack | None,
    activation: str,
    dx: SupportsDLPack | None,
    dmask: SupportsDLPack | None,
    dshift: SupportsDLPack | None,
    dscale: SupportsDLPack | None,
    num_threads: int = 8,
    warp_size: int = 4,
) -> None: ...
def masked_act_partials(
    dy: SupportsDLPack, saved: SupportsDLPack, x: SupportsDLPack | None, dx: SupportsDLPack | None
) -> int: ...
def channel_moments(
    x: SupportsDLPack,
    mean: SupportsDLPack,
    variance: SupportsDLPack,
    partials: SupportsDLPack | None,
    num_threads: int = 0,
) -> None: ...
def emulated_channel_moments(
    x: SupportsDLPack,
    mean: SupportsDLPack,
    variance: SupportsDLPack,
    num_threads: int = 8,
    warp_size: int = 4,
) -> None: ...
def channel_moments_partials(x: SupportsDLPack) -> int: ...
