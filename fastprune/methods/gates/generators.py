"""Networks that generate architectures: the importance of every channel and the width of every gated group.

Source: Gao et al., Disentangled Differentiable Network Pruning, ECCV 2022, §3.3 and §3.4; sizes as in the authors'
release.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastprune.host.distributed import Distributed
from fastprune.methods.gates.recurrent import run_gru

INPUT = 64
HIDDEN = 128  # hidden size of the GRU in each direction
FEATURES = 2 * HIDDEN
STRIDE = FEATURES / math.sqrt(2 * math.pi)  # sum of the features: max(x, 0) of a normal x has the mean 1/√(2π)
SPREAD = math.sqrt(FEATURES / 2) / math.sqrt(3 * FEATURES)  # of a head's products at first: features have the square ½
WIDTH_BIAS = 3.0  # sigmoid(3) = 0.95: pruning starts from nearly the whole network

Architecture = Literal["gru", "fc", "channel"]


class GateProducts(torch.autograd.Function):
    """Products W_i · f_g [n] of every row i of W [n, F], with features f [L, F] and the L sizes of gates g in rows.

    Equal to one linear layer per gate, without autograd's overhead for each.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
        """Multiply gate by gate."""
        products = weight.new_empty(len(weight))
        for f, rows, out in zip(features, weight.split(sizes), products.split(sizes), strict=True):
            torch.mv(rows, f, out=out)
        ctx.save_for_backward(features, weight)
        ctx.sizes = sizes
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Multiply gate by gate."""
        features, weight = ctx.saved_tensors
        d_features, d_weight = torch.empty_like(features), torch.empty_like(weight)
        columns = upstream[:, None].split(ctx.sizes)
        for f, rows, column, d_f, d_rows in zip(
            features, weight.split(ctx.sizes), columns, d_features, d_weight.split(ctx.sizes), strict=True
        ):
            torch.mul(column, f, out=d_rows)
            torch.mv(rows.t(), column[:, 0], out=d_f)
        return d_features, d_weight, None


class ScoreGenerator(nn.Module):
    """g_s: raw scores of all channels, from a constant input.

    Adam moves every weight of a head by its learning rate, and the features do not change sign. Without the division a
    step would move a score by the sum of 256 features, 0.1 at a rate of 1e-3, far past where a sigmoid has a slope.

    Args:
        sizes: channels of each gate.
        architecture: "gru": a bidirectional GRU over the gates, which relates layers to each other, and a linear layer
            for each gate; "fc": a linear layer for all gates in place of the GRU; "channel": one parameter per channel,
            times the sum of the features, so that Adam moves its scores as far as the others' and none are tied.
        seed: seed of the input and the initial weights; the global generator does not change.
        divided: whether to divide the scores by the root of the number of features.
    """

    input: Tensor

    def __init__(self, sizes: Sequence[int], architecture: Architecture, seed: int, *, divided: bool = True) -> None:
        super().__init__()
        self.sizes, self.architecture = tuple(sizes), architecture
        self.scale = 1 / math.sqrt(FEATURES) if divided else 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if architecture == "channel":
                self.stride = STRIDE * self.scale
                self.parts = nn.Parameter(torch.randn(sum(sizes)) * (SPREAD / STRIDE))
                return
            self.register_buffer("input", nn.init.orthogonal_(torch.empty(len(sizes), 1, INPUT)))
            if architecture == "gru":
                self.between: nn.Module = nn.GRU(INPUT, HIDDEN, bidirectional=True)
            else:
                self.between = nn.Linear(INPUT, FEATURES)
            self.norm = nn.LayerNorm(FEATURES)
            heads = [nn.Linear(FEATURES, size, bias=False).weight for size in sizes]
            self.heads = nn.Parameter(torch.cat(heads).detach())  # one tensor: Adam has a cost per tensor

    def forward(self) -> Tensor:
        """Return the raw scores of all gates, concatenated, float32 [n]."""
        if self.architecture == "channel":
            return self.parts * self.stride
        with torch.autocast(self.input.device.type, enabled=False):
            if not isinstance(self.between, nn.GRU):
                features = self.between(self.input)
            elif self.input.device.type == "cpu":
                features = run_gru(self.between, self.input)
            else:
                features = self.between(self.input)[0]
            features = torch.relu(self.norm(features))[:, 0]
            scores: Tensor = GateProducts.apply(features, self.heads, self.sizes)
            return scores * self.scale


class WidthGenerator(nn.Module):
    """g_k: the keep ratio of every gated group, before the sigmoid.

    Args:
        gates: the number L of gated groups.
        seed: seed of the input and the initial weights; the global generator does not change.
    """

    input: Tensor

    def __init__(self, gates: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("input", torch.randn(gates))
            self.linear = nn.Linear(gates, gates, bias=False)

    def forward(self) -> Tensor:
        """Return the logits of the widths, float32 [L]."""
        return self.linear(self.input) + WIDTH_BIAS  # type: ignore[no-any-return]


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    peers: Distributed,
) -> None:
    """Take a step along gradients averaged over ranks, which have the same generators but other images."""
    if peers.world_size > 1:  # one exchange for all gradients
        flat = peers.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
        gradients = flat.split([gradient.numel() for gradient in gradients])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.contiguous().view_as(parameter)  # Adam's fused step takes no strides
    optimizer.step()


def copy_state(optimizer: torch.optim.Optimizer, **modules: nn.Module) -> dict[str, Any]:
    """Copy the state of generators and their optimiser: later steps change the tensors that torch returns."""
    states = {name: {key: t.detach().clone() for key, t in m.state_dict().items()} for name, m in modules.items()}
    return {**states, "optimizer": copy.deepcopy(optimizer.state_dict())}


def restore_state(
    method: str, state: Mapping[str, Any], optimizer: torch.optim.Optimizer, **modules: nn.Module
) -> None:
    """Load what ``copy_state`` returned.

    Raises:
        ValueError: if the state is for other gates.
    """
    for name, module in modules.items():
        try:
            module.load_state_dict(dict(state[name]))
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{method}: the state is for other gates; resume with the model, version, and options 'groups' and "
                f"'architecture' of the first run ({error})"
            ) from error
    optimizer.load_state_dict(dict(state["optimizer"]))
