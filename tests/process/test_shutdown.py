# SPDX-License-Identifier: MIT
"""Leaving: signals, what clients see meanwhile, and what a kill leaves behind."""

import contextlib
import signal
from pathlib import Path

import net
import pytest
import requests
import tiny
from server import begin, forked, is_ready, spawned, wait_until

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # more only wait for each other: see tiny.py
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--max-in-flight", "1")
LONG, ENDLESS = 1000, 15000  # tokens: seconds; minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that can be made to talk for as long as a test needs."""
    path = tmp_path_factory.mktemp("models") / "talker"
    tiny.tiny_model(path, context=16384, eos="never")
    return path


@pytest.fixture
def start(folder):
    """Starts one. `how` is `spawned` where it matters how Python and the libraries
    start."""
    with contextlib.ExitStack() as stack:

        def serving(*more, how=forked, **given):
            options = "--model", str(folder), *OPTIONS, *more
            return stack.enter_context(how(*options, **ONE_THREAD, **given))

        yield serving


@pytest.fixture
def server(start):
    """A patient one."""
    return start("--drain-timeout", "600", "--body-timeout", "600")


def health(server):
    return requests.get(server.url + "/health", timeout=60)


def metrics(server):
    return requests.get(server.url + "/metrics", timeout=60).text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_admitted_answers_finish_and_new_ones_are_refused(server, number):
    with (
        requests.Session() as kept,
        net.connect(server.url) as queued,
    ):
        assert kept.get(server.url + "/health").status_code == 200
        first, pieces = begin(server.url, LONG)
        queued.sendall(net.packet(body={"prompt": "y", "max_new_tokens": 3}))
        # The only place is taken: it waits.
        wait_until(lambda: "phi4_requests_waiting 1.0" in metrics(server))
        server.send_signal(number)
        wait_until(lambda: "leaving" in server.log())
        assert "2 requests" in server.log()
        while first.count(b"delta") < LONG // 4:  # and goes on to listen meanwhile
            first += next(pieces)
        answer = kept.get(server.url + "/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "draining")
        for session in (kept, requests):
            answer = session.post(server.url, json={"prompt": "z"}, timeout=60)
            assert answer.status_code == 503
            assert answer.headers["Retry-After"]
        _, last = net.told(first + b"".join(pieces))
        assert list(last) == ["response", "history", "status", "time"]
        assert net.rest(queued).startswith(b"HTTP/1.1 200")
    assert server.wait(60) == 0
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(server, number):
    _, pieces = begin(
        server.url, ENDLESS
    )  # held: a client that leaves is not waited for
    server.send_signal(number)
    wait_until(lambda: health(server).status_code == 503)
    server.send_signal(number)
    assert server.wait(60) == 128 + number
    assert "Traceback" not in server.log()
    pieces.close()


def test_no_answer_is_waited_for_longer_than_the_drain_timeout(start):
    server = start("--drain-timeout", "0.5")
    first, pieces = begin(server.url, ENDLESS)
    server.send_signal(signal.SIGTERM)
    with contextlib.suppress(requests.exceptions.ChunkedEncodingError):
        first += b"".join(pieces)
    assert b"history" not in first  # it was cut
    assert server.wait(60) == 0
    assert "Traceback" not in server.log()


def test_an_idle_server_leaves_although_connections_are_open(server):
    half = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    with net.connect(server.url, half), requests.Session() as kept:
        kept.get(server.url + "/health")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert "Traceback" not in server.log()


LINGERS = """
import threading
threading.Thread(target=threading.Event().wait).start()
"""


def test_leaving_does_not_wait_for_a_thread_that_hangs(start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LINGERS)  # Python runs it at its start
    server = start(how=spawned, PYTHONPATH=str(tmp_path))
    server.terminate()
    assert server.wait(60) == 0


def files(folder: Path):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_after_a_kill_the_next_start_is_ready_and_nothing_is_left(
    start, folder, tmp_path
):
    before = files(folder)
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path))
    server = start(how=spawned, **places)
    _, pieces = begin(server.url, ENDLESS)
    server.kill()
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        b"".join(pieces)
    assert server.wait(60) == -signal.SIGKILL
    # The same port, at once.
    start("--port", str(server.port), wait=False, **places)
    wait_until(lambda: is_ready(server.url), 120)
    body = {"prompt": "x", "max_new_tokens": 2}
    assert requests.post(server.url, json=body, timeout=60).ok
    assert files(folder) == before
    assert [path for path in files(tmp_path) if path.is_file()] == []
