"""Talk to a model about an image on the terminal: ``python cli_demo.py --checkpoint PTH``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lavis.common.cli import (
    TOYBOX,
    add_model_arguments,
    resolve_model_arguments,
    run_cli,
    setup_logging,
)
from lavis.common.errors import DataError, LavisError

HELP = """:help              this text
:img PATH...       look at one or several images and start anew
:his               show the conversation
:clh               forget the conversation, keep the images
:clear             clear the screen
:exit              leave"""
PLACEHOLDER = "<Img><ImageHere></Img>"


def main() -> int:
    """Load a model and answer line by line until ``:exit`` or the end of input."""
    parser = argparse.ArgumentParser(description="Talk to a model about images.")
    add_model_arguments(parser)
    parser.add_argument("--image", nargs="*", default=[], help="images to begin with")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu or auto (default)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="default: %(default)s")
    args = parser.parse_args()
    setup_logging()
    if resolve_model_arguments(args) and not args.image:
        args.image = [str(TOYBOX / "image" / "scene.png")]

    from lavis.common.device import pick_device
    from lavis.models import load_model_and_preprocess

    model, processors, _ = load_model_and_preprocess(
        "minigpt4qwen",
        args.model_type,
        is_eval=True,
        device=pick_device(args.device),
        cfg_path=args.cfg_path,
        options=args.options,
    )
    model.load_checkpoint(args.checkpoint)
    return Chat(model, processors["eval"], args.max_new_tokens).run(args.image)


class Chat:
    """One conversation; a line is a command or a question."""

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.pixels: Any = None
        self.history: list[tuple[str, str]] = []

    def run(self, images: list[str]) -> int:
        """Read lines until the end of input. Returns the exit status: 1 if a line failed."""
        failed = not self._line(f":img {' '.join(images)}") if images else False
        while True:
            if sys.stdin.isatty():
                print("User: ", end="", flush=True)
            line = sys.stdin.readline()
            if not line or line.strip() in (":exit", ":quit", ":q"):
                return int(failed)
            if line.strip():
                failed |= not self._line(line.strip())

    def _line(self, line: str) -> bool:
        try:
            self._command(*line.split()) if line.startswith(":") else self._ask(line)
        except LavisError as error:
            print(f"error: {error}", file=sys.stderr)
            return False
        return True

    def _command(self, name: str, *arguments: str) -> None:
        if name in (":help", ":h"):
            print(HELP)
        elif name == ":img":
            self._look(arguments)
        elif name in (":history", ":his"):
            print("\n".join(f"User: {q}\nAssistant: {a}" for q, a in self.history))
        elif name in (":clear-his", ":clh"):
            self.history = []
        elif name in (":clear", ":cl"):
            print("\033[2J\033[H" if sys.stdout.isatty() else "", end="")
        else:
            raise DataError(f"unknown command {name}; :help lists them")

    def _look(self, paths: tuple[str, ...]) -> None:
        import torch

        from lavis.common.images import open_image

        if not paths:
            raise DataError(":img needs a path, such as :img cat.jpg")
        self.pixels = torch.stack([self.processor(open_image(Path(p))) for p in paths])
        self.history = []
        print(f"looking at {', '.join(paths)}")

    def _ask(self, question: str) -> None:
        if self.pixels is not None and not self.history and "<ImageHere>" not in question:
            question = PLACEHOLDER * len(self.pixels) + f" {question}"
        answer, self.history = self.model.chat(
            question, self.history, self.pixels, max_new_tokens=self.max_new_tokens
        )
        print(f"Assistant: {answer}", flush=True)


if __name__ == "__main__":
    run_cli(main)
