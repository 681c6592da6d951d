# SPDX-License-Identifier: MIT
"""Soak test: thousands of mixed requests over HTTP on a tiny model.

    python tests/measure/soak.py                       10,000 requests to `python api.py`
    python tests/measure/soak.py --requests 1000       fewer
    python tests/measure/soak.py --inside              the server in this process: its engine
                                               and cache are looked at afterwards
    python tests/measure/soak.py --overlapped          so, and with a GPU's order of things

The answers to 200 greedy prompts are computed beforehand with `model.generate`; every
finished greedy answer must equal its own and every cut one must be a prefix of it.
Ordinary requests are mixed with sampled, dropped, half-sent and bad ones and with
bursts over the admission limit. Prints a table and, as the last line, JSON. Exits with
1 if anything was not as it should be.
"""

import argparse
import asyncio
import codecs
import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import net
import overlap
import psutil
import tiny
import torch
import transformers
from net import exchange, packet
from server import running, spawned, wait_until

ROWS, WAITING, CONTEXT, LONGEST, BODY = 8, 16, 512, 32, 16384
SERVER = {
    "max_in_flight": ROWS,
    "max_waiting": WAITING,
    "max_body_bytes": BODY,
    "cache_tokens": 2048,  # half of what eight longest requests would need
    "batch_tokens": 128,
    "device": "cpu",
    "dtype": "float32",
    "host": "127.0.0.1",
}
MODEL = {"context": CONTEXT, "eos": "natural", "seed": 3}
CLIENTS = 12
PROMPTS = 200
WORDS = [
    "sun",
    "rain",
    "tea",
    "Käse",
    "雪",
    "снег",
    "🙂",
    "blue",
    "door",
    "seven",
    "why",
    "not",
    "under",
    "light",
    "ocean",
]
ROUTES = "/", "/v1/chat/completions"


@dataclass
class Reference:
    """A prompt and the tokens that `model.generate` answers it with."""

    prompt: str
    tokens: list[int]
    texts: list[str]  # of the first 0, 1, 2, ... tokens

    def text(self, limit: int, stop: str | None = None) -> str:
        whole = self.texts[min(limit, len(self.tokens))]
        return whole.split(stop)[0] if stop else whole


@functools.cache
def references(count: int = PROMPTS) -> list[Reference]:
    """Prompts of many lengths whose greedy float32 answers are pairwise different."""
    torch.set_num_threads(1)  # more only wait for each other on so small a model
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny.tiny_model(Path(folder), **MODEL)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.float32).eval()
    ends = tokenizer.convert_tokens_to_ids(list(tiny.END_TOKENS))
    rng = random.Random(1)
    asked: list[tuple[str, list[int]]] = []
    for number in range(2 * count):
        prompt = f"{number} {' '.join(rng.choices(WORDS, k=rng.randint(1, 30)))}"
        turns = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        asked.append((prompt, tokens["input_ids"]))
    asked.sort(key=lambda each: len(each[1]))  # so that there is little to pad
    found: dict[str, Reference] = {}  # by answer
    for first in range(0, len(asked), 50):
        batch = asked[first : first + 50]
        padded = tokenizer.pad(
            {"input_ids": [ids for _, ids in batch]},
            padding_side="left",
            return_tensors="pt",
        )
        length = padded["input_ids"].shape[1]
        output = model.generate(
            **padded,
            do_sample=False,
            max_new_tokens=LONGEST,
        )
        for (prompt, _), row in zip(batch, output[:, length:].tolist(), strict=True):
            stops = [at for at, token in enumerate(row) if token in ends]
            tokens = row[: stops[0] + 1] if stops else row
            texts = [complete(tokenizer, tokens[:n]) for n in range(len(tokens) + 1)]
            if len(tokens) >= 8:
                found[texts[-1]] = Reference(prompt, tokens, texts)
    assert len(found) >= count
    return list(found.values())[:count]


def complete(tokenizer: Any, tokens: list[int]) -> str:
    """The text of tokens without a last character that is cut off."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    shown = [token for token in tokens if token not in tokenizer.all_special_ids]
    # The first 256 tokens are the bytes, and no other ends inside a character.
    end = bytes(itertools.takewhile(lambda token: token < 256, shown[:-4:-1]))[::-1]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(end)
    cut_off = decoder.getstate()[0]
    return text.removesuffix(cut_off.decode(errors="replace"))


# ------------------------------------------------------------------------------
# The mix
# ------------------------------------------------------------------------------


@dataclass
class Soak:
    """What was asked, what came back, and everything that should not have."""

    port: int
    references: list[Reference]
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)  # greedy, by prompt
    wrong: list[str] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self.kinds: dict[str, tuple[int, Callable[[], Any]]] = {
            "greedy": (36, self.greedy),
            "greedy, streamed": (20, self.streamed),
            "greedy, cut after some events": (10, self.cut),
            "sampled": (12, self.sampled),
            "dropped before the answer": (8, self.dropped),
            "half a head or body, then closed": (4, self.half),
            "bad body": (10, self.bad),
        }

    async def run(self, requests: int) -> None:
        """Send so many requests from `CLIENTS` clients, and bursts from time to time."""
        burst = 3 * (ROWS + WAITING)
        weights = [weight for weight, _ in self.kinds.values()]
        plan: Iterator[str] = iter(
            self.rng.choices(list(self.kinds), weights, k=requests)
        )

        async def client() -> None:
            for kind in plan:
                await self.one(kind)
                if not self.counts["bursts"] or self.rng.random() < 1 / 500:
                    more = itertools.islice(plan, burst)
                    self.counts["bursts"] += 1
                    await asyncio.gather(*map(self.one, more))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def one(self, kind: str) -> None:
        try:
            async with asyncio.timeout(net.DEADLINE):
                await self.kinds[kind][1]()
        except Exception as error:  # noqa: BLE001 whatever it was, it counts as wrong
            self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
        self.counts[kind] += 1
        self.done += 1

    def check(self, right: bool, what: str) -> bool:
        if not right:
            self.wrong.append(what)
        return right

    def body(self, path: str, prompt: str, limit: int, **more: Any) -> bytes:
        if path == "/":
            body = {"prompt": prompt, "max_new_tokens": limit}
        else:
            turn = {"role": "user", "content": prompt}
            body = {"messages": [turn], "max_completion_tokens": limit}
        return json.dumps(body | more).encode()

    def pick(self) -> tuple[str, Reference, int]:
        reference = self.rng.choice(self.references)
        return self.rng.choice(ROUTES), reference, self.rng.randint(1, LONGEST)

    async def ask(self, path: str, body: bytes, events: int | None = None) -> Any:
        """The answer, or None if it is the intended 503."""
        reply = await exchange(self.port, packet(path, body), events)
        self.statuses[reply.status] += 1
        if reply.status == 503:
            full = "retry-after" in reply.headers and b"in flight" in reply.body
            self.check(full, f"503: {reply.body[:200]}")
            return None
        right = self.check(reply.status == 200, f"{reply.status}: {reply.body[:200]}")
        return reply if right else None

    def compare(self, reference: Reference, got: str, wanted: str) -> None:
        if self.check(got == wanted, f"{reference.prompt!r}: {got!r}, not {wanted!r}"):
            self.finished[reference.prompt] += 1

    async def greedy(self) -> None:
        path, reference, limit = self.pick()
        more, stop = {}, None
        if self.rng.random() < 0.2:
            at = self.rng.randrange(len(reference.texts[-1]))
            stop = reference.texts[-1][at : at + 2]
            more = {"stop": [stop, "never in an answer"]}
        body = self.body(path, reference.prompt, limit, **more)
        if reply := await self.ask(path, body):
            answer = json.loads(reply.body)
            if path == "/":
                text = answer["response"]
            else:
                text = answer["choices"][0]["message"]["content"]
            self.compare(reference, text, reference.text(limit, stop))

    async def again(self) -> None:
        """Every prompt's whole answer once more, so many at once as are admitted."""
        waiting = iter(self.references)

        async def client() -> None:
            for reference in waiting:
                reply = await self.ask("/", self.body("/", reference.prompt, LONGEST))
                if self.check(reply is not None, "503 although there is room"):
                    text = json.loads(reply.body)["response"]
                    self.compare(reference, text, reference.texts[-1])

        await asyncio.gather(*(client() for _ in range(ROWS + WAITING)))

    async def streamed(self) -> None:
        path, reference, limit = self.pick()
        body = self.body(path, reference.prompt, limit, stream=True)
        if reply := await self.ask(path, body):
            text, ended = self.read_stream(path, reply.body)
            self.check(ended, f"a stream without an end: {reply.body[-200:]}")
            self.compare(reference, text, reference.text(limit))

    async def cut(self) -> None:
        path, reference, limit = self.pick()
        events = self.rng.randint(1, 6)
        body = self.body(path, reference.prompt, limit, stream=True)
        if reply := await self.ask(path, body, events):
            text, _ = self.read_stream(path, reply.body)
            begins = reference.text(limit).startswith(text)
            self.check(begins, f"cut: {text!r} does not begin {reference.prompt!r}")

    def read_stream(self, path: str, data: bytes) -> tuple[str, bool]:
        """The text so far of server-sent events, and whether their end is there."""
        text, answered, ended = "", False, False
        for event, line in net.events(data):
            known = event == "message" or (event, path) == ("end", "/")
            if not self.check(known, f"{event or 'comment'}: {line[:200]}"):
                continue
            message = {} if line == "[DONE]" else json.loads(line)
            if event == "end":
                right = answered and set(message) == net.END
                ended = self.check(right, f"a wrong end: {line}")
            elif path != "/":
                for choice in message.get("choices", ()):
                    text += choice["delta"].get("content", "")
                ended = ended or not message
            elif "delta" in message:
                text += message["delta"]
            else:
                answered = True
                self.check(message["response"] == text, "deltas are not the answer")
        return text, ended

    async def sampled(self) -> None:
        path, reference, limit = self.pick()
        more: dict[str, Any] = {"temperature": self.rng.choice((0.3, 1, 2.0))}
        for name, value in (("top_p", 0.8), ("top_k", 20), ("seed", 5), ("stop", "e")):
            if self.rng.random() < 0.4:
                more[name] = value
        body = self.body(path, reference.prompt, limit, **more)
        await self.ask(path, body)

    async def dropped(self) -> None:
        path, reference, limit = self.pick()
        stream = self.rng.random() < 0.5
        body = self.body(path, reference.prompt, limit, stream=stream)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.random() * 0.05):
                await exchange(self.port, packet(path, body))

    async def half(self) -> None:
        path, reference, limit = self.pick()
        data = packet(path, self.body(path, reference.prompt, limit))
        data = data[: self.rng.randrange(len(data))]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.random() * 0.05):
                await exchange(self.port, data)

    async def bad(self) -> None:
        path = self.rng.choice(ROUTES)
        long = self.body(path, "much " * BODY, 1)
        chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(long), long)
        data = self.rng.choice(
            (
                packet(path, b"{"),
                packet(path, b""),
                packet(path, b"[" * 5000),
                packet(path, b'{"prompt": "\\ud800", "messages": "\\ud800"}'),
                packet(path, b'{"prompt": "\xff"}'),
                packet(path, self.body(path, "hello", 5, temperature=float("nan"))),
                packet(path, self.body(path, "hello", 0)),
                packet(path, self.body(path, "hello", 10**30)),
                packet(path, self.body(path, "long " * 400, 5)),
                packet(path, long),
                packet(path, chunked, "POST", "Transfer-Encoding: chunked"),
                packet(path, b"\x1f\x8b123", "POST", "Content-Encoding: gzip"),
                packet("/nothing", b"{}"),
                packet(path, b"{}", "DELETE"),
            )
        )
        reply = await exchange(self.port, data)
        self.statuses[reply.status] += 1
        full = reply.status == 503 and "retry-after" in reply.headers
        refused = 400 <= reply.status < 500 or full
        self.check(refused, f"{reply.status} for {data[-60:]}")

    async def settle(self) -> bool:
        """Whether as many requests as are admitted, at once, are all answered."""
        prompt = "x" * 200
        body = packet("/", self.body("/", prompt, LONGEST))
        # Cancels of the last requests may still be on their way.
        for _ in range(50):
            jobs = (exchange(self.port, body) for _ in range(ROWS + WAITING))
            replies = await asyncio.gather(*jobs)
            if {reply.status for reply in replies} == {200}:
                return len({json.loads(r.body)["response"] for r in replies}) == 1
            await asyncio.sleep(0.1)
        return False


# ------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------


@contextlib.contextmanager
def served(folder: Path, args: Any) -> Iterator[tuple[int, int, Any]]:
    """The port, process id and, if it is in this process, the server itself."""
    if args.inside or args.overlapped:
        with (
            overlap.overlapped(args.overlapped),
            running(model=folder, **SERVER) as server,
        ):
            yield net.port_of(server.url), os.getpid(), server
    else:
        options = [
            part
            for name, value in SERVER.items()
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        one = {"OMP_NUM_THREADS": "1"}  # as above
        with spawned("--model", str(folder), *options, **one) as process:
            yield process.port, process.pid, None


async def watch(soak: Soak, pid: int, memory: list[tuple[int, int]]) -> None:
    """Note the requests done and the server's resident bytes, until cancelled."""
    process = psutil.Process(pid)
    while True:
        memory.append((soak.done, process.memory_info().rss))
        await asyncio.sleep(0.05)


def growth(memory: list[tuple[int, int]], requests: int) -> float:
    """Percent that memory grew from the middle of the run to its end."""

    def around(share: float) -> float:
        near = sorted(memory, key=lambda sample: abs(sample[0] - share * requests))
        return statistics.median(rss for _, rss in near[: max(len(memory) // 20, 1)])

    return 100 * (around(1) / around(0.5) - 1)


async def measure(port: int, pid: int, refs: list[Reference], args: Any) -> Any:
    soak = Soak(port, refs, random.Random(args.seed))
    memory: list[tuple[int, int]] = []
    watcher = asyncio.create_task(watch(soak, pid, memory))
    started = time.monotonic()
    await soak.run(args.requests)
    seconds = time.monotonic() - started
    watcher.cancel()
    soak.check(await soak.settle(), "places for requests were lost")
    await soak.again()
    half = next(rss for done, rss in memory if done >= args.requests / 2)
    return soak, {
        "requests": soak.done,
        "seconds": round(seconds, 1),
        "kinds": dict(soak.counts),
        "statuses": {str(code): n for code, n in sorted(soak.statuses.items())},
        "greedy answers equal to model.generate": soak.finished.total(),
        "prompts with such an answer": len(soak.finished),
        "memory at half, MB": round(half / 1e6, 1),
        "memory growth, second half, %": round(growth(memory, args.requests), 2),
    }


def run(arguments: list[str]) -> dict[str, Any]:
    """The figures of a soak; `wrong` lists what should not have happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true")
    parser.add_argument("--overlapped", action="store_true")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "tiny"
        tiny.tiny_model(folder, **MODEL)
        refs = references()
        with served(folder, args) as (port, pid, server):
            free_at_first = server.free_cache() if server else 0
            soak, figures = asyncio.run(measure(port, pid, refs, args))
            if server:
                wait_until(server.idle)
                lost = free_at_first - server.free_cache()
                figures["cache lost, bytes"] = lost
                soak.check(lost == 0, "the cache is not free")
    steady = figures["memory growth, second half, %"] < 5
    soak.check(steady, "memory grew by 5% or more")
    soak.check(len(soak.finished) == PROMPTS, "a prompt was never answered")
    return figures | {"wrong": len(soak.wrong), "first wrong": soak.wrong[:10]}


def main() -> int:
    figures = run(sys.argv[1:])
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, number in value.items():
                print(f"    {key:<40} {number:>10}")
        else:
            print(f"{name:<44} {value!s:>10}")
    print(json.dumps(figures))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
