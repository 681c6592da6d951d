# SPDX-License-Identifier: MIT
"""Several GPUs, played by two CPU processes under torchrun: one process's answers."""

import contextlib
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import net
import psutil
import pytest
import requests
import tiny
from net import DEADLINE
from server import running, spawned, wait_until

import api

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--drain-timeout", "20")
LONG, ENDLESS = 200, 16000  # tokens: seconds; longer than any test
BODIES = [
    {"prompt": f"{n} {'word ' * n}", "max_new_tokens": 12 + n} for n in (1, 5, 20, 30)
]
BODIES += [{**BODIES[2], "temperature": 1.0, "top_p": 0.9, "seed": n} for n in (7, 8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with heads that two GPUs could not share out evenly."""
    path = tmp_path_factory.mktemp("models") / "split"
    shape = {"hidden": 160, "heads": 40, "kv_heads": 5}
    tiny.tiny_model(path, context=16384, eos="never", **shape)
    return path


def parts(port: int) -> dict[int, psutil.Process]:
    """The processes that torchrun has started for a server, by their number."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(port) in process.cmdline() and "RANK" in process.environ():
                found[int(process.environ()["RANK"])] = process
    return found


@contextlib.contextmanager
def split(folder: Path, *more: str) -> Iterator[Any]:
    """A server in two processes; `.parts` are those."""
    arguments = ("--model", str(folder), *OPTIONS, *more)
    # The log tells where a process crashes, which torchrun does not once it has a signal.
    options = {"launcher": TORCHRUN, "PYTHONFAULTHANDLER": "1"}
    with spawned(*arguments, wait=False, **options) as server:
        try:
            wait_until(lambda: "ready: " in server.log() or server.poll(), 120)
            assert server.poll() is None, server.log()
            server.parts = parts(server.port)
            yield server
        finally:
            for process in parts(server.port).values():
                process.kill()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    with split(folder, "--max-in-flight", "3") as served:
        yield served


def fail_with_log(server: Any) -> None:
    """There was no answer, or no whole one. Once in hundreds of starts a process is gone
    then: gloo, which plays the GPUs' network on CPUs, has crashed."""
    wait_until(lambda: server.poll() is not None)
    _, crashed, where = server.log().partition("Segmentation fault")
    # A stack of faulthandler's: Python's own tracebacks have a comma after the line.
    if crashed and re.search(r'torch/distributed/[^"]*", line \d+ in ', where):
        pytest.skip(f"gloo crashed: {where}")
    raise AssertionError(server.log())


def answered(server: Any) -> list[str]:
    """Answers to all of the bodies, sent at once."""

    def ask(body: dict[str, Any]) -> str:
        try:
            answer = requests.post(server.url, json=body, timeout=DEADLINE)
        except requests.ConnectionError:
            fail_with_log(server)
        return answer.json()["response"]

    with ThreadPoolExecutor(len(BODIES)) as pool:
        return list(pool.map(ask, BODIES))


def begin(server: Any, limit: int) -> tuple[requests.Response, Iterator[bytes]]:
    """A stream whose first piece has come; the next pieces."""
    body = {"prompt": "x", "max_new_tokens": limit, "stream": True}
    try:
        answer = requests.post(server.url, json=body, stream=True, timeout=DEADLINE)
        pieces = answer.iter_content(None)
        assert b"delta" in next(pieces)
    except requests.RequestException:
        fail_with_log(server)
    return answer, pieces


def metrics(server: Any) -> str:
    return requests.get(server.url + "/metrics", timeout=DEADLINE).text


def gone(server: Any) -> bool:
    """Every process has left, and none had to be killed by torchrun."""
    wait_until(lambda: not parts(server.port))
    return "forcefully" not in server.log()


def test_answers_are_those_of_one_process(folder: Path, server: Any) -> None:
    with running(model=folder, max_in_flight=3) as one:
        expected = answered(one)
    assert len(set(expected)) == len(BODIES)
    assert answered(server) == expected
    assert answered(server) == expected  # out of the cache's shared beginnings
    assert set(server.parts) == {0, 1}


def test_a_client_who_leaves_frees_the_place(server: Any) -> None:
    streams = [begin(server, ENDLESS) for _ in range(3)]  # all places
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answered, server)
        wait_until(lambda: f"requests_waiting {len(BODIES)}.0" in metrics(server))
        assert not waiting.done()
        for stream, _ in streams:
            stream.close()
        assert len(set(waiting.result(DEADLINE))) == len(BODIES)
    wait_until(lambda: "requests_in_flight 0.0" in metrics(server))


def leave(server: Any, whom: Any, number: int, code: int) -> None:
    """A signal to torchrun or to one process: the answer ends, then all processes."""
    _, pieces = begin(server, LONG)
    (server if whom == "all" else server.parts[whom]).send_signal(number)
    wait_until(lambda: "leaving: 1 requests" in server.log())
    try:
        stream = b"".join(pieces)
    except requests.RequestException:
        fail_with_log(server)
    if b"event: error" in stream:
        fail_with_log(server)
    _, last = net.told(stream)
    assert "history" in last
    assert server.wait(DEADLINE) == code
    assert gone(server)
    assert server.log().count("Traceback") == code  # torchrun's own


def test_leaving_finishes_answers_and_ends_all(folder: Path) -> None:
    with split(folder) as server:
        leave(server, 0, signal.SIGINT, 0)


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_dies_takes_the_other_along(folder: Path, number: int) -> None:
    with split(folder) as server:
        _, pieces = begin(server, ENDLESS)
        server.parts[number].kill()
        with contextlib.suppress(requests.RequestException):
            assert b"history" not in b"".join(pieces)
        assert server.wait(DEADLINE) == 1
        assert gone(server)


def test_a_failure_is_not_mended_on_one_gpu_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model=folder) as one:
        monkeypatch.setattr(api, "WORLD_SIZE", 2)
        one.gate.fail()
        assert one.post().status_code == 503
        assert wait_until(lambda: one.ended) == [api.EXIT_ENGINE]


def test_so_does_a_signal_to_all(server: Any) -> None:
    """The last test: it ends the server that others share."""
    # torchrun itself ends with 1 after a signal, whatever its processes end with.
    leave(server, "all", signal.SIGTERM, 1)
