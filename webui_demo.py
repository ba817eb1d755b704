"""Talk to a model about images in a browser: ``python webui_demo.py --checkpoint PTH``."""

from __future__ import annotations

import argparse
import importlib.util
import signal

from lavis.chat.address import check_address
from lavis.chat.command import add_chat_arguments, load_chat
from lavis.common.cli import run_cli, setup_logging
from lavis.common.errors import ConfigError


def main() -> int:
    """Load the model, serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Chat about images in a browser.")
    add_chat_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all networks (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--share", action="store_true", help="a public address through gradio.live, for all to use"
    )
    parser.add_argument(
        "--root-path", default="", metavar="PATH", help="where a reverse proxy shows it, e.g. /chat"
    )
    parser.add_argument("--lang", default="auto", choices=["zh", "en", "auto"])
    args = parser.parse_args()
    setup_logging()
    if not all(map(importlib.util.find_spec, ("gradio", "markdown_it"))):
        raise ConfigError(
            "the web page needs Gradio and markdown-it-py: pip install 'lavis-minigpt4qwen[web]'"
        )
    check_address(args.host, args.port)
    engine, settings, toybox = load_chat(args)

    from lavis.chat.web.app import WebChat

    web = WebChat(engine, settings, language=args.lang, toybox=toybox)
    address = web.launch(args.host, args.port, share=args.share, root_path=args.root_path)
    print(f"{address}  (Ctrl-C ends)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service's stop is a Ctrl-C
    web.wait()
    return 0


if __name__ == "__main__":
    run_cli(main)
