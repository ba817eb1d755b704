"""A conversation about one image: the chat engine beside computing everything anew at each turn.

The model has random weights. What is said is written down beforehand, so that both sides compute
the same tokens: the engine's choice of a token costs what it costs, and the scripted one is taken.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.process import Memory, in_child
from benchmarks.random_model import SHAPES, WORDS, Shape, build_model
from lavis.common.cli import output_file, positive, run_cli
from lavis.common.errors import LavisError

if TYPE_CHECKING:
    from lavis.chat import Answer, Conversation

GIB, MIB = 1024**3, 1024**2
QUESTION, ANSWER = (25, 25), (40, 100)
"""Words of a question and of an answer, drawn evenly; most words are one token.

Questions are of one length, so that turns can be compared.
"""


@dataclass(frozen=True)
class Job:
    """What is measured, as the measuring processes get it."""

    shape: Shape
    device: str
    turns: int
    repeats: int
    new_tokens: int
    conversations: int

    @property
    def shown(self) -> list[int]:
        """Turns at which everything is computed anew too."""
        return [t for t in (1, 2, 5, 10, 15, 20) if t < self.turns] + [self.turns]


class Bench:
    """The model, the picture and the script."""

    def __init__(self, job: Job) -> None:
        import torch

        from lavis.chat import ChatEngine
        from lavis.common.device import pick_device

        self.job = job
        self.device = pick_device(job.device)
        self.model = build_model(job.shape, self.device).train(False)
        self.engine = ChatEngine(self.model, lambda image: self.pixels)
        # A random model must not happen on a stop token. With the mean of two other logits none is
        # the largest. Banning them in generate would cost the side that computes anew time.
        head = self.model.language.model.lm_head.weight
        with torch.no_grad():
            head[list(self.engine.stops)] = head[:2].mean(0)
        side = job.shape.image_size
        self.pixels = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))
        rng = random.Random(0)
        self.script = [
            tuple(" ".join(rng.choices(WORDS, k=rng.randint(*n))) for n in (QUESTION, ANSWER))
            for _ in range(job.turns)
        ]

    def begin(self) -> Conversation:
        """A conversation in which the first question shows the picture."""
        from lavis.chat import ChatSettings, Conversation

        conversation = Conversation(self.engine, ChatSettings(max_new_tokens=512))
        conversation.show(self.engine.encode_image(self.pixels))
        return conversation

    def ask(self, conversation: Conversation, turn: int) -> tuple[Answer, list[int]]:
        """The question of a turn; its answer says the script. And what the model would say."""
        question, text = self.script[turn - 1]
        answer = conversation.ask(question)
        tokenizer = self.engine.tokenizer
        words = [*tokenizer.encode(text), self.engine.stops[0]]
        choose, own = answer._choose, []

        def scripted(logits: Any, ids: Sequence[int]) -> int:
            own.append(choose(logits, ids))
            return words[len(ids)]

        answer._choose = scripted  # type: ignore[assignment]
        return answer, own

    def anew(self, turn: int, new_tokens: int) -> tuple[float, list[int]]:
        """Seconds of a turn that computes everything, and the ids it generates."""
        from lavis.processors.conversation import IMAGE, Turn

        (first, answer), *later = self.script[:turn]
        said = [(f"{IMAGE} {first}", answer), *later]
        turns = [t for q, a in said for t in (Turn("user", q), Turn("assistant", a))]
        self._synchronize()
        started = time.perf_counter()
        prompt = self.model.encoder.prompt(turns[:-1])
        (ids,) = self.model.generate_ids([prompt], self.pixels[None], max_new_tokens=new_tokens)
        self._synchronize()
        return time.perf_counter() - started, ids

    def anew_rate(self, turn: int) -> float:
        """Tokens/s after the first one: from the end of the first forward pass to the last one's.

        Not the difference to the time of one token, most of which is the prompt's, and noise.
        """
        ends: list[float] = []

        def note(*_: Any) -> None:
            self._synchronize()
            ends.append(time.perf_counter())

        hook = self.model.language.model.register_forward_hook(note)
        try:
            self.anew(turn, self.job.new_tokens + 1)
        finally:
            hook.remove()
        return (len(ends) - 1) / (ends[-1] - ends[0])

    def talk(self) -> list[dict[str, Any]]:
        """A whole conversation, timed turn by turn."""
        started = time.perf_counter()
        conversation = self.begin()
        found = []
        for turn in range(1, self.job.turns + 1):
            if turn > 1:
                started = time.perf_counter()
            answer, own = self.ask(conversation, turn)
            next(answer)
            first = time.perf_counter() - started
            begun = len(answer.ids)
            started = time.perf_counter()
            answer.read()
            seconds = time.perf_counter() - started
            found.append(
                {
                    "turn": turn,
                    "prompt": len(answer.prompt),
                    "computed": len(answer.prompt) - answer.reused,
                    "first_s": first,
                    "tokens_per_s": (len(answer.ids) - begun + 1) / seconds,
                    "first_id": own[0],
                    "answer": len(answer.ids),
                    "cache_bytes": conversation.cache_bytes,
                }
            )
        return found

    def _synchronize(self) -> None:
        from lavis.common.device import synchronize

        synchronize(self.device)


def measure_time(job: Job) -> dict[str, Any]:
    """Conversations and turns computed anew, in turns."""
    import torch

    from lavis.common.device import matmul_peak

    bench = Bench(job)
    dtype = bench.model.language.model.lm_head.weight.dtype
    talks: list[list[dict[str, Any]]] = []
    anew: dict[int, list[float]] = {turn: [] for turn in job.shown}
    rates: dict[int, list[float]] = {turn: [] for turn in {1, job.turns}}
    ids: dict[int, int] = {}
    if not job.shape.single:  # warms up, too
        bench.anew(1, 2)
        same = same_first(job, bench.talk(), {t: bench.anew(t, 1)[1][0] for t in job.shown})
        report(f"first token the same at {same} of {len(job.shown)} turns")
    for number in range(job.repeats):
        talks.append(bench.talk())
        report(f"conversation {number + 1} of {job.repeats}: done")
        for turn in job.shown:
            seconds, (ids[turn],) = bench.anew(turn, 1)
            anew[turn].append(seconds)
        for turn, found in rates.items():
            found.append(bench.anew_rate(turn))
        report(f"anew, {number + 1} of {job.repeats}: done")
    middle = [dict(steps[0]) for steps in zip(*talks, strict=True)]
    for step in middle:
        for key in ("first_s", "tokens_per_s"):
            step[key] = statistics.median(t[step["turn"] - 1][key] for t in talks)
    return {
        "engine": middle,
        "anew": [
            {
                "turn": t,
                "first_s": statistics.median(s),
                "tokens_per_s": statistics.median(rates[t]) if t in rates else None,
            }
            for t, s in anew.items()
        ],
        "same_first_token": same_first(job, talks[0], ids),
        "compared": len(job.shown),
        "prefill_flops": prefill_flops(bench, middle[-1]["prompt"]),
        "peak_flop_per_s": max(matmul_peak(bench.device, dtype, n) for n in job.shape.matrix),
        "weights_bytes": sum(p.nbytes for p in bench.model.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def same_first(job: Job, talk: list[dict[str, Any]], anew: dict[int, int]) -> int:
    """At how many turns both sides choose the same first token.

    Raises:
        LavisError: not at all of them in single precision, in which nothing is near a tie.
    """
    same = sum(talk[turn - 1]["first_id"] == token for turn, token in anew.items())
    if job.shape.precision == "fp32" and same < len(anew):
        raise LavisError(f"the first token is the same at only {same} of {len(anew)} turns")
    return same


def prefill_flops(bench: Bench, tokens: int) -> float:
    """FLOP of a prompt's layers and attention, and of one row of the head, without the image."""
    llm = bench.model.language.model
    layers = sum(p.numel() for p in llm.model.layers.parameters() if p.ndim > 1)
    attention = 2 * llm.config.num_hidden_layers * llm.config.hidden_size * tokens * (tokens + 1)
    return float(2 * tokens * layers + attention + 2 * llm.lm_head.weight.numel())


def measure_memory(job: Job, engine: bool) -> int:
    """Peak memory of a whole conversation over what the loaded model takes, in bytes."""
    import torch

    bench = Bench(job)
    cuda = bench.device.type == "cuda"
    memory = Memory()
    before = torch.cuda.memory_allocated(bench.device) if cuda else memory.restart()
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    if engine:
        conversation = bench.begin()
        for turn in range(1, job.turns + 1):
            bench.ask(conversation, turn)[0].read()
    else:
        for turn in (job.shown[0], job.turns):
            bench.anew(turn, 4)
    peak = memory.peaks("talk")["talk_anonymous_bytes"]
    report(f"memory {'of the engine' if engine else 'anew'}: done")
    return (torch.cuda.max_memory_allocated(bench.device) if cuda else peak) - before


def measure_conversations(job: Job) -> dict[str, int]:
    """Memory after some conversations and after many, one after the other."""
    import torch

    bench = Bench(job)
    cuda = bench.device.type == "cuda"
    memory = Memory()
    loaded = torch.cuda.memory_allocated(bench.device) if cuda else memory.restart()
    after: dict[int, int] = {}
    peak = 0
    for number in range(1, job.conversations + 1):
        conversation = bench.begin()
        for turn in range(1, min(3, job.turns) + 1):
            answer, _ = bench.ask(conversation, turn)
            # One whole answer, so that the buffers grow; parts of the others, to save time.
            for _ in answer if turn == 1 else zip(range(12), answer, strict=False):
                pass
        # No garbage collection: reference counts must do.
        del conversation, answer
        peak = max(peak, memory.peaks("talk")["talk_anonymous_bytes"])
        after[number] = torch.cuda.memory_allocated(bench.device) if cuda else memory.restart()
    report(f"{job.conversations} conversations: done")
    few = min(5, job.conversations)
    return {
        "conversations": job.conversations,
        "few": few,
        "loaded_bytes": loaded,
        "few_bytes": after[few],
        "all_bytes": after[job.conversations],
        "peak_bytes": torch.cuda.max_memory_allocated(bench.device) if cuda else peak,
    }


def measure(job: Job) -> dict[str, Any]:
    """All numbers."""
    found: dict[str, Any] = in_child(measure_time, job)
    engine, anew = found["engine"], {a["turn"]: a for a in found["anew"]}
    last = engine[-1]
    found["last_over_second"] = last["first_s"] / engine[1]["first_s"]
    found["anew_over_engine"] = anew[job.turns]["first_s"] / last["first_s"]
    found["prefill_share_of_peak"] = (
        found["prefill_flops"] / anew[job.turns]["first_s"] / found["peak_flop_per_s"]
    )
    found["memory_bytes"] = {
        "engine": in_child(measure_memory, job, True),
        "anew": in_child(measure_memory, job, False),
    }
    if job.conversations:
        found["sequence"] = in_child(measure_conversations, job)
    return {"precision": job.shape.precision, "turns": job.turns, "repeats": job.repeats, **found}


def table(r: dict[str, Any]) -> str:
    """The numbers as text."""
    anew = {a["turn"]: a for a in r["anew"]}
    lines = [
        f"{'turn':>4}{'prompt':>8}{'computed':>10}{'first token, ms':>22}{'anew over':>11}"
        f"{'tokens/s':>20}",
        f"{'':4}{'tokens':>8}{'tokens':>10}{'engine':>11}{'anew':>11}{'engine':>11}"
        f"{'engine':>11}{'anew':>9}",
    ]
    for e in r["engine"]:
        if e["turn"] not in anew:
            continue
        a = anew[e["turn"]]
        rate = f"{a['tokens_per_s']:.1f}" if a["tokens_per_s"] else ""
        lines.append(
            f"{e['turn']:>4}{e['prompt']:>8}{e['computed']:>10}{1e3 * e['first_s']:>11.0f}"
            f"{1e3 * a['first_s']:>11.0f}{a['first_s'] / e['first_s']:>10.1f}x"
            f"{e['tokens_per_s']:>11.1f}{rate:>9}"
        )
    last = r["engine"][-1]
    memory = r["memory_bytes"]
    lines += [
        f"engine: turn {last['turn']} takes {r['last_over_second']:.2f} x turn 2 (target: 1.3 at "
        f"most), {r['anew_over_engine']:.1f} x less than anew (target: 8 at least); first token "
        f"the same at {r['same_first_token']} of {r['compared']} turns",
        f"peak memory over the model: engine {memory['engine'] / MIB:.0f} MiB "
        f"(keys and values {last['cache_bytes'] / MIB:.1f}), anew {memory['anew'] / MIB:.0f} MiB",
        f"anew computes turn {last['turn']} at {r['prefill_share_of_peak']:.0%} of the peak of "
        f"{r['peak_flop_per_s'] / 1e9:.0f} GFLOP/s ({r['precision']} matrix product), "
        f"{r['threads']} threads, torch {r['torch']}; weights {r['weights_bytes'] / GIB:.2f} GiB",
    ]
    if "sequence" in r:
        s = r["sequence"]
        lines.append(
            f"after {s['conversations']} conversations {s['all_bytes'] / s['few_bytes'] - 1:+.1%} "
            f"memory of the {s['few_bytes'] / GIB:.2f} GiB after {s['few']} (target: within 5%), "
            f"{(s['all_bytes'] - s['few_bytes']) / MIB:+.1f} MiB; loaded "
            f"{s['loaded_bytes'] / GIB:.2f} GiB, peak {s['peak_bytes'] / GIB:.2f} GiB"
        )
    return "\n".join(lines)


def draw(r: dict[str, Any], path: Path) -> None:
    """Draw the time to the first token against the turn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label in (("anew", "everything anew"), ("engine", "engine")):
        turns, seconds = zip(*((x["turn"], x["first_s"]) for x in r[name]), strict=True)
        axes.plot(turns, seconds, marker="o", markersize=4, label=label)
    axes.set(xlabel="turn", ylabel="seconds to the first token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def report(text: str) -> None:
    """Tell on standard error how far the run is."""
    print(f"chat: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="bench",
        help="bench: 12 layers 1024 wide; 7b: Qwen-7B-Chat and ViT-g, once; tiny: a check in "
        "seconds; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--turns", type=positive, default=20, help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=3, help="medians; default: %(default)s")
    parser.add_argument(
        "--new-tokens", type=positive, metavar="N",
        help="of an answer computed anew, for tokens/s; default: 32, or 4 for 7b",
    )  # fmt: skip
    parser.add_argument(
        "--conversations", type=int, default=50, metavar="N",
        help="in sequence, to see what memory stays; 0: none; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the numbers there too"
    )
    parser.add_argument(
        "--picture",
        "--plot",
        type=output_file,
        metavar="FILE",
        help="draw seconds to the first token",
    )
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    new_tokens = (4 if shape.single else 32) if args.new_tokens is None else args.new_tokens
    if args.turns < 2 or args.repeats < 1 or new_tokens < 1 or args.conversations < 0:
        raise LavisError("--turns is 2 at least, --repeats and --new-tokens 1, --conversations 0")
    repeats = 1 if shape.single else args.repeats
    job = Job(shape, args.device, args.turns, repeats, new_tokens, args.conversations)
    numbers = measure(job)
    print(table(numbers))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if args.picture:
        draw(numbers, args.picture)
    return 0


if __name__ == "__main__":
    run_cli(main)
