# SPDX-License-Identifier: MIT
"""Processes that start in a second. To load the libraries takes several seconds of a
processor, so one process does that once, and each that a test starts is its fork: with an
environment, arguments, standard streams, signals and an exit code of its own, and with
this project's files read anew. What Python and the libraries do at their start is not in
it: tests of that start an ordinary process, as `server.spawned` does."""

import ast
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
OWN = "api", "py_api", "model_download"
# What the server's libraries load only when it is used.
LATE = (
    "concurrent.futures.thread",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.phi3.modeling_phi3",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
)

WIDTH = 10  # characters of a number that a minder tells


class Process:
    """As much of subprocess.Popen as tests use."""

    def __init__(self, command: list[str], pid: int, status: int) -> None:
        self.args, self.pid, self.status = command, pid, status
        self.returncode: int | None = None
        self.output: list[IO[str]] = []

    def communicate(self, timeout: float) -> tuple[str, ...]:
        """Of one of `talking`."""
        self.wait(timeout)
        for file in self.output:
            file.seek(0)
        return tuple(file.read() for file in self.output)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            told = os.read(self.status, WIDTH)
            os.close(self.status)
            self.returncode = os.waitstatus_to_exitcode(int(told))
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def preloaded(libraries: tuple[str, ...]) -> socket.socket:
    """The socket of this process's process with these modules, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        number = theirs.fileno()
        command = [sys.executable, __file__, str(number), *libraries]
        # It is not waited for: it ends when this process does.
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=null, pass_fds=[number], cwd=ROOT)
    process.returncode = 0
    atexit.register(ours.close)
    return ours


def start(
    command: list[str],
    stdout: int,
    stderr: int,
    environment: dict[str, str],
    *,
    folder: Path = ROOT,
    libraries: tuple[str, ...] = (),
    strict: bool = False,
) -> Process:
    """A process of `FILE ARGUMENTS`, or of `-m MODULE ARGUMENTS`. Without `libraries` it
    has what the server imports; a strict one takes warnings for errors."""
    status, theirs = os.pipe()
    order = {"command": command, "folder": str(folder), "environment": environment}
    order["strict"] = strict
    orders = preloaded(libraries or of_the_server())
    socket.send_fds(orders, [json.dumps(order).encode()], [stdout, stderr, theirs])
    os.close(theirs)
    told = os.read(status, WIDTH)
    assert told, "the process with the libraries has ended"
    return Process(command, int(told), status)


@contextlib.contextmanager
def talking(
    command: list[str], environment: dict[str, str], **more: Any
) -> Iterator[Process]:
    """One that `communicate` is for; it does not outlive the `with`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(command, out.fileno(), err.fileno(), environment, **more)
        process.output = [out, err]
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@functools.cache
def of_the_server() -> tuple[str, ...]:
    """What this project's files import, and no file of the project."""
    names: list[str] = []
    for own in OWN:
        for node in ast.walk(ast.parse((ROOT / f"{own}.py").read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # What is imported of a package may be a module.
                names += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return *(name for name in names if name.partition(".")[0] not in OWN), *LATE


# ------------------------------------------------------------------------------
# In the process with the libraries
# ------------------------------------------------------------------------------


def attend(orders: socket.socket, libraries: list[str]) -> NoReturn:
    for name in libraries:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not {*OWN} & {*sys.modules}
    gc.collect()
    gc.freeze()  # what is there by now stays where it is, in memory that all share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how the minders ended
    while True:
        told, given, *_ = socket.recv_fds(orders, 1 << 20, 3)
        if not told:  # whoever orders has ended
            os._exit(0)
        if not os.fork():
            orders.close()
            mind(json.loads(told), *given)
        for each in given:
            os.close(each)


def mind(order: dict[str, Any], stdout: int, stderr: int, status: int) -> NoReturn:
    """Start one, and tell its number and how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        os.close(status)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
        become(**order)
    os.close(stdout)
    os.close(stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which all get
    os.write(status, b"%*d" % (WIDTH, pid))
    ended = os.waitpid(pid, 0)[1]
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%*d" % (WIDTH, ended))
    os._exit(0)


def become(
    command: list[str], folder: str, environment: dict[str, str], strict: bool
) -> NoReturn:
    """What `python COMMAND` does once it has loaded the libraries."""
    os.chdir(folder)
    if strict:
        warnings.simplefilter("error")
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.environ.clear()
    os.environ.update(environment)
    code: Any = 0
    try:
        if command[0] == "-m":
            sys.argv, sys.path[0] = command[1:], os.getcwd()
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 as Python does at its end
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    attend(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
