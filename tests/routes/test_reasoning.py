# SPDX-License-Identifier: MIT
"""Models that think before they answer, as phi-4-reasoning does: what a folder says, and
what clients see of the thinking."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scripted
import tiny
from net import events, told
from server import Running, running, wait_until

import api
import model_download
import py_api

V1 = "/v1/chat/completions"
THOUGHT = ("<think>", "\n2 and", " 2 </t", "4", "</think>", "\n\n", "It is", " 4.")
REASONING = "2 and 2 </t4"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reasoning"
    scripted.counting_model(folder, "thinking")
    return folder


@pytest.fixture(scope="module")
def thinker(folder: Path) -> Iterator[Running]:
    """A server of a model that can think."""
    with running(model=folder) as served:
        yield served


@pytest.fixture
def say(
    thinker: Running, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """A function that sets what the model answers, one piece of text per token."""

    def say(*pieces: str) -> None:
        scripted.teach(monkeypatch, thinker, [piece.encode() for piece in pieces])

    yield say
    wait_until(thinker.idle)


@pytest.fixture
def write(
    thinker: Running, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """A function that sets what the model wants to write."""
    yield lambda text: scripted.prefer(monkeypatch, thinker, text.encode())
    wait_until(thinker.idle)


def ask(server: Running, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The message of an answer and the whole answer. A stream has to give the same."""
    response = server.post("2+2?", V1, **body)
    assert response.status_code == 200, response.text
    answer = response.json()
    choice = answer["choices"][0]
    options = {"stream_options": {"include_usage": True}}
    with server.stream("2+2?", V1, **body | options) as stream:
        *texts, end = [data for kind, data in events(stream) if kind == "message"]
    assert end == "[DONE]"
    chunks = [json.loads(text) for text in texts]
    choices = [each["choices"][0] for each in chunks[:-1]]
    deltas = [each["delta"] for each in choices]
    for name in ("reasoning_content", "content"):
        sent = "".join(delta.get(name) or "" for delta in deltas)
        assert sent == (choice["message"].get(name) or "")
        assert all(delta.get(name) != "" for delta in deltas[1:])
    assert choices[-1]["finish_reason"] == choice["finish_reason"]
    counted = ("completion_tokens", "completion_tokens_details")
    for name in counted:
        assert chunks[-1]["usage"].get(name) == answer["usage"].get(name)
    return choice["message"], answer


def test_thinking_and_answer_come_apart(
    thinker: Running, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "PING_SECONDS", 0.2)  # some events come with a ping only
    say(*THOUGHT)
    message, answer = ask(thinker)
    assert message["reasoning_content"] == REASONING
    assert message["content"] == "It is 4."
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(THOUGHT) + 1
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
    # A client that wants none gets none.
    message, _ = ask(thinker, include_reasoning=False)
    assert "reasoning_content" not in message
    assert message["content"] == "It is 4."
    with thinker.gate as gate, thinker.stream("x", V1, include_reasoning=False) as all_:
        kinds = []
        for kind, data in events(all_):
            gate.allow(1)
            kinds.append(kind or data)
    assert ": thinking" in kinds  # a stream that says nothing for long is closed


def test_thinking_is_sent_as_it_is_made(
    thinker: Running, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "PING_SECONDS", 0.2)
    say(*THOUGHT)
    deltas = []
    with thinker.gate as gate, thinker.stream("x", V1) as stream:
        gate.close()
        for _, data in events(stream):
            gate.allow(1)
            if data.startswith("{"):
                deltas.append(json.loads(data)["choices"][0]["delta"])
    assert deltas[0] == {"role": "assistant", "content": ""}
    thought = [each for each in deltas if "reasoning_content" in each]
    assert len(thought) > 1


def test_post_gives_the_text_as_it_is(thinker: Running, say: Any) -> None:
    say(*THOUGHT)
    answer = thinker.post("2+2?").json()
    assert answer["response"] == "".join(THOUGHT)
    assert answer["history"][-1]["content"] == "".join(THOUGHT)
    with thinker.stream("2+2?") as stream:
        deltas, whole = told(stream)
    assert "".join(deltas) == whole["response"] == "".join(THOUGHT)


def test_marks_may_come_in_pieces(thinker: Running, say: Any) -> None:
    say(" ", "<th", "ink>", "a</th", "b</", "think", "> c")
    message, _ = ask(thinker)
    assert message["reasoning_content"] == "a</thb"
    assert message["content"] == "c"


@pytest.mark.parametrize("end", ["length", "stop"])
def test_thinking_that_does_not_close_is_not_lost(
    thinker: Running, say: Any, end: str
) -> None:
    """As vLLM's deepseek_r1 parser has it: all of it is reasoning, and no content."""
    pieces = ["<think>", "hm", " 2", "</thi"]
    say(*pieces, *[" more"] * (end == "length"))
    limit = 4 if end == "length" else 9
    message, answer = ask(thinker, max_tokens=limit, stop=["</"], tools=[TOOL])
    assert message["reasoning_content"] == "hm 2</thi"
    assert message["content"] is None
    assert answer["choices"][0]["finish_reason"] == end
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


@pytest.mark.parametrize(
    "pieces", [("It is", " 4."), (" <thi", "s> is 4"), ("4 </think> 4",), ("  ",)]
)
def test_an_answer_without_thinking_is_content(
    thinker: Running, say: Any, pieces: tuple[str, ...]
) -> None:
    say(*pieces)
    message, answer = ask(thinker)
    assert message["content"] == "".join(pieces)
    assert "reasoning_content" not in message
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_stops_are_looked_for_after_the_thinking(thinker: Running, say: Any) -> None:
    say("<think>", "one. two", ".", "</think>", "three", ". four")
    message, answer = ask(thinker, stop=["."])
    assert message["reasoning_content"] == "one. two."
    assert message["content"] == "three"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert thinker.answer(stop=".") == "<think>one. two.</think>three"


def test_others_do_not_think(counting: Running, monkeypatch: Any) -> None:
    """A folder whose tokenizer has no marks: the text is content, whatever it says."""
    pieces = [piece.encode() for piece in THOUGHT]
    scripted.teach(monkeypatch, counting, pieces)
    message, answer = ask(counting)
    assert message["content"] == "".join(THOUGHT)
    assert "reasoning_content" not in message
    assert "completion_tokens_details" not in answer["usage"]
    assert counting.answer(stop=" 2") == "<think>\n2 and"
    turn = {"role": "assistant", "content": "<think>a</think>b"}
    told = [
        len(told_of(counting, history=[h])) for h in (turn, turn | {"content": "b"})
    ]
    assert told[0] - told[1] == len("<think>a</think>")
    wait_until(counting.idle)


def told_of(server: Running, path: str = "/", **body: Any) -> str:
    """What the model is given of a conversation, one character to a token."""
    with pytest.MonkeyPatch.context() as patch:
        calls = server.spy(patch, "apply_template")
        limit = {"max_new_tokens" if path == "/" else "max_tokens": 1}
        assert server.post("now", path, **limit | body).status_code == 200
    names = {index: token for token, index in server.tokenizer.get_vocab().items()}
    return "".join(names[token] for token in calls[-1][1])


@pytest.mark.parametrize("answer", ["<think>aaa</think>\n\nbbb", "<think>aaa", "bbb"])
def test_earlier_thinking_is_not_shown_to_the_model(
    thinker: Running, answer: str
) -> None:
    turns = [{"role": "user", "content": "first"}]
    turns += [{"role": "assistant", "content": answer}]
    told = told_of(thinker, history=turns)
    assert "aaa" not in told
    assert ("<|im_sep|>bbb<|im_end|>" in told) == ("bbb" in answer)
    turns += [{"role": "user", "content": "<think>mine</think>"}]
    for name in ("reasoning_content", "reasoning"):
        turns[1] = {"role": "assistant", "content": "bbb", name: "aaa"}
        told = told_of(thinker, V1, messages=turns)
        assert "aaa" not in told and "<|im_sep|>bbb<|im_end|>" in told
        assert "<think>mine</think>" in told  # what a user writes stays


def test_a_system_turn_is_not_lost(thinker: Running, counting: Running) -> None:
    """The template has its own, and would leave out the client's."""
    turns = [{"role": "system", "content": "rhyme"}]
    turns += [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
    ]
    turns += [{"role": "user", "content": "now"}]
    told = told_of(thinker, V1, messages=turns)
    assert "user<|im_sep|>rhymeĊĊone<|im_end|>" in told
    assert "user<|im_sep|>now<|im_end|>" in told
    told = told_of(thinker, V1, messages=turns[:1])
    assert "user<|im_sep|>rhyme<|im_end|>" in told
    told = told_of(thinker, V1, messages=turns[3:], tools=[TOOL])
    assert "You" in told and '"name":' in told
    told = told_of(counting, V1, messages=turns)
    assert "system<|im_sep|>rhyme<|im_end|>" in told and "sep|>one<" in told


def test_json_may_come_after_thinking(thinker: Running, write: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    options = {"response_format": form, "max_tokens": 99}
    write('<think>{"b": no JSON</think>{"a": 4}')
    message, answer = ask(thinker, **options)
    assert message["reasoning_content"] == '{"b": no JSON'
    assert json.loads(message["content"]) == {"a": 4}
    assert answer["choices"][0]["finish_reason"] == "stop"
    write('{"a": 4}')
    message, _ = ask(thinker, **options)
    assert json.loads(message["content"]) == {"a": 4}
    assert "reasoning_content" not in message
    # A mark inside of JSON is a part of it.
    schema["properties"]["a"] = {"type": "string"}
    write('<think>x</think>{"a": "<tool_call>"}')
    message, _ = ask(thinker, tools=[TOOL], **options)
    assert json.loads(message["content"]) == {"a": "<tool_call>"}
    # So a stop string is looked for behind it.
    message, answer = ask(thinker, tools=[TOOL], stop=[">"], **options)
    assert message["content"] == '{"a": "<tool_call'
    assert answer["choices"][0]["finish_reason"] == "length"
    # A grammar that is wrong is still a 400.
    schema["properties"]["a"] = {"not": {}}
    assert thinker.post("x", V1, **options).status_code == 400


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_come_after_thinking(thinker: Running, write: Any, choice: str) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    thought = "I write <tool_call>, then more"
    write(f"<think>{thought}</think>{call}")
    message, answer = ask(thinker, tools=[TOOL], tool_choice=choice, max_tokens=200)
    assert message["reasoning_content"] == thought
    assert message["content"] is None
    (made,) = message["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": "{}"}
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_only_the_mark_ends_thinking_before_a_grammar(thinker: Running) -> None:
    """Text that reads like the mark would end it for the client, not for the grammar."""
    names, tokenizer = (
        thinker.tokenizer.get_vocab(),
        thinker.engine.grammars.ll_tokenizer,
    )
    matcher = py_api.compile_grammar(tokenizer, 'start: "yes"')
    for token in (names["<think>"], *b"</think"):
        assert matcher.consume_token(token)

    def allowed(token: int) -> bool:
        return bool(matcher.compute_bitmask()[token // 8] >> token % 8 & 1)

    assert not allowed(ord(">")) and allowed(ord("!"))
    assert matcher.consume_token(ord("!"))
    assert matcher.consume_token(names["</think>"])
    assert allowed(ord("y")) and not allowed(ord("!"))


@pytest.mark.parametrize("special", [False, True])
def test_marks_are_text_and_recognised(tmp_path: Path, special: bool) -> None:
    """Also where the folder calls them control tokens."""
    loaded = tiny.thinking_tokenizer(tmp_path, special=special)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=len(loaded)))
    names = loaded.get_vocab()
    table = model_download.bytes_of_tokens(model, loaded, [names["<|im_end|>"]])
    assert table[names["<think>"]] == b"<think>"
    assert table[names["</think>"]] == b"</think>"
    assert table[names["<|im_start|>"]] == b""


def told_by(folder: Path, **said: Any) -> Path:
    """The folder with this in its generation_config.json."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return folder


SAID = {"do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.6}


def test_sampling_is_the_folders(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    told_by(folder, **SAID)
    with running(model=folder) as server:
        ask = partial(server.answer, max_new_tokens=90, seed=1)
        own = ask()
        greedy = ask(temperature=0)
        assert own != greedy == ask(temperature=0, top_k=0, top_p=1)
        same = {key: SAID[key] for key in ("temperature", "top_k", "top_p")}
        assert own == ask(**same)
        # What a client says counts, each by itself.
        seen = {own}
        for change in ({"temperature": 2}, {"top_k": 0}, {"top_p": 1}):
            changed = ask(**change)
            assert changed == ask(**same | change)
            seen.add(changed)
        assert len(seen) == 4
        assert ask(seed=2) != own
        answer = server.post("hello", V1, max_tokens=90, seed=1).json()  # the same
        assert answer["choices"][0]["message"]["content"] == own
    with running(model=folder, temperature=0) as server:
        assert server.answer(max_new_tokens=90) == greedy
    told_by(folder, do_sample=False)
    with running(model=folder) as server:
        assert server.answer(max_new_tokens=90) == greedy


def test_default_of_new_tokens(folder: Path, thinker: Running) -> None:
    """Far more than 512 for a model that thinks, unless the settings say so."""
    done = thinker.post("x" * 1300)
    assert done.headers["X-Finish-Reason"] == "length"
    tokens = int(done.headers["X-Completion-Tokens"])
    assert tokens > 600
    assert tokens + int(done.headers["X-Prompt-Tokens"]) == 2048
    with running(model=folder, max_new_tokens=100) as server:
        assert server.post("x").headers["X-Completion-Tokens"] == "100"


def test_defaults_without_accidents(
    folder: Path, thinker: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty value in the environment is as good as none."""
    told = SimpleNamespace(do_sample=True, temperature=0.8, top_p=None, top_k=50)
    model = SimpleNamespace(generation_config=told)
    told.min_p = None

    def defaults() -> model_download.Defaults:
        settings = model_download.Settings(model=folder)
        return model_download.read_defaults(model, thinker.tokenizer, settings)

    for empty in ({}, {"PHI4_TEMPERATURE": "", "PHI4_MAX_NEW_TOKENS": ""}):
        for name, value in empty.items():
            monkeypatch.setenv(name, value)
        assert defaults().sampling == {"temperature": 0.8, "top_k": 50}
        assert defaults().max_new_tokens == model_download.THINKING_TOKENS == 8192
    monkeypatch.setenv("PHI4_TEMPERATURE", "0.3")
    monkeypatch.setenv("PHI4_MAX_NEW_TOKENS", "512")
    assert defaults().sampling["temperature"] == 0.3
    assert defaults().max_new_tokens == 512
    monkeypatch.delenv("PHI4_TEMPERATURE")
    told.temperature = None  # transformers' default, as vLLM has it
    assert defaults().sampling["temperature"] == 1
