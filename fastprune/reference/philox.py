"""Philox4x32-10 in plain torch: the random bits of the stochastic operators."""

import torch
from torch import Tensor

MASK = 2**32 - 1


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """The four words for four words of counter and two of key, all int64 tensors in [0, 2^32) that broadcast.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64, which keeps all of their 64 bits
        c0, c1, c2, c3 = high(odd) ^ c1 ^ k0, odd & MASK, high(even) ^ c3 ^ k1, even & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def high(value: Tensor) -> Tensor:
    """The upper 32 bits."""
    return (value >> 32) & MASK


def random_bits(like: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """32 random bits for each element of ``like``, int64 of its shape: a function of (seed, step, index) alone.

    Element i takes word i mod 4 of the counter (i div 4, step) under the key ``seed``; lower halves come first.
    """
    quads = torch.arange((like.numel() + 3) // 4, device=like.device)
    seeds, steps = (torch.as_tensor(value, device=like.device) for value in (seed, step))
    words = philox4x32([quads & MASK, high(quads), steps & MASK, high(steps)], [seeds & MASK, high(seeds)])
    return torch.stack(words, dim=1).flatten()[: like.numel()].reshape(like.shape)
