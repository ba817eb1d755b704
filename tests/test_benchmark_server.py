"""The benchmark of the server, for a second."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("httpx")

from benchmarks import server


def test_a_short_load() -> None:
    found = server.measure(clients=2, parallel=2, turns=2, seconds=1)
    assert found["answers"] >= 4
    assert (found["errors"], found["different"]) == (0, 0)
    assert found["turn_2"]["computed_tokens"] < found["turn_1"]["computed_tokens"]
    assert 0 < found["turn_1"]["p50_ms"] <= found["turn_1"]["p95_ms"]
    assert len(found["memory_bytes"]) == 5
    header, _, row = server.table({"two clients": found})
    assert header.count("|") == row.count("|")


def test_another_answer_is_noticed() -> None:
    load = server.Load(1)
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    load.talks[0] = [server.Asked("What is in the picture?", ["A cat."], 0.1, usage)] * 2
    assert server.differing(load) == 2


def test_percentiles() -> None:
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    asked = [server.Asked("", [], n / 1000, usage) for n in range(1, 101)]
    assert server.first_tokens(asked) == {
        "conversations": 100, "computed_tokens": 5, "p50_ms": 50.5, "p95_ms": 95.0,
    }  # fmt: skip
