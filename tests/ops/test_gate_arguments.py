"""The stochastic gates refuse bad arguments by name, and none crashes them."""

import gc
import random
from types import ModuleType

import numpy as np
import pytest
import torch
from misbehaving import Misbehaving

from fastprune import _C, ops

INPUT = torch.tensor([0.5, 0.25, 0.75, 1.0, 0.0, 0.5])
GATES = {"theta": ops.bernoulli_gate, "logits": ops.gumbel_gate}


@pytest.fixture(params=list(GATES))
def name(request):
    """The name of the first argument, which tells the gates apart."""
    return request.param


def nan_at(index: int) -> torch.Tensor:
    return INPUT.index_fill(0, torch.tensor(index), torch.nan)


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        (nan_at(0), {}, r"{}\[0\]: got -?nan, needs a number"),
        (nan_at(5).double(), {}, r"{}\[5\]: got -?nan"),
        (-nan_at(3).half(), {}, r"{}\[3\]: got -?nan"),
        (INPUT, {"seed": -1}, r"seed: got -1, needs a whole number from 0 to 2\^63 - 1"),
        (INPUT, {"seed": 2**63}, "seed: got 9223372036854775808, needs a whole number"),
        (INPUT, {"step": -(2**70)}, "step: got -1180591620717411303424, needs a whole number"),
        (INPUT, {"step": 2**64}, "step: got 18446744073709551616, needs a whole number"),
        (INPUT, {"step": torch.tensor(-3)}, "step: got -3, needs a whole number"),
        (INPUT, {"step": torch.tensor([3])}, "step: got a tensor of 1 dimensions, needs an int or a tensor without"),
    ],
)
def test_wrong_values(name, values, change, message):
    with pytest.raises(ValueError, match=message.format(name)):
        GATES[name](values, **({"seed": 0, "step": 0} | change))


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        (INPUT.long(), {}, "{}: got dtype int64, needs dtype float32 or float64"),
        (INPUT > 0, {}, "{}: got dtype bool"),
        (INPUT.to(torch.complex64), {}, "{}: got dtype complex64"),
        (INPUT, {"seed": 1.0}, "seed: got an object of type float, needs an int"),
        (INPUT, {"seed": True}, "seed: got an object of type bool, needs an int"),
        (INPUT, {"seed": None}, "seed: got an object of type NoneType, needs an int"),
        (INPUT, {"seed": torch.tensor(1)}, "seed: got an object of type Tensor, needs an int"),
        (INPUT, {"step": "1"}, "step: got an object of type str, needs an int or an int64 tensor without dimensions"),
        (INPUT, {"step": torch.tensor(1.0)}, "step: got dtype float32, needs dtype int64"),
        (INPUT, {"step": torch.tensor(1, dtype=torch.int32)}, "step: got dtype int32, needs dtype int64"),
    ],
)
def test_wrong_types(name, values, change, message):
    with pytest.raises(TypeError, match=message.format(name)):
        GATES[name](values, **({"seed": 0, "step": 0} | change))


@pytest.mark.parametrize("temperature", [0.0, -0.4, float("nan"), float("inf"), 1e-320, 1.7e308])
def test_impossible_temperatures(temperature):
    with pytest.raises(ValueError, match=r"temperature: got .*, needs a positive number"):
        ops.gumbel_gate(INPUT, seed=0, step=0, temperature=temperature)


@pytest.mark.parametrize("base", [float("nan"), float("inf"), -float("inf")])
def test_impossible_bases(base):
    with pytest.raises(ValueError, match=r"base: got .*, needs a finite number"):
        ops.gumbel_gate(INPUT, seed=0, step=0, base=base)


def test_unknown_noise():
    with pytest.raises(ValueError, match="noise: got 'normal', needs 'gumbel', 'logistic' or 'none'"):
        ops.gumbel_gate(INPUT, seed=0, step=0, noise="normal")


def arrays(name: str) -> dict[str, object]:
    arguments: dict[str, object] = {name: INPUT.numpy().copy(), "seed": 1, "step": 2}
    if name == "logits":
        arguments |= {"temperature": 0.4, "base": 3.0, "hard": True, "noise": "gumbel"}
    return arguments | {"gate": np.full(6, -7, np.float32), "slope": np.full(6, -7, np.float32)}


@pytest.fixture
def kernels(name: str, emulated: ModuleType) -> list:
    return [getattr(module, {"theta": "bernoulli_gate", "logits": "gumbel_gate"}[name]) for module in (_C, emulated)]


def test_the_kernel_takes_numpy_arrays(name, kernels):
    arguments = arrays(name) | {"step": np.array(2)}
    references = {key: len(gc.get_referrers(arguments[key])) for key in (name, "step", "gate")}
    for kernel in kernels:
        kernel(**arguments)
        np.testing.assert_array_equal(arguments["gate"], GATES[name](INPUT, seed=1, step=2).numpy())
    # no array stays borrowed
    assert references == {key: len(gc.get_referrers(arguments[key])) for key in references}


def read_only(size: int) -> np.ndarray:
    array = np.empty(size, np.float32)
    array.flags.writeable = False
    return array


OVERLAPPING = np.zeros(9, np.float32)
STEP_IN_GATE = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": read_only(6)}, (TypeError, ValueError), "gate: got a.*read-?only"),
        ({"slope": read_only(6)}, (TypeError, ValueError), "slope: got a.*read-?only"),
        ({"gate": np.empty(5, np.float32)}, ValueError, r"gate: got shape \[5\], needs shape \[6\], that of {}"),
        ({"slope": np.empty((2, 3), np.float32)}, ValueError, r"slope: got shape \[2, 3\], needs shape \[6\]"),
        ({"slope": np.empty(6)}, TypeError, "slope: got dtype float64, needs dtype float32"),
        ({"INPUT": OVERLAPPING[:6], "gate": OVERLAPPING[3:]}, ValueError, "gate: got memory that overlaps {}"),
        ({"INPUT": OVERLAPPING[:6], "slope": OVERLAPPING[3:]}, ValueError, "slope: got memory that overlaps {}"),
        ({"gate": OVERLAPPING[:6], "slope": OVERLAPPING[3:]}, ValueError, "slope: got memory that overlaps gate"),
        (
            {"step": STEP_IN_GATE[1:2].reshape(()), "gate": STEP_IN_GATE.view(np.float32)[:6]},
            ValueError,
            "gate: got memory that overlaps step",
        ),
        ({"INPUT": np.zeros(12, np.float32)[::2]}, ValueError, "{}: got a strided view, needs contiguous memory"),
        ({"gate": np.zeros(12, np.float32)[::2]}, ValueError, "gate: got a strided view, needs contiguous memory"),
        ({"INPUT": np.zeros(25, np.int8)[1:].view(np.float32)}, ValueError, "{}: got unaligned memory"),
        ({"step": np.zeros(9, np.int8)[1:].view(np.int64).reshape(())}, ValueError, "step: got unaligned memory"),
        ({"INPUT": [1.0] * 6}, TypeError, "{}: got an object of type list, needs a tensor"),
        ({"INPUT": None}, TypeError, "{}: got an object of type NoneType"),
        ({"gate": None}, TypeError, "gate: got an object of type NoneType"),
        ({"seed": None}, TypeError, "seed: got an object of type NoneType, needs an int"),
        ({"seed": np.array(1)}, TypeError, "seed: got an object of type numpy.ndarray, needs an int"),
        ({"seed": 2**63}, ValueError, r"seed: got 9223372036854775808, needs a whole number from 0 to 2\^63 - 1"),
        ({"step": None}, TypeError, "step: got an object of type NoneType, needs an int or a tensor without"),
        ({"step": -1}, ValueError, "step: got -1, needs a whole number"),
        ({"step": np.zeros(1, np.int64)}, ValueError, "step: got a tensor of 1 dimensions"),
        ({"step": torch.empty((), dtype=torch.int64, device="meta")}, TypeError, "step: got a Tensor that does not"),
        ({"INPUT": torch.empty(6, device="meta")}, TypeError, "{}: got a Tensor that does not lend its memory"),
    ],
)
def test_the_kernel_checks_memory(name, kernels, change, error, message):
    change = {name if key == "INPUT" else key: value for key, value in change.items()}
    for kernel in kernels:
        with pytest.raises(error, match=message.format(name)):
            kernel(**(arrays(name) | change))


def test_the_kernel_checks_numbers():
    for change, message in [
        ({"temperature": "x"}, "temperature: got an object of type str, needs a number"),
        ({"base": None}, "base: got an object of type NoneType, needs a number"),
    ]:
        with pytest.raises(TypeError, match=message):
            _C.gumbel_gate(**(arrays("logits") | change))
    with pytest.raises(ValueError, match="noise: got NoneType, needs 'gumbel'"):
        _C.gumbel_gate(**(arrays("logits") | {"noise": None}))


@pytest.mark.parametrize("change", [{"INPUT": nan_at(5)}, {"step": torch.tensor(-1)}])
def test_a_refused_call_writes_nothing(name, kernels, change):
    arguments = arrays(name) | {name if key == "INPUT" else key: value for key, value in change.items()}
    with pytest.raises(ValueError, match="got"):
        kernels[0](**arguments)
    assert (arguments["gate"] == -7).all()
    assert (arguments["slope"] == -7).all()


@pytest.mark.parametrize("answer", [None, 3, "capsule", RuntimeError("no"), BufferError("no")])
@pytest.mark.parametrize("argument", ["INPUT", "step", "gate"])
def test_a_broken_producer_is_named(name, kernels, argument, answer):
    argument = name if argument == "INPUT" else argument
    with pytest.raises(TypeError, match=rf"{argument}: got an? .*Misbehaving"):
        kernels[0](**(arrays(name) | {argument: Misbehaving(answer)}))


def malformed(choose: random.Random) -> object:
    """Draw something that somebody might pass: mostly tensors, slightly wrong."""
    size = choose.choice([0, 1, 2, 6, 7, 1000])
    dtype = choose.choice([torch.float32, torch.float64, torch.int64, torch.float16, torch.bool, torch.complex64])
    tensor = torch.randint(-3, 9, (size,)).to(dtype)
    return choose.choice(
        [
            tensor,
            tensor[::2],
            tensor.expand(2, size),
            tensor.numpy(),
            tensor.requires_grad_() if dtype.is_floating_point else tensor,
            torch.tensor(choose.randint(-(2**63), 2**63 - 1)),
            torch.full((6,), choose.choice([torch.nan, torch.inf, -1.0, 1e38])),
            choose.choice([-1, 2**63, -(2**80), 0.4, float("nan"), 0.0, True]),
            choose.choice([None, "x", "none", [], Misbehaving(None), Misbehaving(OSError())]),
        ]
    )


def fuzz(name: str, kernels: list, rounds: int) -> None:
    choose = random.Random(0)
    torch.manual_seed(0)
    refusals = 0
    for _ in range(rounds):
        good = arrays(name)
        names = [key for key in good if key != "hard"]
        arguments = good | {key: malformed(choose) for key in choose.sample(names, choose.randint(1, 3))}
        for kernel in kernels:
            try:
                kernel(**arguments)
            except (TypeError, ValueError) as error:
                refusals += 1
                assert str(error).startswith(tuple(good))  # noqa: PT017 - most calls raise, and some are right
    assert refusals > rounds


def test_malformed_arguments_never_crash(name, kernels):
    fuzz(name, kernels, 300)


@pytest.mark.slow
def test_many_malformed_arguments_never_crash(name, kernels):
    fuzz(name, kernels, 25_000)
