# SPDX-License-Identifier: MIT
"""Streams of `POST /`: the same text as the plain answer, in whole characters."""

import asyncio
import json
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import net
import pytest
import scripted
import tiny
from server import running, wait_until

import api
import model_download

# Every proper beginning of a character in UTF-8; the last six bits do not matter.
# Python's decoder counts half of a surrogate (ED A0) as one, until the next byte.
ALL = range(128, 0x110000, 64)
CHARACTERS = [chr(code).encode("utf-8", "surrogatepass") for code in ALL]
BEGINNINGS = {char[:n] for char in CHARACTERS for n in range(1, len(char))}

FAMILY = "\U0001f469‍\U0001f469‍\U0001f467"  # three people, one emoji
TEXTS = {
    "chinese": "你好,世界。".encode(),
    "emoji joined by ZWJ": FAMILY.encode(),
    "invalid": b"a\xff\xe4\xbdb\xf0\x9f\x91\xc3\x28\xed\xa0\x80\xc0\xafz",
    "spelled": "�\n\r\n\u2028".encode(),
}


def cut(whole: bytes) -> bytes:
    """Without the unfinished character at the end, if there is one."""
    tails = [n for n in (3, 2, 1) if whole[-n:] in BEGINNINGS]
    return whole[: -tails[0]] if tails else whole


def new_answer(stop: Any = None) -> api.Generation:
    async def make() -> api.Generation:
        return api.Generation("m", stop)

    return asyncio.run(make())


def in_bytes(text: bytes) -> list[bytes]:
    return [text[i : i + 1] for i in range(len(text))]


# ------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------


def test_every_cut_of_a_text_reads_the_same_streamed_and_whole(counting, say):
    text = b"".join(TEXTS.values())
    say(*in_bytes(text))
    limits = range(1, len(text) + 2)
    assert limits[-1] > 40

    def both(limit: int) -> tuple[Any, Any]:
        whole = counting.post("hello", max_new_tokens=limit)
        return whole, net.told_with_end(counting.stream(max_new_tokens=limit))

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(both, limits))
    for limit, (whole, (deltas, last, end)) in zip(limits, results, strict=True):
        expected = cut(text[:limit]).decode("utf-8", "replace")
        assert whole.json()["response"] == last["response"] == expected, limit
        assert "".join(deltas).encode() == expected.encode(), limit
        reason = "stop" if limit > len(text) else "length"
        assert whole.headers["X-Finish-Reason"] == reason
        assert whole.headers["X-Completion-Tokens"] == str(limit)
        assert end["finish_reason"] == reason and end["completion_tokens"] == limit
        assert whole.headers["X-Prompt-Tokens"] == str(end["prompt_tokens"])
        assert whole.json()["history"] == last["history"]
        assert list(last) == ["response", "history", "status", "time"]


@pytest.mark.parametrize("builder", [tiny.small_tokenizer, tiny.phi4_tokenizer])
def test_text_is_what_the_tokenizer_decodes(builder, tmp_path):
    tokenizer = builder(tmp_path)
    sizes = SimpleNamespace(vocab_size=len(tokenizer))
    model = SimpleNamespace(config=sizes)
    table = model_download.bytes_of_tokens(model, tokenizer, [])
    rng = random.Random(1)
    letters = tokenizer.encode(TEXTS["chinese"].decode() + FAMILY + " naïve")
    anything = range(len(tokenizer))
    for _ in range(1000):
        source = rng.choice([letters, anything, range(256)])
        ids = rng.choices(source, k=rng.randint(1, 12))
        answer, seen = new_answer(), [""]
        for token in ids:
            answer.feed(table[token])
            assert answer.text.startswith(seen[-1])
            seen.append(answer.text)
        answer.finish("length")
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        raw = b"".join(table[token] for token in ids)
        lost = raw[len(cut(raw)) :].decode("utf-8", "replace")  # shown by decode
        assert answer.text + lost == expected, ids


def test_a_delta_never_takes_back_or_splits_a_character(counting, say):
    text = (FAMILY + "你好").encode() * 3
    say(*in_bytes(text))
    deltas, last = net.told(counting.stream())
    assert all(deltas), "an empty delta says nothing"
    assert last["response"] == text.decode() == "".join(deltas)
    assert "�" not in "".join(deltas)


# ------------------------------------------------------------------------------
# Stop strings
# ------------------------------------------------------------------------------


def test_stop_strings_against_their_definition():
    """Of random texts over two letters, so that beginnings overlap all the time."""
    rng = random.Random(2)
    ended = 0
    for _ in range(5000):
        stops = [
            "".join(rng.choices("ab", k=rng.randint(1, 5)))
            for _ in range(rng.randint(1, 4))
        ]
        text = "".join(rng.choices("ab", k=rng.randint(1, 16)))
        answer, at, taken = new_answer(stops), 0, ""
        while at < len(text) and answer.finish_reason is None:
            piece = text[at : at + rng.randint(1, 4)]
            answer.feed(piece.encode())
            at, taken = at + len(piece), taken + piece
            assert taken.startswith(answer.text)
            # Nothing is kept back that could not become a stop string.
            waiting = taken[len(answer.text) :]
            assert answer.finish_reason or any(s.startswith(waiting) for s in stops)
        found = answer.finish_reason == "stop"
        answer.finish("length")
        assert found == any(s in text for s in stops)
        if found:
            ended += 1
            assert not any(s in answer.text for s in stops)
            assert any(text.startswith(answer.text + s) for s in stops)
        else:
            assert answer.text == text and answer.finish_reason == "length"
    assert ended > 1000


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "tokens"),
    [
        ([b"a", b"b", b"c"], "a", "", 1),  # at the first token
        ([b"ab", b"cd", b"ef"], "bc", "a", 2),  # split over two tokens
        ([b"abcdef"], "cd", "ab", 1),  # inside one token
        ([b"o", b"n", b"o", b"n", b"e"], ["one", "onone!"], "on", 5),  # overlapping
        ([b"x", b"EN", b"D", b"!"], ["STOP", "END"], "x", 3),
        ([b"a\n", b"\nb"], "\n\n", "a", 2),
        (in_bytes("你好世界".encode()), "好", "你", 6),
        (in_bytes(b"ab"), "abc", "ab", 3),  # begun and never finished, then the end
        (in_bytes(b"ab"), [], "ab", 3),
    ],
)
def test_stop(counting, say, pieces, stop, text, tokens):
    say(*pieces)
    whole = counting.post("hello", stop=stop)
    assert whole.json()["response"] == text
    assert whole.headers["X-Finish-Reason"] == "stop"
    assert whole.headers["X-Completion-Tokens"] == str(tokens)
    deltas, last, end = net.told_with_end(counting.stream(stop=stop))
    assert "".join(deltas) == last["response"] == text
    assert (end["finish_reason"], end["completion_tokens"]) == ("stop", tokens)


def test_a_begun_stop_string_is_shown_when_the_limit_cuts_it(counting, say):
    say(*in_bytes(b"xEND"))
    whole = counting.post("hello", stop="END", max_new_tokens=3)
    assert whole.json()["response"] == "xEN"
    assert whole.headers["X-Finish-Reason"] == "length"
    deltas, _ = net.told(counting.stream(stop="END", max_new_tokens=3))
    assert "".join(deltas) == "xEN"
    assert counting.answer(stop="END", max_new_tokens=4) == "x"


def test_a_stop_string_ends_the_generation(counting, say):
    say(*in_bytes(b"ab" + b"x" * 200))
    before = len(counting.gate.tokens)
    assert counting.answer(stop="b") == "a"
    wait_until(counting.idle)
    assert len(counting.gate.tokens) - before < 150


# ------------------------------------------------------------------------------
# Events
# ------------------------------------------------------------------------------


def test_headers(counting, say):
    say(b"hi")
    response = counting.stream()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["X-Request-Id"]
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert response.content.startswith(
        b'data: {"delta": "hi"}\n\ndata: {"response":"hi",'
    )


def test_an_answer_without_text_has_no_delta(counting, say):
    say()
    assert net.told(counting.stream())[0] == []
    assert counting.post().json()["response"] == ""


def test_pings_while_nothing_comes(counting, say, monkeypatch):
    monkeypatch.setattr(api, "PING_SECONDS", 0.02)
    say(*in_bytes(b"abcdef"))
    counting.gate.close()
    found = net.events(counting.stream())
    ping = "", ": ping"
    assert [next(found) for _ in range(3)] == [ping] * 3  # also before any text
    counting.gate.allow(2)
    seen = []
    while {*seen} <= {ping} or seen[-2:] != [ping] * 2:
        seen.append(next(found))  # and after some: "a", or "ab" if it is late
    counting.gate.allow()
    seen += found
    deltas = [json.loads(data) for event, data in seen if event]
    assert "".join(delta.get("delta", "") for delta in deltas) == "abcdef"


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_curl_shows_a_piece_before_the_next_exists(counting, say, path):
    say(*in_bytes(b"abc"))
    messages = [{"role": "user", "content": "hello"}]
    asked = {"prompt": "hello"} if path == "/" else {"messages": messages}
    body = json.dumps(asked | {"stream": True})
    counting.gate.allow(1)
    command = ["curl", "-sN", counting.url + path, "-d", body]
    command += ["-H", "Content-Type: application/json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        for line in curl.stdout:
            if b'"a"' in line:
                break
        assert not counting.idle()  # it waits at the gate
        counting.gate.allow()
        rest = curl.stdout.read().decode()
    assert curl.returncode == 0
    # The rest is there at once: it may come in one piece or in two.
    assert '"bc"' in rest or ('"b"' in rest and '"c"' in rest)


def test_text_that_comes_while_a_piece_is_being_sent_is_not_lost():
    """The connection takes its time with each piece; the answer grows meanwhile."""
    for body in (
        api.ChatRequest(prompt="x", stream=True),
        api.OpenAIRequest(messages=[{"role": "user", "content": "x"}], stream=True),
    ):
        text = asyncio.run(read_slowly(body, list("abcdefgh")))
        assert text == "abcdefgh"


async def read_slowly(body: Any, pieces: list[str]) -> str:
    answer = api.Generation("m", None)

    def grow() -> None:
        if pieces:
            answer.feed(pieces.pop(0).encode())
        elif answer.finish_reason is None:
            answer.finish("stop")
        answer.changed.set()

    grow()
    found = ""
    async for new in api.stream_events(SimpleNamespace(), body, answer):
        for _, data in net.events(new):
            item = json.loads(data) if data != "[DONE]" else {}
            found += item.get("delta", "")
            for choice in item.get("choices", []):
                found += choice["delta"].get("content") or ""
        grow()
    return found


def test_where_many_stream_tokens_share_events(counting, say, monkeypatch):
    """Not the first one, for which people wait; and the end brings all that is left."""
    pieces = [b"one ", b"two ", *[b"more "] * 20]
    say(*pieces)
    monkeypatch.setattr(api, "MAX_EVENTS_PER_SECOND", 0.001)
    begun = time.monotonic()
    with counting.gate as gate:
        gate.allow(1)  # or a second token may come before the first event is written
        pieces_sent = counting.stream(max_new_tokens=22).iter_content(None)
        first = next(pieces_sent)
    deltas, last = net.told(first + b"".join(pieces_sent))
    assert time.monotonic() - begun < api.PING_SECONDS
    assert "".join(deltas) == last["response"] == b"".join(pieces).decode()
    assert deltas[0] == "one " and len(deltas) == 2


def test_text_that_shares_an_event_does_not_wait_for_the_next(
    counting, say, monkeypatch
):
    """Where the next token does not come, as after a preemption."""
    say(b"one ", b"two ", b"three")
    monkeypatch.setattr(api, "MAX_EVENTS_PER_SECOND", 5)
    with counting.gate as gate:
        gate.allow(2)
        begun, seen = time.monotonic(), b""
        stream = counting.stream(max_new_tokens=3)
        for chunk in stream.iter_content(None):
            seen += chunk
            if b"two" in seen:
                break
        assert time.monotonic() - begun < api.PING_SECONDS - 5
        gate.allow()
        stream.close()


def test_a_client_that_reads_late_gets_everything(counting, say):
    pieces = [b"%d," % i * 4000 for i in range(250)]  # more than the buffers hold
    say(*pieces)
    body = {"prompt": "hello", "stream": True, "max_new_tokens": 250}
    with net.connect(counting.url, net.packet(body=body), buffer=4096) as client:
        counting.wait_pending(1)
        wait_until(lambda: not counting.scheduled)  # generated, and not yet read
        received = net.rest(client)
    deltas, last = net.told(received)  # no line of chunked coding looks like an event's
    assert "".join(deltas) == last["response"] == b"".join(pieces).decode()


# ------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------


def test_errors_before_the_first_token_are_ordinary(counting, say):
    say(b"a")
    wrong = counting.post("hello", stream=True, temperature=3)
    assert wrong.status_code == 422 and "temperature" in wrong.text
    long = counting.post("hello", stream=True, max_new_tokens=10**6)
    assert long.status_code == 400 and "1000000" in long.json()["detail"]
    assert long.headers["Content-Type"] == "application/json"


def test_timeouts_before_and_after_the_first_token(counting_folder, monkeypatch):
    with running(model=counting_folder, request_timeout=1.5) as served:
        scripted.teach(monkeypatch, served, in_bytes(b"abc"))
        served.gate.allow(1)
        event, data = list(net.events(served.stream()))[-1]
        assert event == "error" and "1.5 seconds" in json.loads(data)["detail"]
        served.gate.close()
        late = served.stream()
        assert late.status_code == 504 and "1.5 seconds" in late.json()["detail"]
        monkeypatch.setattr(api, "PING_SECONDS", 0.1)  # which opens the stream
        opened = served.stream()
        *pings, (event, data) = net.events(opened)
        assert opened.status_code == 200 and {*pings} == {("", ": ping")}
        assert event == "error" and "1.5 seconds" in json.loads(data)["detail"]
        served.gate.allow()
        wait_until(served.idle)
