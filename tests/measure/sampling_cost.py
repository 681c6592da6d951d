# SPDX-License-Identifier: MIT
"""Report what requests that choose their tokens in another way cost those beside them.

    python tests/measure/sampling_cost.py                 a tiny model with phi-4's vocabulary
    python tests/measure/sampling_cost.py --model FOLDER [--device cuda] [--requests 32]
        [--others 1 16 32]

Of so many requests, `--others` draw their tokens, follow a grammar or have penalties;
the rest is greedy and is timed (all are, where there is no rest). All answers have the
same length, and only the steps count in which all of them grow. The kinds take turns
and the fastest turn of each counts, so that other load on the machine matters little.
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

ENDLESS = {"type": "array", "items": {"type": "string"}, "minItems": 100_000}
CALL = {"name": "call", "parameters": {"type": "object", "properties": {"a": ENDLESS}}}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top_k 40": {"temperature": 1.0, "top_k": 40},
    "temperature 1, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "frequency_penalty 0.5": {"frequency_penalty": 0.5},
    "JSON schema": {
        "response_format": {"type": "json_schema", "json_schema": {"schema": ENDLESS}}
    },
    "tools, free text": {"tools": [{"type": "function", "function": CALL}]},
}


async def step_seconds(
    port: int, prompts: list[str], tokens: int, kind: dict[str, Any], others: int
) -> float:
    """Median time between tokens of the first requests beside `others` of that kind."""

    async def ask(number: int) -> benchmark.Answer:
        async with benchmark.Connection(port) as connection:
            more = kind if number >= len(prompts) - others else {}
            return await benchmark.ask_server(
                connection, prompts[number], tokens, **more
            )

    answers = await asyncio.gather(*map(ask, range(len(prompts))))
    begun = max(answer.arrivals[0] for answer in answers)
    over = min(answer.arrivals[-1] for answer in answers)
    timed = answers[: len(answers) - others] or answers
    return median(gap for answer in timed for gap in answer.gaps(begun, over))


async def measure(
    folder: Path, options: argparse.Namespace
) -> dict[tuple[str, int], float]:
    """Seconds of a step, by the kind and the number of the others."""
    make = benchmark.prompt_maker(folder)
    command = ["endless", "--model", str(folder), "--device", options.device]
    command += ["--max-in-flight", str(options.requests)]
    way = benchmark.Way(
        "the server", command, benchmark.ask_server, [], options.threads
    )
    cases = [(kind, others) for kind in options.kinds for others in options.others]
    steps: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    async with way.running():
        for _ in range(options.repeat + 1):  # the first one warms up
            for case, found in steps.items():
                prompts = [make(32) for _ in range(options.requests)]
                kind, others = case
                asked = way.port, prompts, options.new_tokens, KINDS[kind], others
                found.append(await step_seconds(*asked))
    return {case: min(found[1:]) for case, found in steps.items()}


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
    parser.add_argument("--others", type=int, nargs="+", help="default: half")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--new-tokens", type=int, default=32, help="default: 32")
    parser.add_argument("--repeat", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    options = parser.parse_args()
    half = options.requests // 2
    options.others = options.others or [half]
    options.kinds = ["greedy", *(kind for kind in options.kinds if kind != "greedy")]
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch)
        if not options.model:
            tiny.tiny_model(folder, "phi4", context=2048, eos="never")
        steps = asyncio.run(measure(folder, options))
        size = json.loads((folder / "config.json").read_bytes())["vocab_size"]
    for others in options.others:
        print(f"a step of {options.requests} requests, of which {others} are")
        base = steps["greedy", others]
        for kind in options.kinds:
            seconds = steps[kind, others]
            share = 100 * (seconds / base - 1)
            print(f"  {kind:28} {1000 * seconds:8.2f} ms {share:+7.1f} %")
    naive = sort_seconds(half, size, options.device)
    print(f"{f'a full sort of {half} rows':30} {1000 * naive:8.2f} ms")


if __name__ == "__main__":
    main()
