# SPDX-License-Identifier: MIT
"""Fixtures: tiny models, the server in this process, the server as its users start it."""

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

import pytest
import requests
import uvicorn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import overlap
import scripted
import tiny
from benchmark import free_port

import api
import model_download

# Seconds; ten times what the slowest condition takes on two cores.
DEADLINE = float(os.environ.get("TEST_DEADLINE", "60"))


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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level vocabulary of 290 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.tiny_model(folder, context=512, eos="never")
    return folder


@pytest.fixture(scope="session")
def phi4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with phi-4's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "phi-4"
    tiny.tiny_model(folder, "phi4", hidden=32, context=2048, eos="never")
    return folder


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model, converted at most once per checkout."""
    return model_download.demo_model(ROOT / "models")


@pytest.fixture(scope="session")
def counting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that a test can let say what it wants: see scripted.py."""
    folder = tmp_path_factory.mktemp("models") / "counting"
    scripted.counting_model(folder)
    return folder


@pytest.fixture(scope="session")
def server(tiny_folder: Path) -> Iterator[Running]:
    """A server of the tiny model that tests share and leave as they found it."""
    with running(model=tiny_folder) as served:
        yield served


@pytest.fixture(scope="session")
def phi4_server(phi4_folder: Path) -> Iterator[Running]:
    with running(model=phi4_folder) as served:
        yield served
