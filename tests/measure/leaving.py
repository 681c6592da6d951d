# SPDX-License-Identifier: MIT
"""Report how long leaving takes, from the signal on.

    python tests/measure/leaving.py [COUNT]

Starts `python api.py` on a tiny random model COUNT (5) times for each case and prints
the median and the worst time until /health answers 503 or the process has ended.
"""

import argparse
import contextlib
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import requests
import tiny
from server import begin, spawned, wait_until

ENDLESS = 15000  # tokens; minutes


def refused(server: Any) -> bool:
    return requests.get(server.url + "/health", timeout=60).status_code == 503


def signalled(server: Any, number: int) -> float:
    server.send_signal(number)
    return time.monotonic()


def ended(server: Any, code: int) -> None:
    assert server.wait(60) == code, server.log()


def health_turns(server: Any) -> float:
    _, pieces = begin(server.url, ENDLESS)
    started = signalled(server, signal.SIGTERM)
    wait_until(lambda: refused(server))
    seconds = time.monotonic() - started
    pieces.close()  # held until here: a client that leaves is not waited for
    return seconds


def idle_ends(server: Any) -> float:
    started = signalled(server, signal.SIGTERM)
    ended(server, 0)
    return time.monotonic() - started


def second_ends(server: Any) -> float:
    _, pieces = begin(server.url, ENDLESS)
    signalled(server, signal.SIGTERM)
    wait_until(lambda: refused(server))
    started = signalled(server, signal.SIGTERM)
    ended(server, 128 + signal.SIGTERM)
    seconds = time.monotonic() - started
    pieces.close()
    return seconds


def drained_ends(server: Any) -> float:
    _, pieces = begin(server.url, ENDLESS)
    started = signalled(server, signal.SIGTERM)
    with contextlib.suppress(requests.RequestException):
        list(pieces)  # to where it is cut
    ended(server, 0)
    return time.monotonic() - started


CASES: dict[str, tuple[Callable[[Any], float], tuple[str, ...]]] = {
    "SIGTERM to /health 503, beside an answer": (health_turns, ()),
    "SIGTERM to the end, idle": (idle_ends, ()),
    "second SIGTERM to the end, beside an answer": (second_ends, ()),
    "SIGTERM to the end, --drain-timeout 1": (drained_ends, ("--drain-timeout", "1")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=5)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as scratch:
        tiny.tiny_model(Path(scratch), context=16384, eos="never")
        for name, (case, options) in CASES.items():
            arguments = ("--model", scratch, "--device", "cpu", *options)
            seconds = []
            for _ in range(count):
                with spawned(*arguments) as server:
                    seconds.append(case(server))
            middle, worst = statistics.median(seconds), max(seconds)
            print(f"{name:44} median {middle:6.3f} s, worst {worst:6.3f} s")


if __name__ == "__main__":
    main()
