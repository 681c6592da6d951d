# SPDX-License-Identifier: MIT
"""Every way found to kill, hang or leak the engine, and the guard against it."""

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import tiny
import torch
import transformers
from net import DEADLINE
from server import Running, running, wait_until
from transformers.integrations import sdpa_attention

import api
import model_download

PROMPTS = [
    f"{n}: " + "tell me about the number " * (n % 5) + str(n * n) for n in range(32)
]


def answer(server: Running, **body: Any) -> str:
    response = server.post(**body)
    assert response.status_code == 200, response.text
    return response.json()["response"]


def still_serves(server: Running) -> None:
    """The engine gives the answer it gave before, and holds nothing afterwards."""
    wait_until(lambda: server.engine.status == "ok")
    assert len(answer(server, prompt="still there?", max_new_tokens=5)) > 0
    assert not server.ended  # nor did it end the process to get there
    wait_until(server.idle)


def submit(
    server: Running, monkeypatch: pytest.MonkeyPatch, tokens: list[Any]
) -> requests.Response:
    """A request whose prompt is these tokens, past the wire format and the template."""
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "template", lambda *_: tokens)
        return server.post(max_new_tokens=4)


@contextlib.contextmanager
def in_flight(server: Running, count: int = 1, **body: Any) -> Iterator[list[Any]]:
    """Requests that have begun to be answered; gives their futures."""
    body = {"prompt": "count", "max_new_tokens": 400, **body}
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(server.post, **body) for _ in range(count)]
        wait_until(lambda: len(server.engine.pending) == count)
        scheduler = server.engine.manager.batch_processor.scheduler
        wait_until(lambda: len(scheduler.active_requests) == count)
        yield futures


# Right answers


def reference(folder: Path, turns: list[list[dict]], new: int) -> list[list[int]]:
    """Greedy float32 answers of `model.generate`, one prompt at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    greedy = transformers.GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
    )
    answers = []
    for turn in turns:
        ids = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, generation_config=greedy)
        answers.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return answers


def engine_answers(
    server: Running, turns: list[list[dict]], new: int
) -> list[list[int]]:
    """The same from the engine, all in flight at once, as token ids."""
    seen: dict[str, list[int]] = {}
    engine, together = server.engine, [0]
    router = engine.manager.output_router
    deliver = router.deliver_batch
    scheduler = engine.manager.batch_processor.scheduler

    def spy(outputs: list[Any]) -> None:
        together.append(len(scheduler.active_requests))
        seen.update({each.request_id: [*each.generated_tokens] for each in outputs})
        deliver(outputs)

    async def ask(turn: list[dict]) -> list[int]:
        *history, last = turn
        body = api.ChatRequest(
            prompt=last["content"], history=history, max_new_tokens=new
        )
        answer = api.Answer("test", None)
        await engine.submit(body, answer)
        while not answer.finish_reason:
            await answer.more()
        return seen[answer.id]

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*map(ask, turns))

    router.deliver_batch = spy
    try:
        answers = server.call(all_at_once())
    finally:
        router.deliver_batch = deliver
    assert max(together) == len(turns)
    return answers


def test_greedy_answers_equal_generate(tiny_folder: Path) -> None:
    turns = [[{"role": "user", "content": p}] for p in PROMPTS]
    expected = reference(tiny_folder, turns, 24)
    with running(model=tiny_folder, max_in_flight=32) as server:
        assert engine_answers(server, turns, 24) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@pytest.mark.demo
def test_demo_answers_equal_generate(demo_folder: Path) -> None:
    turns = [[{"role": "user", "content": p}] for p in PROMPTS]
    with running(demo=True, max_in_flight=32) as server:
        assert engine_answers(server, turns, 24) == reference(demo_folder, turns, 24)
        done = server.post("What is the capital of France?").json()
        assert "Paris" in done["response"]
        health = requests.get(server.url + "/health", timeout=5).json()
        assert health["model"].startswith(model_download.DEMO_NAME)
        assert "demo" in requests.get(server.url + "/openapi.json", timeout=5).text


def test_no_key_is_copied_for_the_heads_that_share_it(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library's attention does by itself, in several times the time."""

    def copied(*_: Any) -> None:
        raise AssertionError("a copy of the keys")

    for name in ("repeat_kv", "pack_gqa"):
        monkeypatch.setattr(sdpa_attention, name, copied)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = pool.map(lambda n: server.post(f"{n}", max_new_tokens=8), range(4))
        assert [answer.status_code for answer in asked] == [200] * 4


# What would kill the generation thread


@pytest.mark.parametrize("tokens", [[290], [-1], [5, 10**9], [], ["a"], [None]])
def test_ids_the_model_cannot_embed_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch, tokens: list
) -> None:
    thread = server.engine.manager._generation_thread
    assert submit(server, monkeypatch, tokens).status_code == 500
    still_serves(server)
    assert server.engine.manager._generation_thread is thread


def test_a_token_that_the_tokenizer_does_not_know_is_no_text(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_model(tmp_path, eos="never")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) + 7, 0] = tiny.CERTAIN
    model.save_pretrained(tmp_path)
    with running(model=tmp_path) as padded:
        response = padded.post(max_new_tokens=4)
        assert response.json()["response"] == ""
        assert response.headers["X-Completion-Tokens"] == "4"


def test_more_tokens_than_the_cache_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = server.engine.manager._generation_thread
    assert submit(server, monkeypatch, [5] * 600).status_code == 400
    assert submit(server, monkeypatch, [5] * 509).status_code == 400
    assert submit(server, monkeypatch, [5] * 508).status_code == 200
    assert server.engine.manager._generation_thread is thread
    still_serves(server)


def test_the_cache_can_be_smaller_than_the_context(tiny_folder: Path) -> None:
    with running(model=tiny_folder, cache_tokens=256) as server:
        refused = server.post("x" * 300)
        assert refused.status_code == 400
        assert "256" in refused.json()["detail"] and "307" in refused.json()["detail"]
        filled = server.post("x" * 200, max_new_tokens=256 - 207)
        assert filled.headers["X-Completion-Tokens"] == "49"
        still_serves(server)


def test_requests_that_fill_the_cache_wait_for_each_other(tiny_folder: Path) -> None:
    with running(model=tiny_folder, cache_tokens=256, prefix_sharing=False) as server:
        alone = [
            answer(server, prompt=f"{n}" * 150, max_new_tokens=90) for n in range(4)
        ]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            jobs = [
                pool.submit(answer, server, prompt=f"{n}" * 150, max_new_tokens=90)
                for n in range(4)
            ]
            assert [job.result() for job in jobs] == alone
        still_serves(server)


def test_same_request_id_twice_at_once(server: Running) -> None:
    def post() -> requests.Response:
        return requests.post(
            server.url,
            json={"prompt": "twin", "max_new_tokens": 50},
            headers={"X-Request-ID": "twin"},
            timeout=DEADLINE,
        )

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(post), pool.submit(post)
        assert first.result().json()["response"] == second.result().json()["response"]
    assert first.result().headers["X-Request-ID"] == "twin"


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 1},
        {"temperature": 1e-9},
        {"temperature": 5e-324},
        {"temperature": 2, "top_k": 1024, "top_p": 1e-9},
        {"temperature": 0.5, "top_k": 0, "top_p": 1},
    ],
)
def test_every_legal_sampling_value_is_survived(
    server: Running, sampling: dict
) -> None:
    thread = server.engine.manager._generation_thread
    assert answer(server, prompt="dice", max_new_tokens=5, **sampling)
    assert server.engine.manager._generation_thread is thread


# Cancelling


def leave(server: Running, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps of the engine that a client's answer took although the client left."""
    manager = server.engine.manager
    forward, before = manager.model.forward, manager.current_batch

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)  # so that 490 tokens take long enough to be cancelled
        return forward(*args, **kwargs)

    monkeypatch.setattr(manager.model, "forward", slowly)
    with pytest.raises(requests.ReadTimeout):
        requests.post(
            server.url, json={"prompt": "go", "max_new_tokens": 490}, timeout=0.2
        )
    wait_until(server.idle)
    return manager.current_batch - before


def test_a_client_that_leaves_frees_its_slot(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert leave(server, monkeypatch) < 400
    assert server.engine.manager.output_router.output_queue.empty()
    monkeypatch.undo()
    still_serves(server)


def test_a_lost_cancel_is_sent_again(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that overtakes its own add is lost inside the library."""
    cancel, lost = server.engine.manager.cancel_request, []

    def lossy(request_id: str) -> None:
        if request_id in lost:
            cancel(request_id)
        lost.append(request_id)

    monkeypatch.setattr(server.engine.manager, "cancel_request", lossy)
    assert leave(server, monkeypatch) < 400
    assert lost
    monkeypatch.undo()
    still_serves(server)


# A generation thread that dies, hangs or is told to stop


@pytest.fixture
def fragile(tiny_folder: Path) -> Iterator[Running]:
    with running(model=tiny_folder, stall_timeout=1) as server:
        yield server


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("boom")]
)
def test_forward_raises(
    fragile: Running,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = answer(fragile, prompt="again", max_new_tokens=8)
    model = fragile.engine.manager.model
    thread = fragile.engine.manager._generation_thread
    with in_flight(fragile, 3) as futures:

        def forward(*args: Any, **kwargs: Any) -> None:
            monkeypatch.undo()
            raise error

        monkeypatch.setattr(model, "forward", forward)
        replies = [future.result() for future in futures]
    assert [reply.status_code for reply in replies] == [503] * 3
    assert all(reply.headers["Retry-After"] == "1" for reply in replies)
    still_serves(fragile)
    assert not thread.is_alive()  # joined, not left behind
    assert str(error) in caplog.text  # the log says why
    assert answer(fragile, prompt="again", max_new_tokens=8) == before


def test_thread_ends_without_an_error(fragile: Running) -> None:
    """A stop leaves no fatal error: liveness is more than that."""
    with in_flight(fragile) as futures:
        fragile.engine.manager.background_thread_status.request_stop(2, 0)
        assert futures[0].result().status_code == 503
    still_serves(fragile)


def test_request_that_the_dying_thread_never_saw(
    fragile: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put in after the loop's end it would wait for ever."""
    manager = fragile.engine.manager
    with (
        monkeypatch.context() as patch,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        patch.setattr(manager, "add_request", lambda tokens, name, *a, **k: name)
        future = pool.submit(fragile.post)
        wait_until(lambda: fragile.engine.pending)
        manager.background_thread_status.request_stop(2, 0)
        assert future.result().status_code == 503
    still_serves(fragile)


def test_refused_by_a_stopping_thread(
    fragile: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragile.engine.manager, "add_request", lambda *a, **k: None)
    assert fragile.post().status_code == 503
    monkeypatch.undo()
    still_serves(fragile)


def test_health_is_503_while_down(
    fragile: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down is from the end of the thread until it has been joined and started again."""
    manager, go_on = fragile.engine.manager, threading.Event()
    join = manager.join

    def slow_join(*args: Any) -> None:
        go_on.wait(DEADLINE)
        join(*args)

    def health() -> requests.Response:
        return requests.get(fragile.url + "/health", timeout=5)

    with monkeypatch.context() as patch:
        patch.setattr(manager, "join", slow_join)
        manager.background_thread_status.request_stop(2, 0)
        wait_until(lambda: not health().ok)
        assert (health().status_code, health().json()["status"]) == (503, "down")
        refused = fragile.post()
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        go_on.set()
        wait_until(lambda: health().ok)
    still_serves(fragile)


def test_hanging_forward_ends_the_process(
    fragile: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = concurrent.futures.Future()
    monkeypatch.setattr(
        fragile.engine.manager.model, "forward", lambda *a, **k: release.result()
    )
    try:
        assert fragile.post().status_code == 503
        wait_until(lambda: fragile.ended == [api.EXIT_ENGINE])
    finally:
        release.set_exception(RuntimeError("released"))


def test_stop_leaves_nothing_running(tiny_folder: Path) -> None:
    with running(model=tiny_folder) as server:
        thread = server.engine.manager._generation_thread
        assert thread.is_alive()
    assert not thread.is_alive()


# Settings that reach the engine


@pytest.mark.parametrize("shared", [True, False])
def test_prefix_sharing(tiny_folder: Path, shared: bool) -> None:
    """Switched off, it computes a beginning again that somebody has sent before."""
    computed: list[int] = []  # tokens of each forward pass

    def note(_: Any, args: Any, options: dict[str, Any]) -> None:
        computed.append(options["input_ids"].shape[1])

    with running(model=tiny_folder, prefix_sharing=shared) as server:
        model = server.engine.manager.model
        model.register_forward_pre_hook(note, with_kwargs=True)
        history = [{"role": "user", "content": "y" * 200}]
        first = answer(server, prompt="a", history=history, max_new_tokens=8)
        before = sum(computed)
        assert answer(server, prompt="a", history=history, max_new_tokens=8) == first
        spared = before - (sum(computed) - before)
    assert spared > 150 if shared else spared == 0


def test_explicit_sizes_on_a_cpu(server: Running) -> None:
    config = server.engine.manager.continuous_batching_config
    assert (config.page_size, config.num_blocks) == (16, 16384 // 16)
    assert config.max_batch_tokens == 256
    assert config.max_requests_per_batch == server.engine.rows == 16
