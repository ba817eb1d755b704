"""The server with many clients, beside one client, and beside clients one after another.

The toybox answers. Each client holds one conversation after the other, each about a picture of its
own that every turn sends again, as OpenAI's clients do. Every answer is compared with what the
engine alone says, piece by piece: nearly every piece is a token. One load has hostile clients
beside them, and what these get is compared with what they are to get (:mod:`benchmarks.clients`).

Memory at rest is what the server holds some idle seconds after it was made to keep the same again:
as many conversations as it keeps, those of a first load that warms the server up. It is read after
that load, and after the load that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks.clients import QUESTIONS, Asked, Hostile, ask, messages_of, picture
from benchmarks.process import status
from lavis.common.cli import output_file, positive, run_cli
from lavis.common.errors import LavisError
from lavis.common.paths import REPOSITORY, TOYBOX

LONGEST = 64  # tokens of an answer
KEPT = 64  # conversations
BODY_MB, MAX_SECONDS = 32, 30  # of a request
IDLE = 5  # seconds
MIB = 1024**2


@dataclass
class Load:
    """What clients saw.

    Attributes:
        talks: turns of conversations, by the numbers of their pictures.
        memory: the server's bytes at the beginning, and after each quarter of the time.
        hostile: the other clients, if there were any.
    """

    turns: int
    hostile: Hostile | None = None
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
        if self.hostile is not None:
            found["hostile"] = {
                name: {"wanted": self.hostile.wanted[name], **ends}
                for name, ends in self.hostile.ends.items()
            }
            found["surprises"] = self.hostile.surprises
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


@contextmanager
def server(parallel: int) -> Iterator[tuple[str, int, Callable[[], str]]]:
    """A server of the toybox: its address, its process, and what reads its log."""
    flags = {
        "--port": 0, "--parallel": parallel, "--max-queue": 1000, "--max-new-tokens": LONGEST,
        "--keep-conversations": KEPT, "--max-body-mb": BODY_MB, "--max-seconds": MAX_SECONDS,
    }  # fmt: skip
    command = [sys.executable, "-m", "lavis.serve", *(str(x) for f in flags.items() for x in f)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            found = re.match("http://[^ ]+", process.stdout.readline())
            if found is None:
                raise LavisError(f"{' '.join(command)} does not start: run it to see why")
            yield found[0], process.pid, lambda: (log.seek(0), log.read())[1]
        finally:
            process.terminate()
            process.wait()


def new_client(address: str) -> httpx.AsyncClient:
    """A client that may have any number of requests under way."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=address, timeout=300, limits=limits, trust_env=False)


async def put_load(
    address: str, process: int, load: Load, clients: int, seconds: float, first: int
) -> None:
    """Have clients talk for some seconds, and until one conversation has come to its end; those
    that talk then end their answer.

    Args:
        first: number of the first picture.
    """
    turns, numbers = load.turns, itertools.count(first)
    questions = [*itertools.islice(itertools.cycle(QUESTIONS), turns - 1), QUESTIONS[0]]
    async with new_client(address) as client:
        await ask(client, messages_of(-1, [], QUESTIONS[0]))  # what only the first one pays
        begun = time.monotonic()

        def over() -> bool:
            done = load.errors or any(len(talk) == turns for talk in load.talks.values())
            return time.monotonic() - begun >= seconds and bool(done)

        async def talk() -> None:
            for number in numbers:
                said = load.talks[number] = []
                for question in questions:
                    if over():
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
                        bar.update(min(int(time.monotonic() - begun), int(seconds)) - bar.n)
                    load.memory.append(status("RssAnon", process))

        hostile = [] if load.hostile is None else load.hostile.loops(over)
        others = [asyncio.ensure_future(loop) for loop in hostile]
        await asyncio.gather(watch(), *(talk() for _ in range(clients)))
        load.seconds = time.monotonic() - begun
        await asyncio.gather(*others)


async def fill(address: str, load: Load) -> list[Asked]:
    """Ask the last turn of whole conversations after beginnings that the server does not know:
    as many as it keeps, which are then all that it keeps."""
    whole = [(n, talk) for n, talk in load.talks.items() if len(talk) == load.turns]
    if not whole:
        raise LavisError(f"no conversation came to its end: {load.errors[0]}")
    found = []
    async with new_client(address) as client:
        for k in range(KEPT):
            number, talk = whole[k % len(whole)]
            messages = messages_of(number, talk[:-1], talk[-1].question)
            other = {"role": "system", "content": f"{number}, {k} and so on"}
            found.append(await ask(client, [other, *messages]))
    return found


async def left(address: str) -> int:
    """Requests that the server still has after some idle seconds, with no client there."""
    await asyncio.sleep(IDLE)
    async with httpx.AsyncClient(trust_env=False) as client:
        health = (await client.get(address.removesuffix("/v1") + "/health")).json()
    return int(health["active"])


def differing(talks: Mapping[int, Sequence[Asked]]) -> int:
    """How many answers are not those of the engine alone, in pieces or their tokens' number."""
    from lavis.chat import ChatEngine, ChatSettings, Conversation
    from lavis.models import load_model_and_preprocess

    model, processors, _ = load_model_and_preprocess(
        "minigpt4qwen", "toybox", is_eval=True, checkpoint=TOYBOX / "checkpoint.pth"
    )
    engine, wrong = ChatEngine(model, processors["eval"]), 0
    for number, talk in tqdm(talks.items(), desc="the engine alone", mininterval=1):
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


def measure(
    clients: int, parallel: int, turns: int, seconds: float, warm_up: float, *, hostile: bool
) -> dict[str, Any]:
    """A server of its own under a load; its first errors go to the standard error."""
    with server(parallel) as (address, process, log):
        loads, rest, active = [], [], 0
        for n, time_given in enumerate((warm_up, seconds)):
            load = Load(turns, Hostile(address, BODY_MB) if hostile else None)
            asyncio.run(put_load(address, process, load, clients, time_given, first=n * 10**5))
            active += asyncio.run(left(address))
            loads.append(load)
            anew = asyncio.run(fill(address, loads[0]))
            active += asyncio.run(left(address))
            rest.append(status("RssAnon", process))
        faults = len(re.findall("^Traceback", log(), re.MULTILINE))
    for error in load.errors[:3]:
        print(error, file=sys.stderr)
    found = load.numbers() | {"clients": clients, "parallel": parallel, "turns": turns}
    found |= {"rest_bytes": rest, "requests_left": active, "faults_in_log": faults}
    found["different"] = differing(load.talks)
    if load.hostile is not None:
        found["slow_different"] = differing(load.hostile.slow)
    return found | ({"last_turn_anew": first_tokens(anew)} if clients == 1 else {})


def table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Rows of Markdown."""
    turns = next(iter(found.values()))["turns"]
    yield (
        "| | requests/s | tokens/s | first token, turn 1: p50, p95 | turn "
        f"{turns}: p50, p95 | answers | unlike the engine's | errors | left | memory, by "
        "quarters | at rest |"
    )
    yield "|---" * 11 + "|"
    for way, got in found.items():
        times = [
            f"{at['p50_ms']:.1f}, {at['p95_ms']:.1f} ms ({at['computed_tokens']:.0f} computed)"
            for at in (got["turn_1"], got[f"turn_{turns}"])
        ]
        memory = " ".join(f"{n / MIB:.0f}" for n in got["memory_bytes"])
        before, after = (n / MIB for n in got["rest_bytes"])
        memory += f" MiB | {before:.0f} -> {after:.0f} MiB ({after / before - 1:+.1%})"
        errors = got["errors"] + got["faults_in_log"]
        yield (
            f"| {way} | {got['requests_per_s']:.1f} | {got['tokens_per_s']:.0f} | {times[0]} | "
            f"{times[1]} | {got['answers']} | {got['different']} | {errors} | "
            f"{got['requests_left']} | {memory} |"
        )
        if at := got.get("last_turn_anew"):
            yield (
                f"| {way}, turn {turns} of an unknown conversation | | | | {at['p50_ms']:.1f}, "
                f"{at['p95_ms']:.1f} ms ({at['computed_tokens']:.0f} computed) | | | | | | |"
            )


def hostile_table(got: dict[str, Any]) -> Iterator[str]:
    """Rows of Markdown: what hostile clients did, and what came of it."""
    yield f"Slow readers' answers unlike the engine's: {got['slow_different']}"
    yield ""
    yield "| | to come of it | did | otherwise |"
    yield "|---" * 4 + "|"
    for name, ends in got["hostile"].items():
        wanted = ends["wanted"]
        other = {end: n for end, n in ends.items() if end not in ("wanted", wanted)}
        yield f"| {name} | {wanted} | {ends.get(wanted, 0)} | {other or 0} |"


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=positive, default=32, help="default: %(default)s")
    parser.add_argument("--turns", type=positive, default=20, help="default: %(default)s")
    parser.add_argument("--seconds", type=positive, default=120, help="of each load: %(default)s")
    parser.add_argument(
        "--warm-up", type=positive, default=60, metavar="S", help="seconds before: %(default)s"
    )
    parser.add_argument("--only", metavar="WAY", help="one load: a part of its name")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    many = args.clients
    hostile = f"{many} clients and hostile ones"
    ways = {
        "one client": (1, many),
        f"{many} clients, one after another": (many, 1),
        f"{many} clients": (many, many),
        hostile: (many, many),
    }
    found = {
        way: measure(*ways[way], args.turns, args.seconds, args.warm_up, hostile=way == hostile)
        for way in ways
        if (args.only or "") in way
    }
    print("\n".join(table(found)))
    if hostile in found:
        print("\n" + "\n".join(hostile_table(found[hostile])))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
