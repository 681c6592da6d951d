# SPDX-License-Identifier: MIT
"""Report what sampled requests cost the greedy ones in the same batch.

    python tests/measure/sampling_cost.py                 a tiny model with phi-4's vocabulary
    python tests/measure/sampling_cost.py --model FOLDER [--device cuda] [--requests 32]

Half of the requests are greedy and are timed; the other half is greedy, too, or draws
its tokens. All answers have the same length, and only the steps count in which all of
them grow. The kinds take turns and the fastest turn of each counts, so that other load
on the machine matters little.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import _setup  # noqa: F401
import benchmark
import tiny
import torch

NEIGHBOURS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top_k 40": {"temperature": 1.0, "top_k": 40},
    "temperature 1, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
}


async def step_seconds(
    port: int, prompts: list[str], tokens: int, sampling: dict[str, Any]
) -> float:
    """Median time between tokens of greedy requests beside as many of another kind."""

    async def ask(number: int) -> benchmark.Answer:
        async with benchmark.Connection(port) as connection:
            more = sampling if number % 2 else {}
            return await benchmark.ask_server(
                connection, prompts[number], tokens, **more
            )

    answers = await asyncio.gather(*map(ask, range(len(prompts))))
    begun = max(answer.arrivals[0] for answer in answers)
    over = min(answer.arrivals[-1] for answer in answers)
    return median(gap for answer in answers[::2] for gap in answer.gaps(begun, over))


async def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step with each kind of neighbours."""
    make = benchmark.prompt_maker(folder)
    command = ["endless", "--model", str(folder), "--device", options.device]
    command += ["--max-in-flight", str(options.requests)]
    way = benchmark.Way(
        "the server", command, benchmark.ask_server, [], options.threads
    )
    steps: dict[str, list[float]] = {name: [] for name in NEIGHBOURS}
    async with way.running():
        for _ in range(options.repeat + 1):  # the first one warms up
            for name, sampling in NEIGHBOURS.items():
                prompts = [make(32) for _ in range(options.requests)]
                steps[name].append(
                    await step_seconds(way.port, prompts, options.new_tokens, sampling)
                )
    return {name: min(found[1:]) for name, found in steps.items()}


def sort_seconds(rows: int, size: int, device: str) -> float:
    """What the naive way would cost alone: every row sorted as a whole."""
    scores, times = torch.randn(rows, size, device=device), []
    for _ in range(10):
        started = time.perf_counter()
        scores.sort(descending=True)[0][0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="default: tiny, random")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--requests", type=int, default=16, help="default: 16")
    parser.add_argument("--new-tokens", type=int, default=32, help="default: 32")
    parser.add_argument("--repeat", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch)
        if not options.model:
            tiny.tiny_model(folder, "phi4", context=2048, eos="never")
        steps = asyncio.run(measure(folder, options))
        size = json.loads((folder / "config.json").read_bytes())["vocab_size"]
    half = options.requests // 2
    print(f"a step of {half} greedy requests beside {half} more:")
    for name, seconds in steps.items():
        extra = seconds - steps["greedy"]
        print(f"{name:28} {1000 * seconds:8.2f} ms {1000 * extra:+8.2f} ms")
    naive = sort_seconds(half, size, options.device)
    print(f"{f'a full sort of {half} rows':28} {1000 * naive:20.2f} ms")


if __name__ == "__main__":
    main()
