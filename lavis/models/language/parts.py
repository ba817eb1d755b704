"""Language models as parts: what the small files say at once, and the weights when asked for."""

from __future__ import annotations

import importlib
import logging

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2ForCausalLM

from lavis.common.errors import ConfigError, LavisError, raised_as
from lavis.common.paths import cache_path
from lavis.common.schema import Key
from lavis.common.types import DTYPES
from lavis.models.compute.quantized_linear import PACKED_BITS, OutlinedLinear
from lavis.models.config import HfConfig, LanguageConfig, Qwen1Config
from lavis.models.language.causal import CausalLM, context_of
from lavis.models.language.hf import load_hf, stock_class
from lavis.models.language.quantize import quantize, replace_linears
from lavis.models.language.qwen1 import load_llm, new_llm, read_spec
from lavis.models.weights.original import QWEN, SAME_NAMES, KeyMap
from lavis.models.weights.stock import read_config
from lavis.processors.chatml import SYSTEM_PROMPT, ChatML
from lavis.processors.contracts import ChatTemplate, Kind, Tokenizer, Turn
from lavis.processors.hf_tokenizer import FastTokenizer
from lavis.processors.proof import check, prove
from lavis.processors.templates import TokenizerTemplate
from lavis.processors.tokenizer import QwenTokenizer

logger = logging.getLogger(__name__)


class LanguagePart:
    """A language model before its weights are read.

    Attributes:
        family, sizes: class and configuration of the stock model.
        tokenizer, template: make ids of conversations.
        system: the system prompt; ``None`` is the template's own.
        context: longest sequence, in tokens.
        past_context: why not longer, for messages.
        keys: how the names in a checkpoint relate to the model's.
        key: what the user calls a key of the block, for messages.
    """

    family: type[PreTrainedModel]
    sizes: PreTrainedConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    system: str | None = None
    context: int
    past_context: str = ""
    keys: KeyMap = SAME_NAMES

    def __init__(self, config: LanguageConfig, cache_root: str, key: Key) -> None:
        self.config, self.path, self.key = config, cache_path(config.path, cache_root), key

    def load(self, device: torch.device, *, mapped: bool = False) -> CausalLM:
        """The model, each tensor straight to its final place, or left in its mapped file."""
        raise NotImplementedError

    def outline(self) -> CausalLM:
        """The model without numbers, for the names of its layers."""
        with torch.device("meta"):
            return CausalLM(self.family(self.sizes))

    def sized_outline(self) -> CausalLM:
        """The model without numbers that takes the bytes it will: in its precision, or packed."""
        precision = DTYPES.get(self.config.precision) or self.sizes.dtype or torch.bfloat16
        llm = self.outline().to(precision)
        if kind := self.config.quantize:
            bits = (
                PACKED_BITS.get(kind) or 8 * self.path.stat().st_size / llm.model.num_parameters()
            )
            replace_linears(llm, lambda _, linear: OutlinedLinear(linear, bits), kind)
        return llm

    def require_room(self, new_tokens: int, key: str) -> None:
        """Refuse a setting by which an answer leaves no room for a question.

        Raises:
            ConfigError: naming the setting ``key``.
        """
        if new_tokens >= self.context:
            raise ConfigError(
                f"{key} {new_tokens} leaves no room for a question in this language model's "
                f"context of {self.context} tokens"
            )


class Qwen1(LanguagePart):
    """First-generation Qwen, computed as Qwen2; random weights if it is from scratch."""

    config: Qwen1Config
    family = Qwen2ForCausalLM
    keys = KeyMap((*QWEN.rules, *SAME_NAMES.rules))  # the same: adapters
    system = SYSTEM_PROMPT
    past_context = " (seq_length), where it would need dynamic NTK scaling"

    def __init__(self, config: Qwen1Config, cache_root: str, key: Key) -> None:
        """Read vocabulary and sizes.

        Raises:
            WeightsError, ConfigError: a file is missing, or belongs to another kind of model.
        """
        super().__init__(config, cache_root, key)
        tokenizer = QwenTokenizer(self.path / "qwen.tiktoken")
        self.tokenizer, self.template = tokenizer, ChatML(tokenizer)
        need = not config.from_scratch
        self.spec = read_spec(self.path, config.config, need_file=need, key=key)
        self.sizes, self.context = self.spec.config, self.spec.context
        if tokenizer.vocab_size > self.sizes.vocab_size:
            raise ConfigError(
                f"{key('path')}: the vocabulary has {tokenizer.vocab_size} tokens, the language "
                f"model only {self.sizes.vocab_size}: its files do not belong together"
            )

    def load(self, device: torch.device, *, mapped: bool = False) -> CausalLM:
        dtype = DTYPES.get(self.config.precision)
        if kind := self.config.quantize:
            stored = load_llm(self.spec, self.path, device=torch.device("cpu"), dtype=None)
            return quantize(CausalLM(stored), kind, device=device, dtype=dtype)
        if not self.config.from_scratch:
            llm = load_llm(self.spec, self.path, device=device, dtype=dtype, mapped=mapped)
            return CausalLM(llm)
        std = self.config.embedding_std
        return CausalLM(new_llm(self.spec, device=device, dtype=dtype, embedding_std=std))


class Hf(LanguagePart):
    """Any causal language model of Transformers, with its tokenizer's own chat template."""

    def __init__(self, config: HfConfig, cache_root: str, key: Key) -> None:
        """Read vocabulary, template and sizes, and prove the template.

        Raises:
            WeightsError: a file is missing or damaged.
            ConfigError: the family is unknown, the template cannot be followed exactly, or it
                takes no system prompt and one is set.
        """
        super().__init__(config, cache_root, key)
        self.family, self.sizes = stock_class(read_config(self.path), self.path)
        self.context, self.system = context_of(self.sizes), config.system
        self.tokenizer = tokenizer = FastTokenizer.load(self.path, int(self.sizes.vocab_size))
        if config.template is None:
            self.template = template = TokenizerTemplate(tokenizer, thinking=config.thinking)
            self._check_system()
            notes = prove(template, self.system)
        else:
            self.template = _own_template(config.template, tokenizer, key("template"))
            self._check_system()
            notes = check(self.template, tokenizer, self.system)
        for note in notes:
            logger.info("%s: %s", self.path.name, note)

    def load(self, device: torch.device, *, mapped: bool = False) -> CausalLM:
        dtype, packed = DTYPES.get(self.config.precision), self.config.quantize
        return load_hf(self.path, device=device, dtype=dtype, mapped=mapped, quantized=packed)

    def _check_system(self) -> None:
        if self.system is None:
            return
        with raised_as(ConfigError, self.key("system"), LavisError):
            pieces = self.template.pieces([Turn("user", "?")], system=self.system, ask=True)
        if self.system.strip() not in "".join(p.text for p in pieces if p.kind is Kind.TEXT):
            raise ConfigError(f"{self.key('system')}: the chat template leaves it out; give none")


def _own_template(name: str, tokenizer: Tokenizer, key: str) -> ChatTemplate:
    """A class that a YAML names: ``pkg.module:Class``, made with the tokenizer."""
    module, _, attribute = name.partition(":")
    what = f"{key}: {name!r} is no pkg.module:Class that takes a tokenizer"
    with raised_as(ConfigError, what, ImportError, AttributeError, ValueError, TypeError):
        made: ChatTemplate = getattr(importlib.import_module(module), attribute)(tokenizer)
    return made
