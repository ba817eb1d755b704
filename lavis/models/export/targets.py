"""The stock classes that a model can become: what each can hold, and under which names."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessorPil,
)

from lavis.common.errors import ConfigError
from lavis.models.config import ConnectorConfig, LinearConfig, MlpConfig, PartsConfig
from lavis.models.export.shards import Weight
from lavis.models.export.text import IMAGE_TOKEN
from lavis.models.language.causal import CausalLM
from lavis.models.vision.config import EvaQFormerConfig, HfVisionConfig
from lavis.models.vision.hf import read_spec, vision_part
from lavis.models.vlm import VLM
from lavis.models.weights.files import open_shards
from lavis.models.weights.original import BLIP2
from lavis.models.weights.stock import read_config

Names = dict[str, Weight]


class Target(Protocol):
    """A stock class that holds a model.

    Attributes:
        family: the class.
        repeat: how often the template writes the image's token.
    """

    family: ClassVar[type[PreTrainedModel]]
    repeat: int

    def __init__(self, config: PartsConfig, cache_root: str, tokens: int) -> None:
        """Check what the small files say.

        Args:
            tokens: of an image, in the text.

        Raises:
            ConfigError: the class cannot hold such a model.
        """

    def check(self, language: CausalLM) -> None:
        """Check what only the loaded language model says.

        Raises:
            ConfigError: the class cannot hold it.
        """

    def config(self, model: VLM, text: PreTrainedConfig, image_id: int) -> PreTrainedConfig:
        """The configuration, around that of the language model."""

    def processor(
        self, images: dict[str, Any], tokenizer: PreTrainedTokenizerFast, template: str
    ) -> ProcessorMixin:
        """Tokenizer and image processor; ``images`` are the latter's settings."""

    def weights(self, model: VLM, language: Names) -> Names:
        """All weights by the class's names, given those of the language model by its own."""

    def notes(self) -> list[str]:
        """What who uses the folder has to know, a line each."""


class Blip2:
    """EVA ViT and Q-Former, a linear connector, any language model."""

    family: ClassVar[type[PreTrainedModel]] = Blip2ForConditionalGeneration

    def __init__(self, config: PartsConfig, cache_root: str, tokens: int) -> None:
        eyes, connector, _ = config.parts
        if not isinstance(eyes, EvaQFormerConfig):
            raise ConfigError(
                f"{config.key('vision', 'name')}: {eyes.name}: BLIP-2's class holds an EVA ViT "
                "with a Q-Former alone; SigLIP and CLIP leave with --format llava"
            )
        if _depth(connector) != 1:
            raise ConfigError(_misfit(config, "BLIP-2's class has one linear layer"))
        self.repeat = tokens

    def check(self, language: CausalLM) -> None:
        pass

    def config(self, model: VLM, text: PreTrainedConfig, image_id: int) -> PreTrainedConfig:
        seeing: Any = model.vision
        sizes, vit = seeing.config.vit_config, seeing.visual_encoder
        vision = {
            "hidden_size": sizes.embed_dim,
            "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": sizes.num_heads,
            "image_size": seeing.image_size,
            "patch_size": sizes.patch_size,
            "layer_norm_eps": vit.blocks[0].norm1.eps,
        }
        return Blip2Config(
            vision_config=vision,
            qformer_config=seeing.Qformer.config.to_dict(),
            text_config=text,
            num_query_tokens=seeing.tokens,
            image_token_index=image_id,
        )

    def processor(
        self, images: dict[str, Any], tokenizer: PreTrainedTokenizerFast, template: str
    ) -> ProcessorMixin:
        # With a number of queries it would put the places of images in front of the text.
        made: ProcessorMixin = Blip2Processor(BlipImageProcessorPil(**images), tokenizer)
        return made

    def weights(self, model: VLM, language: Names) -> Names:
        seeing: Any = model.vision
        state: dict[str, Tensor] = seeing.state_dict()
        for n, block in enumerate(seeing.visual_encoder.blocks):
            state[f"visual_encoder.blocks.{n}.attn.k_bias"] = torch.zeros_like(block.attn.q_bias)
        names = {name: Weight.of(tensor) for name, tensor in BLIP2.to_original(state).items()}
        (layer,) = _layers(model.connector)
        for kind, tensor in layer.state_dict().items():
            names[f"language_projection.{kind}"] = Weight.of(tensor)
        return names | {f"language_model.{name}": w for name, w in language.items()}

    def notes(self) -> list[str]:
        return [
            f"`Blip2ForConditionalGeneration.generate` needs an image. The chat template writes "
            f"`{IMAGE_TOKEN}` {self.repeat} times for each one, wherever it stands."
        ]


class Llava:
    """SigLIP or CLIP, one or two linear layers, a language model with a bare head."""

    family: ClassVar[type[PreTrainedModel]] = LlavaForConditionalGeneration
    repeat = 1

    def __init__(self, config: PartsConfig, cache_root: str, tokens: int) -> None:
        eyes, connector, _ = config.parts
        key = partial(config.key, "vision")
        known = {"siglip_vision_model": SiglipImageProcessorPil, "clip_vision_model": None}
        if not isinstance(eyes, HfVisionConfig):
            raise ConfigError(
                f"{key('name')}: {eyes.name}: LLaVA's class holds one encoder of Transformers "
                "(vision: {name: hf}); EVA with a Q-Former leaves with --format blip2"
            )
        self.spec = spec = read_spec(eyes, cache_root)
        self.kind = str(spec.sizes.model_type)
        if self.kind not in known:
            raise ConfigError(
                f"{key('path')}: {self.kind}: exported are {' and '.join(known)}; of others "
                "LLaVA's class would keep tokens that are dropped here"
            )
        if spec.resize:
            raise ConfigError(
                f"{key('image_size')}: {spec.image_size}: LLaVA's class does not interpolate "
                f"position embeddings; {eyes.path} reads images of its own size alone"
            )
        if _depth(connector) not in (1, 2):
            raise ConfigError(_misfit(config, "LLaVA's class has at most two linear layers"))
        self.eyes, self.folder, self.key = eyes, eyes.folder(cache_root), config.key
        # CLIP's class token: in front, and dropped by LLaVA's strategy "default".
        self.leading = spec.leading
        self.strategy = "default" if spec.leading and not eyes.keeps_class else "full"

    def check(self, language: CausalLM) -> None:
        plain = language.softcap is None and language.logit_scale == 1
        if not plain or language.head.bias is not None:
            raise ConfigError(
                f"{self.key('language', 'path')}: {type(language.model).__name__} scales, caps or "
                "shifts its logits, and LLaVA's class has a bare head: its logits would be others"
            )

    def config(self, model: VLM, text: PreTrainedConfig, image_id: int) -> PreTrainedConfig:
        return LlavaConfig(
            vision_config=self._tower(),
            text_config=text,
            image_token_index=image_id,
            image_seq_length=model.features[0],
            projector_hidden_act="gelu" if len(_layers(model.connector)) == 2 else "linear",
            vision_feature_select_strategy=self.strategy,
            vision_feature_layer=self.spec.sizes.num_hidden_layers - self.spec.depth - 1,
            tie_word_embeddings=bool(text.tie_word_embeddings),
        )

    def processor(
        self, images: dict[str, Any], tokenizer: PreTrainedTokenizerFast, template: str
    ) -> ProcessorMixin:
        clip = self.kind.startswith("clip")
        if clip:
            images |= {"do_center_crop": False}
        kind = CLIPImageProcessorPil if clip else SiglipImageProcessorPil
        made: ProcessorMixin = LlavaProcessor(
            kind(**images),
            tokenizer,
            patch_size=self.spec.sizes.patch_size,
            vision_feature_select_strategy=self.strategy,
            chat_template=template,
            num_additional_image_tokens=self.leading,
        )
        return made

    def weights(self, model: VLM, language: Names) -> Names:
        names: Names = {}
        prefix = f"{model.language.model.base_model_prefix}."
        for name, weight in language.items():
            inner = "" if name.startswith("lm_head.") else "model."
            names[f"language_model.{inner}{name.removeprefix(prefix)}"] = weight
        first, *rest = _layers(model.connector)
        (second,) = rest or [_identity(first.out_features)]
        for n, layer in enumerate((first, second), start=1):
            for kind, tensor in layer.state_dict().items():
                names[f"multi_modal_projector.linear_{n}.{kind}"] = Weight.of(tensor)
        for name, tensor in self._tower_state(model).items():
            names[f"vision_tower.vision_model.{name}"] = Weight.of(tensor)
        return names

    def notes(self) -> list[str]:
        if not self.tied:
            return []
        return [
            "The image features are those of the tower's final norm "
            "(`vision_config.tie_last_hidden_states`). Software that does not know this key, vLLM "
            "among it, takes what stands before the norm, and would answer nonsense."
        ]

    @property
    def tied(self) -> bool:
        """Whether the last hidden state has to be the final norm's."""
        return self.spec.normed and not self.kind.startswith("clip")

    def _tower(self) -> Any:
        """Sizes of the whole tower, with the blocks that are not computed here."""
        whole = read_config(self.folder)
        sizes: Any = copy.deepcopy(getattr(whole, "vision_config", None) or whole)
        if hasattr(sizes, "vision_use_head"):
            sizes.vision_use_head = False  # what pools patches to one vector
        if self.tied:
            sizes.tie_last_hidden_states = True  # the last one is the final norm's
        return sizes

    def _tower_state(self, model: VLM) -> dict[str, Tensor]:
        """The tower's weights: those that are computed here, and its file's others."""
        seeing: Any = model.vision
        state: dict[str, Tensor] = dict(seeing.visual_encoder.state_dict())
        sizes = self._tower()
        with torch.device("meta"):
            wanted = MODEL_MAPPING[type(sizes)](sizes).state_dict()
        stored = vision_part(open_shards(self.folder))
        for name in wanted.keys() - state.keys():
            state[name] = stored[name if name in stored else f"vision_model.{name}"]
        return state


TARGETS: dict[str, type[Target]] = {"blip2": Blip2, "llava": Llava}


def _depth(connector: ConnectorConfig) -> int | None:
    """How many linear layers it is, with GELU between them, if it is that."""
    if type(connector) is LinearConfig:
        return 1
    return connector.depth if type(connector) is MlpConfig else None


def _misfit(config: PartsConfig, what: str) -> str:
    connector = config.parts[1]
    depth = _depth(connector)
    more = "" if depth is None else f" of {depth} layers"
    return (
        f"{config.key('connector', 'name')}: {connector.name}{more}: {what} between the features "
        "and the language model, which cannot hold it"
    )


def _layers(connector: nn.Module) -> list[nn.Linear]:
    return [m for m in connector.modules() if isinstance(m, nn.Linear)]


def _identity(width: int) -> nn.Linear:
    """What LLaVA's second layer is to a connector of one."""
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
