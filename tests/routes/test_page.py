# SPDX-License-Identifier: MIT
"""The chat page at `GET /`, in a real browser, and /docs there. What needs no browser
comes first."""

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from fastapi.testclient import TestClient
from net import DEADLINE
from playwright.sync_api import Browser, Page, expect, sync_playwright
from server import Running, running, wait_until

import api

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
CHROMIUM = next(filter(None, map(shutil.which, (*NAMES, "chrome"))), None)
FOREIGN = "phi4.example"  # leads to this machine, in the browser of these tests
FENCE = "```"
Say = Callable[..., None]

# ------------------------------------------------------------------------------
# Without a browser
# ------------------------------------------------------------------------------


def test_the_page_is_one_file_that_can_load_and_run_nothing_else(server):
    answer = requests.get(server.url + "/", timeout=DEADLINE)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    given = answer.headers["Content-Security-Policy"].split("; ")
    policy = dict(directive.split(" ", 1) for directive in given)
    assert len(policy) == len(given)
    for tag in ("script", "style"):
        [text] = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest.decode()}'"
    nothing = "default-src", "base-uri", "form-action", "frame-ancestors"
    wanted = dict.fromkeys(nothing, "'none'") | {"connect-src": "'self'"}
    wanted |= {"img-src": "data:", "require-trusted-types-for": "'script'"}
    assert policy == wanted
    assert not re.search(
        r"\bsrc=|@import|https?://(?!www\.w3\.org/2000/svg)", answer.text
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|eval\(", answer.text)
    assert " style=" not in answer.text and not re.search(r"\son\w+=", answer.text)


def test_the_page_can_be_read():
    lines = api.CHAT_PAGE.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 112


def test_head_has_the_headers_alone(server):
    got = requests.get(server.url + "/", timeout=DEADLINE)
    asked = requests.head(server.url + "/", timeout=DEADLINE)
    differ = dict.fromkeys(("date", "x-request-id"))
    assert {**asked.headers, **differ} == {**got.headers, **differ}
    assert (asked.status_code, asked.content) == (200, b"")


def test_the_page_needs_no_key_and_no_model(counting, monkeypatch):
    monkeypatch.setattr(counting.engine.settings, "api_key", "right")
    monkeypatch.setattr(counting.engine, "phase", "loading")
    assert requests.get(counting.url, timeout=DEADLINE).text == api.CHAT_PAGE
    assert counting.post().status_code == 503
    monkeypatch.setattr(counting.engine, "phase", "serving")
    assert counting.post().status_code == 401


@pytest.mark.parametrize("prefix", ["", "/phi4"])
def test_the_page_alone_answers_to_any_name(tiny_folder, prefix):
    app = api.create_app(api.Settings(model=tiny_folder))
    client = TestClient(app, f"http://{FOREIGN}", root_path=prefix)
    assert client.get(prefix + "/").text == api.CHAT_PAGE
    assert client.get(prefix).text == api.CHAT_PAGE  # without its slash
    for method, path in [
        ("GET", "/health"),
        ("POST", "/"),
        ("GET", "/docs"),
        ("GET", "/no"),
    ]:
        assert client.request(method, prefix + path).status_code == 403, path


def test_the_page_is_not_in_the_schema(server):
    schema = requests.get(server.url + "/openapi.json", timeout=DEADLINE).json()
    assert [*schema["paths"]["/"]] == ["post"]


# ------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    arguments = [f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"]
    arguments += ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        expect.set_options(timeout=1000 * DEADLINE)
        yield launched
        launched.close()


class Chat:
    """The page of a server in a tab of its own, and what a reader does there."""

    def __init__(
        self, browser: Browser, url: str, path: str = "/", **options: Any
    ) -> None:
        options = {"locale": "en-GB", "reduced_motion": "reduce"} | options
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(1000 * DEADLINE)
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.sent: list[dict[str, Any]] = []  # bodies of POST /
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self.hear)
        self.page.on("request", self.see)
        self.page.goto(url + path)
        self.field = self.page.locator("#field")
        self.button = self.page.locator("#send")
        self.notice = self.page.locator("#notice")
        self.turns = self.page.locator("section")

    def hear(self, line: Any) -> None:
        # The browser has a line for each status over 400, which the page takes care of.
        if line.type in ("error", "warning") and "Failed to load" not in line.text:
            self.problems.append(line.text)

    def see(self, request: Any) -> None:
        if request.method == "POST":
            self.sent.append(request.post_data_json)

    def ask(self, prompt: str = "hello", key: str = "Enter") -> None:
        self.field.fill(prompt)
        self.field.press(key)

    def turn(self, number: int = -1) -> "Turn":
        return Turn(self.turns.nth(number))

    def answered(self, text: str, number: int = -1, note: str = "Complete") -> "Turn":
        """Wait for an answer that is finished."""
        turn = self.turn(number)
        expect(turn.note).to_have_text(note)
        expect(turn.text).to_have_text(text)
        expect(self.button).to_have_text("Send")
        return turn

    def run(self, script: str) -> Any:
        return self.page.evaluate(script)


class Turn:
    def __init__(self, locator: Any) -> None:
        self.question = locator.locator(".question")
        self.text = locator.locator("> div").first
        self.note = locator.locator("output")
        self.again = locator.get_by_role("button", name="Send again")
        self.copy = locator.locator("> .bar").get_by_role("button", name="Copy")


Open = Callable[..., Chat]


@pytest.fixture
def visit(browser: Browser, counting: Running) -> Iterator[Open]:
    """Opens the page of a server, `counting` unless told otherwise. At the end of the
    test, nothing may have gone wrong in the browser."""
    opened = []

    def open_page(url: str = counting.url, **options: Any) -> Chat:
        opened.append(Chat(browser, url, **options))
        return opened[-1]

    yield open_page
    counting.gate.allow()
    for chat in opened:
        chat.context.close()
        assert not chat.problems


@pytest.fixture
def chat(visit: Open) -> Chat:
    return visit()


def test_a_question_and_its_streamed_answer(
    chat: Chat, counting: Running, say: Say
) -> None:
    say(b"Par", b"is", " 是".encode(), b" it.")
    expect(chat.page).to_have_title("phi-4")
    with counting.gate as gate:
        gate.allow(2)
        chat.ask("What is the capital\n of France?")
        turn = chat.turn()
        expect(turn.text).to_have_text("Paris")
        expect(turn.note).to_have_text("Answering …")
        expect(chat.button).to_have_text("Stop")
        expect(chat.field).to_have_value("")
    chat.answered("Paris 是 it.")
    assert turn.question.inner_text() == "What is the capital\n of France?"
    chat.ask("And of Spain?")
    chat.answered("Paris 是 it.", 1)
    first, second = chat.sent
    prompt = "What is the capital\n of France?"
    assert first == {"prompt": prompt, "history": [], "stream": True}
    assert second["history"] == [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "Paris 是 it."},
    ]


def test_a_new_conversation_has_no_history_and_frees_the_place(
    chat: Chat, counting: Running, say: Say
) -> None:
    say(b"one", b" two")
    chat.ask()
    chat.answered("one two")
    with counting.gate as gate:
        gate.allow(1)
        chat.ask()
        expect(chat.turn(1).text).to_have_text("one")
        chat.page.get_by_role("link", name="New conversation").click()
        expect(chat.turns).to_have_count(0)
        counting.wait_pending(0)
    chat.ask("afresh")
    chat.answered("one two")
    assert chat.sent[-1]["history"] == []


@pytest.mark.parametrize("how", ["button", "keyboard"])
def test_stop_frees_the_place_and_keeps_what_is_shown(
    chat: Chat, counting: Running, say: Say, how: str
) -> None:
    say(b"one", b" two", b" three")
    with counting.gate as gate:
        gate.allow(1)
        chat.ask()
        expect(chat.turn().text).to_have_text("one")
        chat.field.press("Enter")  # stops nothing
        counting.wait_pending(1)
        if how == "button":
            chat.button.click()
        else:
            chat.field.press("Tab")
            chat.page.keyboard.press("Space")
        chat.answered("one", note=re.compile("Stopped"))
        counting.wait_pending(0)
    chat.ask("go on")
    chat.answered("one two three", 1)
    assert chat.sent[1]["history"][1:] == [{"role": "assistant", "content": "one"}]


def test_stop_before_the_first_word(chat: Chat, counting: Running, say: Say) -> None:
    say(b"one")
    with counting.gate as gate:
        gate.close()
        chat.ask("slow")
        counting.wait_pending(1)
        chat.button.click()
        counting.wait_pending(0)
    turn = chat.turn()
    expect(turn.note).to_contain_text("not part of the conversation")
    turn.again.click()
    chat.answered("one")
    expect(chat.turns).to_have_count(1)
    assert chat.sent[-1] == {"prompt": "slow", "history": [], "stream": True}


def test_nothing_that_an_answer_contains_can_run(chat: Chat, say: Say) -> None:
    evil = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    evil += "<b>bold</b> [link](javascript:window.ran=1) &lt; \x00\x1b[31m \u202e "
    say(
        evil[:9].encode(),
        evil[9:].encode(),
        f"\n{FENCE}html\n{evil}\n{FENCE}\n".encode(),
    )
    chat.ask(evil.replace("\x00", ""))
    turn = chat.answered(re.compile("onerror.*onerror", re.DOTALL))
    assert turn.text.locator("p").first.text_content() == evil.strip()
    assert turn.text.locator("code").text_content() == evil + "\n"
    assert turn.question.text_content() == evil.replace("\x00", "")
    assert chat.run("window.ran") is None
    assert (
        chat.run("document.querySelectorAll('main :is(script, img, b, a)').length") == 0
    )
    assert chat.page.url.endswith("/")


# What is shown of a text: paragraphs as strings, code as (language, code).
SHOWN = {
    "plain": ("a `b` c\nd", ["a `b` c\nd"]),
    "code": (
        f"Look:\n\n{FENCE}python\nif x:\n    y  \n\n{FENCE}\n\nSo.\n",
        ["Look:", ("python", "if x:\n    y  \n\n"), "So."],
    ),
    "no language": (f"{FENCE}\nx\n{FENCE}", [("", "x\n")]),
    "unclosed": (f"a\n{FENCE}c\nx\ny", ["a", ("c", "x\ny")]),
    "indented": (
        f"1. a\n   {FENCE}sh\n   ls\n   {FENCE}\n2. b",
        ["1. a", ("sh", "   ls\n"), "2. b"],
    ),
    "longer": (
        f"{FENCE}`md\n{FENCE}\nx\n{FENCE}\n{FENCE}`\nend",
        [("md", f"{FENCE}\nx\n{FENCE}\n"), "end"],
    ),
    "behind the mark of a list": (
        f"Do:\n- {FENCE}sh\n  ls\n  {FENCE}\n- b\n12. {FENCE}\nx\n{FENCE}\n- 3",
        ["Do:", ("sh", "  ls\n"), "- b", ("", "x\n"), "- 3"],
    ),
    "a longer end": (f"{FENCE}c\nx\n{FENCE}`\nend", [("c", "x\n"), "end"]),
    "two": (
        f"{FENCE}a\n1\n{FENCE}\n{FENCE}b\n2\n{FENCE}",
        [("a", "1\n"), ("b", "2\n")],
    ),
    "in a line": (
        f"use {FENCE} and\n{FENCE}x{FENCE} too",
        [f"use {FENCE} and\n{FENCE}x{FENCE} too"],
    ),
    "only begun": (f"a\n{FENCE}", [f"a\n{FENCE}"]),
    "in a block": (
        f"{FENCE}md\n{FENCE}py\nx\n{FENCE}\nend",
        [("md", f"{FENCE}py\nx\n"), "end"],
    ),
}
READ = """[...document.querySelectorAll("section:last-of-type > div:first-of-type > *")]
  .filter((element) => element.textContent)
  .flatMap((element) => element.matches(".bar") ? [] : [element.matches("pre")
    ? [element.previousSibling.firstChild?.data ?? "", element.textContent] : element.textContent])"""


def test_code_is_shown_as_code_whole_and_letter_by_letter(chat: Chat, say: Say) -> None:
    for name, (text, shown) in SHOWN.items():
        expected = [[*part] if isinstance(part, tuple) else part for part in shown]
        for pieces in ([text], text):
            say(*(piece.encode() for piece in pieces))
            count = chat.turns.count()
            chat.ask(name)
            expect(chat.turns).to_have_count(count + 1)
            expect(chat.turn().note).to_have_text("Complete")
            told = [
                part
                if isinstance(part, str)
                else [part[0].replace("Copy", ""), part[1]]
                for part in chat.run(READ)
            ]
            assert told == expected, name


def test_a_growing_answer_is_never_made_again(
    chat: Chat, counting: Running, say: Say
) -> None:
    """Text is added to the nodes that are there: what a reader has selected stays so,
    and half a fence is not shown."""
    say(b"one", b" two", b"\n``", b"`py\n", b"x", b" = 1", f"\n{FENCE}\nend".encode())
    with counting.gate as gate:
        gate.allow(1)
        chat.ask()
        expect(chat.turn().text.locator("p").first).to_have_text("one")
        chat.run("""() => {
          window.node = document.querySelector("section div p").firstChild;
          getSelection().setBaseAndExtent(node, 0, node, 3);
        }""")
        gate.allow(2)
        expect(chat.turn().text.locator("p").first).to_have_text("one two")
        assert "`" not in chat.turn().text.inner_text()
        gate.allow(2)
        expect(chat.turn().text.locator("code")).to_have_text("x")
        chat.run("window.code = document.querySelector('code').firstChild")
    chat.answered(re.compile("end"))
    assert chat.run("node.isConnected && node.data") == "one two"
    assert chat.run("code.isConnected && code.data") == "x = 1\n"
    assert chat.run("String(getSelection())") == "one"


def test_copy(visit: Open, say: Say) -> None:
    chat = visit(permissions=["clipboard-read", "clipboard-write"])
    say(f"Look:\n{FENCE}py\nx = 1\ny = <b>\n{FENCE}\nend".encode())
    chat.ask()
    turn = chat.answered(re.compile("end"))
    turn.text.get_by_role("button", name="Copy").click()
    assert chat.run("navigator.clipboard.readText()").strip() == "x = 1\ny = <b>"
    turn.copy.click()
    copied = chat.run("navigator.clipboard.readText()").split()
    assert copied == ["Look:", "x", "=", "1", "y", "=", "<b>", "end"]


def test_a_key_is_asked_for_before_the_first_question(
    visit: Open, counting: Running, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be any text, and only this tab keeps it."""
    right = "Schlüssel-钥匙-🗝"
    monkeypatch.setattr(counting.engine.settings, "api_key", right)
    say(b"yes")
    chat = visit()
    key = chat.page.get_by_label("This server needs a key")
    expect(key).to_have_attribute("type", "password")
    chat.ask("too early")
    key.fill("wrong")
    key.press("Enter")
    expect(chat.notice).to_have_text("This key is wrong.")
    key = chat.page.locator("#key")
    key.fill(right)
    key.press("Enter")
    expect(key).to_be_hidden()
    expect(chat.notice).to_be_empty()
    expect(chat.field).to_be_focused()
    chat.field.press("Enter")
    chat.answered("yes")
    assert [body["prompt"] for body in chat.sent] == ["too early"]
    kept = "[localStorage.length, document.cookie, Object.values(sessionStorage)]"
    assert chat.run(kept) == [0, "", [right]]
    chat.page.reload()
    chat.ask("once more")
    chat.answered("yes")
    monkeypatch.setattr(counting.engine.settings, "api_key", "another")
    chat.ask("refused")
    expect(chat.turn().note).to_contain_text("send a valid API key")
    expect(chat.notice).to_have_text("This key is wrong.")
    key.fill("another")
    key.press("Enter")
    expect(key).to_be_hidden()
    chat.turn().again.click()
    chat.answered("yes", 1)
    assert len(chat.sent[-1]["history"]) == 2


def fill(counting: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no request in."""
    monkeypatch.setattr(counting.engine.settings, "max_in_flight", 0)
    monkeypatch.setattr(counting.engine.settings, "max_waiting", 0)


def test_a_full_server_is_asked_again(
    chat: Chat, counting: Running, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(b"yes")
    expect(chat.notice).to_be_empty()
    with monkeypatch.context() as patch:
        fill(counting, patch)
        chat.ask()
        expect(chat.turn().note).to_contain_text("The server is full. Send again: 1 s")
    chat.answered("yes")
    assert len(chat.sent) > 1 and chat.sent[0] == chat.sent[-1]


def test_waiting_for_a_full_server_can_be_stopped(chat: Chat) -> None:
    full = {"status": 503, "headers": {"Retry-After": "9999"}, "json": {"detail": ""}}
    chat.page.route("**/", lambda route: route.fulfill(**full))
    chat.ask()
    expect(chat.turn().note).to_contain_text("The server is full. Send again: 9999 s")
    chat.button.click()
    expect(chat.turn().again).to_be_visible()
    chat.page.unroute("**/")


def test_a_server_that_stays_full_is_given_up(
    chat: Chat, counting: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(counting, monkeypatch)
    chat.page.clock.install()
    chat.ask()
    for seconds in range(1, 6):
        expect(chat.turn().note).to_contain_text(f"Send again: {seconds} s")
        chat.page.clock.fast_forward(1000 * seconds)
    expect(chat.turn().note).to_contain_text("0 requests are in flight or waiting")
    expect(chat.turn().again).to_be_visible()
    assert len(chat.sent) == 6


def test_loading(
    visit: Open, counting: Running, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(b"yes")
    with monkeypatch.context() as patch:
        patch.setattr(counting.engine, "phase", "loading")
        chat = visit()
        expect(chat.notice).to_contain_text("The model is loading.")
        chat.ask("keep me")
        expect(chat.field).to_have_value("keep me")
    expect(chat.notice).to_be_empty()
    chat.field.press("Enter")
    chat.answered("yes")
    assert len(chat.sent) == 1


def test_an_answer_that_breaks_off_stays_and_is_not_in_the_history(
    chat: Chat, counting: Running, say: Say
) -> None:
    say(b"one", b" two", b" three")
    chat.ask("first")
    chat.answered("one two three")
    with counting.gate as gate:
        gate.allow(1)
        chat.ask("second")
        expect(chat.turn(1).text).to_have_text("one")
        gate.fail()
        expect(chat.turn(1).note).to_contain_text("the engine failed")
    expect(chat.turn(1).text).to_have_text("one")
    counting.wait_ready()
    chat.field.fill("third")
    wait_until(lambda: chat.field.press("Enter") or chat.turns.count() == 3)
    chat.answered("one two three", 2)
    chat.turn(1).again.click()
    expect(chat.turns).to_have_count(3)
    chat.answered("one two three", 2)
    prompts = [[turn["content"] for turn in body["history"][::2]] for body in chat.sent]
    assert prompts == [[], ["first"], ["first"], ["first", "third"]]


def test_a_server_that_is_gone_and_comes_back(chat: Chat, say: Say) -> None:
    say(b"yes")
    chat.page.wait_for_load_state("networkidle")  # it has learnt how the server is
    expect(chat.notice).to_be_empty()
    chat.context.set_offline(True)
    chat.ask()
    expect(chat.notice).to_have_text("The server does not answer. Is it running?")
    expect(chat.turn().note).to_contain_text("not part of the conversation")
    chat.context.set_offline(False)
    expect(chat.notice).to_be_empty()
    chat.turn().again.click()
    chat.answered("yes")
    expect(chat.turns).to_have_count(1)


@pytest.mark.parametrize("cut", ['data: {"delta": "on', 'data: {"delta": "one"}\n\n'])
def test_a_stream_without_an_end(chat: Chat, cut: str) -> None:
    """As a proxy leaves it that gives up."""
    media = {"Content-Type": "text/event-stream"}
    chat.page.route("**/", lambda route: route.fulfill(body=cut, headers=media))
    chat.ask()
    expect(chat.turn().note).to_contain_text("not part of the conversation")
    chat.page.unroute("**/")
    assert chat.turn().text.inner_text() == ("one" if "one" in cut else "")


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (502, "<html>Bad Gateway", "The server answers with an error. (502)"),
        (500, "null", "The server answers with an error. (500)"),
        (422, {"detail": [{"loc": ["body"], "msg": "is too small"}]}, "(is too small)"),
        (413, {"detail": "the body has over 9 bytes"}, "(the body has over 9 bytes)"),
    ],
)
def test_errors_of_all_kinds(chat: Chat, status: int, body: Any, told: str) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    chat.page.route("**/", lambda route: route.fulfill(status=status, body=text))
    chat.ask()
    expect(chat.turn().note).to_contain_text(told)
    chat.page.unroute("**/")


def test_what_is_too_long_and_what_was_cut_off(
    chat: Chat, counting: Running, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(b"one", b" two", b" three")
    chat.ask("x" * 3000)
    expect(chat.turn().note).to_contain_text("too long for the model. Begin a new one.")
    defaults = counting.engine.defaults._replace(max_new_tokens=2)
    monkeypatch.setattr(counting.engine, "defaults", defaults)
    chat.ask("short")
    chat.answered("one two", 1, re.compile("reached its limit"))
    assert chat.sent[1]["history"] == []


def test_an_input_method_takes_enter_for_itself(chat: Chat, say: Say) -> None:
    say("好".encode())
    chat.field.focus()
    devtools = chat.context.new_cdp_session(chat.page)
    devtools.send(
        "Input.imeSetComposition",
        {"text": "ni", "selectionStart": 2, "selectionEnd": 2},
    )
    enter = {"type": "rawKeyDown", "key": "Enter", "windowsVirtualKeyCode": 13}
    devtools.send("Input.dispatchKeyEvent", enter)
    devtools.send("Input.insertText", {"text": "你"})
    expect(chat.field).to_have_value("你")
    # Safari ends the composition first, and marks the key with 229 only.
    chat.run("""() => {
      const key = { key: "Enter", keyCode: 229, bubbles: true, cancelable: true };
      field.dispatchEvent(new CompositionEvent("compositionend", { data: "你" }));
      field.dispatchEvent(new KeyboardEvent("keydown", key));
      field.dispatchEvent(new KeyboardEvent("keydown", { ...key, keyCode: 13, isComposing: true }));
    }""")
    chat.field.press("End")
    chat.field.press("Shift+Enter")
    chat.page.keyboard.type("好")
    expect(chat.field).to_have_value("你\n好")
    expect(chat.turns).to_have_count(0)
    chat.field.press("Enter")
    chat.answered("好")
    assert [body["prompt"] for body in chat.sent] == ["你\n好"]


def test_what_cannot_be_sent_is_not(chat: Chat, say: Say) -> None:
    say(b"yes")
    chat.ask(" \n ")
    expect(chat.turns).to_have_count(0)
    chat.run("field.value = 'half \\ud83d of it'")
    chat.field.press("Enter")
    chat.answered("yes")
    assert [body["prompt"] for body in chat.sent] == ["half � of it"]


@pytest.mark.parametrize(
    ("languages", "lang", "shown"),
    [
        (["zh-CN", "en"], "zh", "发送"),
        (["zh"], "zh", "发送"),
        (["en-US", "zh-CN"], "en", "Send"),
        (["de-DE", "zh"], "en", "Send"),
    ],
)
def test_languages(
    visit: Open, counting: Running, languages: list[str], lang: str, shown: str
) -> None:
    chat = visit("about:blank", path="")
    devtools = chat.context.new_cdp_session(chat.page)
    override = {"userAgent": "x", "acceptLanguage": ",".join(languages)}
    devtools.send("Emulation.setUserAgentOverride", override)
    chat.page.goto(counting.url)
    assert chat.run("navigator.languages") == languages
    expect(chat.button).to_have_text(shown)
    assert chat.run("document.documentElement.lang") == lang
    assert chat.run("field.placeholder == field.ariaLabel && field.placeholder != ''")


def test_each_text_is_there_in_both_languages() -> None:
    table = api.CHAT_PAGE.partition("const TEXTS = {")[2].partition("\n};")[0]
    pairs = re.findall(r'(\w+): \[(["`])(.*?)\2,\s*\2(.*?)\2\]', table, re.DOTALL)
    assert len(pairs) == table.count(": [")
    for name, _, english, chinese in pairs:
        assert english.isascii() or "…" in english, name
        assert re.search(r"[\u4e00-\u9fff]", chinese), name
    used = set(re.findall(r'say\("(\w+)"\)|data-text="(\w+)"', api.CHAT_PAGE))
    assert {a or b for a, b in used} <= {name for name, *_ in pairs}


@pytest.mark.parametrize(
    ("locale", "told"), [("en", "Start it with"), ("zh-CN", "重新启动")]
)
def test_a_foreign_name_is_told_what_to_do(
    visit: Open,
    counting: Running,
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
    locale: str,
    told: str,
) -> None:
    url = counting.url.replace("127.0.0.1", FOREIGN)
    chat = visit(url, locale=locale)
    expect(chat.notice).to_contain_text(told)
    for part in ("export PHI4_API_KEY=", f"--allowed-hosts {FOREIGN}"):
        expect(chat.notice).to_contain_text(part)
    say(b"yes")
    monkeypatch.setattr(counting.engine.settings, "allowed_hosts", FOREIGN)
    chat.page.reload()
    expect(chat.notice).to_be_empty()
    chat.ask()
    expect(chat.turn().text).to_have_text("yes")


@pytest.mark.parametrize("path", ["/phi4/", "/phi4", "/a/b/?q=1#part"])
def test_behind_a_prefix(visit: Open, counting: Running, say: Say, path: str) -> None:
    """A proxy takes the prefix away: here it is the browser."""
    say(b"yes")
    prefix = re.match(r"/(phi4|a/b)", path)[0]
    chat = visit("about:blank", path="")

    def strip(route: Any) -> None:
        route.continue_(url=re.sub(prefix + "/?", "/", route.request.url, count=1))

    chat.page.route(re.compile(f"://[^/]+{prefix}"), strip)
    seen: list[str] = []
    chat.page.on("request", lambda request: seen.append(request.url))
    chat.page.goto(counting.url + path)
    chat.ask()
    chat.answered("yes")
    assert all(prefix in url for url in seen), seen
    assert {re.sub(r".*" + prefix, "", url) for url in seen[1:]} == {
        "/",
        "/health",
        "/v1/models",
    }
    docs = chat.page.get_by_role("link", name="API")
    assert chat.run("docs.href").endswith(prefix + "/docs")
    docs.click()
    expect(chat.page.locator("body")).to_contain_text("openapi", ignore_case=True)
    chat.problems.clear()  # /docs looks for its parts at the server's root path


def test_the_demo_says_so(
    visit: Open, counting: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting.engine.settings, "demo", True)
    name = visit().page.get_by_role("heading", name="phi-4 (demo model, not phi-4)")
    expect(name).to_be_visible()
    name = visit(locale="zh-CN").page.get_by_role("heading", level=1)
    expect(name).to_have_text("phi-4 （演示模型，不是 phi-4）")


AT_END = "main.scrollHeight - main.scrollTop - main.clientHeight < 2"
WORDS = "main.textContent.match(/word/g)?.length"


# The reader goes up when the page shows the next text: before it does, or after. The
# browser tells the page of that only in its next frame, by an event.
BEFORE = "main.scrollTop = 50; work();"
AFTER = "work(); main.scrollTop -= 100;"
GOES_UP = """() => {
  const frame = window.requestAnimationFrame;
  window.requestAnimationFrame = (work) => frame(() => {
    window.requestAnimationFrame = frame;
    %s
    window.place = main.scrollTop;
  });
}"""


def test_it_scrolls_only_for_a_reader_at_the_end(
    chat: Chat, counting: Running, say: Say
) -> None:
    say(*[b"word\n\n" * 40] * 6)
    with counting.gate as gate:
        gate.allow(1)
        chat.ask()
        wait_until(lambda: chat.run(WORDS) == 40)
        wait_until(lambda: chat.run(AT_END))
        assert chat.run("main.scrollTop") > 100
        for words, how in ((80, AFTER), (160, BEFORE)):
            chat.run(GOES_UP % how)
            gate.allow(1)
            wait_until(lambda words=words: chat.run(WORDS) == words)
            place = chat.run("place")
            gate.allow(1)
            wait_until(lambda words=words: chat.run(WORDS) == words + 40)
            assert chat.run("main.scrollTop") == place
            chat.run("main.scrollTop = main.scrollHeight")
        chat.run("main.scrollTop = 50")
    expect(chat.turn().note).to_have_text("Complete")
    assert chat.run("main.scrollTop") == 50


def test_it_follows_an_answer_to_a_long_question_and_while_one_writes(
    chat: Chat, counting: Running, say: Say
) -> None:
    say(*[b"word\n\n" * 20] * 3)
    with counting.gate as gate:
        gate.allow(1)
        chat.ask("a\n" * 80)
        wait_until(lambda: chat.run(WORDS) == 20)
        wait_until(lambda: chat.run(AT_END))
        chat.page.set_viewport_size({"width": 400, "height": 350})
        chat.field.fill("1\n2\n3\n4\n5")
        gate.allow(1)
        wait_until(lambda: chat.run(WORDS) == 40)
        wait_until(lambda: chat.run(AT_END))


def test_a_double_click_sends_once_and_stops_once(
    chat: Chat, counting: Running, say: Say
) -> None:
    say(b"one", b" two")
    with counting.gate as gate:
        gate.close()
        chat.field.fill("hello")
        chat.button.dblclick()
        expect(chat.button).to_have_text("Stop")
        gate.allow(1)
        expect(chat.turn().text).to_have_text("one")
        chat.field.fill("not yet")
        chat.button.dblclick()
        expect(chat.turn().note).to_contain_text("Stopped")
        assert chat.field.input_value() == "not yet"
    assert [body["prompt"] for body in chat.sent] == ["hello"]


def test_a_server_that_loads_is_not_called_full(chat: Chat, say: Say) -> None:
    say(b"one")
    detail = json.dumps({"detail": "the server is loading"})
    chat.page.route("**/", lambda route: route.fulfill(status=503, body=detail))
    chat.ask()
    expect(chat.turn().note).to_contain_text("The model is loading.")
    chat.page.unroute("**/")
    chat.answered("one")


def test_a_long_answer_is_whole(chat: Chat, say: Say) -> None:
    pieces = [f"{number} {'长 text ' * 60}\n\n".encode() for number in range(200)]
    text = b"".join(pieces).decode()
    assert len(text) > 80_000
    say(*pieces)
    chat.ask()
    expect(chat.turn().note).to_have_text("Complete")
    assert chat.run("document.querySelector('section div').textContent") == text.strip()


def test_a_narrow_phone_shows_everything(visit: Open, say: Say) -> None:
    say(b"w" * 500, f"\n{FENCE}\n{'c' * 500}\n{FENCE}\n".encode(), "שלום".encode())
    chat = visit(viewport={"width": 320, "height": 500})
    chat.ask("q" * 300)
    turn = chat.answered(re.compile("שלום"))
    too_wide = "(element) => element.scrollWidth > element.clientWidth"
    assert not chat.run(
        f"[...document.querySelectorAll('body, main, p')].some({too_wide})"
    )
    assert chat.run("document.documentElement.scrollWidth") == 320
    expect(chat.button).to_be_in_viewport(ratio=1)
    expect(chat.page.get_by_role("link", name="New conversation")).to_be_in_viewport(
        ratio=1
    )
    assert (
        turn.text.locator("p").last.evaluate("e => getComputedStyle(e).direction")
        == "rtl"
    )


# Of the text of each element and what is behind it, as WCAG counts.
CONTRAST = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => numbers(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return numbers(color)[3] === 0 ? behind(element.parentElement) : color;
  };
  const texts = document.querySelectorAll("h1, a, p:not(:empty), code, output, button, textarea");
  return [...texts].filter((e) => e.checkVisibility()).map((element) => {
    const pair = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
    return [(pair[0] + .05) / (pair[1] + .05), element.outerHTML.slice(0, 60)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(
    visit: Open,
    counting: Running,
    say: Say,
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    say(f"text\n{FENCE}c\ncode\n{FENCE}".encode())
    chat = visit(color_scheme=scheme)
    chat.ask()
    chat.answered(re.compile("code"))
    chat.ask("x" * 3000)
    expect(chat.turn(1).note).to_contain_text("too long")
    found = chat.run(CONTRAST)
    assert len(found) >= 11
    for ratio, element in found:
        assert ratio >= 4.5, (ratio, element)
    hint = "getComputedStyle(field, '::placeholder').color"
    assert chat.run(hint) == chat.run(
        "getComputedStyle(document.querySelector('.bar')).color"
    )
    page = chat.run("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", page)[0]) < 128) == (scheme == "dark")


def test_the_keyboard_alone_is_enough(chat: Chat, say: Say) -> None:
    say(b"yes")
    expect(chat.field).to_be_focused()
    chat.page.keyboard.type("hello")
    chat.page.keyboard.press("Enter")
    chat.answered("yes")
    focused = "document.activeElement.id || document.activeElement.textContent"
    outlined = "getComputedStyle(document.activeElement).outlineStyle"
    for name in ("field", "Copy", "main", "New conversation", "docs"):
        assert chat.run(focused) == name
        assert chat.run(outlined) == "solid", name
        chat.page.keyboard.press("Shift+Tab")
    chat.field.focus()
    chat.page.keyboard.press("Tab")
    assert chat.run(focused) == "send" and chat.run(outlined) == "solid"


def test_a_screen_reader_hears_states_and_not_every_word(
    chat: Chat, counting: Running, say: Say
) -> None:
    say(b"one", b" two")
    with counting.gate as gate:
        gate.allow(1)
        chat.ask()
        expect(chat.turn().text).to_have_text("one")
        live = chat.page.get_by_role("status")
        expect(live.filter(has_text="one")).to_have_count(0)
        expect(live.filter(has_text="Answering")).to_have_count(1)
    chat.answered("one two")
    expect(live.filter(has_text="Complete")).to_have_count(1)
    for role, name in [
        ("textbox", "Your question"),
        ("button", "Send"),
        ("main", ""),
        ("heading", "phi-4"),
    ]:
        expect(chat.page.get_by_role(role, name=name)).to_have_count(1)


# ------------------------------------------------------------------------------
# The page that shows every route
# ------------------------------------------------------------------------------


def test_docs_answer_a_question_with_a_key_and_behind_a_prefix(
    visit: Open, counting_folder: Any
) -> None:
    with running(model=counting_folder, api_key="right", root_path="/phi4") as served:
        chat = visit(served.url)
        page, outside = chat.page, []
        expect(page.locator("#key")).to_be_visible()
        page.on(
            "request",
            lambda each: (
                each.url.startswith(served.url + "/phi4/") or outside.append(each.url)
            ),
        )
        page.route(
            "**/phi4/**",
            lambda route: route.continue_(url=route.request.url.replace("/phi4/", "/")),
        )
        page.goto(served.url + "/phi4/docs")
        for tag in ("Chat", "OpenAI API", "Server"):
            expect(page.get_by_role("link", name=tag, exact=True)).to_be_visible()
        page.get_by_role("button", name="Authorize").click()
        page.locator(".auth-container input").fill("right")
        page.locator(".auth-btn-wrapper .authorize").click()
        page.locator(".btn-done").click()
        route = page.locator(".opblock-post").first
        route.click()
        route.get_by_role("button", name="Try it out").click()
        route.get_by_role("button", name="Execute").click()
        status = route.locator(".live-responses-table .response-col_status").nth(1)
        expect(status).to_contain_text("200")
        assert outside == []
