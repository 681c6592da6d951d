# SPDX-License-Identifier: MIT
"""Overload: limits in number, size and time; whoever can be answered is."""

import contextlib
import gc
import json
import resource
import socket
import threading
from concurrent.futures import Future

import pytest
import requests
import scripted
from net import DEADLINE, connect, packet, rest
from server import LONG_PROMPT, narrow, wait_until

import api
import py_api

TURNS = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def shared(tiny_folder):
    with narrow(tiny_folder) as served:
        yield served


@pytest.fixture
def busy(shared):
    """All places taken and all waiting ones too, until `busy.gate.allow()`."""
    shared.gate.close()
    shared.asked = []
    for number in range(4):
        shared.asked.append(shared.submit(f"{number}", max_new_tokens=4))
        shared.wait_pending(number + 1)
    yield shared
    shared.gate.allow()
    statuses(shared.asked)
    wait_until(shared.idle)


def statuses(futures: list[Future]) -> list[int]:
    return [future.result().status_code for future in futures]


# ------------------------------------------------------------------------------
# Admission
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_over_the_limit_is_a_503_before_tokenising(busy, monkeypatch, path, stream):
    templated = busy.spy(monkeypatch, "apply_template")
    answer = busy.post("one more", path=path, stream=stream)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "in flight" in answer.text
    assert not templated
    monkeypatch.undo()
    busy.gate.allow()
    assert statuses(busy.asked) == [200] * 4


def test_by_default_twice_as_many_wait_as_are_in_flight(tiny_folder):
    default = api.Settings().max_waiting
    with narrow(tiny_folder, max_in_flight=2, max_waiting=default) as served:
        served.gate.close()
        asked = [served.submit(max_new_tokens=1) for _ in range(6)]
        served.wait_pending(6)
        assert served.post().status_code == 503
        served.gate.allow()
        assert statuses(asked) == [200] * 6


@pytest.mark.parametrize("long", [True, False])
def test_a_slow_tokenizer_holds_up_nobody_else(shared, monkeypatch, long):
    """And a long conversation no shorter one."""
    go_on = threading.Event()

    def slow(tokenizer, turns):
        if turns[0].content == LONG_PROMPT:
            go_on.wait(DEADLINE)
        return template(tokenizer, turns)

    with monkeypatch.context() as patch:
        if long:
            patch.setattr(api, "LONG_CHARS", (len(LONG_PROMPT), 32768))
        template = shared.replace(patch, "apply_template", slow)
        asked = shared.submit(LONG_PROMPT, max_new_tokens=2)
        try:
            shared.wait_pending(1)
            assert requests.get(shared.url + "/health", timeout=20).ok
            if long:
                assert shared.post(max_new_tokens=2).ok
        finally:
            go_on.set()
        assert asked.result().ok


def test_first_come_first_served(tiny_folder, monkeypatch):
    with narrow(tiny_folder, max_in_flight=1, max_waiting=8) as served:
        served.gate.close()
        asked = []
        for number in range(9):
            asked.append(served.submit(f"{number}", max_new_tokens=1 + number % 3))
            served.wait_pending(number + 1)
        came, released = served.pending, served.spy(monkeypatch, "release")
        served.gate.allow()
        assert statuses(asked) == [200] * 9
        assert [*dict.fromkeys(args[0].id for args, _ in released)] == came


# ------------------------------------------------------------------------------
# Limits in size and time
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
@pytest.mark.parametrize("chunked", [False, True])
def test_too_long_a_body_is_a_413(tiny_folder, path, chunked):
    with narrow(tiny_folder, max_body_bytes=4096) as served:
        body = {"prompt": "x", "max_new_tokens": 1}
        if path != "/":
            body = {"messages": TURNS, "max_tokens": 1}
        exact = json.dumps(body).encode().ljust(4096)
        for data, status in ((exact, 200), (exact + b" ", 413), (exact * 50, 413)):
            pieces = (data[at : at + 1000] for at in range(0, len(data), 1000))
            answer = requests.post(
                served.url + path,
                data=pieces if chunked else data,
                headers={"Content-Type": "application/json"},
                timeout=DEADLINE,
            )
            assert answer.status_code == status
        assert served.works()


def test_the_413_reaches_a_client_that_is_still_sending(tiny_folder):
    with narrow(tiny_folder, max_body_bytes=4096) as served:
        head = HEAD + b"Content-Length: 32768\r\n\r\n"
        with connect(served.url, head + b"[" * 16384) as connection:
            assert served.works()  # meanwhile the server has read all that
            connection.sendall(b"[" * 16384)
            assert connection.recv(12) == b"HTTP/1.1 413"


def test_the_413_reaches_a_client_however_long_its_body_is(tiny_folder):
    with narrow(tiny_folder, max_body_bytes=4096) as served:
        head = HEAD + b"Content-Length: 5000000\r\n\r\n"
        with connect(served.url, head + b"[" * 80_000) as connection:
            assert connection.recv(12) == b"HTTP/1.1 413"
            connection.sendall(b"[" * 4_920_000)  # without a reset
        assert served.works()


def test_the_time_limit_counts_waiting_and_frees_the_place(tiny_folder):
    with narrow(tiny_folder, request_timeout=0.5) as served:
        served.gate.close()
        asked = [served.submit(stream=number > 1) for number in range(4)]
        assert statuses(asked) == [504] * 4
        assert not served.pending
        served.gate.allow()
        wait_until(served.idle)
        assert served.works()


HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_half_sent_requests_hold_no_place(tiny_folder):
    with narrow(tiny_folder, max_in_flight=1, max_waiting=3) as served:
        halves = HEAD, HEAD + b"Content-Length: 50\r\n\r\n{", b"", b"PO"
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                for half in halves:
                    stack.enter_context(connect(served.url, half))
            assert served.works()
            assert not served.pending


def test_a_body_that_comes_too_slowly_is_a_408(tiny_folder):
    with narrow(tiny_folder, body_timeout=0.3) as served:
        for path in (b"/", b"/v1/chat/completions"):
            head = HEAD.replace(b" / ", b" %b " % path)
            with connect(
                served.url, head + b"Content-Length: 50\r\n\r\n{"
            ) as connection:
                assert rest(connection).startswith(b"HTTP/1.1 408")
        with connect(
            served.url, HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        ) as dripping:
            with contextlib.suppress(OSError):  # the server has closed
                while not is_readable(dripping):
                    dripping.sendall(b"1\r\n{\r\n")
            assert dripping.recv(12) == b"HTTP/1.1 408"
        assert served.works()


def is_readable(connection) -> bool:
    connection.settimeout(0.02)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        connection.settimeout(DEADLINE)


def test_readers_that_stall_hold_no_place_and_little_memory(
    counting_folder, monkeypatch
):
    """Each answer is 15 MiB long, far more than the sockets take: written without
    waiting for the reader it would lie in the server's buffers."""
    piece, count = 2**16, 240
    messages = {"messages": TURNS, "stream": True, "max_tokens": count}
    with narrow(counting_folder, max_in_flight=4) as served:
        scripted.teach(monkeypatch, served, [b"x" * piece] * count)
        request = packet("/v1/chat/completions", messages)
        with contextlib.ExitStack() as stack:
            served.gate.close()
            for _ in range(4):
                stack.enter_context(connect(served.url, request, buffer=1024))
            served.wait_pending(4)
            served.gate.allow()
            served.wait_pending(0)
            assert served.works()
            open_ones = [o for o in gc.get_objects() if type(o) is py_api.Protocol]
            buffered = [o.transport.get_write_buffer_size() for o in open_ones]
            full = [size for size in buffered if size]
            assert len(full) == 4  # they did stall
            assert max(full) < 2**20  # asyncio's mark of 64 KiB and an event


def test_a_thousand_idle_connections(shared):
    """Half of them have begun a head."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            half = b"POST / HTTP/1.1\r\nHost: localhost\r\n" if number % 2 else b""
            stack.enter_context(connect(shared.url, half))
        assert requests.get(shared.url + "/health", timeout=DEADLINE).status_code == 200
        assert shared.works()
    assert shared.works()
