"""Networks that make architectures: the importance of every channel and the width of every gated group.

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
from fastprune.methods.gates.recurrent import bidirectional

INPUT = 64
HIDDEN = 128  # of a GRU in each direction
FEATURES = 2 * HIDDEN
WIDTH_BIAS = 3.0  # sigmoid(3) = 0.95: pruning starts from nearly the whole network

Architecture = Literal["gru", "fc", "channel"]


class GateProducts(torch.autograd.Function):
    """W_i · f_g of every row i of W [n, F], with f [L, F] and L sizes: how many rows belong to each gate g; [n].

    As a linear layer for each gate, without what autograd does for each.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
        """Gate by gate."""
        products = weight.new_empty(len(weight))
        for f, rows, into in zip(features, weight.split(sizes), products.split(sizes), strict=True):
            torch.mv(rows, f, out=into)
        ctx.save_for_backward(features, weight)
        ctx.sizes = sizes
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gate by gate."""
        features, weight = ctx.saved_tensors
        to_features, to_weight = torch.empty_like(features), torch.empty_like(weight)
        columns = upstream[:, None].split(ctx.sizes)
        for f, rows, given, d_f, d_rows in zip(
            features, weight.split(ctx.sizes), columns, to_features, to_weight.split(ctx.sizes), strict=True
        ):
            torch.mul(given, f, out=d_rows)
            torch.mv(rows.t(), given[:, 0], out=d_f)
        return to_features, to_weight, None


class ScoreGenerator(nn.Module):
    """g_s: raw scores of all channels, from an input that never changes.

    Adam moves every weight of a head by its learning rate, and the features do not change sign: undivided, a step would
    move a score by the sum of 256 features, 0.1 at a rate of 1e-3, far past where a sigmoid still has a slope.

    Args:
        sizes: channels of each gate.
        architecture: "gru": a bidirectional GRU over the gates, for what layers have to do with each other, and a
            linear layer for each gate; "fc": a linear layer for all gates in place of the GRU; "channel": one parameter
            per channel.
        seed: of the input and the initial weights; the global generator is left alone.
        divided: whether scores are divided by the root of the number of features.
    """

    input: Tensor

    def __init__(self, sizes: Sequence[int], architecture: Architecture, seed: int, *, divided: bool = True) -> None:
        super().__init__()
        self.sizes, self.architecture = tuple(sizes), architecture
        self.scale = 1 / math.sqrt(FEATURES) if divided else 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if architecture == "channel":
                self.scores = nn.Parameter(torch.zeros(sum(sizes)))
                return
            self.register_buffer("input", nn.init.orthogonal_(torch.empty(len(sizes), 1, INPUT)))
            if architecture == "gru":
                self.between: nn.Module = nn.GRU(INPUT, HIDDEN, bidirectional=True)
            else:
                self.between = nn.Linear(INPUT, FEATURES)
            self.norm = nn.LayerNorm(FEATURES)
            heads = [nn.Linear(FEATURES, size, bias=False).weight for size in sizes]
            self.heads = nn.Parameter(torch.cat(heads).detach())  # one tensor: Adam takes a while for each

    def forward(self) -> Tensor:
        """The raw scores of all gates, one after the other, float32 [n]."""
        if self.architecture == "channel":
            return self.scores
        with torch.autocast(self.input.device.type, enabled=False):
            if not isinstance(self.between, nn.GRU):
                features = self.between(self.input)
            elif self.input.device.type == "cpu":
                features = bidirectional(self.between, self.input)
            else:
                features = self.between(self.input)[0]
            features = torch.relu(self.norm(features))[:, 0]
            scores: Tensor = GateProducts.apply(features, self.heads, self.sizes)
            return scores * self.scale


class WidthGenerator(nn.Module):
    """g_k: the part of every gated group that stays, before the sigmoid.

    Args:
        gates: their number L.
        seed: of the input and the initial weights; the global generator is left alone.
    """

    input: Tensor

    def __init__(self, gates: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("input", torch.randn(gates))
            self.linear = nn.Linear(gates, gates, bias=False)

    def forward(self) -> Tensor:
        """Logits of the widths, float32 [L]."""
        return self.linear(self.input) + WIDTH_BIAS  # type: ignore[no-any-return]


def follow(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    peers: Distributed,
) -> None:
    """A step along gradients, averaged over ranks: generators are the same everywhere, images are not."""
    if peers.world_size > 1:  # in one piece, as every exchange has its price
        flat = peers.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
        gradients = flat.split([gradient.numel() for gradient in gradients])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.contiguous().view_as(parameter)  # Adam's fused step takes no strides
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer, **modules: nn.Module) -> dict[str, Any]:
    """The state of generators and of their optimiser, as copies: torch hands out what further steps would change."""
    states = {name: {key: t.detach().clone() for key, t in m.state_dict().items()} for name, m in modules.items()}
    return {**states, "optimizer": copy.deepcopy(optimizer.state_dict())}


def restore(method: str, state: Mapping[str, Any], optimizer: torch.optim.Optimizer, **modules: nn.Module) -> None:
    """Load what ``state_of`` returned.

    Raises:
        ValueError: if the state is for other gates.
    """
    for name, module in modules.items():
        try:
            module.load_state_dict(dict(state[name]))
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{method}: the state is for other gates; was it made with another model or version, or other options "
                f"'groups' or 'architecture'? ({error})"
            ) from error
    optimizer.load_state_dict(dict(state["optimizer"]))
