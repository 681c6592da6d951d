# SPDX-License-Identifier: MIT
"""Report how long the demo's answer takes alone, and beside programs that keep the cores busy.

    python tests/measure/busy.py [--spin 300000 1000] [--loops 4]

For each value of GOMP_SPINCOUNT (300000 is OpenMP's own choice, 1000 api.py's) a server
of its own, and the median of five and of four answers.
"""

import argparse
import statistics
import subprocess
import sys
import time

import _setup  # noqa: F401
import requests
from server import spawned


def seconds(url: str) -> float:
    started = time.monotonic()
    body = {"prompt": "What is the capital of France?"}
    assert requests.post(url, json=body, timeout=600).ok
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spin", nargs="+", default=["300000", "1000"])
    parser.add_argument("--loops", type=int, default=4)
    args = parser.parse_args()
    for spin in args.spin:
        with spawned("--demo", GOMP_SPINCOUNT=spin) as server:
            seconds(server.url)
            alone = statistics.median(seconds(server.url) for _ in range(5))
            loop = [sys.executable, "-c", "while True: pass"]
            loops = [subprocess.Popen(loop) for _ in range(args.loops)]
            try:
                beside = statistics.median(seconds(server.url) for _ in range(4))
            finally:
                for each in loops:
                    each.kill()
            print(
                f"GOMP_SPINCOUNT={spin}: alone {alone:.2f} s, beside {args.loops} busy loops {beside:.2f} s"
            )


if __name__ == "__main__":
    main()
