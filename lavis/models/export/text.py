"""Tokenizer and chat template of a model, in the form that Transformers reads by itself."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from lavis.common.errors import ConfigError, WeightsError
from lavis.models.language.parts import LanguagePart, Qwen1
from lavis.processors.chatml import SYSTEM_PROMPT
from lavis.processors.hf_tokenizer import read_tokenizer
from lavis.processors.proof import TEXTS
from lavis.processors.templates import TokenizerTemplate
from lavis.processors.tokenizer import SPLIT_PATTERN, QwenTokenizer, read_ranks

IMAGE_TOKEN = "<image>"  # noqa: S105  no password
"""What stands for an image's features, once for each."""

_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Texts and images of a message become one text, with an image as training data write it.
_FLATTEN = """\
{%- set flat = namespace(messages=[], text='', after=false) -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set flat.text = message.content | replace('<image>', IMAGES) -%}
{%- else -%}
{%- set flat.text = '' -%}
{%- set flat.after = false -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{%- set flat.text = flat.text + '<Img>' + IMAGES + '</Img>' -%}
{%- set flat.after = true -%}
{%- else -%}
{%- set flat.text = flat.text + (' ' if flat.after and part.text[:1].strip() else '') -%}
{%- set flat.text = flat.text + part.text -%}
{%- set flat.after = false -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=CONTENT)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
_SYSTEM = """\
{%- if not messages or messages[0].role != 'system' -%}
{%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages -%}
{%- endif -%}
"""
_THINKING = """\
{%- set enable_thinking = enable_thinking if enable_thinking is defined else THINKING -%}
{%- set thinking = thinking if thinking is defined else THINKING -%}
"""


def stock_tokenizer(described: LanguagePart) -> PreTrainedTokenizerFast:
    """A tokenizer that gives the same ids, with a token of an image's.

    Raises:
        WeightsError: it would give other ids.
    """
    if isinstance(described, Qwen1):
        assert isinstance(described.tokenizer, QwenTokenizer)
        return _of_tiktoken(described.tokenizer)
    tokenizer = read_tokenizer(described.path)
    tokenizer.add_tokens([_special(IMAGE_TOKEN)])
    return tokenizer


def stock_template(described: LanguagePart, repeat: int) -> str:
    """The chat template in Jinja, for contents that are a text or a list of texts and images.

    Args:
        repeat: how often the image's token is written for one image; 1 leaves the rest to the
            processor.

    Raises:
        ConfigError: it is a class of one's own.
    """
    images = f"'{IMAGE_TOKEN}' * {repeat}" if repeat > 1 else f"'{IMAGE_TOKEN}'"
    system, template = described.system, described.template
    in_parts = isinstance(template, TokenizerTemplate) and template.in_parts
    content = "[{'type': 'text', 'text': flat.text}]" if in_parts else "flat.text"
    begin = _FLATTEN.replace("IMAGES", f"({images})").replace("CONTENT", content)
    if isinstance(described, Qwen1):
        source, system = _CHATML, SYSTEM_PROMPT if system is None else system
    elif type(template) is TokenizerTemplate:
        source = template.source
        begin += _THINKING.replace("THINKING", json.dumps(template.thinking))
    else:
        key = described.key("template")
        raise ConfigError(
            f"{key}: {type(template).__name__} is a class of Python, and the exported folder needs "
            f"a template in Jinja: write it as chat_template of the tokenizer in {described.path} "
            f"and remove {key}"
        )
    if system is not None:
        said = [{"type": "text", "text": system}] if in_parts else system
        begin += _SYSTEM.replace("SYSTEM", json.dumps(said, ensure_ascii=False))
    return begin + source


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _of_tiktoken(tokenizer: QwenTokenizer) -> PreTrainedTokenizerFast:
    """First-generation Qwen's vocabulary as ``tokenizer.json``; its image token gets our name."""
    ranks = read_ranks(tokenizer.path)
    converter = TikTokenConverter(tokenizer.path)
    converter.load_tiktoken_bpe = lambda path: ranks  # its own keeps a copy of a file for good
    backend: Tokenizer = converter.tokenizer()
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    special = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    renamed = {tokenizer.decode([tokenizer.image_id]): IMAGE_TOKEN}
    backend.add_special_tokens([_special(renamed.get(name, name)) for name in special])
    _compare(tokenizer, backend, ranks)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends)


def _compare(tokenizer: QwenTokenizer, backend: Tokenizer, ranks: dict[bytes, int]) -> None:
    """Hold the copy against tiktoken: every token's text, and several of them in a row.

    Raises:
        WeightsError: the ids of a text differ.
    """
    texts = [text for token in ranks if "\ufffd" not in (text := token.decode(errors="replace"))]
    texts += ["".join(texts[n : n + 7]) for n in range(0, len(texts), 7)]
    for text in (*TEXTS, *texts):
        theirs = backend.encode(text, add_special_tokens=False).ids
        if theirs != (ours := tokenizer.encode(text)) and "<|" not in text:
            raise WeightsError(
                f"{tokenizer.path}: as tokenizer.json it gives other ids for {text!r}: {theirs}, "
                f"not {ours}; the vocabulary cannot be exported"
            )
