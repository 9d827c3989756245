from collections.abc import Sequence
from typing import Any, Literal, Protocol

class SupportsDLPack(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

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

depthwise_taps: int

def masked_conv_instructions() -> list[str]: ...
def masked_conv_packed_size(algorithm: str, instructions: str, weight_size: Sequence[int]) -> int: ...
def masked_conv_pack(
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
    previous: SupportsDLPack | None = None,
    dmask: SupportsDLPack | None = None,
) -> None: ...
def bernoulli_gate(
    theta: SupportsDLPack,
    seed: int,
    step: int | SupportsDLPack,
    gate: SupportsDLPack,
    slope: SupportsDLPack,
    num_threads: int = 0,
) -> None: ...
def gumbel_gate(
    logits: SupportsDLPack,
    seed: int,
    step: int | SupportsDLPack,
    temperature: float,
    base: float,
    hard: bool,
    noise: Literal["gumbel", "logistic", "none"],
    gate: SupportsDLPack,
    slope: SupportsDLPack,
    num_threads: int = 0,
) -> None: ...
def philox4x32(counter: list[int], key: list[int]) -> list[int]: ...
def natural_log(x: float) -> float: ...
def exponential(x: float) -> float: ...
def instruction_set() -> Literal["baseline", "avx2", "avx512"]: ...
def limit_instruction_set(highest: Literal["baseline", "avx2", "avx512"]) -> bool: ...
def group_prox(
    table: UnitTable, threshold: SupportsDLPack | None, norms: SupportsDLPack, num_threads: int = 0
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
    residual: SupportsDLPack | None = None,
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
    others: SupportsDLPack | None = None,
) -> None: ...
def masked_act_partials(
    dy: SupportsDLPack,
    saved: SupportsDLPack,
    x: SupportsDLPack | None,
    dx: SupportsDLPack | None,
    others: SupportsDLPack | None = None,
) -> int: ...
def channel_moments(
    x: SupportsDLPack,
    mean: SupportsDLPack,
    variance: SupportsDLPack,
    partials: SupportsDLPack | None,
    num_threads: int = 0,
) -> None: ...
def channel_moments_partials(x: SupportsDLPack) -> int: ...
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
