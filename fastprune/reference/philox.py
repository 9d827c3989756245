"""Philox4x32-10: the random bits of the stochastic operators."""

import torch
from torch import Tensor

MASK = 2**32 - 1


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Ten rounds of ``(c0, c1, c2, c3) = (high(b) ^ c1 ^ k0, low(b), high(a) ^ c3 ^ k1, low(a))``.

    Here a = 0xD2511F53 * c0 and b = 0xCD9E8D57 * c2, and each round adds a constant to both words of the key.

    Args:
        counter: four words, int64 in [0, 2^32); all words broadcast.
        key: two words.

    Returns:
        Four words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64, which keeps all 64 bits
        c0, c1, c2, c3 = high(odd) ^ c1 ^ k0, odd & MASK, high(even) ^ c3 ^ k1, even & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def high(value: Tensor) -> Tensor:
    """Return the upper 32 bits."""
    return (value >> 32) & MASK


def random_bits(like: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """``bits_i = philox4x32((i div 4, step), seed)[i mod 4]``, int64 of the shape of ``like``; low halves come first.

    Each element has 32 random bits that are a function of (seed, step, i) alone.
    """
    quads = torch.arange((like.numel() + 3) // 4, device=like.device)
    seeds, steps = (torch.as_tensor(value, device=like.device) for value in (seed, step))
    words = philox4x32([quads & MASK, high(quads), steps & MASK, high(steps)], [seeds & MASK, high(seeds)])
    return torch.stack(words, dim=1).flatten()[: like.numel()].reshape(like.shape)
