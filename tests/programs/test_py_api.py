# SPDX-License-Identifier: MIT
"""The command-line client, run as a program against a stand-in server."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import api
import py_api

CLIENT = [sys.executable, py_api.__file__]
EXAMPLE = {
    "prompt": "刚才我们再聊什么？",
    "history": [
        {"role": "user", "content": "今天星期几"},
        {"role": "assistant", "content": "今天星期三"},
        {"role": "user", "content": "明天星期几？"},
        {"role": "assistant", "content": "明天是星期四。"},
    ],
}
PATIENCE = 60  # seconds, after which something hangs


class Handler(BaseHTTPRequestHandler):
    """Record the request and let the test's next reply write the response."""

    protocol_version = "HTTP/1.1"
    server: "StandIn"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, dict(self.headers), json.loads(body)))
        self.server.replies.pop(0)(self)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def start(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


class StandIn(ThreadingHTTPServer):
    """A server that gives `replies` in turn and keeps what it has `seen`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Callable[[Handler], None]] = []
        self.seen: list[tuple[str, dict[str, str], dict]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def plain(status: int, body: object) -> Callable[[Handler], None]:
    """Reply with JSON, as the server does without streaming."""

    def reply(handler: Handler) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        length = ("Content-Length", str(len(data)))
        handler.start(status, ("Content-Type", "application/json"), length)
        handler.wfile.write(data)

    return reply


def answer(text: str) -> dict[str, object]:
    return {"response": text, "history": [], "status": 200, "time": "2025-01-01"}


def events(*lines: str, size: int = 1, ended: bool = True) -> Callable:
    """Reply with Server-Sent Events, `size` bytes at a time; `ended=False`: cut."""

    def reply(handler: Handler) -> None:
        stream = ("Content-Type", "text/event-stream")
        handler.start(200, stream, ("Transfer-Encoding", "chunked"))
        data = "".join(lines).encode()
        for at in range(0, len(data), size):
            handler.chunk(data[at : at + size])
        if ended:
            handler.chunk(b"")
        else:
            handler.close_connection = True

    return reply


def data(event: object) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def spoken(*pieces: str) -> Callable[[Handler], None]:
    """Reply with a whole stream: one event a piece, then the answer."""
    return events(
        *(data({"delta": piece}) for piece in pieces), data(answer("".join(pieces)))
    )


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a user whose locale is not UTF-8, with a dead proxy."""
    base = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy"}
    for name in ("PHI4_API_KEY", "PYTHONUNBUFFERED"):
        base.pop(name, None)
    dead = dict.fromkeys(
        ("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:1"
    )
    return base | dead | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"} | more


def run(
    *arguments: str, typed: str = "", **variables: str
) -> subprocess.CompletedProcess:
    """Run the client to its end; its output is UTF-8 or this fails."""
    return subprocess.run(
        [*CLIENT, *arguments],
        input=typed,
        capture_output=True,
        encoding="utf-8",
        env=environment(**variables),
        timeout=PATIENCE,
        check=False,
    )


def failed(done: subprocess.CompletedProcess, *words: str) -> None:
    """Check that the client gave up with one line that holds `words`."""
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_example(server: StandIn) -> None:
    server.replies = [plain(200, answer("星期几。👩\u200d👧"))]
    done = run("--url", server.url)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "星期几。👩\u200d👧\n",
        "",
    )
    path, headers, body = server.seen[0]
    assert path == "/"
    assert body == EXAMPLE
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


def test_question(server: StandIn) -> None:
    server.replies = [plain(200, answer("因为"))]
    done = run("--url", server.url, "天空为什么是蓝色的？")
    assert done.stdout == "因为\n"
    assert server.seen[0][2] == {"prompt": "天空为什么是蓝色的？", "history": []}


@pytest.mark.parametrize(
    ("arguments", "variable", "sent"),
    [
        (["--key", "one"], "", "Bearer one"),
        ([], "two", "Bearer two"),
        (["--key", "one"], "two", "Bearer one"),
        ([], "two,three", None),
        (["--key", "密钥"], "", "Bearer 密钥".encode().decode("latin-1")),
    ],
)
def test_key(
    server: StandIn, arguments: list[str], variable: str, sent: str | None
) -> None:
    server.replies = [plain(200, answer("ok"))]
    assert run("--url", server.url, *arguments, PHI4_API_KEY=variable).returncode == 0
    assert server.seen[0][1].get("Authorization") == sent


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_stream_of_split_characters_and_pings(server: StandIn, line_end: str) -> None:
    # U+2028 and U+0085 end a line for str.splitlines, but not in an event stream.
    pieces = ["星期", "四\u2028", "\u0085 👩\u200d👧", "\n", ""]
    lines = [": ping\n\n", *(data({"delta": piece}) + ": ping\n\n" for piece in pieces)]
    lines.append(data(answer("".join(pieces))))
    server.replies = [events(*(line.replace("\n", line_end) for line in lines))]
    done = run("--chat", "--url", server.url, typed="明天？\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(pieces) + "\n"
    expected = {"prompt": "明天？", "history": [], "stream": True}
    assert server.seen[0][2] == expected


def test_chat_keeps_the_history_of_good_turns(server: StandIn) -> None:
    server.replies = [
        spoken("一"),
        plain(503, {"detail": "try again"}),
        events(
            data({"delta": "half"}), "event: error\n", data({"detail": "no memory"})
        ),
        spoken("二"),
    ]
    done = run("--chat", "--url", server.url, typed="a\n\nb\nc\nd")
    assert done.returncode == 0
    assert done.stdout == "一\nhalf\n二\n"
    assert done.stderr == "error: 503: try again\nerror: no memory\n"
    bodies = [body for _, _, body in server.seen]
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "一"}]
    assert [body["prompt"] for body in bodies] == ["a", "b", "c", "d"]
    assert [body["history"] for body in bodies] == [[], first, first, first]


@pytest.mark.parametrize(
    "reply",
    [
        events(data({"delta": "half"}), ended=False),
        events(data({"delta": "half"})),
        events(data({"delta": "half"}), 'data: {"response": "ha'),
        events(data({"delta": "half"}), data({"id": 1})),
        events(data({"delta": "half"}), data(1)),
    ],
    ids=["connection cut", "no last event", "last event cut", "no delta", "a number"],
)
def test_stream_that_breaks_off(server: StandIn, reply: Callable) -> None:
    server.replies = [reply]
    done = run("--chat", "--url", server.url, typed="a\n")
    assert (done.returncode, done.stdout) == (0, "half\n")
    assert done.stderr == "error: the answer broke off before its end\n"


def test_what_is_not_unicode_becomes_a_mark_and_ends_nothing(server: StandIn) -> None:
    half = 'data: {"delta": "\\ud83d"}\n\n'  # of a pair of surrogates
    server.replies = [events(half, data(answer("?"))), spoken("ok")]
    command = [*CLIENT, "--chat", "--url", server.url]
    done = subprocess.run(
        command,
        input=b"\xff\nb\n",
        capture_output=True,
        env=environment(),
        timeout=PATIENCE,
        check=False,
    )
    assert (done.stdout, done.stderr) == (b"?\nok\n", b"")
    assert [body["prompt"] for _, _, body in server.seen] == ["\ufffd", "b"]


def test_the_address_it_asks_by_default_is_the_servers() -> None:
    assert f"default: http://127.0.0.1:{api.Settings().port}/" in run("--help").stdout


def test_no_server() -> None:
    with socket.socket() as bound:  # bound but not listening: refuses connections
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        failed(run("--url", url), url, "running")
        done = run("--url", url, "--chat", typed="a\nb\n")
        assert (done.returncode, done.stderr.count("\n")) == (0, 2)


def test_bad_address() -> None:
    failed(run("--url", "localhost:6006"), "localhost:6006")


def test_error_answers(server: StandIn) -> None:
    wrong = [
        {"loc": ["body", "prompt"], "msg": "Field required", "type": "missing"},
        {"loc": ["body", "history", 0], "msg": "Bad\nrole", "type": "value_error"},
    ]
    server.replies = [
        plain(503, {"detail": "模型正在加载"}),
        plain(422, {"detail": wrong}),
        plain(502, "no detail"),
        plain(500, {"detail": {"why": 1}}),
    ]
    failed(run("--url", server.url), "503", "模型正在加载")
    failed(
        run("--url", server.url),
        "422: body.prompt: Field required; body.history.0: Bad role\n",
    )
    failed(run("--url", server.url), "502: Bad Gateway")
    failed(run("--url", server.url), "500", "why")


def test_another_server_on_the_port(server: StandIn) -> None:
    server.replies = [plain(200, {"hello": 1}), plain(200, "text")]
    failed(run("--url", server.url), "not the chat server")
    failed(run("--url", server.url), "not the chat server")


@pytest.fixture
def held(server: StandIn) -> Iterator[tuple[subprocess.Popen, threading.Event]]:
    """Yield a chat that has shown a first piece, and what lets its answer go on."""
    go_on = threading.Event()

    def reply(handler: Handler) -> None:
        stream = ("Content-Type", "text/event-stream")
        handler.start(200, stream, ("Transfer-Encoding", "chunked"))
        handler.chunk(data({"delta": "一"}).encode())
        assert go_on.wait(PATIENCE)
        handler.close_connection = True
        handler.chunk((data({"delta": "二"}) + data(answer("一二"))).encode())
        handler.chunk(b"")

    server.replies = [reply]
    # A pytest started in the background may ignore Ctrl-C, and pass that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [*CLIENT, "--chat", "--url", server.url]
    with subprocess.Popen(command, env=environment(), **pipes) as client:
        signal.signal(signal.SIGINT, before)
        watchdog = threading.Timer(PATIENCE, client.kill)
        watchdog.start()
        client.stdin.write(b"a\n")
        client.stdin.flush()
        assert client.stdout.read(3) == "一".encode()
        yield client, go_on
        go_on.set()
        watchdog.cancel()


def test_pieces_are_printed_as_they_come(held: tuple) -> None:
    client, go_on = held
    go_on.set()
    assert client.communicate() == ("二\n".encode(), b"")
    assert client.returncode == 0


def test_control_c(held: tuple) -> None:
    client, _ = held
    client.send_signal(signal.SIGINT)
    assert client.communicate() == (b"\n", b"")
    assert client.returncode == 130


def test_control_d_at_a_terminal() -> None:
    ours, theirs = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with subprocess.Popen([*CLIENT, "--chat"], env=environment(), **streams) as client:
        os.close(theirs)  # so that reading ends when the client does
        shown = b""
        with contextlib.suppress(OSError), open(ours, "r+b", buffering=0) as terminal:
            while piece := terminal.read(1):
                shown += piece
                if shown == b"> ":
                    terminal.write(b"\x04")
    assert shown.startswith(b"> ")
    assert shown.endswith(b"\r\n")
    assert client.returncode == 0


def test_reader_goes_away(held: tuple) -> None:
    client, go_on = held
    client.stdout.close()
    go_on.set()
    assert client.stderr.read() == b""
    assert client.wait() == 1
