"""Layers that compute their weight, with closed channels of their inputs.

Which layer that is, the module that owns the parameter does not say: it may make several such calls, or none where the
code of another module makes them. So what is computed from the parameters is followed through the network's run.
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
    """Zeroes closed channels of a network's layers where they read them.

    Args:
        closed: {a parameter from which the weight of a layer is computed: which of the channels that it reads are
            closed, bool}; a grouped layer reads the same channels of each group.
    """

    def __init__(self, closed: Mapping[str, Tensor]) -> None:
        self.closed = dict(closed)
        self.running: list[Following] = []

    def around(self, network: nn.Module) -> None:
        """Do so in each run of ``network``, and of its copies."""
        network.register_forward_pre_hook(self.enter, prepend=True)
        network.register_forward_hook(self.leave, always_call=True)

    def enter(self, network: nn.Module, args: Any) -> None:
        """Before a run."""
        tensors = state_of(network)
        self.running.append(Following({tensors[name]: (name, closed) for name, closed in self.closed.items()}))
        self.running[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, network: nn.Module, args: Any, output: Any) -> None:
        """After a run, also one that failed, which has no output.

        Raises:
            SurgeryError: if a parameter was used, and no layer whose weight is computed from it was found.
        """
        following = self.running.pop()
        following.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        missed = sorted(following.used - following.read)
        if missed and output is not None:
            raise SurgeryError(
                f"{missed[0]!r}: the layer whose weight is computed from it could not be found while the model ran, so "
                "its channels cannot be closed; apply(plan, model, check=False) does not check it"
            )


class Following(TorchFunctionMode):
    """One run: what is computed from which parameters, and the inputs of the layers whose weight that is."""

    def __init__(self, closed: Mapping[Tensor, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.closed = {name: (tensor.shape, mask) for tensor, (name, mask) in closed.items()}
        # By id, with the value itself: an id is given again where the value is gone.
        self.origins = {id(tensor): (tensor, {name}) for tensor, (name, _) in closed.items()}
        self.used: set[str] = set()
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "").partition(".")[0] in LAYERS:
            return func(*self.with_closed(args, kwargs), **kwargs)
        result = func(*args, **kwargs)
        if names := self.names_of((args, kwargs)):
            made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            self.used |= names if made else set()
            for value in made:
                self.origins[id(value)] = (value, names | self.names_of(value))
        return result

    def names_of(self, values: Any) -> set[str]:
        """The parameters from which values are computed."""
        return set().union(*(self.origins[id(x)][1] for x in pytree.tree_leaves(values) if id(x) in self.origins))

    def with_closed(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of a layer, with the closed channels of its input zeroed."""
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        x, weight = given["input"], given["weight"]
        for name in self.names_of(weight):
            shape, closed = self.closed[name]
            if shape == weight.shape:  # else a factor of the weight
                self.read.add(name)
                dim = -1 if weight.dim() == 2 else 1
                indices = closed.repeat(x.shape[dim] // len(closed)).nonzero().flatten()
                x = x.index_fill(dim, indices.to(x.device), 0.0)
        if args:
            return (x, *args[1:])
        kwargs["input"] = x
        return args
