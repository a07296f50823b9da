"""Bad input to `fixed_point`, and combinations of solver and gradient that cannot work."""

import pytest
import torch

from implicit_attention import Implicit, NewtonKrylov, fixed_point
from tests.test_bad_input import layer, refused, x

FIXED_POINT = {
    "function": ({"function": 3}, TypeError, "function", "callable", "got 3"),
    "y0": ({"y0": [0.0]}, TypeError, "y0", "floating-point tensor", "list"),
    "y0-integers": ({"y0": torch.zeros(2, dtype=torch.long)}, TypeError, "y0", "floating-point", "int64"),
    "args": ({"args": (1.0,)}, TypeError, r"args\[0\]", "a tensor", "got 1.0", "Close over"),
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


def test_unrolling_newton_is_refused():
    made = layer(solver=NewtonKrylov(), adjoint="unrolled")
    with refused(ValueError, "adjoint", r"Implicit\(\) or Phantom\(\)", r"Unrolled\(\)", "choose Picard"):
        made(x())
