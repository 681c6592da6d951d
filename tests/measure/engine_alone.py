# SPDX-License-Identifier: MIT
"""Measure the engine without HTTP: prefill, long prompts, the first of a length.

    python tests/measure/engine_alone.py --random /data/random-phi-4      on a GPU
    python tests/measure/engine_alone.py --model FOLDER --longest 500     anything smaller

What `tests/results/speed.md` calls "engine". Prompts are random token ids, so that no prefix
cache knows them; end tokens do not end an answer. Times are from handing a prompt to
the engine until its token has come back, in the generation thread.
"""

import argparse
import random
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import _setup  # noqa: F401
import benchmark
import torch

import api

SEED = 11
FAR = 8000  # tokens of the long prompts on phi-4


class Driven:
    """An engine of the server, without its event loop."""

    def __init__(self, settings: api.Settings) -> None:
        self.engine, self.number, self.failed = api.Engine(settings), 0, ""
        self.engine.load()
        self.manager, self.changed = self.engine.manager, threading.Condition()
        self.times: dict[str, list[float]] = {}
        self.manager.output_router.deliver_batch = self.receive
        self.manager.output_router.deliver = lambda output: self.receive([output])
        self.manager.start()

    def receive(self, outputs: list[Any]) -> None:
        now = time.perf_counter()
        with self.changed:
            for output in outputs:
                self.failed = self.failed or output.error
                self.times[output.request_id].append(now)
            self.changed.notify()

    def wave(self, requests: int, length: int, new: int) -> tuple[float, float]:
        """Seconds until the first token and until the last, of requests at once."""
        highest = len(self.engine.token_bytes)
        names = [str(self.number + n) for n in range(requests)]
        self.number += requests
        prompts = [torch.randint(highest, (length,)).tolist() for _ in names]
        self.times = {name: [] for name in names}
        started = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            self.manager.add_request(prompt, name, new, True, eos_token_id=[-1])
        with self.changed:
            self.changed.wait_for(
                lambda: (
                    self.failed
                    or all(len(times) >= new for times in self.times.values())
                )
            )
        if self.failed:
            raise SystemExit(f"the engine failed: {self.failed}")
        first = min(times[0] for times in self.times.values())
        last = max(times[-1] for times in self.times.values())
        return first - started, last - started

    def first_token(self, length: int, rest: float = 0.1) -> float:
        """Milliseconds; `rest` seconds before it nothing runs."""
        time.sleep(rest)
        return self.wave(1, length, 1)[0] * 1000


def shown(values: list[float], digits: int = 1) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def firsts(engine: Driven, longest: int, count: int) -> list[tuple[float, int]]:
    """First request of a length in parts of the best of three later ones, for lengths
    that are spread evenly over their logarithms; with the length, worst first."""
    generator, found = random.Random(SEED), []
    for _ in range(count):
        length = round(20 * (longest / 20) ** generator.random())
        first = engine.first_token(length)
        later = min(engine.first_token(length) for _ in range(3))
        found.append((first / later, length))
    return sorted(found, reverse=True)


def report(engine: Driven, options: argparse.Namespace) -> None:
    longest = options.longest
    engine.wave(min(8, options.most), min(256, longest), 32)  # warm up
    short = min(256, longest)
    rested = [engine.first_token(short) for _ in range(6)]
    print(f"{short} tokens alone, first token ms: {shown(rested)}")
    busy = [engine.first_token(short, 0) for _ in range(6)]
    print(f"the same back to back: {shown(busy)}")
    far = [engine.first_token(longest) for _ in range(6)]
    print(f"{longest} tokens alone, first token ms: {shown(far)}")
    for requests, length in ((options.most, short), (options.most // 4, longest // 4)):
        rates = [
            requests * length / engine.wave(requests, length, 1)[1] for _ in range(4)
        ]
        print(f"prefill, {requests} x {length}, tokens/s: {shown(rates, 0)}")
    for _ in range(2):
        first, last = engine.wave(1, longest, options.new_tokens)
        whole = options.new_tokens / last
        after = (options.new_tokens - 1) / (last - first)
        print(f"{longest} tokens before: {whole:.1f} tokens/s, decoding {after:.1f}")
    worst = ", ".join(
        f"{ratio:.2f} ({length} tokens)"
        for ratio, length in firsts(engine, longest, options.lengths)[:5]
    )
    print(f"first of a length / later, the worst of {options.lengths}: {worst}")
    for requests in (n for n in (1, 8, 32, 64, 128) if n <= options.most):
        new = options.new_tokens // 2
        rates = [requests * new / engine.wave(requests, short, new)[1] for _ in "1234"]
        print(f"{requests} in flight: {median(rates):.1f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the engine without HTTP.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder of a model")
    which.add_argument("--random", type=Path, help="phi-4's shape, made here")
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--longest", type=int, default=FAR, help=f"prompt; default: {FAR}")
    add("--most", type=int, default=128, help="requests at once; default: 128")
    add("--new-tokens", type=int, default=256, help="on the long prompt; default: 256")
    add("--lengths", type=int, default=20, help="to ask for the first time")
    options = parser.parse_args()
    if options.random:
        benchmark.make_random(options.random)
    folder = options.random or options.model
    settings = api.Settings(
        model=folder, device=options.device, max_in_flight=options.most
    )
    engine = Driven(settings)
    report(engine, options)
    engine.manager.stop(block=True, timeout=30)


if __name__ == "__main__":
    main()
