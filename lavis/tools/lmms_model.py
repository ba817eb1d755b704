"""The model behind ``lmms-eval --model lavis`` (https://github.com/EvolvingLMMs-Lab/lmms-eval)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from lavis.common.errors import ConfigError, DataError, LavisError, at
from lavis.common.images import as_image
from lavis.common.types import IMAGE_PLACEHOLDER, Spans
from lavis.common.videos import cut, read_video
from lavis.models.decode import Prompts, require_context
from lavis.models.generation import Generator
from lavis.models.loading import find_model
from lavis.processors.conversation import IMAGE, Turn, tiles_text
from lavis.tasks.sheets import grouped

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

logger = logging.getLogger(__name__)
_SAMPLING = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
_READ = ("max_new_tokens", "until", "do_sample", *_SAMPLING)


class LavisModel(lmms):
    """Answers the requests of lmms-eval's chat protocol.

    Under ``torchrun`` every process has a whole model and answers its share.

    Args:
        cfg: a run's YAML.
        checkpoint: what was trained.
        options: ``key=value`` overrides of the YAML, separated by semicolons.
        device: ``cuda``, ``cuda:N``, ``cpu`` or ``auto``.
        batch_size: requests at once. An answer that ends makes room for the next request.
        max_new_tokens: of a task that sets none.
        max_frames: of a video, in place of the YAML's ``preprocess.video.max_frames``.
        others: what lmms-eval passes to every model (``max_batch_size``) has no effect.

    Raises:
        ConfigError, WeightsError: with what to mend.
    """

    is_simple = False

    def __init__(
        self,
        cfg: str = "",
        checkpoint: str | None = None,
        options: str = "",
        device: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        max_frames: int | None = None,
        **others: object,
    ) -> None:
        super().__init__()
        if not cfg:
            raise ConfigError("--model_args: cfg is missing: name a run's YAML, cfg=run.yaml")
        if unknown := sorted(set(others) - {"max_batch_size"}):
            raise ConfigError(
                f"--model_args: unknown: {', '.join(unknown)} (known: cfg, checkpoint, options, "
                "device, batch_size, max_new_tokens, max_frames)"
            )
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ConfigError(f"--batch_size must be a positive number, not {batch_size!r}")
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        self.device = torch.device(self._share(device or "auto"))
        overrides = [option.strip() for option in options.split(";") if option.strip()]
        found = find_model("", checkpoint=checkpoint, cfg_path=cfg, options=overrides)
        self.model, *_ = found.load(self.device, "--device", "--device cpu")
        tokens = self.model.encoder.num_query_token
        video = found.config.preprocess.video
        self.video = replace(video, max_frames=max_frames or video.max_frames).within(tokens)
        self.tiles = found.config.preprocess.tiles.within(
            tokens, self.model.context, "the language model's context"
        )
        self.device = self.model.device

    def _share(self, device: str) -> str:
        """Where this process computes; several divide the requests among them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return str(self.accelerator.device)

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests, cut before what ``until`` names."""
        settings = [request.args[2] or {} for request in requests]
        keys = [repr(sorted(given.items())) for given in settings]
        answers: dict[int, str] = {}
        for numbers in grouped(range(len(requests)), keys.__getitem__).values():
            given = settings[numbers[0]]
            for number, ids in self._answer(requests, numbers, given):
                text = self.model.tokenizer.decode(ids, skip_special_tokens=True)
                answers[number] = _cut(text, given.get("until")).strip()
        return [answers[number] for number in range(len(requests))]

    def _answer(
        self, requests: Sequence[Instance], numbers: Sequence[int], given: Mapping[str, Any]
    ) -> Iterator[tuple[int, list[int]]]:
        """The ids of requests that have the same settings, by the requests' numbers."""
        if ignored := sorted(set(given) - set(_READ)):
            logger.warning("settings of the task that have no effect: %s", ", ".join(ignored))
        most = int(given.get("max_new_tokens") or self.max_new_tokens)
        starts = range(0, len(numbers), self.batch_size)
        batches = (self._prompts(requests, numbers[i : i + self.batch_size], most) for i in starts)
        if not (sampling := _sampling(given)):
            answers = self.model.answers(batches, max_new_tokens=most, size=self.batch_size)
            yield from ((numbers[number], ids) for number, ids in answers)
            return
        for start, prompts in zip(starts, batches, strict=True):
            ids = self.model.generate_ids(prompts.ids, prompts.spans, sampling, max_new_tokens=most)
            yield from zip(numbers[start : start + self.batch_size], ids, strict=True)

    def _prompts(
        self, requests: Sequence[Instance], numbers: Sequence[int], max_new_tokens: int
    ) -> Prompts:
        ids: list[list[int]] = []
        pictures: list[Any] = []
        for number in numbers:
            _, doc_to_messages, _, doc_id, task, split = requests[number].args
            with at(f"task {task}, {split}[{doc_id}]", LavisError):
                messages = ChatMessages(
                    messages=doc_to_messages(self.task_dict[task][split][doc_id])
                )
                prompt, shown = self._prompt(messages)
                require_context(self.model.context, len(prompt), max_new_tokens)
            ids.append(prompt)
            pictures += shown
        pixels = Generator(self.model).pixels(pictures)
        return Prompts(ids, Spans() if pixels is None else Spans(pixels))

    def _prompt(self, messages: ChatMessages) -> tuple[list[int], list[Any]]:
        """Ids of a conversation that ends with a question, and its pictures in order."""
        turns: list[Turn] = []
        pictures: list[Any] = []
        encoder = self.model.encoder
        for message in messages.messages:
            text = ""
            for content in message.content:
                part, shown = self._part(content)
                # As the instruction data have it: a space between pictures and question.
                text += " " * (text.endswith("</Img>") and content.type == "text") + part
                pictures += shown
            if message.role == "system":
                encoder = replace(encoder, system=text)
            else:
                turns.append(Turn(message.role, text))
        if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise DataError("the messages must be of user and assistant in turn, the last a user's")
        return encoder.prompt(turns), pictures

    def _part(self, content: Any) -> tuple[str, list[Any]]:
        """A part of a message as text with places for its pictures, and these."""
        if content.type == "text":
            if IMAGE_PLACEHOLDER in content.text:
                raise DataError(f"a text of the task holds {IMAGE_PLACEHOLDER}")
            return content.text, []
        if content.type == "image":
            picture = as_image(content.url)
            grid = self.tiles.grid(*picture.size, self.model.image_size)
            shown = IMAGE.replace(IMAGE_PLACEHOLDER, tiles_text(grid))
            return shown, [picture, *cut(picture, grid)]
        if content.type != "video":
            raise DataError(f"the model reads text, images and videos, no {content.type}")
        if content.start_time is not None or content.end_time is not None:
            raise DataError("a part of a video cannot be read; the task must give the whole")
        frames = content.url
        if isinstance(frames, str | Path):
            frames = read_video(Path(frames), self.video)
        elif not isinstance(frames, list | tuple):
            raise DataError(f"a video must be a file or a list of pictures, not {frames!r:.60}")
        return IMAGE.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER * len(frames)), list(frames)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError("--model lavis answers; tasks that rank answers cannot be run")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError(
            "--model lavis answers one round; multi-round tasks cannot be run"
        )


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an answer that is not the likeliest; nothing for one that is."""
    chosen = {key: given[key] for key in _SAMPLING if given.get(key) is not None}
    if not chosen.get("temperature") and not given.get("do_sample"):
        for key in ("temperature", "top_p", "top_k"):
            chosen.pop(key, None)
        plain = {"num_beams": 1, "repetition_penalty": 1.0}
        return {k: v for k, v in chosen.items() if v != plain[k]}
    return chosen | {"do_sample": True}


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text
