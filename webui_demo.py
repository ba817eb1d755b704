"""Talk to a model about images in a browser: ``python webui_demo.py --checkpoint PTH``."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import signal

from lavis.chat.command import add_chat_arguments, load_chat
from lavis.chat.web.server import bind
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


def check_address(host: str, port: int) -> None:
    """Find out before the weights are loaded whether the address is free.

    Raises:
        ConfigError: it is not, or is no address of this machine.
    """
    advice = {
        errno.EADDRINUSE: "another program uses this port; choose another --port, or 0 for any",
        errno.EACCES: "ports below 1024 are the administrator's; choose one above",
        errno.EADDRNOTAVAIL: "this machine has no such address",
    }
    try:
        if not 0 <= port < 2**16:
            raise ConfigError(f"--port {port} cannot be used: ports are from 0 to 65535")
        with bind(host, port):
            pass
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        why = advice.get(number or 0, str(error))
        raise ConfigError(f"--host {host} --port {port} cannot be used: {why}") from error


if __name__ == "__main__":
    run_cli(main)
