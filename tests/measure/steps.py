# SPDX-License-Identifier: MIT
"""A log of every step of the generation thread, for benchmark.py --steps FILE.

    python tests/measure/steps.py FILE          a table: where the time of the steps goes

Each line of FILE is JSON: when the step began, rows, prompts (rows with more than one new
token), tokens, also with padding, the longest query, requests that wait, all keys and the
longest row's, and seconds: of the GPU, and of the host to prepare, to launch and to
update (which waits for the step before).
"""

import json
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

Step = dict[str, Any]


def log_steps(target: Path) -> None:
    """Patch the library, so that the log is written when the server ends."""
    import torch
    import uvicorn
    from transformers.generation import continuous_batching as batching

    steps: list[Step] = []
    cuda = torch.cuda.is_available()
    processor = batching.continuous_api.ContinuousBatchProcessor
    prepare, step, update = (
        getattr(processor, name)
        for name in ("prepare_next_batch", "_generation_step", "update_batch")
    )

    def timed_prepare(self: Any) -> bool:
        self.began = time.perf_counter()
        return prepare(self)

    def timed_step(self: Any, model: Any) -> None:
        ios, launched = self.inputs_and_outputs, time.perf_counter()
        host = ios.io_pairs[ios.current_pair].host_io if cuda else ios
        lengths = [each.query_length for each in host.requests_in_batch]
        waiting = len(self.scheduler.waiting_requests)
        entry: Step = {"began": self.began, "prepare": launched - self.began}
        entry |= {"rows": len(lengths), "prompts": sum(n > 1 for n in lengths)}
        entry |= {"tokens": sum(lengths), "longest": max(lengths), "waiting": waiting}
        if cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            entry["events"] = events
            events[0].record(ios.compute_stream)
        step(self, model)
        if cuda:
            events[1].record(ios.compute_stream)
            entry["padded"] = host.num_q_tokens
            (ends,) = host.cumulative_seqlens_k.values()
            entry["keys"] = int(ends[len(lengths)])
        entry["launch"] = time.perf_counter() - launched
        steps.append(entry)

    def timed_update(self: Any) -> None:
        began = time.perf_counter()
        update(self)
        if steps:
            steps[-1]["update"] = time.perf_counter() - began

    processor.prepare_next_batch = timed_prepare
    processor._generation_step, processor.update_batch = timed_step, timed_update
    shutdown = uvicorn.Server.shutdown

    async def write_and_shutdown(self: Any, *args: Any, **options: Any) -> None:
        with target.open("w") as file:
            for entry in steps:
                if events := entry.pop("events", None):
                    events[1].synchronize()
                    entry["gpu"] = events[0].elapsed_time(events[1]) / 1000
                file.write(json.dumps(entry) + "\n")
        await shutdown(self, *args, **options)

    uvicorn.Server.shutdown = write_and_shutdown


def kind_of(step: Step) -> str:
    if not step["prompts"]:
        return "decode"
    size = "mixed" if step["prompts"] < step["rows"] else "prompts"
    return f"{size}, {'over' if step['tokens'] > 2048 else 'up to'} 2048 tokens"


def main(source: Path) -> None:
    steps = [json.loads(line) for line in source.read_text().splitlines()]
    kinds: dict[str, list[Step]] = defaultdict(list)
    for step, after in pairwise(steps):
        step["wall"] = after["began"] - step["began"]
        if step["wall"] < 0.5:  # otherwise nobody asked
            kinds[kind_of(step)].append(step)
    total = sum(step["wall"] for each in kinds.values() for step in each)
    fields = ("wall", "gpu", "prepare", "launch", "update")
    print(f"{'steps':>34} {'time':>6} {'rows':>6} {'tokens':>7} {'keys':>7}", end="")
    print("".join(f"{name:>9}" for name in fields), "(median ms)")
    for name, found in sorted(kinds.items()):
        share = sum(step["wall"] for step in found) / total
        print(f"{name:>27} {len(found):6} {share:6.1%}", end="")
        for key in ("rows", "tokens", "keys"):
            print(f" {mean(step.get(key, 0) for step in found):7.0f}", end="")
        for key in fields:
            print(f"{1000 * median(step.get(key, 0) for step in found):9.2f}", end="")
        print()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
