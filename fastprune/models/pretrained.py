"""Weights that torchvision and timm publish, by name: from their caches, or fetched where the network is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastprune.host.spelling import did_you_mean


def names_weights(weights: object) -> bool:
    """Return whether weights are named, as in ``DEFAULT``, ``IMAGENET1K_V2`` or ``pretrained``, and are no file."""
    text = str(weights)
    return bool(re.fullmatch(r"[A-Z][A-Z0-9_]*|pretrained", text)) and not Path(text).exists()


def find_torchvision_weights(models: Any, name: str, weights: str) -> Any:
    """Return the weights of a torchvision model by their name; ``pretrained`` means ``DEFAULT``.

    Raises:
        ValueError: for a name that does not exist; says which do.
    """
    known = models.get_model_weights(name)
    wanted = "DEFAULT" if weights == "pretrained" else weights
    names = ["DEFAULT", *known.__members__]
    if wanted not in known.__members__:
        hint = did_you_mean(wanted, names) or f"there are {', '.join(dict.fromkeys(names))}"
        raise ValueError(f"weights {weights!r} of 'torchvision:{name}' are unknown: {hint}")
    return known[wanted]


@contextmanager
def fetching(spec: str, weights: str) -> Iterator[None]:
    """Turn the errors of a download into one clear line.

    Raises:
        ValueError: if the weights are neither in the cache nor in reach.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"weights {weights!r} of {spec!r}: they are not in the cache of this machine and cannot be fetched "
            f"({' '.join(str(error).split())}); fetch them on a machine with network and give the file to --weights"
        ) from error


def refuse_named(spec: str, weights: str) -> None:
    """Refuse named weights of a network that has none.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"weights {weights!r}: {spec!r} has no weights of that name; give a file, or a network of torchvision or timm"
    )
