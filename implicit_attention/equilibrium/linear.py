"""Matrix-free linear algebra, batched: GMRES and the power iteration use matrix-vector products only."""

from collections.abc import Callable

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]  # [S, n] -> [S, n], one matrix per row


def largest(t: Tensor) -> Tensor:
    """Return the largest magnitude of each sample, NaN if it holds NaN: `[B, ...] -> [B]`.

    This is several times faster than `torch.linalg.vector_norm(t, torch.inf)`, which PyTorch does not vectorise on the
    CPU.

    Args:
        t: Real, `[B, ...]`, not empty.
    """
    flat = t.flatten(1) if t.dim() > 1 else t[:, None]
    magnitude: Tensor = torch.maximum(flat.amax(-1), -flat.amin(-1))
    return magnitude


def gmres(matvec: MatVec, b: Tensor, *, rtol: Tensor | float, restart: int, cycles: int) -> tuple[Tensor, Tensor]:
    """Solve `A x = b` for every row of `b` by restarted GMRES, from x = 0.

    Args:
        matvec: Product with A, `[S, n] -> [S, n]`; each row has its own matrix.
        b: Right-hand sides `[S, n]`.
        rtol: A system stops if the norm of its residual is at most `rtol` times the norm of its b; a number or `[S]`.
        restart: Krylov directions in memory, each of the size of b.
        cycles: Maximum number of restarts.

    Returns:
        Solutions `[S, n]` and the norms of the residuals `[S]`.

    Reference:
        Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7 (1986).
    """
    x = torch.zeros_like(b)
    residual = b
    norm = torch.linalg.vector_norm(b, dim=-1)
    target = rtol * norm
    for cycle in range(cycles):
        if cycle:
            residual = b - matvec(x)
            norm = torch.linalg.vector_norm(residual, dim=-1)
        if bool((norm <= target).all()):
            break
        update, norm = _gmres_cycle(matvec, residual, norm, target, restart)
        x = x + update
    return x, norm


def _gmres_cycle(matvec: MatVec, residual: Tensor, norm: Tensor, target: Tensor, restart: int) -> tuple[Tensor, Tensor]:
    """One Arnoldi sweep: the correction, and the residual's norm after it from the Givens rotations.

    A system that has reached its target gets zero columns from then on. So its result does not depend on the number of
    steps that other systems take.

    Returns:
        `[S, n]` and `[S]`.
    """
    count, n = residual.shape
    basis = residual.new_zeros(restart + 1, count, n)
    basis[0] = residual / norm.clamp_min(_tiny(norm))[:, None]
    r = residual.new_zeros(count, restart, restart)
    rotations: list[tuple[Tensor, Tensor]] = []
    g = residual.new_zeros(count, restart + 1)
    g[:, 0] = norm
    used, live = 0, norm > target
    for k in range(restart):
        w = matvec(basis[k]) * live[:, None]
        size = torch.linalg.vector_norm(w, dim=-1)
        h = residual.new_zeros(count, k + 1)
        for _ in range(2):  # Gram-Schmidt twice is orthogonal to rounding, as Householder (Giraud et al. 2005)
            c = torch.einsum("ksn,sn->sk", basis[: k + 1], w)
            w = w - torch.einsum("ksn,sk->sn", basis[: k + 1], c)
            h = h + c
        below = torch.linalg.vector_norm(w, dim=-1)
        # What is left of w to rounding: the Krylov space is exhausted, and the next direction would be noise.
        below = torch.where(below > 10 * torch.finfo(w.dtype).eps * size, below, 0.0)
        basis[k + 1] = torch.where(below > 0, 1.0 / below.clamp_min(_tiny(below)), 0.0)[:, None] * w
        for i, (cos, sin) in enumerate(rotations):
            upper, lower = h[:, i].clone(), h[:, i + 1].clone()
            h[:, i], h[:, i + 1] = cos * upper + sin * lower, cos * lower - sin * upper
        radius = torch.hypot(h[:, k], below)
        safe = radius.clamp_min(_tiny(radius))
        cos, sin = torch.where(radius > 0, h[:, k] / safe, 1.0), torch.where(radius > 0, below / safe, 0.0)
        rotations.append((cos, sin))
        r[:, : k + 1, k] = h
        r[:, k, k] = radius
        g[:, k + 1] = -sin * g[:, k]
        g[:, k] = cos * g[:, k]
        # A column that depends on the others, to rounding, cannot reduce the residual: its system stops here.
        stuck = radius <= 100 * torch.finfo(w.dtype).eps * torch.linalg.vector_norm(h, dim=-1)
        r[:, k, k] = torch.where(stuck, 0.0, radius)
        used, norm = k + 1, torch.where(live & ~stuck, g[:, k + 1].abs(), norm)
        live = live & ~stuck & (norm > target)
        if not bool(live.any()):
            break
    r, g_top = r[:, :used, :used], g[:, :used]
    empty = r.diagonal(dim1=-2, dim2=-1) == 0  # columns without a direction get weight 0; 1 keeps r regular
    r = r + torch.diag_embed(empty.to(r.dtype))
    weights = torch.linalg.solve_triangular(r, (g_top * ~empty)[..., None], upper=True)[..., 0]
    return torch.einsum("ksn,sk->sn", basis[:used], weights), norm


def spectral_radius(matvec: MatVec, start: Tensor, *, iterations: int = 50) -> Tensor:
    """Estimate the spectral radius of every row's matrix by the power iteration.

    The estimate is the geometric mean of the growth over the second half of the iterations. So it also works for
    complex pairs of eigenvalues, for which the growth oscillates.

    Args:
        matvec: Product with the matrices, `[S, n] -> [S, n]`.
        start: Start vectors `[S, n]`, non-zero.
        iterations: Number of products.

    Returns:
        `[S]`, usually from below; exact in the limit of many `iterations`.
    """
    v = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True).clamp_min(_tiny(start))
    logs = []
    for _ in range(iterations):
        v = matvec(v)
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        v = v / norm.clamp_min(_tiny(norm))
        logs.append(norm[:, 0].log())
    return torch.stack(logs[iterations // 2 :]).mean(0).exp()


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
