"""UnitTable and group_prox_ refuse bad arguments by name, and none crashes them."""

import random
from types import ModuleType

import numpy as np
import pytest
import torch
from misbehaving import Misbehaving

from fastprune import _C, ops

WEIGHT, UNITS = torch.ones(3, 4), torch.arange(3)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([], "slices: got none, needs at least one tensor"),
        ([(WEIGHT, 2, UNITS)], r"slices\[0\]: got dim 2, needs a dimension of a tensor that has 2"),
        ([(WEIGHT, -3, UNITS)], r"slices\[0\]: got dim -3"),
        ([(WEIGHT, 2**70, UNITS)], r"slices\[0\]: got dim 1180591620717411303424"),
        ([(torch.ones(()), 0, UNITS)], r"slices\[0\]: got dim 0, needs a dimension of a tensor that has 0"),
        ([(WEIGHT, 1, UNITS)], r"slices\[0\] units: got shape \[3\], needs shape \[4\] \(one unit for each position"),
        ([(WEIGHT, 0, UNITS[:, None])], r"slices\[0\] units: got shape \[3, 1\], needs shape \[3\]"),
        ([(WEIGHT, 0, torch.tensor([0, 1, 3]))], r"slices\[0\] units\[2\]: got 3, needs a unit in \[0, 3\), or -1"),
        ([(WEIGHT, 0, torch.tensor([0, -2, 1]))], r"slices\[0\] units\[1\]: got -2, needs a unit in \[0, 3\)"),
        ([(WEIGHT[:, ::2], 0, UNITS)], r"slices\[0\]: got a tensor whose elements overlap or leave gaps \(stride 2 in"),
        ([(WEIGHT[:, :2], 0, UNITS)], r"slices\[0\]: got a tensor whose .* \(stride 4 in dimension 0\), needs dense"),
        ([(torch.ones(1, 4).expand(3, 4), 0, UNITS)], r"slices\[0\]: got a tensor whose elements overlap"),
        ([(torch.ones(3), 0, UNITS), (WEIGHT[:, 1], 0, UNITS)], r"slices\[1\]: got a tensor whose elements overlap or"),
        ([(WEIGHT, 0, UNITS), (WEIGHT, 0, UNITS)], r"slices\[1\]: got memory that overlaps slices\[0\]"),
        ([(WEIGHT, 0, UNITS), (WEIGHT.T, 1, UNITS)], r"slices\[1\]: got memory that overlaps slices\[0\]"),
        ([(WEIGHT, 0, UNITS), (WEIGHT, 1, torch.full((4,), -1))], r"slices\[1\]: got memory that overlaps slices\[0\]"),
        (
            [(WEIGHT[1:], 0, UNITS[1:]), (WEIGHT[:2], 0, UNITS[:2])],
            r"slices\[1\]: got memory that overlaps slices\[0\]",
        ),
        (
            [(torch.ones(3), 0, UNITS), (WEIGHT[1:], 0, UNITS[1:]), (WEIGHT[2], 0, torch.arange(4) - 1)],
            r"slices\[2\].*\[1\]",
        ),
    ],
)
def test_malformed_tables(slices, message):
    with pytest.raises(ValueError, match=message):
        ops.UnitTable(slices, 3)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([(WEIGHT.bfloat16(), 0, UNITS)], r"slices\[0\]: got dtype bfloat16, needs dtype float32 or float64"),
        ([(WEIGHT.half(), 0, UNITS)], r"slices\[0\]: got dtype float16"),
        ([(WEIGHT.long(), 0, UNITS)], r"slices\[0\]: got dtype int64"),
        ([(WEIGHT, 0, UNITS), (WEIGHT.double(), 0, UNITS)], r"slices\[1\]: got dtype float64, needs dtype float32"),
        ([(WEIGHT, 0, UNITS.int())], r"slices\[0\] units: got dtype int32, needs dtype int64"),
        ([(WEIGHT, 0, [0, 1, 2])], r"slices\[0\] units: got an object of type list"),
        ([(WEIGHT, 0, None)], r"slices\[0\] units: got an object of type NoneType"),
        ([(WEIGHT, 0.0, UNITS)], r"slices\[0\]: got a dim of type float, needs an int"),
        ([(WEIGHT, True, UNITS)], r"slices\[0\]: got a dim of type bool, needs an int"),
        ([(None, 0, UNITS)], r"slices\[0\]: got an object of type NoneType"),
        ([(WEIGHT.to("meta"), 0, UNITS)], r"slices\[0\]: got a Tensor that does not lend its memory"),
        ([(WEIGHT.to_sparse(), 0, UNITS)], r"slices\[0\]: got a Tensor that does not lend its memory"),
        ([(WEIGHT, 0)], r"slices\[0\]: got tuple, needs a tuple \(tensor, dim, units\)"),
        ([WEIGHT], r"slices\[0\]: got Tensor, needs a tuple"),
        ([[WEIGHT, 0, UNITS]], r"slices\[0\]: got list, needs a tuple"),
    ],
)
def test_wrong_types_in_tables(slices, message):
    with pytest.raises(TypeError, match=message):
        ops.UnitTable(slices, 3)


@pytest.mark.parametrize("num_units", [-1, 2**31, 2**62])
def test_impossible_numbers_of_units(num_units):
    with pytest.raises(ValueError, match=rf"num_units: got {num_units}, needs a number in \[0, 2\^31\)"):
        ops.UnitTable([(WEIGHT, 0, UNITS)], num_units)


def test_neighbouring_views_of_one_tensor_are_fine():
    weight = torch.ones(6, 4)
    table = ops.UnitTable([(weight[3:], 0, torch.arange(3)), (weight[:3], 0, torch.arange(3))], 3)
    ops.group_prox_(table, torch.full((3,), 8**0.5 / 2))
    torch.testing.assert_close(weight, torch.full((6, 4), 0.5))


@pytest.mark.parametrize(
    ("threshold", "error", "message"),
    [
        (torch.tensor([0.5, -0.5, torch.nan]), ValueError, r"threshold\[1\]: got -0.5, needs a number >= 0"),
        (torch.tensor([0.5, 0.5, torch.nan]), ValueError, r"threshold\[2\]: got nan"),
        (torch.tensor([-torch.inf, 0.5, 0.5]), ValueError, r"threshold\[0\]: got -inf"),
        (torch.ones(4), ValueError, r"threshold: got shape \[4\], needs shape \[3\] \(one number for each unit"),
        (torch.ones(()), ValueError, r"threshold: got shape \[\]"),
        (torch.ones(6)[::2], ValueError, "threshold: got a strided view"),
        (torch.ones(3).double(), TypeError, "threshold: got dtype float64, needs dtype float32"),
        (0.5, TypeError, "threshold: got an object of type float"),
        ([1.0, 1.0, 1.0], TypeError, "threshold: got an object of type list"),
    ],
)
def test_wrong_thresholds_write_nothing(threshold, error, message):
    weight = torch.ones(3, 4)
    table = ops.UnitTable([(weight, 0, UNITS)], 3)
    version = weight._version
    with pytest.raises(error, match=message):
        ops.group_prox_(table, threshold)
    assert (weight == 1).all()
    assert weight._version == version


def test_a_threshold_may_not_be_one_of_the_tensors():
    gamma, weight = torch.ones(3), torch.ones(3, 4)
    table = ops.UnitTable([(weight, 0, UNITS), (gamma, 0, UNITS)], 3)
    with pytest.raises(ValueError, match=r"threshold: got memory that overlaps slices\[1\]"):
        ops.group_prox_(table, gamma)
    with pytest.raises(ValueError, match=r"norms: got memory that overlaps slices\[0\]"):
        _C.group_prox(table._table, None, weight[1:].flatten()[:3])
    shared = torch.ones(4)
    with pytest.raises(ValueError, match="norms: got memory that overlaps threshold"):
        _C.group_prox(table._table, shared[1:], shared[:3])


def replace_data(parameter):
    parameter.data = torch.ones(3, 4)


def replace_data_by_nothing(parameter):
    parameter.data = torch.empty(0)


def free(parameter):
    parameter.untyped_storage().resize_(0)


def grow(parameter):
    parameter.data.resize_(300, 400)


def transpose(parameter):
    parameter.data = parameter.data.T.contiguous().T


def reshape_in_place(parameter):
    parameter.data = parameter.data.view(4, 3)


def restride(parameter):
    parameter.data = parameter.data.T


def change_dtype(parameter):
    parameter.data = parameter.data.double()


def set_elsewhere(parameter):
    with torch.no_grad():
        parameter.set_(torch.ones(20).untyped_storage(), 2, (3, 4), (4, 1))


MOVES = [
    *(replace_data, replace_data_by_nothing, free, grow, transpose),
    *(reshape_in_place, restride, change_dtype, set_elsewhere),
]


@pytest.mark.parametrize("move", MOVES)
def test_moved_memory_is_noticed(move):
    first = torch.ones(5, 2)
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    table = ops.UnitTable([(first, 0, torch.arange(5) % 3), (parameter, 0, UNITS)], 3)
    move(parameter)
    message = r"slices\[1\]: the tensor's memory has moved since the table was built; build a new UnitTable"
    with pytest.raises(ValueError, match=message):
        ops.group_prox_(table, torch.ones(3))
    with pytest.raises(ValueError, match=message):
        table.norms()
    assert (first == 1).all()


def test_modules_may_load_and_train_but_not_move():
    conv = torch.nn.Conv2d(3, 3, 3)
    table = ops.UnitTable([(conv.weight, 0, UNITS)], 3)
    optimiser = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9)
    conv.load_state_dict({name: torch.ones_like(value) for name, value in conv.state_dict().items()})
    torch.testing.assert_close(table.norms(), torch.full((3,), 27**0.5))
    conv(torch.ones(1, 3, 8, 8)).sum().backward()
    optimiser.step()
    assert (table.norms() > 0).all()
    conv.to(torch.float64)
    with pytest.raises(ValueError, match=r"slices\[0\]: the tensor's memory has moved"):
        table.norms()


def test_the_kernel_takes_numpy_arrays():
    weight = np.full((3, 4), 2, np.float32)
    table = _C.UnitTable([(weight, 0, np.arange(3))], 3)
    norms = np.empty(3, np.float32)
    _C.group_prox(table, np.float32([2, 0, 9]), norms)
    np.testing.assert_array_equal(norms, [4, 4, 4])
    np.testing.assert_array_equal(weight[:, 0], [1, 2, 0])


def test_read_only_arrays_are_refused():
    weight, norms = np.ones((3, 4), np.float32), np.ones(3, np.float32)
    table = _C.UnitTable([(weight, 0, np.arange(3))], 3)
    norms.flags.writeable = False
    with pytest.raises((TypeError, ValueError), match=r"norms: got a.*read-?only"):
        _C.group_prox(table, None, norms)
    weight.flags.writeable = False
    with pytest.raises((TypeError, ValueError), match=r"slices\[0\]: got a.*read-?only"):
        _C.UnitTable([(weight, 0, np.arange(3))], 3)


def test_limits_are_checked():
    for limits in ([1] * 5, [1, 1, 0, 1, 1, 1], [1, 1, 1025, 1, 1, 1], [-1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]):
        with pytest.raises(ValueError, match="limits: needs six positive numbers, the third up to 1024"):
            _C.UnitTable([(WEIGHT, 0, UNITS)], 3, limits)


def test_words_for_a_device_are_checked():
    table = _C.UnitTable([(torch.ones(3, 4), 0, UNITS)], 3)
    assert table.num_device_words > 0
    with pytest.raises(ValueError, match=r"words: got shape \[1\]"):
        table.write_device_words(torch.zeros(1, dtype=torch.int64))
    words = torch.zeros(table.num_device_words, dtype=torch.int64)
    table.write_device_words(words)
    with pytest.raises(ValueError, match="words: got a tensor on the CPU, needs one on CUDA"):
        table.attach(words)


def malformed_tensor(choose: random.Random) -> object:
    shape = [choose.choice([0, 1, 2, 3, 4, 7]) for _ in range(choose.randint(0, 4))]
    dtype = choose.choice([torch.float32] * 30 + [torch.float64, torch.float16, torch.int64, torch.bool])
    tensor = torch.randint(-3, 9, shape).to(dtype)
    return choose.choice(
        [
            *([tensor] * 20),
            tensor.mT if tensor.ndim > 1 else tensor,
            tensor[..., ::2] if tensor.ndim else tensor,
            tensor.expand(2, *shape),
            tensor.numpy(),
            choose.choice([None, 3, "x", [], Misbehaving(None), Misbehaving(OSError())]),
        ]
    )


def malformed_slice(choose: random.Random, num_units: int) -> object:
    tensor = malformed_tensor(choose)
    dim = choose.choice([0, 1, 2, -1, 7, -(2**63), 2**80, None, 1.0])
    if isinstance(tensor, torch.Tensor) and tensor.ndim > 0 and choose.random() < 0.9:
        dim = choose.randrange(-tensor.ndim, tensor.ndim)
    size = 3
    if isinstance(tensor, torch.Tensor) and isinstance(dim, int) and -tensor.ndim <= dim < tensor.ndim:
        size = tensor.size(dim)
    units = torch.randint(-1, max(num_units, 1), (size + choose.choice([0] * 20 + [1, 5]),))
    units = choose.choice([*([units] * 30), units - 1, units.int(), units.double(), malformed_tensor(choose)])
    slice_ = (tensor, dim, units)
    return choose.choice([*([slice_] * 40), slice_[:2], list(slice_), None, tensor])


def fuzz(emulated: ModuleType, rounds: int) -> None:
    choose = random.Random(0)
    torch.manual_seed(0)
    named = ("slices", "num_units", "threshold", "norms", "limits")
    messages: list[str] = []
    for _ in range(rounds):
        num_units = choose.choice([0, 1, 2, 3, 3, 3, 3, 50, 50, -1, 2**40])
        few = min(max(num_units, 0), 50)
        vectors = [
            choose.choice([*([torch.rand(few) * 4] * 12), torch.rand(few) - 0.1, malformed_tensor(choose)])
            for _ in range(2)
        ]
        try:
            slices = [malformed_slice(choose, few) for _ in range(choose.choice([0, 1, 1, 1, 2, 3]))]
            limits = choose.choice([*([None, [2, 2, 4, 8, 1, 9], [1, 1, 1, 1, 1, 1]] * 5), [0, 1, 2, 3, 4, 5], [1]])
            module = choose.choice([_C, _C, emulated])
            module.group_prox(
                module.UnitTable(slices, num_units, limits), choose.choice([vectors[0], vectors[0], None]), vectors[1]
            )
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    assert rounds / 10 < len(messages) < rounds * 9 / 10
    assert all(message.startswith(named) for message in messages)


def test_malformed_arguments_never_crash(emulated):
    fuzz(emulated, 1000)


@pytest.mark.slow
def test_many_malformed_arguments_never_crash(emulated):
    fuzz(emulated, 100_000)
