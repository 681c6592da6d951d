# SPDX-License-Identifier: MIT
"""Faults of the engine: clients are told, and it serves again or ends the process."""

import asyncio
import json
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import net
import pytest
import requests
import torch
from server import narrow, spawned, wait_until

import api

ROUTES = "/", "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared(tiny_folder):
    with narrow(tiny_folder) as served:
        yield served


def fill(served, **body) -> list[Future]:
    """Four requests, in this order: two are in flight and two wait."""
    asked = []
    for number in range(4):
        asked.append(served.submit(f"{number}", stream=number % 2 == 1, **body))
        served.wait_pending(number + 1)
    wait_until(lambda: served.gate.held)
    return asked


def all_told_to_try_again(asked: list[Future]) -> bool:
    answers = [future.result() for future in asked]
    told = [(each.status_code, each.headers.get("Retry-After")) for each in answers]
    return told == [(503, "1")] * len(asked)


# ------------------------------------------------------------------------------
# The generation thread ends and is started again
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("illegal memory access"),
        KeyError("anything"),
        AssertionError(),  # of which str is empty
    ],
)
def test_after_a_forward_pass_that_raises_nothing_is_lost(shared, fault, caplog):
    assert shared.works()
    before = shared.answer("again", max_new_tokens=8)
    shared.call(asyncio.to_thread(int))  # the event loop keeps its helper, from here on
    free, threads, thread = shared.free_cache(), threading.active_count(), shared.thread
    with shared.gate as gate:
        gate.close()
        plain = [shared.submit(f"begun {n}") for n in range(2)]
        shared.wait_pending(2)
        gate.allow(3)
        wait_until(lambda: gate.held and len(shared.active) == 2)
        waiting = [shared.submit(f"waiting {n}", stream=n == 1) for n in range(2)]
        shared.wait_pending(4)
        gate.fail(fault)
        assert all_told_to_try_again(plain + waiting)
    assert shared.works()
    assert not thread.is_alive()  # joined, not left behind
    assert repr(fault) in caplog.text  # the log says why
    assert shared.answer("again", max_new_tokens=8) == before
    assert shared.free_cache() == free
    # The event loop takes another helper where the first is still busy.
    assert threading.active_count() <= threads + 1


def test_a_generation_thread_that_dies_slowly_says_why(shared, monkeypatch, caplog):
    """The library stops taking requests before it records the error."""
    status = shared.engine.manager.background_thread_status
    record = status.record_fatal_error

    def record_late(error: Exception) -> None:
        time.sleep(0.5)
        record(error)

    monkeypatch.setattr(status, "record_fatal_error", record_late)
    with shared.gate as gate:
        gate.close()
        asked = fill(shared)
        gate.fail(RuntimeError("the cause"))
        assert all_told_to_try_again(asked)
    assert shared.works()
    assert "again: RuntimeError('the cause')" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_generation_thread_that_just_ends_is_started_again(shared):
    """It leaves no fatal error behind: liveness is more than that."""
    thread = shared.thread
    with shared.gate as gate:
        gate.close()
        asked = fill(shared)
        gate.fail(SystemExit())
        assert all_told_to_try_again(asked)
    assert shared.works()
    assert shared.thread is not thread


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_a_fault_before_the_first_token_is_a_503(counting, say, path, stream):
    say(b"a")
    counting.gate.fail()
    failed = counting.post(path=path, stream=stream)
    assert failed.status_code == 503 and failed.headers["Retry-After"] == "1"
    assert failed.headers["Content-Type"] == "application/json"
    if path != "/":
        error = failed.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "server_error"
    counting.wait_ready()
    assert counting.answer() == "a"


@pytest.mark.parametrize("path", ROUTES)
def test_a_fault_after_the_first_token_is_an_error_event(counting, say, path):
    say(*[b"%c" % letter for letter in b"abcdef"])
    counting.gate.allow(2)
    response = counting.stream(path=path)
    assert response.status_code == 200
    found = net.events(response)
    seen = [next(found)]
    while not re.search('"a?b"', seen[-1][1]):  # one piece if the reader is late
        seen.append(next(found))
    counting.gate.fail()
    seen += found
    assert [event for event, _ in seen[:-1]] == ["message"] * (len(seen) - 1)
    event, data = seen[-1]
    assert event == "error"
    why = json.loads(data)
    if path == "/":
        assert "engine failed" in why["detail"]
    else:
        assert "engine failed" in why["error"]["message"]
        assert why["error"]["type"] == "server_error"
    counting.wait_ready()
    assert counting.answer() == "abcdef"


def test_a_request_that_the_dying_thread_never_saw_is_answered(shared, monkeypatch):
    """Put in after the loop's end it would wait for ever."""
    with monkeypatch.context() as patch:
        shared.replace(patch, "add_request", lambda tokens, name, *_, **__: name)
        asked = shared.submit()
        shared.wait_pending(1)
        shared.stop_thread()
        assert all_told_to_try_again([asked])
    assert shared.works()


def test_a_request_that_a_stopping_thread_refuses_is_a_503(shared, monkeypatch):
    with monkeypatch.context() as patch:
        shared.replace(patch, "add_request", lambda *_, **__: None)
        assert all_told_to_try_again([shared.submit()])
    assert shared.works()


def test_health_is_503_while_the_thread_is_down(shared):
    """Down is from when it has to end until it has ended and another is there."""

    def health():
        return requests.get(shared.url + "/health", timeout=net.DEADLINE)

    thread = shared.thread
    with shared.gate as gate:
        gate.close()
        asked = fill(shared)
        shared.stop_thread()  # which ends after the forward pass that waits
        wait_until(lambda: not health().ok)
        assert (health().status_code, health().json()["status"]) == (503, "down")
        assert all_told_to_try_again([*asked, shared.submit()])
        assert shared.thread is thread and thread.is_alive()
    assert shared.works()
    assert shared.thread is not thread and not thread.is_alive()


def test_an_engine_that_cannot_be_restarted_ends_the_process(tiny_folder, monkeypatch):
    """What an unusable CUDA context does: it raises wherever the GPU is touched."""

    def unusable():
        raise RuntimeError("CUDA error: device-side assert triggered")

    with narrow(tiny_folder) as served:
        served.replace(monkeypatch, "start", unusable)
        served.gate.fail(RuntimeError("CUDA error: device-side assert"))
        assert served.post().status_code == 503
        wait_until(lambda: served.ended)
        assert served.ended == [api.EXIT_ENGINE]


# ------------------------------------------------------------------------------
# A forward pass hangs
# ------------------------------------------------------------------------------


def test_a_hanging_forward_pass_ends_the_process(tiny_folder):
    with narrow(tiny_folder, stall_timeout=0.5) as served:
        served.gate.close()
        asked = fill(served)
        wait_until(lambda: served.ended)
        assert all(future.done() for future in asked)  # the process would be gone
        assert all_told_to_try_again(asked)
        assert served.ended == [api.EXIT_ENGINE]


def test_a_hang_is_noticed_when_its_clients_have_given_up(tiny_folder):
    """And /health says so: the next client would only wait."""
    with narrow(tiny_folder, stall_timeout=0.5) as served:
        served.gate.close()
        with net.connect(served.url, net.packet(body={"prompt": "x"})):
            wait_until(lambda: served.gate.held)
        served.wait_pending(0)
        wait_until(lambda: served.ended)
        assert served.ended == [api.EXIT_ENGINE]


def test_an_idle_server_is_not_taken_for_a_hanging_one(tiny_folder):
    with narrow(tiny_folder, stall_timeout=0.2) as served:
        passes = len(served.gate.tokens)
        time.sleep(2)  # longer than the limit, and than the end of a process takes
        assert len(served.gate.tokens) == passes
        assert not served.ended
        assert served.works()


HANGS = """
import functools, os, time
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM as Model

forward = Model.forward

@functools.wraps(forward)
def hanging(*args, **kwargs):
    while os.path.exists(os.environ["HANG"]):
        time.sleep(0.01)
    return forward(*args, **kwargs)

Model.forward = hanging
"""


def test_a_hang_ends_the_real_process_with_its_exit_code(tiny_folder, tmp_path):
    """The tests above only note that the process would have ended."""
    (tmp_path / "sitecustomize.py").write_text(HANGS)  # Python runs it at its start
    hang = tmp_path / "hang"
    environment = {"PYTHONPATH": str(tmp_path), "HANG": str(hang)}
    options = ("--model", str(tiny_folder), "--device", "cpu", "--stall-timeout", "1")
    with spawned(*options, **environment) as process, ThreadPoolExecutor(4) as clients:

        def ask(stream):
            body = {"prompt": "x", "max_new_tokens": 3, "stream": stream}
            url, limit = process.url, net.DEADLINE
            return requests.post(url, json=body, timeout=limit).status_code

        assert ask(False) == 200
        hang.touch()
        assert list(clients.map(ask, [False, True] * 2)) == [503] * 4
        assert process.wait(net.DEADLINE) == api.EXIT_ENGINE
        assert "--stall-timeout" in process.log()
        assert "Traceback" not in process.log()


# ------------------------------------------------------------------------------
# The tokenizer fails
# ------------------------------------------------------------------------------


def test_a_tokenizer_that_raises_is_one_clients_500(shared, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("Already borrowed")

    with monkeypatch.context() as patch:
        shared.replace(patch, "apply_template", broken)
        for stream in (False, True):
            answer = shared.post(stream=stream)
            assert answer.status_code == 500
            assert "borrowed" not in answer.text
            number = answer.headers["X-Request-ID"]
            (told,) = [each for each in caplog.records if each.exc_info]
            assert number in told.getMessage() and "borrowed" in told.exc_text
            caplog.clear()
    assert shared.works()
