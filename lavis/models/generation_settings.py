"""Settings of generation: which there are and what each may be, for every caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig

from lavis.common.errors import ConfigError
from lavis.common.registry import did_you_mean

GENERATION_DEFAULTS: dict[str, Any] = {
    "chat_format": "chatml",
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": False,
}
"""Greedy, as the original's demos; ``max_window_size`` limits prompt and history in ``chat``."""

Range = tuple[type, str, Callable[[Any], bool]]

_BOUNDS = (1e-6, 1e6)  # beyond, single-precision scores overflow
_COUNT: Range = (int, "a positive integer", lambda v: v >= 1)
_COUNT_OR_NONE: Range = (int, "0 (none) or a positive integer", lambda v: v >= 0)
_POSITIVE: Range = (float, "positive", lambda v: _BOUNDS[0] <= v <= _BOUNDS[1])
_SHARE: Range = (float, "more than 0 and at most 1", lambda v: 0 < v <= 1)
_RANGES: dict[str, Range] = {
    "max_new_tokens": _COUNT,
    "min_new_tokens": _COUNT_OR_NONE,
    "max_window_size": _COUNT,
    "do_sample": (bool, "true or false", lambda v: True),
    "temperature": _POSITIVE,
    "top_k": (int, "0 (all tokens) or a positive integer", lambda v: v >= 0),
    "top_p": _SHARE,
    "min_p": (float, "at least 0 and at most 1", lambda v: 0 <= v <= 1),
    "typical_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "no_repeat_ngram_size": _COUNT_OR_NONE,
    "num_beams": _COUNT,
    "length_penalty": (float, "from -1e6 to 1e6", lambda v: abs(v) <= _BOUNDS[1]),
    "seed": (int, "an integer from 0 to 2^63 - 1", lambda v: 0 <= v < 2**63),  # of chat
}
_SETTINGS = [*(k for k in _RANGES if k != "seed"), "eos_token_id", "stop_words_ids", "chat_format"]
_CHANGE_NO_ANSWER = ("bos_token_id", "pad_token_id", "use_cache", "transformers_version")
_INSTEAD = {
    "max_length": "it may count the prompt; give max_new_tokens",
    "min_length": "it may count the prompt; give min_new_tokens",
    "num_return_sequences": "one call gives one answer to a prompt",
    "stop_strings": "give eos_token_id, one id or a list",
    "streamer": "lavis.chat.Conversation gives an answer piece by piece",
}


def generation_options(
    config: GenerationConfig | dict[str, Any] | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Defaults, then ``config``, then ``overrides``, as plain Python numbers.

    What Transformers has and this has not is accepted only where it is switched off. The
    ``eos_token_id`` of the result are ids that end an answer besides ChatML's own.

    Raises:
        ConfigError: a setting is unknown, cannot be honoured or is out of its range, or another
            chat format than ChatML.
    """
    if isinstance(config, GenerationConfig):
        config = config.to_diff_dict()
    if not isinstance(config, dict | None):
        raise ConfigError(f"generation_config is no GenerationConfig or dictionary, but {config!r}")
    foreign = {"streamer", *GenerationConfig().to_dict()}
    options = dict(GENERATION_DEFAULTS)
    for key, value in ((config or {}) | overrides).items():
        if value is None or key in _CHANGE_NO_ANSWER:
            continue
        if key in _SETTINGS:
            options[key] = plain_setting(key, value) if key in _RANGES else value
            continue
        if key in foreign and (value is False or (key, value) == ("num_return_sequences", 1)):
            continue
        instead = _INSTEAD.get(key, f"there are {', '.join(_SETTINGS)}")
        if key in foreign:
            raise ConfigError(f"generation setting {key} is not supported; {instead}")
        near = did_you_mean(key, _SETTINGS)
        raise ConfigError(f"unknown generation setting {key!r}{near}; {instead}")
    if options["chat_format"] != "chatml":
        raise ConfigError(
            f"chat_format {options['chat_format']!r}: only chatml is supported; use a Chat model "
            "such as Qwen-7B-Chat"
        )
    if options.get("min_new_tokens", 0) > options["max_new_tokens"]:
        raise ConfigError("generation setting min_new_tokens passes max_new_tokens")
    ends, words = options.get("eos_token_id", []), options.pop("stop_words_ids", [])
    ends = [[end] for end in ends] if isinstance(ends, list | tuple) else [[ends]]
    words = [*words, *ends] if isinstance(words, list | tuple) else [words]
    if not all(isinstance(w, list | tuple) and len(w) == 1 and type(w[0]) is int for w in words):
        raise ConfigError(
            "generation setting eos_token_id must be a token id or a list of them, stop_words_ids "
            f"a list of lists of one id each, not {words}"
        )
    return options | {"eos_token_id": [word[0] for word in words]}


def plain_setting(name: str, value: Any) -> Any:
    """A setting as a number of Python, out of one of NumPy or PyTorch too.

    Raises:
        ConfigError: it is of another type, or out of its range.
    """
    kind, allowed, fits = _RANGES[name]
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    types = (int, float) if kind is float else kind
    if isinstance(plain, types) and isinstance(plain, bool) == (kind is bool) and fits(plain):
        return kind(plain)
    bounds = f" (from {_BOUNDS[0]:g} to {_BOUNDS[1]:g})" * (allowed == "positive")
    raise ConfigError(f"generation setting {name} must be {allowed}, not {value!r}{bounds}")
