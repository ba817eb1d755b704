"""The training step, as :class:`lavis.models.compute.schedule.StepSchedule` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis.common.device import to_device
from lavis.common.types import IGNORE_INDEX, Batch
from lavis.models.compute.masks import Documents

if TYPE_CHECKING:
    from lavis.models.vlm import VLM


@dataclass(frozen=True)
class LossOutput:
    """What a training step needs.

    Attributes:
        loss_sum: scalar, cross-entropy summed over the batch's supervised tokens, in nats.
        num_tokens: how many there are.
    """

    loss_sum: Tensor
    num_tokens: int


def packed_loss(model: VLM, batch: Batch) -> LossOutput:
    """Summed cross-entropy of a packed batch. Documents do not see each other.

    Raises:
        DataError: images and placeholders do not match.
    """
    features = model.encode_spans(batch.spans)
    if model.schedule.reference:
        return _reference_loss(model, batch, features)
    prefix = model.constant_prefix()
    skipped = 0 if prefix is None or not prefix.opens(batch) else prefix.length
    kept = batch.position_ids[0] >= skipped
    documents = Documents(
        tuple(n - skipped for n in batch.lengths),
        prefix.keys_and_values if prefix is not None and skipped else (),
        square=not model.schedule.packed_attention,
    )
    embeds = model.embed(batch.input_ids[:, kept], features)
    positions = to_device(batch.position_ids[:, kept], embeds.device)
    hidden = model.language.hidden(embeds, positions, documents=documents)
    output = supervised_loss(model, hidden, batch.labels[:, kept])
    if prefix is None or not skipped:
        return output
    return LossOutput(
        output.loss_sum + prefix.loss_sum * len(batch.lengths),
        output.num_tokens + prefix.num_supervised * len(batch.lengths),
    )


def supervised_loss(model: VLM, hidden: Tensor, labels: Tensor) -> LossOutput:
    """Summed loss and number of the supervised positions of (B, T) rows; labels on the host."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    supervised = (targets != IGNORE_INDEX).nonzero()[:, 0]
    rows = hidden.flatten(0, 1)
    if model.schedule.supervised_head and not model.schedule.reference:
        rows = rows.index_select(0, to_device(supervised, rows.device))
        loss = model.language.loss(rows, to_device(targets[supervised], rows.device))
    else:
        logits = model.language.logits(rows)
        loss = F.cross_entropy(logits, to_device(targets, rows.device), reduction="sum")
    return LossOutput(loss, len(supervised))


def _reference_loss(model: VLM, batch: Batch, features: Tensor | None) -> LossOutput:
    """The original's step: a row for each document, padded to ``max_txt_len``."""
    shape = (len(batch.lengths), max(model.encoder.max_txt_len, *batch.lengths))
    mask = torch.arange(shape[1]) < torch.tensor(batch.lengths)[:, None]
    ids = batch.input_ids.new_full(shape, model.tokenizer.pad_id)
    labels = batch.labels.new_full(shape, IGNORE_INDEX)
    ids[mask], labels[mask] = batch.input_ids[0], batch.labels[0]
    embeds = model.embed(ids, features)
    positions = torch.arange(shape[1], device=embeds.device).expand(shape)
    mask = to_device(mask, embeds.device)
    hidden = model.language.hidden(embeds, positions, mask=mask)
    return supervised_loss(model, hidden, labels)
