"""The seed, exactly: a fixed number of Picard steps, unrolled."""

import torch
from torch import Tensor, nn

from implicit_attention.attention import AttentionSpec
from implicit_attention.attention.linear_map import checked_against, linear_map
from implicit_attention.attention.map import AttentionMap, QueryMap
from implicit_attention.equilibrium import maps
from implicit_attention.errors import check_positive, required
from implicit_attention.inputs import check_input, non_finite


class ImplicitQueryAttentionLinearV(nn.Module):
    r"""Implicit-query attention as first written: a fixed number of Picard steps, unrolled.

    `y <- softmax(K (Omega_Q y)^T / sqrt(D)) V`, `n_iters` times from `y = V`, with `K = W_K x` and
    `V = Omega_V x`. Autograd goes through every step. Scores are never stored: each step is one flash call.

    For an equilibrium with a tolerance, heads, masks and implicit gradients use `ImplicitQueryAttention`.
    """

    def __init__(self, embed_dim: int, n_iters: int = 10) -> None:
        """Make the layer.

        Args:
            embed_dim: Size D of a token.
            n_iters: Number of steps, at least 0.

        Raises:
            TypeError: If an argument is no integer.
            ValueError: If it is out of range.
        """
        super().__init__()
        check_positive("embed_dim", embed_dim, integer=True)
        check_positive("n_iters", n_iters, integer=True, zero=True)
        self.embed_dim = embed_dim
        self.n_iters = n_iters
        self.Omega_Q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_K = nn.Linear(embed_dim, embed_dim, bias=False)
        self.Omega_V = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x: Tensor, track: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Return the output, and with `track` also every iterate.

        Args:
            x: Input `[..., N, D]`, of the parameters' dtype and device.
            track: Whether to return the history.

        Returns:
            `y` `[..., N, D]`, or `(y, y_history)` with `n_iters + 1` iterates, the first of them V.

        Raises:
            TypeError: If x is no float tensor of the parameters' dtype.
            ValueError: If its shape or device does not fit, or x or a weight holds NaN or Inf.
        """
        check_input("x", x, checked_against(self.W_K), self.embed_dim, any_lead=True)
        key, value = self.W_K(x), self.Omega_V(x)
        spec = AttentionSpec(self.embed_dim**-0.5)
        found = linear_map(self.Omega_Q, "Omega_Q", x, self.embed_dim)
        query_map = {name: t.to(key.dtype) for name, t in found._asdict().items() if t is not None}
        function = AttentionMap(spec, QueryMap(1), True, ("key", "value", *query_map))
        lead = x.shape[:-2]
        flat = value.reshape(-1, *x.shape[-2:])
        args = (key.reshape(-1, 1, *x.shape[-2:]), flat[:, None], *query_map.values())
        y = flat
        history = [value.clone()] if track else None
        for _ in range(self.n_iters):
            y = function(y, *args)
            if history is not None:
                history.append(y.reshape(*lead, *x.shape[-2:]).clone())
        y = y.reshape(*lead, *x.shape[-2:])
        if torch.compiler.is_compiling():
            message = "The output holds NaN or Inf: check the input and the weights."
            y = required(y, torch.isfinite(y).all(), message)
        elif not maps.transforms_active() and not bool(torch.isfinite(y).all()):
            raise non_finite({"x": x, **dict(self.named_parameters())})
        return y if history is None else (y, history)

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        return f"embed_dim={self.embed_dim}, n_iters={self.n_iters}"
