"""The benchmark of the server, for a second."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("httpx")

from benchmarks import server


def test_a_short_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEPT", 2)
    monkeypatch.setattr(server, "MAX_SECONDS", 15)
    found = server.measure(2, 2, turns=2, seconds=1, warm_up=1, hostile=True)
    assert found["answers"] >= 2
    assert (found["errors"], found["different"], found["slow_different"]) == (0, 0, 0)
    assert (found["requests_left"], found["faults_in_log"], found["surprises"]) == (0, 0, {})
    assert {"reads slowly", "broken JSON", "no picture"} <= found["hostile"].keys()
    assert found["turn_2"]["computed_tokens"] < found["turn_1"]["computed_tokens"]
    assert 0 < found["turn_1"]["p50_ms"] <= found["turn_1"]["p95_ms"]
    assert len(found["memory_bytes"]) == 5
    assert len(found["rest_bytes"]) == 2
    header, _, row = server.table({"two clients": found})
    assert header.count("|") == row.count("|")
    _, _, header, _, *rows = server.hostile_table(found)
    assert {header.count("|")} == {row.count("|") for row in rows}


def test_another_answer_is_noticed() -> None:
    load = server.Load(1)
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    load.talks[0] = [server.Asked("What is in the picture?", ["A cat."], 0.1, usage)] * 2
    assert server.differing(load.talks) == 2


def test_percentiles() -> None:
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    asked = [server.Asked("", [], n / 1000, usage) for n in range(1, 101)]
    assert server.first_tokens(asked) == {
        "conversations": 100, "computed_tokens": 5, "p50_ms": 50.5, "p95_ms": 95.0,
    }  # fmt: skip
