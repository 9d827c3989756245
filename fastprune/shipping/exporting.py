"""``export``: a network as a file for other runtimes, compared with the network before it is kept."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastprune.graph.export.inputs import Example
from fastprune.host import atomic
from fastprune.pruning import PruningResult
from fastprune.shipping.onnx_file import onnx_bytes
from fastprune.shipping.program import program_bytes
from fastprune.shipping.subject import ExportError, Subject, read_subject
from fastprune.shipping.weights_file import weights_bytes

TOLERANCE = 1e-4
"""Largest difference of a file's outputs from the network's, relative to the largest output."""

SUFFIXES = {".safetensors": "safetensors", ".pt2": "pt2", ".onnx": "onnx"}

ALIGNED = 8
"""Numbers of channels that tensor cores and vector units take without padding are multiples of this."""

Run = Callable[[dict[str, Tensor]], list[Tensor]]


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written.

    Args:
        path: the file.
        format: "safetensors", "pt2" or "onnx".
        bytes: its size.
        difference: the largest difference of its outputs from the network's, relative to the largest output.
        batches: the batch sizes that were compared; none for weights alone.
        unaligned: {layer: its number of channels}, of layers that pruning has narrowed to no multiple of 8.
        narrowed: number of layers that pruning has narrowed.
        opset: the opset of an ONNX file.
        trtexec: the command that makes an engine of an ONNX file with TensorRT; not tried.
    """

    path: Path
    format: str
    bytes: int
    difference: float
    batches: tuple[int, ...]
    unaligned: dict[str, int]
    narrowed: int
    opset: int | None = None
    trtexec: str | None = None

    @property
    def advice(self) -> str:
        """A sentence on layers whose number of channels is no multiple of 8; "" if there is none."""
        if not self.unaligned:
            return ""
        shown = ", ".join(f"{name} {width}" for name, width in list(self.unaligned.items())[:3])
        more = ", …" if len(self.unaligned) > 3 else ""
        return (
            f"{len(self.unaligned)} of {self.narrowed} narrowed layers have a number of channels that is no multiple "
            f"of {ALIGNED} ({shown}{more}), which many runtimes pad; prune with --round_to {ALIGNED} "
            f"(limits=Limits(round_to={ALIGNED})) to align them"
        )


def export(
    what: nn.Module | PruningResult | str | Path,
    path: str | Path,
    *,
    format: str | None = None,  # noqa: A002
    example: Example | None = None,
    opset: int | None = None,
    batch: int | None = None,
    model: nn.Module | None = None,
) -> ExportedFile:
    """Write a network as a file for other runtimes. A file that computes something else is not kept.

    Args:
        what: a network, a result of ``prune``, or the directory of a run.
        path: the file; an earlier one is replaced.
        format: "safetensors" (weights, with plan and settings as metadata), "pt2" (a program of ``torch.export``, which
            runs without fastprune) or "onnx"; None = as the file's suffix says.
        example: a batch of inputs; needed for a network, otherwise that of the run.
        opset: the opset of an ONNX file; None = torch's choice.
        batch: a fixed batch size; None = any.
        model: the full network of a run that cannot be built by a name; see ``fastprune.load``.

    Returns:
        What was written, and how far its outputs are from the network's.

    Raises:
        ExportError: for a network that cannot be exported, or a file whose outputs differ by more than 1e-4; nothing is
            written then.
        ValueError: for an unknown format, or options that the format does not have.

    Example:
        >>> import tempfile, torch, fastprune as fp
        >>> result = fp.prune(fp.models.create("resnet20"), torch.zeros(1, 3, 32, 32), method="l1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = fp.export(result, f"{folder}/compact.pt2")
        >>> file.difference < 1e-4
        True
    """
    path = Path(path)
    kind = format or SUFFIXES.get(path.suffix, "")
    check_arguments(path, kind, opset, batch)
    subject = read_subject(what, example, model)
    if kind == "safetensors":
        content = weights_bytes(subject)
        return keep(subject, path, kind, content, 0.0, ())
    if kind == "pt2":
        content, run = program_bytes(subject, batch)
        batches = compared_batches(batch)
        return keep(subject, path, kind, content, compare(subject, run, batches, path), batches)
    content, run, version, names = onnx_bytes(subject, batch, opset)
    batches = compared_batches(batch)
    difference = compare(subject, run, batches, path)
    line = trtexec_line(path, dict(zip(names, [spec.shape[1:] for spec in subject.inputs], strict=True)), batch)
    return keep(subject, path, kind, content, difference, batches, opset=version, trtexec=line)


def check_arguments(path: Path, kind: str, opset: int | None, batch: int | None) -> None:
    """Refuse arguments that make no file."""
    if kind not in SUFFIXES.values():
        got = f"format: got {kind!r}" if kind else f"{str(path)!r}: its suffix names no format"
        raise ValueError(f"{got}; give format 'safetensors', 'pt2' or 'onnx'")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the name of a file")
    if opset is not None and kind != "onnx":
        raise ValueError(f"opset: a file of format {kind!r} has none; leave it out")
    if batch is not None and (kind == "safetensors" or batch < 1):
        raise ValueError(f"batch: got {batch}; a positive number is needed, and weights alone have none")


def compared_batches(batch: int | None) -> tuple[int, ...]:
    """Return the batch sizes at which a file is compared."""
    return (1, 3) if batch is None else (batch,)


def keep(
    subject: Subject, path: Path, kind: str, content: bytes, difference: float, batches: tuple[int, ...], **more: Any
) -> ExportedFile:
    """Write the file, and return what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def fill(temporary: Path) -> None:
        temporary.write_bytes(content)

    atomic.write(path, fill)
    widths = subject.narrowed()
    unaligned = {name: width for name, width in widths.items() if width % ALIGNED}
    return ExportedFile(path, kind, len(content), difference, batches, unaligned, len(widths), **more)


def compare(subject: Subject, run: Run, batches: tuple[int, ...], path: Path) -> float:
    """Return the largest difference of a file's outputs from the network's, relative to the largest output.

    Args:
        subject: the network.
        run: runs the file on inputs by name.
        batches: the batch sizes to try.
        path: where the file would be, for messages.

    Raises:
        ExportError: if the outputs differ by more than ``TOLERANCE``.
    """
    worst = 0.0
    for batch in batches:
        inputs = subject.examples(batch)
        with torch.no_grad():
            expected = [x for x in pytree.tree_leaves(inputs.run(subject.model)) if isinstance(x, Tensor)]
        got = run({f"input_{place}": x for place, x in enumerate(inputs.tensors)})
        if len(got) != len(expected):
            raise ExportError(f"{str(path)!r}: it returns {len(got)} values, the network {len(expected)}; not kept")
        for one, other in zip(expected, got, strict=True):
            difference = relative_difference(one, other)
            if not difference <= TOLERANCE:  # nan, too
                raise ExportError(
                    f"{str(path)!r}: its outputs differ from the network's by {difference:.1e} of the largest one at "
                    f"batch size {batch}; at most {TOLERANCE:.0e} is rounding, so the file was not kept"
                )
            worst = max(worst, difference)
    return worst


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest value; inf for two shapes."""
    if expected.shape != got.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    error, scale = (expected.double() - got.double()).abs().max(), expected.double().abs().max()
    return float(error / scale) if scale > 0 else float(error)


def trtexec_line(path: Path, shapes: dict[str, tuple[int, ...]], batch: int | None) -> str:
    """Return the command that makes an engine of an ONNX file.

    Args:
        path: the file.
        shapes: {input: its shape without the batch}.
        batch: the file's fixed batch size; None = any, for which TensorRT needs the smallest, usual and largest one.
    """
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}"]
    if batch is None:
        for flag, size in (("min", 1), ("opt", 8), ("max", 64)):
            given = ",".join(f"{name}:{'x'.join(map(str, (size, *shape)))}" for name, shape in shapes.items())
            words.append(f"--{flag}Shapes={given}")
    return shlex.join(words)
