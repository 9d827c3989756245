"""How much memory is free, and tensors that lie in files where there is not enough."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes; of the host, what its container leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = read(CGROUP / "memory.max").strip(), read(CGROUP / "memory.current").strip()
    if limit.isdecimal() and used.isdecimal():  # "max" without a limit
        free = min(free, max(0, int(limit) - int(used)))
    return free


def read(path: Path) -> str:
    """Return the text of a file of the system; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def to_file(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values and strides on the CPU, whose memory is a file without a name.

    The system keeps its pages in memory as long as there is room, and gives the file back with the tensor.

    Raises:
        OSError: if the folder for temporary files is full.
    """
    dense = tensor.detach().clone().cpu()  # keeps strides, without gaps
    storage = dense.untyped_storage()
    handle, path = tempfile.mkstemp(prefix="fastprune-", suffix=".values")
    try:
        with os.fdopen(handle, "wb") as file:  # a full disk is an error here; behind mapped memory it ends the process
            file.write(dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data)
        mapped: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=storage.nbytes())
    finally:
        Path(path).unlink()
    return torch.empty(0, dtype=dense.dtype).set_(mapped, 0, dense.shape, dense.stride())


def is_in_file(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor, or of what it views, is a file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None
