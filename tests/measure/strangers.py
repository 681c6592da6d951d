# SPDX-License-Identifier: MIT
"""Report how long /health takes while strangers attack, beside what it takes in peace.

    python tests/measure/strangers.py [--seconds 5] [--connections 4] [--only NAME]

Starts `python api.py` on a tiny model, with an API key that the strangers lack where
they need none, then lets each attack run from a process of its own. Prints the worst
and the median time of /health, the server's memory and, last, how long SIGTERM takes during the worst attack.
"""

import argparse
import contextlib
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import _setup  # noqa: F401
import psutil
import requests
import tiny
from net import port_of
from server import spawned

HEAD = "POST {} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
CHUNKED = (HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode()
KEYLESS, KEYED = "keyless", "keyed"  # whether the strangers have access


def chunked(path: str) -> bytes:
    return CHUNKED.replace(b"{}", path.encode())


def sized(path: str, body: bytes, key: str = "") -> bytes:
    head = HEAD.format(path) + f"Content-Length: {len(body)}\r\n"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    return (head + "\r\n").encode() + body


def forever(first: bytes, then: bytes) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        yield first
        while True:
            yield then

    return pieces


def keys(count: int) -> str:
    return ",".join(f'"a{i}":0' for i in range(count))


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": ""}] * count


TINY_CHUNKS = b"1\r\nx\r\n" * 40000
SMALL_GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
MANY_HEADERS = (
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a:\r\n" * 1900 + b"\r\n"
)
LINES = b"a:\r\n" * 50000
SMALL_POST = sized("/", b"{}")
NINE_HUNDRED = chunked("/") + b"1\r\nx\r\n" * 250 + b"0\r\n\r\n"
OPENAI = "/v1/chat/completions"
ATTACKS: dict[str, tuple[str, Callable[[], Iterator[bytes]]]] = {
    "tiny chunks, no key": (KEYED, forever(chunked("/"), TINY_CHUNKS)),
    "tiny chunks, allowed": (KEYLESS, forever(chunked("/"), TINY_CHUNKS)),
    "tiny chunks to /health": (KEYED, forever(chunked("/health"), TINY_CHUNKS)),
    "tiny chunks to nowhere": (KEYED, forever(chunked("/nowhere"), TINY_CHUNKS)),
    "chunks with long extensions": (
        KEYED,
        forever(chunked("/"), (b"1;" + b"x" * 900 + b"\r\nx\r\n") * 200),
    ),
    "chunked requests, 250 pieces each": (KEYED, forever(b"", NINE_HUNDRED * 20)),
    "large chunks after the 401": (
        KEYED,
        forever(chunked("/"), (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 4),
    ),
    "chunks of 300 bytes after the 401": (
        KEYED,
        forever(chunked("/"), (b"12c\r\n" + b"x" * 300 + b"\r\n") * 600),
    ),
    "endless content after the 404": (
        KEYED,
        forever(
            b"POST /x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n",
            b"x" * 200_000,
        ),
    ),
    "endless head": (KEYED, forever(b"GET / HTTP/1.1\r\nHost: a\r\n", LINES)),
    "endless trailers": (KEYED, forever(chunked("/") + b"0\r\n", LINES)),
    "1,900 headers, over and over": (KEYED, forever(b"", MANY_HEADERS)),
    "pipelined GET /health": (KEYED, forever(b"", SMALL_GET * 2000)),
    "pipelined POST": (KEYED, forever(b"", SMALL_POST * 1000)),
    "90,000 unknown fields": (
        KEYLESS,
        forever(b"", sized("/", f"{{{keys(90000)}}}".encode())),
    ),
    "90,000 unknown fields in a turn": (
        KEYLESS,
        forever(
            b"", sized("/", f'{{"prompt":"x","history":[{{{keys(90000)}}}]}}'.encode())
        ),
    ),
    "9,900 unknown fields": (
        KEYLESS,
        forever(b"", sized("/", f"{{{keys(9900)}}}".encode())),
    ),
    "26,000 turns": (
        KEYLESS,
        forever(
            b"",
            sized("/", json.dumps({"prompt": "x", "history": turns(26000)}).encode()),
        ),
    ),
    "4,900 turns": (
        KEYLESS,
        forever(
            b"",
            sized("/", json.dumps({"prompt": "x", "history": turns(4900)}).encode()),
        ),
    ),
    "260,000 lists in an ignored field": (
        KEYLESS,
        forever(
            b"", sized(OPENAI, json.dumps({"messages": 1, "x": [[]] * 260000}).encode())
        ),
    ),
    "JSON nested too deeply": (KEYLESS, forever(b"", sized("/", b"[" * 1_000_000))),
    "giants that cannot fit": (
        KEYLESS,
        forever(b"", sized("/", json.dumps({"prompt": "<|" * 500_000}).encode())),
    ),
}


def attack(port: int, name: str) -> None:
    """Send on one connection; a new one where the server closes it."""
    _, pieces = ATTACKS[name]
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port)) as c,
        ):
            c.setblocking(False)
            for piece in pieces():
                left = memoryview(piece)
                while left:
                    with contextlib.suppress(BlockingIOError):
                        while c.recv(1 << 16):
                            pass
                        break  # the server has closed
                    try:
                        count = c.send(left)
                    except BlockingIOError:
                        time.sleep(0.002)
                        continue
                    left = left[count:]
                else:
                    continue
                break


def healths(url: str, seconds: float) -> list[float]:
    """Times of /health, each on a new connection, for so long."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.monotonic()
        assert requests.get(url + "/health", timeout=120).ok
        found.append(time.monotonic() - started)
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def attacked(port: int, name: str, connections: int) -> Iterator[None]:
    processes = [
        multiprocessing.Process(target=attack, args=(port, name), daemon=True)
        for _ in range(connections)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    args = parser.parse_args()
    chosen = [name for name in ATTACKS if args.only in name]
    worst = (0.0, chosen[0])
    print(f"{'attack':36}{'worst':>9}{'median':>9}{'in peace':>9}{'MiB':>6}")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        tiny.tiny_model(model, context=2048, eos="never")
        for access in (KEYED, KEYLESS):
            options = {"PHI4_API_KEY": "right"} if access == KEYED else {}
            # With the tiny tokenizer a conversation of a megabyte may fit no context.
            arguments = ["--model", str(model), "--device", "cpu"]
            with spawned(*arguments, **options) as server:
                memory = psutil.Process(server.pid).memory_info
                healths(server.url, 1)
                for name in chosen:
                    if ATTACKS[name][0] != access:
                        continue
                    control = max(healths(server.url, 1))
                    with attacked(server.port, name, args.connections):
                        time.sleep(0.5)
                        times = healths(server.url, args.seconds)
                    worst = max(worst, (max(times), name))
                    print(
                        f"{name:36}{max(times):8.3f}s{statistics.median(times):8.3f}s"
                        f"{control:8.3f}s{memory().rss >> 20:6}",
                        flush=True,
                    )
                name = worst[1] if ATTACKS[worst[1]][0] == access else ""
                if name:
                    with attacked(port_of(server.url), name, args.connections):
                        time.sleep(1)
                        started = time.monotonic()
                        server.terminate()
                        code = server.wait(60)
                    seconds = time.monotonic() - started
                    print(f"SIGTERM during {name}: exit {code} after {seconds:.1f} s")


if __name__ == "__main__":
    main()
