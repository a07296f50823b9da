"""The class that the project grew from, word for word but for layout: dense, ten unrolled iterations."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class ImplicitQueryAttentionLinearV(nn.Module):
    def __init__(self, embed_dim, n_iters=10):
        super().__init__()
        self.embed_dim = embed_dim
        self.n_iters = n_iters
        # Linear transforms
        self.Omega_Q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_K = nn.Linear(embed_dim, embed_dim, bias=False)
        self.Omega_V = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x, track=False):
        """
        x: (B, N, D) input
        track: bool, store intermediate y for visualization
        Returns:
            y: converged output
            y_history: list of y per iteration if track=True
        """
        K = self.W_K(x)  # Keys from input
        V = self.Omega_V(x)  # Values from input
        y = V.clone()  # Initialize y with V
        y_history = [y.clone()] if track else None

        for _ in range(self.n_iters):
            Q = self.Omega_Q(y)  # Queries depend on output y
            attn_scores = torch.matmul(K, Q.transpose(-2, -1)) / (self.embed_dim**0.5)
            attn_probs = F.softmax(attn_scores, dim=-1)
            y = torch.matmul(attn_probs, V)  # Apply linear values
            if track:
                y_history.append(y.clone())

        return (y, y_history) if track else y
