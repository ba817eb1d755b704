"""``generate`` and ``chat`` with the original's call shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lavis.common.errors import ConfigError, DataError
from lavis.common.registry import did_you_mean
from lavis.common.types import NO_FEATURES, NO_WORDS
from lavis.processors.conversation import SYSTEM_PROMPT, ConversationEncoder

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

    from lavis.processors.tokenizer import QwenTokenizer

History = list[tuple[str, str]]

GENERATION_DEFAULTS: dict[str, Any] = {
    "chat_format": "chatml",
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": False,
}
"""Greedy, as the original's demos; ``max_window_size`` limits prompt and history in ``chat``."""


_COUNT = ("a positive integer", lambda v: isinstance(v, int) and v >= 1)
_POSITIVE = ("positive", lambda v: 0 < v < math.inf)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": _COUNT,
    "max_window_size": _COUNT,
    "num_beams": _COUNT,
    "temperature": _POSITIVE,
    "repetition_penalty": _POSITIVE,
    "top_p": ("more than 0 and at most 1", lambda v: 0 < v <= 1),
    "top_k": ("0 (all tokens) or a positive integer", lambda v: isinstance(v, int) and v >= 0),
}


class GenerationMixin:
    """Text out of images and text. Mixed into a model that has the attributes below."""

    llm_model: Qwen2ForCausalLM
    tokenizer: QwenTokenizer
    encoder: ConversationEncoder
    context: int
    encode_spans: Any
    embed: Any
    device: Any
    uniform_graph: bool

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        chat: bool = False,
        **overrides: Any,
    ) -> list[str] | list[list[int]]:
        """Continue prompts.

        Args:
            samples: ``text``, a prompt or a list of them in ChatML markup, with ``<ImageHere>``
                where an image stands; ``image``, a (N, 3, H, W) tensor with the images of all
                prompts in order, or ``None``. Special tokens in ``text`` are markup: build it from
                trusted text, and use :meth:`chat` for what a user typed.
            generation_config: over :data:`GENERATION_DEFAULTS`.
            chat: return token ids, cut before the stop token, instead of text.
            overrides: single settings, e.g. ``max_new_tokens=64``.

        Raises:
            DataError: images and placeholders do not match.
            ConfigError: the prompt and the new tokens do not fit into the context.
        """
        text = samples["text"]
        prompts = [text] if isinstance(text, str) else list(text)
        if not all(prompts):
            raise DataError("a prompt is empty")
        if not prompts:
            return []
        ids = self.generate_ids(
            [self.encoder.prompt_from_markup(prompt) for prompt in prompts],
            samples.get("image"),
            generation_config,
            **overrides,
        )
        if chat:
            return ids
        return [self.tokenizer.decode(i, skip_special_tokens=True).strip() for i in ids]

    @torch.no_grad()
    def chat(
        self,
        query: str,
        history: History | None,
        image_tensor: Tensor | None,
        system: str = SYSTEM_PROMPT,
        append_history: bool = True,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        **overrides: Any,
    ) -> tuple[str, History]:
        """Answer a question after earlier turns.

        Args:
            query: what the user says; special tokens in it are ordinary characters.
            history: earlier (question, answer) pairs; the new one is appended to it.
            image_tensor: (N, 3, H, W), one image per ``<ImageHere>`` of history and query.

        Returns:
            The answer and the history.

        Raises:
            DataError: images and placeholders do not match.
            ConfigError: a setting is unknown, or the query alone does not fit into the window.
        """
        options = generation_options(generation_config, overrides)
        history = [] if history is None else history
        encoder = ConversationEncoder(self.tokenizer, self.encoder.num_query_token, system=system)
        prompt, _ = fit_window(encoder, history, query, options, self.context)
        ids = self.generate_ids([prompt], image_tensor, options)[0]
        response = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if append_history:
            history.append((query, response))
        return response, history

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: Sequence[list[int]],
        images: Tensor | None,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        *,
        word_ids: Tensor = NO_WORDS,
        query_features: Tensor = NO_FEATURES,
        **overrides: Any,
    ) -> list[list[int]]:
        """Continue prompts of token ids; the answers are cut before the stop token.

        Args:
            prompts: image spans included.
            images: (N, 3, H, W), in order of the spans.
            word_ids: (M, Q, W), for spans described in words, in place of images.
            query_features: (N, Q, D), what ``encode_query`` gave, in place of images.
            generation_config: over :data:`GENERATION_DEFAULTS`.

        Raises:
            DataError, ConfigError: as :meth:`generate`.
        """
        options = generation_options(generation_config, overrides)
        longest = max(map(len, prompts))
        if longest + options["max_new_tokens"] > self.context:
            raise ConfigError(
                f"a prompt of {longest} tokens and max_new_tokens {options['max_new_tokens']} "
                f"pass this language model's context of {self.context}"
            )
        row = torch.tensor([i for p in prompts for i in p], device=self.device)[None]
        described = torch.ones(len(word_ids), dtype=torch.bool)
        features = self.encode_spans(images, word_ids.to(self.device), described, query_features)
        rows = self.embed(row, features)[0].split([len(p) for p in prompts])
        # Left padding: every prompt ends where its answer begins.
        embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
        mask = torch.zeros(len(rows), longest, dtype=torch.int64, device=embeds.device)
        for i, prompt in enumerate(rows):
            embeds[i, longest - len(prompt) :] = prompt
            mask[i, longest - len(prompt) :] = 1
        stops = (self.tokenizer.im_end_id, self.tokenizer.im_start_id)
        settings = {k: v for k, v in options.items() if k not in ("chat_format", "max_window_size")}
        generated = self.llm_model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            synced_gpus=self.uniform_graph,  # all processes generate as long as one of them does
            generation_config=GenerationConfig(
                **{**settings, "eos_token_id": list(stops), "pad_token_id": self.tokenizer.eod_id}
            ),
        )
        return [_before_stop(ids, (*stops, self.tokenizer.eod_id)) for ids in generated.tolist()]


def fit_window(
    encoder: ConversationEncoder,
    history: Sequence[tuple[str, str]],
    query: str,
    options: dict[str, Any],
    context: int,
    *,
    start: int = 0,
    free: float = 0.0,
) -> tuple[list[int], int]:
    """The prompt of a question after as many earlier exchanges as the window holds.

    Args:
        options: ``max_window_size`` and ``max_new_tokens`` of :func:`generation_options`.
        context: the language model's, in tokens.
        start: how many of the oldest exchanges are left out in any case.
        free: share of the window that is left free if more have to be left out, so that the next
            questions need not leave out yet more.

    Returns:
        As :meth:`ConversationEncoder.latest`.

    Raises:
        ConfigError: the images and the question alone do not fit.
    """
    room = max(min(options["max_window_size"], context - options["max_new_tokens"]), 0)
    prompt, dropped = encoder.latest(history, query, room, start)
    if dropped > start and free:
        prompt, dropped = encoder.latest(history, query, int(room * (1 - free)), start)
    if len(prompt) > room:
        raise ConfigError(
            f"the question and the images take {len(prompt)} tokens, but {room} fit "
            f"(max_window_size {options['max_window_size']}, context {context}, "
            f"max_new_tokens {options['max_new_tokens']})"
        )
    return prompt, dropped


def generation_options(
    config: GenerationConfig | dict[str, Any] | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Defaults, then ``config``, then ``overrides``.

    Raises:
        ConfigError: an unknown setting, or another chat format than ChatML.
    """
    if isinstance(config, GenerationConfig):
        config = config.to_diff_dict()
    given = {k: v for k, v in ((config or {}) | overrides).items() if v is not None}
    given.pop("transformers_version", None)
    known = set(GENERATION_DEFAULTS) | set(GenerationConfig().to_dict())
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown generation setting {key!r}{did_you_mean(key, known)}")
    options = GENERATION_DEFAULTS | given
    if options["chat_format"] != "chatml":
        raise ConfigError(
            f"chat_format {options['chat_format']!r}: only chatml is supported; use a Chat model "
            "such as Qwen-7B-Chat"
        )
    for key, (allowed, fits) in _RANGES.items():
        value = options.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and fits(value)):
            raise ConfigError(f"generation setting {key} must be {allowed}, not {value!r}")
    if not isinstance(options["do_sample"], bool):
        raise ConfigError(
            f"generation setting do_sample must be true or false, not {options['do_sample']!r}"
        )
    return options


def _before_stop(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
