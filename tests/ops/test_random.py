"""The parts of the gates' noise: Philox against published vectors, ln and exp against libm."""

import math
import random

import numpy as np
import pytest
import torch

from fastprune import _C
from fastprune.reference.philox import philox4x32, random_bits

# Random123, kat_vectors, philox4x32 10.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],  # digits of pi
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert _C.philox4x32(counter, key) == words
    tensors = philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert [int(word) for word in tensors] == words


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 2), (2**63 - 1, 2**63 - 1), (2**32, 2**32 + 5)])
def test_layout_of_counter_and_key(seed, step):
    bits = random_bits(torch.empty(10), seed, step).tolist()
    halves = [seed & 0xFFFFFFFF, seed >> 32]
    for index, value in enumerate(bits):
        counter = [index // 4, 0, step & 0xFFFFFFFF, step >> 32]
        assert value == _C.philox4x32(counter, halves)[index % 4]


def test_words_that_do_not_fit_are_refused():
    with pytest.raises(TypeError):
        _C.philox4x32([2**32, 0, 0, 0], [0, 0])
    with pytest.raises(TypeError):
        _C.philox4x32([0, 0, 0], [0, 0])


def logarithm_inputs() -> list[float]:
    choose = random.Random(0)
    ends = [2.0**-33, 1 - 2.0**-33, 0.5, 1.0, math.sqrt(0.5), math.sqrt(2), 22.8739, 5e-324 * 2**60, 1.7e308]
    near = [math.nextafter(x, toward) for x in ends for toward in (0, 2 * x)]
    u = [(choose.getrandbits(32) + 0.5) * 2.0**-32 for _ in range(40_000)]
    next_to_one = [1 + choose.uniform(-1, 1) * 2.0 ** choose.randint(-50, -1) for _ in range(40_000)]
    any_exponent = [choose.uniform(1, 2) * 2.0 ** choose.randint(-1022, 1022) for _ in range(40_000)]
    return [*ends, *near, *u, *[-math.log(x) for x in u], *next_to_one, *any_exponent]


def test_logarithm():
    for x in logarithm_inputs():
        assert abs(_C.natural_log(x) - math.log(x)) <= 4e-16 * abs(math.log(x))


def test_exponential():
    choose = random.Random(1)
    inputs = [0.0, -0.0, -5e-324, -1e-17, -1e-16, -708.0, *(-(2.0**e) for e in range(-60, 9))]
    inputs += [-(k + d) * math.log(2) for k in range(1, 1021) for d in (-0.5, 0.0, 0.5)]  # where k changes
    inputs += [choose.uniform(-708, 0) for _ in range(60_000)] + [choose.uniform(-1, 0) for _ in range(60_000)]
    for x in inputs:
        assert abs(_C.exponential(x) - math.exp(x)) <= 4e-16 * math.exp(x)
    assert _C.exponential(-708.0000001) == _C.exponential(-1e308) == _C.exponential(-math.inf) == 0


@pytest.mark.slow
def test_logarithm_and_exponential_within_one_unit_in_the_last_place():
    generator = np.random.default_rng(2)
    for x in generator.random(3_000_000):
        exact = np.log(np.longdouble(x))
        assert abs(_C.natural_log(x) - exact) <= 2.3e-16 * abs(exact)
        exact = np.exp(np.longdouble(-50 * x))
        assert abs(_C.exponential(-50 * x) - exact) <= 2.3e-16 * exact


def test_bits_are_independent_and_fair():
    """Test every bit, and every pair of neighbours in unit, step and seed, within 5 standard deviations."""
    shape = torch.empty(50_000)
    bits = random_bits(shape, 7, 3)
    ones = torch.stack([(bits >> b & 1).double().mean() for b in range(32)])
    assert (ones - 0.5).abs().max() <= 5 * 0.5 / math.sqrt(50_000)
    u = bits / 2.0**32 - 0.5
    for other in (u.roll(1), random_bits(shape, 7, 4) / 2.0**32 - 0.5, random_bits(shape, 8, 3) / 2.0**32 - 0.5):
        assert abs((u * other).mean() * 12) <= 5 / math.sqrt(50_000)
    assert abs((u * u).mean() * 12 - 1) <= 5 * math.sqrt(4 / 5 / 50_000)
