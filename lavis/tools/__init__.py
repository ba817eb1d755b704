"""Command-line tools, and what other programs load: lmms-eval finds the model here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def lmms_manifest() -> ModelManifest:
    """What the entry point ``lmms_eval.models`` gives: the class behind ``--model lavis``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="lavis", chat_class_path="lavis.tools.lmms_model.LavisModel")
