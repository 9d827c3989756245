"""What builds a network again: the name and the arguments that ``create`` was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from fastprune.models.heads import outline
from fastprune.models.resolve import MARK, OWN, create


@dataclass(frozen=True)
class Source:
    """The arguments of ``models.create`` that build a network, with random weights.

    Args:
        model: name of the network, as ``resnet20``, ``torchvision:resnet50`` or ``package.module:factory``.
        num_classes: size of the output; None = the factory's default.
        in_channels: channels of the image; None = the factory's default.
    """

    model: str
    num_classes: int | None = None
    in_channels: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether a package that everybody knows makes the network, not a function of the user."""
        return self.model in OWN or self.model.partition(":")[0] in ("torchvision", "timm")

    def build(self, num_classes: int | None = None) -> nn.Module:
        """Build the network.

        Args:
            num_classes: size of the output in place of the source's own.

        Raises:
            ValueError: as ``models.create``.
        """
        return create(self.model, num_classes=num_classes or self.num_classes, in_channels=self.in_channels)

    def outline(self) -> nn.Module:
        """Build the network without values, on the meta device; with values where its code needs them."""
        return outline(self.build)

    def with_classes(self, num_classes: int) -> Source:
        """Return the source of the same network for another number of classes."""
        return replace(self, num_classes=num_classes)

    def to_json(self) -> dict[str, Any]:
        """Return the source as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> Source:
        """Return the source that ``to_json`` described.

        Raises:
            ValueError: if it is none.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), str):
            raise ValueError(f"source: got {values!r}; a mapping with the name of a model is needed")
        sizes = {name: values.get(name) for name in ("num_classes", "in_channels")}
        for name, size in sizes.items():
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ValueError(f"source: {name} is {size!r}; a positive number or null is needed")
        return Source(values["model"], **sizes)


def source_of(model: nn.Module) -> Source | None:
    """Return the source of a network that ``create`` built, None for any other.

    The network may have been changed since: compare it with what the source builds.
    """
    mark = vars(model).get(MARK)
    return None if mark is None else Source(*mark)
