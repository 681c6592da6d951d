# SPDX-License-Identifier: MIT
"""A storm of requests over HTTP for a server that runs already, on a GPU say.

    python api.py --demo --cache-tokens 24576 &
    python tests/measure/storm.py --seconds 60 --clients 100

Prompts of one word to thousands, some with one beginning; greedy and sampled, whole and
streamed answers; a quarter of the clients leave at a random moment. A cache that cannot
hold them all has requests preempted. Wrong is any answer but 200 and the 503 of a full
server, a stream that breaks off, or anything that is left in flight or in the cache
afterwards. Then some greedy prompts are asked again, one at a time. In bfloat16 the text
depends on what else is in the batch, so how many answers are the same is only printed.
Prints JSON last; exits with 1 if anything was wrong.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import _setup  # noqa: F401
import net
import soak

BEGINNING = " ".join(soak.WORDS * 40)


@dataclass
class Storm:
    port: int
    words: int  # of the longest prompts
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    greedy: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    health: float = 0.0  # longest wait in seconds

    async def get(self, path: str) -> str:
        reply = await net.exchange(self.port, net.packet(path, b"", "GET"))
        return reply.body.decode()

    async def post(self, body: dict[str, Any]) -> net.Reply:
        return await net.exchange(self.port, net.packet("/", body))

    def body(self, rng: random.Random) -> dict[str, Any]:
        words = int(self.words ** rng.random())  # as many of 1 to 10 as of 100 to 1000
        prompt = " ".join(rng.choices(soak.WORDS, k=words))
        body: dict[str, Any] = {"prompt": prompt}
        if rng.random() < 0.2:
            body["prompt"] = f"{BEGINNING} {prompt}"
        body["max_new_tokens"] = rng.choice((1, 2, 17, 64, 200))
        if rng.random() < 0.25:
            body["temperature"] = rng.choice((0.5, 1, 2))
            body |= {"top_p": rng.choice((0.3, 0.9, 1)), "top_k": rng.choice((0, 40))}
        if rng.random() < 0.1:
            body["stop"] = ["e", " the"]
        return body | {"stream": rng.random() < 0.5}

    async def one(self, rng: random.Random) -> None:
        body = self.body(rng)
        patience = rng.random() * 1.5 if rng.random() < 0.25 else None
        try:
            async with asyncio.timeout(patience):
                reply = await self.post(body)
        except TimeoutError:
            self.counts["left"] += 1
            return
        self.counts[str(reply.status)] += 1
        ended = body["stream"] and b'"status":200' in reply.body[-200:]
        if reply.status == 503 and b"in flight" in reply.body:
            await asyncio.sleep(0.1)
        elif reply.status != 200 or body["stream"] != ended:
            self.wrong.append(f"{reply.status}: {reply.body[-200:]!r}")
        elif not body["stream"] and len(body) == 3 and body["max_new_tokens"] > 2:
            self.greedy.append((body, json.loads(reply.body)["response"]))

    async def client(self, seed: int, end: float) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            try:
                await self.one(rng)
            except (OSError, ValueError, EOFError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}")

    async def watch(self, end: float) -> None:
        while time.monotonic() < end:
            asked = time.monotonic()
            await self.get("/health")
            self.health = max(self.health, time.monotonic() - asked)
            await asyncio.sleep(0.1)

    async def empty(self) -> bool:
        """Whether nothing is left; cancels of the last requests may be on their way."""
        names = "requests_in_flight", "requests_waiting", "cache_usage_ratio"
        for _ in range(100):
            lines = (await self.get("/metrics")).split("\n")
            if all(f"phi4_{name} 0.0" in lines for name in names):
                return True
            await asyncio.sleep(0.1)
        return False

    async def run(self, clients: int, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        jobs = (self.client(seed, end) for seed in range(clients))
        await asyncio.gather(self.watch(end), *jobs)
        if not await self.empty():
            self.wrong.append("something is left in flight or in the cache")
        again = [(await self.post(body)).body for body, _ in self.greedy[:50]]
        texts = [json.loads(answer)["response"] for answer in again]
        pairs = list(zip((text for _, text in self.greedy), texts, strict=False))
        return {
            "answers": dict(self.counts),
            "longest wait of /health, s": round(self.health, 3),
            "asked again": len(pairs),
            "the same": sum(old == new for old, new in pairs),
            "the same first 20 characters": sum(a[:20] == b[:20] for a, b in pairs),
            "wrong": len(self.wrong),
            "first wrong": self.wrong[:10],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=6006)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--words", type=int, default=3000, help="of the longest prompt")
    args = parser.parse_args()
    figures = asyncio.run(Storm(args.port, args.words).run(args.clients, args.seconds))
    print(json.dumps(figures, indent=1))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
