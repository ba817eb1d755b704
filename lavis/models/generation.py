"""``generate`` and ``chat`` with the call shapes of the original and of LAVIS."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lavis.common.errors import ConfigError, DataError
from lavis.common.images import as_image
from lavis.common.types import IMAGE_PLACEHOLDER, Spans
from lavis.models.decode import require_context
from lavis.models.generation_settings import generation_options
from lavis.processors.contracts import Kind
from lavis.processors.conversation import ConversationEncoder, Turn, place_images

if TYPE_CHECKING:
    from lavis.models.vlm import VLM

logger = logging.getLogger(__name__)

History = Sequence[tuple[str, str]] | Sequence[dict[str, str]]

_TEXTS = ("text", "prompt", "text_input")
_HISTORY = (
    "a history is a list of (question, answer) pairs, or of {'role': .., 'content': ..} with user "
    "and assistant in turn after at most one system"
)


class Generator:
    """Text out of images and text, for a model that other code trains and chats with."""

    def __init__(self, model: VLM) -> None:
        self.model = model
        self.tokenizer, self.encoder = model.tokenizer, model.encoder

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
        chat: bool = False,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        **overrides: Any,
    ) -> list[str] | list[list[int]]:
        """Continue prompts.

        Args:
            samples: ``text``, a prompt or a list of them, with ``<ImageHere>`` where an image
                stands; ``image``, those of all prompts in order, as :meth:`pixels` takes them. A
                text that begins as the template's own prompts do (``<|im_start|>``, ``<s>``) is
                markup, special tokens included: build it from trusted text. Any other is a
                question, as in :meth:`chat`. In LAVIS's spelling, ``prompt`` or ``text_input``,
                each text has one image, which it need not name, and a single text is asked of
                every image.
            chat: return token ids, cut before the stop token, instead of text.
            generation_config: over ``GENERATION_DEFAULTS``.
            overrides: single settings, e.g. ``max_new_tokens=64``. The original's
                ``stop_words_ids``, lists of one token id, end an answer too.

        Raises:
            DataError: no prompt, or images and placeholders do not match.
            ConfigError: a setting cannot be honoured, or the prompt and the new tokens do not fit
                into the context.
        """
        if not isinstance(chat, bool):
            raise ConfigError(f"generate: its second argument is chat, a bool, not {chat!r}")
        options = generation_options(generation_config, overrides)
        texts, images = self._read_samples(samples)
        if not texts:
            return []
        prompts = [self._prompt(text) for text in texts]
        ids = self.model.generate_ids(prompts, images, options)
        return ids if chat else [self._text(answer) for answer in ids]

    @torch.no_grad()
    def chat(
        self,
        query: str,
        history: History | None = None,
        image_tensor: object = None,
        system: str | None = None,
        append_history: bool = True,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        *,
        verbose: bool = False,
        **overrides: Any,
    ) -> tuple[str, History]:
        """Answer a question after earlier turns.

        Args:
            system: the system prompt; by default the one that the model was trained with.
            query: what the user says; special tokens in it are ordinary characters.
            history: earlier (question, answer) pairs, or ``{"role": .., "content": ..}`` of user
                and assistant in turn, of which a first one may be the system's. The new turn is
                appended to it in its own form.
            image_tensor: one image per ``<ImageHere>`` of history and query, as :meth:`pixels`
                takes them.
            verbose: log the prompt and the answer.

        Returns:
            The answer and the history.

        Raises:
            DataError: images and placeholders do not match, or the history has another form.
            ConfigError: a setting is unknown, or the query alone does not fit into the window.
        """
        options = generation_options(generation_config, overrides)
        if not isinstance(query, str) or not query.strip():
            raise DataError(f"the question is no text: {query!r}")
        pairs, system = _read_history(history, system, self.encoder.system)
        encoder = self.encoder if system is None else replace(self.encoder, system=system)
        prompt, _ = fit_window(encoder, pairs, query, options, self.model.context)
        images = self.pixels(image_tensor)
        response = self._text(self.model.generate_ids([prompt], images, options)[0])
        if verbose:
            logger.info("prompt:\n%s\nanswer: %s", self.tokenizer.decode(prompt), response)
        turns: list[Any] = history if isinstance(history, list) else list(history or ())
        if append_history:
            if turns and isinstance(turns[-1], Mapping):
                turns.append({"role": "user", "content": query})
                turns.append({"role": "assistant", "content": response})
            else:
                turns.append((query, response))
        return response, turns

    def pixels(self, images: object) -> Tensor | None:
        """(N, 3, H, W) of images, or ``None`` without any.

        Args:
            images: a (3, H, W) or (N, 3, H, W) tensor that a processor made, a picture, its file,
                or a list of these.

        Raises:
            DataError: one is nothing of these, or the model was built without its processors.
        """
        if images is None:
            return None
        rows = []
        for image in images if isinstance(images, list | tuple) else [images]:
            if not isinstance(image, Tensor):
                picture = as_image(image)
                if self.model.vis_processor is None:
                    raise DataError("this model was built without its processors: use load_model")
                image = self.model.vis_processor(picture)
            if not image.is_floating_point() or image.ndim not in (3, 4):
                raise DataError(
                    f"an image tensor is {image.dtype} of shape {tuple(image.shape)}, not what "
                    "vis_processors['eval'] makes: (3, H, W) or (N, 3, H, W) of floats"
                )
            rows.append((image if image.ndim == 4 else image[None]).to(self.model.device))
        if len({row.shape[1:] for row in rows}) > 1:
            raise DataError(f"images of several shapes: {[tuple(row.shape) for row in rows]}")
        return torch.cat(rows) if rows else None

    def _read_samples(self, samples: Mapping[str, Any]) -> tuple[list[str], Tensor | None]:
        """Prompts and pixels of what :meth:`generate` takes."""
        if not isinstance(samples, Mapping):
            raise DataError(f"samples is a dictionary of text and image, not {samples!r}")
        key, *more = [key for key in samples if key != "image"] or ["nothing"]
        if more or key not in _TEXTS:
            raise DataError(
                f"samples has {', '.join(map(str, samples)) or 'nothing'}; it needs one of "
                f"{', '.join(_TEXTS)}, and may have image"
            )
        given = samples[key]
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise DataError(f"samples: {key} is no text and no list of texts: {given!r}")
        if not all(text.strip() for text in texts):
            raise DataError("a prompt is empty")
        images = self.pixels(samples.get("image"))
        placed = any(IMAGE_PLACEHOLDER in text or self._is_markup(text) for text in texts)
        if key != "text" and images is not None and not placed:
            texts = [given] * len(images) if isinstance(given, str) else texts
            if len(texts) != len(images):
                raise DataError(f"{len(texts)} prompts, but {len(images)} images: each needs one")
            texts = [place_images(text, [IMAGE_PLACEHOLDER]) for text in texts]
        return list(texts), images

    def _prompt(self, text: str) -> list[int]:
        begin, opening, marks = self._markup
        if not self._is_markup(text):
            return self.encoder.prompt([Turn("user", text)])
        _, found, rest = text.rpartition(opening)
        if not found or any(mark in rest for mark in marks):
            raise DataError(
                f"a prompt in markup ends with {opening}, not {text[-60:]!r} (it is markup, "
                f"since it begins with {begin})"
            )
        return self.encoder.prompt_from_markup(text)

    def _is_markup(self, text: str) -> bool:
        begin = self._markup[0]
        return bool(begin) and text.lstrip().startswith(begin)

    @cached_property
    def _markup(self) -> tuple[str, str, set[str]]:
        """What prompts in markup begin with, what opens the answer at their end, and the special
        tokens that cannot follow it."""
        template, system = self.encoder.template, self.encoder.system
        pieces = template.pieces([Turn("user", "a")], system=system, ask=True)
        special = [n for n, piece in enumerate(pieces) if piece.kind is Kind.DELIMITER]
        asked = max(n for n, piece in enumerate(pieces, start=1) if piece.kind is Kind.TEXT)
        if len(closing := [n for n in special if n >= asked]) > 1:
            asked = closing[0] + 1  # that one ends the question
        opening = "".join(piece.text for piece in pieces[asked:]).strip()
        # Without a special token in front, as `User:`, no text is taken for markup.
        begin = pieces[0].text.strip() if opening and 0 in special else ""
        stops = (self.tokenizer.decode([i]) for i in template.stops)
        marks = {mark.strip() for mark in (*(pieces[n].text for n in special), *stops)}
        return begin, opening, marks - {""}

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not text:
            logger.warning("an answer is empty: the model ended it before its first word")
        return text

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # see CausalLM.hidden
    def generate_ids(
        self,
        prompts: Sequence[list[int]],
        shown: Spans | Tensor | None,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        **overrides: Any,
    ) -> list[list[int]]:
        """Continue prompts of token ids; the answers are cut before the stop token.

        Args:
            prompts: image spans included.
            shown: by the spans, in order; (N, 3, H, W) pixels will do.
            generation_config: over ``GENERATION_DEFAULTS``.

        Raises:
            DataError, ConfigError: as :meth:`generate`.
        """
        options = generation_options(generation_config, overrides)
        longest = max(map(len, prompts))
        model = self.model
        require_context(model.context, longest, options["max_new_tokens"])
        row = torch.tensor([i for p in prompts for i in p])[None]
        if not isinstance(shown, Spans):
            shown = Spans() if shown is None else Spans(shown)
        features = model.encode_spans(shown)
        rows = model.embed(row, features)[0].split([len(p) for p in prompts])
        # Left padding: every prompt ends where its answer begins.
        embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
        mask = torch.zeros(len(rows), longest, dtype=torch.int64, device=embeds.device)
        for i, prompt in enumerate(rows):
            embeds[i, longest - len(prompt) :] = prompt
            mask[i, longest - len(prompt) :] = 1
        stops = [*self.encoder.template.stops, *options["eos_token_id"]]
        settings = {k: v for k, v in options.items() if k not in ("chat_format", "max_window_size")}
        generated = model.language.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            synced_gpus=model.sharded,  # all processes generate as long as one of them does
            generation_config=GenerationConfig(
                **{**settings, "eos_token_id": stops, "pad_token_id": self.tokenizer.pad_id}
            ),
        )
        return [_before_stop(ids, stops) for ids in generated.tolist()]


def fit_window(
    encoder: ConversationEncoder,
    history: Sequence[tuple[str, str]],
    query: str,
    options: dict[str, Any],
    context: int,
    *,
    start: int = 0,
    free: float = 0.0,
) -> tuple[list[int], int]:
    """The prompt of a question after as many earlier exchanges as the window holds.

    Args:
        options: ``max_window_size`` and ``max_new_tokens`` of :func:`generation_options`.
        context: the language model's, in tokens.
        start: how many of the oldest exchanges are left out in any case.
        free: share of the window that is left free if more have to be left out, so that the next
            questions need not leave out yet more.

    Returns:
        As :meth:`ConversationEncoder.latest`.

    Raises:
        ConfigError: the images and the question alone do not fit.
    """
    room = max(min(options["max_window_size"], context - options["max_new_tokens"]), 0)
    prompt, dropped = encoder.latest(history, query, room, start)
    if dropped > start and free:
        prompt, dropped = encoder.latest(history, query, int(room * (1 - free)), start)
    if len(prompt) > room:
        raise ConfigError(
            f"the question and the images take {len(prompt)} tokens, but {room} fit "
            f"(max_window_size {options['max_window_size']}, context {context}, "
            f"max_new_tokens {options['max_new_tokens']})"
        )
    return prompt, dropped


def _read_history(
    history: object, system: str | None, default: str | None
) -> tuple[list[tuple[str, str]], str | None]:
    """(question, answer) pairs, and the system prompt: the history's own, if it has one.

    Args:
        default: the model's, which callers of the original give at every call.
    """
    turns: list[tuple[object, object]] = []
    if not isinstance(history, list | tuple | None):
        history = [history]
    for i, turn in enumerate(history or ()):
        if isinstance(turn, Mapping) and turn.keys() == {"role", "content"}:
            turns.append((turn["role"], turn["content"]))
        elif isinstance(turn, list | tuple) and len(turn) == 2:
            turns += [("user", turn[0]), ("assistant", turn[1])]
        else:
            raise DataError(f"{_HISTORY}; history[{i}] is {str(turn)[:80]!r}")
    roles, texts = [role for role, _ in turns], [text for _, text in turns if isinstance(text, str)]
    has_system = roles[:1] == ["system"]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if roles[has_system:] != expected or len(texts) != len(turns):
        found = [(role, type(text).__name__) for role, text in turns]
        raise DataError(f"{_HISTORY}; this one has {found}")
    if has_system:
        said = texts.pop(0)
        if system not in (None, default, said):
            raise DataError("the system prompt is given twice: in the history and as `system`")
        system = said
    return list(zip(texts[::2], texts[1::2], strict=True)), system


def _before_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
