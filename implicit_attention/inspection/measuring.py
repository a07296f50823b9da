"""One layer on one sample: solve its equation, watch plain iteration, and measure the equilibrium."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implicit_attention.attention.map import AttentionMap
from implicit_attention.equation import Equation
from implicit_attention.equation.collapse import can_collapse, collapsed
from implicit_attention.equilibrium.adjoints import Implicit
from implicit_attention.equilibrium.fixed_point import fixed_point
from implicit_attention.equilibrium.reports import FailureReport, SolveRecord
from implicit_attention.equilibrium.solvers import Method, Picard, Solution, Solver
from implicit_attention.inspection.records import LayerReport
from implicit_attention.inspection.spectrum import spectrum
from implicit_attention.inspection.troubles import troubles
from implicit_attention.layer import ImplicitQueryAttention
from implicit_attention.solving import solve

_PERIODS = 8  # the longest cycle that is told from wandering
_MAPS = 7  # attention maps kept of plain iteration, at most


def measure(layer: ImplicitQueryAttention, name: str, equation: Equation, iterations: int) -> LayerReport:
    """Return what there is to know of a layer.

    Args:
        layer: The layer.
        name: What it is called.
        equation: Of one sample.
        iterations: Steps of plain iteration, at most.

    Returns:
        The report, with its troubles.
    """
    function, args, start = equation
    assert isinstance(function, AttentionMap)
    solution, record = _own_solution(layer, equation)
    y = solution.value
    plain = _plain_iteration(equation, layer.solver, layer.settings.num_heads, iterations)
    found = spectrum(equation, y)
    with torch.no_grad():
        size = function(y, *args).abs().amax(2)[0].to(solution.residual.dtype)
        settled_map = _map(function, args, y)
        kept = _kept(plain.taken)
        maps = torch.stack([_map(function, args, plain.history[t]) for t in kept])
    rtol, atol = layer.solver.tolerances(y.dtype)
    count = y.shape[1]
    report = LayerReport(
        name=name,
        structure="independent" if not function.rows_are_keys else "causal" if function.spec.is_causal else "unmasked",
        settings=layer.extra_repr(),
        solver=repr(layer.solver),
        tolerance=(atol + rtol * size).cpu(),
        steps=_by_token(solution.steps, count),
        residual=_by_token(solution.residual, count),
        converged=_by_token(solution.converged, count),
        trace=plain.trace.cpu(),
        plain_steps=plain.steps().cpu(),
        rate=_rate(plain.trace, plain.size).cpu(),
        period=plain.period().cpu(),
        gain=found.gain.cpu(),
        fold=found.fold.cpu(),
        leading=found.leading.cpu(),
        radius=found.radius,
        method=found.method,
        other_start=_other_start(equation, layer.solver, y, iterations).cpu(),
        adjoint_residual=None if record is None else float(record.residual.max()),
        collapsed=can_collapse(layer.settings, start, layer.positions is not None or bool(function.spec.terms))
        and bool(solution.converged.all())
        and collapsed(start, y, None),
        iterations=kept,
        maps=maps.cpu(),
        settled_map=settled_map.cpu(),
    )
    adjoint_missed = record is not None and not bool(record.converged.all())
    return replace(report, troubles=troubles(report, layer.settings, float(y.abs().max()), adjoint_missed))


def _own_solution(layer: ImplicitQueryAttention, equation: Equation) -> tuple[Solution, SolveRecord | None]:
    """What the layer itself would find, and the record of its adjoint equation for a random cotangent."""
    function, args, start = equation
    told = FailureReport("ignore")
    leaves = tuple(a.detach().requires_grad_(a.is_floating_point()) for a in args)
    with torch.enable_grad():
        solution = solve(Equation(function, leaves, start.detach()), layer.solver, layer.adjoint, told)
    if isinstance(layer.adjoint, Implicit):
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(start.shape, generator=generator, device="cpu").to(start)
        torch.autograd.backward(solution.value, cotangent)
    record = None if told.last is None else told.last.adjoint
    return replace(solution, value=solution.value.detach(), residual=solution.residual.detach()), record


@dataclass(frozen=True)
class _Plain:
    """Plain iteration.

    Attributes:
        history: The iterates `[1, N, D]`, the start first.
        trace: `|F(y) - y|` of each, the largest of a head, `[T + 1, H, N]`.
        size: `max |F(y)|` of each token, `[T + 1, N]`.
        tolerance: What counts as settled, `[T + 1, N]`.
    """

    history: list[Tensor]
    trace: Tensor
    size: Tensor
    tolerance: Tensor

    @property
    def taken(self) -> int:
        """The steps taken."""
        return len(self.history) - 1

    def steps(self) -> Tensor:
        """After how many steps each head of each token stays within tolerance, `[H, N]`; -1 where it does not."""
        missed = ~(self.trace <= self.tolerance[:, None])
        index = torch.arange(1, len(missed) + 1, device=missed.device)[:, None, None]
        steps = (missed * index).amax(0)
        return torch.where(missed[-1], -1, steps)

    def period(self) -> Tensor:
        """Length of the cycle that each token ends in, `[N]`: 0 if it settles, -1 if it does neither."""
        settled = (self.trace[-1] <= self.tolerance[-1]).all(0)
        found = torch.where(settled, 0, -1)
        last, move = self.history[-1][0], self.trace[-1].amax(0)
        for k in range(min(_PERIODS, self.taken), 1, -1):
            back = (last - self.history[-1 - k][0]).abs().amax(1)
            found = torch.where(~settled & (back <= 1e-2 * move), k, found)  # the shortest is found last
        return found


def _plain_iteration(equation: Equation, solver: Method, heads: int, iterations: int) -> _Plain:
    """Iterate from the values, with the layer's tolerance."""
    function, args, start = equation
    assert isinstance(function, AttentionMap)
    plain = Picard(max_steps=iterations, rtol=solver.rtol, atol=solver.atol)
    with torch.no_grad():
        history = solve(equation, plain, Implicit(), FailureReport("ignore"), history=True).history
        assert history is not None
        following = torch.cat([*history[1:], function(history[-1], *args)])  # [T + 1, N, D]
    iterates = torch.cat(history)
    change = (following - iterates).to(torch.promote_types(start.dtype, torch.float32))
    trace = change.view(*change.shape[:2], heads, -1).abs().amax(3).transpose(1, 2)
    size = following.abs().amax(2).to(trace.dtype)
    rtol, atol = plain.tolerances(start.dtype)
    return _Plain(history, trace, size, atol + rtol * size)


def _rate(trace: Tensor, size: Tensor) -> Tensor:
    """The geometric mean of the reduction in the last half of the steps above rounding, `[H, N]`."""
    floor = 10 * torch.finfo(trace.dtype).eps * size[:, None]
    above = (trace > floor).long().cumprod(0)  # until rounding is reached for the first time
    last = above.sum(0) - 1
    first = last.clamp_min(0) // 2
    ends = [trace.gather(0, at.clamp_min(0)[None])[0] for at in (first, last)]
    steps = (last - first).to(trace.dtype)
    return torch.where(last - first >= 2, (ends[1] / ends[0]) ** (1 / steps), torch.nan)


def _other_start(equation: Equation, solver: Method, y: Tensor, iterations: int) -> Tensor:
    """The largest difference to what is found from zeros and from the values of other tokens, `[N]`."""
    function, args, start = equation
    assert isinstance(function, AttentionMap)
    damped = Picard(damping=0.5, max_steps=4 * iterations, rtol=solver.rtol, atol=solver.atol)
    chosen = solver if isinstance(solver, Solver) else damped
    differences = []
    for other in (torch.zeros_like(start), start.flip(1)):
        with torch.no_grad():
            found = fixed_point(function, other, args, solver=chosen, system_ndim=function.system_ndim,
                                on_failure="ignore")  # fmt: skip
            residual = (function(found.value, *args) - found.value).abs().amax(2)[0]
        rtol, atol = chosen.tolerances(y.dtype)
        size = found.value.abs().amax(2)[0]
        settled = (residual <= 2 * (atol + rtol * size)).to(y.dtype)
        settled = (
            settled.cumprod(0).bool() if function.spec.is_causal else settled.bool()
        )  # later rows see earlier ones
        differences.append(torch.where(settled, (found.value - y).abs().amax(2)[0], torch.nan))
    both = torch.stack(differences)
    return both.nan_to_num(-1.0).amax(0).masked_fill(both.isnan().all(0), torch.nan)


def _map(function: AttentionMap, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return function.weights(y, *args)[0].to(torch.promote_types(y.dtype, torch.float32))


def _kept(taken: int) -> tuple[int, ...]:
    """The iterations whose maps are kept: each of the first, then ever fewer, and the last."""
    numbers, step = [0, 1], 1
    while numbers[-1] + step <= taken:
        numbers.append(numbers[-1] + step)
        step = max(1, numbers[-1] - numbers[-2], numbers[-2])
    numbers = [n for n in numbers if n <= taken][: _MAPS - 1]
    return tuple(sorted({*numbers, taken}))


def _by_token(figures: Tensor, count: int) -> Tensor:
    """Figures of one sample by token, `[1]` or `[1, N]` to `[N]`."""
    figures = figures.detach()
    return (figures[0] if figures.dim() == 2 else figures.expand(count)).clone().cpu()
