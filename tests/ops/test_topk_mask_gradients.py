"""topk_mask's gradient is straight-through, for every incoming gradient and every way to ask for it."""

import pytest
import torch

from fastprune import ops, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BOTH = pytest.mark.parametrize("function", [ops.topk_mask, reference.topk_mask])
FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:FutureWarning"
)  # torch uses it itself
pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def inputs(make_topk_case, device):
    """(scores, keep, offsets, window) of 50 units in three groups, one of them empty; scores take a gradient."""
    case = make_topk_case([30, 0, 20], seed=1).to(device)
    case.scores.requires_grad_()
    return case.args


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_gets_its_own_gradient_unrounded(make_topk_case, device, function, dtype):
    scores, *rest = make_topk_case([30, 20], seed=2, dtype=dtype).to(device).args
    scores.requires_grad_()
    gradient = torch.randn(50, dtype=torch.float64, device=device).to(dtype)
    function(scores, *rest).backward(gradient)
    assert scores.grad.dtype == dtype
    assert torch.equal(scores.grad, gradient)


@BOTH
def test_strided_and_expanded_gradients(device, inputs, function):
    scores = inputs[0]
    strided = torch.randn(50, 3, device=device)[:, 1]
    function(*inputs).backward(strided)
    assert torch.equal(scores.grad, strided)
    scores.grad = None
    mask = function(*inputs)
    mask.sum().backward()  # sum()'s gradient is one number, expanded
    scores.grad[0] = 7  # each element has its own memory
    assert scores.grad.tolist() == [7, *[1] * 49]
    negated = torch.complex(torch.zeros(50), torch.randn(50)).to(device).conj().imag
    assert negated.is_neg()
    (given,) = torch.autograd.grad(function(*inputs), scores, negated)
    assert torch.equal(given, negated)


@BOTH
def test_gradients_add_up(device, inputs, function):
    scores = inputs[0]
    for _ in range(2):
        (function(*inputs) * 2 + scores).sum().backward()
    assert (scores.grad == 6).all()


@BOTH
def test_gradient_of_the_gradient(device, inputs, function):
    scores = inputs[0]
    outer = torch.randn(50, device=device, requires_grad=True)
    (inner,) = torch.autograd.grad(function(*inputs), scores, outer, create_graph=True)
    assert torch.equal(inner, outer)
    # The straight-through map is linear in the incoming gradient and does not depend on the scores.
    by_outer, by_scores = torch.autograd.grad((inner**2).sum(), (outer, scores), allow_unused=True)
    assert torch.equal(by_outer, 2 * outer)
    assert by_scores is None


@BOTH
def test_second_derivative_through_a_loss(device, inputs, function):
    scores = inputs[0]
    mask = function(*inputs)
    (first,) = torch.autograd.grad((mask**3).sum(), scores, create_graph=True)
    assert torch.equal(first, 3 * mask**2)
    (second,) = torch.autograd.grad(first.sum(), scores)
    assert torch.equal(second, 6 * mask)


@BOTH
def test_without_a_gradient_for_the_scores_there_is_no_graph(device, inputs, function):
    scores, keep, offsets, window = inputs
    mask = function(scores.detach(), keep.requires_grad_(), offsets, window.requires_grad_())
    assert not mask.requires_grad
    assert torch.equal(mask, function(scores, keep, offsets, window))
    (mask * keep.sum()).sum().backward()  # keep's other gradient is not disturbed
    assert torch.equal(keep.grad, mask.sum().expand(3))
    with torch.no_grad():
        assert not function(*inputs).requires_grad


@BOTH
def test_a_gradient_of_none_is_zero(device, inputs, function):
    class Forgets(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    scores = inputs[0]
    Forgets.apply(function(*inputs)).sum().backward()
    assert (scores.grad == 0).all()


@BOTH
@pytest.mark.parametrize(("groups", "offsets"), [(0, [0]), (2, [0, 0, 0])])
def test_no_units(device, function, groups, offsets):
    scores = torch.empty(0, device=device, requires_grad=True)
    mask = function(scores, torch.full((groups,), 0.5, device=device), torch.tensor(offsets, device=device))
    mask.sum().backward()
    assert scores.grad.shape == (0,)


def test_the_mask_may_be_changed_in_place(device, inputs):
    expected = ops.topk_mask(*inputs).detach() * 2
    mask = ops.topk_mask(*inputs)
    mask.mul_(2)
    assert torch.equal(mask, expected)
    mask.sum().backward()
    assert (inputs[0].grad == 2).all()


@FORWARD_MODE
def test_forward_mode_is_refused(device, inputs):
    scores, *rest = inputs
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(scores.detach(), torch.ones_like(scores))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            ops.topk_mask(dual, *rest)
