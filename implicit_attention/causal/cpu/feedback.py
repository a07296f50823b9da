"""What calls the kernels of maps whose values read outputs; `causal.feedback` says what the tensors hold."""

from torch import Tensor

from implicit_attention.attention.map import NORM_EPS
from implicit_attention.causal.cpu import library
from implicit_attention.causal.cpu.engine import Kernel, widest
from implicit_attention.causal.system import CausalSystem

State = dict[str, Tensor]


def block(system: CausalSystem, least: int) -> int:
    """Return how many rows one call takes, at least `least`."""
    return widest(system, least)


def _kernel(name: str, arguments: library.Arguments, system: CausalSystem) -> Kernel:
    assert system.value_map is not None
    call = Kernel(name, arguments, system, eps=NORM_EPS)
    call.tell(normed=int(system.value_map.normalize))
    call.pass_contiguous(feedback=system.tensors["feedback"])
    return call


class ForwardKernel:
    """Solves the rows of a block in place."""

    def __init__(self, system: CausalSystem, state: State) -> None:
        """Prepare what is the same for all calls.

        Args:
            system: The map, float32 or float64 on the CPU.
            state: As `causal.feedback.Forward.state`.
        """
        assert all(t.is_contiguous() for t in state.values())
        into = {"seen" if name == "value" else name: t for name, t in state.items()}
        self._call = _kernel("feedback_forward", library.FeedbackForwardArguments(), system)
        self._call.pass_contiguous(
            **into, constant=system.bias, added=system.added, feedback_bias=system.tensors.get("feedback_bias")
        )

    def settle(self, rows: slice) -> None:
        """Solve the rows of a block."""
        self._call.run(rows)


class AdjointKernel:
    """Solves the adjoint of the rows of a block in place."""

    def __init__(self, system: CausalSystem, state: State, slopes: bool) -> None:
        """Prepare what is the same for all calls.

        Args:
            system: The map, float32 or float64 on the CPU.
            state: As `causal.feedback.Backward.state`.
            slopes: Whether the cotangents of all scores are wanted.
        """
        self._system, self._slopes = system, slopes
        names = {"value": "seen", "d_value": "d_seen", "d_made": "made"}
        given = {names.get(name, name): t for name, t in state.items() if name != "grad"}
        self._call = _kernel("feedback_adjoint", library.FeedbackAdjointArguments(), system)
        self._call.pass_contiguous(**given)
        self._call.pass_strided("grad", state["grad"].to(system.key.dtype), "bnh")

    def solve(self, rows: slice) -> Tensor | None:
        """Solve the rows of a block; return the cotangents of their scores if they are wanted."""
        system, n, slope = self._system, rows.stop - rows.start, None
        if self._slopes:
            slope = system.key.new_zeros(system.batch, system.heads, n, n)
            self._call.pass_contiguous(slope=slope)
        self._call.run(rows)
        return slope
