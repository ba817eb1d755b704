"""Serve a model as OpenAI's chat completions: ``python -m lavis.serve --checkpoint PTH``."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from lavis.chat.address import bind, check_address
from lavis.chat.command import add_chat_arguments, load_chat
from lavis.chat.server.heap import share_heap
from lavis.common.cli import positive, run_cli, setup_logging, whole_number
from lavis.common.errors import ConfigError

if TYPE_CHECKING:
    from lavis.chat.server.prompts import Limits

logger = logging.getLogger(__name__)
_KEY, _REMOTE_KEY = "LAVIS_API_KEY", "LAVIS_PROMPT_EMBEDS_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: those of every chat program, and the server's own."""
    add_chat_arguments(parser)
    parser.set_defaults(seed=None)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all networks (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="0: any free one (%(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get(_KEY),
        help=f"that requests must have; better by the environment's {_KEY}, where `ps` does not "
        "show it",
    )  # fmt: skip
    parser.add_argument(
        "--served-model", metavar="NAME",
        help="the model's name in requests (the name of --cfg-path's file, or the --model-type)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits of a request, and of all")
    for flag, default, metavar, text in (
        ("--max-body-mb", 32, "MB", "a request's body, and a picture that is fetched"),
        ("--max-pictures", 16, "N", "pictures of a request"),
        ("--max-megapixels", 50, "N", "million pixels of a picture"),
        ("--max-messages", 512, "N", "messages of a request"),
        ("--max-seconds", 300, "S", "from a request's arrival to the end of its answer"),
        ("--parallel", 16, "N", "requests that are answered at once"),
        ("--keep-conversations", 64, "N", "conversations whose keys and values are kept"),
    ):
        more = f"{text} (%(default)s)"
        limits.add_argument(flag, type=positive, default=default, metavar=metavar, help=more)
    limits.add_argument(
        "--max-queue", type=whole_number(0), default=64, metavar="N",
        help="requests that wait; more are answered 429 (%(default)s)",
    )  # fmt: skip
    limits.add_argument(
        "--grace", type=whole_number(0), default=30, metavar="S",
        help="seconds that answers have to end when the server is stopped (%(default)s)",
    )  # fmt: skip
    limits.add_argument(
        "--allow-url-host", action="append", default=[], metavar="HOST[:PORT]",
        help="fetch pictures from there, too; may be given several times. Without, pictures come "
        "in the request alone",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-embeds", metavar="URL",
        help="let a vLLM server at http://HOST:PORT/v1 generate, which runs the language model "
        f"with --enable-prompt-embeds; its key, if any, is the environment's {_REMOTE_KEY}",
    )  # fmt: skip


def main() -> int:
    """Load the model, serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m lavis.serve",
        description="Serve a model as OpenAI's chat completions (docs/serve.md).",
    )
    add_arguments(parser)
    args = parser.parse_args()
    setup_logging()
    check_arguments(args)
    share_heap()
    engine, settings, _ = load_chat(args)

    from lavis.chat.server.answers import Answers, Backend
    from lavis.chat.server.app import ChatServer, http_server
    from lavis.chat.server.remote import RemoteAnswers

    limits = limits_of(args)
    name = args.served_model or (Path(args.cfg_path).stem if args.cfg_path else args.model_type)
    backend: Backend = Answers(engine, limits, settings)
    if args.prompt_embeds:
        backend = RemoteAnswers(
            engine, limits, settings, args.prompt_embeds,
            model=name, api_key=os.environ.get(_REMOTE_KEY),
        )  # fmt: skip
    server = ChatServer(backend, limits, model=name, api_key=args.api_key)
    listener = bind(args.host, args.port)
    shown = f"[{args.host.strip('[]')}]" if ":" in args.host else args.host
    print(f"http://{shown}:{listener.getsockname()[1]}/v1  model {name}  (Ctrl-C ends)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service's stop is a Ctrl-C
    try:
        http_server(server.app, args.grace).run(sockets=[listener])
    except KeyboardInterrupt:  # raised again when all is over
        logger.info("stopped")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be served, before the weights are loaded.

    Raises:
        ConfigError: naming the argument.
    """
    if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
        raise ConfigError(
            "the server needs FastAPI and uvicorn: pip install 'lavis-minigpt4qwen[serve]'"
        )
    if args.api_key is not None and not args.api_key.strip():
        raise ConfigError(f"--api-key or {_KEY} is empty: give a key, or neither")
    for host in args.allow_url_host:
        if not host or set(host) & set("/@?# ") or "*" in host:
            raise ConfigError(f"--allow-url-host {host}: give a host's name, or HOST:PORT")
    if args.prompt_embeds and not args.served_model:
        raise ConfigError("--prompt-embeds needs --served-model: the name that vLLM has for it")
    check_address(args.host, args.port)
    if args.api_key is None and not _is_loopback(args.host):
        logger.warning("--host %s without --api-key: whoever reaches it may use it", args.host)


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits that the arguments name."""
    from lavis.chat.server.prompts import Limits

    return Limits(
        body_bytes=args.max_body_mb * 10**6,
        pictures=args.max_pictures,
        pixels=args.max_megapixels * 10**6,
        messages=args.max_messages,
        parallel=args.parallel,
        queue=args.max_queue,
        seconds=args.max_seconds,
        conversations=args.keep_conversations,
        hosts=frozenset(host.lower() for host in args.allow_url_host),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_cli(main)
