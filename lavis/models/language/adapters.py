"""Which of a language model's layers take low-rank adapters, and putting them there."""

from __future__ import annotations

from torch import nn

from lavis.common.errors import ConfigError
from lavis.common.registry import did_you_mean
from lavis.models.config import LoraConfig
from lavis.models.language.causal import CausalLM

_AT = "model.train.language.lora"


def lora_targets(language: CausalLM, options: LoraConfig) -> list[str]:
    """Full names of the layers that adapters wrap, of those in decoder layers.

    A target is the end of a name, from a dot on: ``q_proj``, ``mlp.down_proj``, or
    ``layers.3.mlp.down_proj`` for one layer alone.

    Raises:
        ConfigError: a target names no linear layer.
    """
    blocks = set(language.blocks())
    inside = {m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    names = [n for n, m in language.model.named_modules() if m in inside]
    kinds = sorted({n.rpartition(".")[2] for n in names})
    targets = kinds if options.targets == "all" else options.targets
    found = {t: [n for n in names if f".{n}".endswith(f".{t}")] for t in targets}
    unknown = [t for t in targets if not found[t]]
    if unknown or not found:
        what = f"no layer {', '.join(unknown)}" if unknown else "no linear layer is named"
        near = did_you_mean(unknown[0], kinds) if unknown else ""
        raise ConfigError(f"{_AT}.targets: {what}{near} (there are: {', '.join(kinds) or 'none'})")
    wanted = {n for some in found.values() for n in some}
    return [n for n in names if n in wanted]


def add_lora(language: CausalLM, options: LoraConfig) -> None:
    """Put trainable low-rank adapters on a language model's projections, in place.

    Raises:
        ConfigError: a target names no linear layer, or DoRA is asked for where the weights are
            not floating-point numbers.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear

    from lavis.models.compute.adapted_linear import AdaptedLinear

    wanted = lora_targets(language, options)
    for name in wanted:
        weight = language.model.get_submodule(name).weight
        if options.use_dora and not weight.is_floating_point():
            raise ConfigError(
                f"{_AT}.use_dora: {name} has quantized weights, whose norms DoRA would need at "
                "every pass; leave quantize out, or set use_dora: false"
            )
    config = PeftConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=wanted,
        bias="none",
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )
    inject_adapter_in_model(config, language.model)
    for module in language.model.modules():
        if isinstance(module, Linear):
            AdaptedLinear.take_over(module)
