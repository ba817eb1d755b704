"""What a model answers on probe conversations, recorded for the process that reloads it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import __version__

from lavis.common.errors import WeightsError
from lavis.models.export import check
from lavis.models.export.targets import Target
from lavis.models.vlm import VLM
from lavis.processors.contracts import Turn
from lavis.processors.conversation import IMAGE

_NEW_TOKENS = 8
_ASKED = (
    (f"{IMAGE} What is in the picture?",),
    (f"{IMAGE}\nWhat is this?", "A red ball.", "Count from one to ten."),
    (f"{IMAGE}{IMAGE} Compare the two pictures.",),
    (f"用一句话描述图片：{IMAGE}",),
)
"""Conversations of a user and an assistant in turn."""
_TEXT_ALONE = ("Name a colour. 说一种颜色。",)
# Length of a difference, as a share: of other weights it would be more, of other rounding less.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Proof:
    """How far a reloaded folder is from the model that it was written of.

    Attributes:
        family: the stock class.
        features: largest difference of a number of an image's features.
        logits: largest difference of a logit.
        same: how many greedy answers are the same, token by token.
        conversations: of how many; prompts and pixels are the same in all.
    """

    family: str
    features: float
    logits: float
    same: int
    conversations: int

    def __str__(self) -> str:
        return (
            f"reloaded as {self.family} of Transformers {__version__}, in a process without this "
            f"package: prompts and pixels are the same, image features differ by at most "
            f"{self.features:.1e}, logits by {self.logits:.1e}; {self.same} of "
            f"{self.conversations} greedy answers are the same"
        )


@contextmanager
@torch.no_grad()
def record(
    model: VLM, target: Target, image_id: int, dtype: torch.dtype, device: str
) -> Iterator[Path]:
    """A folder with pictures, conversations and what the model makes of them.

    Args:
        image_id: of the exported tokenizer.
        dtype: of the exported weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        pictures = [_picture(size) for size in ((131, 97), (200, 260))]
        for n, picture in enumerate(pictures):
            picture.save(path / f"{n}.png")
        said: list[dict[str, Any]] = []
        wanted: dict[str, Tensor] = {}
        for n, turns in enumerate(_ASKED + (_TEXT_ALONE,) * (target.repeat == 1)):
            asked = [Turn("assistant" if k % 2 else "user", text) for k, text in enumerate(turns)]
            shown = [(n + k) % len(pictures) for k in range("".join(turns).count(IMAGE))]
            said.append({"messages": list(map(_message, asked)), "pictures": shown})
            computed = _computed(model, asked, [pictures[k] for k in shown], image_id)
            wanted |= {f"{n}.{name}": tensor for name, tensor in computed.items()}
        tolerance = max(_TOLERANCE[d] for d in {dtype, model.dtype})
        content = {
            "class": target.family.__name__,
            "asked": said,
            "pictures": [f"{n}.png" for n in range(len(pictures))],
            "tolerance": tolerance,
            "device": str(model.device),
        }
        (path / "record.json").write_text(json.dumps(content), encoding="utf-8")
        save_file(wanted, path / "record.safetensors")
        yield path


def reload(folder: Path, recorded: Path) -> Proof:
    """Have the folder compared by a process that has nothing of this package.

    Raises:
        WeightsError: with the first difference.
    """
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-I", check.__file__, str(folder), str(recorded)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)  # noqa: S603
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise WeightsError(f"Transformers cannot use the exported folder: {reason}; it is removed")
    result = json.loads(lines[-1])
    if "difference" in result:
        raise WeightsError(
            f"the exported folder, reloaded, is another model: {result['difference']}; it is "
            "removed"
        )
    said = json.loads((recorded / "record.json").read_text(encoding="utf-8"))
    return Proof(said["class"], **result)


def _picture(size: tuple[int, int]) -> Image.Image:
    """Colours that run over the picture, with noise."""
    noise = torch.rand(size[1], size[0], 3, generator=torch.Generator().manual_seed(size[0]))
    rise = torch.linspace(0, 1, size[0])[None, :, None] * torch.tensor([1.0, 0.5, 0.2])
    return Image.fromarray(((0.7 * rise + 0.3 * noise) * 255).byte().numpy())


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as Transformers takes it, where the template puts a blank behind an image."""
    if turn.role == "assistant":
        return {"role": turn.role, "content": turn.text}
    parts = filter(None, re.split(f"({IMAGE}) ?", turn.text))
    content = [{"type": "image"} if p == IMAGE else {"type": "text", "text": p} for p in parts]
    return {"role": turn.role, "content": content}


def _computed(
    model: VLM, turns: list[Turn], pictures: list[Image.Image], image_id: int
) -> dict[str, Tensor]:
    """Prompt, pixels, image features, greedy answer with its end, and the answer's logits."""
    prompt = model.encoder.prompt(turns)
    computed: dict[str, Tensor] = {}
    pixels = features = None
    if pictures:
        assert model.vis_processor is not None
        pixels = torch.stack([model.vis_processor(p) for p in pictures])
        features = model.encode_image(pixels.to(model.device))
        computed = {"pixels": pixels, "features": features.flatten(0, 1).float().cpu()}
        pixels = pixels.to(model.device)
    said = model.generate_ids([prompt], pixels, {"max_new_tokens": _NEW_TOKENS})[0]
    ended = len(said) < _NEW_TOKENS  # then the row behind the answer gives what ends it
    if image_id in said:  # which an untrained model may say, and the exported one never does
        said, ended = said[: said.index(image_id)], False
    row = torch.tensor([[*prompt, *said]])
    positions = torch.arange(row.shape[1], device=model.device)[None]
    hidden = model.language.hidden(model.embed(row, features), positions)
    last = row.shape[1] if ended else row.shape[1] - 1
    logits = model.language.logits(hidden[0, len(prompt) - 1 : last]).cpu()
    answer = [*said, int(logits[-1].argmax())] if ended else said
    mine = model.tokenizer.image_id
    computed["prompt"] = torch.tensor([image_id if i == mine else i for i in prompt])
    return computed | {"answer": torch.tensor(answer), "logits": logits.contiguous()}
