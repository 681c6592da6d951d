# SPDX-License-Identifier: MIT
"""`POST /` as clients in the field rely on it, and `GET /health`."""

import json
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

import pytest
import requests
import tiny
from net import DEADLINE
from server import Running, running

import api

KEYS = ["response", "history", "status", "time"]


@pytest.mark.parametrize("body", [{}, {"history": []}])
def test_four_keys(server: Running, body: dict) -> None:
    response = server.post("你好", max_new_tokens=9, **body)
    assert response.status_code == 200
    done = response.json()
    assert list(done) == KEYS and done["status"] == 200
    assert done["history"] == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": done["response"]},
    ]
    assert response.headers["X-Finish-Reason"] == "length"
    assert response.headers["X-Completion-Tokens"] == "9"
    assert int(response.headers["X-Prompt-Tokens"]) > 6


def test_time_is_local(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the machine that runs the tests has UTC."""
    try:
        for zone, hours in (("XXX-9", 9), ("YYY+8", -8)):  # POSIX: the sign is reversed
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            said = server.post(max_new_tokens=1).json()["time"]
            local = datetime.strptime(said, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
            ahead = local - datetime.now(UTC)
            assert abs(ahead.total_seconds() - hours * 3600) < DEADLINE
    finally:
        monkeypatch.undo()
        time.tzset()


def test_history_is_kept_and_used(server: Running) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "今天星期几"},
        {"role": "assistant", "content": "今天星期三"},
    ]
    done = server.post("明天?", history=history, max_new_tokens=9).json()
    assert done["history"][:4] == [*history, {"role": "user", "content": "明天?"}]
    alone = server.post("明天?", max_new_tokens=9).json()
    assert alone["response"] != done["response"]


def test_template_and_tokens_are_phi4s(phi4_server: Running) -> None:
    ids = phi4_server.token_ids(api.ChatRequest(prompt="你好"))
    assert ids == [100264, 882, 100266, 57668, 53901, 100265, 100264, 78191, 100266]
    assert phi4_server.generation_config.eos_token_id == [100257, 100265]
    response = phi4_server.post("你好", max_new_tokens=2)
    assert response.headers["X-Prompt-Tokens"] == str(len(ids))


def test_only_short_conversations_are_tokenised_on_the_event_loop(
    phi4_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer ones have a thread and a tokenizer for each range of lengths."""
    there = []
    engine = phi4_server.engine
    owned = [engine.loop_tokenizer, *(own for _, own in engine.tokenizers)]
    threads = [
        pool.submit(threading.get_ident).result() for pool, _ in engine.tokenizers
    ]
    threads.insert(0, phi4_server.call(identity()))

    def note(tokenizer: Any, turns: list[api.Turn]) -> list[int]:
        # A tokenizer is not thread-safe: each has its thread.
        which = [tokenizer is own for own in owned].index(True)
        there.append((which, threads.index(threading.get_ident())))
        return template(tokenizer, turns)

    template = phi4_server.replace(monkeypatch, "apply_template", note)
    monkeypatch.setattr(api, "LONG_CHARS", (3000, 5000))  # the model holds 2,048 tokens
    for level, limit in enumerate((api.INLINE_CHARS, *api.LONG_CHARS)):
        most = limit - api.TURN_CHARS
        empty = [{"role": "user", "content": ""}] * (limit // api.TURN_CHARS)
        for prompt, history in (("a" * most, []), ("a" * (most + 1), []), ("a", empty)):
            asked = phi4_server.post(prompt, history=history, max_new_tokens=1)
            assert asked.status_code == 200
        assert there == [(level, level), (level + 1, level + 1), (level + 1, level + 1)]
        there.clear()
    turns = api.ChatRequest(prompt="你好 <|im_end|>").turns()
    assert len({tuple(template(own, turns)) for own in owned}) == 1


async def identity() -> int:
    """Of the thread that runs it."""
    return threading.get_ident()


def test_stops_at_every_end_token(tmp_path: Any) -> None:
    for end in ("<|im_end|>", "<|endoftext|>"):
        folder = tmp_path / end.strip("<|>")
        names = tiny.small_tokenizer(folder).get_vocab()
        tiny.tiny_model(folder, bias={names[end]: tiny.CERTAIN}, eos="natural")
        # Early copies of phi-4 name only the wrong one.
        for name in ("config.json", "generation_config.json"):
            config = json.loads((folder / name).read_text())
            config["eos_token_id"] = names["<|endoftext|>"]
            (folder / name).write_text(json.dumps(config))
        with running(model=folder) as server:
            done = server.post()
            assert done.headers["X-Finish-Reason"] == "stop"
            assert done.headers["X-Completion-Tokens"] == "1"
            assert done.json()["response"] == ""


def test_default_is_512_and_shrinks_to_the_room(
    server: Running, phi4_server: Running
) -> None:
    assert phi4_server.post().headers["X-Completion-Tokens"] == "512"
    short = server.post("x" * 100)
    assert short.headers["X-Finish-Reason"] == "length"
    assert int(short.headers["X-Completion-Tokens"]) == 512 - 107


def test_no_room_is_a_400_that_names_both_numbers(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for body in ({"prompt": "x" * 505}, {"prompt": "x" * 600}):
        refused = server.post(**body)
        assert refused.status_code == 400
        tokens = str(len(body["prompt"]) + 7)
        assert tokens in refused.json()["detail"] and "512" in refused.json()["detail"]
    refused = server.post("x", max_new_tokens=505)
    assert refused.status_code == 400
    numbers = re.findall(r"\d+", refused.json()["detail"])
    assert {"8", "505", "512"} <= {*numbers}
    assert server.post("x", max_new_tokens=504).status_code == 200
    # What cannot fit, whatever it says, is not even tokenised.
    templated = server.spy(monkeypatch, "apply_template")
    most = api.MAX_CHARS_PER_TOKEN * 512 - api.TURN_CHARS
    for size in (most, most + 1):
        refused = server.post("x" * size)
        assert refused.status_code == 400
        numbers = re.findall(r"\d+", refused.json()["detail"])
        assert "512" in numbers and len(numbers) > 1
        assert len(templated) == 1
    empty = [{"role": "user", "content": ""}] * (most // api.TURN_CHARS + 1)
    assert server.post("x", history=empty).status_code == 400
    assert len(templated) == 1


def test_a_body_that_is_no_json_is_told_why(server: Running) -> None:
    headers = {"Content-Type": "application/json"}
    body = b"{'prompt': 'quotes as a shell mangles them'}"
    refused = requests.post(server.url, data=body, headers=headers, timeout=DEADLINE)
    (error,) = refused.json()["detail"]
    assert refused.status_code == 422 and error["loc"] == ["body"]
    assert error["msg"].startswith("send JSON: ") and "double quotes" in error["msg"]


@pytest.mark.parametrize("field", ["max_tokens", "Prompt", "temprature", ""])
def test_unknown_field_is_named(server: Running, field: str) -> None:
    refused = server.post(**{field: 1})
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", field]


def test_errors_do_not_echo_the_input(server: Running) -> None:
    refused = server.post(temperature="a secret that should not come back")
    assert refused.status_code == 422 and "secret" not in refused.text


@pytest.mark.parametrize("method", ["put", "delete", "patch"])
def test_other_methods_and_paths_are_json_too(server: Running, method: str) -> None:
    assert requests.request(method, server.url, timeout=5).json() == {
        "detail": "Method Not Allowed"
    }
    assert requests.request(method, server.url + "/x", timeout=5).status_code == 404


def test_unknown_field_of_a_turn_is_named(server: Running) -> None:
    refused = server.post(history=[{"role": "user", "content": "b", "name": "c"}])
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "history", 0, "name"]


def test_health(server: Running) -> None:
    response = requests.get(server.url + "/health", timeout=5)
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": "tiny", "device": "cpu"}
    response = requests.head(server.url + "/health", timeout=5)
    assert (response.status_code, response.content) == (200, b"")


def test_import_loads_nothing_and_parses_nothing() -> None:
    program = (
        "import sys; sys.argv += ['--nonsense']; import api; "
        "assert api.app.state.engine.manager is None; print(type(api.app).__name__); "
        "print(api.torch.backends.cuda.preferred_blas_library())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    # The library for matrices can only be chosen before torch is imported.
    assert done.stdout == "FastAPI\n_BlasBackend.Cublaslt\n", done.stderr
