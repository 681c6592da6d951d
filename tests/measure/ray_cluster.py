# SPDX-License-Identifier: MIT
"""Two machines in one: Ray Serve with a replica on each of two nodes, measured.

    python tests/measure/ray_cluster.py                   prints a table, in about four minutes
    python tests/measure/ray_cluster.py --out FILE        writes the figures as JSON, too

Needs Linux, `pip install -r tests/requirements.txt` and the right to make namespaces
(root, or unprivileged user namespaces). Ray listens on all addresses of a machine, so
it runs here in a network namespace that has only loopback, and in a process namespace
that ends all of it with this script. The model is random, with one thread a replica:
the ratios mean something, the times are those of this machine.

1. Throughput of two replicas against one.
2. A replica is killed by SIGKILL under load: which answers are lost, and how long it
   takes until there are two again.
3. Time to the first token of a second turn, with and without a session header.

Exits with 1 if an answer is lost that the killed replica did not hold, or is wrong.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import net
import psutil
import requests
import tiny
from ray_inside import ISOLATED, environment, loopback_up, why_not
from server import ROOT

URL = "http://127.0.0.1:8000"
ROWS, CLIENTS, NEW_TOKENS, HISTORY, CONVERSATIONS = 4, 12, 48, 2000, 12
MODEL = {"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 4, "context": 4096}
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "max_in_flight": str(ROWS),
    "max_waiting": "28",
    "cache_tokens": "65536",
}


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The condition's first true value. Raises TimeoutError if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(requests.RequestException):
            if value := condition():
                return value
        time.sleep(0.05)
    raise TimeoutError(f"not true within {seconds} s: {condition}")


@contextlib.contextmanager
def served(folder: Path, replicas: int) -> Iterator[None]:
    """`serve run cluster:app` with so many replicas, until they are ready."""
    settings = SETTINGS | {"model": str(folder / "model"), "replicas": str(replicas)}
    words = [f"{name}={value}" for name, value in settings.items()]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            ["serve", "run", "cluster:app", *words],
            cwd=ROOT,
            env=environment(folder),
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: len(answering()) == replicas)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def ask(
    prompt: str, session: str = "", turns: Sequence[Any] = (), **body: Any
) -> requests.Response:
    headers = {"x-session-id": session} if session else {}
    body = {"prompt": prompt, "history": [*turns], **body}
    return requests.post(URL, json=body, headers=headers, timeout=120, stream=True)


def replica(session: str = "") -> float:
    """The time at which the replica that answers was imported tells them apart."""
    headers = {"x-session-id": session} if session else {}
    figures = requests.get(f"{URL}/metrics", headers=headers, timeout=10)
    figures.raise_for_status()
    return float(
        re.search(r"^phi4_prompt_tokens_created (\S+)", figures.text, re.MULTILINE)[1]
    )


def answering() -> set[float]:
    """The replicas that answer."""
    return {replica() for _ in range(16)}


def processes() -> list[psutil.Process]:
    found = psutil.process_iter(["name", "cmdline"])
    return [p for p in found if "ServeReplica" in "".join(p.info["cmdline"] or ())]


def throughput(clients: int, seconds: float = 20) -> float:
    """New tokens per second of clients that ask without a pause."""
    end, tokens, lock = time.monotonic() + seconds, 0, threading.Lock()

    def client(number: int) -> None:
        nonlocal tokens
        turn = 0
        while time.monotonic() < end:
            prompt, turn = f"client {number}, turn {turn}", turn + 1
            answer = ask(prompt, max_new_tokens=NEW_TOKENS)
            answer.raise_for_status()
            made = int(answer.headers["X-Completion-Tokens"])
            with lock:
                tokens += made if time.monotonic() < end else 0

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return tokens / seconds


@dataclass
class Outcome:
    """What became of one request of the load."""

    client: int
    started: float  # time.monotonic() in seconds
    ended: float
    kind: str  # "ok", "wrong", "cut" or the status


def killed() -> dict[str, Any]:
    """SIGKILL of one of two replicas under load; half of the clients stream."""
    sessions = [f"load-{number}" for number in range(CLIENTS)]
    expected = {
        s: ask(s, max_new_tokens=NEW_TOKENS).json()["response"] for s in sessions
    }
    home = {s: replica(s) for s in sessions}
    outcomes: list[Outcome] = []
    over = threading.Event()

    def once(number: int) -> str:
        session = sessions[number]
        stream = number % 2 == 0
        try:
            answer = ask(session, session, max_new_tokens=NEW_TOKENS, stream=stream)
            text = answer.text
        except requests.RequestException:
            return "cut"
        if answer.status_code != 200:
            return str(answer.status_code)
        try:
            whole = net.told(text.encode())[1] if stream else json.loads(text)
        except (ValueError, AssertionError):  # a stream without its end
            return "cut"
        told = whole["response"]
        return "ok" if told == expected[session] else "wrong"

    def client(number: int) -> None:
        while not over.is_set():
            started = time.monotonic()
            kind = once(number)
            outcomes.append(Outcome(number, started, time.monotonic(), kind))
            if kind not in ("ok", "wrong"):
                time.sleep(0.2)

    with ThreadPoolExecutor(CLIENTS) as pool:
        try:
            clients = [pool.submit(client, number) for number in range(CLIENTS)]
            until(lambda: len(outcomes) >= 2 * CLIENTS)
            time.sleep(0.3)  # answers tend to end together: into the next ones
            victim = processes()[0]
            victim.kill()
            at = time.monotonic()
            until(lambda: len(processes()) == 2 and victim not in processes())
            dead = {*home.values()} - answering()
            until(lambda: len(answering() - dead) == 2)
            back = time.monotonic() - at
            until(lambda n=len(outcomes): len(outcomes) >= n + 2 * CLIENTS)
        finally:
            over.set()
    for each in clients:
        each.result()
    failed = [o for o in outcomes if o.kind != "ok"]
    held = [
        o
        for o in failed
        if home[sessions[o.client]] in dead and o.started < at < o.ended
    ]
    return {
        "requests": len(outcomes),
        "held_and_lost": dict(Counter(o.kind for o in held)),
        "others_lost": dict(Counter(o.kind for o in failed if o not in held)),
        "seconds_until_two_again": round(back, 1),
    }


def first_token(prompt: str, session: str, turns: Sequence[Any]) -> float:
    """Seconds from asking to the first piece of the answer."""
    started = time.monotonic()
    with ask(prompt, session, turns, max_new_tokens=4, stream=True) as answer:
        answer.raise_for_status()
        pieces = answer.iter_content(1)
        text = next(pieces)
        took = time.monotonic() - started
        text += b"".join(pieces)
        net.told(text)
    return took


def second_turns(with_header: bool) -> dict[str, Any]:
    """Times to the first token of second turns on long histories, in milliseconds."""
    times = []
    for number in range(CONVERSATIONS):
        kind = "with" if with_header else "without"
        session = f"talk-{number}" if with_header else ""
        prompt = f"{kind} {number} ".ljust(HISTORY, "abcdefgh "[number % 9])
        history = ask(prompt, session, max_new_tokens=4).json()["history"]
        times.append(1000 * first_token("and then?", session, history))
    mean, median = statistics.mean(times), statistics.median(times)
    shown = {"mean": round(mean), "median": round(median), "most": round(max(times))}
    return shown | {"over_5_times_the_least": sum(t > 5 * min(times) for t in times)}


def measure(folder: Path) -> dict[str, Any]:
    """All figures; in the namespace."""
    tiny.tiny_model(folder / "model", eos="never", **MODEL)
    small = ["--num-cpus=1", "--object-store-memory=80000000"]
    for where in ("--head", "--address=127.0.0.1:6379"):
        command = ["ray", "start", where, *small]
        options = {"cwd": ROOT, "env": environment(folder)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    figures: dict[str, Any] = {}
    for replicas in (1, 2):
        started = time.monotonic()
        with served(folder, replicas):
            ready = round(time.monotonic() - started, 1)
            throughput(2 * ROWS * replicas, 5)  # warms up
            speed = round(throughput(2 * ROWS * replicas))
            figures[f"replicas_{replicas}"] = {"ready_s": ready, "tokens_s": speed}
            if replicas == 1:
                continue
            ratio = speed / figures["replicas_1"]["tokens_s"]
            figures["ratio"] = round(ratio, 2)
            figures["load_average"] = os.getloadavg()[0]
            figures["kill"] = killed()
            figures["first_token_ms_with_header"] = second_turns(True)
            figures["first_token_ms_without"] = second_turns(False)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        if why := why_not():
            parser.error(why)
        return subprocess.run(
            [*ISOLATED, sys.executable, __file__, "--inside", *sys.argv[1:]],
            check=False,
        ).returncode
    loopback_up()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        try:
            figures = measure(Path(folder))
        except BaseException:
            log = Path(folder, "serve.log")
            sys.stderr.write(log.read_text()[-5000:] if log.exists() else "")
            raise
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):32} {value}")
    lost = figures["kill"]["others_lost"]
    wrong = "wrong" in figures["kill"]["held_and_lost"]
    return 1 if lost or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
