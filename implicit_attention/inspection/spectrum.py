"""The eigenvalues of dF/dy at an equilibrium: exact where the structure allows it, else from products with it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_attention.attention.map import AttentionMap
from implicit_attention.causal.forward_substitution import radius
from implicit_attention.equation import Equation
from implicit_attention.equilibrium.maps import Linearization
from implicit_attention.inspection.diagnostics import own_jacobians

PRODUCTS = 80  # with the Jacobian, at most
_SMALL = 512  # an unknown of so many numbers gets all of its eigenvalues


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What is known of the eigenvalues of dF/dy for one sample.

    Attributes:
        gain: Spectral radius of each token's own block, `[N]`: how much a token feeds itself.
        fold: Smallest `|1 - eigenvalue|`, `[N]`: of each token's own block where tokens can be taken one by one,
            else the same figure for all. At 0 the equilibrium has no derivative.
        leading: Largest eigenvalue in magnitude, `[N]`, complex; likewise.
        radius: Spectral radius of the whole map.
        method: How leading, fold and radius were found.
    """

    gain: Tensor
    fold: Tensor
    leading: Tensor
    radius: float
    method: str


def spectrum(equation: Equation, y: Tensor) -> Spectrum:
    """Return the spectrum of a map at an equilibrium.

    Args:
        equation: Of one sample.
        y: The equilibrium, `[1, N, D]`.

    Returns:
        The spectrum. It is exact under a causal mask, where dF/dy is block triangular; where tokens are independent;
        and for small unknowns. Otherwise leading and fold are Ritz values of an Arnoldi iteration.
    """
    function = equation.function
    assert isinstance(function, AttentionMap)
    if not function.rows_are_keys:
        return _one_by_one(_token_jacobians(equation, y), "exact: eigenvalues of each token's Jacobian")
    with torch.no_grad():
        own = own_jacobians(equation, y)[0]
    if function.spec.is_causal:
        return _one_by_one(own, "exact: eigenvalues of the diagonal blocks")
    values, method = _of_the_whole(equation, y)
    count, leading = y.shape[1], values[values.abs().argmax()]
    fold = (1 - values).abs().min().expand(count)
    return Spectrum(radius(own), fold, leading.expand(count), float(leading.abs()), method)


def _one_by_one(matrices: Tensor, method: str) -> Spectrum:
    """The spectrum of a map whose eigenvalues are those of one matrix per token, `[N, k, k]`."""
    values = torch.linalg.eigvals(matrices)  # [N, k]
    leading = values.gather(1, values.abs().argmax(1, keepdim=True))[:, 0]
    gain = leading.abs()
    return Spectrum(gain, (1 - values).abs().amin(1), leading, float(gain.max()), method)


def _token_jacobians(equation: Equation, y: Tensor) -> Tensor:
    """The Jacobian of each token that depends on no other token, `[N, D, D]`: D products serve all tokens."""
    size = y.shape[2]
    linearization = Linearization(equation.function, y, equation.args, [False] * len(equation.args))
    rows = []
    for i in range(size):
        lam = torch.zeros_like(y)
        lam[..., i] = 1
        rows.append(linearization.vjp(lam)[0][0])
    return torch.stack(rows, 1).to(torch.promote_types(y.dtype, torch.float32))


def _of_the_whole(equation: Equation, y: Tensor) -> tuple[Tensor, str]:
    linearization = Linearization(equation.function, y, equation.args, [False] * len(equation.args))
    wide = torch.promote_types(y.dtype, torch.float32)

    def product(lam: Tensor) -> Tensor:
        return linearization.vjp(lam.to(y.dtype).view(y.shape))[0].flatten().to(wide)

    generator = torch.Generator().manual_seed(0)  # leaves the caller's random state alone
    start = torch.randn(y.numel(), generator=generator, device="cpu").to(y.device, wide)
    most = y.numel() if y.numel() <= _SMALL else PRODUCTS
    values, left = ritz_values(product, start, most)
    if left == 0:
        return values, f"exact: all eigenvalues that matter, by {len(values)} products with the Jacobian"
    return values, f"estimate: Arnoldi iteration, {len(values)} products with the Jacobian, residual {left:.1e}"


@torch.no_grad()
def ritz_values(product: Callable[[Tensor], Tensor], start: Tensor, most: int) -> tuple[Tensor, float]:
    """Return approximate eigenvalues of a matrix from its products, by the Arnoldi iteration.

    Args:
        product: With the matrix, `[n] -> [n]`.
        start: Start vector, `[n]`, not zero.
        most: Products, at most.

    Returns:
        Eigenvalues `[k]`, complex, `k <= most`, and the residual of the one of largest magnitude: an eigenvalue of a
        matrix so far (in the spectral norm) from the given one. 0 if the products span an invariant space.

    Reference:
        W. E. Arnoldi, "The principle of minimized iterations", Quart. Appl. Math. 9 (1951).
    """
    basis = [start / start.norm()]
    matrix = start.new_zeros(most + 1, most)
    eps = torch.finfo(start.dtype).eps
    k, below, largest = 0, 0.0, 0.0
    for k in range(1, most + 1):
        w = product(basis[-1])
        known = torch.stack(basis)
        largest = max(largest, float(w.norm()))
        for _ in range(2):  # once leaves rounding along the basis
            along = known @ w
            w = w - along @ known
            matrix[:k, k - 1] += along
        below = float(w.norm())
        if k == len(start) or below <= 100 * eps * largest:
            below = 0.0
            break
        matrix[k, k - 1] = below
        basis.append(w / below)
    values, vectors = torch.linalg.eig(matrix[:k, :k])
    lead = values.abs().argmax()
    return values, below * float(vectors[-1, lead].abs() / vectors[:, lead].norm())
