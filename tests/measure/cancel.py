# SPDX-License-Identifier: MIT
"""Report the time until a slot is free after a client has left.

    python tests/measure/cancel.py [COUNT] [MODEL_FOLDER]

Starts the server in this process, on a tiny random model unless a folder is named,
and closes COUNT (200) sockets in the middle of an answer, every other one streamed.
Twelve other prompts are answered meanwhile and must read as they did before. Exits
with 1 if a slot was free later than one second after its socket was closed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _setup  # noqa: F401
import tiny
from clients import PROMPTS, answers, leave
from server import running, wait_until


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("folder", type=Path, nargs="?", help="default: tiny, random")
    options = parser.parse_args()
    count = options.count
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not options.folder:
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
    sys.exit(main())
