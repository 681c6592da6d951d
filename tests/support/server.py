# SPDX-License-Identifier: MIT
"""The server, in a thread of this process or as its users start it. What tests need to
know of the inside of the engine and of the library stands here and nowhere else."""

import asyncio
import contextlib
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import overlap
import preloaded
import requests
import uvicorn
from net import DEADLINE, free_port

import api
import py_api

ROOT = Path(__file__).resolve().parents[2]
# 240 tokens of the tiny model.
LONG_PROMPT = "assistant" * 240


def wait_until(condition: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """The condition's first true value; fails the test if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not true within {seconds} s: {condition}")


def is_ready(url: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(url + "/health", timeout=DEADLINE).ok
    return False


def begin(
    url: str, tokens: int, session: Any = requests
) -> tuple[bytes, Iterator[bytes]]:
    """The first piece of a stream, which has come, and the others."""
    body = {"prompt": "x", "max_new_tokens": tokens, "stream": True}
    answer = session.post(url, json=body, stream=True, timeout=2 * DEADLINE)
    pieces = answer.iter_content(None)
    return next(pieces), pieces


class Gate:
    """Stands before each forward pass of a server's model; open at first and at the
    end of its `with`."""

    def __init__(self, model: Any) -> None:
        self.changed, self.left = threading.Condition(), math.inf
        self.error: BaseException | None = None
        self.held = False  # a pass waits to be let through
        self.tokens: list[int] = []  # of each pass that was
        model.register_forward_pre_hook(self.wait, with_kwargs=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.allow()

    def allow(self, passes: float = math.inf) -> None:
        """Let this many more forward passes through."""
        with self.changed:
            # One more where an answer's token is read while the next step runs.
            self.left = passes + (overlap.WANTED and passes > 0)
            self.held = self.held and not passes
            self.changed.notify_all()

    def close(self) -> None:
        self.allow(0)

    def fail(self, error: BaseException | None = None) -> None:
        """Let the next forward pass raise, which ends the generation thread; the gate
        is open then."""
        with self.changed:
            self.error = error or RuntimeError("injected")
            self.changed.notify_all()

    def wait(self, _: Any, __: Any, options: dict[str, Any]) -> None:
        with self.changed:
            self.held = self.left <= 0
            self.changed.wait_for(lambda: self.left > 0 or self.error)
            self.held = False
            if self.error:
                error, self.error, self.left = self.error, None, math.inf
                raise error
            self.left -= 1
            self.tokens.append(options["input_ids"].shape[1])


@dataclass
class Running:
    """A server in a thread of this process, over real sockets."""

    url: str
    engine: api.Engine
    loop: asyncio.AbstractEventLoop
    ended: list[int]  # exit codes the engine wanted to end the process with
    clients: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32))

    def post(
        self, prompt: str = "hello", path: str = "/", **body: Any
    ) -> requests.Response:
        return self._ask(prompt, path, body, False)

    def stream(
        self, prompt: str = "hello", path: str = "/", **body: Any
    ) -> requests.Response:
        """A response whose body has yet to come; see `net.events`."""
        return self._ask(prompt, path, body | {"stream": True}, True)

    def _ask(self, prompt: str, path: str, body: Any, late: bool) -> requests.Response:
        turn = {"role": "user", "content": prompt}
        asked = {"prompt": prompt} if path == "/" else {"messages": [turn]}
        url, limit = self.url + path, DEADLINE
        return requests.post(url, json=asked | body, timeout=limit, stream=late)

    def submit(self, *args: Any, **body: Any) -> "Future[requests.Response]":
        """The same as `post`, without waiting for the answer."""
        return self.clients.submit(self.post, *args, **body)

    def answer(self, prompt: str = "hello", **body: Any) -> str:
        response = self.post(prompt, **body)
        assert response.status_code == 200, response.text
        return response.json()["response"]

    def call(self, work: Any) -> Any:
        """The result of a coroutine run on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE)

    def wait_ready(self) -> None:
        wait_until(lambda: is_ready(self.url))

    def works(self) -> bool:
        """Whether four requests at once succeed and leave nothing behind."""
        self.wait_ready()
        asked = [self.submit("again", max_new_tokens=3) for _ in range(4)]
        good = [each.result().status_code for each in asked] == [200] * 4
        wait_until(self.idle)
        return good and not self.ended

    # The inside of the engine

    @property
    def manager(self) -> Any:
        """The library's."""
        return self.engine.manager

    @property
    def model(self) -> Any:
        return self.manager.model

    @property
    def generation_config(self) -> Any:
        return self.manager.generation_config

    @property
    def token_budget(self) -> int:
        """Of a step with 60 requests, whose prompts have a token each."""
        one = SimpleNamespace(status=None, remaining_prefill_tokens=[1])
        return self.manager.batch_processor.scheduler.shared_budget([one] * 60)

    @cached_property
    def gate(self) -> Gate:
        return Gate(self.model)

    @property
    def pending(self) -> list[str]:
        """The requests that were admitted and have not ended, as they came."""
        return [*self.engine.admitted]

    def wait_pending(self, count: int) -> None:
        wait_until(lambda: len(self.pending) == count)

    @property
    def active(self) -> dict[str, Any]:
        """The library's states of the requests that have begun, by name."""
        return dict(self.manager.batch_processor.scheduler.active_requests)

    @property
    def scheduled(self) -> dict[str, Any]:
        """The same with those that wait."""
        scheduler = self.manager.batch_processor.scheduler
        return {**scheduler.active_requests, **scheduler.waiting_requests}

    def idle(self) -> bool:
        """Nothing in flight, nothing cached for a request, no output unread."""
        unread = self.manager.output_router.output_queue.queue
        return not any((self.scheduled, unread, self.pending))

    @property
    def preempted(self) -> bool:
        """Whether a request was thrown out of the cache and others have to wait."""
        return self.manager.batch_processor.scheduler.block_new_requests

    @property
    def thread(self) -> threading.Thread:
        """The one that generates."""
        return self.manager._generation_thread

    def stop_thread(self) -> None:
        """Let it end without an error."""
        self.manager.background_thread_status.request_stop(2, 0)

    def free_cache(self) -> int:
        """Bytes of the cache that no request holds, shareable beginnings included."""
        cache = self.manager.batch_processor.cache
        kept = (
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in cache.cache_allocators.values()
        )
        return cache.compute_free_capacity(relative=False) + sum(kept)

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizers[0][1]

    def token_ids(self, body: Any, protected: bool = True) -> list[int]:
        """Of a request's conversation: the engine's, or those of the library alone."""
        if protected:
            return self.engine.apply_template(self.tokenizer, body.turns())
        messages = [turn.model_dump() for turn in body.turns()]
        template = self.tokenizer.apply_chat_template
        return template(messages, add_generation_prompt=True)["input_ids"]

    def in_tokenizer_thread(self, work: Callable[[], Any]) -> "Future[Any]":
        """Work before which, and after which, the thread that tokenises conversations
        which are not long tokenises none."""
        return self.engine.tokenizers[0][0].submit(work)

    def replace(self, patch: Any, name: str, new: Any) -> Any:
        """Put a function in the place of the engine's or the library's of this name.
        Returns what was there."""
        owners = {
            "apply_template": self.engine,
            "release": self.engine,
            "deliver_batch": self.manager.output_router,
            "offload_requests": self.manager.batch_processor.offloading_manager,
        }
        owner = owners.get(name, self.manager)
        old = getattr(owner, name)
        patch.setattr(owner, name, new)
        return old

    def spy(self, patch: Any, name: str) -> list[tuple[tuple, Any]]:
        """The calls of such a function as they are made: arguments and result."""
        calls: list[tuple[tuple, Any]] = []

        def spied(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            calls.append((args, result))
            return result

        function = self.replace(patch, name, spied)
        return calls


@contextlib.contextmanager
def running(wait: bool = True, **options: Any) -> Iterator[Running]:
    """`create_app` behind uvicorn in a thread. Options are those of Settings."""
    with overlap.overlapped(overlap.WANTED):
        yield from serving(wait, options)


def narrow(folder: Path, **options: Any) -> Any:
    """A server that has two places, where two more may wait."""
    places = {"max_in_flight": 2, "max_waiting": 2}
    return running(model=folder, **places | options)


def serving(wait: bool, options: dict[str, Any]) -> Iterator[Running]:
    settings = api.Settings(**({"device": "cpu", "dtype": "float32"} | options))
    app = api.create_app(settings)
    engine = app.state.engine
    ended: list[int] = []
    engine.exit = ended.append  # the real one would end the tests
    port = free_port()
    as_main = {"http": py_api.Protocol, "ws": "none", "log_config": None}
    as_main |= {
        "root_path": settings.root_path,
        "timeout_keep_alive": py_api.CLIENT_SECONDS,
    }
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, **as_main))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        wait_until(lambda: server.started)
        served = Running(f"http://127.0.0.1:{port}", engine, loops[0], ended)
        if wait:
            wait_until(lambda: ended or is_ready(served.url))
        with served.clients:
            try:
                yield served
            finally:
                if served.manager:
                    served.gate.allow()
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
    assert not thread.is_alive()


@contextlib.contextmanager
def spawned(
    *arguments: str, wait: bool = True, launcher: tuple = (), **environment: str
) -> Iterator[Any]:
    """`python LAUNCHER api.py ARGUMENTS` as a user starts it; has `.url`, `.log()`."""

    def start(command: list[str], log: Any) -> Any:
        return subprocess.Popen(
            [sys.executable, *launcher, *command],
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            cwd=ROOT,
        )

    yield from started(start, arguments, wait)


@contextlib.contextmanager
def forked(*arguments: str, wait: bool = True, **environment: str) -> Iterator[Any]:
    """The same in a fraction of the time, for tests of what a process does once it has
    loaded its libraries: see preloaded.py."""

    def start(command: list[str], log: Any) -> Any:
        number = log.fileno()
        return preloaded.start(command, number, number, os.environ | environment)

    yield from started(start, arguments, wait)


def started(start: Callable, arguments: tuple[str, ...], wait: bool) -> Iterator[Any]:
    port = free_port()
    log = ROOT / "tests" / f".spawned-{port}.log"
    with log.open("w") as output:
        own = str(ROOT / "api.py"), "--port", str(port)
        process = start([*own, *arguments], output)
    process.url = f"http://127.0.0.1:{port}"
    process.port = port
    process.log = log.read_text

    def ready() -> bool:
        assert process.poll() is None, process.log()
        return is_ready(process.url)

    try:
        if wait:
            wait_until(ready, 120)
        yield process
    finally:
        process.kill()
        process.wait()
        log.unlink()


def ended(command: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    """What such a process, which ends by itself, has printed, and its exit code; the
    command is as `preloaded.start` has it."""
    with preloaded.talking(command, os.environ | environment) as process:
        output = process.communicate(DEADLINE)
        return subprocess.CompletedProcess(command, process.returncode, *output)
