"""The training step, as :class:`lavis.models.schedule.StepSchedule` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from lavis.common.types import IGNORE_INDEX, Batch
from lavis.models.attention import Documents, document_lengths
from lavis.models.head import autocast_dtype, head_loss
from lavis.models.prefix import ConstantPrefix
from lavis.models.schedule import StepSchedule
from lavis.processors.contracts import Tokenizer
from lavis.processors.conversation import ConversationEncoder


@dataclass(frozen=True)
class LossOutput:
    """What a training step needs.

    Attributes:
        loss_sum: scalar, cross-entropy summed over the batch's supervised tokens, in nats.
        num_tokens: how many there are.
    """

    loss_sum: Tensor
    num_tokens: int


class TrainingStep:
    """Loss of a packed batch. Mixed into a model that has the attributes below."""

    config: Any
    encoder: ConversationEncoder
    tokenizer: Tokenizer
    llm_model: Any
    encode_spans: Any
    embed: Any
    device: Any
    training: bool
    train: Any
    _schedule: StepSchedule
    _prefixes: dict[tuple[Any, ...], ConstantPrefix]

    def forward(self, batch: Batch) -> LossOutput:
        """Summed cross-entropy of a packed batch.

        Documents do not see each other. :attr:`schedule` says what is saved on the way.

        Raises:
            DataError: images and placeholders do not match.
        """
        features = self.encode_spans(
            batch.pixel_values, batch.word_ids, batch.described, batch.query_features
        )
        if self.schedule.reference:
            return self._reference_loss(batch, features)
        prefix = self._constant_prefix()
        skipped = 0 if prefix is None or not prefix.opens(batch) else prefix.length
        kept = batch.position_ids[0] >= skipped
        lengths = document_lengths(batch.document_ids)
        documents = Documents(
            tuple(n - skipped for n in lengths),
            prefix.keys_and_values if prefix is not None and skipped else (),
            square=not self.schedule.packed_attention,
        )
        hidden = self.llm_model.model(
            inputs_embeds=self.embed(batch.input_ids[:, kept], features),
            position_ids=batch.position_ids[:, kept],
            attention_mask={"full_attention": None},  # attention knows the documents
            documents=documents,
            use_cache=False,
        ).last_hidden_state
        loss_sum, num_tokens = self._head_loss(hidden, batch.labels[:, kept])
        if prefix is not None and skipped:
            loss_sum = loss_sum + prefix.loss_sum * len(lengths)
            num_tokens += prefix.num_supervised * len(lengths)
        return LossOutput(loss_sum, num_tokens)

    def _head_loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Summed loss and number of the supervised positions of (B, T) rows."""
        hidden, targets = hidden[:, :-1], labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        num_tokens = int(supervised.sum())
        head = self.llm_model.lm_head
        if self.schedule.supervised_head and not self.schedule.reference:
            hidden, targets = hidden[supervised], targets[supervised]
            if _is_whole(head):
                return head_loss(hidden, head.weight, targets), num_tokens
        logits = head(hidden).float()
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
        return loss, num_tokens

    def _reference_loss(self, batch: Batch, features: Tensor | None) -> LossOutput:
        """The original's step: a row for each document, padded to ``max_txt_len``."""
        lengths = document_lengths(batch.document_ids)
        shape = (len(lengths), max(self.config.max_txt_len, *lengths))
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        mask = mask.to(batch.input_ids.device)
        ids = batch.input_ids.new_full(shape, self.tokenizer.eod_id)
        labels = batch.labels.new_full(shape, IGNORE_INDEX)
        ids[mask], labels[mask] = batch.input_ids[0], batch.labels[0]
        hidden = self.llm_model.model(
            inputs_embeds=self.embed(ids, features),
            attention_mask=mask.long(),
            use_cache=False,
        ).last_hidden_state
        return LossOutput(*self._head_loss(hidden, labels))

    @property
    def schedule(self) -> StepSchedule:
        """How a training step is computed."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: StepSchedule) -> None:
        self._schedule = schedule
        every = schedule.recompute_every
        self.llm_model.activation_checkpointing_disable()
        if every:
            self.llm_model.activation_checkpointing_enable({"use_reentrant": False}, every)
        if schedule.compile:
            for layer in self.llm_model.model.layers:
                layer.compile(dynamic=True)
        self.train(self.training)

    def _constant_prefix(self) -> ConstantPrefix | None:
        """What all documents begin with, computed once: the language model is frozen."""
        if not self.schedule.prefix_cache or any(
            p.requires_grad for p in self.llm_model.parameters()
        ):
            return None
        weight = self.llm_model.get_input_embeddings().weight
        state = (self.device, weight.dtype, autocast_dtype(self.device))
        if state not in self._prefixes:
            ids, labels = self.encoder.constant_prefix()
            cache = DynamicCache()
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # once: not worth it
                output = self.llm_model.model(
                    input_ids=torch.tensor([ids], device=self.device), cache=cache, use_cache=True
                )
                row = torch.tensor([labels], device=self.device)
                loss_sum, num_tokens = self._head_loss(output.last_hidden_state, row)
            self._prefixes[state] = ConstantPrefix(
                tuple(ids),
                tuple((layer.keys, layer.values) for layer in cache.layers),
                loss_sum,
                num_tokens,
            )
        return self._prefixes[state]


def _is_whole(module: nn.Module) -> bool:
    """Whether a module's weight can be used without calling it, because it is not sharded."""
    weight = module.weight
    return not hasattr(weight, "ds_id") and type(weight.data) is Tensor
