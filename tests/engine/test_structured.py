# SPDX-License-Identifier: MIT
"""Answers that follow a JSON schema, and everything else that chooses tokens by what
came before: right to the token, on a CPU and where the last token comes late."""

import asyncio
import contextlib
import gc
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import net
import played_gpu as played
import pytest
import requests
import tiny
import torch
import transformers
from net import DEADLINE
from server import Running, running, wait_until

import api
import py_api

# Where CI counts the minutes, the order of steps that is harder to get right has to do.
CI = "CI" in os.environ
MACHINES, PLAYED = ["served", "on_gpu"][CI:], [False, True][CI:]
OPENAI = "/v1/chat/completions"
INTEGER, STRING = {"type": "integer"}, {"type": "string"}
LEAF = {"type": "string", "maxLength": 4}


def closed(**properties: Any) -> dict[str, Any]:
    """An object that has these properties and no others."""
    shape = {"type": "object", "additionalProperties": False}
    return shape | {"properties": properties, "required": [*properties]}


# Of several pieces, in a known order of length: the tests below want long answers.
NUMBERS = {"type": "array", "items": INTEGER, "minItems": 12, "maxItems": 14}
NUMBERS |= {"items": {"type": "integer", "minimum": -9999, "maximum": 9999}}
SMALL = closed(a={"type": "boolean"}, b={"enum": ["x", "y"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that likes to close what it has opened."""
    folder = tmp_path_factory.mktemp("models") / "closing"
    bias = {ord('"'): 5.0, ord("}"): 3.0, ord("]"): 3.0}
    tiny.tiny_model(folder, context=512, bias=bias)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch, tiny.one_thread():
        patch.setattr(py_api, "CLIENT_SECONDS", 1)  # so long a connection is remembered
        patch.setattr(api, "PING_SECONDS", 1)  # and a stream
        with running(model=folder) as server:
            yield server


@pytest.fixture
def on_gpu(folder: Path) -> Iterator[Running]:
    """Here the next step runs before the last token is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(py_api, "CLIENT_SECONDS", 1)
        patch.setattr(api, "PING_SECONDS", 1)
        with played.serving(model=folder) as server:
            yield server


@pytest.fixture(params=MACHINES)
def constrained(request: pytest.FixtureRequest) -> Running:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=MACHINES)
def each(request: pytest.FixtureRequest) -> Running:
    return request.getfixturevalue(request.param)


def by(schema: Any) -> dict[str, Any]:
    """The field of a request that asks for this schema."""
    named = {"name": "answer", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def asked(number: int, schema: Any = None, **body: Any) -> dict[str, Any]:
    """A request: those with an even number are greedy."""
    chosen = {"temperature": number % 2, "seed": number, "max_tokens": 90}
    chosen |= {} if schema is None else by(schema)
    return {"prompt": f"question {number}", "path": OPENAI} | chosen | body


def said(response: requests.Response) -> tuple[str, str]:
    """The text of an answer, and why it ended."""
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def one_by_one(served: Running, bodies: list[dict]) -> list[tuple[str, str]]:
    return [said(served.post(**body)) for body in bodies]


def together(served: Running, bodies: list[dict]) -> list[tuple[str, str]]:
    """The answers to requests that are in the same forward passes."""
    return [said(each) for each in responses_together(served, bodies)]


def responses_together(served: Running, bodies: list[dict]) -> list[requests.Response]:
    with served.gate as gate:
        gate.close()
        futures = []
        for body in bodies:
            futures.append(served.submit(**body))
            served.wait_pending(len(futures))
    return [each.result() for each in futures]


def right(text: str, schema: Any) -> bool:
    """Raises an error for an answer that is not what its schema says."""
    jsonschema.validate(json.loads(text), schema)
    return True


def tokens_of(served: Running, ask: Callable[[], Any]) -> dict[str, list[int]]:
    """The tokens of every answer that is made meanwhile, by the answer's id."""
    seen: dict[str, list[int]] = {}

    def note(outputs: list[Any]) -> None:
        seen.update({each.request_id: [*each.generated_tokens] for each in outputs})
        deliver(outputs)

    with pytest.MonkeyPatch.context() as patch:
        deliver = served.replace(patch, "deliver_batch", note)
        ask()
        wait_until(served.idle)
    return seen


# ------------------------------------------------------------------------------
# Every finished answer parses and validates
# ------------------------------------------------------------------------------

TREE = closed(value=INTEGER, left={"$ref": "#/$defs/t"}, right={"$ref": "#/$defs/t"})
TREE = {"$defs": {"t": {"anyOf": [{"type": "null"}, TREE]}}, "$ref": "#/$defs/t"}
ODD_KEYS = ['quote"', "back\\slash", "线", "😀", "line\nend", "\u2028", "</script>", ""]
SCHEMAS: dict[str, Any] = {
    "object": closed(a=INTEGER, b=LEAF, c={"type": "boolean"}, d={"type": "null"}),
    "optional": {"type": "object", "properties": {"a": INTEGER, "b": LEAF}},
    "additional": {"type": "object", "additionalProperties": INTEGER},
    "named and additional": closed(a=INTEGER) | {"additionalProperties": LEAF},
    "some": {"type": "object", "minProperties": 1, "maxProperties": 2},
    "some that are required": closed(a=INTEGER, b=LEAF) | {"minProperties": 2},
    "required alone": {"type": "object", "required": ["z"]},
    "by pattern": {"type": "object", "patternProperties": {"^a": INTEGER}},
    "many that forbid nothing": {
        "$defs": {
            f"t{n}": {"type": "object", "properties": {"a": INTEGER}} for n in range(12)
        },
        **closed(**{f"t{n}": {"$ref": f"#/$defs/t{n}"} for n in range(12)}),
        "properties": {f"t{n}": {"$ref": f"#/$defs/t{n}"} for n in range(12)},
        "required": ["t3"],
    },
    "above nothing": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "with remarks": closed(a=INTEGER)
    | {"title": "t", "default": {"a": -(2**63)}, "nullable": True, "x-y": {"not": 5}},
    "zod's record": {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": INTEGER,
    },
    "zod's record of names": {
        "type": "object",
        "propertyNames": {"type": "string", "enum": ["a", "b"]},
        "additionalProperties": INTEGER,
        "required": ["b"],
    },
    "not unique": {"type": "array", "items": INTEGER, "uniqueItems": False},
    "array": {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [INTEGER, LEAF], "items": False},
    "nothing in it": {"type": "array", "maxItems": 0},
    "enum": {"enum": ["ü", 'q"', 1, None, True, {"a": [1, {"b": 2.5}]}]},
    "const": {"const": {"k": [1, "two", None, 3.25]}},
    "range": {"type": "integer", "minimum": -5, "maximum": 1000},
    "a bound no float has": {"type": "integer", "minimum": 0, "maximum": 10**400},
    "open range": {"type": "number", "exclusiveMinimum": 0.5, "exclusiveMaximum": 2},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 90},
    "pattern": {"type": "string", "pattern": r"^[a-c]{2,5}-\d{1,3}$"},
    "pattern with quotes": {"type": "string", "pattern": r'^["\\]{1,3}$'},
    "pattern anywhere": {"type": "string", "pattern": "ab", "maxLength": 6},
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "no text": {"type": "string", "maxLength": 0},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "refs": {
        "$defs": {"p": closed(x=INTEGER), "unused": STRING},
        **closed(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"}),
    },
    "any of": {"anyOf": [INTEGER, closed(q={"type": "null"}), {"enum": ["x"]}]},
    "one of": {"oneOf": [closed(k={"const": "a"}), closed(k={"const": "b"}, v=LEAF)]},
    "all of": {"allOf": [{"properties": {"a": INTEGER}}, closed(a={"minimum": 5})]},
    "types": {"type": ["integer", "null", "boolean"]},
    "nested": closed(a=closed(b=closed(c={"type": "array", "items": closed(d=LEAF)}))),
    "odd keys": closed(**{key: {"const": 1} for key in ODD_KEYS}),
    "tree": TREE,
    "list": {
        "$defs": {
            "l": closed(v=LEAF, n={"anyOf": [{"$ref": "#/$defs/l"}, {"const": 0}]})
        },
        "$ref": "#/$defs/l",
    },
    "anything": {},
}
# A model that closes what it has opened takes so many of these to their end.
FORMATS = jsonschema.FormatChecker(("date", "ipv4", "uuid"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_finished_answer_validates(served: Running, name: str) -> None:
    schema = SCHEMAS[name]
    bodies = [asked(number, schema, max_tokens=160) for number in range(7)]
    bodies.append(asked(7, schema, max_tokens=160, temperature=2))
    futures = [served.submit(**body) for body in bodies]
    whole = [text for text, why in (said(f.result()) for f in futures) if why == "stop"]
    assert whole, "none has come to its end"
    for text in whole:
        jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("limit", [9, 160])
def test_a_stream_says_the_same(served: Running, number: int, limit: int) -> None:
    body = asked(number, SCHEMAS["object"], max_tokens=limit)
    text, why = said(served.post(**body))
    assert why == ("length" if limit == 9 else "stop")
    chunks = [
        json.loads(data)["choices"][0]
        for _, data in net.events(served.stream(**body))
        if data != "[DONE]"
    ]
    assert "".join(each["delta"].get("content", "") for each in chunks) == text
    assert [each["finish_reason"] for each in chunks] == [None] * (len(chunks) - 1) + [
        why
    ]


def test_json_object_is_an_object(served: Running) -> None:
    kind = {"response_format": {"type": "json_object"}}
    answers = one_by_one(served, [asked(n, **kind) for n in range(6)])
    whole = [json.loads(text) for text, why in answers if why == "stop"]
    assert whole and all(isinstance(each, dict) for each in whole)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("stop", [",", '"b"', "fals", "]", "}"])
def test_an_answer_that_a_stop_string_cuts_is_not_whole(
    served: Running, number: int, stop: str
) -> None:
    schema = closed(a={"const": False}, b={"const": [1, 2]})
    body = asked(number, schema)
    whole, why = said(served.post(**body))
    assert why == "stop" and whole == '{"a": false, "b": [1, 2]}'
    cut = whole[: whole.index(stop)], "length"
    assert said(served.post(**body, stop=stop)) == cut
    assert said(served.post(**body, stop=[stop, "never"])) == cut
    assert said(served.post(**body, stop="never")) == (whole, "stop")


@pytest.mark.parametrize(("field", "value"), [("ignore_eos", True), ("min_tokens", 5)])
def test_what_would_keep_an_answer_from_its_end_is_refused(
    served: Running, field: str, value: Any
) -> None:
    refused = served.post(**asked(0, SMALL, **{field: value}))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field


# Space, tab, line feed, carriage return: as likely as a bias can make them.
BLANKS = {str(ord(char)): 100 for char in " \t\n\r"}


@pytest.mark.parametrize(
    "schema",
    [
        closed(
            a={"const": 1}, b={"type": "array", "items": {"const": 2}, "maxItems": 3}
        ),
        {"type": "array", "items": {"type": "null"}, "maxItems": 3},
        {"enum": [1, 20, {"a": [1, 2]}]},
        {"type": "object", "additionalProperties": False},
    ],
)
def test_a_model_that_loves_white_space_cannot_write_it_for_ever(
    served: Running, schema: dict[str, Any]
) -> None:
    options = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t\r]*"}
    options |= {"item_separator": r"\s*,\s*", "key_separator": r"\s*:\s*"}
    nested = {"x-guidance": options} | {
        key: {name: each | {"x-guidance": options} for name, each in value.items()}
        if key == "properties"
        else value
        for key, value in schema.items()
    }
    plain, *others = one_by_one(
        served,
        [
            asked(0, each, logit_bias=BLANKS)
            for each in (schema, schema | {"x-guidance": options}, nested)
        ],
    )
    text, why = plain
    assert why == "stop" and right(text, schema)
    assert text == json.dumps(json.loads(text))  # one space at most, never at the end
    assert others == [plain, plain]


@pytest.mark.parametrize("number", [0, 1])
def test_a_clients_options_of_the_library_change_nothing(
    served: Running, number: int
) -> None:
    options = {"coerce_one_of": True, "lenient": True, "max_depth": 1}
    options |= {"item_separator": ";", "key_separator": "=", "unknown": 1}
    for schema in (SCHEMAS["object"], SCHEMAS["refs"], NUMBERS):
        plain = said(served.post(**asked(number, schema)))
        marked = schema | {"x-guidance": options}
        assert said(served.post(**asked(number, marked))) == plain
    for schema in ({"not": {}}, {"oneOf": [{"minimum": 1}, {"maximum": 9}]}):
        marked = schema | {"x-guidance": options}
        assert served.post(**asked(number, marked)).status_code == 400


# What the library itself would let through: a schema, and answers that are not of it.
WITH_A = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
HUGE = 2**63 - 1
HOLES = [
    (WITH_A, '{"a": 1, "\\u0061": "x"}', '{"a": 1, "b": "x"}'),
    (WITH_A, '{"a": 1, "a": "x"}', '{"a": 1, "\\n": "x"}'),
    (WITH_A | {"additionalProperties": LEAF}, '{"a": 1, "\\u0061": "x"}', '{"a": 1}'),
    (WITH_A | {"additionalProperties": LEAF}, '{"a": 1, "b": 2}', '{"a": 1, "b": "x"}'),
    (WITH_A | {"additionalProperties": LEAF}, '{"a": "x"}', '{"a": 1, "aa": "x"}'),
    (
        {"type": "object", "patternProperties": {"^x": INTEGER}},
        '{"\\u0078": "s"}',
        '{"x1": 1}',
    ),
    (WITH_A | {"minProperties": 1}, '{"\\u0061": "x"}', '{"a": 2}'),
    ({"type": "integer", "minimum": 2**53 + 1}, f"{2**53}", f"{2**53 + 99999}"),
    ({"type": "number", "minimum": -(2**62)}, f"{-(2**62) - 1}", f"{-(2**61)}"),
    ({"type": "integer", "maximum": 2**53 + 1}, f"{2**53 + 2}", f"{2**53 - 99999}"),
    ({"type": "integer", "maximum": 2**53 + 3}, f"{2**53 + 4}", f"{2**52}"),
    ({"type": "integer", "exclusiveMinimum": 2**53}, f"{2**53}", f"{2**54}"),
    ({"type": "integer", "exclusiveMaximum": 2**60}, f"{2**60}", f"{2**59}"),
    ({"type": "integer", "exclusiveMinimum": 4, "minimum": 2}, "4", "5"),
    ({"type": "integer", "exclusiveMaximum": 4.5}, "5", "4"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0", "0.25"),
    (
        {"type": "number", "allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]},
        "0.0",
        "0.5",
    ),
    (
        {
            "$defs": {"p": {"exclusiveMinimum": 0}},
            "$ref": "#/$defs/p",
            "maximum": 0.5,
            "type": "number",
        },
        "0",
        "0.125",
    ),
    ({"exclusiveMinimum": 2, "anyOf": [{"type": "number"}]}, "2", "2.25"),
    (STRING | {"pattern": '^[^"]*$'}, '"\\""', '"a"'),
    (STRING | {"pattern": r'^[^\\/:*?"<>|]+$'}, '"\\\\"', '"a.txt"'),
    (STRING | {"pattern": r"^(\[\^|[^!-~])+$"}, '"\\""', '"[^é"'),
    (
        {
            "type": "object",
            "properties": {'q"': INTEGER},
            "additionalProperties": STRING,
        },
        '{"q\\"": "x"}',
        '{"q\\"": 1, "q": "x"}',
    ),
    (
        {"type": "object", "properties": {"\b": INTEGER, "\x7f": INTEGER}},
        '{"\\u0008": "x"}',
        '{"c": "x"}',
    ),
    (
        {"type": "object", "properties": {"\x7f": INTEGER, "\u2028": INTEGER}},
        '{"\\u007F": "x"}',
        '{"c": "x"}',
    ),
    (
        {"$defs": {"a": WITH_A}, "allOf": [{"$ref": "#/$defs/a"}]},
        '{"a": 1, "\\u0061": "x"}',
        '{"a": 1}',
    ),
    (
        {
            "properties": {
                "x/y~ é": WITH_A,
                "z": {"$ref": "#/properties/x~1y~0%20%C3%A9"},
            }
        },
        '{"z": {"a": 1, "\\u0061": "x"}}',
        '{"z": {"a": 1}}',
    ),
    ({"type": "integer", "maximum": HUGE}, f"{HUGE + 1}", f"{2**62}"),
    ({"type": "integer", "minimum": -HUGE - 1}, f"{-(2**65)}", f"{-(2**62)}"),
    ({"type": "integer", "maximum": 2**64}, f"{2**64 + 1}", "-5"),
]


@pytest.mark.parametrize(("schema", "wrong", "right"), HOLES)
def test_what_the_library_lets_through_is_closed(
    served: Running, schema: dict[str, Any], wrong: str, right: str
) -> None:
    jsonschema.validate(json.loads(right), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(wrong), schema)
    assert [allows(served, schema, text) for text in (wrong, right)] == [False, True]


def allows(served: Running, schema: dict[str, Any], answer: str) -> bool:
    """Whether the grammar of the schema takes this answer."""
    asked = {"messages": [{"role": "user", "content": "x"}]} | by(schema)
    body = api.OpenAIRequest.model_validate(asked)
    tokenizer = served.engine.grammars.ll_tokenizer
    matcher = body.matcher(partial(py_api.compile_grammar, tokenizer))
    tokens = [*answer.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


NAMES = ["a", "ab", "b-c", "", "é", "a.b^]", "x y", "\\", "]", "😀"]


@pytest.mark.parametrize("number", range(8))
def test_the_pattern_of_all_other_names(number: int) -> None:
    names = random.Random(number).sample(NAMES, number + 1)
    pattern = f"^{py_api._all_but(names)}$"
    others = {*NAMES, "c", "abc", "b", "b-", "aa", "é1", "x", "x y ", "\n", "a\n"}
    assert not any(re.search(pattern, name) for name in names)
    assert all(re.search(pattern, name) for name in others - {*names})


# ------------------------------------------------------------------------------
# Schemas that cannot be used
# ------------------------------------------------------------------------------


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


ENDLESS = closed(c={"$ref": "#"})
BAD = [
    ({"type": "nonsense"}, "nonsense"),
    ({"type": 5}, "type"),
    ({"$ref": "#/$defs/none"}, "#?/\\$defs/none"),
    ({"$ref": "http://127.0.0.1:9/schema"}, "http://127.0.0.1:9/schema"),
    ({"not": STRING}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"propertyNames": {"enum": [5]}}, "propertyNames"),
    ({"if": INTEGER, "then": {"minimum": 5}}, "if"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    ({"type": "string", "pattern": "(unclosed"}, "unclosed"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
    ({"type": "object", "required": ["z"], "additionalProperties": False}, "z"),
    ({"enum": []}, "nothing satisfies"),
    ({"allOf": [INTEGER, STRING]}, "nothing satisfies"),
    ({"type": "integer", "multipleOf": 0}, "multiple"),
    ({"minimum": "1"}, "minimum"),
    ({"properties": []}, "properties"),
    ({"const": "\ud800"}, "surrogate"),
    ({"const": float("nan")}, "digits"),
    ({"x-guidance": 5, "type": "nonsense"}, "nonsense"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"const": -(2**63)}, "more digits"),  # a stack overflow in the library
    ({"type": "integer", "const": -1e300}, "more digits"),  # another
    ({"enum": [[{"a": 2**53 + 1}]]}, "more digits"),
    ({"const": 13.369468262802005}, "more digits"),
    ({"$defs": {"const": -(2**63)}, "$ref": "#/$defs"}, "no schema"),
    ({"default": {"const": -(2**63)}, "$ref": "#/%64efault"}, "no schema"),
    ({"examples": [{"const": -(2**63)}], "$ref": "#/examples/0"}, "no schema"),
    ({"x": {"properties": {"const": 1}}, "$ref": "#/x/properties"}, "no schema"),
    ({"$id": "http://x/y", "default": {}, "$ref": "http://x/y#/default"}, "leads out"),
    ({"$anchor": "a", "type": "object", "$ref": "#a"}, "no schema"),
    ({"patternProperties": {f"^{n}": {} for n in range(101)}}, "over 100"),
    (
        {
            "allOf": [
                {"patternProperties": {f"^{n}{m}": {} for m in range(60)}} for n in "ab"
            ]
        },
        "over 100",
    ),
    (STRING | {"pattern": r"^\P{P}*$"}, r"\\P"),
    (deep(400), "too deeply"),
    (
        {"type": "object", "properties": {f"p{n}": {} for n in range(900)}},
        "too complex",
    ),
    ({"type": "integer", "maximum": -(2**63)}, "beyond"),
    ({"type": "number", "minimum": 1e-300}, "limit"),
    ({"oneOf": [STRING, {"type": "string", "maxLength": 3}]}, "exclude each other"),
    ({"$ref": "#"}, "only to itself"),
    ({"items": {"$ref": "#/items", "type": "array"}}, "leads"),
    ({"type": "string", "pattern": r"\bfoo\b"}, "look-around"),
    (STRING | {"format": "date", "pattern": "^a"}, "no text satisfies"),
    (STRING | {"format": "email", "minLength": 400}, "too complex"),
]


@pytest.mark.parametrize(("schema", "why"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_used_is_a_400_that_says_what(
    served: Running, schema: Any, why: str, stream: bool
) -> None:
    turn = {"role": "user", "content": "x"}
    body = {"messages": [turn], "stream": stream} | by(schema)
    headers = {"Content-Type": "application/json"}
    text = json.dumps(body)
    url = served.url + OPENAI
    refused = requests.post(url, data=text, headers=headers, timeout=DEADLINE)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == "response_format" or why == "surrogate"
    assert_told(error["message"], why)


def assert_told(message: str, why: str) -> None:
    """That it says what is wrong with a schema: on one line, and not the grammar."""
    assert re.search(why, message), message
    assert "\n" not in message and len(message) < 1200
    inner_words = "start: x-guidance item_separator .rs: %json coerce_one_of f64 Regex"
    for inner in (*inner_words.split(), "(?", "BiasE", "regex parse"):
        assert inner not in message, message


@pytest.mark.parametrize("schema", [None, [], "object", 5, True])
def test_a_schema_that_is_no_object_is_a_400(served: Running, schema: Any) -> None:
    refused = served.post(path=OPENAI, **by(schema))
    assert refused.status_code == 400
    assert "response_format" in refused.json()["error"]["param"]


def test_json_schema_without_one_is_a_400(served: Running) -> None:
    refused = served.post(path=OPENAI, response_format={"type": "json_schema"})
    assert refused.status_code == 400
    assert "json_schema" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "schema", [ENDLESS, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]
)
def test_a_grammar_without_an_end_is_one_clients_error(
    constrained: Running, schema: dict[str, Any], stream: bool
) -> None:
    """It is wrong at its first step or in the middle; others go on undisturbed."""
    thread, bodies = constrained.thread, [asked(0), asked(1), asked(2, NUMBERS)]
    alone = one_by_one(constrained, bodies)
    beside = [constrained.submit(**body) for body in bodies]
    body = asked(3, schema, max_tokens=300) | {"stream": stream}
    response = constrained.post(**body)
    if response.status_code == 200 and stream:
        *_, (event, data) = net.events(response.content)
        assert event == "error"
        told = json.loads(data)["error"]
    else:
        assert response.status_code == 400
        told = response.json()["error"]
    assert_told(told["message"], "schema")
    assert told["param"] == "response_format"
    assert [said(future.result()) for future in beside] == alone
    assert constrained.works() and constrained.thread is thread


# ------------------------------------------------------------------------------
# Neighbours
# ------------------------------------------------------------------------------

MIXED = [asked(n) for n in range(4)]
MIXED += [asked(n, NUMBERS) for n in range(4, 8)]
MIXED += [asked(8, TREE), asked(9, SMALL), asked(10, SCHEMAS["odd keys"])]
MIXED += [
    asked(11, frequency_penalty=1.5, presence_penalty=-0.5),
    asked(12, repetition_penalty=1.7),
    asked(13, min_p=0.1, logit_bias={"65": 3}),
    asked(14, min_tokens=40),
    asked(15, NUMBERS, repetition_penalty=1.3, frequency_penalty=1),
]


@pytest.fixture(scope="module")
def alone(served: Running) -> list[tuple[str, str]]:
    """The answers to MIXED, each without company."""
    answers = one_by_one(served, MIXED)
    for body, (text, why) in zip(MIXED, answers, strict=True):
        if "response_format" in body and why == "stop":
            right(text, body["response_format"]["json_schema"]["schema"])
    # The most of them are long enough for what is done to them below.
    assert len({*answers}) == len(MIXED)
    return answers


def test_nobody_changes_by_a_token_in_company(
    constrained: Running, alone: list[tuple[str, str]]
) -> None:
    assert together(constrained, MIXED) == alone
    free = [i for i, body in enumerate(MIXED) if "response_format" not in body]
    assert together(constrained, [MIXED[i] for i in free]) == [alone[i] for i in free]


def test_nobody_changes_when_constrained_rows_come_and_go(
    constrained: Running, alone: list[tuple[str, str]]
) -> None:
    with constrained.gate as gate:
        gate.close()
        futures = [constrained.submit(**MIXED[n]) for n in (0, 1)]
        constrained.wait_pending(2)
        gate.allow(20)
        wait_until(lambda: gate.held)
        futures += [constrained.submit(**MIXED[n]) for n in (9, 4, 5, 8)]
        constrained.wait_pending(6)
        gate.allow()
    answers = [said(future.result()) for future in futures]
    assert answers == [alone[n] for n in (0, 1, 9, 4, 5, 8)]


# ------------------------------------------------------------------------------
# Preemption, cancels, revival
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", PLAYED)
@pytest.mark.parametrize("sharing", [True, False])
def test_answers_are_the_same_after_preemptions(
    folder: Path,
    alone: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    sharing: bool,
) -> None:
    """Room for four of them: the others are thrown out of the cache and come again."""
    with contextlib.ExitStack() as stack:
        options = {"model": folder, "cache_tokens": 512, "prefix_sharing": sharing}
        stack.enter_context(tiny.one_thread())
        start = played.serving if gpu else running
        small = stack.enter_context(start(**options))
        thrown = small.spy(monkeypatch, "offload_requests")
        assert together(small, MIXED) == alone
        assert sum(bool(done) for _, done in thrown) > 3
        wait_until(small.idle)


@contextlib.contextmanager
def watched_matchers() -> Iterator[list[Any]]:
    """The library's objects that hold an answer to its grammar, as they are made."""
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        make = llguidance.LLMatcher

        def noted(*args: Any, **options: Any) -> Any:
            made.append(make(*args, **options))
            return made[-1]

        patch.setattr(llguidance, "LLMatcher", noted)
        yield made


def all_forgotten(made: list[Any]) -> bool:
    """Whether nobody but the list has them."""
    gc.collect()
    left = [i for i in range(len(made)) if sys.getrefcount(made[i]) > 2]
    return bool(made) and not left


def settled(served: Running) -> bool:
    """After a few more answers, which take the place of the last step's requests."""
    return served.works() and served.works()


def test_cancels_leave_nothing_behind(
    constrained: Running, alone: list[tuple[str, str]]
) -> None:
    bodies = [
        {"messages": [{"role": "user", "content": f"leaves {n}"}]} for n in range(6)
    ]
    with watched_matchers() as made:
        for n, body in enumerate(bodies):
            body |= by(NUMBERS) | {"stream": n % 2 == 1, "temperature": 1, "seed": n}
            with constrained.gate as gate:
                gate.close()
                stays = constrained.submit(**MIXED[4 + n % 2])
                constrained.wait_pending(1)
                with net.connect(constrained.url, net.packet(OPENAI, body)):
                    constrained.wait_pending(2)
                    gate.allow(3 + 2 * n)
                    wait_until(lambda: gate.held)
                constrained.wait_pending(1)
            assert said(stays.result()) == alone[4 + n % 2]
        assert one_by_one(constrained, MIXED[4:7]) == alone[4:7]
        assert settled(constrained)
        wait_until(lambda: all_forgotten(made))


def test_a_revived_thread_knows_no_grammar_of_before(
    constrained: Running, alone: list[tuple[str, str]]
) -> None:
    with watched_matchers() as made:
        with constrained.gate as gate:
            gate.close()
            futures = [constrained.submit(**body) for body in MIXED[4:9]]
            constrained.wait_pending(5)
            gate.allow(6)
            wait_until(lambda: gate.held)
            gate.fail()
            assert [each.result().status_code for each in futures] == [503] * 5
        constrained.wait_ready()
        assert together(constrained, MIXED) == alone
        assert settled(constrained)
        wait_until(lambda: all_forgotten(made))


# ------------------------------------------------------------------------------
# Penalties and limits, against a plain reference
# ------------------------------------------------------------------------------


class Reference:
    """The model, one prompt at a time, and the rules as OpenAI and vLLM tell them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype="float32").eval()
        self.ends = self.model.generation_config.eos_token_id

    def prompt(self, body: dict[str, Any]) -> list[int]:
        turn = {"role": "user", "content": body["prompt"]}
        template = self.tokenizer.apply_chat_template
        return template([turn], add_generation_prompt=True)["input_ids"]

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([tokens])).logits[0, -1].double()

    def edited(self, prompt: list[int], answer: list[int], body: Any) -> torch.Tensor:
        logits = self.logits(prompt + answer)
        for token in {*prompt, *answer}:
            factor = body.get("repetition_penalty", 1)
            logits[token] *= factor if logits[token] < 0 else 1 / factor
        for token, count in Counter(answer).items():
            logits[token] -= body.get("presence_penalty", 0)
            logits[token] -= body.get("frequency_penalty", 0) * count
        for token, bias in body.get("logit_bias", {}).items():
            logits[int(token)] += bias
        if len(answer) < body.get("min_tokens", 0):
            logits[self.ends] = -torch.inf
        return logits

    def greedy(self, body: dict[str, Any]) -> list[int]:
        prompt, answer = self.prompt(body), []
        while len(answer) < body["max_tokens"]:
            answer.append(int(self.edited(prompt, answer, body).argmax()))
            if answer[-1] in self.ends and not body.get("ignore_eos"):
                break
        return answer


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    with tiny.one_thread():
        return Reference(folder)


def greedy(number: int, **body: Any) -> dict[str, Any]:
    """Answers that the end token would end soon, if nothing kept it."""
    return asked(number, temperature=0, **{"max_tokens": 40} | body)


EDITED = [
    greedy(0),
    greedy(1, frequency_penalty=2),
    greedy(2, frequency_penalty=-1),
    greedy(3, presence_penalty=2),
    greedy(4, presence_penalty=-2),
    greedy(5, repetition_penalty=1.4),
    greedy(6, repetition_penalty=0.8),
    greedy(7, logit_bias={"65": 6, "66": 6.5, "10": -100}),
    greedy(8, repetition_penalty=1.2, frequency_penalty=0.7, presence_penalty=-0.4),
    greedy(9, logit_bias={"97": 9}, frequency_penalty=1.1),
    greedy(10, min_tokens=1),
]
ENDING = [
    greedy(20),
    greedy(21, min_tokens=1),
    greedy(22, min_tokens=17),
    greedy(23, min_tokens=40),
    greedy(24, min_tokens=99),
    greedy(25, ignore_eos=True),
    greedy(26, ignore_eos=True, frequency_penalty=0.5),
]


def bodies(reference: Reference) -> list[dict[str, Any]]:
    soon = {str(token): 60.0 for token in reference.ends}
    return EDITED + [body | {"logit_bias": soon} for body in ENDING]


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    with tiny.one_thread():
        found = [reference.greedy(body) for body in bodies(reference)]
        plain = [
            reference.greedy(asked(n, temperature=0, max_tokens=40)) for n in range(11)
        ]
    # Each option has an effect.
    changed = [one != other for one, other in zip(found, plain, strict=False)]
    assert changed == [False, *[True] * 9, False], changed
    lengths = [len(answer) for answer in found[len(EDITED) :]]
    assert lengths == [1, 2, 18, 40, 40, 40, 40]
    return found


def engine_tokens(served: Running, bodies: list[dict[str, Any]]) -> list[list[int]]:
    names: list[str] = []

    def ask() -> None:
        answers = responses_together(served, bodies)
        names.extend(answer.json()["id"] for answer in answers)

    seen = tokens_of(served, ask)
    return [seen[name] for name in names]


def test_what_edits_logits_equals_the_reference(
    each: Running, reference: Reference, expected: list[list[int]]
) -> None:
    asks = bodies(reference)
    found = engine_tokens(each, asks)
    assert found == expected


@pytest.mark.parametrize("gpu", PLAYED)
def test_what_edits_logits_equals_the_reference_after_preemptions(
    folder: Path,
    reference: Reference,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
) -> None:
    with tiny.one_thread():
        start = played.serving if gpu else running
        with start(model=folder, cache_tokens=256) as small:
            thrown = small.spy(monkeypatch, "offload_requests")
            assert engine_tokens(small, bodies(reference)) == expected
            assert sum(bool(done) for _, done in thrown) > 3


@pytest.mark.parametrize(
    "options", [{"top_p": 0}, {"top_k": 1}, {"min_p": 1}, {"top_p": 0, "top_k": -1}]
)
def test_the_narrowest_choice_is_the_likeliest(
    each: Running, expected: list[list[int]], options: dict[str, Any]
) -> None:
    sampled = [greedy(n) | options | {"temperature": 2} for n in (0, 10)]
    found = engine_tokens(each, sampled)
    assert found == [expected[0], expected[10]]


def test_minus_one_is_no_limit(served: Running) -> None:
    answers = [
        said(served.post(**asked(1, **option)))
        for option in ({}, {"top_k": -1}, {"top_k": 0}, {"min_p": 0}, {"top_p": 1})
    ]
    assert answers == [answers[0]] * 5
    assert said(served.post(**asked(1, top_k=2))) != answers[0]


@pytest.mark.parametrize("beside", [{}, {"frequency_penalty": 1.0}])
def test_min_p_drops_the_unlikely(
    each: Running, reference: Reference, beside: dict[str, Any]
) -> None:
    """Of each token of an answer the reference says how likely it was. With no min_p
    there are unlikelier ones."""
    least = {}
    for min_p in (0, 0.2):
        bodies = [
            asked(n, temperature=1.5, seed=n, max_tokens=30, min_p=min_p, **beside)
            for n in range(4)
        ]
        ratios = []
        for body, answer in zip(bodies, engine_tokens(each, bodies), strict=True):
            prompt = reference.prompt(body)
            for i, token in enumerate(answer):
                logits = reference.edited(prompt, answer[:i], body) / 1.5
                ratios.append(float((logits[token] - logits.max()).exp()))
        least[min_p] = min(ratios)
        assert len(ratios) > 40
    assert least[0] < 0.19 and 0.2 - 1e-4 < least[0.2] < 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"290": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0),
        ("min_p", 1.1),
        ("min_tokens", -1),
    ],
)
def test_what_is_out_of_range_is_refused(
    served: Running, field: str, value: Any
) -> None:
    refused = served.post(**asked(0, **{field: value}))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith(field)


# ------------------------------------------------------------------------------
# cached_tokens
# ------------------------------------------------------------------------------


def cached(response: requests.Response) -> int:
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("length", [1, 8, 9, 10, 24, 25, 26, 40])
def test_cached_tokens_are_those_that_are_not_computed(
    served: Running, length: int
) -> None:
    """With the template's 7 tokens or so, these lengths end about a page's border."""
    body = {"prompt": f"{length % 10}" * length, "path": OPENAI, "max_tokens": 3}
    gate = served.gate
    for again in (False, True, True):
        before = sum(gate.tokens)
        response = served.post(**body)
        found, usage = cached(response), response.json()["usage"]
        wait_until(served.idle)
        computed = sum(gate.tokens) - before - (usage["completion_tokens"] - 1)
        assert found == usage["prompt_tokens"] - computed
        assert found % 16 == 0
        if not again:
            assert found == 0
        else:
            assert found in (
                (usage["prompt_tokens"] - 1) // 16 * 16,
                usage["prompt_tokens"] // 16 * 16,
            )


def test_cached_tokens_of_a_shared_beginning(each: Running) -> None:
    base = "the beginning of all of them, "
    cold = each.post(base + "one" * 9, OPENAI, max_tokens=3)
    warm = each.post(base + "two" * 9, OPENAI, max_tokens=3)
    again = each.post(base + "two" * 9, OPENAI, max_tokens=3, **by(SMALL))
    tokens = again.json()["usage"]["prompt_tokens"]
    assert cached(cold) == 0
    assert 0 < cached(warm) <= len(base) + 10 and cached(warm) % 16 == 0
    assert tokens - 17 <= cached(again) < tokens


@pytest.mark.parametrize("gpu", PLAYED)
def test_cached_tokens_do_not_count_what_a_preemption_computes_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    with tiny.one_thread():
        start = played.serving if gpu else running
        with start(model=folder, cache_tokens=320) as small:
            thrown = small.spy(monkeypatch, "offload_requests")
            futures = []
            with small.gate as gate:
                gate.close()
                for n in range(8):
                    body = asked(n, NUMBERS) | {"prompt": f"{n}" * 40}
                    futures.append(small.submit(**body))
                    small.wait_pending(n + 1)
            found = [cached(future.result()) for future in futures]
            assert any(done for _, done in thrown)
            assert found == [0] * 8


# ------------------------------------------------------------------------------
# Compiling
# ------------------------------------------------------------------------------


def test_compiling_blocks_nobody(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    make = llguidance.LLMatcher

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(DEADLINE)
        return make(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", slow)
    expected = one_by_one(served, [asked(0)])
    waiting = served.submit(**asked(2, SMALL))
    try:
        assert begun.wait(DEADLINE)
        assert requests.get(served.url + "/health", timeout=5).ok
        assert one_by_one(served, [asked(0)]) == expected
        assert not waiting.done()
    finally:
        go_on.set()
    assert said(waiting.result())[1] == "stop"


def test_who_left_before_the_compiler_was_free_is_not_compiled(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, made = threading.Event(), threading.Event(), []
    make = llguidance.LLMatcher

    def slow(*args: Any, **options: Any) -> Any:
        made.append(str(args))
        begun.set()
        assert go_on.wait(DEADLINE)
        return make(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", slow)
    monkeypatch.setattr(served.engine.grammars, "turns", asyncio.Semaphore(1))
    waiting = served.submit(**asked(2, SMALL))
    try:
        assert begun.wait(DEADLINE)
        body = {"messages": [{"role": "user", "content": "x"}]} | by({"const": "gone"})
        with net.connect(served.url, net.packet(OPENAI, body)):
            served.wait_pending(2)
        served.wait_pending(1)
    finally:
        go_on.set()
    assert said(waiting.result())[1] == "stop"
    assert said(served.post(**asked(2, SMALL)))[1] == "stop"
    assert not any("gone" in each for each in made)


TOO_MUCH = {
    "patterns": {
        "type": "object",
        "patternProperties": {f"^x{n}_": INTEGER for n in range(2000)},
    },
    "a multiple": {"type": "integer", "multipleOf": 1_000_003},
    "multiples": {
        "allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967)]
    },
    "a pattern": STRING | {"pattern": "^(a{1000}){1000}$"},
    "words": STRING | {"pattern": "|".join(f"w{n}" for n in range(80_000))},
    "properties": {"type": "object", "properties": {f"p{n}": {} for n in range(4000)}},
    "references": {
        "$defs": {
            f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}, {"type": "null"}]}
            for n in range(2000)
        }
        | {"a2000": INTEGER},
        "$ref": "#/$defs/a0",
    },
    "large multiples": {"anyOf": [{"multipleOf": 3**180 + 2 * n} for n in range(1500)]},
    "a number of patterns": {"type": "object", "patternProperties": 5},
    "nothing between": {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1e-12,
    },
    "patterns in many places": {
        "allOf": [
            {"patternProperties": {f"^x{n}I_{m}": INTEGER for n in range(100)}}
            for m in range(8)
        ]
    },
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_would_take_too_long_is_refused_soon(served: Running, name: str) -> None:
    """And the process lives: a long chain of references is compiled by recursion."""
    begun = time.monotonic()
    answer = served.post(**asked(2, TOO_MUCH[name], max_tokens=200))
    if name != "references":
        assert answer.status_code == 400
        assert "response_format" in answer.json()["error"]["message"]
    assert time.monotonic() - begun < 5 * py_api.COMPILE_SECONDS
    assert said(served.post(**asked(2, SMALL)))[1] == "stop"


def test_a_grammar_that_is_compiled_too_long_is_given_up(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, make = threading.Event(), llguidance.LLMatcher

    def slow(*args: Any, **options: Any) -> Any:
        assert "slow" not in str(args) or go_on.wait(DEADLINE)
        return make(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", slow)
    monkeypatch.setattr(py_api, "COMPILE_SECONDS", 0.3)
    statuses = []
    try:
        for _ in range(3):
            statuses.append(served.post(**asked(2, {"const": "slow"})).status_code)
        statuses.append(served.post(**asked(2)).status_code)
    finally:
        go_on.set()
    # A thread cannot be ended, and no others take its place.
    assert statuses == [400, 400, 503, 200]
    monkeypatch.setattr(py_api, "COMPILE_SECONDS", DEADLINE)
    assert said(served.post(**asked(2, SMALL)))[1] == "stop"
    assert said(served.post(**asked(2, SMALL)))[1] == "stop"


def test_who_waits_for_a_slow_one_has_his_own_time(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a schema counts from its turn. Without a turn it may come again."""
    go_on, begun, make = threading.Event(), threading.Event(), llguidance.LLMatcher

    def slow(*args: Any, **options: Any) -> Any:
        if "slow" in str(args):
            begun.set()
            assert go_on.wait(DEADLINE)
        return make(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", slow)
    monkeypatch.setattr(served.engine.grammars, "turns", asyncio.Semaphore(1))
    first = served.submit(**asked(2, {"const": "slow"}))
    try:
        assert begun.wait(DEADLINE)
        monkeypatch.setattr(py_api, "COMPILE_SECONDS", 0.3)
        refused = served.post(**asked(2, SMALL))
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        monkeypatch.setattr(py_api, "COMPILE_SECONDS", DEADLINE)
        waiting = served.submit(**asked(2, SMALL))
        served.wait_pending(2)
    finally:
        go_on.set()
    assert said(first.result())[1] == said(waiting.result())[1] == "stop"


@pytest.mark.parametrize("wrong", ["response_format", "tools[1].function.parameters"])
@pytest.mark.parametrize("bad", [{"not": {}}, {"properties": {"a": {"type": "no"}}}])
def test_the_schema_that_is_wrong_is_named(
    served: Running, wrong: str, bad: dict[str, Any]
) -> None:
    """Where there are several."""
    good = {"type": "object", "properties": {"a": INTEGER}}
    functions = [
        {"name": "f", "parameters": good, "strict": True},
        {"name": "g", "parameters": bad if "tools" in wrong else good, "strict": True},
    ]
    tools = [{"type": "function", "function": each} for each in functions]
    answer = by(bad if wrong == "response_format" else good)
    for more in ({}, answer) if "tools" in wrong else (answer,):
        refused = served.post(prompt="x", path=OPENAI, tools=tools, **more)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == wrong and error["message"].startswith(wrong)


@pytest.mark.parametrize(
    "value", [{"format": "phone", "a": 1}, {"minimum": 1, "exclusiveMaximum": 1.5}]
)
def test_what_looks_like_a_schema_may_be_a_value(served: Running, value: Any) -> None:
    text, reason = said(served.post(**asked(2, {"const": value})))
    assert reason == "stop" and json.loads(text) == value
    named = {"patternProperties": {"type": "boolean"}, "format": {"enum": ["x"]}}
    text, reason = said(served.post(**asked(2, closed(**named))))
    assert reason == "stop" and json.loads(text)["format"] == "x"


def test_under_torchrun_it_is_refused_with_a_reason(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process would need a grammar of its own."""
    monkeypatch.setattr(py_api, "WORLD_SIZE", 2)
    refused = served.post(**asked(2, SMALL))
    assert refused.status_code == 400
    assert "torchrun" in refused.json()["error"]["message"]
    assert said(served.post(**asked(2, max_tokens=4)))[1] == "length"


def test_an_unknown_format_is_a_remark(served: Running) -> None:
    schema = STRING | {"format": "no-such-format", "maxLength": 3}
    assert said(served.post(**asked(3, schema)))[1] == "stop"


def slowest_health(served: Running, future: "Future[Any]") -> float:
    """Seconds that /health took, at most, until this was done."""
    slowest = 0.0
    while not future.done():
        begun = time.monotonic()
        assert requests.get(served.url + "/health", timeout=DEADLINE).ok
        slowest = max(slowest, time.monotonic() - begun)
    return slowest


LARGE = {"enum": [f"value number {n}" for n in range(9000)]}


@pytest.mark.parametrize("schema", [LARGE])
def test_a_large_schema_delays_nobody(served: Running, schema: Any) -> None:
    """Whether it is refused or not."""
    plain = asked(0, max_tokens=20)
    said(served.post(**plain))
    asking = served.submit(**asked(2, schema))
    assert slowest_health(served, asking) < 1
    assert asking.result().status_code in (200, 400)
