# SPDX-License-Identifier: MIT
"""Functions that an answer may call, as they go over the wire."""

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import net
import pytest
import requests
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from server import Running, wait_until

import api
import py_api

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
MARK = "<tool_call>"
ROME, OLD = '{"city": "Rome"}', '{"a": [1]}'


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name, "description": f"tells the {name}"}
    if parameters:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


TOOLS = [tool("weather", CITY), tool("now")]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def written(name: str, arguments: str) -> str:
    """A call as the model writes it."""
    return f'{MARK}{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def ask(served: Running, **body: Any) -> requests.Response:
    return served.post(path=PATH, **({"messages": HELLO, "tools": TOOLS} | body))


Calls = list[tuple[str, str]]  # name and arguments


def answered(served: Running, **body: Any) -> tuple[str | None, Calls, str]:
    """Text, calls and finish reason of an answer, which is the same when it is streamed
    and has OpenAI's shape both times."""
    response = ask(served, **body)
    assert response.status_code == 200, response.text
    answer = ChatCompletion.model_validate(response.json(), strict=True)
    [choice] = answer.choices
    called = choice.message.tool_calls or []
    assert len({call.id for call in called}) == len(called)
    assert all(call.type == "function" and call.id for call in called)
    calls = [(call.function.name, call.function.arguments) for call in called]
    found = choice.message.content, calls, choice.finish_reason
    assert joined(ask(served, stream=True, **body)) == found
    return found


def joined(response: requests.Response) -> tuple[str | None, Calls, str]:
    assert response.status_code == 200, response.text
    *found, done = [data for _, data in net.events(response)]
    assert done == "[DONE]"
    return joined_chunks(found)


def joined_chunks(found: list[str]) -> tuple[str | None, Calls, str]:
    """What the chunks of a stream add up to, as OpenAI's clients add them."""
    text, calls, reasons, ids = "", [], [], []
    for data in found:
        chunk = ChatCompletionChunk.model_validate_json(data, strict=True)
        [choice] = chunk.choices
        assert not reasons, "nothing comes after the finish reason"
        reasons += [choice.finish_reason] * bool(choice.finish_reason)
        text += choice.delta.content or ""
        for part in choice.delta.tool_calls or []:
            if part.index == len(calls):
                assert part.type == "function" and part.id and part.function.name
                calls.append([part.function.name, ""])
                ids.append(part.id)
            else:  # OpenAI's has these once; some clients would add them up
                assert part.index == len(calls) - 1
                assert not (part.id or part.type or part.function.name)
                assert part.function.arguments, "an empty delta says nothing"
            calls[-1][1] += part.function.arguments
    assert len({*ids}) == len(ids)
    [reason] = reasons
    content = text or (None if calls else "")
    return content, [(name, arguments) for name, arguments in calls], reason


# ------------------------------------------------------------------------------
# Calls
# ------------------------------------------------------------------------------


def test_a_call(counting, write):
    write(written("weather", ROME))
    assert answered(counting) == (None, [("weather", ROME)], "tool_calls")


def test_a_call_of_a_function_without_parameters(counting, write):
    write(written("now", "{}"))
    assert answered(counting) == (None, [("now", "{}")], "tool_calls")


@pytest.mark.parametrize("before", ["Hi ", "Let me see:\n\n", "a < b, <tool_ "])
def test_text_may_stand_before_a_call(counting, write, before):
    write(before + written("weather", ROME))
    assert answered(counting) == (before, [("weather", ROME)], "tool_calls")


@pytest.mark.parametrize(
    "text", ["Hi", "<tool then", "<tool_cal", "a<<tool_call", "</tool_call>", "<"]
)
def test_what_only_begins_like_a_call_is_text(counting, write, text):
    write(text)
    assert answered(counting) == (text, [], "stop")


def test_several_calls(counting, write):
    names = ["weather", "now", "weather"]
    calls = [(name, ROME if name == "weather" else "{}") for name in names]
    write("\n".join(written(*call) for call in calls))
    assert answered(counting) == (None, calls, "tool_calls")
    first = answered(counting, parallel_tool_calls=False)
    assert first == (None, calls[:1], "tool_calls")
    assert answered(counting, parallel_tool_calls=True)[1] == calls


@pytest.mark.parametrize(
    "city",
    [
        "</tool_call>",
        MARK,
        f"}}}}</tool_call>\n{MARK}",
        '"}</tool_call>',
        "\\",
        "你好\n",
    ],
)
def test_arguments_may_contain_marks(counting, write, city):
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    write(written("weather", arguments) + "\n" + written("now", "{}"))
    calls = [("weather", arguments), ("now", "{}")]
    assert answered(counting) == (None, calls, "tool_calls")


def test_arguments_follow_the_schema(counting, write):
    """The model wants others."""
    write(written("weather", '{"town": 5}'))
    _, [(name, arguments)], reason = answered(counting, max_tokens=300)
    assert name == "weather" and arguments.startswith('{"city": "')
    assert reason in ("length", "tool_calls")


def test_only_functions_that_are_offered_are_called(counting, write):
    write(written("not", "{}"))
    assert answered(counting) == (None, [("now", "{}")], "tool_calls")


def test_a_limit_in_the_middle_of_a_call(counting, write, monkeypatch):
    whole = "Hi " + written("weather", ROME)
    write(whole)
    delivered = counting.spy(monkeypatch, "deliver_batch")
    assert ask(counting).status_code == 200

    def last() -> list[int]:
        """The answer's tokens, once the delivery of the last one is noted: its client
        may be told before that."""
        outputs = [each for ((outs,), _) in [*delivered] for each in outs]
        return next((o.generated_tokens for o in outputs if o.is_finished()), [])

    table = counting.engine.token_bytes
    tokens = [table[token] or b"" for token in wait_until(last)]
    assert b"".join(tokens).decode() == whole and tokens[-1] == b""
    begins = whole.index(ROME)
    # The last token ends the answer.
    limits = [*range(1, len(tokens) - 1, 3), len(tokens) - 1, len(tokens)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: answered(counting, max_tokens=n), limits))
    for limit, (text, calls, reason) in zip(limits, found, strict=True):
        so_far = b"".join(tokens[:limit]).decode()
        assert reason == ("length" if limit < len(tokens) else "tool_calls")
        assert text == "Hi "[: len(so_far)], so_far
        arguments = so_far[begins:][: len(ROME)]
        complete = len(so_far) >= begins
        assert calls == ([("weather", arguments)] if complete else []), so_far


@pytest.mark.parametrize(
    "stop", ["<tool_call>", "tool", "<", ">", "l>{", "name", "Ro", '"}', "}}<", "</to"]
)
def test_a_stop_string_is_not_found_in_a_call(counting, write, stop):
    """For the program it is no text, and its arguments shall parse."""
    write(written("weather", ROME))
    for choice in ("auto", "required"):
        _, calls, reason = answered(counting, stop=stop, tool_choice=choice)
        assert (calls, reason) == ([("weather", ROME)], "tool_calls")
    if stop == MARK:
        return
    write(f"a{stop}b" + written("weather", ROME))
    assert answered(counting, stop=stop) == ("a", [], "stop")
    write(f"a<to{stop}b")
    text, calls, reason = answered(counting, stop=stop)
    assert (text, calls, reason) == (f"a<to{stop}".partition(stop)[0], [], "stop")


@pytest.mark.parametrize("text", ["<tool", "a<tool_c", "<tool_call"])
def test_a_stop_string_is_found_in_what_only_begins_like_a_mark(counting, write, text):
    write(text)
    for stop in ("tool", "oo", "l"):
        assert answered(counting, stop=stop) == (text.partition(stop)[0], [], "stop")


def test_a_limit_shows_no_piece_of_a_mark(counting, write):
    write("Hi " + written("now", "{}"))
    for limit in range(1, 12):
        text, _, reason = answered(counting, max_tokens=limit)
        assert "Hi ".startswith(text) and reason == "length", limit
        found = answered(counting, max_tokens=limit, tool_choice="required")
        assert found == ("", [], "length"), limit


def test_a_mark_in_json_is_text_where_functions_are_offered_too(counting, write):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    named = {"name": "n", "schema": schema | {"required": ["a"]}}
    asked = {"response_format": {"type": "json_schema", "json_schema": named}}
    for inside in (MARK, f"x{MARK}", written("now", "{}"), "<tool_"):
        text = json.dumps({"a": inside})
        write(text)
        assert answered(counting, **asked) == (text, [], "stop")
        cut = text.index("l_") if "l_" in text else 0
        assert answered(counting, **asked, stop="l_") == (text[:cut], [], "length")
    write(written("weather", ROME))
    found = answered(counting, **asked, stop="l_")
    assert found == (None, [("weather", ROME)], "tool_calls")


def test_marks_in_json_without_functions_are_text(counting, write):
    schema = {"type": "object", "properties": {"a": {"const": f"x {MARK} y"}}}
    named = {"name": "n", "schema": schema | {"required": ["a"]}}
    asked = {"response_format": {"type": "json_schema", "json_schema": named}}
    whole = json.dumps({"a": f"x {MARK} y"})
    found = answered(counting, tools=None, **asked, stop="_ca")
    assert found == (whole.partition("_ca")[0], [], "length")
    write(whole)
    limit = 1
    while (cut := answered(counting, tools=None, **asked, max_tokens=limit))[
        0
    ] != whole:
        assert whole.startswith(cut[0]) and cut[2] == "length"
        limit += 1
    assert limit > 3


@pytest.mark.parametrize("opening", ["[", '{"a": '])
def test_arguments_may_be_deep(opening):
    deep = opening * 5000 + "1" + {"[": "]"}.get(opening, "}") * 5000
    arguments = f'{{"a": {deep}, "b": "]}}\\\\"}}'
    text = "Hi " + "\n".join([written("f", arguments), written("g", "{}")])
    before, calls = py_api.split_calls(text)
    assert before == "Hi "
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("f", arguments),
        ("g", "{}"),
    ]


# ------------------------------------------------------------------------------
# What the program wants
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [None, "auto"])
def test_auto_leaves_it_to_the_model(counting, write, choice):
    write("Hi")
    assert answered(counting, tool_choice=choice) == ("Hi", [], "stop")
    write(written("now", "{}"))
    assert answered(counting, tool_choice=choice)[1] == [("now", "{}")]


def test_required_is_a_call_whatever_the_model_wants(counting, write):
    write("Hi")
    text, calls, reason = answered(counting, tools=TOOLS[1:], tool_choice="required")
    assert (text, calls[0], reason) == (None, ("now", "{}"), "tool_calls")


def test_a_named_function_is_called_whatever_the_model_wants(counting, write):
    for text in ("Hi", written("weather", ROME)):
        write(text)
        found = answered(counting, tool_choice=named("now"), parallel_tool_calls=False)
        assert found == (None, [("now", "{}")], "tool_calls")


def test_a_function_beside_auto_is_no_choice(counting, write):
    write(written("weather", ROME))
    for kind in ("auto", "required"):
        choice = {"type": kind, "function": {"name": "now"}}
        assert answered(counting, tool_choice=choice)[1] == [("weather", ROME)]


def test_no_call_of_the_old_kind_is_no_wish(counting, write):
    write("Hi")
    assert answered(counting, function_call="none", functions=[]) == ("Hi", [], "stop")
    assert ask(counting, function_call="auto").status_code == 400


def test_none_is_text_whatever_the_model_wants(counting, write):
    text = written("now", "{}")
    write(text)
    assert answered(counting, tool_choice="none") == (text, [], "stop")
    assert answered(counting, tools=[]) == (text, [], "stop")
    assert answered(counting, tools=None) == (text, [], "stop")


@pytest.fixture
def prompts(
    counting: Running, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """What the model has been given to read, as text."""
    submitted = counting.spy(monkeypatch, "add_request")
    return lambda: [counting.tokenizer.decode(args[0]) for args, _ in submitted]


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        (None, ["weather", "now"]),
        ("auto", ["weather", "now"]),
        ("required", ["weather", "now"]),
        ("none", []),
        (named("now"), ["now"]),
    ],
)
def test_the_model_is_told_of_what_it_may_call(counting, write, prompts, choice, shown):
    write("Hi")
    assert ask(counting, tool_choice=choice, max_tokens=1).status_code == 200
    [prompt] = prompts()
    for name in ("weather", "now"):
        assert (f'"name": "{name}"' in prompt) is (name in shown)
        assert (f"tells the {name}" in prompt) is (name in shown)
    assert ("required" in prompt) is ("weather" in shown)  # of the schema
    assert (MARK in prompt) is bool(shown)


def test_functions_stand_in_the_system_turn_that_is_there(counting, write, prompts):
    write("Hi")
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "be brief"}, *HELLO]
        assert ask(counting, messages=messages, max_tokens=1).status_code == 200
    assert ask(counting, max_tokens=1).status_code == 200
    first, second, without = prompts()
    assert first == second and first.count("<|im_start|>system") == 1
    assert without.count("<|im_start|>system") == 1
    assert "<|im_start|>system<|im_sep|>be brief\n\n" in first
    assert first.replace("be brief\n\n", "") == without


# ------------------------------------------------------------------------------
# Conversations that have calls in them
# ------------------------------------------------------------------------------


def called(*calls: tuple[str, str], content: str | None = None) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for i, (name, arguments) in enumerate(calls)
        ],
    }


def result(text: Any, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": text}


def test_calls_and_results_reach_the_model(counting, write, prompts):
    """Also of functions that are not offered, or no more, and without any."""
    write("Hi")
    parts = [{"type": "text", "text": "11"}, {"type": "text", "text": " h"}]
    messages = [
        *HELLO,
        called(("weather", ROME), ("old_one", OLD), content="Wait. "),
        result("sunny"),
        result(parts, 1),
    ]
    for tools in (TOOLS, [], None):
        assert ask(counting, messages=messages, tools=tools).status_code == 200
    expected = [
        "hello",
        f"Wait. {written('weather', ROME)}\n{written('old_one', OLD)}",
        "<tool_response>sunny</tool_response>",
        "<tool_response>11 h</tool_response>",
    ]
    roles = "user", "assistant", "user", "user"
    turns = "".join(
        f"<|im_start|>{role}<|im_sep|>{text}<|im_end|>"
        for role, text in zip(roles, expected, strict=True)
    )
    offered, *others = prompts()
    assert offered.endswith(turns + "<|im_start|>assistant<|im_sep|>")
    assert others == [turns + "<|im_start|>assistant<|im_sep|>"] * 2


def test_an_answer_comes_back_as_the_model_has_written_it(counting, write, prompts):
    text = f"Hi {written('weather', ROME)}\n{written('now', '{}')}"
    write(text)
    message = ask(counting).json()["choices"][0]["message"]
    messages = [*HELLO, message, result("sunny"), result("noon", 1)]
    assert ask(counting, messages=messages, max_tokens=1).status_code == 200
    assert f"<|im_sep|>{text}<|im_end|>" in prompts()[-1]


# ------------------------------------------------------------------------------
# Streams
# ------------------------------------------------------------------------------


def chunks(body: Any, pieces: list[str]) -> Iterator[tuple[str, list[str]]]:
    """What has been written, and the chunks sent for it, as a stream sends them where
    the connection takes each at once."""
    generation = api.Generation("m", body.stop, body.is_json(), body.call_mark())
    sent, so_far = 0, ""
    for piece in [*pieces, None]:
        generation.feed(piece.encode() if piece else None)
        so_far += piece or ""
        if len(generation.text) > sent or generation.finish_reason:
            events = b"".join(body.to_events(generation, sent))
            sent = len(generation.text)
            found = [data for _, data in net.events(events)]
            yield so_far, [data for data in found if data != "[DONE]"]


def offering(**more: Any) -> api.OpenAIRequest:
    given = {"messages": HELLO, "tools": TOOLS, "stream": True} | more
    return api.OpenAIRequest.model_validate(given)


def cut_everywhere(text: str) -> Iterator[list[str]]:
    rng = random.Random(0)
    sizes = [[1] * len(text), [len(text)]]
    sizes += [[rng.randint(1, 12) for _ in text] for _ in range(60)]
    for some in sizes:
        ends = [0, *accumulate(some)]
        yield [text[a:b] for a, b in pairwise(ends) if text[a:b]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi <tool then", ("Hi <tool then", [], "stop")),
        (
            f"Hi {written('weather', ROME)}\n{written('now', '{}')}",
            ("Hi ", [("weather", ROME), ("now", "{}")], "tool_calls"),
        ),
        (
            written("weather", '{"city": "}}</tool_call>\\n<tool_call>"}'),
            (
                None,
                [("weather", '{"city": "}}</tool_call>\\n<tool_call>"}')],
                "tool_calls",
            ),
        ),
        (
            written("weather", '{"city": "\\u4f60\\"", "n": 1e5, "l": [-1, {}]}'),
            (
                None,
                [("weather", '{"city": "\\u4f60\\"", "n": 1e5, "l": [-1, {}]}')],
                "tool_calls",
            ),
        ),
    ],
)
def test_a_stream_is_the_same_wherever_it_is_cut(text, expected):
    for pieces in cut_everywhere(text):
        found = [each for _, events in chunks(offering(), pieces) for each in events]
        assert joined_chunks(found) == expected, pieces


def test_a_stream_shows_text_at_once_but_no_part_of_a_mark():
    text = f"a < b <tool then <{written('weather', ROME)}"
    before, shown = text.index(MARK), ""
    for so_far, events in chunks(offering(), list(text)):
        for data in events:
            delta = json.loads(data)["choices"][0]["delta"]
            shown += delta.get("content") or ""
        assert text[:before].startswith(shown)
        # All but what may yet become a mark.
        held = so_far[len(shown) :] if len(so_far) <= before else ""
        assert MARK.startswith(held), (so_far, shown)
    assert shown == text[:before]


def test_the_arguments_come_as_they_are_written(counting, write):
    arguments = json.dumps({"city": "x" * 100})
    write(written("weather", arguments))
    counting.gate.allow(len(written("weather", arguments)) - 50)
    response = ask_late(counting)
    seen = ""
    for _, data in net.events(response):
        if data == "[DONE]":
            break
        for part in json.loads(data)["choices"][0]["delta"].get("tool_calls", []):
            seen += part["function"]["arguments"]
        if "xxx" in seen and counting.gate.left < 1:
            assert seen != arguments
            counting.gate.allow()
    assert seen == arguments


def ask_late(served: Running) -> requests.Response:
    return served.stream(path=PATH, messages=HELLO, tools=TOOLS)


def test_a_mark_is_no_content_where_json_was_asked_for_too(
    server: Running,
) -> None:
    schema = {"type": "object", "properties": {"z": {"type": "boolean"}}}
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
        "stream": True,
    }
    response = server.post(path="/v1/chat/completions", **body)
    found = [json.loads(data) for _, data in net.events(response) if data[0] == "{"]
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert not any(delta.get("content") for delta in deltas)
    assert any(delta.get("tool_calls") for delta in deltas)
