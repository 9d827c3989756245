"""group_prox_: values, invariants, and its behaviour under torch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import ops, reference
from fastprune.models.resnet import resnet20

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64]
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

seeds = st.integers(0, 2**32)
dtypes = st.sampled_from(DTYPES)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(BITS[tensor.dtype])


def run(case, device="cpu"):
    """Return a copy of the case after the step, and the norms before it."""
    after = case.to(device) if device != "cpu" else case.copy()
    norms = ops.group_prox_(after.table(), after.threshold)
    return after, norms


@settings(max_examples=200, deadline=None)
@given(seeds, st.integers(1, 40), dtypes)
def test_values_of_random_tables(make_prox_case, seed, num_units, dtype):
    case = make_prox_case(seed, num_units, dtype)
    table = case.table()
    assert torch.equal(table.sizes, reference.UnitTable(case.slices, num_units).sizes)
    norms_alone = table.norms()
    after, norms = run(case)
    case.check(after, norms)
    assert torch.equal(norms, norms_alone)


SHAPES = [
    ((64, 32, 3, 3), 0, torch.contiguous_format),
    ((64, 32, 3, 3), 1, torch.contiguous_format),
    ((64, 32, 3, 3), 0, torch.channels_last),
    ((64, 32, 3, 3), 1, torch.channels_last),
    ((700, 1100), 0, torch.contiguous_format),
    ((700, 1100), 1, torch.contiguous_format),  # lines longer than one tile
    ((3, 300_000), 0, torch.contiguous_format),  # units beyond a core's cache
    ((7, 3, 40_000), 1, torch.contiguous_format),  # in several rows
    ((1, 1, 200_001), 0, torch.contiguous_format),
    ((20_001, 1, 3, 3), 0, torch.contiguous_format),  # depthwise
    ((100_003,), 0, torch.contiguous_format),
    ((30_011, 1), 1, torch.contiguous_format),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "dim", "layout"), SHAPES)
def test_values_of_every_layout(make_prox_case, shape, dim, layout, device):
    torch.manual_seed(0)
    tensor = torch.randn(shape).contiguous(memory_format=layout)
    size = tensor.size(dim)
    norms = tensor.movedim(dim, 0).reshape(size, -1).norm(dim=1)
    threshold = norms * torch.rand(size) * 1.5
    case = type(make_prox_case(0))([(tensor, dim, torch.arange(size))], threshold)
    after, norms = run(case, device)
    case.check(after, norms)
    # The same with a table in which every second position belongs to no unit.
    units = torch.where(torch.arange(size) % 2 == 0, torch.arange(size), -1)
    holes = type(case)([(tensor, dim, units)], threshold)
    after, norms = run(holes, device)
    holes.check(after, norms)
    left_alone = torch.arange(1, size, 2)
    changed = after.tensors[0].cpu().index_select(dim, left_alone)
    assert torch.equal(bits(changed), bits(tensor.index_select(dim, left_alone)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_of_one_element_are_soft_thresholds(device, dtype):
    torch.manual_seed(1)
    gamma = torch.randn(5000, dtype=dtype, device=device)
    gamma[:4] = torch.tensor([0.0, -0.0, 0.25, -0.25])
    expected = torch.nn.functional.softshrink(gamma, 0.25)
    magnitude = gamma.abs()
    for units in (torch.arange(5000), torch.randperm(5000)):
        shrunk = gamma.clone()
        table = ops.UnitTable([(shrunk, 0, units)], 5000)
        norms = ops.group_prox_(table, torch.full((5000,), 0.25, dtype=dtype, device=device))
        assert torch.equal(shrunk, expected)
        assert not shrunk[shrunk == 0].signbit().any()
        assert torch.equal(norms[units.to(device)], magnitude)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_of_one_element_are_exact_at_the_edge_of_the_range(device, dtype):
    limits = torch.finfo(dtype)
    tiny, largest = limits.smallest_normal * limits.eps, limits.max  # the smallest subnormal
    gamma = torch.tensor([tiny, -2 * tiny, largest, -largest], dtype=dtype, device=device)
    table = ops.UnitTable([(gamma, 0, torch.arange(4))], 4)
    assert torch.equal(table.norms(), gamma.abs())
    ops.group_prox_(table, torch.tensor([tiny, tiny, largest / 2, largest], dtype=dtype, device=device))
    assert gamma.tolist() == [0, -tiny, largest / 2, 0]


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Return NaNs of several payloads, quiet and signalling, zeros of both signs, subnormals, infinities."""
    patterns = {
        torch.float32: [0x7FC00001, 0x7F800001, -0x003FFFFF, 0, -(2**31), 1, -(2**31) + 1, 0x7F800000, 0x3F800000],
        torch.float64: [
            *(0x7FF8000000000001, 0x7FF0000000000001, -0x0007FFFFFFFFFFFF, 0, -(2**63), 1),
            *(-(2**63) + 1, 0x7FF0000000000000, 0x3FF0000000000000),
        ],
    }[dtype]
    return torch.tensor(patterns, dtype=BITS[dtype]).view(dtype)


def tensors_of_every_path(dtype: torch.dtype) -> list[tuple[torch.Tensor, int]]:
    """Return tensors of nine units: of one element, of a contiguous run, of columns, too large for one worker."""
    values = special_values(dtype)
    return [
        (values.clone(), 0),
        (values[:, None].repeat(1, 37), 0),
        (values.repeat(33, 1), 1),
        (values[:, None].repeat(1, 100_000), 0),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", range(4))
def test_a_threshold_of_zero_keeps_every_bit(device, dtype, path):
    tensor, dim = tensors_of_every_path(dtype)[path]
    on_device = tensor.to(device)
    table = ops.UnitTable([(on_device, dim, torch.arange(9))], 9)
    ops.group_prox_(table, torch.zeros(9, dtype=dtype, device=device))
    assert torch.equal(bits(on_device), bits(tensor))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", range(4))
def test_nan_units_stay_and_the_others_become_plus_zero(device, dtype, path):
    tensor, dim = tensors_of_every_path(dtype)[path]
    on_device = tensor.to(device)
    table = ops.UnitTable([(on_device, dim, torch.arange(9))], 9)
    norms = ops.group_prox_(table, torch.full((9,), torch.inf, dtype=dtype, device=device))
    nan = special_values(dtype).isnan()
    assert torch.equal(norms.isnan().cpu(), nan)
    by_unit, before = (bits(t.cpu().movedim(dim, 0).reshape(9, -1)) for t in (on_device, tensor))
    assert torch.equal(by_unit[nan], before[nan])
    assert (by_unit[~nan] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", range(4))
def test_infinite_norms_stay_under_finite_thresholds(device, dtype, path):
    tensor, dim = tensors_of_every_path(dtype)[path]
    on_device = tensor.to(device)
    table = ops.UnitTable([(on_device, dim, torch.arange(9))], 9)
    norms = ops.group_prox_(table, torch.full((9,), 0.5, dtype=dtype, device=device)).cpu()
    infinite = special_values(dtype).isinf()
    assert torch.equal(norms.isinf(), infinite)
    by_unit, before = (bits(t.cpu().movedim(dim, 0).reshape(9, -1)) for t in (on_device, tensor))
    assert torch.equal(by_unit[infinite], before[infinite])


@pytest.mark.parametrize("device", DEVICES)
def test_squares_do_not_overflow_in_float32(device):
    weight = torch.full((4, 100), 1e30, device=device)
    weight[1] = 1e-30
    weight[2] = 3e38
    table = ops.UnitTable([(weight, 0, torch.arange(4))], 4)
    norms = ops.group_prox_(table, torch.tensor([5e30, 5e-30, 1.0, 0.0], device=device)).cpu()
    torch.testing.assert_close(norms, torch.tensor([1e31, 1e-29, torch.inf, 1e31]))
    expected = torch.tensor([0.5e30, 0.5e-30, 3e38, 1e30])
    torch.testing.assert_close(weight[:, 0].cpu(), expected, rtol=1e-6, atol=0)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 20))
def test_directions_stay_and_norms_fall_by_the_threshold(make_prox_case, seed, num_units):
    case = make_prox_case(seed, num_units, torch.float64)
    after, norms = run(case)
    expected = (norms - case.threshold).clamp(min=0)
    torch.testing.assert_close(after.table().norms(), expected, rtol=1e-12, atol=1e-14)
    for (before, dim, units), shrunk in zip(case.slices, after.tensors, strict=True):
        factor = torch.where(norms > 0, expected / norms, 1)
        shape = [-1 if d == dim % before.ndim else 1 for d in range(before.ndim)]
        by_position = torch.where(units >= 0, factor[units], 1).reshape(shape)
        torch.testing.assert_close(shrunk, before * by_position, rtol=1e-12, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 20), dtypes)
def test_units_without_a_threshold_are_bit_identical(make_prox_case, seed, num_units, dtype):
    case = make_prox_case(seed, num_units, dtype)
    kept = torch.rand(num_units, generator=torch.Generator().manual_seed(seed)) < 0.5
    case.threshold[kept] = 0
    after, _ = run(case)
    for (before, dim, units), shrunk in zip(case.slices, after.tensors, strict=True):
        positions = torch.nonzero((units < 0) | kept[units]).flatten()
        assert torch.equal(bits(shrunk.index_select(dim, positions)), bits(before.index_select(dim, positions)))


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 8))
def test_nothing_near_the_result_has_a_smaller_objective(make_prox_case, seed, num_units):
    case = make_prox_case(seed, num_units, torch.float64)
    case.threshold.clamp_(max=100)
    after, _ = run(case)
    generator = torch.Generator().manual_seed(seed)

    def objective(tensors):
        distance = sum((w - before).square().sum() for w, before in zip(tensors, case.tensors, strict=True)) / 2
        slices = [(w, dim, units) for w, (_, dim, units) in zip(tensors, case.slices, strict=True)]
        return distance + (case.threshold * reference.UnitTable(slices, num_units).norms()).sum()

    best = objective(after.tensors)
    for size in (1e-6, 1e-3, 1e-1):
        for _ in range(5):
            moved = [w + size * torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in after.tensors]
            assert objective(moved) >= best - 1e-12 * abs(best)


def interior_slices(block, units):
    """Return the slices of the channels between the two convolutions of a residual block."""
    return [
        (block.conv1.weight, 0, units),
        (block.bn1.weight, 0, units),
        (block.bn1.bias, 0, units),
        (block.conv2.weight, 1, units),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_coupled_units_of_a_residual_network(randomised, device, layout):
    torch.manual_seed(2)
    model = randomised(resnet20()).eval().to(device).to(memory_format=layout)
    blocks = [module for module in model.modules() if hasattr(module, "conv2")]
    slices, num_units = [], 0
    for block in blocks:
        channels = block.conv1.out_channels
        slices += interior_slices(block, torch.arange(num_units, num_units + channels))
        num_units += channels
    table = ops.UnitTable(slices, num_units)
    assert (table.sizes == 2 * (9 * 16) + 2).sum() == 16 * 3  # the first stage: 16 x 9 in a row, 16 x 9 in a column
    twin = copy.deepcopy(model)
    plain = reference.UnitTable(
        [(dict(twin.named_parameters())[name], dim, units.to(device)) for name, dim, units in named(model, slices)],
        num_units,
    )
    threshold = torch.where(torch.rand(num_units) < 0.5, table.norms().cpu() * 0.5, torch.inf).to(device)
    torch.testing.assert_close(ops.group_prox_(table, threshold), reference.group_prox_(plain, threshold))
    x = torch.randn(2, 3, 32, 32, device=device).to(memory_format=layout)
    torch.testing.assert_close(model(x), twin(x))

    # A dead channel may be removed: the statistics of its batch norm do not matter to the output.
    output = model(x)
    for block in blocks:
        dead = block.bn1.weight == 0
        assert dead.any()
        assert not dead.all()
        block.bn1.running_mean[dead] += 100
    assert torch.equal(model(x), output)


def named(model, slices):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(tensor)], dim, units) for tensor, dim, units in slices]


@pytest.mark.parametrize("device", DEVICES)
def test_units_that_own_nothing(device):
    weight = torch.randn(4, 5, device=device)
    before = weight.clone()
    table = ops.UnitTable([(weight, 0, torch.full((4,), -1))], 3)
    assert table.norms().tolist() == [0, 0, 0]
    assert ops.group_prox_(table, torch.ones(3, device=device)).tolist() == [0, 0, 0]
    assert torch.equal(weight, before)
    assert ops.UnitTable([(torch.empty(0, 5), 0, torch.arange(0))], 0).norms().shape == (0,)


def test_the_table_describes_itself():
    table = ops.UnitTable(
        [(torch.zeros(3, 4), 1, torch.tensor([0, 2, 2, -1])), (torch.zeros(2), 0, torch.arange(2))], 4
    )
    assert table.num_units == 4
    assert table.sizes.tolist() == [4, 1, 6, 0]
    assert repr(table) == "UnitTable(4 units, 2 slices, 11 elements, torch.float32, cpu)"


def test_the_table_keeps_its_tensors():
    table = ops.UnitTable([(torch.ones(1000, 100), 0, torch.arange(1000))], 1000)
    rubbish = [torch.full((1000, 100), torch.nan) for _ in range(20)]
    assert (table.norms() == 10).all()
    del rubbish


def test_same_bits_on_every_run_and_for_every_number_of_threads():
    torch.manual_seed(3)
    shapes = [((300, 700), 0), ((300, 700), 1), ((2, 300_000), 0), ((5000, 64), 0), ((300,), 0), ((64, 300, 3, 3), 1)]
    start = [torch.randn(shape) for shape, _ in shapes]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8, 1, 8):
            torch.set_num_threads(threads)
            tensors = [tensor.clone() for tensor in start]
            slices = [
                (tensor, dim, torch.arange(tensor.size(dim))) for tensor, (_, dim) in zip(tensors, shapes, strict=True)
            ]
            norms = ops.group_prox_(ops.UnitTable(slices, 5000), torch.full((5000,), 3.0))
            results.append([*tensors, norms])
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


def test_autograd_notices_a_changed_tensor():
    weight = torch.randn(3, 4, requires_grad=True)
    table = ops.UnitTable([(weight, 0, torch.arange(3))], 3)
    loss = weight.square().sum()
    table.norms()
    version = weight._version
    norms = ops.group_prox_(table, torch.ones(3))
    assert weight._version > version
    assert not norms.requires_grad
    assert not table.norms().requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        weight = torch.full((2, 4), 2.0)
        table = ops.UnitTable([(weight, 0, torch.arange(2))], 2)
        ops.group_prox_(table, torch.ones(2))
    assert (weight == 1.5).all()


def test_compile_breaks_the_graph_and_stays_correct():
    weight = torch.full((2, 4), 2.0)
    table = ops.UnitTable([(weight, 0, torch.arange(2))], 2)

    def step(threshold):
        doubled = weight * 2
        norms = ops.group_prox_(table, threshold * 1)
        return doubled, norms, weight * 2, table.norms()

    compiled = torch.compile(step, backend="aot_eager")
    for before, after in ((2.0, 1.5), (1.5, 1.0)):
        doubled, norms, doubled_after, norms_after = compiled(torch.ones(2))
        assert (doubled == 2 * before).all()
        assert (norms == 2 * before).all()
        assert (doubled_after == 2 * after).all()
        assert (norms_after == 2 * after).all()

    whole = torch.compile(lambda threshold: ops.group_prox_(table, threshold), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(torch.ones(2))
    assert (weight == 1).all()
