"""Tiny tokenizers of the families of chat models, each with a chat template of its structure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is it? Two: a red ball and a blue box.\n\nlines\n\n  blanks  ",
    "You are a helpful assistant. Be brief. user assistant system model\n",
    "def f(x):\n    return {'a': [x]}\n 1234567890, 3.14 and -5 图里有什么？ 图\n\n\n",
    "[INST] <<SYS>>\n[/INST] <|im_start|>user\n<|im_end|>\n Today Date: 26 Jul 2024\n\n",
] * 4
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HEX = [f"<0x{i:02X}>" for i in range(256)]


def special(text: str, **flags: Any) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **flags)


def plain(text: str) -> AddedToken:
    return AddedToken(text, special=False, normalized=False)


def byte_level(*, nfc: bool = False, trim: bool = False) -> Tokenizer:
    """As Qwen, Llama 3, SmolLM, OLMo, Granite and Phi-4 have it."""
    t = Tokenizer(models.BPE(ignore_merges=trim))
    if nfc:
        t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=trim)
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))  # fmt: skip
    return t


def sentencepiece_decoder(*, strip: bool) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strip else []),
    ]}  # fmt: skip


def sentencepiece(prefix: str, controls: list[str]) -> Tokenizer:
    """As Llama 2, Mistral, Phi-3, Gemma and InternLM2 have it; ``prefix`` says how a blank leads.

    Control pieces are in the vocabulary, before the bytes.
    """
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Replace(" ", "▁")
    t.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁\n]*|\n+"), "isolated")
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=650, special_tokens=["<unk>", *controls, *HEX], show_progress=False,
    ))  # fmt: skip
    t.pre_tokenizer = None
    if prefix == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        t.normalizer = normalizers.Sequence(steps)
    elif prefix != "none":
        t.normalizer = None
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    state = json.loads(t.to_str())
    state["added_tokens"] = [a for a in state["added_tokens"] if a["content"] not in HEX]
    state["decoder"] = sentencepiece_decoder(strip=prefix != "none")
    return Tokenizer.from_str(json.dumps(state))


def unigram() -> Tokenizer:
    """A unigram model, whose control pieces would win any search of the lattice."""
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    t.decoder = decoders.Metaspace(prepend_scheme="always")
    controls = ["<unk>", "<s>", "</s>", "<|user|>", "<|bot|>"]
    t.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[*controls, *HEX], unk_token="<unk>", show_progress=False,
    ))  # fmt: skip
    state = json.loads(t.to_str())
    state["model"]["byte_fallback"] = True
    state["decoder"] = sentencepiece_decoder(strip=True)
    state["added_tokens"] = [a for a in state["added_tokens"] if a["content"] not in HEX]
    state["model"]["vocab"] = [
        [w, -20.0 if w in HEX else score] for w, score in state["model"]["vocab"]
    ]
    return Tokenizer.from_str(json.dumps(state))


CHATML = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
CHATML_PARTS = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- for part in m.content %}
{%- if part.type == 'image' %}{{- '<image>' }}{% else %}{{- part.text }}{% endif %}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
"""As of a model that sees: contents are lists."""
CHATML_DEFAULT = (
    """
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}"""
    + CHATML
)
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- set text = m.content %}
{%- set thought = '' %}
{%- if m.role == 'assistant' %}
{%- if '</think>' in text %}
{%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
{{- text.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>assistant\\n' + text }}{% endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + text }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{% endif %}"""
SMOLLM3 = """
{%- set mode = '/think' if enable_thinking | default(true) else '/no_think' %}
{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') }}
{{- '\\nReasoning Mode: ' + mode + '\\n\\n## Custom Instructions\\n\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content.rstrip() }}
{%- else %}{{- 'You are a helpful assistant.' }}{% endif %}{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' and mode == '/think' %}
{{- '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}
{{- m.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if mode == '/no_think' %}{{- '<think>\\n\\n</think>\\n' }}{% endif %}{% endif %}"""
LLAMA3 = """
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
LLAMA2 = """
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = false %}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if loop.index0 == 0 and system != false %}
{%- set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}
{%- else %}{% set text = m.content %}{% endif %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
MISTRAL_OLD = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- m.content + eos_token }}
{%- else %}{{- raise_exception('only user and assistant roles are supported') }}{% endif %}
{%- endfor %}"""
MISTRAL = """
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if loop.last or loop.index0 == messages | length - 2 %}
{{- '[INST]' + (system + '\\n\\n' if system is defined else '') + m.content + '[/INST]' }}
{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{% endif %}
{%- else %}{{- m.content + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA2 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA3 = """
{{- bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- first if loop.first else '' }}{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
PHI3 = """
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""
PHI4 = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
OLMO = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|assistant|>\\n' + m.content + eos_token + ('' if loop.last else '\\n') }}
{%- else %}{{- '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""
GRANITE = """
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = 'Today Date: ' + strftime_now('%B %d, %Y') + '. You are Granite.' %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- for m in messages %}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""
BOT = """
{{- bos_token }}
{%- for m in messages %}
{{- ('<|bot|>' if m.role == 'assistant' else '<|user|>') + m.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|bot|>' }}{% endif %}"""

IM = [special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>")]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_TOKENS = [special(t) for t in [*HEADERS, "<|eot_id|>", "<|reserved_special_token_0|>"]]
ROLES = [
    special(t, rstrip=True)
    for t in ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
]
S = ["<s>", "</s>"]
NO_THOUGHT = "<think>\n\n</think>\n"


@dataclass(frozen=True)
class Family:
    """A tokenizer, its template, and what the tests should find.

    Attributes:
        begin: what stands before a first question, system prompt or none.
        ask: what stands between a question and its answer.
        end: what ends an answer.
        system: whether it takes a system prompt.
        notes: how many remarks the proof has.
        prefix: characters of the constant prefix, without a system prompt.
        in_parts: whether messages are lists of texts and images.
    """

    backend: Callable[[], Tokenizer]
    template: str
    begin: str
    ask: str
    end: str
    prefix: str
    added: list[AddedToken] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    system: bool = True
    in_parts: bool = False
    notes: int = 0
    trims: bool = False

    def save(self, folder: Path) -> Path:
        t = self.backend()
        t.add_tokens(self.added)
        hf = PreTrainedTokenizerFast(
            tokenizer_object=t, chat_template=self.template.lstrip("\n"), **self.names
        )
        hf.save_pretrained(str(folder))
        return folder


IM_EOS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
S_EOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IM_ASK = "<|im_end|>\n<|im_start|>assistant\n"
USER = "<|im_start|>user\n"
EOT_ASK = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_BEGIN = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
)
SMOLLM3_BEGIN = (
    "<|im_start|>system\n## Metadata\n\nToday Date: 26 July 2024\nReasoning Mode: /no_think\n\n"
    "## Custom Instructions\n\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
)
GRANITE_BEGIN = (
    "<|start_of_role|>system<|end_of_role|>Today Date: July 26, 2024. You are Granite."
    "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>"
)
TURN = "<start_of_turn>user\n"
TURN_ASK = "<end_of_turn>\n<start_of_turn>model\n"
GEMMA_TOKENS = [
    special("<start_of_turn>"), special("<end_of_turn>"), plain("\n"), plain("\n\n"),
    plain("▁▁"), plain("<table>"),
]  # fmt: skip
qwen = partial(byte_level, nfc=True)

FAMILIES: dict[str, Family] = {
    "chatml": Family(byte_level, CHATML, USER, IM_ASK, "<|im_end|>", "<|im_start|>", IM, IM_EOS),
    "chatml in parts": Family(
        byte_level, CHATML_PARTS, USER, IM_ASK, "<|im_end|>", "<|im_start|>", IM, IM_EOS,
        in_parts=True,
    ),
    "qwen2.5": Family(
        qwen, CHATML_DEFAULT, HELPFUL + USER, IM_ASK, "<|im_end|>", HELPFUL + "<|im_start|>",
        [*IM, plain("<tool_call>"), plain("</tool_call>")], IM_EOS,
    ),
    "qwen3": Family(
        qwen, QWEN3, USER, IM_ASK + NO_THOUGHT + "\n", "<|im_end|>", "<|im_start|>",
        [*IM, plain("<think>"), plain("</think>")], IM_EOS, notes=1,
    ),
    "smollm3": Family(
        byte_level, SMOLLM3, SMOLLM3_BEGIN, IM_ASK + NO_THOUGHT, "<|im_end|>",
        SMOLLM3_BEGIN.removesuffix("user\n"),
        [*IM, plain("<think>"), plain("</think>")], IM_EOS,
    ),
    "llama3": Family(
        partial(byte_level, trim=True), LLAMA3, LLAMA3_BEGIN, EOT_ASK, "<|eot_id|>",
        LLAMA3_BEGIN.removesuffix("\n\n"), LLAMA3_TOKENS,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, trims=True,
    ),
    "llama2-prepend": Family(
        partial(sentencepiece, "prepend", S), LLAMA2, "<s>[INST] ", " [/INST]", " </s>", "<s>",
        [], S_EOS, trims=True,
    ),
    "llama2-first": Family(
        partial(sentencepiece, "first", S), LLAMA2, "<s>[INST] ", " [/INST]", " </s>", "<s>",
        [], S_EOS, trims=True,
    ),
    "llama2-always": Family(
        partial(sentencepiece, "always", S), LLAMA2, "<s>[INST] ", " [/INST]", " </s>", "<s>",
        [], S_EOS, trims=True,
    ),
    "mistral-old": Family(
        partial(sentencepiece, "prepend", S), MISTRAL_OLD, "<s>[INST] ", " [/INST]", "</s>", "<s>",
        [], S_EOS, system=False,
    ),
    "mistral": Family(
        partial(sentencepiece, "first", [*S, "[INST]", "[/INST]"]), MISTRAL, "<s>[INST]", "[/INST]",
        "</s>", "<s>[INST]", [], S_EOS,
    ),
    "gemma2": Family(
        partial(sentencepiece, "none", ["<bos>", "<eos>", "<pad>"]), GEMMA2, "<bos>" + TURN,
        TURN_ASK, "<end_of_turn>", "<bos><start_of_turn>", GEMMA_TOKENS,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        system=False, trims=True,
    ),
    "gemma3": Family(
        partial(sentencepiece, "none", ["<bos>", "<eos>", "<pad>"]), GEMMA3, "<bos>" + TURN,
        TURN_ASK, "<end_of_turn>", "<bos><start_of_turn>", GEMMA_TOKENS,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, trims=True,
    ),
    "phi3": Family(
        partial(sentencepiece, "prepend", S), PHI3, "<|user|>\n", "<|end|>\n<|assistant|>\n",
        "<|end|>", "<|user|>", ROLES,
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
    ),
    "phi4": Family(
        byte_level, PHI4, "<|im_start|>user<|im_sep|>", "<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|>", "<|im_start|>user<|im_sep|>", [*IM, special("<|im_sep|>")], IM_EOS,
    ),
    "olmo": Family(
        byte_level, OLMO, "<|endoftext|><|user|>\n", "\n<|assistant|>\n", "<|endoftext|>",
        "<|endoftext|>", [IM[0], plain("  "), plain("    ")],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "granite": Family(
        byte_level, GRANITE, GRANITE_BEGIN,
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>",
        GRANITE_BEGIN,
        [special(t) for t in ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")],
        {"eos_token": "<|end_of_text|>"},
    ),
    "internlm2": Family(
        partial(sentencepiece, "prepend", S), "{{- bos_token }}" + CHATML, "<s>" + USER, IM_ASK,
        "<|im_end|>", "<s><|im_start|>", IM, S_EOS,
    ),
    "unigram": Family(
        unigram, BOT, "<s><|user|>", "</s><|bot|>", "</s>", "<s><|user|>", [], S_EOS,
    ),
}  # fmt: skip
