# SPDX-License-Identifier: MIT
"""The OpenAI routes, through the clients that people use."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import net
import openai
import pytest
import requests
import scripted
from net import DEADLINE
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from server import Running, narrow, running

HELLO: Any = [{"role": "user", "content": "hello"}]
PATH = "/v1/chat/completions"
MODEL = "gpt-4o"  # what existing programs ask for


@pytest.fixture
def client(counting: Running) -> Iterator[openai.OpenAI]:
    with connect(counting) as connected:
        yield connected


def connect(served: Running, **options: Any) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0, "timeout": DEADLINE} | options
    return openai.OpenAI(base_url=f"{served.url}/v1", **options)


def ask(served: Running, **body: Any) -> requests.Response:
    return served.post(path=PATH, **({"messages": HELLO} | body))


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


# ------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------


def test_an_answer_has_the_shape_of_openai(counting, say, client):
    say(b"Hi", b" ", "你".encode())
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    answer = ChatCompletion.model_validate(raw.http_response.json(), strict=True)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == "phi-4"
    [choice] = answer.choices
    assert choice.index == 0 and choice.finish_reason == "stop"
    assert choice.message.role == "assistant" and choice.message.content == "Hi 你"
    used = answer.usage
    assert used.completion_tokens == 4  # with the one that ends it
    assert used.total_tokens == used.prompt_tokens + 4
    plain = counting.post("hello")
    assert plain.headers["X-Prompt-Tokens"] == str(used.prompt_tokens)
    assert plain.json()["response"] == choice.message.content
    assert answer.created > 1.7e9  # seconds, not milliseconds
    other = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert other.id != answer.id


def test_a_stream_has_the_shape_of_openai(counting, say):
    say(b"Hi", b" ", b"you")
    response = ask(counting, stream=True)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    found = [data for _, data in net.events(response)]
    assert found[-1] == "[DONE]" and found.count("[DONE]") == 1
    assert all("usage" not in json.loads(data) for data in found[:-1])
    chunks = [
        ChatCompletionChunk.model_validate_json(data, strict=True)
        for data in found[:-1]
    ]
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].model == "phi-4" and chunks[0].object == "chat.completion.chunk"
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert first.delta.role == "assistant" and not first.delta.content
    assert all(c.choices[0].delta.role is None for c in chunks[1:])
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert last.finish_reason == "stop" and last.delta.content is None
    assert text_of(chunks) == "Hi you"


@pytest.mark.parametrize(
    "options",
    [{"include_usage": True}, {"include_usage": True, "include_obfuscation": False}],
)
def test_usage_comes_last_in_a_stream_that_asks_for_it(counting, say, client, options):
    say(b"a", b"b")
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options=options
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize(
    "options", [None, {}, {"include_usage": False}, {"include_usage": None}]
)
def test_no_usage_in_a_stream_that_does_not(counting, say, options):
    say(b"a")
    found = [
        d for _, d in net.events(ask(counting, stream=True, stream_options=options))
    ]
    assert all(
        json.loads(d).get("usage") is None and json.loads(d)["choices"]
        for d in found[:-1]
    )


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_finish_reasons(say, client, field):
    say(b"a", b"b", b"c")

    def finish(**body: Any) -> tuple[str, str]:
        [choice] = client.chat.completions.create(
            model=MODEL, messages=HELLO, **body
        ).choices
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True, **body
            )
        )
        assert chunks[-1].choices[0].finish_reason == choice.finish_reason
        assert text_of(chunks) == choice.message.content
        return choice.message.content, choice.finish_reason

    assert finish(**{field: 2}) == ("ab", "length")
    assert finish(**{field: 3}) == ("abc", "length")
    assert finish(**{field: 4}) == ("abc", "stop")
    assert finish(stop=["c"]) == ("ab", "stop")
    assert finish(stop="bc") == ("a", "stop")


def test_every_kind_of_message_reaches_the_template(counting, say, monkeypatch):
    say(b"x")
    templated = counting.spy(monkeypatch, "apply_template")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "你好", "name": "Ann"},
        {"role": "assistant", "content": "hi", "refusal": None},
        {"role": "user", "content": parts},
    ]
    assert ask(counting, messages=messages).status_code == 200
    roles = ["system", "user", "assistant", "user"]
    texts = ["be brief", "你好", "hi", "ab"]
    [((_, turns), _)] = templated
    assert [turn.model_dump() for turn in turns] == [
        {"role": r, "content": t} for r, t in zip(roles, texts, strict=True)
    ]


def test_models(counting, client):
    [model] = client.models.list().data
    assert model.id == "phi-4" and model.object == "model" and model.created > 1.7e9
    listed = requests.get(counting.url + "/v1/models", timeout=DEADLINE).json()
    assert listed["object"] == "list"
    Model.model_validate(listed["data"][0], strict=True)
    assert listed["data"][0]["max_model_len"] == 2048
    assert client.models.retrieve("phi-4") == model
    for other in ("gpt-4o", "phi-4/x", "microsoft/phi-4"):
        with pytest.raises(openai.NotFoundError, match=r"served here is phi-4") as none:
            client.models.retrieve(other)
        assert (none.value.param, none.value.code) == ("model", "model_not_found")


def test_max_model_len_is_what_a_request_may_have(counting, say):
    say(b"a")
    url = counting.url + "/v1/models/phi-4"
    most = requests.get(url, timeout=DEADLINE).json()["max_model_len"]
    room = most - ask(counting).json()["usage"]["prompt_tokens"]
    assert ask(counting, max_tokens=room).status_code == 200
    error = error_of(ask(counting, max_tokens=room + 1))
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert "This model's maximum context length is" in error["message"]


@pytest.mark.parametrize("limit", [{}, {"max_tokens": -1}, {"max_tokens": None}])
def test_without_a_limit_an_answer_fills_the_context(server, limit):
    answer = ask(server, **limit).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


# ------------------------------------------------------------------------------
# Clients
# ------------------------------------------------------------------------------


def test_the_asynchronous_client(counting, say):
    say(b"a", b"b")

    async def both() -> tuple[Any, str]:
        url = f"{counting.url}/v1"
        async with openai.AsyncOpenAI(
            base_url=url, api_key="none", timeout=DEADLINE
        ) as client:
            whole = client.chat.completions.create(model=MODEL, messages=HELLO)
            chunks = await client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True
            )
            text = text_of([chunk async for chunk in chunks])
            return (await whole).choices[0].message.content, text

    assert asyncio.run(both()) == ("ab", "ab")


def test_a_client_times_out_and_its_place_is_free_again(counting, say, client):
    say(b"a", b"b")
    counting.gate.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model=MODEL, messages=HELLO
        )
    counting.wait_pending(0)
    counting.gate.allow()
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "ab"


def test_a_client_closes_its_stream(counting, say, client):
    say(*[b"x"] * 200)
    counting.gate.allow(2)
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True
    ) as chunks:
        next(chunks)
    counting.wait_pending(0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_tries_again_after_a_503(counting_folder, monkeypatch, stream):
    with narrow(counting_folder, max_in_flight=1, max_waiting=0) as served:
        scripted.teach(monkeypatch, served, [b"a"])
        served.gate.close()
        statuses = []

        def note(response: Any) -> None:
            statuses.append(response.status_code)
            served.gate.allow()
            first.result()  # ends while the client waits

        http = openai.DefaultHttpxClient(event_hooks={"response": [note]})
        with connect(served, max_retries=4, http_client=http) as client:
            first = served.submit(path=PATH)
            served.wait_pending(1)
            create = client.chat.completions.create
            answer = create(model=MODEL, messages=HELLO, stream=stream)
            text = (
                text_of(list(answer)) if stream else answer.choices[0].message.content
            )
            assert first.result().status_code == 200
        assert text == "a" and statuses == [503, 200]


def test_an_error_in_a_stream_reaches_the_program(counting, say, client):
    say(b"a", b"b", b"c")
    counting.gate.allow(2)
    chunks = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    seen = [next(chunks)]
    while "b" not in text_of(seen):
        seen.append(next(chunks))
    counting.gate.fail()
    with pytest.raises(openai.APIError, match="engine failed"):
        next(chunks)
    counting.wait_ready()


def test_langchain(counting, say):
    from langchain_openai import ChatOpenAI

    say(b"ab", b"c", b"d")
    chat = ChatOpenAI(
        base_url=f"{counting.url}/v1",
        api_key="none",
        model=MODEL,
        temperature=0,
        stop=["d"],
    )
    answer = chat.invoke([("system", "be brief"), ("human", "hello")])
    assert answer.content == "abc"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] == 3
    chunks = list(chat.stream("hello"))
    assert "".join(chunk.content for chunk in chunks) == "abc"


# ------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------


def error_of(response: requests.Response) -> dict[str, Any]:
    """The error, if the body has exactly OpenAI's shape."""
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ODD_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "odd"}},
}
NAMED = {"type": "function", "function": {"name": "g"}}
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x"}}
WRONG_SCHEMA = {"name": "x", "schema": {"type": "nonsense"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "custom", "custom": {"name": "f"}}]),
        ("tools", [{"type": "function", "function": {"name": "two words"}}]),
        ("tools", [{"type": "function"}]),
        ("tools", [TOOL] * 129),
        ("tools", [ODD_TOOL]),
        ("tool_choice", "required"),
        ("tool_choice", NAMED),
        ("response_format", {"type": "grammar"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", NO_SCHEMA),
        ("response_format", {"type": "json_schema", "json_schema": WRONG_SCHEMA}),
        ("messages", []),
        ("messages", [{"role": "user", "content": [IMAGE]}]),
        ("messages", [{"role": "function", "name": "f", "content": "x"}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("messages", [{"role": "user"}]),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(server, field, value):
    response = ask(server, **{field: value})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert re.split(r"[.\[]", error["param"])[0] == field
    # A schema's error is llguidance's, and says that it is one.
    assert field in error["message"] or "JSON schema" in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]


UNSUPPORTED = {
    "n": 2,
    "best_of": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "prompt_logprobs": 1,
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "web_search_options": {"search_context_size": "low"},
    "verbosity": "low",
    "echo": True,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template": "{{ messages }}",
    "guided_json": {"type": "object"},
    "guided_choice": ["a", "b"],
    "guided_regex": "a*",
    "structured_outputs": {"choice": ["a"]},
    "stop_token_ids": [5],
    "bad_words": ["no"],
    "allowed_token_ids": [5],
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "truncate_prompt_tokens": 9,
    "use_beam_search": True,
    "length_penalty": 0.5,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_done_is_refused_by_name(server, field):
    response = ask(server, **{field: UNSUPPORTED[field]})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["message"] == f"{field} is not supported"
    assert error["param"] == field and error["code"] == "unsupported_parameter"


ASKED = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [ASKED], "stop": ""}, "stop[0]"),
        ({"messages": [ASKED], "stop": "x" * 300}, "stop[0]"),
        ({"messages": [ASKED], "stop": 5}, "stop"),
        ({"messages": [ASKED | {"content": [IMAGE]}]}, "messages[0].content[0].type"),
        (
            {"messages": [ASKED | {"content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [ASKED, ASKED | {"content": 5}]}, "messages[1].content"),
        ({"messages": [ASKED], "tools": [TOOL, {}]}, "tools[1].function"),
        (
            {"messages": [ASKED], "tools": [TOOL], "tool_choice": "any"},
            "tool_choice.type",
        ),
        ({"messages": [ASKED], "logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({}, "messages"),
        ([], None),
    ],
)
def test_an_error_names_the_field_and_nothing_of_the_program(server, body, param):
    url = server.url + "/v1/chat/completions"
    answer = requests.post(url, json=body, timeout=DEADLINE)
    assert answer.status_code == 400
    error = error_of(answer)
    assert "function-" not in answer.text and "0x" not in answer.text
    assert "Tool" not in answer.text and "item" not in error["message"]
    assert error["param"] == param


def test_a_stop_string_that_is_wrong_is_named_on_the_other_route(server):
    refused = server.post(stop="").json()["detail"]
    assert {tuple(error["loc"]) for error in refused} == {("body", "stop", 0)}


def test_what_changes_nothing_is_ignored(server):
    harmless = {
        "user": "u-1", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "parallel_tool_calls": True, "safety_identifier": "s", "made_up": [1], "n": 1,
        "tools": [], "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "response_format": {"type": "text"}, "functions": None,
        "tool_choice": "none", "modalities": ["text"], "prediction": None,
        "best_of": 1, "verbosity": "medium", "length_penalty": 1.0, "echo": False,
        "skip_special_tokens": True, "add_generation_prompt": True, "stop_token_ids": [],
        "top_logprobs": 0, "continue_final_message": False, "prompt_cache_key": "k",
        "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "min_tokens": 0,
        "ignore_eos": False,
    }  # fmt: skip
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    harmless["messages"] = [{"role": "user", "content": [part]}]
    response = ask(server, max_tokens=9, **harmless)
    assert response.status_code == 200, response.text
    plain = ask(server, max_tokens=9, messages=[{"role": "user", "content": "x"}])
    assert response.json()["choices"] == plain.json()["choices"]


def test_errors_of_the_client_become_its_exceptions(counting, client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=HELLO, n=2)
    assert refused.value.param == "n"
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as long:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=10**9)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.embeddings.create(model=MODEL, input="x")
    lost = requests.get(counting.url + "/v1/nothing", timeout=DEADLINE)
    assert (
        lost.status_code == 404 and "/v1/chat/completions" in error_of(lost)["message"]
    )
    lost = requests.post(counting.url + "/chat/completions", json={}, timeout=DEADLINE)
    assert lost.status_code == 404 and "/v1" in lost.json()["detail"]
    wrong_method = requests.get(counting.url + PATH, timeout=DEADLINE)
    assert wrong_method.status_code == 405
    error_of(wrong_method)
    for body in (b"{", b"[]", b"\xff", b""):
        headers = {"Content-Type": "application/json"}
        response = requests.post(
            counting.url + PATH, data=body, headers=headers, timeout=DEADLINE
        )
        assert response.status_code == 400
        error_of(response)


def test_a_wrong_key_is_a_401(tiny_folder):
    with running(
        model=tiny_folder, api_key="right, second", max_body_bytes=2048
    ) as served:
        for key in ("right", "second"):
            with connect(served, api_key=key) as client:
                assert client.models.list().data
        with connect(served, api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="API key"):
                client.chat.completions.create(model=MODEL, messages=HELLO)
            with pytest.raises(openai.AuthenticationError) as none:
                client.models.list()
            assert none.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                client.models.retrieve("tiny")  # whether or not there is one
        assert ask(served).headers["WWW-Authenticate"] == "Bearer"
        error_of(ask(served))
        with (
            connect(served, api_key="right") as client,
            pytest.raises(openai.APIStatusError) as large,
        ):
            client.chat.completions.create(model="x" * 3000, messages=HELLO)
        assert large.value.status_code == 413
        error_of(large.value.response)
