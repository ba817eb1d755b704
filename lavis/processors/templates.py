"""Chat templates: the tokenizer's own, taken apart into markup and texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from typing import NamedTuple

from jinja2 import TemplateError

from lavis.common.errors import ConfigError, DataError, LavisError
from lavis.processors.chatml import text_pieces
from lavis.processors.contracts import Kind, Piece, Turn
from lavis.processors.hf_tokenizer import FastTokenizer

WAY_OUT = (
    "write the template as a class of about 15 lines and name it, language.template: "
    "my_pkg.my_module:MyTemplate (docs/extend.md shows one, lavis/processors/chatml.py is one)"
)
# A template that writes today's date would train on one and ask on another: for every template
# it is the day that Llama 3's writes where it cannot know.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{c}', '{date(2024, 7, 26):%{c}}')" for c in "dBbmYyA")
    + " }}{%- endmacro -%}"
)
_BLANKS = " \n\t\u3000"
# What a template might escape, fold or collapse.
_INSIDE = " \"'<&>\\\n  éÉ中Aa_"
_SENTINELS = re.compile(rf"⟪(\d+)⟫{re.escape(_INSIDE)}⟪\1⟫")

Message = tuple[str, str]
"""A role, of ``system``, ``user`` and ``assistant``, and a text."""
_Roles = tuple[tuple[str, str | None], ...]
"""A conversation's roles; with a text that is rendered as it is, being blank, or None."""


class _Slot(NamedTuple):
    """Where a message's text stands, and which blanks the template trims from its ends.

    Attributes:
        message: its number.
        left: characters trimmed in front; none if empty, every blank if None.
        right: the same behind.
    """

    message: int
    left: str | None
    right: str | None


class TokenizerTemplate:
    """The chat template that a tokenizer brings along.

    It is rendered once for each sequence of roles, with sentinels in place of the texts; what
    stands between them is markup. So a text is never looked at by the template, only trimmed if
    the template trims: a thought or a command in it is not acted upon. An empty text, which
    templates like to leave out with its markup, is rendered as it is.

    Attributes:
        tokenizer: whose template it is.
        thinking: whether answers are trained and asked with the template's room for thoughts.
        stops: what ends an answer, and the tokenizer's end tokens.
        source: the template in Jinja.
        in_parts: whether it takes a message's content as a list of texts and images, as templates
            of models that see do, and not as a text.
        no_system: why the template takes no system prompt; None if it does.
    """

    def __init__(self, tokenizer: FastTokenizer, *, thinking: bool = False) -> None:
        """Take the template apart for a first conversation.

        Raises:
            ConfigError: there is none, or it does more with the texts than place and trim them.
        """
        self.tokenizer = tokenizer
        self.thinking = thinking
        self._shapes: dict[tuple[_Roles, bool], list[Piece | _Slot]] = {}
        try:
            self.source = _FIXED_DATE + str(tokenizer.hf.get_chat_template())
        except ValueError as error:
            raise self._refusal(f"no chat template to use ({error})") from error
        self.in_parts = not self._shows_texts() and self._shows_texts(in_parts=True)
        example = self.pieces([Turn("user", "?"), Turn("assistant", "!")])
        end = [text for text, kind in example if kind is Kind.END][-1]
        self.stops = tuple(dict.fromkeys([tokenizer.encode_markup(end)[-1], *tokenizer.eos]))
        self.no_system: str | None = None
        try:
            self.pieces([Turn("user", "?")], system="!", ask=True)
        except ConfigError as error:
            self.no_system = str(error)

    def pieces(
        self, turns: Sequence[Turn], *, system: str | None = None, ask: bool = False
    ) -> list[Piece]:
        messages = _messages(turns, system)
        pieces: list[Piece] = []
        for part in self._shape(messages, ask):
            if isinstance(part, Piece):
                pieces.append(part)
                continue
            role, text = messages[part.message]
            text = text.lstrip(part.left).rstrip(part.right)
            kind = Kind.ANSWER if role == "assistant" else Kind.TEXT
            pieces += text_pieces(text, kind, images=role == "user")
        return pieces

    def reference(
        self, turns: Sequence[Turn], *, system: str | None = None, ask: bool = False
    ) -> list[int]:
        """The ids that Transformers gives, special tokens in texts included."""
        ids = self._apply(_messages(turns, system), ask, tokenize=True)
        assert isinstance(ids, list)
        return self.tokenizer.with_image_id(ids)

    def _apply(self, messages: Sequence[Message], ask: bool, *, tokenize: bool) -> str | list[int]:
        result: str | list[int] = self.tokenizer.hf.apply_chat_template(
            [
                {"role": role, "content": [{"type": "text", "text": t}] if self.in_parts else t}
                for role, t in messages
            ],
            add_generation_prompt=ask,
            tokenize=tokenize,
            return_dict=False,
            chat_template=self.source,
            enable_thinking=self.thinking,  # Qwen, SmolLM
            thinking=self.thinking,  # Granite, DeepSeek
        )
        return result

    def _shows_texts(self, *, in_parts: bool = False) -> bool:
        """Whether the text of a question gets into the prompt."""
        self.in_parts = in_parts
        with suppress(LavisError):
            return _sentinel(0) in self._render([("user", _sentinel(0))], True)
        return False

    def _shape(self, messages: Sequence[Message], ask: bool) -> list[Piece | _Slot]:
        roles = tuple(
            (role, None if text.strip() or role == "assistant" else text) for role, text in messages
        )
        if (roles, ask) not in self._shapes:
            self._shapes[roles, ask] = self._take_apart(roles, ask)
        return self._shapes[roles, ask]

    def _take_apart(self, roles: _Roles, ask: bool) -> list[Piece | _Slot]:
        """Markup and slots of a conversation."""
        order, gaps = self._gaps(roles, ask)
        trimmed = self._trimmed(roles, ask, gaps)
        shape: list[Piece | _Slot] = []
        before = ""
        for k, gap in enumerate(gaps):
            after = roles[order[k]][0] if k < len(order) else ""
            rest = self._unasked(roles[: order[k]], gap) if after == "assistant" else ""
            shape += self._markup(gap.removesuffix(rest), after_answer=before == "assistant")
            if rest:
                shape.append(Piece(rest, Kind.END))
            if after:
                shape.append(_Slot(order[k], *trimmed[k]))
            before = after
        return shape

    def _gaps(
        self, roles: _Roles, ask: bool, left: str = "", right: str = ""
    ) -> tuple[list[int], list[str]]:
        """The messages with a sentinel in the order in which these stand, and what is around them.

        Args:
            left: what each sentinel has in front.
            right: what it has behind.
        """
        messages = [
            (role, f"{left}{_sentinel(i)}{right}" if text is None else text)
            for i, (role, text) in enumerate(roles)
        ]
        rendered = self._render(messages, ask)
        parts = _SENTINELS.split(rendered)
        order = [int(number) for number in parts[1::2]]
        for i, (role, text) in enumerate(roles):
            if text is not None or order.count(i) == 1:
                continue
            kept = f"⟪{i}⟫" in rendered
            if role == "system" and not kept:
                raise ConfigError(
                    f"{self.tokenizer.path}: the chat template leaves the system prompt out; give "
                    f"none, or {WAY_OUT}"
                )
            what = "repeats" if i in order else "rewrites" if kept else "leaves out"
            raise self._refusal(f"the chat template {what} the text of a message ({role})")
        return order, parts[::2]

    def _trimmed(
        self, roles: _Roles, ask: bool, gaps: Sequence[str]
    ) -> list[tuple[str | None, str | None]]:
        """The blanks trimmed from either end of each text: arguments for ``str.strip``."""
        trimmed = [["", ""] for _ in gaps[1:]]
        for blank in _BLANKS:
            left = self._gaps(roles, ask, left=blank)[1]
            right = self._gaps(roles, ask, right=blank)[1]
            for k, ends in enumerate(trimmed):
                before, after = gaps[k : k + 2]
                padded = ((left[k], before, before + blank), (right[k + 1], after, blank + after))
                for end, (found, lost, kept) in enumerate(padded):
                    if found not in (lost, kept):
                        raise self._refusal(
                            "the chat template changes with the blanks around a text"
                        )
                    ends[end] += blank * (found == lost)
        return [(None if a == _BLANKS else a, None if b == _BLANKS else b) for a, b in trimmed]

    def _unasked(self, roles: _Roles, gap: str) -> str:
        """The end of the markup before an answer that no prompt has: the model writes it."""
        if not roles or roles[-1][0] != "user":
            return ""
        asked = self._gaps(roles, True)[1][-1]
        return gap.removeprefix(asked) if gap.startswith(asked) else ""

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        try:
            return str(self._apply(messages, ask, tokenize=False))
        except (TemplateError, TypeError, ValueError) as error:
            reason = str(error).strip() or type(error).__name__
        if messages and messages[0][0] == "system":
            with suppress(DataError):
                self._render(messages[1:], ask)
                raise ConfigError(
                    f"{self.tokenizer.path}: the chat template takes no system prompt ({reason}); "
                    "give none"
                )
        raise DataError(
            f"{self.tokenizer.path}: the chat template refuses a conversation of "
            f"{', '.join(role for role, _ in messages) or 'no message'}: {reason}"
        )

    def _markup(self, text: str, *, after_answer: bool) -> list[Piece]:
        is_special, parts = self.tokenizer.markup, self.tokenizer.split(text)
        pieces: list[Piece] = []
        if after_answer:
            stop = next((n for n, part in enumerate(parts, start=1) if part in is_special), None)
            if stop is None:
                raise self._refusal("the chat template ends an answer with no special token")
            pieces.append(Piece("".join(parts[:stop]), Kind.END))
            parts = parts[stop:]
        kinds = (Kind.DELIMITER if is_special.get(part) else Kind.MARKUP for part in parts)
        return [*pieces, *map(Piece, parts, kinds)]

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(f"{self.tokenizer.path}: {what}; {WAY_OUT}")


def _messages(turns: Sequence[Turn], system: str | None) -> list[Message]:
    return [*([] if system is None else [("system", system)]), *turns]


def _sentinel(number: int) -> str:
    """A text that no template contains."""
    return f"⟪{number}⟫{_INSIDE}⟪{number}⟫"
