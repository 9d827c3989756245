"""Closed input channels of layers that compute their weight.

The module that owns the parameter does not tell which layer reads the weight: it may call several layers, or none if
another module's code calls them. So the values that are computed from parameters are tracked while the network runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastprune.graph.model_state import state_of
from fastprune.surgery.slicing import SurgeryError

LAYERS = {"linear", "convolution", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))}


class ClosedInputs:
    """Zeroes the closed channels in the inputs of a network's layers.

    Args:
        closed: {a parameter from which the weight of a layer is computed: which of the channels that the layer reads
            are closed, bool}; a grouped layer reads the same channels of each group.
    """

    def __init__(self, closed: Mapping[str, Tensor]) -> None:
        self.closed = dict(closed)
        self.running: list[Tracker] = []

    def attach(self, network: nn.Module) -> None:
        """Zero the channels in each run of ``network``, and of its copies."""
        network.register_forward_pre_hook(self.enter, prepend=True)
        network.register_forward_hook(self.leave, always_call=True)

    def enter(self, network: nn.Module, args: Any) -> None:
        """Start tracking, before a run."""
        tensors = state_of(network)
        self.running.append(Tracker({tensors[name]: (name, closed) for name, closed in self.closed.items()}))
        self.running[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, network: nn.Module, args: Any, output: Any) -> None:
        """Stop tracking, after a run; one that failed has no output.

        Raises:
            SurgeryError: if a parameter was used, and no layer whose weight is computed from it was found.
        """
        tracker = self.running.pop()
        tracker.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        missed = sorted(tracker.used - tracker.read)
        if missed and output is not None:
            raise SurgeryError(
                f"{missed[0]!r}: the layer whose weight is computed from it could not be found while the model ran, so "
                "its channels cannot be closed; apply(plan, model, check=False) does not check it"
            )


class Tracker(TorchFunctionMode):
    """Tracks in one run which values are computed from parameters, and closes the inputs of layers that read them.

    Args:
        closed: {the parameter: its name, and which channels are closed}.
    """

    def __init__(self, closed: Mapping[Tensor, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.closed = {name: (tensor.shape, mask) for tensor, (name, mask) in closed.items()}
        # By id, with the value itself, so that it lives on: a freed id would be given again.
        self.origins = {id(tensor): (tensor, {name}) for tensor, (name, _) in closed.items()}
        self.used: set[str] = set()
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "").partition(".")[0] in LAYERS:
            return func(*self.close_inputs(args, kwargs), **kwargs)
        result = func(*args, **kwargs)
        if names := self.names_of((args, kwargs)):
            computed = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            self.used |= names if computed else set()
            for value in computed:
                self.origins[id(value)] = (value, names | self.names_of(value))
        return result

    def names_of(self, values: Any) -> set[str]:
        """Return the names of the parameters from which values are computed."""
        return set().union(*(self.origins[id(x)][1] for x in pytree.tree_leaves(values) if id(x) in self.origins))

    def close_inputs(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Zero the closed channels of a layer's input; return its positional arguments, and change those by name."""
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        x, weight = given["input"], given["weight"]
        for name in self.names_of(weight):
            shape, closed = self.closed[name]
            if shape == weight.shape:  # otherwise it is a factor of the weight
                self.read.add(name)
                dim = -1 if weight.dim() == 2 else 1
                indices = closed.repeat(x.shape[dim] // len(closed)).nonzero().flatten()
                x = x.index_fill(dim, indices.to(x.device), 0.0)
        if args:
            return (x, *args[1:])
        kwargs["input"] = x
        return args
