"""The server with many clients, beside one client, and beside clients one after another.

The toybox answers. Each client holds one conversation after the other, each about a picture of its
own that every turn sends again, as OpenAI's clients do. Every answer is compared with what the
engine alone says, piece by piece: nearly every piece is a token.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import math
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks.process import status
from examples.toybox.world.scenes import draw, random_scene
from lavis.common.cli import output_file, positive, run_cli
from lavis.common.errors import LavisError
from lavis.common.paths import REPOSITORY, TOYBOX

QUESTIONS = ("What is in the picture?", "图里有几个物体？", "Describe this image in detail.")
LONGEST = 64  # tokens of an answer
MIB = 1024**2


@dataclass
class Asked:
    """A turn.

    Attributes:
        pieces: of the answer, as they came.
        first: seconds to the first of them.
        usage: OpenAI's counts of tokens.
    """

    question: str
    pieces: list[str]
    first: float
    usage: dict[str, Any]

    @property
    def computed(self) -> int:
        """Tokens of the prompt that had not been computed before."""
        return int(
            self.usage["prompt_tokens"] - self.usage["prompt_tokens_details"]["cached_tokens"]
        )


@dataclass
class Load:
    """What clients saw.

    Attributes:
        talks: turns of conversations, by the numbers of their pictures.
        memory: the server's bytes at the beginning, and after each quarter of the time.
    """

    turns: int
    talks: dict[int, list[Asked]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    seconds: float = 0

    def numbers(self) -> dict[str, Any]:
        """For a report."""
        answers = [asked for talk in self.talks.values() for asked in talk]
        found: dict[str, Any] = {
            "answers": len(answers),
            "errors": len(self.errors),
            "requests_per_s": len(answers) / self.seconds,
            "tokens_per_s": sum(a.usage["completion_tokens"] for a in answers) / self.seconds,
            "memory_bytes": self.memory,
        }
        for turn in (1, self.turns):
            at = [talk[turn - 1] for talk in self.talks.values() if len(talk) >= turn]
            found[f"turn_{turn}"] = first_tokens(at)
        return found


def first_tokens(answers: Sequence[Asked]) -> dict[str, Any]:
    """Milliseconds to the first token, and what was computed for it."""
    times = sorted(1e3 * a.first for a in answers) or [float("nan")]
    return {
        "conversations": len(answers),
        "computed_tokens": statistics.median([a.computed for a in answers] or [0]),
        "p50_ms": statistics.median(times),
        "p95_ms": times[math.ceil(0.95 * len(times)) - 1],
    }


def picture(number: int) -> bytes:
    """The PNG file of a drawn scene."""
    rng, file = random.Random(number), io.BytesIO()
    draw(random_scene(rng, held_out=None), rng).save(file, "PNG")
    return file.getvalue()


@contextmanager
def server(parallel: int) -> Iterator[tuple[str, int]]:
    """A server of the toybox: its address and process."""
    flags = {"--port": 0, "--parallel": parallel, "--max-queue": 1000, "--max-new-tokens": LONGEST}
    command = [sys.executable, "-m", "lavis.serve", *(str(x) for f in flags.items() for x in f)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        found = re.match("http://[^ ]+", process.stdout.readline())
        if found is None:
            raise LavisError(f"{' '.join(command)} does not start: run it to see why")
        yield found[0], process.pid
    finally:
        process.terminate()
        process.wait()


async def ask(client: httpx.AsyncClient, messages: list[Any]) -> Asked:
    """Ask, and read the answer as it comes."""
    begun, first, pieces, usage = time.perf_counter(), 0.0, list[str](), None
    body = {"model": "toybox", "messages": messages, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    async with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            raise LavisError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise LavisError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter() - begun
                    pieces.append(piece)
            usage = chunk["usage"] or usage
    if usage is None:
        raise LavisError("an answer without its end")
    return Asked(messages[-1]["content"][-1]["text"], pieces, first, usage)


def messages_of(number: int, talk: Sequence[Asked], question: str) -> list[Any]:
    """The next request of a conversation."""
    url = f"data:image/png;base64,{base64.b64encode(picture(number)).decode()}"
    messages: list[Any] = []
    for asked in talk:
        messages.append({"role": "user", "content": [{"type": "text", "text": asked.question}]})
        messages.append({"role": "assistant", "content": "".join(asked.pieces)})
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    messages[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
    return messages


async def put_load(address: str, process: int, clients: int, turns: int, seconds: float) -> Load:
    """Have clients talk for some seconds; those that talk then end their answer."""
    load, numbers = Load(turns), itertools.count()
    questions = [*itertools.islice(itertools.cycle(QUESTIONS), turns - 1), QUESTIONS[0]]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=address, timeout=300, limits=limits, trust_env=False
    ) as client:
        await ask(client, messages_of(-1, [], QUESTIONS[0]))  # what only the first one pays
        begun = time.monotonic()

        async def talk() -> None:
            for number in numbers:
                said = load.talks[number] = []
                for question in questions:
                    if time.monotonic() - begun >= seconds:
                        return
                    try:
                        said.append(await ask(client, messages_of(number, said, question)))
                    except (LavisError, httpx.HTTPError) as error:
                        load.errors.append(f"{type(error).__name__}: {error}")
                        break

        async def watch() -> None:
            with tqdm(
                total=int(seconds), unit="s", desc=f"{clients} clients", mininterval=1
            ) as bar:
                for quarter in range(5):
                    while time.monotonic() - begun < quarter * seconds / 4:
                        await asyncio.sleep(0.1)
                        bar.update(min(int(time.monotonic() - begun), bar.total) - bar.n)
                    load.memory.append(status("RssAnon", process))

        await asyncio.gather(watch(), *(talk() for _ in range(clients)))
        load.seconds = time.monotonic() - begun
    return load


async def last_turns_anew(address: str, load: Load) -> list[Asked]:
    """The last turn of whole conversations, after a beginning that the server does not know."""
    found = []
    async with httpx.AsyncClient(base_url=address, timeout=300, trust_env=False) as client:
        for number, talk in list(load.talks.items())[:50]:
            if len(talk) == load.turns:
                messages = messages_of(number, talk[:-1], talk[-1].question)
                other = {"role": "system", "content": f"{number} and so on"}
                found.append(await ask(client, [other, *messages]))
    return found


def differing(load: Load) -> int:
    """How many answers are not those of the engine alone, in pieces or their tokens' number."""
    from lavis.chat import ChatEngine, ChatSettings, Conversation
    from lavis.models import load_model_and_preprocess

    model, processors, _ = load_model_and_preprocess(
        "minigpt4qwen", "toybox", is_eval=True, checkpoint=TOYBOX / "checkpoint.pth"
    )
    engine, wrong = ChatEngine(model, processors["eval"]), 0
    for number, talk in tqdm(load.talks.items(), desc="the engine alone", mininterval=1):
        alone = Conversation(engine, ChatSettings(max_new_tokens=LONGEST))
        alone.show(picture(number))
        for n, asked in enumerate(talk):
            answer = alone.ask(asked.question)
            pieces = list(answer)
            counts = asked.usage["prompt_tokens"], asked.usage["completion_tokens"]
            if (pieces, (len(answer.prompt), len(answer.ids))) != (asked.pieces, counts):
                wrong += len(talk) - n  # what follows has another history
                break
    return wrong


def measure(clients: int, parallel: int, turns: int, seconds: float) -> dict[str, Any]:
    """A server of its own under a load; its first errors go to the standard error."""
    with server(parallel) as (address, process):
        load = asyncio.run(put_load(address, process, clients, turns, seconds))
        anew = asyncio.run(last_turns_anew(address, load)) if clients == 1 else []
    for error in load.errors[:3]:
        print(error, file=sys.stderr)
    found = load.numbers() | {"clients": clients, "parallel": parallel, "turns": turns}
    found["different"] = differing(load)
    return found | ({"last_turn_anew": first_tokens(anew)} if anew else {})


def table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Rows of Markdown."""
    turns = next(iter(found.values()))["turns"]
    yield (
        "| | requests/s | tokens/s | first token, turn 1: p50, p95 | turn "
        f"{turns}: p50, p95 | answers | unlike the engine's | errors | memory, by quarters |"
    )
    yield "|---" * 9 + "|"
    for way, got in found.items():
        times = [
            f"{at['p50_ms']:.1f}, {at['p95_ms']:.1f} ms ({at['computed_tokens']:.0f} computed)"
            for at in (got["turn_1"], got[f"turn_{turns}"])
        ]
        memory = " ".join(f"{n / MIB:.0f}" for n in got["memory_bytes"])
        yield (
            f"| {way} | {got['requests_per_s']:.1f} | {got['tokens_per_s']:.0f} | {times[0]} | "
            f"{times[1]} | {got['answers']} | {got['different']} | {got['errors']} | {memory} MiB |"
        )
        if at := got.get("last_turn_anew"):
            yield (
                f"| {way}, turn {turns} of an unknown conversation | | | | {at['p50_ms']:.1f}, "
                f"{at['p95_ms']:.1f} ms ({at['computed_tokens']:.0f} computed) | | | | |"
            )


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=positive, default=32, help="default: %(default)s")
    parser.add_argument("--turns", type=positive, default=20, help="default: %(default)s")
    parser.add_argument("--seconds", type=positive, default=120, help="of each load: %(default)s")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    many = args.clients
    ways = {
        "one client": (1, many),
        f"{many} clients, one after another": (many, 1),
        f"{many} clients": (many, many),
    }
    found = {w: measure(*clients, args.turns, args.seconds) for w, clients in ways.items()}
    print("\n".join(table(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
