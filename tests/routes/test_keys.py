# SPDX-License-Identifier: MIT
"""API keys, request ids, what is logged, and the warning about an open port."""

import logging
import secrets

import pytest
import requests
from net import free_port
from server import forked, running, wait_until

import api
import py_api

KEYS = "first-key, second-key"
OPEN = "/", "/health", "/docs", "/openapi.json"


@pytest.fixture(scope="module")
def locked(tiny_folder):
    with running(model=tiny_folder, api_key=KEYS) as served:
        yield served


def ask(served, method, path, authorization=None, **more):
    headers = {"Authorization": authorization} if authorization else {}
    url = served.url + path
    return requests.request(method, url, headers=headers, timeout=60, **more)


PROTECTED = [
    ("POST", "/", {"prompt": "x", "max_new_tokens": 1}),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    ),
    ("GET", "/v1/models", None),
    ("GET", "/metrics", None),
]
WRONG = [
    None,
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    "Bearer first-ke",
    "Bearer first-key2",
    "Bearer FIRST-KEY",
    "Bearer first-key, second-key",
    "Bearer ,",
    "Basic first-key",
    "first-key",
    "Bearer \u00e9\u00ff",
]


@pytest.mark.parametrize("authorization", WRONG)
@pytest.mark.parametrize(("method", "path", "body"), PROTECTED)
def test_without_a_key_there_is_no_answer(locked, method, path, body, authorization):
    answer = ask(locked, method, path, authorization, json=body)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "key" in answer.text
    assert "first" not in answer.text
    assert set(answer.json()) == ({"error"} if "/v1" in path else {"detail"})


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_the_key_comes_before_the_body(locked, path):
    headers = {"Content-Type": "application/json"}
    for body in (b"{", b"[" * 9000, b"\xff"):
        url = locked.url + path
        answer = requests.post(url, data=body, headers=headers, timeout=60)
        assert answer.status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
@pytest.mark.parametrize("key", ["first-key", "second-key"])
@pytest.mark.parametrize(("method", "path", "body"), PROTECTED)
def test_every_key_opens_every_route(locked, method, path, body, key, scheme):
    answer = ask(locked, method, path, f"{scheme} {key}", json=body)
    assert answer.status_code == 200


@pytest.mark.parametrize("path", OPEN)
def test_pages_without_model_data_stay_open(locked, path):
    assert ask(locked, "GET", path).status_code == 200


def test_a_public_page_opens_no_other_method_of_its_path(locked):
    """Who may reach a route is a matter of the route and its method, not of the path."""
    assert ask(locked, "GET", "/").text == api.CHAT_PAGE
    body = {"json": {"prompt": "x"}}
    assert ask(locked, "POST", "/", **body).status_code == 401
    assert ask(locked, "POST", "/", "Bearer wrong", **body).status_code == 401
    assert ask(locked, "PUT", "/").status_code == 405
    assert ask(locked, "GET", "/nowhere").status_code == 404


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
    """Every key is, with the function made for it, also after a match."""
    compared, compare = [], secrets.compare_digest

    def spy(given, key):
        compared.append(key)
        return compare(given, key)

    monkeypatch.setattr(secrets, "compare_digest", spy)
    for key in ("first-key", "second-key", "neither"):
        ask(locked, "GET", "/v1/models", f"Bearer {key}")
    assert compared == [b"first-key", b"second-key"] * 3


def test_no_key_set_means_none_needed(server):
    assert ask(server, "GET", "/v1/models").status_code == 200
    assert ask(server, "GET", "/v1/models", "Bearer any").status_code == 200


@pytest.mark.parametrize("given", ["a", "7f-1:2.3_Z", "x" * 128])
def test_a_clients_request_id_comes_back(server, given):
    answer = requests.get(server.url + "/health", headers={"X-Request-ID": given})
    assert answer.headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "a b", "a/b", "x" * 129, "\u00e9", "a\tb", '"'])
def test_an_ill_formed_request_id_is_replaced(server, given):
    answer = requests.get(
        server.url + "/health", headers={"X-Request-ID": given.encode("latin-1")}
    )
    assert answer.headers["X-Request-ID"] != given
    assert answer.headers["X-Request-ID"].isalnum()


@pytest.mark.parametrize("path", ["/nothing", "/", "/v1/models"])
def test_errors_have_a_request_id_too(locked, path):
    assert ask(locked, "POST", path).headers["X-Request-ID"]


def test_a_request_is_one_line_of_log_without_its_text(server, caplog):
    caplog.set_level(logging.INFO)
    answer = server.post("something private", max_new_tokens=3)
    name = answer.headers["X-Request-ID"]
    wait_until(lambda: name in caplog.text)
    [line] = [r.getMessage() for r in caplog.records if name in r.getMessage()]
    for part in ("POST /", "200", "in=", "out=3", "first=", "total="):
        assert part in line
    assert "private" not in caplog.text
    assert answer.json()["response"] not in caplog.text


TURNS = [{"role": "user", "content": "something private"}]
PRIVATE = {"prompt": "something private", "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/", PRIVATE | {"stream": True}, 200),
        ("/", PRIVATE | {"stop": "something private"}, 200),
        ("/", {"prompt": "x", "history": TURNS, "max_new_tokens": 3}, 200),
        ("/", PRIVATE | {"something private": 1}, 422),
        ("/", PRIVATE | {"max_new_tokens": 10**6}, 400),
        ("/v1/chat/completions", {"messages": TURNS, "max_tokens": 3}, 200),
        ("/v1/chat/completions", {"messages": TURNS, "tools": TURNS}, 400),
        ("/?q=something+private", PRIVATE, 200),
    ],
)
def test_no_request_leaves_its_text_in_the_log(server, caplog, path, body, status):
    caplog.set_level(logging.INFO)
    headers = {"X-Request-ID": "the-one"}
    url = server.url + path
    answer = requests.post(url, json=body, headers=headers, timeout=60)
    assert answer.status_code == status
    wait_until(lambda: "the-one" in caplog.text)
    lines = [r.getMessage() for r in caplog.records if r.name == "phi4"]
    [line] = [line for line in lines if line.startswith("the-one ")]
    assert f" {status} " in line and "total=" in line
    assert ("out=3" in line) == (status == 200)
    assert "private" not in "".join(lines)


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_prompts_and_answers_are_logged_at_debug_level(server, caplog, path):
    caplog.set_level(logging.DEBUG, "phi4")
    body = {"messages": TURNS, "max_tokens": 3} if path != "/" else PRIVATE
    answer = requests.post(server.url + path, json=body, timeout=60).json()
    said = answer["response"] if path == "/" else None
    said = said or answer["choices"][0]["message"]["content"]
    wait_until(lambda: "total=" in caplog.text)
    lines = [r.getMessage() for r in caplog.records if r.name == "phi4"]
    assert any("something private" in line for line in lines)
    assert any(said in line or repr(said)[1:-1] in line for line in lines)
    assert all(line.isprintable() for line in lines)  # a prompt cannot forge a line


def test_the_real_log_has_one_line_for_a_request(tiny_folder):
    with forked("--model", str(tiny_folder), "--device", "cpu") as process:
        for _ in range(2):
            requests.post(process.url + "/?q=private", json=PRIVATE, timeout=60)
        wait_until(lambda: process.log().count("total=") == 2)
        assert process.log().count("POST") == 2
        assert "private" not in process.log()


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ((), True),
        (("--host", "127.0.0.1"), False),
        (("--host", "0.0.0.0", "--api-key", "k"), False),
    ],
)
def test_an_open_port_is_warned_about(
    tiny_folder, monkeypatch, caplog, options, warned
):
    monkeypatch.setattr(py_api.Server, "run", lambda self, sockets: sockets[0].close())
    command = ["api.py", "--model", str(tiny_folder), "--device", "cpu", *options]
    monkeypatch.setattr("sys.argv", [*command, "--port", str(free_port())])
    assert api.main() == 0
    lines = [r for r in caplog.records if "no API key" in r.getMessage()]
    assert len(lines) == warned
