"""Bad input to `fixed_point`, and combinations of solver and gradient that cannot work."""

import pytest
import torch

from implicit_attention import Implicit, NewtonKrylov, Phantom, Picard, Unrolled, fixed_point
from tests.test_bad_input import layer, refused, x

FIXED_POINT = {
    "function": ({"function": 3}, TypeError, "function", "callable", "got 3"),
    "y0": ({"y0": [0.0]}, TypeError, "y0", "floating-point tensor", "list"),
    "y0-integers": ({"y0": torch.zeros(2, dtype=torch.long)}, TypeError, "y0", "floating-point", "int64"),
    "args": ({"args": (1.0,)}, TypeError, r"args\[0\]", "a tensor", "got 1.0", "Close over"),
    "args-tensor": ({"args": torch.ones(2)}, TypeError, "args", "a tuple of tensors", r"shape \(2,\)", r"\(a,\)"),
    "args-None": ({"args": None}, TypeError, "args", "a tuple of tensors", "got None", r"\(a,\)"),
    "args-dict": ({"args": {"a": torch.ones(1)}}, TypeError, "args", "a tuple of tensors", "dict", r"\(a,\)"),
    "solver": ({"solver": "picard"}, TypeError, "solver", r"Anderson\(\)", "picard"),
    "adjoint": ({"adjoint": Implicit}, TypeError, "adjoint", r"Implicit\(\)", "class"),
    "system_ndim": ({"system_ndim": 3}, ValueError, "y0", "system_ndim=3", r"\(2, 1\)"),
    "system_ndim-zero": ({"system_ndim": 0}, ValueError, "system_ndim", "> 0", "got 0"),
    "shape": ({"function": lambda y: y.sum()}, ValueError, "function", r"shape \(2, 1\)", r"shape \(\)"),
    "on_failure": ({"on_failure": "x"}, ValueError, "on_failure", "'warn', 'raise', 'ignore'", "x"),
}


@pytest.mark.parametrize("case", FIXED_POINT.values(), ids=FIXED_POINT)
def test_fixed_point(case):
    options, error, *parts = case
    with refused(error, *parts):
        fixed_point(**{"function": torch.cos, "y0": torch.zeros(2, 1)} | options)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), Unrolled()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("grad", [False, True])
def test_a_map_that_works_in_place_is_refused(adjoint, grad):
    with refused(ValueError, "function", "leaves y", "in place", r"y \* 0.5"), torch.set_grad_enabled(grad):
        fixed_point(lambda y: y.mul_(0.5).add_(1), torch.zeros(2, 1), adjoint=adjoint)


def test_inference_mode_solves():
    with torch.inference_mode():
        assert fixed_point(torch.cos, torch.zeros(2, 1)).converged.all()
        nan, flags = torch.full((2, 1), torch.nan), torch.ones(2, 1, dtype=torch.bool)
        assert fixed_point(lambda y, *_: y.cos(), torch.zeros(2, 1), (nan, flags)).converged.all()


def test_inference_mode_refuses_a_map_that_works_in_place():
    """Torch does not count changes there, so that only contents tell."""
    with torch.inference_mode():
        with refused(ValueError, "function", "leaves y", "in place", r"y \* 0.5"):
            fixed_point(lambda y: y.mul_(0.5).add_(1), torch.zeros(2, 1))
        with refused(ValueError, "function", r"leaves args\[0\]", "in place"):
            fixed_point(lambda y, a: y * a.mul_(0.5), torch.zeros(2, 1), (torch.ones(2, 1),))


@pytest.mark.parametrize("grad", [False, True])
def test_a_map_that_changes_its_arguments_is_refused(grad):
    with torch.set_grad_enabled(grad), refused(ValueError, "function", r"leaves args\[1\]", "in place"):
        fixed_point(lambda y, a, b: y * a + b.mul_(0.5), torch.zeros(2, 1), (torch.ones(1), torch.ones(1)))


def test_buffers_of_a_module_may_change():
    norm = torch.nn.BatchNorm1d(3)
    fixed_point(norm, torch.randn(4, 3), solver=Picard(max_steps=3), on_failure="ignore")
    assert norm.num_batches_tracked > 1


def test_an_error_of_the_map_names_its_inputs():
    with pytest.raises(RuntimeError, match="dtype") as caught:
        fixed_point(torch.nn.Linear(3, 3), torch.zeros(2, 3, dtype=torch.float64))
    (note,) = caught.value.__notes__
    assert "y: a tensor of shape (2, 3), torch.float64" in note
    assert "args[0]: a tensor of shape (3, 3), torch.float32" in note


def test_unrolling_newton_is_refused():
    said = ("adjoint", r"Implicit\(\) or Phantom\(\)", r"Unrolled\(\)", "choose Picard")
    with refused(ValueError, *said):
        layer(solver=NewtonKrylov(), adjoint="unrolled")
    made = layer(solver=NewtonKrylov())
    made.adjoint = "unrolled"
    with refused(ValueError, *said):
        made(x())
    with refused(ValueError, *said):
        fixed_point(torch.cos, torch.zeros(2, 1), solver=NewtonKrylov(), adjoint=Unrolled())
