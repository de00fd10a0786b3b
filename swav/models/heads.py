"""Projection head and prototypes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that torch's own documentation uses)


class ProjectionHead(nn.Module):
    """A 2-layer MLP onto the unit sphere (appendix A.1)."""

    def __init__(self, in_features: int, hidden: int, dim: int, *, batch_norm: bool) -> None:
        """Build.

        Args:
            in_features: size of the backbone's features.
            hidden: size of the hidden layer: 2048, 8192 for R50-w2 and w4, 10240 for R50-w5.
            dim: size of the embedding.
            batch_norm: normalise the hidden layer; R50-w5 does not.
        """
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden)
        self.norm = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.out = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, in_features] -> float32 embeddings [B, dim] of unit norm."""
        projected = self.out(F.relu(self.norm(self.hidden(features))))
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=1)


class Prototypes(nn.Module):
    """One or more sets of unit vectors that embeddings are scored against."""

    def __init__(self, num_prototypes: int, dim: int, *, num_heads: int = 1) -> None:
        super().__init__()
        heads = [nn.Parameter(F.normalize(torch.randn(num_prototypes, dim), dim=1)) for _ in range(num_heads)]
        self.heads = nn.ParameterList(heads)

    @torch.no_grad()
    def normalize(self) -> None:
        """Bring every prototype back to unit norm, in place."""
        for head in self.heads:
            head.copy_(F.normalize(head, dim=1))

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        """Embeddings [B, dim] -> per head, float32 scores [B, num_prototypes]."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return [embeddings.to(head.dtype) @ head.mT for head in self.heads]
