# SPDX-License-Identifier: MIT
"""Clients for tests and scripts: twelve whose answers are known, and some that leave."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import net
from server import Running, wait_until

PROMPTS = [f"prompt {word}" for word in ["one", "two", "three", "four", "five", "six"]]
PROMPTS += [f"{word} is the answer" for word in ["a", "b", "c", "d", "e", "f"]]
LONG = 400  # tokens of an answer whose reader leaves


def answers(served: Running) -> list[str]:
    """The greedy answers to the twelve prompts, asked together."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = pool.map(lambda p: served.post(p, max_new_tokens=40), PROMPTS)
        return [response.json()["response"] for response in asked]


def leave(served: Running, count: int) -> list[float]:
    """Close `count` sockets in the middle of an answer, one after the other. Returns
    the seconds from each close until the engine holds nothing of that request; those
    that were generated to their end in spite of it are left out."""
    seconds = []
    for number in range(count):
        others = {*served.scheduled}
        with net.connect(served.url) as client:
            stream = number % 2 == 1
            body = {"prompt": f"leaves {number}", "stream": stream}
            client.sendall(net.packet(body=body | {"max_new_tokens": LONG}))
            mine = wait_until(partial(generating, served, others))
            if stream:
                assert client.recv(12).startswith(b"HTTP/1.1 200")
        closed = time.monotonic()
        wait_until(partial(gone, served, mine))
        if len(mine.generated_tokens) < LONG:
            seconds.append(time.monotonic() - closed)
    return seconds


def gone(served: Running, request: Any) -> bool:
    return request.request_id not in served.scheduled


def generating(served: Running, others: set[str]) -> Any:
    """The long request that is not among the others and has some of its tokens."""
    for name, state in served.scheduled.items():
        long = name not in others and state.max_new_tokens == LONG
        if long and state.generated_tokens:
            return state
    return None
