"""Whether the sweeps of an adjoint have solved a sample, and at which of them."""

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.sweep import SPAN, settled

# Sweeps after which the tolerance of a row is relative to its own solution if that is larger than the cotangent. With
# fewer, rows that still improve would stop; without the rule, rows with a gain near 1 would never stop.
PATIENCE = tl.constexpr(16)


@triton.jit
def solved(found, allowed, sweep, b, batch, n, rtol, wide: tl.constexpr):
    """Return whether all rows of a sample were within tolerance at a sweep.

    The tolerance is relative to the cotangent; after `PATIENCE` sweeps, to the row's solution if that is larger. A row
    with a gain close to 1 has a large solution, and its residual ends at the rounding of that solution.

    Args:
        found: As in `sweep.settled`.
        allowed: Absolute tolerance, `[B]`.
        sweep: The sweep.
        b: The sample.
        wide: Type of what the bits are of.

    Returns:
        True or false.
    """
    late = tl.where(sweep >= PATIENCE, rtol, 0.0)
    return settled(found, sweep, b, batch, n, late, tl.load(allowed + b), wide, True)


@triton.jit
def all_solved(status, batch, samples_: tl.constexpr):
    """Return whether `judge_adjoint` found a sweep for every sample."""
    every = tl.arange(0, samples_)
    return tl.min(tl.load(status + every, mask=every < batch, other=0), 0) >= 0


@triton.jit(do_not_specialize=["n", "batch", "sweeps"])
def judge_adjoint(found, allowed, status, latest, batch, n, sweeps, rtol, wide: tl.constexpr):
    """The sweep at which a sample was solved, -1 if it was not.

    Args:
        found: As in `solved`.
        status: `[B]`, filled.
        latest: Residual of the sample, `[B]`, filled if it was solved.
        sweeps: Number of sweeps so far.
        wide: Type of what the bits in `found` are of.
    """
    b = tl.program_id(0).to(tl.int64)
    at_last = -1
    for i in range(sweeps):
        sweep = sweeps - 1 - i
        if solved(found, allowed, sweep, b, batch, n, rtol, wide):
            at_last = sweep
    tl.store(status + b, at_last)
    if at_last >= 0:
        worst = tl.load(allowed + b) * 0.0
        for i in range(0, n, SPAN):
            at = i + tl.arange(0, SPAN)
            off = tl.load(found + (2 * at_last * batch + b) * n + at, mask=at < n, other=0).to(wide, bitcast=True)
            worst = tl.maximum(worst, tl.max(off, 0))
        tl.store(latest + b, worst)
