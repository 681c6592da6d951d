# SPDX-License-Identifier: MIT
"""HTTP by hand, for clients that no library would be: free ports, raw requests and
responses, server-sent events. Needs the standard library only."""

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Seconds; ten times what the slowest condition takes on two cores.
DEADLINE = float(os.environ.get("TEST_DEADLINE", "60"))


def free_port() -> int:
    """One below those that any program is given when it asks for none in particular:
    torchrun and gloo ask for several before the server listens. Processes that run
    tests at once have no port in common: that of two is even, or odd."""
    ours = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    of = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(20000 + ours, 32000, of)
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", random.choice(ports)))
            return probe.getsockname()[1]


# ------------------------------------------------------------------------------
# Requests and responses
# ------------------------------------------------------------------------------


def packet(
    path: str = "/", body: Any = b"", method: str = "POST", *headers: str
) -> bytes:
    """A whole request that asks the server to close the connection afterwards. The
    body is bytes as they are, or anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
    head += headers
    if not any(line.startswith("Transfer-Encoding") for line in headers):
        head.append(f"Content-Length: {len(data)}")
    head.append("Content-Type: application/json")
    return "\r\n".join([*head, "", ""]).encode() + data


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].strip("/"))


def connect(url: str, data: bytes = b"", buffer: int = 0) -> socket.socket:
    """A connection to a server, with these bytes sent; perhaps a small receive buffer."""
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(DEADLINE)
    connection.connect(("127.0.0.1", port_of(url)))
    connection.sendall(data)
    return connection


def rest(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def exchanged(url: str, data: bytes) -> bytes:
    """What comes back for raw bytes until the server closes."""
    with connect(url, data) as connection:
        return rest(connection)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


async def exchange(port: int, data: bytes, events: int | None = None) -> Reply:
    """Send bytes and read the answer, or leave after so many events of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
                if events is not None and body.count(b"\n\n") >= events:
                    break
        else:
            body = await reader.read()
        return Reply(int(head[0].split()[1]), headers, body)
    finally:
        writer.transport.abort()


# ------------------------------------------------------------------------------
# Server-sent events
# ------------------------------------------------------------------------------


def events(source: Any) -> Iterator[tuple[str, str]]:
    """The (event, data) of a stream, comments as ("", text): of a response that
    `requests` streams, as they come, or of bytes. An event without an end is none."""
    whole = isinstance(source, bytes)
    lines = source.splitlines() if whole else source.iter_lines(chunk_size=1)
    event, data = "message", []
    for line in lines:
        name, _, value = line.decode().partition(": ")
        if not line:
            if data:
                yield event, "\n".join(data)
            event, data = "message", []
        elif not name or name.startswith(":"):
            yield "", line.decode()
        elif name == "event":
            event = value
        elif name == "data":
            data.append(value)


END = {"finish_reason", "prompt_tokens", "completion_tokens", "total_tokens"}


def told(source: Any) -> tuple[list[str], dict[str, Any]]:
    """The deltas and the answer of a stream of `POST /` that is as it should be."""
    deltas, answer, _ = told_with_end(source)
    return deltas, answer


def told_with_end(source: Any) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The same, and the event that ends the stream."""
    found = [(event, json.loads(data)) for event, data in events(source) if event]
    *names, last = [event for event, _ in found]
    assert last == "end" and {*names} == {"message"}, found
    *deltas, answer, end = [item for _, item in found]
    assert all(set(item) == {"delta"} for item in deltas), found
    assert set(end) == END, end
    assert end["total_tokens"] == end["prompt_tokens"] + end["completion_tokens"], end
    return [item["delta"] for item in deltas], answer, end
