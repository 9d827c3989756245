"""topk_mask refuses bad arguments by name, and none crashes it."""

import gc
import random
import re
from types import ModuleType

import numpy as np
import pytest
import torch
from misbehaving import Misbehaving

from fastprune import _C, ops

SCORES, KEEP, OFFSETS, WINDOW = torch.randn(6), torch.tensor([0.5, 0.5]), torch.tensor([0, 4, 6]), torch.ones(2)


def nan_at(index: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor(index), torch.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": nan_at(5, SCORES)}, r"scores\[5\]: got nan, needs numbers that can be ranked"),
        ({"scores": -nan_at(0, SCORES)}, r"scores\[0\]: got -?nan, needs numbers"),
        ({"scores": SCORES.reshape(2, 3)}, r"scores: got shape \[2, 3\], needs one dimension"),
        ({"keep": torch.tensor([0.5, 1.5])}, r"keep\[1\]: got 1.5, needs a fraction in \[0, 1\]"),
        ({"keep": torch.tensor([-0.1, 1.0])}, r"keep\[0\]: got -0.1"),
        ({"keep": nan_at(0, KEEP)}, r"keep\[0\]: got nan"),
        (
            {"keep": torch.ones(3)},
            r"keep: got shape \[3\], needs shape \[2\] \(one fraction for each group",
        ),
        ({"window": torch.tensor([0.0, -1.0])}, r"window\[1\]: got -1, needs a number of channels >= 0"),
        ({"window": nan_at(0, WINDOW)}, r"window\[0\]: got nan"),
        ({"window": torch.ones(())}, r"window: got shape \[\], needs shape \[2\]"),
        ({"offsets": torch.tensor([1, 4, 6])}, r"offsets\[0\]: got 1, needs 0"),
        ({"offsets": torch.tensor([0, 7, 6])}, r"offsets\[2\]: got 6, needs ascending offsets"),
        ({"offsets": torch.tensor([0, 4, 5])}, r"offsets\[2\]: got 5, needs the number of scores as last offset"),
        ({"offsets": torch.tensor([0, -(2**62), 2**62])}, r"offsets\[1\]: got -4.6.*, needs ascending"),
        ({"offsets": torch.tensor([0])}, r"offsets: got no group, needs groups for the 6 units"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, r"offsets: got shape \[0\], needs shape \[G \+ 1\]"),
        ({"offsets": torch.tensor([[0, 4, 6]])}, r"offsets: got shape \[1, 3\], needs one dimension"),
    ],
)
def test_wrong_values(change, message):
    arguments = {"scores": SCORES, "keep": KEEP, "offsets": OFFSETS, "window": WINDOW} | change
    with pytest.raises(ValueError, match=message):
        ops.topk_mask(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": SCORES.long()}, "scores: got dtype int64, needs dtype float32 or float64"),
        ({"scores": SCORES.to(torch.complex64)}, "scores: got dtype complex64"),
        ({"keep": KEEP.double()}, "keep: got dtype float64, needs dtype float32"),
        ({"window": WINDOW.int()}, "window: got dtype int32, needs dtype float32"),
        ({"offsets": OFFSETS.int()}, "offsets: got dtype int32, needs dtype int64"),
        ({"offsets": OFFSETS.bool()}, "offsets: got dtype bool, needs dtype int64"),
    ],
)
def test_wrong_types(change, message):
    arguments = {"scores": SCORES, "keep": KEEP, "offsets": OFFSETS, "window": WINDOW} | change
    with pytest.raises(TypeError, match=message):
        ops.topk_mask(**arguments)


def arrays() -> dict[str, object]:
    return {
        "scores": np.array([0.9, 0.1, 0.5, 0.7, 0.3, 0.2], np.float32),
        "keep": np.array([0.5, 1.0], np.float32),
        "offsets": np.array([0, 4, 6]),
        "window": np.array([2, 2], np.float32),
        "mask": np.empty(6, np.float32),
    }


def read_only() -> np.ndarray:
    array = np.empty(6, np.float32)
    array.flags.writeable = False
    return array


def test_the_kernel_takes_numpy_arrays():
    arguments = arrays()
    references = gc.get_referrers(arguments["scores"])
    _C.topk_mask(**arguments)
    np.testing.assert_array_equal(arguments["mask"], np.float32([1, 0, 0.15625, 0.84375, 1, 1]))
    assert len(gc.get_referrers(arguments["scores"])) == len(references)  # no array stays borrowed


OVERLAPPING = np.empty(9, np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": read_only()}, (TypeError, ValueError), "mask: got a.*read-?only"),
        ({"mask": np.empty(5, np.float32)}, ValueError, r"mask: got shape \[5\], needs shape \[6\]"),
        ({"mask": np.empty(6)}, TypeError, "mask: got dtype float64, needs dtype float32"),
        ({"scores": OVERLAPPING[:6], "mask": OVERLAPPING[3:]}, ValueError, "mask: got memory that overlaps scores"),
        ({"scores": np.zeros(12, np.float32)[::2]}, ValueError, "scores: got a strided view, needs contiguous memory"),
        ({"scores": np.zeros(6, np.float32)[::-1]}, ValueError, "scores: got a strided view"),
        ({"scores": np.zeros(25, np.int8)[1:].view(np.float32)}, ValueError, "scores: got unaligned memory"),
        ({"scores": [1.0] * 6}, TypeError, "scores: got an object of type list, needs a tensor"),
        ({"scores": None}, TypeError, "scores: got an object of type NoneType"),
        ({"mask": None}, TypeError, "mask: got an object of type NoneType"),
        ({"scores": torch.empty(6, device="meta")}, TypeError, "scores: got a Tensor that does not lend its memory"),
        ({"scores": torch.eye(6).to_sparse()}, TypeError, "scores: got a Tensor that does not lend its memory"),
        ({"scores": torch.zeros(6, dtype=torch.complex64).conj().imag}, TypeError, "scores: got a tensor with the neg"),
        ({"scores": np.zeros(6, ">f4")}, TypeError, "scores: got a numpy.ndarray that does not lend its memory"),
        ({"scores": np.array(["x"] * 6)}, TypeError, "scores: got a numpy.ndarray that does not lend its memory"),
    ],
)
def test_the_kernel_checks_memory(change, error, message):
    with pytest.raises(error, match=message):
        _C.topk_mask(**(arrays() | change))


@pytest.mark.parametrize("answer", [None, 3, "capsule", RuntimeError("no"), BufferError("no")])
def test_a_broken_producer_is_named(answer):
    with pytest.raises(TypeError, match=r"scores: got an? .*Misbehaving"):
        _C.topk_mask(**(arrays() | {"scores": Misbehaving(answer)}))


def malformed(choose: random.Random) -> object:
    """Draw something that somebody might pass: mostly tensors, slightly wrong."""
    size = choose.choice([0, 1, 2, 3, 6, 7, 1000])
    dtype = choose.choice([torch.float32, torch.float64, torch.int64, torch.float16, torch.bool, torch.complex64])
    tensor = torch.randint(-3, 9, (size,)).to(dtype)
    return choose.choice(
        [
            tensor,
            tensor,
            tensor.sort().values if not dtype.is_complex else tensor,
            tensor[::2],
            tensor.expand(2, size),
            tensor.numpy(),
            tensor.requires_grad_() if dtype.is_floating_point else tensor,
            torch.tensor([0, choose.randint(-(2**63), 2**63 - 1), size]),
            torch.full((size,), choose.choice([torch.nan, torch.inf, -1.0, 1e308]), dtype=torch.float64),
            choose.choice([None, 3, "x", [], Misbehaving(None), Misbehaving(OSError())]),
        ]
    )


def refusals(emulated: ModuleType, rounds: int) -> list[tuple[str, str]]:
    """Call both kernels with malformed arguments, and return the kinds and messages of their errors.

    An error of another kind is not caught and ends the test, as a crash does.
    """
    choose = random.Random(0)
    torch.manual_seed(0)
    good = {name: torch.from_numpy(value) for name, value in arrays().items()}
    errors = []
    for _ in range(rounds):
        arguments = good | {name: malformed(choose) for name in choose.sample(list(good), choose.randint(1, 3))}
        for kernel in (_C.topk_mask, emulated.topk_mask):
            try:
                kernel(**arguments)
            except (TypeError, ValueError) as error:
                errors.append((type(error).__name__, str(error)))
    return errors


def check_refusals(emulated: ModuleType, rounds: int) -> None:
    errors = refusals(emulated, rounds)
    assert len(errors) > rounds  # of twice as many calls: most are refused, some happen to be right
    assert len(errors) < 2 * rounds
    shape = re.compile(r"(scores|keep|offsets|window|mask)(\[\d+\])?: got .+", re.DOTALL)
    assert [message for _, message in errors if not shape.fullmatch(message)] == []
    # The fuzz reached every argument, and both kinds of refusal.
    assert {message.split(":")[0].split("[")[0] for _, message in errors} == set(arrays())
    assert {kind for kind, _ in errors} == {"TypeError", "ValueError"}


def test_malformed_arguments_never_crash(emulated):
    check_refusals(emulated, 400)


@pytest.mark.slow
def test_many_malformed_arguments_never_crash(emulated):
    check_refusals(emulated, 50_000)
