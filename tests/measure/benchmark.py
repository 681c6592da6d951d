# SPDX-License-Identifier: MIT
"""Measure this server beside the tutorial's way, over HTTP, in one run.

    python tests/measure/benchmark.py --demo                      16 clients on any machine
    python tests/measure/benchmark.py --model models/LLM-Research/phi-4 --clients 1,8,32
    python tests/measure/benchmark.py --random /data/random-phi-4 phi-4's shape, no download
    python tests/measure/benchmark.py --chart results.json chart.png
    python tests/measure/benchmark.py --demo -- --batch-tokens 128      settings for api.py
    python tests/measure/benchmark.py --random /data/random-phi-4 --skip-tutorial \\
        --workload mix,chats --clients 64 --requests 320          what people really send
    python tests/measure/benchmark.py --model FOLDER --port 8000 --served-model NAME
        a server that runs already, of the same model, such as vLLM
The tutorial's way is one blocking `model.generate` at a time behind FastAPI, in a
process of its own, in the faster of bfloat16 and float32. Both ways get the same
prompts and may use the same threads. Answers have exactly --new-tokens tokens: end
tokens are ignored by both (this server is started by `serve_endless`, below), because
answers of unequal length cannot be compared. The sampler of the tutorial is greedy.

On a CPU both servers run all the time and take turns; on a GPU, whose memory this
server fills, one follows the other. The clients need the standard library only and
are one process; `client_cpu` in the results is the share of a core that it used.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, Self

import _setup  # noqa: F401
import steps
from net import free_port
from workloads import TURNS, WORKLOADS, Turns, Workload

SEED = 20251122
READY_SECONDS = 1800  # 29 GB from a slow disk, then compiling
HEALTH_SECONDS = 0.5  # between two polls of /health: each costs a CPU a few ms
TUTORIAL, SERVER, EQUAL = "tutorial", "this server", ["equal"]
# phi-4's config.json, as far as it says what a token costs.
PHI4 = {
    "vocab_size": 100352,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "pad_token_id": 100349,
}
WORDS = (
    "time people way water day man thing woman life child world school state family "
    "house country problem hand part place case week company system program question "
    "work night point home room mother area money story fact month lot right study "
    "book eye job word business issue side kind head father service friend power hour "
    "game line end member law car city name president team minute idea body back"
)


class BenchmarkError(Exception):
    """The measurement cannot be made; the message is for the user."""


# ------------------------------------------------------------------------------
# Clients
# ------------------------------------------------------------------------------


class Connection:
    """A kept-alive HTTP/1.1 connection: as much of the protocol as this needs, cheap
    enough for thousands of events a second."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Self:
        streams = await asyncio.open_connection("127.0.0.1", self.port)
        self.reader, self.writer = streams
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def pieces(self, path: str, body: Any = None) -> AsyncIterator[bytes]:
        """The answer's body as it arrives: each chunk, or all of it at once.

        GET, or POST if there is a body. Raises BenchmarkError unless it is a 200.
        """
        data = b"" if body is None else json.dumps(body).encode()
        self.writer.write(
            f"{'POST' if data else 'GET'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        if length := re.search(rb"\r\ncontent-length: (\d+)", head):
            piece = await self.reader.readexactly(int(length[1]))
            if head.split()[1] != b"200":
                raise BenchmarkError(f"{path} answered {piece.decode()}")
            yield piece
        else:
            while size := int(await self.reader.readline(), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()


@dataclass
class Answer:
    """What one client saw of one answer; times in seconds of time.perf_counter."""

    sent: float
    arrivals: list[float] = field(default_factory=list)  # of its pieces of text
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    turn: int = 0  # of a conversation, from 0

    def gaps(self, since: float = 0.0, until: float = math.inf) -> list[float]:
        """Seconds between its pieces, for those that arrived in this time."""
        return [b - a for a, b in pairwise(self.arrivals) if a >= since and b <= until]


async def ask_tutorial(connection: Connection, prompt: str, tokens: int) -> Answer:
    """The tutorial's contract: everything arrives at the end."""
    answer = Answer(time.perf_counter(), tokens=tokens)
    async for _ in connection.pieces("/", {"prompt": prompt, "history": []}):
        answer.arrivals.append(time.perf_counter())
    return answer


async def ask_server(
    connection: Connection, prompt: str | Turns, tokens: int, **more: Any
) -> Answer:
    """A stream. Pieces are text, so now and then one is of two tokens: those that
    are parts of one character. Raises BenchmarkError if tokens are missing."""
    user = [{"role": "user", "content": prompt}]
    body = more | {
        "messages": user if isinstance(prompt, str) else prompt,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer(time.perf_counter())
    async for piece in connection.pieces("/v1/chat/completions", body):
        now = time.perf_counter()
        for line in piece.splitlines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise BenchmarkError(f"a stream ended in {event['error']}")
            if usage := event.get("usage"):
                answer.tokens = usage["completion_tokens"]
                answer.prompt_tokens = usage["prompt_tokens"]
            elif text := event["choices"][0]["delta"].get("content"):
                answer.arrivals.append(now)
                answer.text += text
    if answer.tokens != tokens or not answer.arrivals:
        raise BenchmarkError(f"{answer.tokens} tokens came instead of {tokens}")
    return answer


async def poll_health(port: int, waits: list[float]) -> None:
    """Append the seconds each GET /health takes, until cancelled."""
    async with Connection(port) as connection:
        while True:
            sent = time.perf_counter()
            try:
                async for _ in connection.pieces("/health"):
                    pass
            finally:  # also of the poll that is still waiting at the end
                waits.append(time.perf_counter() - sent)
            await asyncio.sleep(HEALTH_SECONDS)


# ------------------------------------------------------------------------------
# The servers under test
# ------------------------------------------------------------------------------


@dataclass
class Way:
    """One of the two servers: how it is started and how it is asked."""

    name: str
    command: list[str]
    ask: Callable[[Connection, str, int], Any]
    levels: list[int]  # numbers of clients
    threads: int
    workloads: list[str] = field(default_factory=lambda: EQUAL)
    port: int = 0
    pid: int = 0
    ready_seconds: float = 0.0
    dtype: str = ""  # which one `auto` was, from its log
    gpus: int = 1  # over which torchrun splits the model

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Way"]:
        """Start it and wait until /health is 200; SIGTERM at the end. One that has a port
        runs already."""
        if self.port:
            yield self
            return
        self.port, started = free_port(), time.monotonic()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), self.threads)
        limits = {name: str(count) for name, count in threads.items() if count}
        command = [__file__, *self.command, "--port", str(self.port)]
        if self.gpus > 1:
            torchrun = "torch.distributed.run", "--nproc-per-node", str(self.gpus)
            command = ["-m", *torchrun, *command]
        with tempfile.TemporaryFile("w+") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                stdout=log,
                stderr=log,
                env=os.environ | limits,
            )
            self.pid = process.pid
            try:
                while not await is_ready(self.port):
                    late = time.monotonic() - started > READY_SECONDS
                    if late or process.returncode is not None:
                        raise EOFError("it did not get ready")
                    await asyncio.sleep(0.1)
                self.ready_seconds = time.monotonic() - started
                # pread, because seek would also move where the process writes.
                head = os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")
                if found := re.search(r"loading .* as (\w+)", head):
                    self.dtype = found[1]
                yield self
            except (OSError, EOFError) as error:
                log.seek(0)
                why = f"{self.name} failed: {error}\n{log.read()}"
                raise BenchmarkError(why) from error
            finally:
                with suppress(ProcessLookupError):
                    process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), 60)
                except TimeoutError:
                    process.kill()


async def is_ready(port: int) -> bool:
    try:
        async with Connection(port) as connection:
            async for _ in connection.pieces("/health"):
                pass
    except (OSError, EOFError, BenchmarkError):
        return False
    return True


def peak_memory(pid: int) -> float | None:
    """Most GiB that a process and its children have had resident, loading included; None
    for a server that somebody else has started."""
    if not pid:
        return None
    status = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        status[int(folder.name)] = dict(line.split(":", 1) for line in lines)
    tree = {pid}
    while more := {p for p in status if int(status[p]["PPid"]) in tree} - tree:
        tree |= more
    return sum(int(status[p].get("VmHWM", "0").split()[0]) for p in tree) / 2**20


def gpu_memory() -> float | None:
    """GiB in use on the GPUs, by all processes; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, check=False, capture_output=True, text=True)
    return sum(map(float, done.stdout.split())) / 2**10 if not done.returncode else None


def serve_tutorial(arguments: list[str]) -> None:
    """The tutorial's way: a route that blocks while the model writes."""
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--trial", action="store_true")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def answer(model: Any, turns: list[dict[str, str]], new_tokens: int) -> str:
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(options.device)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        if output.shape[1] != length + new_tokens:  # a client cannot see that
            raise RuntimeError(f"{output.shape[1] - length} tokens of {new_tokens}")
        return tokenizer.decode(output[0, length:], skip_special_tokens=True)

    def load(dtype: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, device_map=options.device
        )
        model.generation_config.eos_token_id = None
        return model

    def seconds(dtype: str) -> float:
        """How long an answer takes, by a process whose memory is not counted here."""
        command = [sys.executable, __file__, "tutorial", *arguments]
        command += ["--dtype", dtype, "--trial"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        return float(done.stdout.splitlines()[-1])

    dtype = options.dtype
    if dtype == "auto":  # float32 is never the faster on a GPU
        gpu = options.device != "cpu"
        dtype = "bfloat16" if gpu else min(("float32", "bfloat16"), key=seconds)
    if options.trial:
        model, question = load(dtype), [{"role": "user", "content": WORDS}]
        times = []
        for _ in range(4):  # the first one warms up; the best one had least company
            started = time.perf_counter()
            answer(model, question, 16)
            times.append(time.perf_counter() - started)
        return print(min(times[1:]))
    print(f"loading {options.model} on {options.device} as {dtype}", flush=True)
    model = load(dtype)
    app = FastAPI()

    @app.post("/")
    async def chat(request: Request) -> dict[str, Any]:
        body = await request.json()
        turns = [*body["history"], {"role": "user", "content": body["prompt"]}]
        text = answer(model, turns, options.new_tokens)
        history = [*turns, {"role": "assistant", "content": text}]
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return {"response": text, "history": history, "status": 200, "time": now}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, host="127.0.0.1", port=options.port, access_log=False)


def serve_endless(arguments: list[str]) -> None:
    """`python api.py ARGUMENTS`, but no token ends an answer; perhaps with less memory."""
    import api

    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu-gib", type=float)
    parser.add_argument("--steps", type=Path)
    options, arguments = parser.parse_known_args(arguments)
    if options.gpu_gib:
        cuda = api.torch.cuda
        share = options.gpu_gib * 2**30 / cuda.get_device_properties(0).total_memory
        cuda.set_per_process_memory_fraction(share, api.RANK)
    if options.steps:
        steps.log_steps(options.steps)
    load = api.Engine.load

    def load_endless(engine: Any) -> None:
        load(engine)
        engine.manager.generation_config.eos_token_id = [-1]
        engine.token_bytes = [text or b"" for text in engine.token_bytes]

    api.Engine.load = load_endless
    sys.argv = ["api.py", *arguments]
    sys.exit(api.main())


# ------------------------------------------------------------------------------
# The machine and the model
# ------------------------------------------------------------------------------


def print_device(_: list[str]) -> None:
    """Print what the GPU can do, as JSON; in a process that then frees the memory."""
    import torch

    if not torch.cuda.is_available():
        print(json.dumps({"device": "cpu"}))
        return

    def best(work: Callable[[], Any]) -> float:
        """Seconds of the fastest of 20 runs, after a warm-up."""
        times = []
        for _ in range(25):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return min(times[5:])

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / best(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    multiplied = 2 * 8192**3 / best(lambda: a @ a)
    name = torch.cuda.get_device_name()
    found = {"device": "cuda", "name": name, "copy_bytes_per_s": copied}
    print(json.dumps(found | {"matmul_flop_per_s": multiplied}))


def machine(device: str) -> dict[str, Any]:
    """What the measurement runs on; on a GPU also its measured limits."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    cpu = {"cpu": name[1] if name else platform.machine(), "cores": os.cpu_count()}
    if device == "cpu":  # a GPU beside it has no part in this
        return cpu | {"device": "cpu"}
    command = [sys.executable, __file__, "device"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return cpu | json.loads(done.stdout.splitlines()[-1])


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes of weights that every decode step reads: all, but the embedding only
    where the output layer shares it. The files may hold another dtype."""
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                sizes[name] = math.prod(tensor["shape"])
    if "lm_head.weight" in sizes:
        sizes.pop("model.embed_tokens.weight", None)
    return sum(sizes.values()) * (4 if dtype == "float32" else 2)


def make_random(folder: Path, **changes: Any) -> None:
    """Write random bfloat16 weights in phi-4's shape (29 GB) with its tokenizer, in
    shards and with an index as the hubs have them; nothing if that has been done.

    `changes` are of the config. On a GPU it takes a minute, most of it for the disk.
    """
    import torch
    from tiny import phi4_tokenizer
    from transformers import AutoModelForCausalLM, Phi3Config

    import model_download

    if folder.is_dir() and not model_download.missing_files(folder):
        return
    print(f"writing random weights to {folder}", file=sys.stderr)
    phi4_tokenizer(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = Phi3Config(**PHI4 | changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")


def drop_from_page_cache(folder: Path) -> None:
    """Make the next load read the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prompt_maker(folder: Path, seed: int = SEED) -> Callable[[int], str]:
    """A function that gives a new prompt of n tokens, those of the template included.

    Every prompt is new, so that no prefix cache can know it. The words are random:
    what they say does not change what they cost.
    """
    from transformers import AutoTokenizer

    tokenizer, generator = AutoTokenizer.from_pretrained(folder), random.Random(seed)
    empty = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False
    )
    template = len(tokenizer.encode(empty, add_special_tokens=False))

    def make(length: int) -> str:
        words = generator.choices(WORDS.split(), k=length)
        tokens = tokenizer.encode(" ".join(words), add_special_tokens=False)
        return tokenizer.decode(tokens[: max(length - template, 1)])

    return make


# ------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------


def percentile(values: list[float], percent: float) -> float | None:
    """The least value that `percent` of them do not pass; None if there are none."""
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1] if values else None


async def run_level(way: Way, name: str, work: Workload) -> dict[str, Any]:
    """Put a workload on a server, and tell what its clients saw."""
    waits: list[float] = []
    health = asyncio.create_task(poll_health(way.port, waits))
    idle: list[Connection] = []
    answers: list[Answer] = []

    async def ask(prompt: str | Turns, tokens: int) -> Answer:
        while idle and idle[-1].reader.at_eof():  # the server has closed it
            idle.pop()
        if idle:
            connection = idle.pop()
        else:
            connection = await stack.enter_async_context(Connection(way.port))
        answers.append(await way.ask(connection, prompt, tokens))
        idle.append(connection)
        return answers[-1]

    load, started, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    try:
        async with AsyncExitStack() as stack:
            await WORKLOADS[name](work, ask)
    finally:
        health.cancel()
        await asyncio.wait([health])
    seconds = max(a.arrivals[-1] for a in answers) - started
    cpu = time.process_time() - cpu
    if not health.cancelled():
        health.result()  # raises what ended it
    firsts = [a.arrivals[0] - a.sent for a in answers]
    gaps = [gap for a in answers for gap in a.gaps()]
    all_running = max(a.arrivals[0] for a in answers)
    turns = sorted({answer.turn for answer in answers})
    by_turn = [[a.arrivals[0] - a.sent for a in answers if a.turn == n] for n in turns]
    steady = [gap for a in answers for gap in a.gaps(all_running)]
    return {
        "way": way.name,
        "workload": name,
        "clients": work.clients,
        "tokens_per_s": sum(a.tokens for a in answers) / seconds,
        "first_token_p50_s": percentile(firsts, 50),
        "first_token_p99_s": percentile(firsts, 99),
        **{f"turn_{n + 1}_p50_s": percentile(by_turn[n], 50) for n in turns[1:]},
        "between_tokens_p50_s": percentile(gaps, 50),
        "between_tokens_p99_s": percentile(gaps, 99),
        "between_tokens_worst_s": max(gaps, default=None),
        # Once every answer of the level has begun: decoding only.
        "steady_p50_s": percentile(steady, 50),
        "steady_p99_s": percentile(steady, 99),
        "health_worst_s": max(waits),
        "memory_gib": peak_memory(way.pid),
        "gpu_memory_gib": gpu_memory(),
        "prompt_tokens": sum(a.prompt_tokens for a in answers),
        "started": started,
        "seconds": seconds,
        "client_cpu": cpu / seconds,
        "load_average": load,
    }


async def measure(ways: list[Way], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs. Ways take turns where both fit in memory: load that other programs
    put on the machine then meets both."""
    make, runs = prompt_maker(options.model, options.seed), []
    groups = [[way] for way in ways] if options.device != "cpu" else [ways]
    one = options.prompt_tokens, options.new_tokens, make
    for group in groups:
        if options.cold:
            drop_from_page_cache(options.model)
        async with AsyncExitStack() as stack:
            for way in group:
                await stack.enter_async_context(way.running())
                warm_up = Workload(1, 1, *one, random.Random(0))
                await run_level(way, "equal", warm_up)
            names = " and ".join(way.name for way in group)
            print(f"{names}: ready, a line follows each measurement", file=sys.stderr)
            for repeat, (name, own) in product(range(options.repeat), options.workload):
                for clients, way in product([own] if own else options.clients, group):
                    levels = [own, *way.levels]
                    if clients in levels and name in way.workloads:
                        # Each way gets the same lengths, with words of its own.
                        chances = random.Random(f"{options.seed} {name} {clients}")
                        size = clients, max(clients, options.requests)
                        work = Workload(*size, *one, chances, options.spread)
                        runs.append(await run_level(way, name, work))
                        runs[-1]["repeat"] = repeat
                        print(progress(runs[-1]), file=sys.stderr)
    return runs


def progress(run: dict[str, Any]) -> str:
    line = "{way}, {workload}, {clients} clients: {tokens_per_s:.1f} tokens/s"
    return line.format(**run)


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a way and level: medians over the repeats, but the worst of the worst."""
    rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        kind = run["way"], run["workload"], run["clients"]
        rows.setdefault(kind, []).append(run)
    table = [combine(results, runs) for runs in rows.values()]
    rates = {(r["way"], r["clients"]): r["tokens_per_s"] for r in table}
    one_at_a_time = [rate for (way, _), rate in rates.items() if way == TUTORIAL]
    for row in table:
        base = rates.get((TUTORIAL, row["clients"]), max(one_at_a_time, default=None))
        row["ratio"] = row["tokens_per_s"] / base if base else None
    order = [*WORKLOADS]
    return sorted(
        table,
        key=lambda r: (
            order.index(r["workload"]),
            r["clients"],
            r["way"] != TUTORIAL,
        ),
    )


def combine(results: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    row = {name: runs[0][name] for name in ("way", "workload", "clients")}
    for name, value in runs[0].items():
        if name not in row:
            values = [run[name] for run in runs if run[name] is not None]
            worst = "worst" in name or "memory" in name
            row[name] = (max if worst else median)(values) if values else value
    found = results["machine"]
    if found["device"] == "cuda":
        bfloat16 = results["options"]["dtype"] != "float32"  # as the rates are
        if bfloat16 and row["workload"] == "equal":
            row["limit_tokens_per_s"] = card_limit(results, row["clients"])
        if step := row["between_tokens_p50_s"]:
            row["gb_per_s"] = results["weight_bytes"] / step / 1e9
            row["share_of_copy"] = row["gb_per_s"] * 1e9 / found["copy_bytes_per_s"]
    return row


def card_limit(results: dict[str, Any], clients: int) -> float:
    """Tokens/s if the GPU did nothing but multiply at its measured rate and read the
    weights at its measured copy bandwidth; attention and the KV cache cost extra."""
    found, options = results["machine"], results["options"]
    shortest, longest = options["prompt_tokens"]
    low, high = math.log(shortest), math.log(longest)
    mean = (longest - shortest) / (high - low) if longest > shortest else shortest
    flop_per_token = results["weight_bytes"]  # 2 for each weight of 2 bytes
    prefill = mean * flop_per_token / found["matmul_flop_per_s"]
    reading = results["weight_bytes"] / found["copy_bytes_per_s"]
    multiplying = clients * flop_per_token / found["matmul_flop_per_s"]
    decode = options["new_tokens"] * max(reading, multiplying)
    return clients * options["new_tokens"] / (clients * prefill + decode)


# ------------------------------------------------------------------------------
# Showing
# ------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, float, str]] = {  # title: field, factor, format
    "tokens/s": ("tokens_per_s", 1, ".1f"),
    "ratio": ("ratio", 1, ".2f"),
    "first p50 ms": ("first_token_p50_s", 1000, ".0f"),
    "p99": ("first_token_p99_s", 1000, ".0f"),
    "gap p50 ms": ("between_tokens_p50_s", 1000, ".1f"),
    "p99 ": ("between_tokens_p99_s", 1000, ".1f"),
    "worst": ("between_tokens_worst_s", 1000, ".0f"),
    **{f"turn {n}": (f"turn_{n}_p50_s", 1000, ".0f") for n in range(2, TURNS + 1)},
    "/health ms": ("health_worst_s", 1000, ".0f"),
    "RAM GiB": ("memory_gib", 1, ".2f"),
    "GPU GiB": ("gpu_memory_gib", 1, ".1f"),
    "GB/s": ("gb_per_s", 1, ".0f"),
    "of copy": ("share_of_copy", 1, ".0%"),
}
RATIOS = {  # title: field
    "tokens/s": "tokens_per_s",
    "first token": "first_token_p50_s",
    "worst /health": "health_worst_s",
    "RAM": "memory_gib",
    "GPU memory": "gpu_memory_gib",
}


def describe(results: dict[str, Any]) -> str:
    """The machine, the model and the work in one line."""
    found, options = results["machine"], results["options"]
    hardware = found.get("name") or f"{found['cpu']}, {found['cores']} cores"
    shortest, longest = options["prompt_tokens"]
    lengths = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    work = f"prompts of {lengths} tokens, {options['new_tokens']} new"
    dtypes = results.get("dtypes", {})
    both = " and ".join(f"{dtype} ({way})" for way, dtype in dtypes.items())
    dtype = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else both
    dtype = f" in {dtype}" if dtype else ""
    return f"{results['model']}{dtype} on {hardware}; {work}"


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results as lines of text; columns that nobody has a value for are left out."""
    rows = results["table"]
    columns = [c for c in COLUMNS.items() if any(r.get(c[1][0]) for r in rows)]
    yield f"{describe(results)}, median of {results['options']['repeat']}"
    titles = "".join(f"{title.strip():>13}" for title, _ in columns)
    yield f"{'clients':>7}  {'way':11}  {'workload':11}{titles}"
    for row in rows:
        cells = ""
        for _, (name, factor, style) in columns:
            value = row.get(name)
            cells += f"{'-' if value is None else format(value * factor, style):>13}"
        yield f"{row['clients']:>7}  {row['way']:11}  {row['workload']:11}{cells}"
    yield from ratios(rows)


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """This server as a multiple of the tutorial's way, a line for each level."""
    bases = {row["clients"]: row for row in rows if row["way"] == TUTORIAL}
    for row in rows:
        base = bases.get(row["clients"], {})
        if row["way"] == SERVER and row["workload"] == "equal" and base:
            parts = [
                f"{title} {row[name] / base[name]:.3g}"
                for title, name in RATIOS.items()
                if row.get(name) and base.get(name)
            ]
            yield f"{SERVER} / {TUTORIAL}, {row['clients']} clients: {', '.join(parts)}"


def draw(source: Path, target: Path) -> None:
    """Draw tokens/s over clients from a results file; or how much faster this server is
    from a file that has figures of another beside its own."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    results = json.loads(source.read_text())
    if "beside" in results:
        return draw_beside(results, target)
    rows = [r for r in results["table"] if r.get("workload", "equal") == "equal"]
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    styles = {
        "limit": ("limit_tokens_per_s", "the card's limit", "--", "0.55"),
        SERVER: ("tokens_per_s", SERVER, "-", "tab:blue"),
        TUTORIAL: ("tokens_per_s", "the tutorial's way", "-", "tab:red"),
    }
    limited = any("limit_tokens_per_s" in row for row in rows)
    for way, (name, label, line, color) in styles.items():
        shown = SERVER if way == "limit" else way
        points = [
            (row["clients"], row[name])
            for row in rows
            if row["way"] == shown and row.get(name)
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), line, marker="o", color=color, label=label
            )
        last = results["options"]["clients"][-1]
        if way == TUTORIAL and points and points[-1][0] < last:  # one at a time
            axes.plot((points[-1][0], last), (points[-1][1],) * 2, ":", color=color)
        for x, y in points:
            others = [
                row[name]
                for row in rows
                if row["clients"] == x and row["way"] != shown and row.get(name)
            ]
            under = y < max(others, default=0) or (way == SERVER and limited)
            above = 0, -16 if under else 8
            text = f"{y:.0f}" if y >= 100 else f"{y:.1f}"
            axes.annotate(
                text,
                (x, y),
                above,
                textcoords="offset points",
                ha="center",
                color=color,
            )
    clients = results["options"]["clients"]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(clients, [str(number) for number in clients])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2, high * 2)
    axes.margins(x=0.08)
    axes.set_xlabel("clients at the same time")
    axes.set_ylabel("new tokens per second, all clients together")
    axes.set_title(describe(results).replace("; ", "\n"), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target)


def draw_beside(results: dict[str, Any], target: Path) -> None:
    """Draw a bar for each workload: times as fast as the other server, which is 1."""
    from matplotlib.figure import Figure

    rows = results["beside"][::-1]
    figure = Figure(figsize=(8, 0.8 + 0.34 * len(rows)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        faster = row["ours"] / row["theirs"]
        if row["unit"] != "tokens/s":  # a time
            faster = 1 / faster
        color = "tab:blue" if faster >= 1 else "tab:orange"
        axes.barh(y, faster - 1, left=1, height=0.6, color=color)
        text = f"{row['ours']:,} against {row['theirs']:,} {row['unit']}"
        axes.annotate(
            text,
            (max(faster, 1), y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["workload"] for row in rows])
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.95), high + 0.4 * (high - low))
    axes.set_xlabel("times as fast (1.0: equal)")
    figure.suptitle(results["title"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


# ------------------------------------------------------------------------------
# Entry point
# ------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return sorted(set(found))


def kinds(text: str) -> list[tuple[str, int]]:
    """`mix,chats:32`: names, and clients where they are not --clients (then 0)."""
    parts = [part.partition(":") for part in text.split(",")]
    if not {name for name, *_ in parts} <= {*WORKLOADS}:
        raise ValueError
    return [(name, int(clients or 0)) for name, _, clients in parts]


def length_range(text: str) -> tuple[int, int]:
    shortest, _, longest = text.partition("-")
    found = int(shortest), int(longest or shortest)
    if not 1 <= found[0] <= found[1]:
        raise ValueError
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure this server beside the tutorial's way, over HTTP.",
        epilog="Arguments after -- are settings for api.py.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder of a model")
    which.add_argument("--demo", action="store_true", help="the small demo model")
    which.add_argument(
        "--random", type=Path, help="phi-4's shape with random weights, made here"
    )
    which.add_argument(
        "--chart", type=Path, nargs=2, metavar=("JSON", "PNG"), help="draw, do not run"
    )
    add = parser.add_argument
    add("--clients", type=numbers, default=[1, 4, 16], help="default: 1,4,16")
    add("--tutorial-clients", type=numbers, help="the tutorial's; default: the same")
    add("--skip-tutorial", action="store_true")
    add("--requests", type=int, default=16, help="per level; at least 1 a client")
    names = ", ".join(WORKLOADS)
    what = f"of {names}, with clients as in chats:32; default: equal"
    add("--workload", type=kinds, default=[("equal", 0)], help=what)
    add("--seed", type=int, default=SEED, help="of lengths and words")
    add("--port", type=int, default=0, help="measure a server that runs there already")
    add("--served-model", help="its name for the model")
    add("--new-tokens", type=int, default=48, help="of each answer; default: 48")
    add(
        "--prompt-tokens",
        type=length_range,
        default=(20, 2000),
        help="N, or N-M for a mix; default: 20-2000",
    )
    add("--spread", type=float, default=0, help="seconds over which clients begin")
    add("--repeat", type=int, default=3, help="the median is shown; default: 3")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="auto, bfloat16 or float32")
    add("--threads", type=int, default=0, help="of each server; default: torch's")
    add("--gpus", type=int, default=1, help="of this server, through torchrun")
    add("--gpu-gib", type=float, default=0, help="of each GPU, for this server")
    add("--steps", type=Path, help="a log of every step, which steps.py reads")
    add("--cold", action="store_true", help="load from disk, not from memory")
    add("--out", type=Path, default=Path("results.json"))
    add("server", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def ways_to_measure(options: argparse.Namespace) -> list[Way]:
    common = ["--model", str(options.model), "--device", options.device]
    common += ["--dtype", options.dtype]
    new_tokens = ["--new-tokens", str(options.new_tokens)]
    server = ["--host", "127.0.0.1", *options.server]
    if options.gpu_gib:
        server += ["--gpu-gib", str(options.gpu_gib)]
    if options.steps:
        server += ["--steps", str(options.steps)]
    levels = options.tutorial_clients or options.clients
    ways = [
        Way(TUTORIAL, ["tutorial", *common, *new_tokens], ask_tutorial, levels, 0),
        Way(SERVER, ["endless", *common, *server], ask_server, options.clients, 0),
    ]
    for way in ways:
        way.threads = options.threads
    ways[1].workloads = [*WORKLOADS]
    if options.port:  # a server that may want to know these
        more = {"model": options.served_model, "ignore_eos": True}
        ways[1].ask, ways[1].port = partial(ask_server, **more), options.port
    ways[1].gpus = options.gpus
    return ways[1:] if options.skip_tutorial or options.port else ways


def main(arguments: list[str]) -> None:
    """Measure, print the table, write the JSON; or draw the chart of an earlier run."""
    options = parse(arguments)
    if options.chart:
        return draw(*options.chart)
    if options.demo:
        import model_download

        options.model = model_download.demo_model()
    if options.random:
        make_random(options.random)
        options.model = options.random
    found = machine(options.device)
    if options.device == "auto":
        options.device = found["device"]
    ways = ways_to_measure(options)
    results = {
        "machine": found,
        "model": options.model.resolve().name,
        "weight_bytes": weight_bytes(options.model, options.dtype),
        "options": {
            name: value
            for name, value in vars(options).items()
            if not isinstance(value, Path)
        },
        "runs": asyncio.run(measure(ways, options)),
        "ready_seconds": {way.name: way.ready_seconds for way in ways},
        "dtypes": {way.name: way.dtype for way in ways},
    }
    results["table"] = summary(results)
    options.out.write_text(json.dumps(results, indent=1))
    print(*table(results), sep="\n")


ROLES = {"tutorial": serve_tutorial, "endless": serve_endless, "device": print_device}

if __name__ == "__main__":
    try:
        ROLES.get(sys.argv[1], lambda _: main(sys.argv[1:]))(sys.argv[2:])
    except BenchmarkError as error:
        sys.exit(str(error))
