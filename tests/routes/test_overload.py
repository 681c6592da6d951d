# SPDX-License-Identifier: MIT
"""Overload and faults: whoever can be answered is, and the server serves again."""

import asyncio
import contextlib
import gc
import json
import resource
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import openai
import pytest
import requests
import scripted
import torch
from server import running, spawned, wait_until
from soak import free_cache

import api

TURNS = [{"role": "user", "content": "hello"}]


class Gate:
    """Stands in for the model's forward pass: holds it up, or makes it fail."""

    def __init__(self, forward):
        self.forward, self.open = forward, threading.Event()
        self.entered = threading.Event()
        self.faults, self.passes = [], 0
        self.open.set()

    def __call__(self, *args, **options):
        self.entered.set()
        self.open.wait()
        self.passes += 1
        if self.faults:
            raise self.faults.pop()
        return self.forward(*args, **options)


@contextlib.contextmanager
def gated(folder, **options):
    """A server with a gate before its model; two places, two may wait."""
    options = {"max_in_flight": 2, "max_waiting": 2} | options
    with running(model=folder, **options) as served, ThreadPoolExecutor(32) as clients:
        model = served.engine.manager.model
        served.gate = model.forward = Gate(model.forward)
        served.submit = lambda *args, **body: clients.submit(served.post, *args, **body)
        try:
            yield served
        finally:
            served.gate.open.set()


@pytest.fixture(scope="module")
def shared(tiny_folder):
    with gated(tiny_folder) as served:
        yield served


@pytest.fixture
def busy(shared):
    """All places taken and all waiting ones too, until `busy.gate.open.set()`."""
    shared.gate.open.clear()
    shared.asked = []
    for number in range(4):
        shared.asked.append(shared.submit(f"{number}", max_new_tokens=4))
        wait_until(lambda: len(shared.engine.pending) == number + 1)  # noqa: B023
    yield shared
    shared.gate.open.set()
    for future in shared.asked:
        future.result()
    wait_until(shared.idle)


def statuses(futures: list[Future]) -> list[int]:
    return [future.result(60).status_code for future in futures]


def works(served) -> bool:
    """Whether as many requests as are admitted succeed and leave nothing behind."""
    asked = [served.submit("again", max_new_tokens=3) for _ in range(4)]
    good = statuses(asked) == [200] * 4
    wait_until(served.idle)
    return good


# ------------------------------------------------------------------------------
# Admission
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_over_the_limit_is_a_503_before_tokenising(busy, monkeypatch, path, stream):
    asked = []
    monkeypatch.setattr(busy.engine, "template", lambda *turns: asked.append(turns))
    body = {"messages": TURNS} if path != "/" else {}
    answer = busy.post("one more", path=path, stream=stream, **body)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert not asked
    monkeypatch.undo()
    busy.gate.open.set()
    assert statuses(busy.asked) == [200] * 4


def test_by_default_twice_as_many_wait_as_are_in_flight(tiny_folder):
    default = api.Settings().max_waiting
    with gated(tiny_folder, max_in_flight=2, max_waiting=default) as served:
        served.gate.open.clear()
        asked = [served.submit(max_new_tokens=1) for _ in range(6)]
        wait_until(lambda: len(served.engine.pending) == 6)
        assert served.post().status_code == 503
        served.gate.open.set()
        assert statuses(asked) == [200] * 6


def test_a_slow_tokenizer_holds_up_nobody_else(shared, monkeypatch):
    go_on, template = threading.Event(), shared.engine.template

    def slow(turns):
        go_on.wait(60)
        return template(turns)

    with monkeypatch.context() as patch:
        patch.setattr(api, "SHORT", 0)
        patch.setattr(shared.engine, "template", slow)
        asked = shared.submit(max_new_tokens=2)
        try:
            wait_until(lambda: shared.engine.pending)
            assert requests.get(shared.url + "/health", timeout=20).ok
        finally:
            go_on.set()
        assert asked.result(60).ok


def test_the_openai_clients_own_retry_succeeds(busy):
    seen = []

    def note(response):
        seen.append(response.status_code)
        busy.gate.open.set()  # what was in the way goes on
        for future in busy.asked:
            future.result(60)

    http = openai.DefaultHttpxClient(event_hooks={"response": [note]}, trust_env=False)
    with openai.OpenAI(
        base_url=busy.url + "/v1", api_key="-", http_client=http
    ) as client:
        answer = client.chat.completions.create(
            model="tiny", messages=TURNS, max_tokens=2
        )
    assert answer.usage.completion_tokens == 2
    assert seen == [503, 200]


def test_first_come_first_served(tiny_folder, monkeypatch):
    with gated(tiny_folder, max_in_flight=1, max_waiting=8) as served:
        served.gate.open.clear()
        ended, release = [], served.engine.release

        def note(answer, *error):
            ended.append(answer.id)
            release(answer, *error)

        asked = []
        for number in range(9):
            asked.append(served.submit(f"{number}", max_new_tokens=1 + number % 3))
            wait_until(lambda: len(served.engine.pending) == number + 1)  # noqa: B023
        came = [*served.engine.pending]
        monkeypatch.setattr(served.engine, "release", note)
        served.gate.open.set()
        assert statuses(asked) == [200] * 9
        assert [*dict.fromkeys(ended)] == came


def test_a_client_that_leaves_while_waiting_gives_up_its_place(busy):
    port = int(busy.url.rsplit(":", 1)[1])
    busy.gate.open.set()
    assert statuses(busy.asked) == [200] * 4
    busy.gate.open.clear()
    busy.asked = [busy.submit(max_new_tokens=2) for _ in range(2)]
    wait_until(lambda: len(busy.engine.pending) == 2)
    body = b'{"prompt": "x"}'
    head = f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        leaving.sendall(head.encode() + body)
        wait_until(lambda: len(busy.engine.pending) == 3)
    wait_until(lambda: len(busy.engine.pending) == 2)


def test_who_was_preempted_comes_again_when_the_only_other_one_leaves(tiny_folder):
    small = {"cache_tokens": 128, "request_timeout": 60}
    with gated(tiny_folder, **small) as served, ThreadPoolExecutor(2) as pool:
        processor, gate = served.engine.manager.batch_processor, served.gate.open
        offload = processor.offloading_manager.offload_requests

        def offload_and_stop() -> bool:
            done = offload()
            if processor.scheduler.block_new_requests:
                gate.clear()
            return done

        processor.offloading_manager.offload_requests = offload_and_stop
        gate.clear()
        asked = []
        for prompt in "xy":  # either alone would fill most of the cache
            body = {"prompt": prompt, "max_new_tokens": 110, "stream": True}
            asked.append(pool.submit(requests.post, served.url, json=body, stream=True))
            wait_until(lambda: len(served.engine.pending) == len(asked))
        names = list(served.engine.pending)
        gate.set()
        streams = [future.result() for future in asked]
        wait_until(lambda: processor.scheduler.block_new_requests)
        (left,) = processor.scheduler.active_requests
        streams.pop(names.index(left)).close()
        wait_until(lambda: left not in served.engine.pending)
        gate.set()
        (stream,) = streams
        assert '"status":200' in stream.text
        wait_until(served.idle)


# ------------------------------------------------------------------------------
# Limits in size and time
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
@pytest.mark.parametrize("chunked", [False, True])
def test_too_long_a_body_is_a_413(tiny_folder, path, chunked):
    with gated(tiny_folder, max_body_bytes=4096) as served:
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
                timeout=60,
            )
            assert answer.status_code == status
        assert works(served)


def test_the_413_reaches_a_client_that_is_still_sending(tiny_folder):
    with gated(tiny_folder, max_body_bytes=4096) as served:
        head = HEAD + b"Content-Length: 32768\r\n\r\n"
        with connect(served, head + b"[" * 16384) as connection:
            assert works(served)  # meanwhile the server has read all that
            connection.sendall(b"[" * 16384)
            assert connection.recv(12) == b"HTTP/1.1 413"


def test_the_413_reaches_a_client_however_long_its_body_is(tiny_folder):
    with gated(tiny_folder, max_body_bytes=4096) as served:
        head = HEAD + b"Content-Length: 5000000\r\n\r\n"
        with connect(served, head + b"[" * 80_000) as connection:
            assert connection.recv(12) == b"HTTP/1.1 413"
            connection.sendall(b"[" * 4_920_000)  # without a reset
        assert works(served)


def test_the_time_limit_counts_waiting_and_frees_the_place(tiny_folder):
    with gated(tiny_folder, request_timeout=0.5) as served:
        served.gate.open.clear()
        asked = [served.submit(stream=number > 1) for number in range(4)]
        assert statuses(asked) == [504] * 4
        assert len(served.engine.pending) == 0
        served.gate.open.set()
        wait_until(served.idle)
        assert works(served)


def test_a_stream_over_the_time_limit_ends_with_an_error(tiny_folder):
    with gated(tiny_folder, request_timeout=1) as served:
        address = served.url + "/"
        body = {"prompt": "x", "stream": True}
        with requests.post(address, json=body, stream=True, timeout=60) as answer:
            pieces = answer.iter_content(None)
            received = next(pieces)
            served.gate.open.clear()
            received += b"".join(pieces)
        assert b"event: error" in received
        assert b"not finished after 1 seconds" in received
        served.gate.open.set()
        wait_until(served.idle)


def connect(served, data=b""):
    port = int(served.url.rsplit(":", 1)[1])
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(data)
    return connection


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def test_half_sent_requests_hold_no_place(tiny_folder):
    with gated(tiny_folder, max_in_flight=1, max_waiting=3) as served:
        halves = HEAD, HEAD + b"Content-Length: 50\r\n\r\n{", b"", b"PO"
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                for half in halves:
                    stack.enter_context(connect(served, half))
            assert works(served)
            assert len(served.engine.pending) == 0


def test_a_body_that_comes_too_slowly_is_a_408(tiny_folder):
    with gated(tiny_folder, body_timeout=0.3) as served:
        for path in (b"/", b"/v1/chat/completions"):
            head = HEAD.replace(b" / ", b" %b " % path)
            with connect(served, head + b"Content-Length: 50\r\n\r\n{") as connection:
                received = b""
                while piece := connection.recv(65536):  # until the server closes
                    received += piece
            assert received.startswith(b"HTTP/1.1 408")
        with connect(served, HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as dripping:
            with contextlib.suppress(OSError):  # the server has closed
                while not select_readable(dripping):
                    dripping.sendall(b"1\r\n{\r\n")
            assert dripping.recv(12) == b"HTTP/1.1 408"
        assert works(served)


def select_readable(connection) -> bool:
    connection.settimeout(0.02)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        connection.settimeout(60)


def test_readers_that_stall_hold_no_place_and_little_memory(
    counting_folder, monkeypatch
):
    """Each answer is 15 MiB long, far more than the sockets take: written without
    waiting for the reader it would lie in the server's buffers."""
    piece, count = 2**16, 240
    messages = {"messages": TURNS, "stream": True, "max_tokens": count}
    with gated(counting_folder, max_in_flight=4) as served:
        scripted.teach(monkeypatch, served.engine, [b"x" * piece] * count)
        body = json.dumps(messages).encode()
        head = HEAD.replace(b" / ", b" /v1/chat/completions ")
        request = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        with contextlib.ExitStack() as stack:
            served.gate.open.clear()
            for _ in range(4):
                stalled = stack.enter_context(socket.socket())
                stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                stalled.connect(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
                stalled.sendall(request)
            wait_until(lambda: len(served.engine.pending) == 4)
            served.gate.open.set()
            wait_until(lambda: len(served.engine.pending) == 0)
            assert works(served)
            names = "H11Protocol", "HttpToolsProtocol"
            open_ones = [o for o in gc.get_objects() if type(o).__name__ in names]
            buffered = [o.transport.get_write_buffer_size() for o in open_ones]
            full = [size for size in buffered if size]
            assert len(full) == 4  # they did stall
            assert max(full) < 2**20  # asyncio's mark of 64 KiB and an event


def test_a_thousand_idle_connections(shared):
    """Half of them have begun a head, for which there is no time limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            half = b"POST / HTTP/1.1\r\nHost: a\r\n" if number % 2 else b""
            stack.enter_context(connect(shared, half))
        assert requests.get(shared.url + "/health", timeout=60).status_code == 200
        assert works(shared)
    assert works(shared)


# ------------------------------------------------------------------------------
# Faults
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("illegal memory access"),
        KeyError("anything"),
    ],
)
def test_a_failing_forward_pass(shared, fault):
    assert works(shared)
    shared.call(asyncio.to_thread(int))  # the event loop keeps its helper, from here on
    free, threads = free_cache(shared.engine), threading.active_count()
    shared.gate.open.clear()
    shared.gate.entered.clear()
    asked = [shared.submit(stream=number == 1) for number in range(2)]
    wait_until(lambda: len(shared.engine.pending) == 2 and shared.gate.entered.is_set())
    shared.gate.faults.append(fault)
    shared.gate.open.set()
    for future in asked:
        answer = future.result(60)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
    wait_until(lambda: shared.engine.status == "ok")
    assert works(shared)
    assert free_cache(shared.engine) == free
    assert threading.active_count() <= threads
    assert not shared.ended


def test_a_stream_that_has_begun_is_told_of_the_fault(shared):
    body = {"prompt": "x", "stream": True}
    with requests.post(shared.url, json=body, stream=True, timeout=60) as answer:
        pieces = answer.iter_content(None)
        received = next(pieces)
        shared.gate.faults.append(torch.OutOfMemoryError("CUDA out of memory"))
        received += b"".join(pieces)
    assert b"event: error\n" in received
    wait_until(lambda: shared.engine.status == "ok")
    assert works(shared)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_generation_thread_that_just_ends_is_started_again(shared):
    shared.gate.open.clear()
    asked = [shared.submit() for _ in range(4)]  # two of them wait
    wait_until(lambda: len(shared.engine.pending) == 4)
    shared.gate.faults.append(SystemExit())
    shared.gate.open.set()
    assert set(statuses(asked)) <= {200, 503}
    assert 503 in statuses(asked)
    wait_until(lambda: shared.engine.status == "ok")
    assert works(shared)


def test_a_tokenizer_that_raises_is_one_clients_500(shared, monkeypatch, caplog):
    def broken(turns, short):
        raise RuntimeError("Already borrowed")

    with monkeypatch.context() as patch:
        patch.setattr(shared.engine, "template", broken)
        for stream in (False, True):
            answer = shared.post(stream=stream)
            assert answer.status_code == 500
            assert "borrowed" not in answer.text
            number = answer.headers["X-Request-ID"]
            (told,) = [each for each in caplog.records if each.exc_info]
            assert number in told.getMessage() and "borrowed" in told.exc_text
            caplog.clear()
    assert works(shared)


def test_nothing_is_templated_for_clients_who_have_left(shared, monkeypatch):
    template, seen, held = shared.engine.template, [], threading.Event()

    def noted(turns, short=False):
        seen.append(len(turns[0].content))
        return template(turns, short)

    monkeypatch.setattr(shared.engine, "template", noted)
    shared.engine.tokenizing.submit(held.wait)
    try:
        body = json.dumps({"prompt": "x " * 1500, "history": []}).encode()
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
        with connect(shared, head + body):
            wait_until(lambda: shared.engine.pending)
        wait_until(lambda: not shared.engine.pending)
    finally:
        held.set()
    shared.engine.tokenizing.submit(int).result()  # it has nothing else to do
    assert works(shared)
    assert seen and 3000 not in seen


def test_a_prompt_whose_client_left_meanwhile_is_not_computed(shared, monkeypatch):
    template, add = shared.engine.template, shared.engine.manager.add_request
    begun, left, added = threading.Event(), threading.Event(), []

    def slow(turns, short=False):
        if not short:
            begun.set()
            left.wait()
        return template(turns, short)

    def noted(*args, **options):
        added.append(args)
        return add(*args, **options)

    monkeypatch.setattr(shared.engine, "template", slow)
    monkeypatch.setattr(shared.engine.manager, "add_request", noted)
    try:
        body = json.dumps({"prompt": "assistant" * 240}).encode()  # 240 tokens
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
        with connect(shared, head + body):
            assert begun.wait(60)
        wait_until(lambda: not shared.engine.pending)
    finally:
        left.set()
    shared.engine.tokenizing.submit(int).result()  # that thread has nothing else to do
    assert works(shared)
    assert added and max(len(tokens) for tokens, *_ in added) < 240


def test_a_hanging_forward_pass_ends_the_process(tiny_folder):
    with gated(tiny_folder, stall_timeout=0.5) as served:
        served.gate.open.clear()
        asked = [served.submit(stream=number % 2 == 1) for number in range(4)]
        wait_until(lambda: served.ended)
        assert all(future.done() for future in asked)  # the process would be gone
        assert statuses(asked) == [503] * 4  # those that wait, too
        assert served.ended == [70]


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
    """The tests around it only note that the process would have ended."""
    (tmp_path / "sitecustomize.py").write_text(HANGS)  # Python runs it at its start
    hang = tmp_path / "hang"
    environment = {"PYTHONPATH": str(tmp_path), "HANG": str(hang)}
    options = ("--model", str(tiny_folder), "--device", "cpu", "--stall-timeout", "1")
    with spawned(*options, **environment) as process, ThreadPoolExecutor(4) as clients:

        def ask(stream):
            body = {"prompt": "x", "max_new_tokens": 3, "stream": stream}
            return requests.post(process.url, json=body, timeout=60).status_code

        assert ask(False) == 200
        hang.touch()
        assert list(clients.map(ask, [False, True] * 2)) == [503] * 4
        assert process.wait(60) == 70
        assert "--stall-timeout" in process.log()
        assert "Traceback" not in process.log()


LINGERS = """
import threading
threading.Thread(target=threading.Event().wait).start()
"""


def test_leaving_does_not_wait_for_a_thread_that_hangs(tiny_folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LINGERS)
    options = ("--model", str(tiny_folder), "--device", "cpu")
    with spawned(*options, PYTHONPATH=str(tmp_path)) as process:
        process.terminate()
        assert process.wait(60) == 0


def test_a_hang_is_noticed_when_its_clients_have_given_up(tiny_folder):
    """And /health says so: the next client would only wait."""
    with gated(tiny_folder, stall_timeout=0.5) as served:
        served.gate.open.clear()
        with contextlib.suppress(requests.Timeout):
            requests.post(served.url, json={"prompt": "x"}, timeout=0.2)
        wait_until(lambda: not served.engine.pending)
        wait_until(lambda: served.ended, 15)
        assert served.ended == [70]


def test_an_idle_server_is_not_taken_for_a_hanging_one(tiny_folder):
    with gated(tiny_folder, stall_timeout=0.2) as served:
        passes = served.gate.passes
        time.sleep(0.5)  # longer than the limit
        assert served.gate.passes == passes
        assert not served.ended
        assert works(served)


def test_an_engine_that_cannot_be_restarted_ends_the_process(tiny_folder, monkeypatch):
    """What an unusable CUDA context does: it raises wherever the GPU is touched."""
    with gated(tiny_folder) as served:

        def unusable():
            raise RuntimeError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(served.engine.manager, "start", unusable)
        served.gate.faults.append(RuntimeError("CUDA error: device-side assert"))
        assert served.post().status_code == 503
        wait_until(lambda: served.ended)
        assert served.ended == [70]
