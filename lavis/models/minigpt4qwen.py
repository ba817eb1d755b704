"""MiniGPT4Qwen: EVA ViT-g -> Q-Former -> one linear layer -> Qwen.

Submodules carry the original's names (``visual_encoder``, ``ln_vision``, ``query_tokens``,
``Qformer``, ``llm_proj``, ``llm_model``).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig

from lavis.common.errors import ConfigError, DataError
from lavis.common.types import IGNORE_INDEX, Batch
from lavis.models.attention import Documents, KeysAndValues, document_lengths
from lavis.models.checkpoint import load_model_state
from lavis.models.config import MiniGPT4QwenConfig
from lavis.models.eva import build_vit, load_vit
from lavis.models.frozen_linear import widen_frozen_linears
from lavis.models.generation import GenerationMixin
from lavis.models.head import autocast_dtype, head_loss
from lavis.models.keys import FULL_MODEL, QFORMER
from lavis.models.qformer import build_qformer, qformer_config
from lavis.models.qwen import QwenSpec, add_lora, load_llm, new_llm, read_spec
from lavis.models.schedule import StepSchedule
from lavis.models.weights import load_weights, open_pth, own_trainable
from lavis.processors.conversation import ConversationEncoder
from lavis.processors.tokenizer import QwenTokenizer

logger = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "auto": None}
_VIT_NORM_EPS = 1e-5


@dataclass(frozen=True)
class LossOutput:
    """What a training step needs.

    Attributes:
        loss_sum: scalar, cross-entropy summed over the batch's supervised tokens, in nats.
        num_tokens: how many there are.
    """

    loss_sum: Tensor
    num_tokens: int


@dataclass(frozen=True)
class ConstantPrefix:
    """What every document begins with, up to the user's first word.

    Attributes:
        ids: P token ids.
        keys_and_values: of each layer, (1, heads, P, head_dim).
        loss_sum: scalar, cross-entropy of its own supervised tokens, the same in every document.
        num_supervised: how many those are.
    """

    ids: tuple[int, ...]
    keys_and_values: tuple[KeysAndValues, ...]
    loss_sum: Tensor
    num_supervised: int

    @property
    def length(self) -> int:
        """P."""
        return len(self.ids)

    def opens(self, batch: Batch) -> bool:
        """Whether every document of a batch begins with it and goes on unsupervised."""
        positions, ids = batch.position_ids[0], batch.input_ids[0]
        own = torch.tensor(self.ids, device=ids.device)
        inside = positions < self.length
        whole = inside.sum() == self.length * int((positions == 0).sum())
        if not whole or not torch.equal(ids[inside], own[positions[inside]]):
            return False
        after = positions == self.length
        return int(after.sum()) * self.length == int(inside.sum()) and bool(
            (batch.labels[0][after] == IGNORE_INDEX).all()
        )


class MiniGPT4Qwen(GenerationMixin, nn.Module):
    """A frozen vision side and a frozen language model, joined by a linear projection."""

    Config = MiniGPT4QwenConfig
    key_map = FULL_MODEL

    def __init__(
        self,
        config: MiniGPT4QwenConfig,
        qformer: Blip2QFormerConfig,
        llm: nn.Module,
        spec: QwenSpec,
        encoder: ConversationEncoder,
        *,
        device: torch.device,
    ) -> None:
        """Assemble the parts; use :meth:`from_config`.

        The vision side is built on the meta device where its weights are to come from files.
        """
        super().__init__()
        self.config = config
        self.context = spec.context
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        meta = torch.device("meta")
        vit_device = device if config.is_from_scratch("vit") else meta
        qformer_device = device if config.is_from_scratch("qformer") else meta
        self.visual_encoder = build_vit(config, vit_device, _vit_dtype(config, device))
        with qformer_device:
            self.ln_vision = nn.LayerNorm(config.vit_config.embed_dim, eps=_VIT_NORM_EPS)
            self.Qformer = build_qformer(qformer)
            self.query_tokens = nn.Parameter(
                torch.randn(1, config.num_query_token, qformer.hidden_size)
                * qformer.initializer_range
            )
        self.llm_proj = nn.Linear(qformer.hidden_size, spec.config.hidden_size, device=device)
        self.llm_model = llm
        self._prefixes: dict[torch.dtype | None, ConstantPrefix] = {}
        self._schedule = StepSchedule()
        self.uniform_graph = False
        """Whether every batch calls the same parts, images or not: what processes that wait for
        each other inside a layer need. Strategies set it."""

    @classmethod
    def from_config(
        cls,
        config: MiniGPT4QwenConfig,
        *,
        cache_root: str = "cache",
        device: str | torch.device = "cpu",
    ) -> MiniGPT4Qwen:
        """Build the model and load its weights, each tensor straight to its final place.

        Random parts draw from PyTorch's global generator.

        Raises:
            WeightsError: a file is missing (found before anything is read), damaged, or unfit.
            ConfigError: sizes do not fit each other.
        """
        device = torch.device(device)
        config.check_files(cache_root)
        folder = config.path("llm_model", cache_root)
        encoder = cls.build_encoder(config, cache_root)
        scratch_llm = config.is_from_scratch("llm")
        spec = read_spec(folder, config.llm_config, need_file=not scratch_llm)
        _check_fit(config, spec, encoder.tokenizer)
        qformer = qformer_config(
            config.qformer_config,
            config.path("bert_config", cache_root),
            config.vit_config.embed_dim,
        )
        dtype = _DTYPES[config.llm_precision]
        if scratch_llm:
            llm = new_llm(spec, device=device, dtype=dtype, embedding_std=config.llm_embedding_std)
        else:
            target = torch.device("cpu") if config.llm_device_map == "auto" else device
            llm = load_llm(spec, folder, device=target, dtype=dtype)
        model = cls(config, qformer, llm, spec, encoder, device=device)
        model._load_vision(cache_root, device)
        model._set_trainable()
        if config.lora is not None:
            add_lora(llm, config.lora)
            llm.to(device)
        model.schedule = StepSchedule(recompute="all" if config.llm_grad_ckpt else "none")
        own_trainable(model)
        widen_frozen_linears(model)
        if config.load_finetuned:
            model.load_checkpoint(config.path("finetuned", cache_root))
        if config.llm_device_map == "auto":
            _dispatch(llm)
        return model.train(False)

    @classmethod
    def build_encoder(cls, config: MiniGPT4QwenConfig, cache_root: str) -> ConversationEncoder:
        """What turns conversations into this model's ids and labels; reads only the vocabulary."""
        tokenizer = QwenTokenizer(config.path("llm_model", cache_root) / "qwen.tiktoken")
        return ConversationEncoder(
            tokenizer, config.num_query_token, config.max_txt_len, config.label_mask
        )

    @property
    def device(self) -> torch.device:
        """Where images and the projection are."""
        return self.llm_proj.weight.device

    def forward(self, batch: Batch) -> LossOutput:
        """Summed cross-entropy of a packed batch.

        Documents do not see each other. :attr:`schedule` says what is saved on the way.

        Raises:
            DataError: images and placeholders do not match.
        """
        features = self.encode_spans(batch.pixel_values, batch.word_ids, batch.described)
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
        state = autocast_dtype(self.device)
        if state not in self._prefixes:
            ids, labels = self.encoder.constant_prefix()
            with torch.no_grad():
                output = self.llm_model.model(
                    input_ids=torch.tensor([ids], device=self.device), use_cache=True
                )
                row = torch.tensor([labels], device=self.device)
                loss_sum, num_tokens = self._head_loss(output.last_hidden_state, row)
            self._prefixes[state] = ConstantPrefix(
                tuple(ids),
                tuple((layer.keys, layer.values) for layer in output.past_key_values.layers),
                loss_sum,
                num_tokens,
            )
        return self._prefixes[state]

    def encode_vit(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) normalized images -> (N, 1 + patches, width) of the last ViT block.

        Raises:
            DataError: images of another shape.
        """
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise DataError(
                f"images have the shape {tuple(pixel_values.shape)}, not (N, 3, {size}, {size}) as "
                "model.image_size wants; check vis_processor.image_size"
            )
        amp = torch.is_autocast_enabled(self.device.type) and self.config.enable_autocast
        with torch.autocast(self.device.type, enabled=amp):
            weight = self.visual_encoder.patch_embed.proj.weight
            return self.visual_encoder(pixel_values.to(weight.device, weight.dtype))

    def encode_query(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, Q, D) Q-Former output, what the projection reads."""
        with contextlib.nullcontext() if self._vision_learns else torch.no_grad():
            image = self.ln_vision(self.encode_vit(pixel_values).to(self.ln_vision.weight.dtype))
            queries = self.query_tokens.expand(len(image), -1, -1)
            return self.Qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, Q, C) soft tokens of the language model's width C."""
        return self.llm_proj(self.encode_query(pixel_values).to(self.llm_proj.weight.dtype))

    def encode_spans(
        self, pixel_values: Tensor | None, word_ids: Tensor, described: Tensor
    ) -> Tensor | None:
        """Soft tokens of all image spans in order, from pictures and from words.

        Args:
            pixel_values: (N, 3, H, W).
            word_ids: (M, Q, W), filled up with -1.
            described: (N + M,) bool, which spans are words.

        Returns:
            (N + M, Q, C), or ``None`` without spans.
        """
        given = pixel_values is not None and len(pixel_values) > 0
        images = self.encode_image(pixel_values) if given else None  # type: ignore[arg-type]
        if images is None and self.uniform_graph:
            # Encoded with the others, used by nothing, with gradient zero.
            size = self.config.image_size
            images = self.encode_image(torch.zeros(1, 3, size, size, device=self.device))[:0]
        if not len(word_ids):
            return images
        words = self.embed_words(word_ids)
        if images is None:
            return words
        features = words.new_empty(len(described), *words.shape[1:])
        features[described], features[~described] = words, images.to(words)
        return features

    def embed_words(self, word_ids: Tensor) -> Tensor:
        """(M, Q, W) token ids -> (M, Q, C): a position is the sum of its words' embeddings."""
        there = word_ids >= 0
        embeds = self.llm_model.get_input_embeddings()(word_ids.where(there, 0))
        return (embeds * there[..., None]).sum(2)

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Token embeddings with image spans replaced by projected features.

        Args:
            input_ids: (B, T).
            image_embeds: (N, Q, C) in order of the spans, or ``None`` without images.

        Returns:
            (B, T, C) in the language model's precision.

        Raises:
            DataError: the number of image positions is not N * Q; features would be misplaced.
        """
        embeds = self.llm_model.get_input_embeddings()(input_ids)
        spans = input_ids == self.tokenizer.image_id
        given = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
        if int(spans.sum()) != given:
            raise DataError(
                f"the text has {int(spans.sum())} image positions but the images fill {given} "
                f"({self.config.num_query_token} each): every <ImageHere> needs one image"
            )
        if image_embeds is None:
            # Without images the projection still takes part, with gradient zero, so that every
            # rank and every micro-batch has the same graph.
            return embeds + 0.0 * (self.llm_proj.weight.sum() + self.llm_proj.bias.sum()).to(embeds)
        image_embeds = image_embeds.to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(spans[..., None], image_embeds.flatten(0, 1))

    def train(self, mode: bool = True) -> MiniGPT4Qwen:
        """Set training mode on what is trained; frozen parts stay in evaluation mode."""
        super().train(False)
        self.training = mode
        for module in self._learning_modules():
            module.train(mode)
        for layer in self.llm_model.model.layers:
            # Transformers recomputes a layer only if its own flag says training; the flags of its
            # submodules, which would switch dropout on, stay as they are.
            layer.training = layer.training or (mode and layer.gradient_checkpointing)
        return self

    def shardable_blocks(self) -> Iterator[nn.Module]:
        """Parts of like size that are used one after the other, once in a forward pass."""
        yield from self.visual_encoder.blocks
        yield from self.Qformer.encoder.layer
        yield from self.llm_model.model.layers
        yield self.llm_model.lm_head

    def training_flops(self, tokens: int, images: int) -> float:
        """Useful floating-point operations of a training step, attention scores left out.

        A parameter costs two in the forward pass, two for the gradient of its input and, if it
        learns, two for its own. Nothing frozen before the first trained part has a backward pass.
        """

        def cost(module: nn.Module, *, backward: bool) -> float:
            each = sum(
                p.numel() * (2 + 2 * backward + 2 * p.requires_grad) for p in module.parameters()
            )
            return float(each)

        vision = self._vision_learns
        patches = (self.config.image_size // self.config.vit_config.patch_size) ** 2 + 1
        queries = self.config.num_query_token
        per_image = patches * cost(self.visual_encoder, backward=vision)
        per_image += queries * cost(self.Qformer, backward=vision)
        per_image += queries * cost(self.llm_proj, backward=vision)
        layers = cost(self.llm_model.model.layers, backward=True)
        head = cost(self.llm_model.lm_head, backward=True)
        return tokens * (layers + head) + images * per_image

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def load_checkpoint(self, path: str | Any) -> None:
        """Load a checkpoint of this project or of the original.

        Raises:
            WeightsError: the file is damaged, does not fit, or lacks what is trained here.
        """
        load_model_state(self, path)

    @property
    def _vision_learns(self) -> bool:
        c = self.config
        frozen = c.freeze_vit and not c.unfreeze_pos_embed and c.freeze_qformer
        return not (frozen and c.freeze_queries)

    def _learning_modules(self) -> Iterator[nn.Module]:
        c = self.config
        if not c.freeze_vit:
            yield self.visual_encoder
        if not c.freeze_qformer:
            yield self.ln_vision
            yield self.Qformer
        if not c.freeze_proj:
            yield self.llm_proj
        if not c.freeze_llm:
            yield self.llm_model
        elif c.get_lora:
            yield from (m for n, m in self.llm_model.named_modules() if "lora_" in n)

    def _set_trainable(self) -> None:
        c = self.config
        self.requires_grad_(False)
        for module in self._learning_modules():
            module.requires_grad_(True)
        self.query_tokens.requires_grad_(not c.freeze_queries)
        if c.unfreeze_pos_embed:
            self.visual_encoder.pos_embed.requires_grad_(True)
        if c.use_grad_checkpoint:
            self.visual_encoder.set_grad_checkpointing(True)

    def _load_vision(self, cache_root: str, device: torch.device) -> None:
        c = self.config
        if not c.is_from_scratch("vit"):
            path = c.path("vit_weights", cache_root)
            dtype = _vit_dtype(c, device)
            load_vit(self.visual_encoder, path, device=device, dtype=dtype)
        if not c.is_from_scratch("qformer"):
            load_weights(
                self,
                open_pth(c.path("pretrained", cache_root)),
                QFORMER,
                device=device,
                dtype=torch.float32,
                select=lambda name: name.startswith(("query_tokens", "ln_vision.", "Qformer.")),
            )


def _is_whole(module: nn.Module) -> bool:
    """Whether a module's weight can be used without calling it, because it is not sharded."""
    weight = module.weight
    return not hasattr(weight, "ds_id") and type(weight.data) is Tensor


def _vit_dtype(config: MiniGPT4QwenConfig, device: torch.device) -> torch.dtype:
    if config.vit_precision == "fp16" and device.type == "cpu":
        logger.info("vit_precision: fp16 is computed in fp32 on a CPU, as in the original")
        return torch.float32
    dtype = _DTYPES[config.vit_precision]
    assert dtype is not None
    return dtype


def _check_fit(config: MiniGPT4QwenConfig, spec: QwenSpec, tokenizer: QwenTokenizer) -> None:
    if tokenizer.vocab_size > spec.config.vocab_size:
        raise ConfigError(
            f"model.llm_model: the vocabulary has {tokenizer.vocab_size} tokens, the language "
            f"model only {spec.config.vocab_size}"
        )
    if config.max_txt_len > spec.context:
        raise ConfigError(
            f"model.max_txt_len {config.max_txt_len} is past this language model's context of "
            f"{spec.context} (seq_length), where it would need dynamic NTK scaling"
        )


def _dispatch(llm: nn.Module) -> None:
    """Spread a language model's layers over the visible GPUs."""
    if torch.cuda.device_count() < 2:
        if torch.cuda.is_available():
            llm.to("cuda")
        return
    try:
        from accelerate import dispatch_model, infer_auto_device_map
    except ImportError as error:
        raise ConfigError(
            "model.llm_device_map: auto needs Accelerate: pip install 'accelerate>=1.0'"
        ) from error
    device_map = infer_auto_device_map(llm, no_split_module_classes=["Qwen2DecoderLayer"])
    dispatch_model(llm, device_map)
