"""Weights on disk: safetensors are read and written; torch files are read with ``weights_only=True``, not unpickled."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastprune.host import atomic

log = logging.getLogger(__name__)

NESTS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Keys under which training scripts keep the state dict."""

EMA = ("model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema")
"""Keys under which they keep the moving average of the weights."""


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the parameters and buffers of ``model`` as safetensors; a reader sees the old file or the complete new one.

    Args:
        model: the network.
        path: the file; its folder must exist.
    """
    # Tensors may share memory (tied weights) or be strided; safetensors needs each one dense, in its own memory.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    atomic.write(Path(path), lambda temporary: save_file(tensors, temporary))


def read_weights(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file or a torch file; its content says which it is, not its name.

    A torch file may hold it in mappings such as ``state_dict`` or ``model``, one within the other, beside an epoch, an
    optimiser and a moving average (EMA) of the weights. The prefixes ``module.`` and ``_orig_mod.`` of wrappers are
    removed.

    Args:
        path: the file: .safetensors, .pt, .pth, .ckpt, .th, .tar, .bin, ….
        ema: whether the moving average is taken; False = only if the file holds nothing else.

    Returns:
        Tensors on the CPU by name.

    Raises:
        ValueError: if the file is missing, of another kind or damaged, holds other objects than tensors, or no moving
            average that was asked for.
    """
    state, note = _read(Path(path), ema=ema)
    if note:
        log.info("weights %s: took %s", path, note)
    return state


def _read(path: Path, *, ema: bool = False) -> tuple[dict[str, Tensor], str]:
    """Return what ``read_weights`` does, and the place within the file that it came from; "" for the whole file."""
    if not path.is_file():
        raise ValueError(f"weights {str(path)!r}: there is no such file")
    kind = kind_of(path)
    if kind == "safetensors":
        try:
            content: Any = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights {str(path)!r}: not a whole safetensors file ({error})") from error
    elif kind == "torch":
        content = _read_torch(path)
    else:
        raise ValueError(
            f"weights {str(path)!r}: neither a safetensors file nor a torch file; save model.state_dict() with "
            "torch.save or safetensors"
        )
    state, places = _find_state_dict(content, ema=ema)
    where = ".".join(places)
    if state is None:
        found = f"its keys: {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else "no mapping"
        need = "no moving average (EMA) of the weights" if ema else "no state dict"
        raise ValueError(f"weights {str(path)!r}: got {need}; a mapping from names to tensors is needed ({found})")
    others = [key for key in content if key in EMA and key not in places] if where else []
    note = f"{where!r}" + (f"; {others[0]!r} is there too (ema)" if others else "") if where else ""
    return _without_wrappers(state), note


def kind_of(path: Path) -> str:
    """Return "safetensors" or "torch" by the first bytes of a file; "" for neither."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        return "safetensors"
    # A zip archive, or the pickles of torch before 1.6, which begin with a protocol of 2 or more.
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "torch"
    return {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}.get(path.suffix, "")


def _read_torch(path: Path) -> Any:
    try:
        with path.open("rb") as file:  # of a path torch looks at the name
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights {str(path)!r}: the file is damaged, or holds Python objects, which are never unpickled; save "
            "model.state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"weights {str(path)!r}: not a whole torch file ({error})") from error


def _find_state_dict(content: Any, *, ema: bool) -> tuple[Mapping[Any, Any] | None, list[str]]:
    """Return the state dict within a file's content, and the keys that lead to it; None if there is none."""
    if not isinstance(content, Mapping):
        return None, []
    # A plain state dict of a network that has a layer called "model" holds no mapping under that name.
    for key in (*(EMA if ema else ()), *NESTS, *(() if ema else EMA)):
        if isinstance(content.get(key), Mapping):
            inside = key in EMA and ema
            state, places = _find_state_dict(content[key], ema=ema and not inside)
            if state is not None:
                return state, [key, *places]
    if ema or not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None, []
    return content, []


def _without_wrappers(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of wrappers, and without the counter of torch's averaged models."""
    found = {str(name): value for name, value in state.items()}
    if "n_averaged" in found and all(name.startswith("module.") for name in found if name != "n_averaged"):
        del found["n_averaged"]
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def load_weights(model: nn.Module, path: str | Path, *, ema: bool = False) -> None:
    """Load the weights at ``path`` into ``model``; all names and shapes must agree.

    Only ``num_batches_tracked`` may be missing, as in files from before torch 0.4.1, such as torchvision's first ones.
    The model then keeps its own. A prefix such as ``model.`` in front of all names, as training frameworks write it, is
    removed if the model has none of these names.

    Args:
        model: the network, changed in place.
        path: a file for ``read_weights``.
        ema: as in ``read_weights``.

    Raises:
        ValueError: as in ``read_weights``, or if names or shapes do not agree; the model is then unchanged.
    """
    fit(model, read_weights(path, ema=ema), str(path))


def fit(
    model: nn.Module,
    given: Mapping[str, Tensor],
    path: str,
    leave_out: Callable[[Collection[str]], Collection[str]] = lambda misfits: (),
) -> Collection[str]:
    """Load tensors into a model by name, as ``load_weights`` does.

    Args:
        model: the network, changed in place.
        given: the tensors.
        path: where they come from, for messages.
        leave_out: gets the names of tensors of another shape, returns the names of those that the model keeps.

    Returns:
        The names of the tensors that the model has kept.

    Raises:
        ValueError: if names or shapes do not agree; the model is then unchanged.
    """
    wanted = model.state_dict()
    for prefix in ("model.", "net.", "network."):
        if given and not given.keys() & wanted.keys() and all(name.startswith(prefix) for name in given):
            given = {name.removeprefix(prefix): value for name, value in given.items()}
    counters = {name: tensor for name, tensor in wanted.items() if name.rpartition(".")[2] == "num_batches_tracked"}
    given = {**counters, **given}
    kept = leave_out([name for name, tensor in given.items() if name in wanted and tensor.shape != wanted[name].shape])
    given |= {name: wanted[name] for name in kept}
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
        raise ValueError(f"weights {path!r} do not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(given)
    return kept


def count_classes(path: str | Path) -> int | None:
    """Return the number of classes of the last linear layer in a weights file; None without such a layer."""
    state, _ = _read(Path(path))  # load_weights says what was taken
    matrices = [tensor for tensor in state.values() if tensor.dim() == 2]
    return matrices[-1].shape[0] if matrices else None


def _describe(what: str, names: list[str], limit: int = 5) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{what}: {', '.join(names[:limit])}{more}"]
