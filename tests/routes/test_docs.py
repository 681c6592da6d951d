# SPDX-License-Identifier: MIT
"""The try-it page, its examples and its schema; test_page.py tries it in a browser."""

import re
import subprocess
import sys
from typing import Any

import pytest
import requests
import tiny
from net import DEADLINE
from openapi_spec_validator import validate
from server import Running, running

import api

JSON = "application/json"
METHODS = {
    ("/", "post"),
    ("/v1/chat/completions", "post"),
    ("/v1/models", "get"),
    ("/v1/models/{name}", "get"),
    ("/health", "get"),
    ("/metrics", "get"),
}


@pytest.fixture(scope="module")
def schema(server: Running) -> dict[str, Any]:
    return requests.get(server.url + "/openapi.json", timeout=DEADLINE).json()


def operations(schema: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (p, m, op)
        for p, methods in schema["paths"].items()
        for m, op in methods.items()
    ]


def resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["components"]["schemas"][node["$ref"].rpartition("/")[2]]
    return node


def test_the_document_is_valid_openapi(schema):
    validate(schema)
    assert {(path, method) for path, method, _ in operations(schema)} == METHODS


def test_every_operation_says_what_it_does_and_how_it_fails(schema):
    for path, method, operation in operations(schema):
        assert operation["summary"] and operation["description"], path
        answers = operation["responses"]
        media = "text/plain" if path == "/metrics" else JSON
        assert media in answers["200"]["content"]
        if media == JSON:
            shown = resolved(schema, answers["200"]["content"][media]["schema"])
            assert shown["properties"], path
        if path == "/health":
            assert {"200", "503"} == set(answers)
        else:
            assert {"200", "4XX", "5XX"} <= set(answers)
            for code in ("4XX", "5XX"):
                shown = resolved(schema, answers[code]["content"][JSON]["schema"])
                key = "error" if path.startswith("/v1/") else "detail"
                assert set(shown["properties"]) == {key}, path
        if method == "post":
            assert "text/event-stream" in answers["200"]["content"]
        for response in answers.values():
            assert response["description"]


def test_the_ranges_are_in_the_schema(schema):
    for name in ("ChatRequest", "OpenAIRequest"):
        fields = schema["components"]["schemas"][name]["properties"]
        ranges = {
            "temperature": {"minimum": 0, "maximum": 2},
            "top_p": {"minimum": 0, "maximum": 1},
            "top_k": {"minimum": -1, "maximum": 1024},
            "min_p": {"minimum": 0, "maximum": 1},
            "presence_penalty": {"minimum": -2, "maximum": 2},
            "frequency_penalty": {"minimum": -2, "maximum": 2},
            "repetition_penalty": {"minimum": 0.01, "maximum": 10},
            "min_tokens": {"minimum": 0},
        }
        for field, limits in ranges.items():
            assert limits.items() <= fields[field]["anyOf"][0].items(), field
            assert fields[field]["description"]
        _, several, _ = fields["stop"]["anyOf"]
        assert several["maxItems"] == 4
        seed = fields["seed"]["anyOf"][0]
        assert seed["minimum"] == -(2**63) and seed["exclusiveMaximum"] == 2**63
        limits = [each for each in fields if each.startswith("max_")]
        assert all(fields[each]["anyOf"][0]["minimum"] == 1 for each in limits)
        assert len(limits) == (1 if name == "ChatRequest" else 2)


def test_examples_run_as_they_are(server, schema):
    ran = 0
    for path, method, operation in operations(schema):
        if method != "post":
            continue
        media = operation["requestBody"]["content"][JSON]
        given = [example["value"] for example in media.get("examples", {}).values()]
        given.append(resolved(schema, media["schema"])["example"])
        # Without one Swagger UI invents it, with the lowest and highest numbers.
        assert given, path
        for example in given:
            answer = requests.post(server.url + path, json=example, timeout=DEADLINE)
            assert answer.status_code == 200, answer.text
            ran += 1
    assert ran >= 2


def test_the_page_loads_everything_from_this_server(tiny_folder, server):
    """Without a key, also where one is set: a browser sends none for these."""
    with running(model=tiny_folder, api_key="k") as locked:
        for served in (server, locked):
            page = requests.get(served.url + "/docs", timeout=DEADLINE)
            assert page.headers["Content-Type"].startswith("text/html")
            assert not re.search(r"https?://", page.text)
            assets = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
            kinds = {asset.rpartition(".")[2] for asset in assets}
            assert len(assets) == 3 and kinds == {"js", "css", "png"}
            [document] = re.findall(r"url: '([^']+)'", page.text)
            assert document == "/openapi.json"
            for path in (*assets, document):
                loaded = requests.get(served.url + path, timeout=DEADLINE)
                assert loaded.status_code == 200 and loaded.content, path


def test_a_key_can_be_entered_on_the_page(schema):
    [scheme] = schema["components"]["securitySchemes"].values()
    assert scheme == {"type": "http", "scheme": "bearer"}
    secured = {
        path for path, _, operation in operations(schema) if operation.get("security")
    }
    assert secured == {path for path, _ in METHODS} - {"/health"}


def test_the_page_has_headings_and_a_version(schema):
    """Of each operation a newcomer sees its heading, its path and its summary."""
    assert schema["info"]["version"] == "1.0.0"
    shown = [
        (operation["tags"], path, operation["summary"])
        for path, _, operation in operations(schema)
    ]
    assert shown == [
        (["Chat"], "/", "Ask The Model"),
        (["OpenAI API"], "/v1/chat/completions", "Chat Completions"),
        (["OpenAI API"], "/v1/models", "List Models"),
        (["OpenAI API"], "/v1/models/{name}", "Get Model"),
        (["Server"], "/metrics", "Read Metrics"),
        (["Server"], "/health", "Check Health"),
    ]


def test_the_demo_says_that_it_is_not_phi_4():
    document = api.create_app(api.Settings(demo=True)).openapi()
    assert "not phi-4" in document["info"]["description"]


# GET / is the chat page, which is not in the schema.
SCHEMATHESIS = """
[[operations]]
include-path = "/"
[operations.phases.coverage]
unexpected-methods = ["put", "patch", "delete", "options", "trace"]
"""


def test_no_generated_request_breaks_the_server_or_its_schema(tmp_path):
    """Every check of schemathesis but one, on systematic and on random requests. The
    one: valid data is always accepted. No schema knows how many tokens a prompt has."""
    tiny.tiny_model(tmp_path, context=2048, eos="always")  # the text does not matter
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    with running(model=tmp_path, api_key="k") as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run"]
        command += [served.url + "/openapi.json", "--header=Authorization: Bearer k"]
        command += ["--checks=all", "--exclude-checks=positive_data_acceptance"]
        command += ["--phases=examples,coverage,fuzzing", "--max-examples=20"]
        command += ["--generation-deterministic", "--no-color", "--continue-on-failure"]
        # Some answers fill the context; ten seconds are the default of both.
        limits = "--request-timeout", "--max-response-time"
        command += [f"{limit}={DEADLINE}" for limit in limits]
        probe = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path
        )
    assert probe.returncode == 0, probe.stdout[-6000:] + probe.stderr
