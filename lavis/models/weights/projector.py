"""The projector in a folder of LLaVA or BLIP-2, as a connector begins with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lavis.common.errors import ConfigError, WeightsError
from lavis.models.weights.files import open_shards, require_float
from lavis.models.weights.shards import read_json

_PROJECTOR = re.compile(
    r"(?:model\.)?(?:multi_modal_projector\.linear_(?P<n>\d)|language_projection)\.(weight|bias)"
)


@torch.no_grad()
def load_projector(connector: nn.Module, folder: Path, key: Callable[[str, str], str]) -> None:
    """Fill a connector of linear layers from a stock folder.

    A projector without activation is one layer: its two are multiplied.

    Args:
        key: what the user calls a setting of a part, for messages.

    Raises:
        WeightsError: the folder holds no projector, or one of another width.
        ConfigError: the connector is no such projector.
    """
    at = key("connector", "path")
    weights = open_shards(folder)
    found: dict[tuple[int, str], Tensor] = {}
    for name in weights:
        if match := _PROJECTOR.fullmatch(name):
            require_float(weights.label, name, weights[name])
            found[int(match["n"] or 1), match[2]] = weights[name].float()
    if not found:
        raise WeightsError(f"{at}: {folder} holds no projector of LLaVA or BLIP-2")
    count = max(n for n, _ in found)
    stored = [
        (found[n, "weight"], found.get((n, "bias"), torch.zeros(len(found[n, "weight"]))))
        for n in range(1, count + 1)
    ]
    act = read_json(folder / "config.json").get("projector_hidden_act", "gelu")
    if count == 2 and act == "linear":
        (first, shift), (second, more) = stored
        stored = [(second @ first, second @ shift + more)]
    elif count > 1 and act != "gelu":
        raise ConfigError(f"{at}: {folder} has {act!r} between its layers; connectors have gelu")
    layers = [m for m in connector.modules() if isinstance(m, nn.Linear)]
    others = [m for m in connector.modules() if next(m.parameters(False), None) is not None]
    if len(layers) != len(stored) or len(others) != len(layers):
        raise ConfigError(
            f"{at}: {folder} has a projector of {len(stored)} linear layers: set "
            f"{key('connector', 'name')}: {'linear' if len(stored) == 1 else 'mlp'}"
            + (f", depth: {len(stored)}" if len(stored) > 1 else "")
        )
    for layer, (weight, bias) in zip(layers, stored, strict=True):
        if layer.weight.shape != weight.shape:
            raise WeightsError(
                f"{at}: {folder} has a layer of shape {tuple(weight.shape)}, the connector one of "
                f"{tuple(layer.weight.shape)}: vision encoder or language model are others"
            )
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
