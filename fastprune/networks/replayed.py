"""A masked network's forward and backward pass as CUDA graphs: the host starts two graphs, not hundreds of kernels."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprune.networks.fusion import frozen_convolutions
from fastprune.networks.masked import MaskedNetwork
from fastprune.networks.traced_copy import version
from fastprune.ops.conv.autotune import is_busy
from fastprune.ops.conv.frozen import FrozenConv

IS_ENABLED = os.environ.get("FASTPRUNE_CUDA_GRAPHS", "0") == "1"


class ReplayedNetwork:
    """Computes a masked network for the steps of a search; on CUDA, if asked for, by graphs that are captured once.

    ``FASTPRUNE_CUDA_GRAPHS=1`` asks for them. Of equal calls on the largest batch so far the second one is captured,
    and those after it are replayed. Calls are equal if images have the same shapes, dtypes and layouts, under the same
    autocast, gates want gradients, and weights want none and have not changed. All others run the network itself:
    smaller last batches, evaluations, all on the CPU, and all after a failed capture.

    Args:
        masked: the network.
    """

    def __init__(self, masked: MaskedNetwork) -> None:
        self.masked = masked
        self.parameters = list(masked.network.parameters())
        self.tensors = [*self.parameters, *masked.network.buffers()]
        self._seen: dict[int, Any] = {}  # {number of images' elements: what its last call had}
        self._captured: Any = None
        self._replay: Callable[..., Any] | None = None
        self._weights: list[FrozenConv] = []  # those that the graphs read
        self._has_failed = False

    def under(self, gates: Tensor) -> StepNetwork:
        """Return the network under gates [U] for one step, whose backward pass must come before the next step."""
        return StepNetwork(self, gates)

    def find_replay(self, inputs: Sequence[Any], gates: Tensor) -> Callable[..., Any] | None:
        """Return what computes this call from ``(*inputs, gates)`` by graphs, captured now if it is time; or None.

        The next replay overwrites the outputs, and what their gradient is computed from.
        """
        if self._has_failed or not self.can_replay(inputs, gates):
            return None
        key, size = self.key_of((*inputs, gates)), sum(x.numel() for x in inputs)
        if self._replay is None and self._seen.get(size) == key and size == max(self._seen):
            self.capture((*inputs, gates))
            self._captured = key
        self._seen[size] = key
        return self._replay if key == self._captured else None

    def can_replay(self, inputs: Sequence[Any], gates: Tensor) -> bool:
        """Return whether a graph could compute this call."""
        return (
            IS_ENABLED
            and are_on_cuda(inputs, gates)
            and torch.is_grad_enabled()
            and gates.requires_grad
            and not any(tensor.requires_grad for tensor in (*inputs, *self.parameters))
            and not is_busy(gates.device)
        )

    def key_of(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return what equal calls have in common."""
        self.masked.note_new_statistics()
        kind = tensors[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        calls = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
        return *calls, autocast, *map(version, self.tensors)

    def capture(self, tensors: Sequence[Tensor]) -> None:
        """Capture both passes, on copies of these tensors."""
        samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in tensors)
        kind = tensors[0].device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        try:
            # torch captures nothing while autocast keeps what it has cast.
            with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
                self._replay = make_graphs(self._call, samples)
            # A graph reads folded weights by address, and an evaluation in another dtype replaces them in the network.
            self._weights = frozen_convolutions(self.masked.fused)
        except (AttributeError, RuntimeError) as error:  # AttributeError: an output that is no tensor
            self._has_failed = True
            warnings.warn(
                f"the search's step runs without a CUDA graph, and slower where the host is slow: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _call(self, *tensors: Tensor) -> Any:
        return self.masked(*tensors)


@dataclass
class StepNetwork:
    """A network under gates in one step of a search, called as the model is.

    Args:
        network: the network.
        gates: the gates, [U].
    """

    network: ReplayedNetwork
    gates: Tensor
    was_replayed: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's outputs. Only one call is replayed: a second would overwrite its activations."""
        masked = self.network.masked
        inputs = masked.in_order(args, kwargs)
        replay = None if self.was_replayed else self.network.find_replay(inputs, self.gates)
        if replay is None:
            return masked(*inputs, self.gates)
        self.was_replayed = True
        return replay(*inputs, self.gates)


def make_graphs(function: Callable[..., Any], samples: Sequence[Tensor]) -> Callable[..., Any]:
    """Capture a function's forward and backward pass on the device of its arguments.

    A failed capture leaves torch on the stream of the capture; the caller's is restored.
    """
    make: Any = torch.cuda.make_graphed_callables
    # In older versions of torch a loader's thread that pins memory can end the capture.
    mode = {"capture_error_mode": "thread_local"} if "capture_error_mode" in inspect.signature(make).parameters else {}
    device = samples[0].device
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            graphs: Callable[..., Any] = make(function, tuple(samples), **mode)
        finally:
            torch.cuda.synchronize(device)
    return graphs


def are_on_cuda(inputs: Sequence[Any], gates: Tensor) -> bool:
    """Return whether all are tensors on CUDA."""
    return all(isinstance(x, Tensor) and x.is_cuda for x in (*inputs, gates))
