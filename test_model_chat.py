"""Ask a model about one image: ``python test_model_chat.py --checkpoint PTH --image a.jpg``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lavis.chat.command import TOYBOX_IMAGE, add_chat_arguments, load_chat
from lavis.common.cli import printable, run_cli, setup_logging
from lavis.common.errors import DataError
from lavis.common.paths import user_path
from lavis.common.videos import check_media

FIRST = "Describe this image in detail."
SECOND = "Is there a refrigerator in the picture? Answer yes or no."
TOYBOX_SECOND = "图里有几个物体？"


def main() -> int:
    """Load the model, ask two questions in one conversation, print the answers."""
    parser = argparse.ArgumentParser(description="Ask two questions about an image.")
    add_chat_arguments(parser)
    parser.add_argument(
        "--image", type=user_path, help="image or video file; the toybox has one of its own"
    )
    parser.add_argument("--question", default=FIRST, help="default: %(default)s")
    parser.add_argument("--second-question", help=f"default: {SECOND}; empty: only one question")
    args = parser.parse_args()
    setup_logging()
    if args.image is None and (args.checkpoint or args.cfg_path or args.model_type):
        raise DataError("--image is missing: name an image file")
    image = Path(args.image or TOYBOX_IMAGE)
    check_media(image)  # a wrong path is told before a model is loaded

    engine, settings, toybox = load_chat(args)
    from lavis.chat.conversation import Conversation

    conversation = Conversation(engine, settings)
    conversation.show(image)
    second = args.second_question
    if second is None:
        second = TOYBOX_SECOND if toybox else SECOND
    for question in filter(None, (args.question, second)):
        answer = conversation.ask(question)
        sys.stdout.write(f"User: {answer.exchange.question}\nAssistant: ")
        for piece in answer:
            print(printable(piece), end="", flush=True)
        print("\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
