# SPDX-License-Identifier: MIT
"""Strangers: whoever reaches the port can neither stop the others nor mislead them.

measure/strangers.py has the figures."""

import asyncio
import contextlib
import gc
import gzip
import json
import socket
import struct
import time
import tracemalloc

import h11
import net
import pytest
import requests
from net import DEADLINE
from server import narrow, running, wait_until

import api
import py_api

CHUNKED = "Transfer-Encoding: chunked"
WRONG_KEY = "Authorization: Bearer wrong"


@pytest.fixture(scope="module")
def shared(tiny_folder):
    with narrow(tiny_folder) as served:
        yield served


@pytest.fixture(scope="module")
def keyed(tiny_folder):
    with running(model=tiny_folder, api_key="right") as served:
        yield served


def head(path="/", *lines: str, method: str = "POST") -> bytes:
    """A request's head on a connection that is to be kept."""
    first = f"{method} {path} HTTP/1.1", "Host: localhost"
    return "\r\n".join([*first, *lines, "", ""]).encode()


def closed(connection: socket.socket) -> bool:
    """Whether the server has ended the connection."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        try:
            while connection.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return True
    return False


def pour(connection: socket.socket, data: bytes, most: int) -> int:
    """Send it over and over until the server closes the connection, or `most` bytes
    are out. Returns how many were."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most and not closed(connection):
            try:
                sent += connection.send(data)
            except BlockingIOError:
                time.sleep(0.001)
    return sent


# ------------------------------------------------------------------------------
# One connection holds nothing for long
# ------------------------------------------------------------------------------


def events(size: int, count: int) -> list[object]:
    """What the parser makes of a body in so many chunks of this size."""
    connection = py_api.BoundedConnection(h11.SERVER)
    connection.receive_data(head("/", CHUNKED))
    connection.receive_data((b"%x\r\n" % size + b"x" * size + b"\r\n") * count)
    found = []
    while (event := connection.next_event()) is not h11.NEED_DATA:
        found.append(event)
    return found


def test_a_body_in_tiny_chunks_is_refused_and_in_others_it_is_not():
    with pytest.raises(h11.RemoteProtocolError):
        events(1, 500)
    with pytest.raises(h11.RemoteProtocolError):
        events(100, 500)
    assert len(events(1, 200)) == 201, "a client may flush a few tiny ones"
    assert len(events(1000, 1000)) == 1001


def test_the_count_of_chunks_begins_again_with_each_request():
    connection = py_api.BoundedConnection(h11.SERVER)
    for _ in range(3):
        connection.receive_data(head("/", CHUNKED) + b"1\r\nx\r\n" * 200 + b"0\r\n\r\n")
        while not isinstance(connection.next_event(), h11.EndOfMessage):
            pass
        connection.send(h11.Response(status_code=204, headers=[]))
        connection.send(h11.EndOfMessage())
        connection.start_next_cycle()


@pytest.mark.parametrize("path", ["/", "/health", "/nowhere", "/v1/models"])
def test_tiny_chunks_end_the_connection_whatever_was_answered(keyed, caplog, path):
    with net.connect(keyed.url, head(path, CHUNKED)) as client:
        assert pour(client, b"1\r\nx\r\n" * 1000, 1 << 25) < 1 << 25
    with net.connect(keyed.url, head(path, CHUNKED) + b"1\r\nx\r\n" * 9000) as client:
        wait_until(lambda: closed(client))  # refused before the route has answered
    assert "Traceback" not in caplog.text
    assert requests.get(keyed.url + "/health", timeout=DEADLINE).ok


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        head("/", CHUNKED) + b"0\r\n",
        head("/health", CHUNKED) + b"5\r\nhello\r\n0\r\n",
    ],
    ids=["head", "head of a route", "trailers", "trailers of a route"],
)
def test_lines_without_end_are_cut_off(keyed, first):
    with net.connect(keyed.url, first) as client:
        assert pour(client, b"a: b\r\n" * 3000, 1 << 23) < 1 << 23


def test_a_head_of_many_lines_is_refused_even_if_it_comes_at_once(keyed):
    lines = ["a: b"] * 6000  # 36 kB, which one read may bring
    with net.connect(keyed.url, head("/health", *lines, method="GET")) as client:
        assert b" 200 " not in net.rest(client)[:20]
    some = ["a: b"] * 500
    with net.connect(keyed.url, head("/health", *some, method="GET")) as client:
        assert b" 200 " in client.recv(1000)


SLOW = {
    "nothing": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: local",
    "a body after a 401": head("/", "Content-Length: 99999999", WRONG_KEY),
    "a body after a 404": head("/nowhere", "Content-Length: 99999999"),
    "chunks after a 200": head("/health", CHUNKED, method="GET"),
}


@pytest.mark.parametrize("case", SLOW)
def test_a_client_that_is_waited_for_is_waited_for_seconds(
    tiny_folder, monkeypatch, case
):
    monkeypatch.setattr(py_api, "CLIENT_SECONDS", 1)
    with (
        running(model=tiny_folder, api_key="right") as served,
        net.connect(served.url, SLOW[case]) as client,
    ):
        end = time.monotonic() + DEADLINE
        while not closed(client):  # a byte now and then changes nothing
            with contextlib.suppress(OSError):
                client.send(b"x" if "head" in case else b"4\r\nxxxx\r\n")
            assert time.monotonic() < end
            time.sleep(0.2)


def test_an_answer_that_takes_longer_than_that_is_no_idle_connection(
    tiny_folder, monkeypatch
):
    monkeypatch.setattr(py_api, "CLIENT_SECONDS", 1)
    with running(model=tiny_folder) as served, served.gate as gate:
        gate.close()
        answer = served.submit(max_new_tokens=2)
        wait_until(lambda: gate.held)
        time.sleep(2.5)
        gate.allow()
        assert answer.result().ok


def test_what_follows_a_refusal_is_read_slowly(keyed):
    """Dropping 4 MB in chunks of 300 bytes at once would take the loop a second."""
    chunks = (b"12c\r\n" + b"x" * 300 + b"\r\n") * 1000
    with net.connect(keyed.url, head("/", CHUNKED)) as client:
        started = time.monotonic()
        pour(client, chunks, 1 << 24)
        assert time.monotonic() - started > 0.5


def test_bad_chunks_after_a_refusal_end_the_connection_without_a_traceback(
    keyed, caplog
):
    with net.connect(keyed.url, head("/", CHUNKED)) as client:
        assert b" 401 " in client.recv(1000)
        client.sendall(b"no size of a chunk\r\n")
        wait_until(lambda: closed(client))
    assert "Traceback" not in caplog.text


def test_bad_chunks_behind_a_head_that_is_refused(keyed, shared, caplog):
    """h11 answers the chunks with a 400 before the head has its 401 or 403."""
    another = head("/", CHUNKED).replace(b"localhost", b"example.com")
    for served, refused in ((keyed, head("/", CHUNKED)), (shared, another)):
        with net.connect(served.url, refused + b"no size of a chunk\r\n") as client:
            assert b" 400 " in client.recv(1000)
            wait_until(lambda: closed(client))
    wait_until(lambda: "/ 401" in caplog.text and "/ 403" in caplog.text)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("rest", ["no size of a chunk\r\n", "5\r\nhel"])
def test_a_body_that_breaks_off_is_no_slow_one(shared, caplog, rest):
    with net.connect(shared.url, head("/", CHUNKED) + rest.encode()):
        pass
    wait_until(lambda: "the body broke off" in caplog.text)
    assert "POST / 400" in caplog.text and "Traceback" not in caplog.text


# ------------------------------------------------------------------------------
# Whoever leaves is noticed
# ------------------------------------------------------------------------------

AFTERWARDS = {
    "one byte": b"x",
    "a line": b"\r\n",
    "the next request": head("/health", method="GET"),
    "half of it": b"GET /health HT",
    "thirty of them": head("/health", method="GET") * 30,
    "60 kB": b"x" * 60_000,
    "10 MB": b"x" * 10_000_000,
}


@contextlib.contextmanager
def in_flight(served, *headers: str, stream: bool = False):
    """A client whose answer is being made when it is yielded; then it leaves, and its
    place is free although the answer is not finished."""
    body = {"prompt": "x", "max_new_tokens": 490, "stream": stream}
    data = net.packet("/", body, "POST", *headers)
    with served.gate as gate:
        gate.close()
        with net.connect(
            served.url, data.replace(b"Connection: close\r\n", b"")
        ) as client:
            wait_until(lambda: gate.held)
            gate.allow(2)
            yield client
        served.wait_pending(0)
    wait_until(served.idle)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", AFTERWARDS)
def test_a_client_that_sent_more_and_left_frees_its_place(shared, case, stream):
    with (
        in_flight(shared, stream=stream) as client,
        contextlib.suppress(ConnectionError),
    ):
        client.sendall(AFTERWARDS[case])


@pytest.mark.parametrize("more", [b"", b"x", b"x" * 1000])
def test_a_client_that_asked_for_an_upgrade_and_left_frees_its_place(shared, more):
    with in_flight(shared, "Upgrade: h2c") as client:
        client.sendall(more)


def test_a_client_that_does_not_stop_sending_is_cut_off(shared):
    with in_flight(shared) as client:
        assert pour(client, b"x" * 1000, 1 << 25) < 1 << 25
        shared.wait_pending(0)


def test_requests_in_a_row_are_all_answered(shared):
    ask = net.packet(body={"prompt": "x", "max_new_tokens": 1})
    keep = ask.replace(b"Connection: close\r\n", b"")
    received = net.exchanged(shared.url, keep * 5 + ask)
    assert received.count(b"HTTP/1.1 200 OK") == 6


def test_the_cache_is_free_soon_after_everybody_has_left(shared):
    with shared.gate as gate:
        gate.close()
        body = {"prompt": "x " * 100, "max_new_tokens": 100}
        with net.connect(shared.url, net.packet(body=body)):
            wait_until(lambda: gate.held)
            gate.allow(3)
            wait_until(lambda: gate.held)
        shared.wait_pending(0)
        gate.allow()

        def used() -> float:
            text = requests.get(shared.url + "/metrics", timeout=DEADLINE).text
            line = next(x for x in text.split("\n") if x.startswith("phi4_cache_usage"))
            return float(line.split()[1])

        wait_until(lambda: used() == 0)


# ------------------------------------------------------------------------------
# What cannot be served costs little
# ------------------------------------------------------------------------------

FILL = {
    "<|": "<|",
    "spaces": " \n",
    "letters": "ab",
    "characters": "你好",
    "emoji": "😀🎉",
}


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
@pytest.mark.parametrize("fill", FILL)
def test_what_cannot_fit_is_not_tokenised(shared, monkeypatch, path, fill):
    tokenised = shared.spy(monkeypatch, "apply_template")
    answer = shared.post(FILL[fill] * 40_000, path)
    assert answer.status_code == 400 and "maximum context length" in answer.text
    assert "context_length_exceeded" in answer.text  # what programs look for
    assert not tokenised


def test_neither_are_more_turns_than_the_context_has_tokens(shared, monkeypatch):
    tokenised = shared.spy(monkeypatch, "apply_template")
    turns = [{"role": "user", "content": ""}] * 4000
    assert shared.post("x", history=turns).status_code == 400
    assert not tokenised


@pytest.mark.parametrize("held_at", [2400, 3000, 6000])
def test_a_prompt_that_is_tokenised_delays_only_its_like(
    tiny_folder, monkeypatch, held_at
):
    monkeypatch.setattr(api, "LONG_CHARS", (2600, 5000))
    with running(model=tiny_folder, max_in_flight=8) as served:
        wanted, begun, go_on = "x" * held_at, [], []

        def held(tokenizer, turns):
            if turns[-1].content == wanted:
                begun.append(True)
                wait_until(lambda: go_on)
            return apply(tokenizer, turns)

        apply = served.replace(monkeypatch, "apply_template", held)
        late = served.submit(wanted)
        wait_until(lambda: begun)
        for length in {100, 2400, 3000, 6000} - {held_at}:
            answer = served.post("y" * length, max_new_tokens=1)
            assert answer.status_code in (200, 400)  # the model holds 512 tokens
        assert not late.done()
        go_on.append(True)
        assert late.result().status_code == 400


UNKNOWN = ",".join(f'"a{number}":0' for number in range(80_000))
CROWDED = {
    "fields": f"{{{UNKNOWN}}}",
    "fields of a turn": f'{{"prompt": "x", "history": [{{{UNKNOWN}}}]}}',
    "fields with spaces": f"{{{UNKNOWN}}}".replace('":', '" :'),
    "turns": json.dumps(
        {"prompt": "x", "history": [{"role": "user", "content": ""}] * 26000}
    ),
}


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
@pytest.mark.parametrize("case", CROWDED)
def test_a_body_of_very_many_fields_is_not_validated(shared, case, path):
    headers = {"Content-Type": "application/json"}
    answer = requests.post(
        shared.url + path, CROWDED[case], headers=headers, timeout=DEADLINE
    )
    assert answer.status_code == 400 and "fields" in answer.text


@pytest.mark.parametrize("waits_for", ["the model", "a tokenizer"])
def test_what_is_ignored_of_a_body_is_not_kept(shared, monkeypatch, waits_for):
    """1 MiB of ignored fields is 27 MB as Python objects."""
    ignored, begun, go_on = [{} for _ in range(250_000)], [], []

    def held(tokenizer, turns):
        begun.append(True)
        wait_until(lambda: go_on)
        return apply(tokenizer, turns)

    if waits_for == "a tokenizer":
        apply = shared.replace(monkeypatch, "apply_template", held)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with shared.gate as gate:
            gate.close()
            length = 3000 if waits_for == "a tokenizer" else 1
            url = "/v1/chat/completions"
            answer = shared.submit("x" * length, url, x=ignored, max_tokens=1)
            wait_until(lambda: gate.held or begun)
            kept = tracemalloc.get_traced_memory()[0] - before
            go_on.append(True)
        assert answer.result().status_code in (200, 400)
    finally:
        tracemalloc.stop()
    assert kept < 8e6, "the client in this process holds some 3 MB"


def test_a_connection_that_was_closed_is_not_kept(shared):
    def kept() -> int:
        gc.collect()
        return sum(isinstance(each, py_api.Protocol) for each in gc.get_objects())

    before = kept()
    for number in range(60):
        half = b"GET /health HTTP/1.1\r\nHost: local" * (number % 3)
        with net.connect(shared.url, half) as client:
            if number % 2:  # a reset
                linger = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    end = time.monotonic() + py_api.CLIENT_SECONDS / 2
    while kept() > before:
        assert time.monotonic() < end
        time.sleep(0.1)


# ------------------------------------------------------------------------------
# Web pages of others
# ------------------------------------------------------------------------------

OURS = (
    "localhost",
    "LOCALHOST:6006",
    "127.0.0.1",
    "127.0.0.1:6006",
    "[::1]:80",
    "10.1.2.3",
)
OURS += "localhost.", socket.gethostname(), f"{socket.gethostname()}:6006", "[::1]"
THEIRS = (
    "evil.example",
    "evil.example:6006",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
)
THEIRS += (
    "evil",
    "0x7f000001",
    "127.0.0.1@evil.example",
    "127.0.0.1:80@evil.example",
    "[::1",
)
THEIRS += (
    f"{socket.gethostname()}.evil.example",
    "xn--e1afmkfd.example",
    "1.2.3.4.5",
    "a b",
)


def status(served, host: str, path: str = "/v1/models") -> int:
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    return int(net.exchanged(served.url, request.encode()).split()[1])


@pytest.mark.parametrize("host", OURS)
def test_this_machine_is_answered_by_its_names(shared, host):
    assert status(shared, host) == 200


@pytest.mark.parametrize("host", THEIRS)
def test_other_names_are_not_answered_without_a_key(shared, host):
    assert status(shared, host) in (400, 403)
    assert status(shared, host, "/openapi.json") in (400, 403)


def test_the_refusal_names_the_setting(shared):
    headers = {"Host": "evil.example"}
    answer = requests.post(
        shared.url, json={"prompt": "x"}, headers=headers, timeout=60
    )
    assert answer.status_code == 403
    assert "evil.example" in answer.text and "--allowed-hosts" in answer.text


def test_http_1_0_needs_no_host(shared):
    assert (
        b" 200 " in net.exchanged(shared.url, b"GET /v1/models HTTP/1.0\r\n\r\n")[:20]
    )


@pytest.mark.parametrize("allowed", ["phi4.example, other.example", "*"])
def test_other_names_can_be_allowed(tiny_folder, allowed):
    with running(model=tiny_folder, allowed_hosts=allowed) as served:
        assert (
            status(served, "PHI4.example:6006")
            == status(served, "other.example")
            == 200
        )
        assert status(served, "evil.example") == (200 if allowed == "*" else 403)


def test_with_a_key_any_name_will_do(keyed):
    assert status(keyed, "evil.example") == 401


def test_no_redirect_follows_the_host_header(shared):
    for path in ("/health/", "/v1/models/", "//evil.example", "/docs/"):
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        received = net.exchanged(shared.url, request.encode()).lower()
        assert b"location:" not in received and b" 404 " in received[:20], path


def test_the_docs_page_needs_no_other_server(keyed):
    page = requests.get(keyed.url + "/docs", timeout=DEADLINE).text
    addresses = [part.split('"')[0] for part in page.replace("'", '"').split('"')[1::2]]
    assert not [each for each in addresses if "//" in each], "from elsewhere"
    for path in ("swagger-ui-bundle.js", "swagger-ui.css"):
        address = next(each for each in addresses if path in each)
        asset = requests.get(keyed.url + address, timeout=DEADLINE)
        assert asset.ok and len(asset.content) > 100_000


def test_an_upgrade_to_websocket_is_an_ordinary_request(shared):
    body = {"prompt": "x", "max_new_tokens": 1}
    upgrade = "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"
    data = net.packet("/", body, "POST", *upgrade, "Sec-WebSocket-Key: eA==")
    assert b" 200 " in net.exchanged(shared.url, data)[:20]


# ------------------------------------------------------------------------------
# Streams and messages
# ------------------------------------------------------------------------------

ENDS = "\u2028", "\u2029", "\u0085"


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_no_line_of_a_stream_holds_another_end_of_line(counting, say, path):
    say(*(f"a{end}b".encode() for end in ENDS))
    limit = "max_new_tokens" if path == "/" else "max_tokens"
    answer = counting.stream("".join(ENDS), path, **{limit: 3})
    texts = []
    for line in answer.content.decode().splitlines():
        assert not line or line.startswith(("data: ", "event: ")), line
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            texts.append(event.get("delta") or "")
            for choice in event.get("choices", ()):
                texts.append(choice["delta"].get("content") or "")
    assert "".join(texts) == "".join(f"a{end}b" for end in ENDS)


def test_a_stream_of_the_tutorials_route_says_how_it_ended(counting, say):
    for limit, reason in ((2, "length"), (20, "stop")):
        say(b"a", b"b", b"c", b"!")
        found = [*net.events(counting.stream(max_new_tokens=limit, stop="!"))]
        (_, whole), (event, data) = found[-2:]
        assert "response" in json.loads(whole)
        assert event == "end"
        usage = json.loads(data)
        assert usage["finish_reason"] == reason
        assert usage["completion_tokens"] == (2 if reason == "length" else 4)
        assert usage["prompt_tokens"] > 0


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_a_stream_that_waits_is_opened_and_pinged(shared, monkeypatch, path):
    monkeypatch.setattr(api, "PING_SECONDS", 0.2)
    limit = "max_new_tokens" if path == "/" else "max_tokens"
    with shared.gate as gate:
        gate.close()
        answer = shared.stream("x", path, **{limit: 3})  # its head comes
        assert answer.status_code == 200
        found = net.events(answer)
        assert [next(found)[0] for _ in range(3)] == ["", "", ""]  # comments
        gate.allow()
        rest = [data for event, data in found if event]
    if path != "/":
        roles = [
            "role" in json.loads(data)["choices"][0]["delta"] for data in rest[:-1]
        ]
        assert roles == [True] + [False] * (len(rest) - 2)
    wait_until(shared.idle)


def test_no_ping_follows_text_that_came_before_the_stream_was_opened():
    async def first_two() -> tuple[bytes, bool]:
        generation = api.Generation("phi-4", None)
        generation.feed(b"a")
        generation.changed.set()
        await generation.wait()
        generation.feed(b"b")
        generation.changed.set()
        body = api.ChatRequest(prompt="x", stream=True)
        events = api.stream_events(None, body, generation)
        begin = await anext(events)
        second = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        try:
            return begin, second.done()
        finally:
            second.cancel()

    assert asyncio.run(first_two()) == (b'data: {"delta": "ab"}\n\n', False)


def test_an_error_after_the_first_ping_is_an_event(shared, monkeypatch):
    monkeypatch.setattr(api, "PING_SECONDS", 0.1)
    with shared.gate as gate:
        gate.close()
        answer = shared.stream("x")
        gate.fail()
        *_, (event, data) = net.events(answer)
    assert event == "error" and "failed" in json.loads(data)["detail"]
    assert shared.works()


def test_an_error_before_it_is_plain(shared):
    with shared.gate as gate:
        gate.close()
        answer = shared.submit("x", stream=True)
        wait_until(lambda: gate.held)
        gate.fail()
        assert answer.result().status_code == 503
    assert shared.works()


ASK = '{"prompt": "SECRET你好"}'
NOT_UNDERSTOOD = {
    "GBK": (ASK.encode("gbk"), {"Content-Type": "application/json"}, "UTF-8"),
    "latin-1": (
        '{"prompt":"é"}'.encode("latin-1"),
        {"Content-Type": "application/json"},
        "UTF-8",
    ),
    "gzip": (
        gzip.compress(ASK.encode()),
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        "compressed",
    ),
    "no type": (ASK.encode(), {}, "Content-Type: application/json"),
    "a form's": (
        ASK.encode(),
        {"Content-Type": "text/plain"},
        "Content-Type: application/json",
    ),
    "curl -d": (
        ASK.encode(),
        {"Content-Type": "application/x-www-form-urlencoded"},
        "Content-Type: application/json",
    ),
    "no JSON": (
        b'{"prompt": "SECRET",}',
        {"Content-Type": "application/json"},
        "send JSON",
    ),
    "single quotes": (
        b"{'prompt': 'SECRET'}",
        {"Content-Type": "application/json"},
        "send JSON",
    ),
    "a list": (b'["SECRET"]', {"Content-Type": "application/json"}, "JSON object"),
    "nothing": (b"", {"Content-Type": "application/json"}, "JSON object"),
    "nested": (b"[" * 100_000, {"Content-Type": "application/json"}, "JSON"),
}


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_said_to_the_client_and_the_log(
    shared, caplog, case, path
):
    body, headers, told = NOT_UNDERSTOOD[case]
    answer = requests.post(shared.url + path, body, headers=headers, timeout=DEADLINE)
    assert answer.status_code in (400, 422)
    assert told in answer.text
    wait_until(lambda: " why=" in caplog.text)
    line = next(text for text in caplog.messages if " why=" in text)
    assert told in line
    assert "SECRET" not in answer.text + caplog.text


def test_the_log_says_why_in_one_line_of_bounded_length(shared, caplog):
    host = "\x1b[31m\x85" + "x" * 5000
    assert status(shared, host) in (400, 403)
    name = "line\nbreak\u2028\x1b" + "y" * 5000
    assert shared.post("x", **{name: 1}).status_code == 422
    wait_until(lambda: " 422 " in caplog.text)
    lines = [text for text in caplog.messages if "why=" in text]
    for line in lines:
        assert len(line) < 500 and len(line.splitlines()) == 1 and "\x1b" not in line
        assert "yyy" not in line, "a client's own name"


def test_pages_that_are_allowed_can_read_our_headers(tiny_folder):
    origin = "https://page.example"
    with running(model=tiny_folder, cors_origins=origin) as served:
        headers = {"Origin": origin}
        body = {"prompt": "x", "max_new_tokens": 1}
        answer = requests.post(served.url, json=body, headers=headers, timeout=DEADLINE)
    assert answer.headers["Access-Control-Expose-Headers"] == "*"
    assert "Access-Control-Allow-Credentials" not in answer.headers  # or * is a name


# ------------------------------------------------------------------------------
# Behind a prefix
# ------------------------------------------------------------------------------


def test_a_prefix_changes_no_answer(tiny_folder):
    with running(model=tiny_folder, root_path="phi4/", api_key="right") as served:
        for path in ("/health", "/docs", "/openapi.json"):
            assert requests.get(served.url + path, timeout=DEADLINE).status_code == 200
        url, key = (
            served.url + "/v1/chat/completions",
            {"Authorization": "Bearer right"},
        )
        for status, headers in ((401, {}), (400, key)):
            wrong = requests.post(url, json={}, headers=headers, timeout=DEADLINE)
            assert wrong.status_code == status and set(wrong.json()) == {"error"}
        missing = requests.get(served.url + "/v1/nothing", timeout=DEADLINE)
        assert missing.status_code == 404 and set(missing.json()) == {"error"}
        other = requests.post(served.url, json={}, timeout=DEADLINE)
        assert other.status_code == 401 and set(other.json()) == {"detail"}
        schema = requests.get(served.url + "/openapi.json", timeout=DEADLINE).json()
        assert schema["servers"][0]["url"] == "/phi4"
        page = requests.get(served.url + "/docs", timeout=DEADLINE).text
        assert "/phi4/openapi.json" in page and '"/phi4/static-offline-docs/' in page
