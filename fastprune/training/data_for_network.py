"""Data whose batches depend on the network that reads them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NoReturn, overload

from torch import nn

from fastprune.data.batches import Split
from fastprune.data.data import Data
from fastprune.training.objective import Objective


class DataForNetwork(Data):
    """A data set of another library, whose labels and loss are those of a network's task.

    Before a network is there, only its name, the shape of its images and its number of classes are known.
    """

    @abstractmethod
    def open(self, network: nn.Module) -> tuple[Data, Objective]:
        """Return the data as a network reads them, and how it runs on them.

        Raises:
            ValueError: for a network that is none for these data.
        """

    def size(self, split: Split) -> NoReturn:
        """Refuse: nothing can be read before ``open``."""
        raise TypeError(f"data {self.name!r}: they are read for a network: call open(network)")

    def steps(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse: nothing can be read before ``open``."""
        self.size("train")


@overload
def open_for(network: nn.Module, data: Data, objective: Objective) -> tuple[Data, Objective]: ...


@overload
def open_for(network: nn.Module, data: Data | None, objective: Objective) -> tuple[Data | None, Objective]: ...


def open_for(network: nn.Module, data: Data | None, objective: Objective) -> tuple[Data | None, Objective]:
    """Return data as a network reads them, and the objective on them.

    Args:
        network: the network.
        data: the data; those that any network can read stay.
        objective: what the user gives.

    Raises:
        ValueError: for data that bring their own objective beside another one.
    """
    if not isinstance(data, DataForNetwork):
        return data, objective
    if objective != Objective():
        raise ValueError(f"data {data.name!r} have a loss and a forward of their own; leave out loss and forward")
    return data.open(network)
