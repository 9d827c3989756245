"""The proximal operator of the group norm, for all units of a table in one call."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastprune.ops.library import _C

_Function = TypeVar("_Function", bound=Callable[..., object])


def _break_graphs(function: _Function) -> _Function:
    """Make ``function`` run eagerly within ``torch.compile``, which costs 0.2 us a call.

    An operator whose schema lists the tensors as mutable would need no graph break, but 34 us a call for the 160
    tensors of a ResNet-50, three times as long as checking that none of them has moved.
    """
    reason = "the tensors of a UnitTable are read and changed behind the back of torch.compile"
    return cast("_Function", torch.compiler.disable(function, reason=reason))


class UnitTable:
    """Tensors and the units that their elements belong to.

    Pruning removes a unit as a whole. Its parts lie in several tensors: a channel owns a row of the convolution that
    computes it, an element of the batch norm's weight and bias, a column of the convolutions that read it. Each slice
    assigns the positions along one dimension of one tensor to units.

    The table is compiled once and keeps the tensors alive. A step costs little besides memory traffic, but the tensors
    must not move: after ``tensor.data = ...``, ``module.to(...)`` or ``resize_`` every call raises, and a new table has
    to be built. Values may change in place, as by optimisers and ``load_state_dict``.

    Args:
        slices: ``(tensor, dim, units)`` each. ``tensor`` is float32 or float64, all of one dtype and on one device, in
            dense memory (contiguous, channels_last, transposed, ...). ``units`` is ``[tensor.size(dim)]`` int64: the
            unit of each position along ``dim``, or -1 for a position that no unit owns. Units may repeat, as behind a
            flattened feature map.
        num_units: Number of units, ``U``. A unit that no slice mentions has norm 0.

    Raises:
        TypeError: A tensor has another dtype (keep float32 masters of half-precision weights), or a slice is not a
            tuple of three.
        ValueError: A unit is out of range, the tensor has no dimension ``dim``, ``units`` has another length; tensors
            are on several devices, have gaps or are expanded. Also if tensors share memory, such as one tensor along
            two of its dimensions: its elements would belong to two units, whose factors cannot both be applied.

    Example:
        >>> import torch
        >>> from fastprune import ops
        >>> conv, bn = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        >>> channels = torch.arange(8)
        >>> ops.UnitTable([(conv.weight, 0, channels), (bn.weight, 0, channels), (bn.bias, 0, channels)], 8)
        UnitTable(8 units, 3 slices, 232 elements, torch.float32, cpu)
    """

    def __init__(self, slices: Sequence[tuple[Tensor, int, Tensor]], num_units: int) -> None:
        self._table = _C.UnitTable([_move_units_to_cpu(slice_) for slice_ in slices], num_units)
        tensors = [tensor for tensor, _, _ in slices]
        self.num_units = num_units
        """Number of units, ``U``."""
        self.num_slices = len(tensors)
        self.dtype = tensors[0].dtype
        self.device = tensors[0].device
        self.sizes = torch.empty(num_units, dtype=torch.int64)
        """Number of elements of each unit, ``[U]`` int64, on the CPU."""
        self._table.write_sizes(self.sizes)
        # Tensors made under inference_mode have no version, since autograd never saves them.
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        if self.device.type == "cuda":
            words = torch.empty(self._table.num_device_words, dtype=torch.int64)
            self._table.write_device_words(words)
            self._table.attach(words.to(self.device))

    def __repr__(self) -> str:
        elements = int(self.sizes.sum())
        return (
            f"UnitTable({self.num_units} units, {self.num_slices} slices, {elements} elements, "
            f"{self.dtype}, {self.device})"
        )

    @_break_graphs
    def norms(self) -> Tensor:
        """Compute the Euclidean norm of every unit, ``[U]`` in the dtype and on the device of the table.

        Squares are summed in double. The result has no gradient, even if the tensors require one. In float64 squares
        leave the range beyond 1e154 (the norm is inf) and below 1e-154 (they count as 0), as in
        :func:`torch.linalg.vector_norm`; units of one element are always exact.
        """
        norms = torch.empty(self.num_units, dtype=self.dtype, device=self.device)
        _C.group_prox(self._table, None, norms, torch.get_num_threads())
        return norms


def _move_units_to_cpu(slice_: tuple[Tensor, int, Tensor]) -> tuple[Tensor, int, Tensor]:
    if isinstance(slice_, tuple) and len(slice_) == 3 and isinstance(slice_[2], Tensor) and slice_[2].is_cuda:
        return slice_[0], slice_[1], slice_[2].cpu()
    return slice_


@_break_graphs
def group_prox_(table: UnitTable, threshold: Tensor) -> Tensor:
    r"""Shrink the norm of every unit by its threshold, in place.

    With :math:`w_u` all elements of unit :math:`u`, across tensors,

    .. math:: w_u \leftarrow w_u \max\left(0, 1 - \frac{\tau_u}{\lVert w_u \rVert_2}\right)
        = \arg\min_w \tfrac{1}{2} \lVert w - w_u \rVert_2^2 + \tau_u \lVert w \rVert_2,

    the step of proximal gradient descent for a group lasso, where :math:`\tau_u` is the learning rate times the weight
    of the unit's penalty. A unit of one element gets the soft threshold :math:`\mathrm{sign}(w) \max(|w| -
    \tau, 0)`, rounded once.

    A unit with :math:`\tau_u = 0` keeps its bits. One with :math:`0 < \tau_u \ge \lVert w_u \rVert` (also ``inf``)
    becomes +0.0. One whose norm is NaN, or ``inf`` under a finite threshold, does not change; the returned norm shows
    it. The result is deterministic.

    Like an optimiser's step it changes tensors that require gradients and records nothing; autograd notices if a saved
    tensor was changed. Under ``torch.compile`` it breaks the graph and runs eagerly (``fullgraph=True`` refuses it):
    the tensors are not arguments of the call, so a compiler could not know that they change. :func:`torch.cuda.graph`
    captures it; the table has to outlive the graph. Make one call at a time: calls on two streams need two tables.

    Args:
        table: The tensors and their units.
        threshold: :math:`\tau`, ``[U]`` and at least 0, ``inf`` allowed; dtype and device of the table.

    Returns:
        The norms before the step, ``[U]``, as :meth:`UnitTable.norms` computes them.

    Raises:
        TypeError: The threshold has another dtype.
        ValueError: The threshold has another shape, is on another device or overlaps a tensor of the table; a tensor
            has moved since the table was built. On the CPU also if a threshold is negative or NaN. On CUDA values
            cannot be refused without waiting for the device: there such a unit does not change, and its norm is NaN.
            If an error is raised, nothing has been written.

    Source: the proximal operator of the group norm in closed form (Yuan and Lin, 2006; Parikh and Boyd, "Proximal
    Algorithms", 2014, section 6.5.1).

    Example:
        >>> import torch
        >>> from fastprune import ops
        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])  # two rows of norm 5 and 0.5
        >>> table = ops.UnitTable([(weight, 0, torch.arange(2))], 2)
        >>> ops.group_prox_(table, torch.tensor([1.0, 1.0]))
        tensor([5.0000, 0.5000])
        >>> weight
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """
    norms = torch.empty(table.num_units, dtype=table.dtype, device=table.device)
    _C.group_prox(table._table, threshold, norms, torch.get_num_threads())
    increment_version(table._versioned)
    return norms
