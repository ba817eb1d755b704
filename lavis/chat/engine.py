"""A model that several conversations share."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lavis.chat.cache import ConversationCache, room
from lavis.chat.graph import Record, TokenGraph
from lavis.chat.settings import ChatSettings
from lavis.chat.together import Request, Waiting, next_tokens
from lavis.common.device import to_device
from lavis.common.errors import ConfigError, DataError, WeightsError
from lavis.common.frames import VideoConfig
from lavis.common.images import as_image, is_video
from lavis.common.tiles import TilesConfig
from lavis.common.types import IMAGE_PLACEHOLDER
from lavis.common.videos import cut, read_video
from lavis.models.decode import NOT_A_NUMBER
from lavis.processors.conversation import tiles_text

if TYPE_CHECKING:
    from lavis.models import VLM

_NUMBERS = itertools.count(1)
_AT_ONCE = 16  # frames: bounded memory


@dataclass(frozen=True, eq=False)
class ChatImage:
    """An image, or a video, as the language model reads it.

    Attributes:
        name: how it is shown: a file's name.
        embeds: (N, Q, C) soft tokens, of each frame of a video, or of a picture and its tiles.
        numbers: of these N, over 0, and no other's.
        places: their placeholders in a text.
    """

    name: str
    embeds: Tensor
    numbers: tuple[int, ...]
    places: str

    @property
    def number(self) -> int:
        """That stands for it as a whole."""
        return self.numbers[0]


class ChatEngine:
    """Computes for conversations: one pass at a time, of all that are at their next token.

    What is a conversation's own (images, keys and values) is held by the conversation, so any
    number of them, in any threads, share an engine.
    """

    def __init__(
        self,
        model: VLM,
        processor: Callable[[Image.Image], Tensor],
        *,
        video: VideoConfig | None = None,
        tiles: TilesConfig | None = None,
        cache_bytes: float = math.inf,
        record: Record | None = None,
    ) -> None:
        """Take what computes.

        Args:
            model: in evaluation mode.
            processor: its image processor, ``vis_processors["eval"]``.
            video: which frames of a video are shown, ``preprocess.video`` of a configuration.
            tiles: which parts of a picture, ``preprocess.tiles``.
            cache_bytes: keys and values that are kept of all conversations. Those used least
                recently are given up beyond, and computed anew at the conversation's next
                question; the conversation that is being answered keeps its own in any case.
            record: records the pass of a token, to replay it: :func:`lavis.chat.graph.record_cuda`.

        Raises:
            ConfigError: not one frame of a video fits into ``video.max_tokens``, or a picture and
                its tiles not into ``tiles.max_tokens`` or the context.
        """
        self.model = model
        tokens = model.encoder.num_query_token
        self.video = (video or VideoConfig()).within(tokens)
        limit = "the language model's context"
        self.tiles = (tiles or TilesConfig()).within(tokens, model.context, limit)
        self.cache_bytes = cache_bytes
        self._token_bytes = 0.0  # of keys and values; known after the first pass
        self._used: weakref.WeakKeyDictionary[ConversationCache, None] = (
            weakref.WeakKeyDictionary()  # the latest last
        )
        self.tokenizer = model.tokenizer
        self.stops = model.encoder.template.stops
        self._processor = processor
        self._lock = threading.RLock()  # one forward pass at a time: bounded memory
        self._waiting = Waiting()
        self._record = record

    def encode_image(self, image: object, name: str = "") -> ChatImage:
        """Encode an image or a video, once for all turns.

        Args:
            image: what :func:`~lavis.common.images.as_image` takes (a path, a Pillow image, an
                array, bytes, a file), the (3, H, W) tensor that a processor made of it, or a
                video's path.
            name: how it is shown; the file's name by default.

        Raises:
            DataError: it is no image or video, or a tensor has the wrong shape.
        """
        if isinstance(image, Tensor):
            return self._encode(image[None], name, IMAGE_PLACEHOLDER)
        if isinstance(image, str | PathLike):
            name = name or Path(image).name
            if is_video(image):
                return self.encode_frames(read_video(Path(image), self.video), name)
        picture = as_image(image)
        grid = self.tiles.grid(*picture.size, self.model.image_size)
        return self._encode(self._pixels([picture, *cut(picture, grid)]), name, tiles_text(grid))

    def encode_frames(self, frames: Sequence[Image.Image], name: str = "") -> ChatImage:
        """Encode the frames of a video that are shown."""
        return self._encode(self._pixels(frames), name, IMAGE_PLACEHOLDER * len(frames))

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self._processor(picture) for picture in pictures])

    def _encode(self, pixels: Tensor, name: str, places: str) -> ChatImage:
        with self._lock, torch.no_grad():
            parts = [
                self.model.encode_image(to_device(part, self.model.device))
                for part in pixels.split(_AT_ONCE)
            ]
        numbers = tuple(next(_NUMBERS) for _ in pixels)
        return ChatImage(name or "image", torch.cat(parts), numbers, places)

    def content(self, prompt: Sequence[int], images: Sequence[ChatImage]) -> list[int]:
        """What a prompt's tokens are: ids, and for each image's span its number below 0."""
        spans = self.model.encoder.num_query_token
        numbers = [-n for image in images for n in image.numbers for _ in range(spans)]
        expected = sum(token == self.tokenizer.image_id for token in prompt)
        if expected != len(numbers):
            raise DataError(f"{len(numbers)} image positions are given, the text has {expected}")
        number = iter(numbers)
        return [next(number) if t == self.tokenizer.image_id else t for t in prompt]

    def branch(self, cache: ConversationCache, content: Sequence[int]) -> ConversationCache:
        """A cache for another conversation: a copy of what ``cache`` has in common with it."""
        with self._lock, torch.no_grad():  # no pass changes it meanwhile
            return cache.beginning(cache.common(list(content)))

    def extend(
        self, cache: ConversationCache, content: Sequence[int], images: Sequence[ChatImage]
    ) -> Tensor:
        """Compute what the cache does not hold of a prompt.

        Args:
            cache: rolled back to what it has in common with ``content``, then extended to all.
            content: of :meth:`content`.
            images: all that ``content`` refers to.

        Returns:
            (V,) fp32 logits of the token that follows.
        """
        request = Request(cache, list(content), _by_number(images))
        self._waiting.add(request)
        try:
            if self._waiting.lead(request):
                self._lead()
        finally:
            self._waiting.drop(request)
        return request.result()

    def _lead(self) -> None:
        """Compute what all threads wait for."""
        requests: list[Request] = []
        try:
            requests = self._waiting.take()
            with self._lock, torch.no_grad():
                self._compute(requests)
        finally:
            self._waiting.give_back(requests)

    def _compute(self, requests: Sequence[Request]) -> None:
        """Of those that want one token, in one pass."""
        language = self.model.language
        single = [r for r in requests if r.single and language.packs and language.caches]
        needed = sum(self._needed(r.cache, len(r.content)) for r in single)
        if len(single) > 1 and needed <= self.cache_bytes:
            with _errors_of(single):
                self._extend_together(single)
        for request in requests:
            if not request.done:
                with _errors_of([request]):
                    request.logits = self._extend(request)

    def _extend_together(self, requests: Sequence[Request]) -> None:
        """Compute one token of each."""
        for request in requests:
            request.cache.truncate(len(request.content) - 1)
        self._make_room({r.cache: len(r.content) for r in requests})
        caches, last = [r.cache for r in requests], [r.content[-1] for r in requests]
        logits = next_tokens(self.model.language, caches, last, self.model.device)
        for request, row in zip(requests, logits, strict=True):
            request.logits = row

    def _extend(self, request: Request) -> Tensor:
        """Compute what a conversation's cache does not hold."""
        cache, content, language = request.cache, request.content, self.model.language
        # The last token is always computed: its logits are not kept.
        start = min(cache.common(content), len(content) - 1)
        cache.truncate(start)
        kept = cache if language.caches else None  # without, all is computed anew
        if kept is not None:
            self._make_room({cache: len(content)})
        if self._record is not None and request.single and language.packs and language.caches:
            graph = TokenGraph.of(language, cache, self._record, self.model.device)
            if graph is not None:
                return graph(cache, content[-1])
        start = start if language.caches else 0
        embeds = self._embed(content[start:], request.embeds)
        positions = torch.arange(start, len(content), device=embeds.device)[None]
        hidden = language.hidden(embeds, positions, cache=kept)
        cache.content.extend(content[len(cache.content) :])
        self._token_bytes = max(self._token_bytes, cache.token_bytes)
        return language.logits(hidden[0, -1])

    def search(
        self,
        cache: ConversationCache,
        content: Sequence[int],
        images: Sequence[ChatImage],
        settings: ChatSettings,
        stopped: Callable[[], bool],
    ) -> list[int]:
        """Beam search; the cache holds the prompt afterwards, without the answer.

        Args:
            stopped: asked at every token whether to end with the best answer so far.

        Raises:
            WeightsError: the language model's output is not a number.
        """
        if not self.model.language.caches:
            raise ConfigError("num_beams above 1 needs a language model whose state can be kept")

        def ended(ids: Tensor, scores: object, **_: object) -> Tensor:
            return torch.full((len(ids),), stopped(), device=ids.device)

        with self._lock, torch.no_grad():
            before = Request(cache, list(content[:-1]), _by_number(images))
            _require_numbers(missing=bool(self._extend(before).isnan().any()))
            last = self._embed(content[-1:], _by_number(images))
            # Transformers wants the whole prompt and computes what is not in the cache of it.
            embeds = torch.cat([last.new_zeros(1, len(content) - 1, last.shape[-1]), last], 1)
            generated = self.model.language.model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64, device=last.device),
                cache=cache.repeated(settings.num_beams),
                stopping_criteria=StoppingCriteriaList([ended]),
                generation_config=GenerationConfig(
                    num_beams=settings.num_beams,
                    max_new_tokens=settings.max_new_tokens,
                    repetition_penalty=settings.repetition_penalty,
                    eos_token_id=list(self.stops),
                    pad_token_id=self.tokenizer.pad_id,
                ),
            )
        ids: list[int] = generated[0].tolist()
        return ids

    @torch.no_grad()
    def prompt_embeds(self, prompt: Sequence[int], images: Sequence[ChatImage]) -> Tensor:
        """(T, C) embeddings of a prompt's ids, images in place."""
        with self._lock:
            return self._embed(self.content(prompt, images), _by_number(images))[0]

    def _needed(self, cache: ConversationCache, tokens: int) -> float:
        return max(cache.nbytes, self._token_bytes * room(tokens))

    def _make_room(self, tokens: Mapping[ConversationCache, int]) -> None:
        """Give up keys and values of conversations but these, the longest idle first."""
        for cache in tokens:
            self._used.pop(cache, None)
        needed = sum(self._needed(cache, n) for cache, n in tokens.items())
        for other in list(self._used):
            if needed + sum(c.nbytes for c in self._used) <= self.cache_bytes:
                break
            other.clear()
            del self._used[other]
        self._used.update(dict.fromkeys(tokens))

    def _embed(self, content: Sequence[int], embeds: Mapping[int, Tensor]) -> Tensor:
        ids = [self.tokenizer.image_id if c < 0 else c for c in content]
        spans = [c for c in content if c < 0][:: self.model.encoder.num_query_token]
        shown = [embeds[number] for number in spans]
        return self.model.embed(torch.tensor([ids]), torch.stack(shown) if shown else None)


def _by_number(images: Sequence[ChatImage]) -> dict[int, Tensor]:
    """(Q, C) soft tokens of images by what stands for them in a conversation's content."""
    pairs = (zip(image.numbers, image.embeds, strict=True) for image in images)
    return {-number: soft for pair in pairs for number, soft in pair}


@contextmanager
def _errors_of(requests: Sequence[Request]) -> Iterator[None]:
    """Each conversation learns of what goes wrong with it, and of nothing else."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised in the thread that asked
        for request in requests:
            request.error = error


class TokenChooser:
    """The next token out of logits: the likeliest, or drawn."""

    def __init__(self, settings: ChatSettings) -> None:
        """Take its seed from the settings, or a new one."""
        self.do_sample = settings.do_sample
        self._generator = torch.Generator()
        if settings.seed is None:
            self.seed = self._generator.seed() % 2**63
        else:
            self.seed = settings.seed
        self._generator.manual_seed(self.seed)
        self._processors = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if settings.do_sample:
            if settings.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self._processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._processors.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, logits: Tensor, answer: Sequence[int]) -> int:
        """Choose the token that follows (V,) logits and the answer's ids so far.

        The device is waited for once.

        Raises:
            WeightsError: a logit is not a number.
        """
        scores = logits
        if self._processors:
            before = torch.tensor([list(answer)], dtype=torch.int64)
            scores = self._processors(to_device(before, logits.device), logits[None])[0]
        if not self.do_sample:
            both = torch.stack([scores.argmax(), logits.isnan().any().long()])
            token, missing = both.cpu().tolist()
            _require_numbers(missing=missing)
            return int(token)
        # Drawn on the CPU: a seed gives the same numbers on every device.
        shares = scores.softmax(-1).cpu()
        _require_numbers(missing=bool(shares.isnan().any()))  # one in the logits spoils all
        return int(shares.multinomial(1, generator=self._generator))


def _require_numbers(*, missing: bool) -> None:
    if missing:
        raise WeightsError(NOT_A_NUMBER)
