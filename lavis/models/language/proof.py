"""What a language model can do is shown on the model itself, when it is built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lavis.common.errors import ConfigError, first_line
from lavis.models.compute.attention import PACKED
from lavis.models.compute.masks import Documents
from lavis.models.language.causal import OTHER, CausalLM

logger = logging.getLogger(__name__)

_LENGTHS = (5, 9, 13)
_PREFIX = 3
_PIECES = (5, 1, 7)
# Largest difference, relative to the vector's length. A choice of experts may flip by rounding, so
# that in half precision a quarter of the tokens may differ by more; a wrong mask spares none.
_TOLERANCE = {torch.float32: (1e-4, 1.0), torch.float16: (1e-2, 0.75), torch.bfloat16: (5e-2, 0.75)}


class _Roomy(DynamicLayer):
    """Buffers that go on after the last key, as a conversation's do."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        return F.pad(keys, (0, 0, 0, 4), value=3.0), F.pad(values, (0, 0, 0, 4), value=7.0)


@torch.no_grad()
def prove(
    llm: CausalLM, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> CausalLM:
    """Compare the fast path with the family's own, on random tokens, and set what holds.

    Args:
        device: where it computes; by default where its parameters are.
        dtype: what it computes in; by default that of its parameters.

    Raises:
        ConfigError: not even documents one by one come out right, or the logits do not come from
            the head in a known way.
    """
    was_training = llm.training
    llm.eval()
    device = device or next(llm.parameters()).device
    tolerance = _TOLERANCE[dtype or llm.head.weight.dtype]
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(llm.vocab_size, (1, sum(_LENGTHS)), generator=draw).to(device)
    documents = list(row.split(_LENGTHS, dim=1))
    for ids in documents[1:]:
        ids[:, :_PREFIX] = documents[0][:, :_PREFIX]
    try:
        wanted = _stock(llm, documents)
    except Exception as error:  # whatever a family that nobody tried may raise
        raise ConfigError(
            f"{type(llm.model).__name__} does not run here: {first_line(error)}; {OTHER}"
        ) from error
    after = torch.cat([h[:, _PREFIX:] for h in wanted.split(_LENGTHS, dim=1)], dim=1)
    if not llm.packs:
        llm.run_plainly("its attention function cannot be replaced")
    elif reason := _wrong(lambda: _packed(llm, documents), wanted, tolerance):
        llm.run_plainly(f"packed, they differ from each alone ({reason})")
    elif reason := _wrong(lambda: _packed(llm, documents, _PREFIX), after, tolerance):
        llm.run_plainly(f"after a prefix, they differ from each whole ({reason})")
    elif reason := _wrong(
        lambda: _cached(llm, documents[-1]), wanted[:, -_LENGTHS[-1] :], tolerance
    ):
        llm.caches = False
        logger.info(
            "%s: nothing is kept between turns of a conversation (%s)",
            type(llm.model).__name__, reason,
        )  # fmt: skip
    if not llm.packs and (reason := _wrong(lambda: _packed(llm, documents), wanted, tolerance)):
        raise ConfigError(
            f"{type(llm.model).__name__} cannot be used: read as embeddings, a text gives another "
            f"result than read as tokens ({reason}); {OTHER}"
        )
    _set_head(llm, documents[-1], tolerance[0])
    llm.proven = True
    return llm.train(was_training)


def _stock(llm: CausalLM, documents: list[Tensor]) -> Tensor:
    """Hidden states of each document alone, by the family's own attention, from ids."""
    model = llm.model
    if llm.packs:
        model.set_attn_implementation("eager")
    try:
        rows = [llm.base(input_ids=ids, use_cache=False).last_hidden_state for ids in documents]
    finally:
        if llm.packs:
            model.set_attn_implementation(PACKED)
    return torch.cat(rows, dim=1)


def _packed(llm: CausalLM, documents: list[Tensor], skipped: int = 0) -> Tensor:
    """Documents in one row, after a prefix of ``skipped`` tokens that is computed once."""
    prefix = llm.prefix(documents[0][:, :skipped])[1] if skipped else ()
    row = torch.cat([ids[:, skipped:] for ids in documents], dim=1)
    positions = torch.cat([torch.arange(skipped, ids.shape[1]) for ids in documents])[None]
    lengths = tuple(ids.shape[1] - skipped for ids in documents)
    embeds = llm.embed(row)
    return llm.hidden(embeds, positions.to(row.device), documents=Documents(lengths, prefix))


def _cached(llm: CausalLM, ids: Tensor) -> Tensor:
    """A document in pieces, as a conversation is read."""
    cache = Cache(layer_class_to_replicate=_Roomy)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    pieces = (x.split(_PIECES, dim=1) for x in (llm.embed(ids), positions))
    return torch.cat([llm.hidden(e, p, cache=cache) for e, p in zip(*pieces, strict=True)], dim=1)


def _wrong(compute: Callable[[], Tensor], wanted: Tensor, tolerance: tuple[float, float]) -> str:
    """Why the result is not what is wanted; empty if it is."""
    try:
        got = compute()
    except Exception as error:  # noqa: BLE001  whatever a family that nobody tried may raise
        return first_line(error)
    limit, share = tolerance
    errors = (got.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    worst = float(errors.flatten().sort().values[int(share * (errors.numel() - 1))])
    return "" if worst <= limit else f"by {worst:.1e} of a vector's length"


def _set_head(llm: CausalLM, ids: Tensor, limit: float) -> None:
    """Find scale and soft cap: how the stock model's logits come from the head's output.

    Logits are made large on the way, since a cap hardly bends small ones.
    """
    hidden = llm.hidden(llm.embed(ids), torch.arange(ids.shape[1], device=ids.device)[None])
    raw = llm.head(hidden).float()
    gain = 100 / float(raw.abs().max())
    hook = llm.head.register_forward_hook(lambda module, args, output: output * gain)
    try:
        wanted = llm.model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    raw = raw * gain
    measured = float((wanted * raw).sum() / raw.square().sum())
    for scale, cap in _candidates(llm.model.config.to_dict(), measured):
        got = raw * scale if cap is None else cap * (raw * scale / cap).tanh()
        if (got - wanted).norm() <= limit * wanted.norm():
            llm.logit_scale, llm.softcap = scale, cap
            break
    else:
        raise ConfigError(
            f"{type(llm.model).__name__} computes its logits in a way that is not known here: "
            f"neither scaled nor capped; {OTHER}"
        )
    if not llm.chunked:
        logger.info(
            "%s: the logits of all supervised tokens are held at once: its head has %s",
            type(llm.model).__name__, "a bias" if cap is None else "a soft cap",
        )  # fmt: skip


def _candidates(config: dict[str, Any], measured: float) -> Iterator[tuple[float, float | None]]:
    """Scales and caps, likely ones first. A measured scale is a number of the configuration."""
    numbers = {k: v for k, v in config.items() if type(v) in (int, float) and v > 0}
    yield from ((1.0, float(v)) for k, v in numbers.items() if "softcap" in k or "soft_cap" in k)
    yield 1.0, None
    known = [x for v in numbers.values() for x in (float(v), 1 / v)]
    near = min(known, key=lambda x: abs(x - measured), default=measured)
    if abs(near - measured) <= 1e-2 * abs(measured):
        yield near, None
    yield measured, None
