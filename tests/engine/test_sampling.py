# SPDX-License-Identifier: MIT
"""Sampling: the right distribution, repeatable by seed, and greedy rows untouched."""

import math
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import clients
import pytest
import requests
import torch
from server import running, wait_until
from transformers.generation.continuous_batching.model_runner import ModelRunner

import api

# Probabilities 0.40, 0.24, 0.15, 0.09 and less; the likeliest is not the first.
LOGITS = torch.tensor([0.0, -0.5, 1.5, 2.0, 0.5, 1.0, -1.2, -1.0])
END = 3  # the token that ends an answer: the likeliest
ONLY_6_AND_7 = dict.fromkeys("012345", -100)
LIKELIEST = LOGITS.argsort(descending=True).tolist()
SAMPLED = {"temperature": 1.0, "max_new_tokens": 48}


def state(
    seed: int,
    position: int,
    prompt: list[int] | None = None,
    answer: list[int] | None = None,
    **sampling: Any,
) -> SimpleNamespace:
    """What the engine knows of a request that has come to this position."""
    body = api.ChatRequest(prompt="x", seed=seed, **sampling)
    return SimpleNamespace(
        logit_processor_kwargs={"sampling": api.Sampling(body, None)},
        position_offset=position,
        initial_tokens=prompt or [],
        generated_tokens=answer or [],
        _true_initial_tokens=0,
        _eos_token_ids=[END],
    )


def choose(batch: list[SimpleNamespace], scores: torch.Tensor) -> list[int]:
    """The tokens that a step of these requests ends with."""
    runner = object.__new__(api.Runner)
    runner.logits = scores
    likeliest = scores.argmax(-1)[None].int()
    runner.inputs_and_outputs = SimpleNamespace(
        requests_in_batch=batch, compute_stream=None, output_ids=likeliest
    )
    with mock.patch.object(ModelRunner, "compute_batch"):
        runner.compute_batch(SimpleNamespace(device=torch.device("cpu")), {})
    return likeliest[0].tolist()


def draw(
    rows: list[tuple[int, int]], logits: torch.Tensor = LOGITS, **sampling: Any
) -> list[int]:
    """One token for each (seed, position)."""
    batch = [
        SimpleNamespace(state=state(*row, **sampling), has_new_token=True)
        for row in rows
    ]
    return choose(batch, logits.repeat(len(rows), 1))


def chi_square(observed: Counter[Any], expected: dict[Any, float]) -> None:
    """Fail if counts differ from their expectations; one in a million would by chance."""
    assert set(observed) <= {key for key, count in expected.items() if count}
    cells = [(observed[key], count) for key, count in expected.items() if count]
    assert min(count for _, count in cells) > 5
    distance = sum((seen - count) ** 2 / count for seen, count in cells)
    free = len(cells) - 1
    # Wilson and Hilferty: the cube root of chi-square is nearly normal.
    limit = free * (1 - 2 / (9 * free) + 4.75 * math.sqrt(2 / (9 * free))) ** 3
    assert distance < limit, (distance, limit, observed, expected)


# ------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"temperature": 1.0}, 8),
        ({"temperature": 0.5}, 8),
        ({"temperature": 2.0}, 8),
        ({"temperature": 1.0, "top_k": 3}, 3),
        ({"temperature": 0.7, "top_k": 1}, 1),
        ({"temperature": 1.0, "top_k": 8}, 8),
        ({"temperature": 1.0, "top_p": 0.6}, 2),  # 0.40 + 0.24 reaches 0.6
        ({"temperature": 1.0, "top_p": 0.65}, 3),
        ({"temperature": 2.0, "top_p": 0.65}, 4),  # temperature comes first
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 2}, 2),
        ({"temperature": 1.0, "top_p": 0.6, "top_k": 5}, 2),
        ({"temperature": 1.0, "top_p": 1e-9}, 1),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 0}, 8),
        ({"temperature": 1.0, "top_p": 0}, 1),
        ({"temperature": 1.0, "top_k": -1}, 8),
        ({"temperature": 1.0, "min_p": 0.2}, 4),  # 0.09 is over 0.2 of 0.40
        ({"temperature": 1.0, "min_p": 0.25}, 3),
        ({"temperature": 2.0, "min_p": 0.25}, 6),  # temperature comes first
        ({"temperature": 1.0, "min_p": 0}, 8),
        ({"temperature": 1.0, "min_p": 1}, 1),
    ],
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_tokens_are_drawn_from_the_softmax(sampling, kept, over):
    count = 6_000
    rows = [(n, 7) if over == "seeds" else (7, n) for n in range(count)]
    likely = (LOGITS / sampling["temperature"]).softmax(-1)[LIKELIEST[:kept]]
    counts = (likely / likely.sum() * count).tolist()
    expected = dict(zip(LIKELIEST, counts, strict=False))
    observed = Counter(draw(rows, **sampling))
    if kept == 1:
        assert observed == {LIKELIEST[0]: count}
    else:
        chi_square(observed, expected)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, -1)])
def test_neighbours_are_independent(step):
    """Of one seed at two positions, of two seeds at one position, and across."""
    count, probabilities = 5_000, LOGITS[:5].softmax(-1).tolist()
    # One long answer and many short ones.
    for here in (
        [(3, n + 1) for n in range(count)],
        [(n, n % 60 + 1) for n in range(count)],
    ):
        there = [(seed + step[0], position + step[1]) for seed, position in here]
        pairs = Counter(
            zip(
                draw(here, LOGITS[:5], temperature=1.0),
                draw(there, LOGITS[:5], temperature=1.0),
                strict=True,
            )
        )
        square = ((a, b) for a in range(5) for b in range(5))
        expected = {
            (a, b): count * probabilities[a] * probabilities[b] for a, b in square
        }
        chi_square(pairs, expected)


def test_a_large_vocabulary_has_no_favourites():
    """phi-4's size, all alike: every part of it is drawn as often as the next."""
    size, count = 100_352, 400
    drawn = [
        token
        for start in range(0, count, 50)
        for token in draw(
            [(n, 5) for n in range(start, start + 50)],
            torch.zeros(size),
            temperature=1.0,
        )
    ]
    chi_square(
        Counter(token * 16 // size for token in drawn),
        dict.fromkeys(range(16), count / 16),
    )
    chi_square(
        Counter(token % 16 for token in drawn), dict.fromkeys(range(16), count / 16)
    )


def test_greedy_rows_pass_through_beside_sampled_ones():
    scores = torch.randn(60, 50, generator=torch.Generator().manual_seed(3))
    kinds = ({}, {"temperature": 2.0}) * 30
    batch = [
        SimpleNamespace(state=state(n, 4, **kind), has_new_token=True)
        for n, kind in enumerate(kinds)
    ]
    chosen, likeliest = choose(batch, scores), scores.argmax(-1).tolist()
    assert chosen[::2] == likeliest[::2]
    assert chosen[1::2] != likeliest[1::2]


def test_rows_without_a_new_token_take_no_place():
    """A prompt in the middle of its prefill is in the batch and has no scores."""
    batch = [
        SimpleNamespace(state=state(1, 4, temperature=1.0), has_new_token=False),
        SimpleNamespace(state=state(2, 4), has_new_token=True),
        SimpleNamespace(state=state(3, 9, temperature=1.0), has_new_token=True),
    ]
    flat = torch.zeros(3, 64)
    assert choose(batch, flat) == [0, *draw([(3, 9)], flat[0], temperature=1.0), 0]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}, {"temperature": 1e-9}],
)
def test_temperature_0_is_greedy(sampling):
    assert draw([(1, n) for n in range(50)], **sampling) == [LIKELIEST[0]] * 50


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (0, 2**32), (0, 2**62), (-1, -2), (0, 2**61 - 1), (-(2**63), 2**63 - 1)],
)
def test_different_seeds_draw_differently(one, other):
    flat = torch.zeros(64)
    rows = [(one, n) for n in range(40)], [(other, n) for n in range(40)]
    assert draw(rows[0], flat, temperature=1.0) != draw(rows[1], flat, temperature=1.0)


def test_without_a_seed_every_request_has_its_own():
    asked = [api.ChatRequest(prompt="x", temperature=1) for _ in range(8)]
    seeds = {api.Sampling(body, None).seed for body in asked}
    assert len(seeds) == 8


# ------------------------------------------------------------------------------
# What is added to the logits
# ------------------------------------------------------------------------------


def next_token(prompt: list[int], answer: list[int], **sampling: Any) -> int:
    """The likeliest token after these, in a batch with one that asks for nothing."""
    position = len(prompt) + len(answer)
    rows = [state(1, position, prompt, answer, **sampling), state(1, 9)]
    batch = [SimpleNamespace(state=each, has_new_token=True) for each in rows]
    token, other = choose(batch, LOGITS.repeat(2, 1))
    assert other == LIKELIEST[0]
    return token


@pytest.mark.parametrize(
    ("prompt", "answer", "sampling", "expected"),
    [
        # From 2.0 for token 3, 1.5 for token 2 and 1.0 for token 5.
        ([3], [], {"presence_penalty": 2}, 3),  # looks at the answer only
        ([], [3], {"presence_penalty": 0.4}, 3),
        ([], [3], {"presence_penalty": 0.6}, 2),
        ([], [3, 3, 3], {"presence_penalty": 0.4}, 3),  # once, however often
        ([], [3, 3, 3], {"frequency_penalty": 0.4}, 2),
        ([], [3], {"frequency_penalty": 0.4}, 3),
        ([], [3, 2], {"presence_penalty": 2, "frequency_penalty": 2}, 5),
        ([], [5], {"presence_penalty": -1.5}, 5),
        ([], [5, 5], {"frequency_penalty": -1}, 5),
        ([3], [], {"repetition_penalty": 1.5}, 2),  # looks at the prompt, too
        ([], [3, 2], {"repetition_penalty": 3}, 5),
        # -1.0 for token 7 becomes -1.5, and -1.2 for token 6 is more.
        ([7], [], {"repetition_penalty": 1.5, "logit_bias": ONLY_6_AND_7}, 6),
        ([], [], {"logit_bias": ONLY_6_AND_7}, 7),
        ([], [], {"logit_bias": {"6": 4}}, 6),
        ([], [], {"logit_bias": {"3": -1}}, 2),
        ([], [], {"logit_bias": {"3": -100, "2": -100}}, 5),
        ([5], [], {"min_tokens": 1}, 2),  # not the end yet
        ([5], [2], {"min_tokens": 1}, 3),
        ([5], [], {"min_tokens": 1, "logit_bias": {"3": 100}}, 2),
        (
            [5],
            [],
            {"min_tokens": 1, "logit_bias": ONLY_6_AND_7 | {"7": -9, "6": -9}},
            7,
        ),
    ],
)
def test_penalties_bias_and_min_tokens(prompt, answer, sampling, expected):
    assert next_token(prompt, answer, **sampling) == expected


# ------------------------------------------------------------------------------
# Through the engine
# ------------------------------------------------------------------------------


def test_same_seed_same_answer_and_another_seed_another(server):
    said = [server.answer("tell me", seed=seed, **SAMPLED) for seed in (1, 1, 2, 3)]
    assert said[0] == said[1]
    assert len(set(said)) == 3
    free = {server.answer("tell me", **SAMPLED) for _ in range(3)}
    assert len(free) == 3
    greedy = {server.answer("tell me", seed=n, max_new_tokens=48) for n in (1, 2)}
    assert len(greedy) == 1


def test_both_routes_draw_alike(server):
    plain = server.answer("tell me", seed=5, **SAMPLED)
    messages = [{"role": "user", "content": "tell me"}]
    body = {"messages": messages, "temperature": 1.0, "max_tokens": 48, "seed": 5}
    openai = server.post(path="/v1/chat/completions", **body).json()
    assert openai["choices"][0]["message"]["content"] == plain


@pytest.mark.parametrize("sharing", [True, False])
def test_a_seed_survives_company_preemption_and_prefix_sharing(
    tiny_folder, server, sharing, monkeypatch
):
    asked = [
        {"prompt": "a prompt that all of them share, " + str(n), "seed": n, **SAMPLED}
        for n in range(16)
    ]
    alone = [server.answer(**body) for body in asked]
    assert len(set(alone)) == 16
    # Room for four of them: the others are thrown out of the cache and come again.
    with running(model=tiny_folder, cache_tokens=512, prefix_sharing=sharing) as small:
        thrown = small.spy(monkeypatch, "offload_requests")
        together = [small.submit(**body) for body in asked]
        assert [each.result().json()["response"] for each in together] == alone
        assert any(done for _, done in thrown)
        wait_until(small.idle)


def test_greedy_answers_are_the_same_beside_sampled_ones_and_cancels(tiny_folder):
    with running(model=tiny_folder, max_in_flight=16, max_waiting=100) as served:
        before = clients.answers(served)
        sampled = [
            served.submit(f"sampled {n}", seed=n, top_p=0.9, **SAMPLED)
            for n in range(8)
        ]
        leaving = served.clients.submit(clients.leave, served, 6)
        assert clients.answers(served) == before
        assert all(one.result().status_code == 200 for one in sampled)
        assert leaving.result()


def test_greedy_answers_are_the_same_in_one_batch_with_sampled_ones(tiny_folder):
    """All of them in the same forward passes, which the test above leaves to chance."""
    with running(model=tiny_folder, max_in_flight=20) as served:
        alone, gate = clients.answers(served), served.gate
        gate.close()
        beside = served.clients.submit(clients.answers, served)
        sampled = [served.submit(f"sampled {n}", seed=n, **SAMPLED) for n in range(8)]
        served.wait_pending(20)
        gate.allow(8)  # every prompt is read, and none of the 40 tokens far
        wait_until(lambda: gate.held)
        states = [*served.scheduled.values()]
        assert len([each for each in states if each.generated_tokens]) == 20
        gate.allow()
        assert beside.result() == alone
        assert all(one.result().ok for one in sampled)


# ------------------------------------------------------------------------------
# Ranges
# ------------------------------------------------------------------------------

WRONG = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", -0.01),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1025),
    ("top_k", 1.5),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("presence_penalty", 2.1),
    ("presence_penalty", "1"),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 11),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", [5]),
    ("min_tokens", -1),
    ("ignore_eos", "yes"),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", "1"),
    ("stop", ""),
    ("stop", ["a"] * 5),
    ("stop", [""]),
    ("stop", 5),
    ("stop", "x" * 257),
    ("stream", "yes"),
    ("max_new_tokens", 0),
    ("max_tokens", 0),
    ("max_tokens", "5"),
    ("max_completion_tokens", 0),
    ("max_completion_tokens", -2),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_what_is_out_of_range_is_refused_by_name(server, field, value):
    openai = "/v1/chat/completions"
    if not field.startswith(("max_tokens", "max_completion")):
        refused = server.post("x", **{field: value})
        assert refused.status_code == 422
        assert field in refused.json()["detail"][0]["loc"]
    if field != "max_new_tokens":
        body = {"messages": [{"role": "user", "content": "x"}], field: value}
        refused = server.post(path=openai, **body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert re.split(r"[.\[]", error["param"])[0] == field in error["message"]
        assert "item" not in error["message"]  # what a validator counts


def test_too_many_stop_strings_are_told_how_many_there_may_be(server):
    body = {"messages": [{"role": "user", "content": "x"}], "stop": ["a"] * 5}
    refused = server.post(path="/v1/chat/completions", **body).json()["error"]
    assert refused["param"] == "stop"
    assert refused["message"] == "stop: has more than 4 entries"
    assert server.post(stop=["a"] * 5).json()["detail"][0]["msg"] in refused["message"]


def test_a_bias_for_a_token_that_there_is_not_is_refused_by_name(server):
    size = server.model.config.vocab_size
    assert server.post(logit_bias={str(size - 1): -1}, max_new_tokens=1).ok
    refused = server.post(logit_bias={str(size): -1})
    assert refused.status_code == 400 and "logit_bias" in refused.json()["detail"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"],
)
def test_numbers_that_are_none_are_refused(server, field, number):
    body = f'{{"prompt": "x", "{field}": {number}}}'
    headers = {"Content-Type": "application/json"}
    refused = requests.post(server.url, data=body, headers=headers, timeout=60)
    assert refused.status_code == 422 and field in refused.text
    biased = f'{{"prompt": "x", "logit_bias": {{"5": {number}}}}}'
    refused = requests.post(server.url, data=biased, headers=headers, timeout=60)
    assert refused.status_code == 422 and "logit_bias" in refused.text


def test_the_ends_of_the_ranges_and_null_are_accepted(server):
    for sampling in (
        {"temperature": 2, "top_p": 1, "top_k": 1024, "seed": 2**63 - 1},
        {"temperature": 0, "top_p": 1e-300, "top_k": 0, "seed": -(2**63)},
        {"temperature": 1e-300, "stop": ["~"] * 4},
        {"temperature": 1, "top_p": 0, "top_k": -1, "min_p": 1},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 10},
        {"logit_bias": {"5": 100, "6": -100}, "min_tokens": 0, "ignore_eos": False},
        {"logit_bias": {}, "min_p": 0, "repetition_penalty": 0.01},
        dict.fromkeys(
            [
                "temperature",
                "top_p",
                "top_k",
                "seed",
                "stop",
                "stream",
                "max_new_tokens",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
                "logit_bias",
                "min_tokens",
                "ignore_eos",
            ]
        ),
    ):
        response = server.post("x", **({"max_new_tokens": 2} | sampling))
        assert response.status_code == 200, response.text
