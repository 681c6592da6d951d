# SPDX-License-Identifier: MIT
"""The engine gives the library's answers, and survives every request that could harm it."""

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


def submit(
    server: Running, monkeypatch: pytest.MonkeyPatch, tokens: list[Any]
) -> requests.Response:
    """A request whose prompt is these tokens, past the wire format and the template."""
    with monkeypatch.context() as patch:
        server.replace(patch, "apply_template", lambda *_: tokens)
        return server.post(max_new_tokens=4)


# ------------------------------------------------------------------------------
# Right answers
# ------------------------------------------------------------------------------


def reference(
    folder: Path, new: int, prompts: list[str], at_once: int = 1
) -> list[list[int]]:
    """Greedy float32 answers of `model.generate` to so many prompts at once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ends = model.generation_config.eos_token_id
    greedy = transformers.GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = []
    for first in range(0, len(prompts), at_once):
        ids = tokenizer.apply_chat_template(
            [
                [{"role": "user", "content": p}]
                for p in prompts[first : first + at_once]
            ],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**ids, generation_config=greedy)
        for row in out[:, ids["input_ids"].shape[1] :].tolist():
            length = next((n for n, token in enumerate(row, 1) if token in ends), new)
            answers.append(row[:length])
    return answers


def engine_answers(served: Running, new: int, prompts: list[str]) -> list[list[int]]:
    """The same from the engine, all in flight at once, as token ids."""
    seen: dict[str, list[int]] = {}
    together = 0

    def note(outputs: list[Any]) -> None:
        nonlocal together
        together = max(together, len(served.active))
        seen.update({each.request_id: [*each.generated_tokens] for each in outputs})
        deliver(outputs)

    with pytest.MonkeyPatch.context() as patch, served.gate as gate:
        deliver = served.replace(patch, "deliver_batch", note)
        gate.close()
        path = "/v1/chat/completions"  # its answers tell the engine's name of them
        asked = [served.submit(p, path, max_tokens=new) for p in prompts]
        served.wait_pending(len(prompts))
        gate.allow()
        names = [each.result().json()["id"] for each in asked]
    assert together == len(prompts)
    return [seen[name] for name in names]


def test_greedy_answers_equal_generate(tiny_folder: Path) -> None:
    with tiny.one_thread():
        expected = reference(tiny_folder, 24, PROMPTS)
    with running(model=tiny_folder, max_in_flight=32) as server:
        assert engine_answers(server, 24, PROMPTS) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@pytest.mark.demo
def test_demo_answers_equal_generate(demo_folder: Path) -> None:
    prompts = PROMPTS[:10]  # each token takes a second of a processor for all 32
    with running(demo=True, max_in_flight=32) as server:
        expected = reference(demo_folder, 16, prompts, at_once=len(prompts))
        assert engine_answers(server, 16, prompts) == expected
        assert "Paris" in server.answer("What is the capital of France?")
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
    assert server.works()


# ------------------------------------------------------------------------------
# What would kill the generation thread
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[290], [-1], [5, 10**9], [], ["a"], [None]])
def test_ids_the_model_cannot_embed_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch, tokens: list
) -> None:
    thread = server.thread
    assert submit(server, monkeypatch, tokens).status_code == 500
    assert server.works()
    assert server.thread is thread


def test_a_token_that_the_tokenizer_does_not_know_is_no_text(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_model(tmp_path, eos="never")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    with torch.no_grad():
        # The new rows are random, and not by the seed: feature 0 carries the bias.
        model.model.embed_tokens.weight[len(tokenizer) :, 0] = 1.0
        model.lm_head.weight[len(tokenizer) :] = 0.0
        model.lm_head.weight[len(tokenizer) :, 0] = tiny.IMPOSSIBLE
        model.lm_head.weight[len(tokenizer) + 7, 0] = tiny.CERTAIN
    model.save_pretrained(tmp_path)
    with running(model=tmp_path) as padded:
        response = padded.post(max_new_tokens=4)
        assert response.json()["response"] == ""
        assert response.headers["X-Completion-Tokens"] == "4"


def test_more_tokens_than_the_cache_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = server.thread
    assert submit(server, monkeypatch, [5] * 600).status_code == 400
    assert submit(server, monkeypatch, [5] * 509).status_code == 400
    assert submit(server, monkeypatch, [5] * 508).status_code == 200
    assert server.thread is thread
    assert server.works()


def test_the_cache_can_be_smaller_than_the_context(tiny_folder: Path) -> None:
    with running(model=tiny_folder, cache_tokens=256) as server:
        refused = server.post("x" * 300)
        assert refused.status_code == 400
        assert "256" in refused.json()["detail"] and "307" in refused.json()["detail"]
        filled = server.post("x" * 200, max_new_tokens=256 - 207)
        assert filled.headers["X-Completion-Tokens"] == "49"
        assert server.works()


def test_requests_that_fill_the_cache_wait_for_each_other(tiny_folder: Path) -> None:
    with running(model=tiny_folder, cache_tokens=256, prefix_sharing=False) as server:
        prompts = [f"{n}" * 150 for n in range(4)]
        alone = [server.answer(prompt, max_new_tokens=90) for prompt in prompts]
        asked = [server.submit(prompt, max_new_tokens=90) for prompt in prompts]
        assert [each.result().json()["response"] for each in asked] == alone
        assert server.works()


def test_two_clients_may_choose_the_same_request_id(server: Running) -> None:
    """It is theirs: the engine keeps two requests in flight apart."""

    def post(prompt: str) -> requests.Response:
        body, headers = (
            {"prompt": prompt, "max_new_tokens": 9},
            {"X-Request-ID": "twin"},
        )
        return requests.post(server.url, json=body, headers=headers, timeout=DEADLINE)

    prompts = "one", "the other"
    alone = [server.answer(prompt, max_new_tokens=9) for prompt in prompts]
    with server.gate as gate:
        gate.close()
        asked = [server.clients.submit(post, prompt) for prompt in prompts]
        server.wait_pending(2)
    assert [each.result().json()["response"] for each in asked] == alone != alone[::-1]
    assert [each.result().headers["X-Request-ID"] for each in asked] == ["twin"] * 2


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
    thread = server.thread
    assert server.answer("dice", max_new_tokens=5, **sampling)
    assert server.thread is thread


def test_stop_leaves_nothing_running(tiny_folder: Path) -> None:
    with running(model=tiny_folder) as server:
        thread = server.thread
        assert thread.is_alive()
    assert not thread.is_alive()


# ------------------------------------------------------------------------------
# Settings that reach the engine
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_prefix_sharing(tiny_folder: Path, shared: bool) -> None:
    """Switched off, it computes a beginning again that somebody has sent before."""
    with running(model=tiny_folder, prefix_sharing=shared) as server:
        history = [{"role": "user", "content": "y" * 200}]
        body = {"prompt": "a", "history": history, "max_new_tokens": 8}
        computed = server.gate.tokens
        first, before = server.answer(**body), sum(computed)
        assert server.answer(**body) == first
        spared = before - (sum(computed) - before)
    assert spared > 150 if shared else spared == 0


@pytest.mark.parametrize(
    ("gib", "places"),
    [(0, 16), (15, 32), (24, 64), (47.5, 128), (79.2, 256), (141, 256)],
)
def test_places_follow_from_the_memory_of_the_gpu(gib: float, places: int) -> None:
    settings = api.Settings()
    settings.resolve(gib)
    assert (settings.max_in_flight, settings.max_waiting) == (places, 2 * places)
    own = api.Settings(max_in_flight=7)
    own.resolve(gib)
    assert own.max_in_flight == 7


def test_what_a_cpu_takes_at_once_by_default(server: Running) -> None:
    """16 requests, and 256 tokens in one forward pass."""
    with server.gate as gate:
        gate.close()
        before = len(gate.tokens)
        asked = [server.submit(f"{n}" * 200, max_new_tokens=30) for n in range(18)]
        server.wait_pending(18)
        gate.allow(20)
        wait_until(lambda: gate.held)
        assert len(server.active) == 16
    assert all(each.result().ok for each in asked)
    assert max(gate.tokens[before:]) == 256
