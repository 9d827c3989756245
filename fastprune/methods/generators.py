"""Networks that make architectures: the importance of every channel and the width of every gated group.

Source: Gao et al., Disentangled Differentiable Network Pruning, ECCV 2022, §3.3 and §3.4; sizes as in the authors'
release.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

INPUT = 64
HIDDEN = 128  # of a GRU in each direction
FEATURES = 2 * HIDDEN
WIDTH_BIAS = 3.0  # sigmoid(3) = 0.95: pruning starts from nearly the whole network

Architecture = Literal["gru", "fc", "channel"]


class ScoreGenerator(nn.Module):
    """g_s: raw scores of all channels, from an input that never changes.

    Args:
        sizes: channels of each gate.
        architecture: "gru": a bidirectional GRU over the gates, for what layers have to do with each other, and a
            linear layer for each gate; "fc": a linear layer for all gates in place of the GRU; "channel": one parameter
            per channel.
        seed: of the input and the initial weights; the global generator is left alone.
    """

    def __init__(self, sizes: Sequence[int], architecture: Architecture, seed: int) -> None:
        super().__init__()
        self.architecture = architecture
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
            self.heads = nn.ModuleList(nn.Linear(FEATURES, size, bias=False) for size in sizes)

    def forward(self) -> Tensor:
        """The raw scores of all gates, one after the other, float32 [n]."""
        if self.architecture == "channel":
            return self.scores
        features = self.between(self.input)
        features = torch.relu(self.norm(features[0] if isinstance(features, tuple) else features))[:, 0]
        return torch.cat([head(row) for head, row in zip(self.heads, features, strict=True)])


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
