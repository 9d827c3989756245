"""Compensation: the layers that read removed channels are fitted anew, by least squares on calibration images.

A reader computes y = W x + b over its patches. After pruning it sees the kept inputs only. What the removed ones gave
is largely a linear function of those that stay:

* ``mean``: b' = b + W_P μ_P for the removed inputs P. Exact where these are constant.
* ``one_pass``: W' = W_K + W_P G_PK (G_KK + εI)⁻¹ with the covariance G of the full network's inputs. No layer knows
  what the ones in front of it have become, so batch norms are then matched to the full network's (``match_norms``).
* ``sequential``: layer by layer, W' = (Cov(y, x̃) + ε W_K) (Cov(x̃) + εI)⁻¹ with the inputs x̃ of the network as
  compensated so far, and the outputs y of the full one. Errors of earlier layers are corrected by later ones.
* ``bn``: the statistics of batch norms are measured again; the weights stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from fastprune.data.given import GivenData, as_data
from fastprune.engine import Placement
from fastprune.graph import ChannelGraph, Layer, trace
from fastprune.graph.export.nodes import argument_of
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.model_state import device_of, state_of
from fastprune.graph.plan import PruningPlan
from fastprune.graph.structure import belong_to
from fastprune.host import progress
from fastprune.host.distributed import Distributed
from fastprune.networks.chains import is_stored
from fastprune.recovery.calibration import calibration_inputs
from fastprune.recovery.moments import Moments, Sums, choose_ridge, solve, sum_rows, zero_sums
from fastprune.recovery.norms import match_norms
from fastprune.recovery.readers import Reader, Shift, count_unknowns
from fastprune.recovery.statistics import measure_statistics
from fastprune.recovery.walk import Walk
from fastprune.surgery import apply, masked
from fastprune.surgery.slicing import copy_model
from fastprune.training.objective import Forward, Objective

aten = torch.ops.aten

How = Literal["sequential", "one_pass", "mean", "bn", "none"]
COMPENSATIONS: tuple[How, ...] = ("sequential", "one_pass", "mean", "bn", "none")

CALIBRATION_IMAGES = 512
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the inputs' mean variance; the best on held-out batches is taken
HELD_OUT = 4  # every fourth batch chooses the ridge; then the fit takes all
ROWS = 8  # rows per unknown that a fit takes at most; more change the result by less than its noise
LEAST_ROWS = 65536
MOST_UNKNOWNS = 8192  # inputs of an output; a matrix of their products takes half a gigabyte
SMALL_GAIN = 1e-2  # of the largest; a channel that a norm multiplies by less cannot make up for others


@dataclass
class Compensation:
    """What ``compensate_weights`` did.

    Args:
        fitted: number of layers whose weights were fitted.
        shifted: number of layers of which only the shift was corrected.
        skipped: layers that read removed channels and stayed as they were, with the reason.
    """

    fitted: int = 0
    shifted: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def compensate(
    model: nn.Module,
    plan: PruningPlan,
    data: GivenData | Sequence[Tensor],
    how: How = "sequential",
    *,
    images: int = CALIBRATION_IMAGES,
    forward: Forward | None = None,
    seed: int = 0,
    graph: ChannelGraph | None = None,
    memory: float | None = None,
) -> nn.Module:
    """Return the compact model of a plan with compensated weights, verified against the masked model.

    Args:
        model: the full model; it is not changed.
        plan: what stays.
        data: training data, as for ``prune``; or calibration images, a list of batches [N, C, H, W].
        how: the kind of compensation.
        images: number of samples that are taken from training data.
        forward: how the model runs on a batch of the data, as for ``prune``.
        seed: seed of the choice of samples.
        graph: the channel graph of the model; None = traced here.
        memory: GiB that the values between layers may take; the others go to files in the folder for temporary files.
            None = half of the free memory.

    Raises:
        ValueError: for an unknown kind, no images, or a negative memory.
        PlanError, SurgeryError: see ``apply``.

    Example:
        >>> import torch, fastprune as fp
        >>> network, images = fp.models.create("resnet20"), [torch.randn(16, 3, 32, 32) for _ in range(4)]
        >>> plan = fp.prune(network, images[0], method="l1").plan
        >>> compact = fp.compensate(network, plan, images)
    """
    require_kind(how)
    graph = graph or trace(model, plan.example(model), exact=plan.exact, replace_norms=bool(plan.norms))
    if graph.num_units != len(plan.mask):
        raise ValueError(
            f"plan: it has {len(plan.mask)} units, the channel graph of this model {graph.num_units}; a plan made "
            "with ignore=, heads= or rewrite=False needs its own graph: give graph=result.graph"
        )
    if isinstance(data, Sequence) and all(isinstance(batch, Tensor) for batch in data) and not isinstance(data, str):
        batches: Sequence[Sequence[Tensor]] = [
            [batch.to(device_of(model))] for batch in data if isinstance(batch, Tensor)
        ]
    else:
        source = as_data(data, seed=seed)
        assert source is not None
        place = Placement(device_of(model))
        batches = calibration_inputs(
            graph,
            model,
            source.to(place.device),
            images,
            seed=seed,
            placement=place,
            objective=Objective(None, forward),
        )
    compensated, _ = compensate_weights(graph, model, plan, batches, how, memory=memory)
    return apply(plan, compensated)


def require_kind(how: str) -> None:
    """Refuse a kind of compensation that does not exist."""
    if how not in COMPENSATIONS:
        raise ValueError(f"compensate: got {how!r}; choose one of {', '.join(COMPENSATIONS)}")


def compensate_weights(
    graph: ChannelGraph,
    model: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Sequence[Tensor]],
    how: How = "sequential",
    *,
    peers: Distributed | None = None,
    show: bool = False,
    memory: float | None = None,
) -> tuple[nn.Module, Compensation]:
    """Return a copy of the full model in which the readers of removed channels make up for their loss.

    Args:
        graph: the channel graph of the model.
        model: the full model, in eval mode; it is not changed.
        plan: what stays.
        batches: the network's inputs, batch by batch; under several processes each rank has its share.
        how: the kind of compensation.
        peers: this process among its peers.
        show: whether to show progress.
        memory: GiB that the values between layers may take, see ``compensate``.

    Returns:
        The copy, whose plan cuts it as it would cut the model; and what was done.

    Raises:
        ValueError: for an unknown kind, or if there are no batches.
    """
    require_kind(how)
    if not batches:
        raise ValueError("compensate: got no calibration images; at least one batch is needed")
    changed = copy_model(model)
    work = Compensation()
    with torch.no_grad(), restore_modes(), progress.muted(not show):
        if how in ("sequential", "one_pass", "mean"):
            fit = _Fit(graph, model, changed, plan, batches, how, peers or Distributed(), work, memory)
            fit.run()
            if how == "one_pass":
                match_norms(graph, model, changed, batches, peers or Distributed(), fit.walk.room)
        if how == "bn":
            closed = masked(changed, plan)
            measure_statistics(closed, batches, peers or Distributed())
            copy_statistics(closed, changed)
    return changed, work


class _Fit:
    """One walk through the network that fits its readers."""

    def __init__(
        self,
        graph: ChannelGraph,
        model: nn.Module,
        changed: nn.Module,
        plan: PruningPlan,
        batches: Sequence[Sequence[Tensor]],
        how: How,
        peers: Distributed,
        work: Compensation,
        memory: float | None,
    ) -> None:
        self.graph, self.plan, self.how, self.peers, self.work = graph, plan, how, peers, work
        self.tensors, self.original = state_of(changed), state_of(model)
        self.closed = ~plan.mask
        self.walk = Walk(graph, model, changed if how == "sequential" else None, batches, memory, plan=plan)
        self.layers = {layer.node: layer for layer in graph.layers}
        uses = [layer.weight for layer in graph.layers]
        self.shared = {name for name in uses if uses.count(name) > 1}
        self.device = device_of(model)
        readers: dict[int, set[Node]] = {}  # of each tensor, which may have several names
        for node in self.walk.nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and str(source.target) in self.tensors:
                    readers.setdefault(id(self.tensors[str(source.target)]), set()).add(node)
        self.readers = readers

    def is_alone(self, name: str) -> bool:
        """Return whether one node alone reads a tensor, under any of its names."""
        return len(self.readers.get(id(self.tensors[name]), ())) == 1

    def run(self) -> None:
        """Walk, and fit every layer that reads removed channels or, in ``sequential``, others than before."""
        with progress.begin("compensating", len(self.walk.nodes)) as shown:
            for number, node in enumerate(self.walk.steps()):
                shown.advance(1)
                self.visit(node, number)

    def visit(self, node: Node, number: int) -> None:
        """Fit the layer of a node, if there is one and its inputs have changed."""
        layer = self.layers.get(node.name)
        if layer is not None and self.wants(node, layer):
            self.fit(node, layer, number)

    def wants(self, node: Node, layer: Layer) -> bool:
        """Return whether a layer's inputs are no longer what they were."""
        return bool(belong_to(layer.in_units, self.closed).any()) or self.walk.differs(node)

    def fit(self, node: Node, layer: Layer, seed: int) -> None:
        """Fit one layer and write its tensors."""
        reader = Reader.of(node, layer, self.is_alone)
        reason = self.why_not(reader, layer)
        if reader is None or reason is not None:
            self.skip(layer, reason or "its weight is computed from others, or it is transposed")
            return
        with torch.no_grad():  # the graph may be in a region with gradients, or under autocast
            self.fit_reader(reader, layer, seed)

    def fit_reader(self, reader: Reader, layer: Layer, seed: int) -> None:
        """Fit a layer that can be fitted."""
        weight = self.tensors[layer.weight]
        grouped = weight.double().reshape(reader.groups, weight.shape[0] // reader.groups, -1)
        open_inputs = self.open_inputs(reader, weight)
        refit = self.how != "mean" and self.fits_memory(reader, layer, weight)
        fitted, held_out = self.measure(reader, weight, seed, second=refit)
        both, shifted = fitted + held_out, reader.shift is not None
        moments = Moments.of(both, shifted=shifted)
        if not refit:
            new = grouped * open_inputs.unsqueeze(1)
        else:
            ridge = RIDGES[1]
            if float(held_out.count) > 0 and float(fitted.count) > 0:
                parts = Moments.of(fitted, shifted=shifted), Moments.of(held_out, shifted=shifted)
                ridge = choose_ridge(*parts, grouped, open_inputs, RIDGES)
            new = solve(moments, grouped, open_inputs, ridge)
        if not bool(new.isfinite().all()):
            self.skip(layer, "its inputs or outputs are not finite")
            return
        self.write(reader, weight, grouped, new, moments, refit=refit)

    def skip(self, layer: Layer, reason: str) -> None:
        """Leave a layer as it is; it no longer reads the closed channels, so that later layers see what is lost."""
        self.work.skipped[layer.name] = reason
        for piece in self.plan.slices:
            if piece.tensor == layer.weight and piece.role == "in" and not piece.computed:
                weight = self.tensors[piece.tensor]
                closed = belong_to(piece.units, self.closed).nonzero().flatten()
                with torch.no_grad():
                    weight.index_fill_(piece.dim, closed.to(weight.device), 0.0)
                self.walk.changed.add(piece.tensor)

    def why_not(self, reader: Reader | None, layer: Layer) -> str | None:
        """Return why a layer cannot be fitted; None if it can."""
        if layer.weight in self.shared:
            return "its weight is used more than once"
        if reader is not None and self.how == "mean" and reader.shift is None:
            return "nothing shifts its outputs"
        return None

    def open_inputs(self, reader: Reader, weight: Tensor) -> Tensor:
        """Return which inputs of each group stay, bool [G, I]."""
        open_channels = ~belong_to(reader.layer.in_units, self.closed)
        per_channel = count_unknowns(reader, weight) // weight.shape[1]
        flat = open_channels.to(weight.device).repeat_interleave(per_channel)
        return flat.reshape(reader.groups, -1)

    def fits_memory(self, reader: Reader, layer: Layer, weight: Tensor) -> bool:
        """Return whether the products of a layer's inputs fit in memory; otherwise note that only means are kept."""
        unknowns = count_unknowns(reader, weight)
        if unknowns <= MOST_UNKNOWNS:
            return True
        self.work.skipped[layer.name] = f"{unknowns} inputs are too many for a fit; its outputs keep their means"
        return False

    def measure(self, reader: Reader, weight: Tensor, seed: int, *, second: bool) -> tuple[Sums, Sums]:
        """Sum over the rows of the batches to fit and of those held out."""
        values = self.walk.fitted
        unknowns = count_unknowns(reader, weight)
        shape = (reader.groups, unknowns, weight.shape[0] // reader.groups)
        parts = [zero_sums(*shape, weight.device, second=second) for _ in range(2)]
        most = max(LEAST_ROWS, ROWS * unknowns) // (values.count * self.peers.world_size) + 1
        generator = torch.Generator().manual_seed(seed)
        for batch in range(values.count):
            x, target = values.argument(reader.node, batch), self.target(reader.node, batch)
            count = reader.count_places(target)
            places = torch.arange(count) if count <= most else torch.randperm(count, generator=generator)[:most]
            with torch.autocast(self.device.type, enabled=False):
                rows = reader.rows(x, target - self.fixed_bias(reader, target), weight, places.to(x.device))
                parts[batch % HELD_OUT == HELD_OUT - 1] += sum_rows(*rows, second=second)
        return parts[0].reduce_(self.peers), parts[1].reduce_(self.peers)

    def fixed_bias(self, reader: Reader, target: Tensor) -> Tensor:
        """Return the bias of a layer that must not change, in the shape of its output; 0 without one."""
        name = reader.bias
        if name is None or (reader.shift is not None and reader.shift.tensor == name):
            return target.new_zeros(())
        bias = self.tensors[name].to(target.dtype)
        return bias.view(-1, *[1] * (target.dim() - 2)) if reader.is_convolution else bias

    def target(self, node: Node, batch: int) -> Tensor:
        """Return what a layer returns in the full network."""
        full = self.walk.full
        args: Any = torch.utils._pytree.tree_map_only(Node, lambda n: full.fetch(n, batch), node.args)
        kwargs: Any = torch.utils._pytree.tree_map_only(Node, lambda n: full.fetch(n, batch), node.kwargs)
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        lost = self.lost_in_stream(node, batch)
        return result if lost is None else result + lost.to(result.dtype)

    def lost_in_stream(self, node: Node, batch: int) -> Tensor | None:
        """Return what the other summand of a residual sum has lost, in units of the layer's output; None if nothing.

        The layer is then fitted so that the sum comes out right, not its own part alone.
        """
        other = self.walk.other
        tail, scale = follow_norm(node, self.original)
        if other is None or len(tail.users) != 1:
            return None
        (following,) = tail.users
        if following.target is not aten.add.Tensor or following.kwargs.get("alpha", 1) != 1:
            return None
        summand = next((s for s in following.args if s is not tail), None)
        if not isinstance(summand, Node) or summand not in other.at or not self.walk.has_changed(summand):
            return None
        lost: Tensor = self.walk.full.fetch(summand, batch) - other.fetch(summand, batch)
        if summand.meta["val"].dim() != node.meta["val"].dim() or lost.shape[1:] != node.meta["val"].shape[1:]:
            return None  # one of them is broadcast
        return lost if scale is None else lost * scale.to(lost)

    def write(
        self, reader: Reader, weight: Tensor, before: Tensor, after: Tensor, moments: Moments, *, refit: bool
    ) -> None:
        """Write the weights of outputs that stay, and the shift that keeps their means."""
        kept = ~belong_to(reader.layer.out_units, self.closed).to(weight.device)
        new = torch.where(kept.view(reader.groups, -1, 1), after, before)
        weight.copy_(new.reshape(weight.shape))
        self.walk.changed.add(reader.layer.weight)
        self.work.fitted += refit
        self.work.shifted += not refit
        if reader.shift is not None:
            self.move(reader.shift, reader, kept, moments, weight)

    def move(self, shift: Shift, reader: Reader, kept: Tensor, moments: Moments, weight: Tensor) -> None:
        """Move a bias or a running mean so that the mean of every output stays what it was."""
        tensor = self.tensors[shift.tensor]
        written = weight.double().reshape(reader.groups, weight.shape[0] // reader.groups, -1)
        wanted = (moments.mean_y - (written @ moments.mean_x.unsqueeze(2)).squeeze(2)).flatten()
        original = self.original[shift.tensor].double()
        if shift.sign > 0:  # y was measured with the bias
            new = wanted
        else:
            new = original - wanted
        tensor.copy_(torch.where(kept, new, original))
        self.walk.changed.add(shift.tensor)


def follow_norm(node: Node, tensors: dict[str, Tensor]) -> tuple[Node, Tensor | None]:
    """Return the batch norm that alone reads a layer, and the layer's output per unit of the norm's, [C, 1, 1].

    Where the norm multiplies a channel by almost nothing, 0 stands in place of a huge number. Without a norm the layer
    itself and None are returned.
    """
    users = list(node.users)
    if len(users) != 1 or users[0].target is not aten.batch_norm.default:
        return node, None
    norm = users[0]
    variance, weight = argument_of(norm, "running_var"), argument_of(norm, "weight")
    if not is_stored(variance):
        return node, None
    gain = (tensors[str(variance.target)].double() + argument_of(norm, "eps")).rsqrt()
    if is_stored(weight):
        gain = gain * tensors[str(weight.target)].double()
    small = gain.abs() <= SMALL_GAIN * gain.abs().max()  # all of them, if all are 0
    inverse = torch.where(small, 0.0, 1 / torch.where(small, 1.0, gain))
    return norm, inverse.view(-1, *[1] * (norm.meta["val"].dim() - 2))


def copy_statistics(source: nn.Module, target: nn.Module) -> None:
    """Copy the running statistics of batch norms."""
    tensors = state_of(target)
    for name, tensor in source.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            tensors[name].copy_(tensor)
