# SPDX-License-Identifier: MIT
"""What people send to a chat server, for benchmark.py.

equal        N clients, each with prompts and answers of one length
mix          N clients that take the next of many requests of log-normal lengths: prompts
             of 20 to 2,000 tokens (mean 290), answers of 16 to 600 (mean 164)
chats        N people with a system prompt of 800 tokens in common, and 5 turns each: 150
             new tokens, 128 in the answer, 0.2 s between turns
chats-other  the same, but other words than the answer's go into the history, so that only
             what stands before them can be reused
arrivals     N requests a second, at random times (Poisson), of one length

Each is a coroutine function of an `Ask`, which sends a conversation and returns what was
seen of the answer. Texts are new in each run; their lengths follow from the generator.
"""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Turns = list[dict[str, str]]
Ask = Callable[[str | Turns, int], Awaitable[Any]]  # a conversation, and tokens to make

# Of log-normal lengths in tokens: median, sigma, least, most.
PROMPTS, ANSWERS = (200, 0.86, 20, 2000), (120, 0.79, 16, 600)
SYSTEM_TOKENS, TURNS, TURN_TOKENS, ANSWER_TOKENS = 800, 5, 150, 128
PAUSE_SECONDS = 0.2  # between an answer and the next turn of a person


@dataclass
class Workload:
    """How much of it, and what makes its texts and its chances."""

    clients: int  # or people, or arrivals a second
    requests: int
    prompt_tokens: tuple[int, int]  # of `equal` and `arrivals`: shortest, longest
    new_tokens: int
    make: Callable[[int], str]  # a new text of so many tokens
    generator: random.Random
    spread: float = 0  # seconds over which the clients of `equal` begin

    async def equal(self, ask: Ask) -> None:
        """The lengths are spread evenly over their logarithms."""
        low, high = map(math.log, self.prompt_tokens)
        lengths = [self.generator.uniform(low, high) for _ in range(self.requests)]
        prompts = [self.make(round(math.exp(length))) for length in lengths]
        await self._in_turn([(prompt, self.new_tokens) for prompt in prompts], ask)

    async def mix(self, ask: Ask) -> None:
        shapes = [(PROMPTS, ANSWERS)] * self.requests
        lengths = [(self._length(*p), self._length(*a)) for p, a in shapes]
        await self._in_turn([(self.make(p), a) for p, a in lengths], ask)

    async def chats(self, ask: Ask, with_answers: bool = True) -> None:
        system = {"role": "system", "content": self.make(SYSTEM_TOKENS)}
        texts = [
            [(self.make(TURN_TOKENS), self.make(ANSWER_TOKENS)) for _ in range(TURNS)]
            for _ in range(self.clients)
        ]

        async def person(turns: list[tuple[str, str]]) -> None:
            history = [system]
            for number, (prompt, other) in enumerate(turns):
                if number:
                    await asyncio.sleep(PAUSE_SECONDS)
                history.append({"role": "user", "content": prompt})
                answer = await ask(history, ANSWER_TOKENS)
                answer.turn = number
                text = answer.text if with_answers else other
                history.append({"role": "assistant", "content": text})

        await asyncio.gather(*map(person, texts))

    async def chats_other(self, ask: Ask) -> None:
        await self.chats(ask, with_answers=False)

    async def arrivals(self, ask: Ask) -> None:
        prompts = [self.make(self.prompt_tokens[0]) for _ in range(self.requests)]
        asked = []
        for prompt in prompts:
            await asyncio.sleep(self.generator.expovariate(self.clients))
            asked.append(asyncio.create_task(ask(prompt, self.new_tokens)))
        await asyncio.gather(*asked)

    async def _in_turn(self, requests: list[tuple[str, int]], ask: Ask) -> None:
        """Each client goes on with the next request when it has its answer; client n
        starts n / clients of `spread` seconds late."""
        left = iter(requests)

        async def client(number: int) -> None:
            await asyncio.sleep(self.spread * number / self.clients)
            for prompt, tokens in left:
                await ask(prompt, tokens)

        await asyncio.gather(*map(client, range(self.clients)))

    def _length(self, middle: int, sigma: float, least: int, most: int) -> int:
        while True:  # until it is within its limits
            length = round(self.generator.lognormvariate(math.log(middle), sigma))
            if least <= length <= most:
                return length


WORKLOADS: dict[str, Callable[[Workload, Ask], Awaitable[None]]] = {
    "equal": Workload.equal,
    "mix": Workload.mix,
    "chats": Workload.chats,
    "chats-other": Workload.chats_other,
    "arrivals": Workload.arrivals,
}
