"""What is trained between a vision encoder and a language model."""

from __future__ import annotations

from torch import Tensor, nn

from lavis.models.config import LinearConfig, MlpConfig


class Linear(nn.Linear):
    """One linear layer: (N, Q, D) -> (N, Q, C)."""

    def __init__(self, config: LinearConfig, width: int, out: int) -> None:
        super().__init__(width, out)

    @staticmethod
    def tokens(config: LinearConfig, features: int) -> int:
        """Positions that an image takes in the text, of its number of features."""
        return features


class Mlp(nn.Sequential):
    """``depth`` linear layers with GELU between them: (N, Q, D) -> (N, Q, C)."""

    def __init__(self, config: MlpConfig, width: int, out: int) -> None:
        layers: list[nn.Module] = [nn.Linear(width, out)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(out, out)]
        super().__init__(*layers)

    @staticmethod
    def tokens(config: MlpConfig, features: int) -> int:
        """Positions that an image takes in the text, of its number of features."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        """(N, Q, D) -> (N, Q, C)."""
        out: Tensor = super().forward(features)
        return out
