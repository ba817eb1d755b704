"""One chat engine under the terminal, the scripts and the web page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis.chat.conversation import Answer, Conversation, Exchange
    from lavis.chat.engine import ChatEngine, ChatImage
    from lavis.chat.settings import ChatSettings

__all__ = ["Answer", "ChatEngine", "ChatImage", "ChatSettings", "Conversation", "Exchange"]

_LAZY = {
    "Answer": "lavis.chat.conversation",
    "Conversation": "lavis.chat.conversation",
    "Exchange": "lavis.chat.conversation",
    "ChatEngine": "lavis.chat.engine",
    "ChatImage": "lavis.chat.engine",
    "ChatSettings": "lavis.chat.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
