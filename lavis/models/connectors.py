"""What is trained between a vision encoder and a language model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lavis.common.errors import ConfigError
from lavis.models.config import (
    LinearConfig,
    MergeConfig,
    MlpConfig,
    PoolConfig,
    ResamplerConfig,
)


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
        return features

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = super().forward(features)
        return out


class Merge(Mlp):
    """Each square of ``size`` x ``size`` features becomes one, then an MLP: (N, Q / size^2, C).

    They are concatenated, as in InternVL (Chen et al. 2024, pixel unshuffle, section 3.2).
    """

    def __init__(self, config: MergeConfig, width: int, out: int) -> None:
        super().__init__(config, width * config.size**2, out)
        self.size = config.size

    @staticmethod
    def tokens(config: MlpConfig, features: int) -> int:
        """As its base says.

        Raises:
            ConfigError: the features are no square grid that ``size`` divides.
        """
        assert isinstance(config, MergeConfig)
        return (_side(config, features) // config.size) ** 2

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.join(squares(features, self.size)))

    def join(self, squares: Tensor) -> Tensor:
        """(N, Q / size^2, size^2, D) -> one vector of each square."""
        return squares.flatten(2)


class Pool(Merge):
    """The mean of each square of ``size`` x ``size`` features, then an MLP."""

    def __init__(self, config: PoolConfig, width: int, out: int) -> None:
        Mlp.__init__(self, config, width, out)
        self.size = config.size

    def join(self, squares: Tensor) -> Tensor:
        """(N, Q / size^2, size^2, D) -> (N, Q / size^2, D)."""
        return squares.mean(2)


class Resampler(nn.Module):
    """Learned queries attend to the features: (N, Q, D) -> (N, queries, C).

    Layers of a transformer decoder in the features' width, as in Flamingo (Alayrac et al. 2022,
    section 2.1) with self-attention apart.
    """

    def __init__(self, config: ResamplerConfig, width: int, out: int) -> None:
        super().__init__()
        heads = max(n for n in range(1, width // 64 + 2) if width % n == 0)
        self.queries = nn.Parameter(torch.randn(config.queries, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.depth, nn.LayerNorm(width))
        self.proj = nn.Linear(width, out)

    @staticmethod
    def tokens(config: ResamplerConfig, features: int) -> int:
        return config.queries

    def forward(self, features: Tensor) -> Tensor:
        queries = self.queries.expand(len(features), -1, -1)
        out: Tensor = self.proj(self.decoder(queries, self.norm(features)))
        return out


def squares(features: Tensor, size: int) -> Tensor:
    """(N, H * H, D), a grid row by row -> (N, H * H / size^2, size^2, D), its squares so."""
    rows = math.isqrt(features.shape[1]) // size
    grid = features.unflatten(1, (rows, size, rows, size))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _side(config: MergeConfig, features: int) -> int:
    """Features of a side of the grid; errors as :meth:`Merge.tokens`."""
    side = math.isqrt(features)
    if side**2 != features:
        raise ConfigError(
            f"model.connector.name: {config.name} needs a square grid, and the vision encoder "
            f"gives {features} features (a class token that is kept is no part of a grid); take "
            "linear, mlp or resampler"
        )
    if side % config.size:
        divisors = [n for n in range(2, side + 1) if side % n == 0]
        raise ConfigError(
            f"model.connector.size is {config.size}, which does not divide the grid of {side} x "
            f"{side} features; take one of {', '.join(map(str, divisors))}"
        )
    return side
