# SPDX-License-Identifier: MIT
"""The OpenAI routes, through the clients that people use."""

import asyncio
import json
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
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [TOOL]),
        ("functions", [{"name": "f"}]),
        ("n", 2),
        ("logprobs", True),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("logit_bias", {"5": 1}),
        ("messages", []),
        ("messages", [{"role": "user", "content": [IMAGE]}]),
        ("messages", [{"role": "tool", "content": "x", "tool_call_id": "1"}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("messages", [{"role": "user"}]),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(server, field, value):
    response = ask(server, **{field: value})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"].split(".")[0] == field and field in error["message"]
    assert error["type"] == "invalid_request_error"


ASKED = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [ASKED], "stop": ""}, "stop"),
        ({"messages": [ASKED], "stop": "x" * 300}, "stop"),
        ({"messages": [ASKED | {"content": [IMAGE]}]}, "messages.0.content.0.type"),
        ([], None),
    ],
)
def test_an_error_names_the_field_and_nothing_of_the_program(server, body, param):
    url = server.url + "/v1/chat/completions"
    answer = requests.post(url, json=body, timeout=DEADLINE)
    assert answer.status_code == 400
    assert "function" not in answer.text and "0x" not in answer.text
    assert error_of(answer)["param"] == param


def test_a_stop_string_that_is_wrong_is_named_on_the_other_route(server):
    refused = server.post(stop="").json()["detail"]
    assert {tuple(error["loc"]) for error in refused} == {("body", "stop")}


def test_what_changes_nothing_is_ignored(server):
    harmless = {
        "user": "u-1", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "parallel_tool_calls": True, "safety_identifier": "s", "made_up": [1], "n": 1,
        "tools": [], "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "response_format": {"type": "text"}, "functions": None,
        "tool_choice": "none", "modalities": ["text"], "prediction": None,
    }  # fmt: skip
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    harmless["messages"] = [{"role": "user", "content": [part]}]
    response = ask(server, max_tokens=2, **harmless)
    assert response.status_code == 200, response.text


def test_errors_of_the_client_become_its_exceptions(counting, client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=HELLO, n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="do not fit"):
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=10**9)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    error_of(requests.get(counting.url + "/v1/nothing", timeout=DEADLINE))
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
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        assert ask(served).headers["WWW-Authenticate"] == "Bearer"
        error_of(ask(served))
        with (
            connect(served, api_key="right") as client,
            pytest.raises(openai.APIStatusError) as large,
        ):
            client.chat.completions.create(model="x" * 3000, messages=HELLO)
        assert large.value.status_code == 413
        error_of(large.value.response)
