"""MiniGPT4Qwen: EVA ViT-g -> Q-Former -> one linear layer -> Qwen.

Submodules carry the original's names (``visual_encoder``, ``ln_vision``, ``query_tokens``,
``Qformer``, ``llm_proj``, ``llm_model``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig

from lavis.common.errors import ConfigError, DataError
from lavis.common.types import NO_FEATURES
from lavis.models.checkpoint import load_model_state
from lavis.models.config import MiniGPT4QwenConfig
from lavis.models.frozen_linear import widen_frozen_linears
from lavis.models.generation import GenerationMixin
from lavis.models.keys import FULL_MODEL
from lavis.models.prefix import ConstantPrefix
from lavis.models.qwen import QwenSpec, add_lora, load_llm, new_llm, read_spec
from lavis.models.schedule import StepSchedule
from lavis.models.step import TrainingStep
from lavis.models.vision import DTYPES, VisionSide, resolve_qformer
from lavis.models.weights import own_trainable
from lavis.processors.contracts import Tokenizer
from lavis.processors.conversation import ChatML, ConversationEncoder
from lavis.processors.tokenizer import QwenTokenizer

logger = logging.getLogger(__name__)


class MiniGPT4Qwen(TrainingStep, GenerationMixin, VisionSide):
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
        vision: bool = True,
    ) -> None:
        """Assemble the parts; use :meth:`from_config`.

        The vision side is built on the meta device where its weights are to come from files.
        """
        super().__init__(config)
        self.context = spec.context
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        if vision:
            self.add_vision(qformer, device)
        self.llm_proj = nn.Linear(qformer.hidden_size, spec.config.hidden_size, device=device)
        self.width = qformer.hidden_size
        self.llm_model = llm
        self._prefixes: dict[tuple[Any, ...], ConstantPrefix] = {}
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
        vision: bool = True,
    ) -> MiniGPT4Qwen:
        """Build the model and load its weights, each tensor straight to its final place.

        Random parts draw from PyTorch's global generator. Without ``vision`` the model has
        neither ViT nor Q-Former, and reads features in place of images.

        Raises:
            WeightsError: a file is missing (found before anything is read), damaged, or unfit.
            ConfigError: sizes do not fit each other.
        """
        device = torch.device(device)
        config.check_files(cache_root)
        encoder, spec, qformer = cls.describe(config, cache_root)
        folder = config.path("llm_model", cache_root)
        dtype = DTYPES[config.llm_precision]
        if config.is_from_scratch("llm"):
            llm = new_llm(spec, device=device, dtype=dtype, embedding_std=config.llm_embedding_std)
        else:
            target = torch.device("cpu") if config.llm_device_map == "auto" else device
            llm = load_llm(spec, folder, device=target, dtype=dtype)
        model = cls(config, qformer, llm, spec, encoder, device=device, vision=vision)
        if vision:
            model.load_vision(cache_root, device)
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
    def describe(
        cls, config: MiniGPT4QwenConfig, cache_root: str
    ) -> tuple[ConversationEncoder, QwenSpec, Blip2QFormerConfig]:
        """What the small files beside the weights say.

        Raises:
            WeightsError, ConfigError: as :meth:`from_config`; no weight has been read.
        """
        encoder = cls.build_encoder(config, cache_root)
        need_file = not config.is_from_scratch("llm")
        spec = read_spec(
            config.path("llm_model", cache_root), config.llm_config, need_file=need_file
        )
        _check_fit(config, spec, encoder.tokenizer)
        return encoder, spec, resolve_qformer(config, cache_root)

    @classmethod
    def build_encoder(cls, config: MiniGPT4QwenConfig, cache_root: str) -> ConversationEncoder:
        """What turns conversations into this model's ids and labels; reads only the vocabulary."""
        tokenizer = QwenTokenizer(config.path("llm_model", cache_root) / "qwen.tiktoken")
        return ConversationEncoder(
            tokenizer,
            ChatML(tokenizer),
            config.num_query_token,
            config.max_txt_len,
            config.label_mask,
        )

    @property
    def device(self) -> torch.device:
        """Where images and the projection are."""
        return self.llm_proj.weight.device

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, Q, C) soft tokens of the language model's width C."""
        return self.llm_proj(self.encode_query(pixel_values).to(self.llm_proj.weight.dtype))

    def encode_spans(
        self,
        pixel_values: Tensor | None,
        word_ids: Tensor,
        described: Tensor,
        query_features: Tensor = NO_FEATURES,
    ) -> Tensor | None:
        """Soft tokens of all image spans in order, from pictures and from words.

        Args:
            pixel_values: (N, 3, H, W).
            word_ids: (M, Q, W), filled up with -1.
            described: (N + M,) bool, which spans are words.
            query_features: (N, Q, D), what :meth:`encode_query` gave, in place of pictures.

        Returns:
            (N + M, Q, C), or ``None`` without spans.
        """
        proj = self.llm_proj.weight
        images = None
        if len(query_features):
            images = self.llm_proj(query_features.to(proj.device, proj.dtype))
        elif pixel_values is not None and len(pixel_values):
            images = self.encode_image(pixel_values)
        elif self.uniform_graph:
            # Encoded with the others, used by nothing, with gradient zero.
            c = self.config
            if self.visual_encoder is None:
                images = self.llm_proj(proj.new_zeros(1, c.num_query_token, self.width))[:0]
            else:
                blank = torch.zeros(1, 3, c.image_size, c.image_size, device=self.device)
                images = self.encode_image(blank)[:0]
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
        if self.visual_encoder is not None:
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

        vision = bool(self.config.trained_vision)
        patches = (self.config.image_size // self.config.vit_config.patch_size) ** 2 + 1
        queries = self.config.num_query_token
        per_image = queries * cost(self.llm_proj, backward=vision)
        if self.visual_encoder is not None:
            per_image += patches * cost(self.visual_encoder, backward=vision)
            per_image += queries * cost(self.Qformer, backward=vision)
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
        self._prefixes.clear()  # the file may hold other language model weights

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
        if self.query_tokens is not None:
            self.query_tokens.requires_grad_(not c.freeze_queries)
        if c.unfreeze_pos_embed:
            self.visual_encoder.pos_embed.requires_grad_(True)
        if c.use_grad_checkpoint and self.visual_encoder is not None:
            self.visual_encoder.set_grad_checkpointing(True)


def _check_fit(config: MiniGPT4QwenConfig, spec: QwenSpec, tokenizer: Tokenizer) -> None:
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
    from accelerate import dispatch_model, infer_auto_device_map

    device_map = infer_auto_device_map(llm, no_split_module_classes=["Qwen2DecoderLayer"])
    dispatch_model(llm, device_map)
