"""Conversation -> token ids and labels, in one function so that they cannot drift apart.

The format is ChatML::

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{question}<|im_end|>\\n
    <|im_start|>assistant\\n{answer}<|im_end|>\\n
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lavis.common.errors import DataError
from lavis.common.types import IGNORE_INDEX, IMAGE_PLACEHOLDER, Encoded
from lavis.processors.tokenizer import QwenTokenizer

SYSTEM_PROMPT = "You are a helpful assistant."
IMAGE = f"<Img>{IMAGE_PLACEHOLDER}</Img>"
"""An image in a question, as the instruction data write it."""
DEFAULT_PROMPT = f"{IMAGE} Describe this image in detail."

LabelMask = Literal["chatml_delimiters", "assistant_only"]


class Turn(NamedTuple):
    """What one side says. Only a user's text can hold image placeholders."""

    role: Literal["user", "assistant"]
    text: str


def place_images(text: str, number: int) -> str:
    """A question with a place for each of its images: in front, unless it names them itself.

    Raises:
        DataError: it names more or fewer.
    """
    named = text.count(IMAGE_PLACEHOLDER)
    if named == number:
        return text
    if named:
        raise DataError(
            f"the question names {named} images ({IMAGE_PLACEHOLDER}), but {number} are new in it"
        )
    return f"{IMAGE * number} {text}"


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes conversations for training and prompts for generation.

    Attributes:
        tokenizer: gives ids.
        num_query_token: ids that stand for one image.
        max_txt_len: longest training example, in ids.
        label_mask: ``chatml_delimiters`` supervises the answers and every turn's delimiters, as
            the original does; ``assistant_only`` supervises the answers and what ends them.
        system: the system prompt.
    """

    tokenizer: QwenTokenizer
    num_query_token: int
    max_txt_len: int = 512
    label_mask: LabelMask = "chatml_delimiters"
    system: str = SYSTEM_PROMPT

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """Encode a training example, cut at ``max_txt_len``.

        Raises:
            DataError: if the cut would lose an image or leave no answer token to learn from.
        """
        ids, labels, answers, spans = self._render(turns)
        if spans and spans[-1] + self.num_query_token > self.max_txt_len:
            number = sum(s + self.num_query_token <= self.max_txt_len for s in spans) + 1
            raise DataError(
                f"image {number} of {len(spans)} ends at token "
                f"{spans[number - 1] + self.num_query_token}, past max_txt_len "
                f"{self.max_txt_len}; raise model.max_txt_len or shorten the text before it"
            )
        kept = set(answers[: self.max_txt_len]) - {0}
        if not kept:
            first = next((i for i, answer in enumerate(answers) if answer), None)
            raise DataError(
                "no answer to learn from: every answer is empty"
                if first is None
                else f"no answer to learn from: the first answer starts at token {first}, past "
                f"max_txt_len {self.max_txt_len}; raise model.max_txt_len or shorten the question"
            )
        return Encoded(
            ids[: self.max_txt_len],
            labels[: self.max_txt_len],
            len(spans),
            cut_tokens=max(len(ids) - self.max_txt_len, 0),
            cut_answers=len(set(answers) - {0} - kept),
        )

    def constant_prefix(self) -> tuple[list[int], list[int]]:
        """Ids and labels that every conversation begins with, up to the user's first word."""
        ids, labels, *_ = self._render([])
        opening = [self.tokenizer.im_start_id, *self._role("user")]
        learn = self.label_mask == "chatml_delimiters"
        first = opening[0] if learn else IGNORE_INDEX
        return [*ids, *opening], [*labels, first, *[IGNORE_INDEX] * (len(opening) - 1)]

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation that ends with a question, up to where the answer begins."""
        ids = self._render(turns)[0]
        return [*ids, self.tokenizer.im_start_id, *self._role("assistant")]

    def latest(
        self, history: Sequence[tuple[str, str]], query: str, room: int, start: int = 0
    ) -> tuple[list[int], int]:
        """The prompt of a question with as many of the latest exchanges as ``room`` tokens hold.

        Images of those left out stay: they move to the beginning of the oldest text that is left.

        Args:
            start: how many of the oldest are left out in any case.

        Returns:
            The prompt's ids, more than ``room`` if the images and the question alone are, and how
            many of the oldest exchanges are left out.
        """
        for dropped in range(start, len(history) + 1):
            kept = [
                t for q, a in history[dropped:] for t in (Turn("user", q), Turn("assistant", a))
            ]
            first, *rest = [*kept, Turn("user", query)]
            images = sum(q.count(IMAGE_PLACEHOLDER) for q, _ in history[:dropped])
            if images:
                first = Turn("user", f"{IMAGE * images} {first.text}")
            prompt = self.prompt([first, *rest])
            if len(prompt) <= room:
                break
        return prompt, dropped

    def prompt_from_markup(self, text: str) -> list[int]:
        """Ids of a prompt in ChatML markup, as the original's ``generate`` takes it.

        Special tokens in ``text`` are markup: never call it on what a user typed.
        """
        ids: list[int] = []
        for i, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
            if i > 0:
                ids += self._image()
            ids += self.tokenizer.encode_markup(part)
        return ids

    def _render(self, turns: Sequence[Turn]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, labels, the turn of the answer that each id belongs to (or 0), image starts."""
        t = self.tokenizer
        ids: list[int] = []
        labels: list[int] = []
        answers: list[int] = []
        spans: list[int] = []

        def add(new: list[int], *, learn: bool = False, answer: int = 0) -> None:
            ids.extend(new)
            labels.extend(new if learn else [IGNORE_INDEX] * len(new))
            answers.extend([answer] * len(new))

        for number, (role, text) in enumerate([("system", self.system), *turns]):
            is_answer = role == "assistant"
            delimiters = self.label_mask == "chatml_delimiters"
            add([t.im_start_id], learn=delimiters)
            add(self._role(role))
            for i, part in enumerate(text.split(IMAGE_PLACEHOLDER) if role == "user" else [text]):
                if i > 0:
                    spans.append(len(ids))
                    add(self._image())
                add(t.encode(part), learn=is_answer, answer=number * is_answer)
            add([t.im_end_id, *t.newline_ids], learn=is_answer or delimiters)
        return ids, labels, answers, spans

    def _role(self, role: str) -> list[int]:
        return [*self.tokenizer.encode(role), *self.tokenizer.newline_ids]

    def _image(self) -> list[int]:
        return [self.tokenizer.image_id] * self.num_query_token
