"""Weights on disk: safetensors are read and written; torch files are read with ``weights_only=True``, not unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastprune.host import atomic


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the parameters and buffers of ``model`` as safetensors; a reader sees the old file or the complete new one.

    Args:
        model: the network.
        path: the file; its folder must exist.
    """
    # Tensors may share memory (tied weights) or be strided; safetensors needs each one dense, in its own memory.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    atomic.write(Path(path), lambda temporary: save_file(tensors, temporary))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict.

    A torch file may hold it under the key ``state_dict`` or ``model``; the prefix ``module.`` of data-parallel wrappers
    is removed.

    Args:
        path: a ``.safetensors`` file, or a ``.pt`` / ``.pth`` file.

    Returns:
        Tensors on the CPU by name.

    Raises:
        ValueError: if the file is missing, of another kind or damaged, or holds other objects than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights {str(path)!r}: there is no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights {str(path)!r}: not a whole safetensors file ({error})") from error
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"weights {str(path)!r}: give a .safetensors, .pt or .pth file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights {str(path)!r}: the file is damaged, or holds Python objects, which are never unpickled; save "
            "model.state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"weights {str(path)!r}: not a whole torch file ({error})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights {str(path)!r}: got no state dict; a mapping from names to tensors is needed")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights at ``path`` into ``model``; all names and shapes must agree.

    Only ``num_batches_tracked`` may be missing, as in files from before torch 0.4.1, such as torchvision's first ones.
    The model then keeps its own.

    Args:
        model: the network, changed in place.
        path: a file for ``read_weights``.

    Raises:
        ValueError: as in ``read_weights``, or if names or shapes do not agree; the model is then unchanged.
    """
    given, wanted = read_weights(path), model.state_dict()
    counters = {name: tensor for name, tensor in wanted.items() if name.rpartition(".")[2] == "num_batches_tracked"}
    given = {**counters, **given}
    problems = [
        *_describe("missing", [name for name in wanted if name not in given]),
        *_describe("unexpected", [name for name in given if name not in wanted]),
        *_describe(
            "of another shape",
            [
                f"{name} {list(given[name].shape)}, needs {list(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in given and given[name].shape != tensor.shape
            ],
        ),
    ]
    if problems:
        raise ValueError(f"weights {str(path)!r} do not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(given)


def count_classes(path: str | Path) -> int | None:
    """Return the number of classes of the last linear layer in a weights file; None without such a layer."""
    matrices = [tensor for tensor in read_weights(path).values() if tensor.dim() == 2]
    return matrices[-1].shape[0] if matrices else None


def _describe(what: str, names: list[str], limit: int = 5) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{what}: {', '.join(names[:limit])}{more}"]
