# SPDX-License-Identifier: MIT
"""Report the time until a slot is free after a client has left.

    python tests/cancel.py [COUNT] [MODEL_FOLDER]

Starts the server in this process, on a tiny random model unless a folder is named,
and closes COUNT (200) sockets in the middle of an answer, every other one streamed.
Twelve other prompts are answered meanwhile and must read as they did before. Exits
with 1 if a slot was free later than one second after its socket was closed.
"""

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import tiny
from conftest import DEADLINE, Running, running, wait_until

PROMPTS = [f"prompt {word}" for word in ["one", "two", "three", "four", "five", "six"]]
PROMPTS += [f"{word} is the answer" for word in ["a", "b", "c", "d", "e", "f"]]
LONG = 400  # tokens of an answer whose reader leaves


def connected(served: Running) -> socket.socket:
    return socket.create_connection(
        ("127.0.0.1", int(served.url.rpartition(":")[2])), DEADLINE
    )


def ask(client: socket.socket, body: str) -> None:
    """Send a request that asks to close the connection after its answer."""
    head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    client.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())


def answers(served: Running) -> list[str]:
    """The greedy answers to the twelve prompts, asked together."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = pool.map(lambda p: served.post(p, max_new_tokens=40), PROMPTS)
        return [response.json()["response"] for response in asked]


def leave(served: Running, count: int) -> list[float]:
    """Close `count` sockets in the middle of an answer, one after the other. Returns
    the seconds from each close until the engine holds nothing of that request; those
    that were generated to their end in spite of it are left out."""
    seconds = []
    for number in range(count):
        others = {*scheduled(served)}
        with connected(served) as client:
            stream = number % 2 == 1
            body = {"prompt": f"leaves {number}", "stream": stream}
            ask(client, json.dumps(body | {"max_new_tokens": LONG}))
            mine = wait_until(partial(generating, served, others))
            if stream:
                assert client.recv(12).startswith(b"HTTP/1.1 200")
        closed = time.monotonic()
        wait_until(partial(gone, served, mine))
        if len(mine.generated_tokens) < LONG:
            seconds.append(time.monotonic() - closed)
    return seconds


def scheduled(served: Running) -> dict[str, Any]:
    """What the engine's scheduler has in hand, by request id."""
    scheduler = served.engine.manager.batch_processor.scheduler
    return {**scheduler.active_requests, **scheduler.waiting_requests}


def gone(served: Running, request: Any) -> bool:
    return request.request_id not in scheduled(served)


def generating(served: Running, others: set[str]) -> Any:
    """The long request that is not among the others and has some of its tokens."""
    for name, state in list(scheduled(served).items()):
        if (
            name not in others
            and state.max_new_tokens == LONG
            and state.generated_tokens
        ):
            return state
    return None


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 2:
            folder = Path(sys.argv[2])
        else:
            folder = Path(scratch)
            tiny.tiny_model(folder, eos="never")
        with running(model=folder) as served:
            before = answers(served)
            started = time.monotonic()
            with ThreadPoolExecutor(1) as pool:
                leaving = pool.submit(leave, served, count)
                rounds = 0
                while not leaving.done():
                    assert answers(served) == before, "another answer has changed"
                    rounds += 1
                seconds = sorted(leaving.result())
            wait_until(served.idle)
            wall = time.monotonic() - started
    assert len(seconds) == count, "some were generated to their end"
    late = sum(s > 1 for s in seconds)
    print(
        f"{count} clients left in {wall:.0f} s; {rounds * len(PROMPTS)} other answers unchanged"
    )
    print(
        f"slot free after: median {statistics.median(seconds):.3f} s, "
        f"99% {seconds[int(0.99 * (count - 1))]:.3f} s, worst {seconds[-1]:.3f} s, "
        f"{late} after more than 1 s; no request and no handler left"
    )
    return 1 if late else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
