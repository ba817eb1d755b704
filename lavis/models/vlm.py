"""A frozen vision encoder and a frozen language model, joined by a connector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lavis.common.device import to_device
from lavis.common.errors import ConfigError, DataError
from lavis.common.types import Batch, Spans
from lavis.models.compute.head import autocast_dtype
from lavis.models.compute.prefix import ConstantPrefix
from lavis.models.compute.quantized_linear import count_weights
from lavis.models.compute.schedule import StepSchedule
from lavis.models.config import PartsConfig, PartTraining
from lavis.models.contracts import VisionEncoder
from lavis.models.decode import Prompts, answers
from lavis.models.generation import Generator, History
from lavis.models.language.causal import CausalLM
from lavis.models.language.proof import prove
from lavis.models.step import LossOutput, packed_loss, supervised_loss
from lavis.models.weights.original import KeyMap
from lavis.models.weights.trained import load_model_state
from lavis.processors.conversation import ConversationEncoder

if TYPE_CHECKING:
    from PIL import Image


class VLM(nn.Module):
    """Images and text -> text. Parts are put together by :func:`lavis.models.build.build`.

    Attributes:
        vision: encodes images; ``None`` where features are read in their place.
        connector: (N, Q, D) features -> (N, Q, C) soft tokens.
        language: reads embeddings.
        encoder: makes ids and labels of conversations.
        key_map: how names in a checkpoint relate to the model's.
        features: (Q, D), the shape of an image's features.
        image_size: pixels of a side that the vision encoder reads.
        schedule: how a training step is computed; see :meth:`set_schedule`.
        uniform_graph: whether every batch calls the same parts, images or not: what processes that
            wait for each other inside a layer need. Strategies set it.
        sharded: whether processes hold parts of each other's layers, and so must generate together.
            Strategies set it.
        vis_processor: makes tensors of pictures and files, if the model was loaded with it.
    """

    def __init__(
        self,
        config: PartsConfig,
        vision: VisionEncoder | None,
        connector: nn.Module,
        language: CausalLM,
        encoder: ConversationEncoder,
        *,
        key_map: KeyMap,
        features: tuple[int, int],
        image_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.connector = connector
        self.language = language
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self.key_map, self.features, self.image_size = key_map, features, image_size
        self.context = language.context
        self.uniform_graph = self.sharded = False
        self.vis_processor: Callable[[Image.Image], Tensor] | None = None
        self._prefixes: dict[tuple[Any, ...], ConstantPrefix | None] = {}
        self.schedule = StepSchedule()

    @property
    def device(self) -> torch.device:
        """Where images and the connector are."""
        return next(self.connector.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the language model's layers, nearly all of the work, compute in."""
        return self.language.head.weight.dtype

    def forward(self, batch: Batch) -> LossOutput:
        """Summed cross-entropy of a packed batch, as :attr:`schedule` says.

        Raises:
            DataError: images and placeholders do not match.
        """
        return packed_loss(self, batch)

    def encode_query(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, Q, D) features.

        Raises:
            DataError: images of another shape.
            ConfigError: the model was built without its vision encoder.
        """
        if self.vision is None:
            raise ConfigError(
                "this model was built without its vision side, for cached features; to show it "
                "images, build it with run.feature_cache.enabled: false"
            )
        features: Tensor = self.vision(pixel_values)
        return features

    def connect(self, features: Tensor) -> Tensor:
        """(N, Q, D) features -> (N, Q, C) soft tokens."""
        soft: Tensor = self.connector(features.to(next(self.connector.parameters()).dtype))
        return soft

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, Q, C) soft tokens of the language model's width C."""
        return self.connect(self.encode_query(pixel_values))

    def encode_spans(self, spans: Spans) -> Tensor | None:
        """Soft tokens of all image spans in order, from pictures and from words.

        Args:
            spans: may be on the host.

        Returns:
            (N + M, Q, C), or ``None`` without spans.
        """
        images = None
        if len(spans.features):
            images = self.connect(to_device(spans.features, self.device))
        elif len(spans.pixels):
            images = self.encode_image(to_device(spans.pixels, self.device))
        elif self.uniform_graph:
            # Encoded with the others, used by nothing, with gradient zero.
            if self.vision is None:
                images = self.connect(torch.zeros(1, *self.features, device=self.device))[:0]
            else:
                side = self.image_size
                blank = torch.zeros(1, 3, side, side, device=self.device)
                images = self.encode_image(blank)[:0]
        if not len(spans.words):
            return images
        words = self.embed_words(spans.words)
        if images is None:
            return words
        # The first sorting takes the pictures' spans, then the words'; the second one inverts it.
        order = torch.tensor(spans.kinds).argsort(stable=True).argsort()
        return torch.cat([images.to(words), words]).index_select(0, to_device(order, words.device))

    def embed_words(self, word_ids: Tensor) -> Tensor:
        """(M, Q, W) token ids -> (M, Q, C): a position is the sum of its words' embeddings."""
        word_ids = to_device(word_ids, self.device)
        there = word_ids >= 0
        embeds = self.language.embed(word_ids)
        return (embeds * there[..., None]).sum(2)

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Token embeddings with image spans replaced by projected features.

        Args:
            input_ids: (B, T), on the host, which knows where the spans are without waiting.
            image_embeds: (N, Q, C) in order of the spans, or ``None`` without images.

        Returns:
            (B, T, C) in the language model's precision.

        Raises:
            DataError: the number of image positions is not N * Q; features would be misplaced.
        """
        embeds = self.language.embed(to_device(input_ids, self.device))
        spans = (input_ids.flatten() == self.tokenizer.image_id).nonzero()[:, 0]
        given = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
        if len(spans) != given:
            raise DataError(
                f"the text has {len(spans)} image positions but the images fill {given} "
                f"({self.encoder.num_query_token} each): every <ImageHere> needs one image"
            )
        if image_embeds is None:
            # Without images the connector still takes part, with gradient zero, so that every
            # rank and every micro-batch has the same graph.
            unused = torch.stack([p.sum() for p in self.connector.parameters()]).sum()
            return embeds + 0.0 * unused.to(embeds)
        soft = image_embeds.to(embeds.device, embeds.dtype).flatten(0, 1)
        rows, spans = embeds.flatten(0, 1), to_device(spans, embeds.device)
        return rows.index_copy(0, spans, soft).view_as(embeds)

    def constant_prefix(self) -> ConstantPrefix | None:
        """What all documents begin with, computed once: the language model is frozen."""
        frozen = not any(p.requires_grad for p in self.language.parameters())
        if not (self.schedule.prefix_cache and self.language.packs and frozen):
            return None
        state = (self.device, self.language.head.weight.dtype, autocast_dtype(self.device))
        if state not in self._prefixes:
            self._prefixes[state] = None
            ids, labels = self.encoder.constant_prefix()
            if not ids:  # a template that begins with the user's words
                return None
            with torch.no_grad():
                hidden, keys = self.language.prefix(torch.tensor([ids], device=self.device))
                output = supervised_loss(self, hidden, torch.tensor([labels]))
            self._prefixes[state] = ConstantPrefix(
                tuple(ids), keys, output.loss_sum, output.num_tokens
            )
        return self._prefixes[state]

    def set_schedule(self, schedule: StepSchedule) -> None:
        """Compute steps so from now on: has layers recomputed, and compiles them, as it says."""
        self.schedule = schedule
        llm = self.language.model
        llm.activation_checkpointing_disable()
        if every := schedule.recompute_every:
            llm.activation_checkpointing_enable({"use_reentrant": False}, every)
        if schedule.compile:
            for layer in self.language.blocks():
                layer.compile(dynamic=True)
        self.train(self.training)

    def train(self, mode: bool = True) -> VLM:
        """Set training mode on what is trained; frozen parts stay in evaluation mode."""
        super().train(False)
        self.training = mode
        for module in self._learning():
            if isinstance(module, nn.Module):
                module.train(mode)
        for layer in self.language.blocks():
            # Transformers recomputes a layer only if its own flag says training; the flags of its
            # submodules, which would switch dropout on, stay as they are.
            again = getattr(layer, "gradient_checkpointing", False)
            layer.training = layer.training or (mode and again)
        return self

    def set_trainable(self) -> None:
        """Let learn what the configuration names, and nothing else."""
        self.requires_grad_(False)
        for part in self._learning():
            part.requires_grad_(True)

    def _learning(self) -> Iterator[nn.Module | nn.Parameter]:
        training: Mapping[str, PartTraining] = self.config.training
        if "vision" in training and self.vision is not None:
            yield from self.vision.learning(training["vision"].parts)
        if "connector" in training:
            yield self.connector
        if "language" in training:
            if training["language"].lora is None:
                yield self.language
            else:
                yield from (m for n, m in self.language.named_modules() if "lora_" in n)

    def shardable_blocks(self) -> Iterator[nn.Module]:
        """Parts that are used one after the other, and need not be in memory at once."""
        if self.vision is not None:
            yield from self.vision.blocks()
        yield from self.language.blocks()
        head: nn.Module = self.language.head
        embeddings: nn.Module = self.language.model.get_input_embeddings()
        if head.weight is not embeddings.weight:  # tied, they stay one parameter
            yield from (embeddings, head)

    def prove_language(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Find out what a language model can do whose weights had to be sharded first."""
        if not self.language.proven:
            prove(self.language, device, dtype)

    def training_flops(self, tokens: int, images: int) -> float:
        """Useful floating-point operations of a training step, attention scores left out.

        A parameter costs two in the forward pass, two for the gradient of its input and, if it
        learns, two for its own. Nothing frozen before the first trained part has a backward pass.
        """

        def cost(module: nn.Module, *, backward: bool) -> float:
            learns = sum(p.numel() for p in module.parameters() if p.requires_grad)
            return float((2 + 2 * backward) * count_weights(module) + 2 * learns)

        vision = "vision" in self.config.training
        per_image = self.encoder.num_query_token * cost(self.connector, backward=vision)
        if self.vision is not None:
            per_image += self.vision.flops(lambda module: cost(module, backward=vision))
        layers = sum(cost(block, backward=True) for block in self.language.blocks())
        head = cost(self.language.head, backward=True)
        return tokens * (layers + head) + images * per_image

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def load_checkpoint(self, path: str | Path, *, start: bool = False) -> None:
        """Load a checkpoint of this project or of the original.

        Args:
            start: of training: it may lack parts that are new (``model.config.new_parts``).

        Raises:
            WeightsError: the file is damaged, does not fit, or lacks what is trained here.
        """
        load_model_state(self, path, new_parts=self.config.new_parts if start else ())
        self._prefixes.clear()  # the file may hold other language model weights

    def generate(self, *args: Any, **settings: Any) -> list[str] | list[list[int]]:
        """Continue prompts; see :meth:`lavis.models.generation.Generator.generate`."""
        return Generator(self).generate(*args, **settings)

    def chat(self, *args: Any, **settings: Any) -> tuple[str, History]:
        """Answer a question; see :meth:`lavis.models.generation.Generator.chat`."""
        return Generator(self).chat(*args, **settings)

    def generate_ids(self, *args: Any, **settings: Any) -> list[list[int]]:
        """Continue ids; see :meth:`lavis.models.generation.Generator.generate_ids`."""
        return Generator(self).generate_ids(*args, **settings)

    def answers(
        self, batches: Iterable[Prompts], *, max_new_tokens: int, size: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Answer prompts together; see :func:`lavis.models.decode.answers`."""
        return answers(self, batches, max_new_tokens, size)
