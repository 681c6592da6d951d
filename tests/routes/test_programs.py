# SPDX-License-Identifier: MIT
"""Programs that want JSON or let the model call functions: client libraries as they are,
against a random model, which only the grammar holds to what they asked for. Its words
make no sense, so these tests look at the protocol and at what fits a schema."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Literal

import instructor
import openai
import pytest
import tiny
from net import DEADLINE
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field
from server import Running, running

HELLO: Any = [{"role": "user", "content": "hello"}]
TOO_LONG: Any = [{"role": "user", "content": "x" * 5000}]  # as many tokens
MODEL = "phi-4"
ENOUGH = 400  # tokens for any answer here
pytestmark = [
    # Of the libraries themselves, whatever the server answers.
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Item .* on TypedDict class:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning"),
]


class Wind(BaseModel):
    knots: int = Field(ge=0, le=99)
    gusts: bool


class Report(BaseModel):
    """What the weather is like."""

    city: Literal["Paris", "Rome"]
    wind: Wind | None
    days: list[Literal["dry", "wet"]] = Field(max_length=2)
    note: str = Field(max_length=4)


class Alarm(BaseModel):
    """Wake the user up."""

    loud: bool


REPORT, ALARM = (openai.pydantic_function_tool(each) for each in (Report, Alarm))


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a random model that has the pieces of a call as tokens."""
    folder = tmp_path_factory.mktemp("models") / "calls"
    tiny.tiny_model(folder, "calls", context=4096)
    with tiny.one_thread(), running(model=folder, served_model_name=MODEL) as served:
        yield served


@pytest.fixture
def client(calling: Running) -> Iterator[openai.OpenAI]:
    with connect(calling) as connected:
        yield connected


def connect(served: Running) -> openai.OpenAI:
    url = f"{served.url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=DEADLINE)


@pytest.fixture
def steer(calling: Running) -> Callable[..., dict[str, int]]:
    """Makes a `logit_bias` with which the model calls a function, once or as often as it
    may, or else ends its text, where no grammar wants more."""
    mark, *pieces = map(
        calling.engine.token_bytes.index, map(str.encode, tiny.CALL_WORDS)
    )
    end = calling.tokenizer.eos_token_id

    def bias(call: bool, again: bool = False) -> dict[str, int]:
        wanted = {mark: call, ord("\n"): call and again, end: not call}
        chosen = {token: 100 if yes else -100 for token, yes in wanted.items()}
        if call:
            chosen = dict.fromkeys(pieces, 100) | chosen
            del chosen[end]
        return {str(token): value for token, value in chosen.items()}

    return bias


def calls_of(
    answer: ChatCompletion, content: str | None = None
) -> list[tuple[str, str]]:
    """Names and arguments of the calls in an answer that consists of calls."""
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == content
    calls = choice.message.tool_calls
    assert calls and all(call.type == "function" and call.id for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, call.function.arguments) for call in calls]


def text_of(answer: ChatCompletion) -> str:
    """The text of an answer that calls nothing."""
    [choice] = answer.choices
    assert choice.message.tool_calls is None and isinstance(choice.message.content, str)
    return choice.message.content


# ------------------------------------------------------------------------------
# openai
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("served", ["calling", "phi4_server"])
def test_openai_parses_an_object(served, request):
    """Also with phi-4's vocabulary, where a token is several characters of JSON."""
    with connect(request.getfixturevalue(served)) as client:
        answer = client.chat.completions.parse(
            model=MODEL, messages=HELLO, response_format=Report, max_tokens=ENOUGH
        )
    [choice] = answer.choices
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert isinstance(choice.message.parsed, Report)
    assert choice.message.parsed == Report.model_validate_json(text_of(answer))
    used = answer.usage
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens


def test_openai_streams_an_object(client):
    asked: Any = {"model": MODEL, "messages": HELLO, "response_format": Report}
    asked |= {"max_tokens": ENOUGH}
    usage = {"include_usage": True}
    with client.chat.completions.stream(**asked, stream_options=usage) as stream:
        events = list(stream)
        answer = stream.get_final_completion()
    deltas = [event for event in events if event.type == "content.delta"]
    assert len(deltas) > 10
    assert "".join(event.delta for event in deltas) == text_of(answer)
    assert deltas[-1].parsed == answer.choices[0].message.parsed.model_dump()
    [done] = [event for event in events if event.type == "content.done"]
    assert isinstance(done.parsed, Report)
    whole = client.chat.completions.parse(**asked)
    assert text_of(whole) == text_of(answer)
    assert whole.choices[0].finish_reason == answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == whole.usage.completion_tokens


def test_openai_asks_for_any_object(client):
    """`json_object` promises that it parses, if it is not cut off."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={"type": "json_object"},
        logit_bias={str(ord("{")): 100, str(ord("}")): 90},
        max_tokens=ENOUGH,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(text_of(answer)), dict)


@pytest.mark.parametrize("tools", [None, [REPORT]])
def test_openai_is_told_of_what_is_cut_off(client, tools):
    wanted: Any = {"tools": tools, "tool_choice": "required"} if tools else {}
    wanted = wanted or {"response_format": Report}
    with pytest.raises(openai.LengthFinishReasonError) as error:
        client.chat.completions.parse(
            model=MODEL, messages=HELLO, max_tokens=12, **wanted
        )
    assert error.value.completion.usage.completion_tokens == 12


def test_openai_parses_arguments(client, steer):
    raw = client.chat.completions.with_raw_response.parse(
        model=MODEL, messages=HELLO, tools=[REPORT], logit_bias=steer(call=True)
    )
    body = raw.http_response.json()
    ChatCompletion.model_validate(body, strict=True)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    answer = raw.parse()
    [(name, _)] = calls_of(answer)
    assert name == "Report"
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Report)


def test_openai_assembles_streamed_calls(client, steer):
    """As many as one answer may have."""
    asked: Any = {"model": MODEL, "messages": HELLO, "tools": [ALARM]}
    asked |= {"logit_bias": steer(call=True, again=True), "max_tokens": 1000}
    usage = {"include_usage": True}
    with client.chat.completions.stream(**asked, stream_options=usage) as stream:
        events = list(stream)
        answer = stream.get_final_completion()
    called = calls_of(answer, content=None)
    assert len(called) > 1 and {name for name, _ in called} == {"Alarm"}
    for call in answer.choices[0].message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Alarm)
    done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert [event.index for event in done] == list(range(len(called)))
    parts = [
        part
        for event in events
        if event.type == "chunk"
        for choice in event.chunk.choices
        for part in choice.delta.tool_calls or []
    ]
    firsts = [part for part in parts if part.id]
    assert [part.index for part in firsts] == list(range(len(called)))
    assert all(part.function.name and part.type == "function" for part in firsts)
    later = [part for part in parts if not part.id]
    assert later and all(part.function.name is None for part in later)
    counts = []
    for index, (_, arguments) in enumerate(called):
        pieces = [part.function.arguments for part in parts if part.index == index]
        assert "".join(pieces) == arguments
        counts.append(len(pieces))
    # Not each: where tokens come faster than events go, they share one.
    assert max(counts) > 2


def test_openai_assembles_a_message_without_text(client, steer):
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=[ALARM], logit_bias=steer(call=True)
    ) as stream:
        answer = stream.get_final_completion()
    assert len(answer.choices[0].message.tool_calls) == 1
    assert answer.choices[0].message.content is None


def test_openai_allows_one_call(client, steer):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        tools=[ALARM],
        parallel_tool_calls=False,
        logit_bias=steer(call=True, again=True),
    )
    assert len(calls_of(answer)) == 1


def test_openai_sends_results_back(client, steer):
    """A turn whose content is null, with the client's own message object."""
    new = {"role": "system", "content": "asked by no other test"}  # new to the cache
    asked: Any = {"model": MODEL, "tools": [REPORT], "max_tokens": ENOUGH}
    first = client.chat.completions.create(
        messages=[new, *HELLO], logit_bias=steer(call=True), **asked
    )
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    message = first.choices[0].message
    assert message.content is None
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"dry": true}'}
    asked |= {"messages": [new, *HELLO, message, result]}
    second = client.chat.completions.create(logit_bias=steer(call=False), **asked)
    assert second.choices[0].finish_reason == "stop"
    text_of(second)
    used = second.usage
    assert used.prompt_tokens > first.usage.prompt_tokens
    # The beginning of the conversation, its functions included, is not computed again.
    cached = used.prompt_tokens_details.cached_tokens
    assert 0.9 * first.usage.prompt_tokens < cached < used.prompt_tokens


def test_openai_chooses(client, steer):
    def ask(choice: Any, call: bool) -> ChatCompletion:
        return client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=[REPORT, ALARM],
            tool_choice=choice,
            logit_bias=steer(call),
            max_tokens=ENOUGH,
        )

    assert text_of(ask("none", call=False)) == ""
    assert text_of(ask("auto", call=False)) == ""
    for name, model in {"Report": Report, "Alarm": Alarm}.items():
        named = {"type": "function", "function": {"name": name}}
        for call in (True, False):
            [(called, arguments), *_] = calls_of(ask(named, call))
            assert called == name
            model.model_validate_json(arguments)
    for choice, call in (("auto", True), ("required", True), ("required", False)):
        [(called, arguments), *_] = calls_of(ask(choice, call))
        {"Report": Report, "Alarm": Alarm}[called].model_validate_json(arguments)


def test_openai_calls_nothing_where_that_is_not_allowed(client, steer):
    """Though the model would like to."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        tools=[ALARM],
        tool_choice="none",
        logit_bias=steer(call=True),
        max_tokens=4,
    )
    assert answer.choices[0].finish_reason == "length" and text_of(answer)


def test_openai_gets_text_before_a_call(calling, client):
    """Whole or streamed, neither with any of the other."""
    mark = calling.engine.token_bytes.index(b"<tool_call>")
    asked: Any = {"model": MODEL, "messages": HELLO, "tools": [ALARM], "temperature": 1}
    asked |= {"logit_bias": {str(mark): 5}, "parallel_tool_calls": False}
    asked |= {"max_tokens": 200}
    for seed in range(20):
        whole = client.chat.completions.create(seed=seed, **asked).choices[0]
        if whole.message.content and whole.message.tool_calls:
            break
    # No mark, and no beginning of one at its end; "<tool" by itself may be text.
    assert whole.message.content and "<tool_call>" not in whole.message.content
    begun = tuple("<tool_call>"[:n] for n in range(1, 11))
    assert not whole.message.content.endswith(begun)
    assert whole.finish_reason == "tool_calls"
    with client.chat.completions.stream(seed=seed, **asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.content == whole.message.content
    [one], [other] = streamed.message.tool_calls, whole.message.tool_calls
    assert one.function.arguments == other.function.arguments


@pytest.mark.parametrize("call", [True, False])
def test_openai_wants_a_call_or_an_object(client, steer, call):
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=HELLO,
        tools=[ALARM],
        response_format=Report,
        logit_bias=steer(call),
        max_tokens=ENOUGH,
    )
    if call:
        assert [name for name, _ in calls_of(answer)] == ["Alarm"]
    else:
        assert isinstance(answer.choices[0].message.parsed, Report)


def test_openai_hears_what_is_wrong(client):
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as error:
        create(model=MODEL, messages=TOO_LONG)
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as error:
        create(
            model=MODEL,
            messages=HELLO,
            tools=[ALARM],
            tool_choice={"type": "function", "function": {"name": "Report"}},
        )
    assert error.value.param == "tool_choice"
    wrong: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "nothing"}},
    }
    with pytest.raises(openai.BadRequestError) as error:
        create(model=MODEL, messages=HELLO, response_format=wrong)
    assert error.value.param == "response_format"
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"


# ------------------------------------------------------------------------------
# instructor
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(client, mode):
    patched = instructor.from_openai(client, mode=instructor.Mode[mode])
    asked: Any = {"model": MODEL, "messages": HELLO, "max_tokens": ENOUGH}
    asked |= {"response_model": Report, "max_retries": 0}
    report, answer = patched.chat.completions.create_with_completion(**asked)
    assert isinstance(report, Report)
    if mode == "JSON_SCHEMA":
        assert Report.model_validate_json(text_of(answer)) == Report(**dict(report))
    else:
        assert calls_of(answer)[0][0] == "Report"
    *_, last = patched.chat.completions.create_partial(**asked)
    Report.model_validate(last.model_dump())


# ------------------------------------------------------------------------------
# pydantic-ai
# ------------------------------------------------------------------------------


def with_pydantic_ai(
    served: Running, work: Callable[[Any], Coroutine[Any, Any, Any]]
) -> Any:
    """What a coroutine makes of pydantic-ai's model."""
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def run() -> Any:
        url = f"{served.url}/v1"
        async with openai.AsyncOpenAI(
            base_url=url, api_key="none", max_retries=0, timeout=DEADLINE
        ) as client:
            provider = OpenAIProvider(openai_client=client)
            return await work(OpenAIChatModel(MODEL, provider=provider))

    return asyncio.run(run())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_pydantic_ai_makes_an_object(calling, native, stream):
    """By calling a function, or as the answer."""
    from pydantic_ai import Agent, NativeOutput

    async def work(model: Any) -> Any:
        output: Any = NativeOutput(Report) if native else Report
        agent = Agent(model, output_type=output, retries=0)
        settings: Any = {"max_tokens": ENOUGH, "parallel_tool_calls": False}
        if not stream:
            result = await agent.run("hello", model_settings=settings)
            return result.output, result.all_messages()
        async with agent.run_stream("hello", model_settings=settings) as result:
            return await result.get_output(), result.all_messages()

    report, messages = with_pydantic_ai(calling, work)
    assert isinstance(report, Report)
    answer = messages[1]
    [part] = answer.parts
    assert part.part_kind == ("text" if native else "tool-call")
    assert answer.finish_reason == ("stop" if native else "tool_call")
    assert answer.usage.input_tokens and answer.usage.output_tokens


def test_pydantic_ai_calls_a_function(calling, steer):
    from pydantic_ai import Agent

    alarms = []

    async def work(model: Any) -> Any:
        agent = Agent(model, retries=0)

        @agent.tool_plain(prepare=lambda _, tool: None if alarms else tool)
        def alarm(loud: bool) -> str:
            """Wake the user up."""
            alarms.append(loud)
            return "done"

        settings: Any = {"logit_bias": steer(call=True), "max_tokens": ENOUGH}
        settings |= {"parallel_tool_calls": False}
        # The text after it is cut off by its limit: this model would go on for ever.
        async with agent.iter("hello", model_settings=settings) as run:
            async for _ in run:
                if alarms:
                    settings["max_tokens"] = 4
        return run.result

    result = with_pydantic_ai(calling, work)
    assert len(alarms) == 1 and isinstance(alarms[0], bool)
    kinds = [part.part_kind for each in result.all_messages() for part in each.parts]
    assert kinds == ["user-prompt", "tool-call", "tool-return", "text"]


# ------------------------------------------------------------------------------
# LangChain
# ------------------------------------------------------------------------------


def langchain(served: Running, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    options = {"max_tokens": ENOUGH, "max_retries": 0, "timeout": DEADLINE} | options
    url = f"{served.url}/v1"
    return ChatOpenAI(base_url=url, api_key="none", model=MODEL, **options)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_makes_an_object(calling, method):
    chat = langchain(calling)
    # The first is what it does unless told otherwise.
    options = {"method": method} if method != "json_schema" else {}
    structured = chat.with_structured_output(Report, include_raw=True, **options)
    found = structured.invoke("hello")
    assert found["parsing_error"] is None and isinstance(found["parsed"], Report)
    called = found["raw"].tool_calls
    assert [call["name"] for call in called[:1]] == (
        ["Report"] if method == "function_calling" else []
    )
    *_, last = chat.with_structured_output(Report, **options).stream("hello")
    assert last == found["parsed"]


def test_langchain_calls_functions(calling, steer):
    from langchain_core.messages import HumanMessage, ToolMessage

    chat = langchain(calling)
    bound = chat.bind_tools([Report, Alarm]).bind(logit_bias=steer(call=True))
    asked = [HumanMessage("wake me up when it is dry")]
    answer = bound.invoke(asked)
    [call] = answer.tool_calls
    assert not answer.invalid_tool_calls and answer.content == ""
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    {"Report": Report, "Alarm": Alarm}[call["name"]].model_validate(call["args"])
    chunks = list(bound.stream(asked))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    [streamed] = whole.tool_calls
    assert streamed["args"] == call["args"] and streamed["name"] == call["name"]
    assert streamed["id"]
    assert whole.response_metadata["finish_reason"] == "tool_calls"
    asked += [answer, ToolMessage("done", tool_call_id=call["id"])]
    bound = chat.bind_tools([Report, Alarm]).bind(logit_bias=steer(call=False))
    second = bound.invoke(asked)
    assert second.response_metadata["finish_reason"] == "stop"
    assert not second.tool_calls
    assert second.usage_metadata["input_token_details"]["cache_read"] > 0


def test_langchain_is_told_of_a_prompt_that_is_too_long(calling):
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        langchain(calling).invoke(TOO_LONG)
    with pytest.raises(ContextOverflowError):
        list(langchain(calling).stream(TOO_LONG))


# ------------------------------------------------------------------------------
# LiteLLM
# ------------------------------------------------------------------------------


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, which reads its own list of prices instead of GitHub's."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    return litellm


@pytest.fixture
def complete(litellm: Any, client: openai.OpenAI) -> Callable[..., Any]:
    options = {"messages": HELLO, "max_tokens": ENOUGH, "client": client}
    return lambda **more: litellm.completion(f"openai/{MODEL}", **options | more)


def test_litellm_makes_an_object(complete):
    answer = complete(response_format=Report)
    assert answer.choices[0].finish_reason == "stop"
    Report.model_validate_json(answer.choices[0].message.content)


def test_litellm_calls_functions(litellm, complete, steer):
    asked: Any = {"tools": [REPORT, ALARM], "logit_bias": steer(call=True)}
    answer = complete(**asked).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    [call] = answer.message.tool_calls
    model = {"Report": Report, "Alarm": Alarm}[call.function.name]
    model.model_validate_json(call.function.arguments)
    usage = {"include_usage": True}
    chunks = list(complete(stream=True, stream_options=usage, **asked))
    whole = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert whole.choices[0].finish_reason == "tool_calls"
    [streamed] = whole.choices[0].message.tool_calls
    assert streamed.id and streamed.function.name == call.function.name
    assert streamed.function.arguments == call.function.arguments
    assert whole.usage.prompt_tokens_details.cached_tokens > 0


def test_litellm_is_told_of_a_prompt_that_is_too_long(litellm, complete):
    for stream in (False, True):
        with pytest.raises(litellm.ContextWindowExceededError):
            list(complete(messages=TOO_LONG, stream=stream))
