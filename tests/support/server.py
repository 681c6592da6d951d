# SPDX-License-Identifier: MIT
"""The server: in a thread of this process, or as its users start it."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import overlap
import requests
import uvicorn
from net import DEADLINE, free_port

import api

ROOT = Path(__file__).resolve().parents[2]


def wait_until(condition: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """The condition's first true value; fails the test if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not true within {seconds} s: {condition}")


@dataclass
class Running:
    """A server in a thread of this process, over real sockets."""

    url: str
    app: Any
    engine: api.Engine
    loop: asyncio.AbstractEventLoop
    ended: list[int]  # exit codes the engine wanted to end the process with

    def post(
        self, prompt: str = "hello", path: str = "/", **body: Any
    ) -> requests.Response:
        body = {"prompt": prompt, **body} if path == "/" else body
        return requests.post(self.url + path, json=body, timeout=DEADLINE)

    def call(self, work: Any) -> Any:
        """The result of a coroutine run on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE)

    def idle(self) -> bool:
        """Nothing in flight, nothing cached for a request, no output unread."""
        scheduler = self.engine.manager.batch_processor.scheduler
        unread = self.engine.manager.output_router.output_queue.queue
        left = (scheduler.active_requests, scheduler.waiting_requests, unread)
        return not any(left) and not self.engine.pending


@contextlib.contextmanager
def running(wait: bool = True, **options: Any) -> Iterator[Running]:
    """`create_app` behind uvicorn in a thread. Options are those of Settings."""
    with overlap.overlapped(overlap.WANTED):
        yield from serving(wait, options)


def serving(wait: bool, options: dict[str, Any]) -> Iterator[Running]:
    settings = api.Settings(**({"device": "cpu", "dtype": "float32"} | options))
    app = api.create_app(settings)
    engine = app.state.engine
    ended: list[int] = []
    engine.exit = ended.append  # the real one would end the tests
    port = free_port()
    as_main = {"http": "h11", "log_config": None}
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, **as_main))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        wait_until(lambda: server.started)
        served = Running(f"http://127.0.0.1:{port}", app, engine, loops[0], ended)
        if wait:
            wait_until(lambda: engine.status == "ok" or ended)
        yield served
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
    assert not thread.is_alive()


@contextlib.contextmanager
def spawned(
    *arguments: str, wait: bool = True, launcher: tuple = (), **environment: str
) -> Iterator[Any]:
    """`python LAUNCHER api.py ARGUMENTS` as a user starts it; has `.url`, `.log()`."""
    port = free_port()
    command = [sys.executable, *launcher, str(ROOT / "api.py")]
    command += ["--port", str(port), *arguments]
    log = ROOT / "tests" / f".spawned-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | environment,
            cwd=ROOT,
        )
    process.url = f"http://127.0.0.1:{port}"
    process.port = port
    process.log = log.read_text

    def ready() -> bool:
        assert process.poll() is None, process.log()
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(process.url + "/health", timeout=5).ok
        return False

    try:
        if wait:
            wait_until(ready, 120)
        yield process
    finally:
        process.kill()
        process.wait()
        log.unlink()
