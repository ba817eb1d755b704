"""Talk to a model about images on the terminal: ``python cli_demo.py --checkpoint PTH``."""

from __future__ import annotations

import argparse
import logging
import sys

from lavis.chat.command import TOYBOX_IMAGE, add_chat_arguments, config_of, load_chat
from lavis.common.cli import printable, run_cli, setup_logging
from lavis.common.paths import user_path
from lavis.common.videos import check_media

EXAMPLES = """examples:
  python cli_demo.py                                     the toybox, a tiny model that is included
  python cli_demo.py -c checkpoint_9.pth --image cat.jpg
  echo '图里有什么？' | python cli_demo.py -c checkpoint_9.pth --image cat.jpg > answer.txt

Type :help for the commands. Ctrl-C stops an answer, Ctrl-D leaves."""


def main() -> int:
    """Load a model and answer line by line until ``:exit`` or the end of input."""
    parser = argparse.ArgumentParser(
        description="Talk to a model about images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_chat_arguments(parser)
    parser.add_argument(
        "--image",
        nargs="*",
        action="extend",
        type=user_path,
        default=[],
        help="images or videos of the first question",
    )
    parser.add_argument(
        "--plan", nargs="?", const="rtx3090", metavar="CARD",
        help="say what a conversation needs on a card, and answer nothing: needs neither weights "
        "nor a GPU. CARD is a name (rtx3090, the default, l40s, ...) or GiB",
    )  # fmt: skip
    args = parser.parse_args()
    setup_logging(logging.WARNING if args.plan else logging.INFO)
    if args.plan:
        from lavis.runners.plan_page import card, plan_chat

        chosen = card(args.plan)
        print(plan_chat(config_of(args), chosen))
        return 0
    for path in args.image:
        check_media(path)  # a wrong path is told before a model is loaded

    engine, settings, toybox = load_chat(args)
    from lavis.chat.terminal.repl import Repl, pipe_reader

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    repl = Repl(engine, settings, interactive=interactive)
    if images := args.image or [TOYBOX_IMAGE] * toybox:
        repl.show(images)
    if not interactive:
        return repl.run(pipe_reader(sys.stdin))
    from lavis.chat.terminal.screen import terminal_reader

    about = ", ".join(image.name for image in repl.conversation.images) or "no image yet"
    print(printable(f"Talking to {args.cfg_path or args.model_type} about {about}."))
    print("Ask, or type :help. Ctrl-C stops an answer, Ctrl-D leaves.")
    return repl.run(terminal_reader())


if __name__ == "__main__":
    run_cli(main)
