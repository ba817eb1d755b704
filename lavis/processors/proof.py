"""Does a template give what Transformers gives? Asked with probe conversations before a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lavis.common.errors import ConfigError
from lavis.common.types import IMAGE_PLACEHOLDER
from lavis.processors.contracts import ChatTemplate, Ids, Kind, Turn
from lavis.processors.hf_tokenizer import FastTokenizer
from lavis.processors.templates import WAY_OUT, TokenizerTemplate

TEXTS = (
    "What is it?",
    "",
    "  blanks  ",
    "\n\nlines\n\n",
    " \n ",
    "图里有什么？",
    "1234567890, 3.14 and -5",
    "🙂 👩‍🚀 é e\u0301",
    "def f(x):\n    return {'a': [x]}\n",
    f"{IMAGE_PLACEHOLDER}What is it?",
    f"Two: {IMAGE_PLACEHOLDER} and {IMAGE_PLACEHOLDER}\n",
    'a\'b "c" \\ 1 < 2 & 3 > 2',
)
_SHOWN = 8
"""Tokens that a message shows on either side of the first difference."""


def prove(template: TokenizerTemplate, system: str | None = None) -> list[str]:
    """Compare probe conversations with ``apply_chat_template(tokenize=True)``.

    Args:
        system: the system prompt that the model will have, besides those of the probes.

    Returns:
        What is as the template has it and yet worth knowing, a line each.

    Raises:
        ConfigError: the ids differ, with what stands around the first difference.
    """
    tokenizer = template.tokenizer
    for said, turns in _probes(template, system):
        for number in range(1, len(turns) + 1):
            some, ask = turns[:number], number % 2 == 1
            ids = tokenizer.encode_pieces(template.pieces(some, system=said, ask=ask)).ids
            expected = template.reference(some, system=said, ask=ask)
            if ids != expected:
                raise ConfigError(
                    f"{tokenizer.path}: the chat template cannot be taken apart into markup and "
                    f"texts:\n{_difference(tokenizer, expected, ids)}\nfor {(said, some)}; "
                    f"{WAY_OUT}"
                )
    return check(template, tokenizer, system)


def check(template: ChatTemplate, tokenizer: FastTokenizer, system: str | None = None) -> list[str]:
    """Check what holds of every template, one's own included.

    Returns:
        What is worth knowing, a line each.

    Raises:
        ConfigError: an answer ends in a token that does not stop generation; markup needs a row
            that the model has not got; or a text gives a special token.
    """

    def encode(turns: list[Turn], *, said: str | None = system, ask: bool = False) -> Ids:
        return tokenizer.encode_pieces(template.pieces(turns, system=said, ask=ask))

    turns = [Turn("user", TEXTS[0]), Turn("assistant", "Yes, two.")]
    ids, kinds = trained = encode(turns)
    ends = [i for i, kind in zip(ids, kinds, strict=True) if kind is Kind.END]
    if not ends or ends[-1] not in template.stops:
        raise ConfigError(
            f"{tokenizer.path}: an answer ends in {tokenizer.names(ends[-1:])}, which is none of "
            f"the tokens that stop generation, {tokenizer.names(template.stops)}"
        )
    if absent := [i for i in (*ids, *template.stops) if i >= tokenizer.rows]:
        raise ConfigError(
            f"{tokenizer.path}: the chat template writes {tokenizer.names(absent[:1])[0]}, token "
            f"{absent[0]}, but the language model has {tokenizer.rows} rows"
        )

    def marks(question: str, answer: str, said: str) -> list[tuple[int, Kind]]:
        texts = [Turn("user", question), Turn("assistant", answer)]
        encoded = encode(texts, said=None if system is None else said)
        return [x for x in zip(*encoded, strict=True) if x[0] in tokenizer.markup_ids]

    hostile = "".join(tokenizer.markup).replace(IMAGE_PLACEHOLDER, "")
    if marks("a", "b", "c") != marks(hostile, f"{hostile}{IMAGE_PLACEHOLDER}", hostile):
        raise ConfigError(f"{tokenizer.path}: what looks like markup in a text becomes markup")
    asked = [encode(some, ask=True).ids for some in (turns[:1], [*turns, turns[0]])]
    return _notes(tokenizer, trained, encode([*turns, *turns]).ids, asked)


def _probes(
    template: TokenizerTemplate, system: str | None
) -> Iterator[tuple[str | None, list[Turn]]]:
    """Conversations of two exchanges, over every text as a question and as an answer."""
    # A text with a special token, as the tags in Gemma's vocabulary, is meant to differ.
    markup, split = template.tokenizer.markup.keys(), template.tokenizer.split
    texts = [t for t in TEXTS if (markup - {IMAGE_PLACEHOLDER}).isdisjoint(split(t))]
    systems = [None, *(["Be brief.", " \n Blanks. 图\n"] if template.no_system is None else [])]
    if system is not None and markup.isdisjoint(split(system)):
        systems.append(system)
    answers = [t for t in texts if t.strip() and IMAGE_PLACEHOLDER not in t]
    for said in systems:
        for n, text in enumerate(texts):
            one, two = answers[n % len(answers)], answers[(n + 1) % len(answers)]
            again = texts[(n + 3) % len(texts)]
            yield said, [
                Turn("user", text), Turn("assistant", one),
                Turn("user", again), Turn("assistant", two),
            ]  # fmt: skip


def _notes(
    tokenizer: FastTokenizer, trained: Ids, whole: list[int], asked: Sequence[list[int]]
) -> list[str]:
    """Where training and asking differ by the template's own design.

    Args:
        trained: one exchange.
        whole: the same exchange twice.
        asked: the prompts of its two questions.
    """
    prompt, ids = asked[0], trained.ids
    begin = next(n for n, kind in enumerate(trained.kinds) if kind in (Kind.ANSWER, Kind.END))
    if ids[:begin] != prompt:
        ends, before = (" ".join(map(repr, tokenizer.names(i[-5:]))) for i in (prompt, ids[:begin]))
        return [
            f"the chat template asks and trains differently: a prompt ends in {ends}, but in "
            f"training an answer stands after {before}"
        ]
    if any(whole[: len(ids)] != ids for ids in asked):
        return [
            "the chat template writes earlier turns in another way than the latest: in a "
            "conversation of several questions, answers are trained in the form of earlier turns"
        ]
    return []


def _difference(tokenizer: FastTokenizer, expected: Sequence[int], ids: Sequence[int]) -> str:
    """The tokens around the first difference, one list over the other."""
    pairs = zip(expected, ids, strict=False)
    first = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(ids)))
    lines = [f"from token {first} on"]
    for title, tokens in (("Transformers", expected), ("its parts", ids)):
        shown = tokenizer.names(tokens[max(0, first - _SHOWN) : first + _SHOWN])
        lines.append(f"  {title:12}  {' '.join(map(repr, shown))}")
    return "\n".join(lines)
