"""Tables that translate the original's parameter names to the library parts' and back.

A table is a list of :class:`Rule`. ``{}`` in a pattern stands for a layer number, ``*`` for the
rest of a name. A source that is split in equal parts along its first dimension appears in one rule
with several targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """``source`` in the original's file holds ``targets`` of our module, one after the other."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class SourceKey:
    """Where a target comes from: part ``part`` of ``parts`` of ``key``."""

    key: str
    part: int = 0
    parts: int = 1

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a source of which every part has the shape ``shape``."""
        return tuple(shape) if self.parts == 1 else (shape[0] * self.parts, *shape[1:])

    def cut(self, tensor: Tensor) -> Tensor:
        """The part of a source tensor, as a view."""
        return tensor if self.parts == 1 else tensor.chunk(self.parts)[self.part]


@dataclass(frozen=True)
class KeyMap:
    """A translation table.

    Attributes:
        rules: how the files' names relate to our modules'.
        dropped: regular expressions of names in the file that are not ours.
    """

    rules: tuple[Rule, ...]
    dropped: tuple[str, ...] = ()

    def source(self, target: str) -> SourceKey:
        """Where a target is found in the original's file.

        Raises:
            KeyError: if no rule names the target.
        """
        for pattern, rule, part in self._by_target:
            if match := pattern.fullmatch(target):
                return SourceKey(_fill(rule.source, match.groups()), part, len(rule.targets))
        raise KeyError(target)

    def is_dropped(self, key: str) -> bool:
        """Whether a name in the file is known not to be ours."""
        return any(re.fullmatch(pattern, key) for pattern in self.dropped)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate a state dict back to the original's names, joining what was split.

        Raises:
            KeyError: if a name has no rule or only some parts of a source are given.
        """
        parts: dict[str, dict[int, Tensor]] = {}
        counts: dict[str, int] = {}
        for name, tensor in state.items():
            source = self.source(name)
            parts.setdefault(source.key, {})[source.part] = tensor
            counts[source.key] = source.parts
        joined = {}
        for key, tensors in parts.items():
            if len(tensors) != counts[key]:
                raise KeyError(f"{key}: {len(tensors)} of {counts[key]} parts given")
            ordered = [tensors[i] for i in range(counts[key])]
            joined[key] = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
        return joined

    def under(self, source_prefix: str, target_prefix: str) -> KeyMap:
        """The same table with a prefix on either side."""
        rules = (
            Rule(source_prefix + r.source, tuple(target_prefix + t for t in r.targets))
            for r in self.rules
        )
        return KeyMap(tuple(rules), tuple(re.escape(source_prefix) + d for d in self.dropped))

    @cached_property
    def _by_target(self) -> list[tuple[re.Pattern[str], Rule, int]]:
        return [
            (_pattern(target), rule, part)
            for rule in self.rules
            for part, target in enumerate(rule.targets)
        ]


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)").replace(r"\*", r"(.+)"))


def _fill(template: str, groups: Iterable[str]) -> str:
    for group in groups:
        template = re.sub(r"\{\}|\*", lambda _, g=group: g, template, count=1)  # type: ignore[misc]
    return template


SAME_NAMES = KeyMap((Rule("*", ("*",)),))
"""For files whose names are the model's own."""

VIT = KeyMap(
    rules=SAME_NAMES.rules,
    # The final norm and head of the pretraining task, which BLIP-2 does without.
    dropped=(r"(norm|fc_norm|head)\..*",),
)
"""``eva_vit_g.pth`` -> :class:`timm.models.eva.Eva`: the names are the same."""

_LAYER = "Qformer.bert.encoder.layer.{}"
_OURS = "Qformer.encoder.layer.{}"

QFORMER = KeyMap(
    rules=(
        Rule("query_tokens", ("query_tokens",)),
        Rule("ln_vision.*", ("ln_vision.*",)),
        Rule("Qformer.bert.embeddings.LayerNorm.*", ("Qformer.layernorm.*",)),
        *(
            Rule(f"{_LAYER}.{part}.self.*", (f"{_OURS}.{part}.attention.*",))
            for part in ("attention", "crossattention")
        ),
        *(
            Rule(f"{_LAYER}.{part}.*", (f"{_OURS}.{part}.*",))
            for part in (
                "attention.output",
                "crossattention.output",
                "intermediate_query",
                "output_query",
            )
        ),
    ),
    dropped=(
        r"Qformer\.cls\..*",
        r"Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings)\.weight",
        r"Qformer\.bert\.embeddings\.position_ids",
        r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
        r"(t5|opt)_(proj|model)\..*",
        r"(vision_proj|text_proj|itm_head)\..*|temp",
    ),
)
"""``blip2_pretrained_*.pth`` -> query tokens, ``ln_vision`` and the Q-Former's query branch."""

QWEN = KeyMap(
    rules=(
        Rule("transformer.wte.weight", ("model.embed_tokens.weight",)),
        Rule("transformer.ln_f.weight", ("model.norm.weight",)),
        Rule("lm_head.weight", ("lm_head.weight",)),
        *(
            Rule(f"transformer.h.{{}}.{source}", tuple(f"model.layers.{{}}.{t}" for t in targets))
            for source, targets in (
                ("ln_1.weight", ("input_layernorm.weight",)),
                ("ln_2.weight", ("post_attention_layernorm.weight",)),
                *(
                    (f"attn.c_attn.{kind}", tuple(f"self_attn.{p}_proj.{kind}" for p in "qkv"))
                    for kind in ("weight", "bias")
                ),
                ("attn.c_proj.weight", ("self_attn.o_proj.weight",)),
                ("mlp.w2.weight", ("mlp.gate_proj.weight",)),
                ("mlp.w1.weight", ("mlp.up_proj.weight",)),
                ("mlp.c_proj.weight", ("mlp.down_proj.weight",)),
            )
        ),
    ),
    # Constants that some conversions saved along.
    dropped=(
        r"transformer\.rotary_emb\.inv_freq",
        r"transformer\.h\.\d+\.attn\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
)
"""First-generation Qwen -> :class:`transformers.Qwen2ForCausalLM`."""

_STOCK_LAYER, _BLOCK = "vision_model.encoder.layers.{}", "visual_encoder.blocks.{}"

BLIP2 = KeyMap(
    rules=(
        Rule("vision_model.embeddings.class_embedding", ("visual_encoder.cls_token",)),
        Rule("vision_model.embeddings.position_embedding", ("visual_encoder.pos_embed",)),
        Rule("vision_model.embeddings.patch_embedding.*", ("visual_encoder.patch_embed.proj.*",)),
        *(
            Rule(f"{_STOCK_LAYER}.{stock}.*", (f"{_BLOCK}.{ours}.*",))
            for stock, ours in (
                ("layer_norm1", "norm1"),
                ("layer_norm2", "norm2"),
                ("self_attn.projection", "attn.proj"),
                ("mlp", "mlp"),
            )
        ),
        Rule(f"{_STOCK_LAYER}.self_attn.qkv.weight", (f"{_BLOCK}.attn.qkv.weight",)),
        # The keys' third is zero.
        Rule(
            f"{_STOCK_LAYER}.self_attn.qkv.bias",
            tuple(f"{_BLOCK}.attn.{part}_bias" for part in "qkv"),
        ),
        Rule("vision_model.post_layernorm.*", ("ln_vision.*",)),
        Rule("query_tokens", ("query_tokens",)),
        Rule("qformer.*", ("Qformer.*",)),
    ),
    dropped=(r"language_(model|projection)\..*",),
)
""":class:`transformers.Blip2ForConditionalGeneration` -> our ViT, LayerNorm and Q-Former."""


def full_model(language: KeyMap) -> KeyMap:
    """A whole model's names in the original's layout, for checkpoints.

    Args:
        language: how the language model's names relate to its files'.
    """
    return KeyMap(
        rules=(
            *VIT.under("visual_encoder.", "vision.visual_encoder.").rules,
            *QFORMER.under("", "vision.").rules,
            Rule("vision.*", ("vision.*",)),  # of other encoders
            Rule("llm_proj.weight", ("connector.weight",)),
            Rule("llm_proj.bias", ("connector.bias",)),
            Rule("connector.*", ("connector.*",)),  # of more than one layer
            *language.under("llm_model.", "language.model.").rules,
        )
    )
