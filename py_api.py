# SPDX-License-Identifier: MIT
"""The API, from both ends of the wire: a client, and below it the server's formats,
limits, figures and middleware.

python py_api.py                          the tutorial's example
python py_api.py "天空为什么是蓝色的？"       one question of your own
python py_api.py --chat                   a conversation; Ctrl-D ends it
python py_api.py --url http://127.0.0.1:8000/ --key SECRET "Hello!"

A key can also be given in the environment variable PHI4_API_KEY. Without an answer, one
line on stderr says why. A single question then exits with 1; --chat goes on.
"""

import argparse
import contextlib
import json
import os
import sys

import requests

EXAMPLE_PROMPT = "刚才我们再聊什么？"  # with the typing error of the tutorial
EXAMPLE_HISTORY = [
    {"role": "user", "content": "今天星期几"},
    {"role": "assistant", "content": "今天星期三"},
    {"role": "user", "content": "明天星期几？"},
    {"role": "assistant", "content": "明天是星期四。"},
]
# Seconds to connect, and seconds to wait for the next bytes of the answer.
TIMEOUT = (10, 1800)


class ChatError(Exception):
    """There is no complete answer; the message is one line saying why."""


class Client:
    """A server's address and API key, if it wants one; every failure is a ChatError."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self.session = requests.Session()
        # Ignore http_proxy: a proxy cannot reach a server on this machine.
        self.session.trust_env = False
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}".encode()

    def ask(self, prompt: str, history: list[dict[str, str]]) -> str:
        """Return the whole answer to `prompt`."""
        response = self._post({"prompt": prompt, "history": history})
        try:
            return response.json()["response"]
        except (ValueError, LookupError, TypeError):
            raise ChatError(f"{self.url} is not the chat server") from None

    def ask_and_print(self, prompt: str, history: list[dict[str, str]]) -> str:
        """Print the answer piece by piece as it is made, then return all of it."""
        body = {"prompt": prompt, "history": history, "stream": True}
        response = self._post(body)
        try:
            for line in response.iter_lines():  # bytes, which are UTF-8
                if not line.startswith(b"data:"):
                    continue  # an empty line, a ping or an event's name
                event = json.loads(line.removeprefix(b"data:"))
                if "detail" in event:
                    raise ChatError(in_words(event["detail"]))
                if "response" in event:
                    return event["response"]
                print(event["delta"], end="", flush=True)
        except (requests.RequestException, ValueError, LookupError, TypeError):
            pass  # cut off, perhaps in the middle of a line, or no event of ours
        finally:
            response.close()
            print(flush=True)
        raise ChatError("the answer broke off before its end")

    def _post(self, body: dict[str, object]) -> requests.Response:
        streamed = "stream" in body
        try:
            response = self.session.post(
                self.url, json=body, stream=streamed, timeout=TIMEOUT
            )
        except requests.RequestException:
            reason = "is the address right and the server running?"
            raise ChatError(f"no answer from {self.url}: {reason}") from None
        if response.ok:
            return response
        try:
            reason = in_words(response.json()["detail"])
        except (requests.RequestException, LookupError, TypeError):
            reason = response.reason
        raise ChatError(f"{response.status_code}: {reason}")


def in_words(detail: str | list[dict]) -> str:
    """Return the server's `detail`, a text or a list of wrong fields, as one line."""
    if isinstance(detail, list):
        detail = "; ".join(
            f"{'.'.join(map(str, field['loc']))}: {field['msg']}" for field in detail
        )
    return " ".join(str(detail).split())


def chat(client: Client) -> None:
    """Answer each line of stdin, as one conversation, until Ctrl-D."""
    mark = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    history: list[dict[str, str]] = []
    with contextlib.suppress(EOFError):
        while True:
            prompt = input(mark)
            if not prompt.strip():
                continue
            try:
                answer = client.ask_and_print(prompt, history)
            except ChatError as error:
                print(f"error: {error}", file=sys.stderr)
            else:
                history.append({"role": "user", "content": prompt})
                history.append({"role": "assistant", "content": answer})
    if mark:
        print()  # so that the shell's prompt gets a line of its own


def main() -> None:
    """Read the command line, then ask once or chat."""
    parser = argparse.ArgumentParser(description="Talk to the chat server.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("question", nargs="?", help="left out: the tutorial's example")
    what.add_argument("--chat", action="store_true", help="questions from stdin")
    url = "http://127.0.0.1:6006/"
    parser.add_argument("--url", default=url, help="default: %(default)s")
    parser.add_argument("--key", help="API key (default: PHI4_API_KEY, if just one)")
    options = parser.parse_args()
    keys = os.environ.get("PHI4_API_KEY", "").replace(",", " ").split()
    client = Client(options.url, options.key or (keys[0] if len(keys) == 1 else None))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        if options.chat:
            chat(client)
        elif options.question is None:
            print(client.ask(EXAMPLE_PROMPT, EXAMPLE_HISTORY), flush=True)
        else:
            print(client.ask(options.question, []), flush=True)
    except ChatError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # such as `python py_api.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    sys.exit(main())


# ------------------------------------------------------------------------------
# What goes over the wire, as the server sees it. It imports this file; the client above
# ends before this line, and needs no package but requests.
# ------------------------------------------------------------------------------

import asyncio
import codecs
import ipaddress
import logging
import math
import re
import secrets
import socket
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache, partial
from hashlib import sha256
from itertools import zip_longest
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

import h11
import pydantic
import uvicorn
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import Counter, Gauge, Histogram, exposition
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError, to_json
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from model_download import (
    END_THINK,
    THINK,
    WORLD_SIZE,
    Defaults,
    Settings,
    one_line,
    words,
)

logger = logging.getLogger("phi4")


class ClientError(HTTPException):
    """An error with a param and a code, as OpenAI's have. It is no ValueError, so that a
    validator may raise it and pydantic does not catch it."""

    def __init__(
        self, detail: str, param: str, code: str = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(status, detail)
        self.param, self.code = param, code


def unavailable(detail: str) -> HTTPException:
    """Loading, full, restarting or shutting down: trying again helps."""
    return HTTPException(503, detail, {"Retry-After": "1"})


# What compiling a schema raises for one that cannot be used.
SCHEMA_ERRORS = (ValueError, TypeError, ArithmeticError, RecursionError)


def schema_error(param: str, why: str | Exception) -> ClientError:
    """The schema of an answer or of a function cannot be used."""
    if isinstance(why, RecursionError):
        why = "it is nested too deeply"
    return ClientError(f"{param}: the JSON schema cannot be used: {why}", param)


# In place of pydantic's own messages, which speak of lengths and of its own types.
MESSAGES = {"too_long": "has more than {max_length} entries", "too_short": "is empty"}
MESSAGES["string_unicode"] = "has a lone surrogate, which no UTF-8 text has"
NO_OBJECT = "model_type", "model_attributes_type", "dict_type"
MESSAGES |= dict.fromkeys(NO_OBJECT, "is no object")


def validation_details(error: RequestValidationError) -> list[dict[str, Any]]:
    """Pydantic's errors, without the input, which JSON may not be able to spell, and
    without pydantic's own names for one of several types."""
    details = []
    for each in error.errors()[:16]:
        kept = {key: each[key] for key in ("type", "loc", "msg", "ctx") if key in each}
        kept["loc"] = [part for part in each["loc"] if "[" not in str(part)]
        if each["type"] == "json_invalid":
            why = f"send JSON: {each['ctx']['error']} at {each['loc'][-1]}"
            kept |= {"loc": ["body"], "msg": why}
        elif kept["loc"] == ["body"]:
            kept["msg"] = "send a JSON object, with Content-Type: application/json"
        elif each["type"] in MESSAGES:
            kept["msg"] = MESSAGES[each["type"]].format(**each.get("ctx", {}))
        details.append(kept)
    return details


JSON = "application/json"


class ErrorBody(BaseModel):
    detail: str | list[dict[str, Any]]


class OpenAIErrorBody(BaseModel):
    error: dict[str, str | None]


# OpenAI's codes, by status or by pydantic's type of error.
CODES = {401: "invalid_api_key", "missing": "missing_required_parameter"}
CODES |= {"unsupported_parameter": "unsupported_parameter"}
NOT_FOUND = "No such address. POST / takes a prompt. For OpenAI's API the base URL ends"
NOT_FOUND += " with /v1: POST /v1/chat/completions, GET /v1/models. /docs shows all."


async def error_response(request: Request, error: Any) -> Response:
    """An error as FastAPI's JSON, or as OpenAI's on its routes."""
    path = request.scope["path"].removeprefix(request.scope["root_path"])
    openai = path == "/v1" or path.startswith("/v1/")
    status = getattr(error, "status_code", 500)
    detail = message = getattr(error, "detail", "internal error: see the server's log")
    param = getattr(error, "param", None)
    code = getattr(error, "code", CODES.get(status))
    if detail == "Not Found":
        detail = message = NOT_FOUND
    request.state.why = detail  # for the log
    if isinstance(error, RequestValidationError):
        status = 400 if openai else 422
        detail = validation_details(error)
        deepest = max(detail, key=lambda each: len(each["loc"]))
        param = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, deepest["loc"][1:])))
        message = f"{param or 'the body'}: {deepest['msg']}"
        if deepest["type"] == "unsupported_parameter":
            message = f"{param} {deepest['msg']}"
        kind = "invalid_type" if deepest["type"].endswith("_type") else "invalid_value"
        code = CODES.get(deepest["type"], kind) if param else None
        # Names that a client has made up stay out of the log.
        request.state.why = deepest["msg"] if "extra" in deepest["type"] else message
    kind = "invalid_request_error" if status < 500 else "server_error"
    parts = {"message": message, "type": kind, "param": param or None, "code": code}
    content = {"error": parts} if openai else {"detail": detail}
    text = json.dumps(content, default=str)
    return Response(text, status, getattr(error, "headers", None), JSON)


ERROR_HANDLERS: dict[Any, Any] = dict.fromkeys(
    (StarletteHTTPException, RequestValidationError), error_response
)


def in_utf8(text: str) -> str:
    """Raises an error for a lone surrogate, which JSON allows and UTF-8 does not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "") from None  # see MESSAGES
    return text


Text = Annotated[str, AfterValidator(in_utf8)]
TokenLimit = Annotated[int, Field(ge=1)] | None
NO_LIMIT = BeforeValidator(lambda limit: None if limit == -1 else limit)
FinishReason = Literal["stop", "length", "tool_calls"]


class Strict(BaseModel, strict=True, extra="forbid", use_attribute_docstrings=True):
    """No coercion ("5" is not 5), no unknown field."""


class Turn(Strict):
    role: Literal["user", "assistant", "system"]
    content: Text


def one_or_more(item: Any, make: Callable[[str], Any] = str, **limits: int) -> Any:
    """The type of a field that takes a text or a list. It becomes a list either way, so
    that an error speaks of one type."""
    several = Annotated[list[item], Field(fail_fast=True, **limits)]
    listed = lambda given: [make(given)] if isinstance(given, str) else given
    accepted = BeforeValidator(listed, json_schema_input_type=str | several)
    return Annotated[several, accepted]


StopString = Annotated[Text, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, strict=False)]  # a key of JSON is a string
Bias = Annotated[float, Field(ge=-100, le=100)]


class Answer:
    """The answer to one request as it grows: bytes of tokens in, text out.

    The text never ends inside a character, inside a stop string or inside `call_mark`, with
    which a call begins. Bytes that cannot be UTF-8 become U+FFFD, as in
    `tokenizer.decode`; a character that is cut off by the end of the answer is left out.
    Thinking is text; stops and calls are looked for in what follows it.
    """

    thinks = False  # whether the model does

    def __init__(
        self,
        model: str,
        stop: list[str] | None,
        is_json: bool = False,
        call_mark: str | None = None,
    ) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        # OpenAI's response and each of its chunks begin with these.
        created = int(time.time())
        self.openai_fields = {"id": self.id, "created": created, "model": model}
        self.stop_strings, self.is_json, self.call_mark = stop or [], is_json, call_mark
        self.in_call = False  # from the mark on
        self.thinking: bool | None = None  # whether it goes on; None: may yet begin
        self.content_at = 0  # where the text is no longer thinking
        self.reasoning_tokens = 0
        # Of the prompt, of the answer, and of the prompt from the prefix cache.
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.text = ""
        self.held = ""  # the end of the text, with which a stop or a mark may begin
        self.finish_reason: FinishReason | None = None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: bytes | None) -> None:
        """Add the bytes of a token, None for one that ends the answer."""
        self.completion_tokens += 1
        if token is None:
            return self.finish("stop")
        text = self.held + self.decoder.decode(token)
        if self.thinks and self.thinking is not False:
            text = self.feed_thinking(text)
            if not text:
                return
        if self.is_json and len(self.text) == self.content_at and text[:1] != "<":
            self.call_mark = None  # JSON, which may have one in a string
        end = self.find_stop(
            text[: len(text) - length_of_begun(text, [self.call_mark])]
        )
        self.held = ""
        if end is not None:
            # A stop string that cuts JSON leaves it incomplete, as a limit does.
            self.finish_reason = "length" if self.is_json else "stop"
        elif not self.in_call:
            end = len(text) - length_of_begun(
                text, [*self.stop_strings, self.call_mark]
            )
            self.held = text[end:]
        self.text += text[:end]

    def feed_thinking(self, text: str) -> str:
        """Add what belongs to the thinking; returns what follows it."""
        begun, self.held = text.lstrip(), ""
        if self.thinking is None:
            if begun != THINK and THINK.startswith(begun):
                self.held = text
                return ""
            self.thinking = begun.startswith(THINK)
            if not self.thinking:
                return text
        self.reasoning_tokens = self.completion_tokens
        thought, end, rest = text.partition(END_THINK)
        if end:
            self.text += thought + end
            self.thinking, self.content_at = False, len(self.text)
            return rest
        length = len(text) - length_of_begun(text, [END_THINK])
        self.text, self.held = self.text + text[:length], text[length:]
        return ""

    def parts(self, end: int | None = None) -> tuple[str | None, str]:
        """The thinking, None if there is none, and what follows it, of the first `end`
        characters of the text."""
        text = self.text[:end]
        return split_thinking(text) if self.thinks else (None, text)

    def find_stop(self, text: str) -> int | None:
        """Where the first stop string begins in what follows the text. None is looked for
        in calls and their mark: they are no text."""
        if self.in_call:
            return None
        if self.call_mark:
            text, mark, _ = text.partition(self.call_mark)
            self.in_call = bool(mark)
        found = [at for stop in self.stop_strings if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def finish(self, reason: FinishReason) -> None:
        """End the answer, if no stop string has. What was held belongs to it, but not the
        beginning of a mark that a limit has cut."""
        if self.finish_reason is None:
            self.finish_reason = reason
            if self.thinking:
                self.text += self.held
                return
            end = len(self.held) - length_of_begun(self.held, [self.call_mark])
            if reason == "stop":
                end = self.find_stop(self.held)
            self.text += self.held[:end]

    def usage(self) -> dict[str, Any]:
        """Token counts, as both routes give them."""
        prompt, new = self.prompt_tokens, self.completion_tokens
        used = {"prompt_tokens": prompt, "completion_tokens": new}
        return used | {"total_tokens": prompt + new}

    def openai_usage(self) -> dict[str, Any]:
        """The same, with cached tokens and those of the thinking."""
        usage = self.usage()
        usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        if self.thinks:
            details = {"reasoning_tokens": self.reasoning_tokens}
            usage["completion_tokens_details"] = details
        return usage


def split_thinking(text: str) -> tuple[str | None, str]:
    """The thinking with which a text begins, None if it does not, and what follows it:
    nothing where it does not close. White space before either is left out."""
    begun = text.lstrip()
    if not begun.startswith(THINK):
        return None, text
    thinking, _, rest = begun.removeprefix(THINK).partition(END_THINK)
    return thinking.lstrip(), rest.lstrip()


def shown_turns(turns: list[Turn], defaults: Defaults) -> list[Turn]:
    """Turns as the template takes them: without the thinking of earlier answers, and
    with a system's turn before the user's text where the template would drop it."""
    if not (defaults.thinks or defaults.drops_system):
        return turns
    shown, system = [], ""
    for turn in turns:
        text = turn.content
        if turn.role == "system" and defaults.drops_system:
            system += f"{text}\n\n"
            continue
        if turn.role == "assistant" and defaults.thinks:
            text = split_thinking(text)[1]
        elif turn.role == "user":
            text, system = system + text, ""
        shown.append(Turn(role=turn.role, content=text))
    if system:  # no user's turn follows
        shown.append(Turn(role="user", content=system.rstrip()))
    return shown


def length_of_begun(text: str, watched: list[str | None]) -> int:
    """Characters at the end of the text with which one of these may begin."""
    expected = [each for each in watched if each]
    if not expected:  # as nearly always
        return 0
    longest = max(map(len, expected))
    for length in range(min(len(text), longest - 1), 0, -1):
        if any(each.startswith(text[-length:]) for each in expected):
            return length
    return 0


class SamplingFields(Strict):
    """What both routes accept; null means the default."""

    stream: bool | None = None
    """Send the answer as it is made, as server-sent events."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 always takes the likeliest token. Defaults: --temperature and the model's."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int | None = Field(None, ge=-1, le=1024)
    """Choose among this many likeliest tokens; 0, the default, and -1 are no limit."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Choose among tokens with this fraction of the likeliest one's probability."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Is taken off the logits of tokens that the answer has already."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """The same, for each time that the answer has the token."""
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    """Divides positive logits of tokens in prompt or answer, multiplies negative."""
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=1024)
    """Is added to the logits of these token ids."""
    min_tokens: int | None = Field(None, ge=0)
    """The model cannot end the answer before it has so many tokens."""
    ignore_eos: bool | None = None
    """The answer goes on when the model ends it, up to its limit."""
    stop: one_or_more(StopString, max_length=4) | None = None
    """Text that ends the answer and is not part of it."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Makes a sampled answer repeatable."""

    def with_defaults(self, defaults: dict[str, float]) -> Self:
        """The same with these values where the request names none."""
        missing = {key: defaults[key] for key in defaults if getattr(self, key) is None}
        return self.model_copy(update=missing)

    def is_json(self) -> bool:
        """Whether the answer follows a JSON schema, if it is no call."""
        return False

    def call_mark(self) -> str | None:
        """With which a call begins in the answer; None: it has no calls."""
        return None

    def finish_reason(self, answer: Answer) -> FinishReason | None:
        """None while it goes on."""
        return answer.finish_reason


class Sampling:
    """How the tokens of one request are chosen. The event loop makes it; the generation
    thread reads it, and leaves here what the event loop has to know."""

    cached_tokens = 0  # of the prompt: taken from the prefix cache
    error = ""  # why its grammar ends the answer

    def __init__(self, body: SamplingFields, matcher: Any) -> None:
        self.body, self.matcher = body, matcher
        self.temperature = body.temperature or 0
        self.seed = secrets.randbits(63) if body.seed is None else body.seed
        penalties = body.presence_penalty, body.frequency_penalty
        repeats = body.repetition_penalty not in (None, 1)
        # Whether the tokens before the next one have to be known, and whether the
        # library's own choice is right.
        self.looks_back = bool(matcher or any(penalties) or repeats)
        edited = self.looks_back or body.logit_bias or body.min_tokens
        self.takes_likeliest = not (edited or self.temperature)
        self.matched: list[int] = []  # the tokens that the matcher has consumed

    def match(self, answer: list[int]) -> None:
        """Bring the matcher to the end of the answer so far. A preemption may take back
        the last token."""
        if answer[: len(self.matched)] != self.matched:
            self.matcher.reset()
            self.matched = []
        # A GPU computes a step more than an answer has: there it has ended.
        if not self.matcher.is_stopped():
            self.matcher.consume_tokens(answer[len(self.matched) :])
        self.matched = answer

    def to_client_error(self) -> ClientError:
        """The 400 for its grammar."""
        return schema_error(self.body.main_schema(), self.error)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The library copies what belongs to a request when it preempts it."""
        return self


# Ends of lines for Unicode, though not for server-sent events: clients that read line
# by line with their language's own function would cut the JSON there.
LINE_ENDS = re.compile("\u0085|\u2028|\u2029".encode())
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def answer_headers(answer: Answer, finish_reason: str) -> dict[str, str]:
    """What the headers say of an answer: the JSON of `POST /` has no place for it."""
    return {
        "X-Finish-Reason": finish_reason,
        "X-Prompt-Tokens": str(answer.prompt_tokens),
        "X-Completion-Tokens": str(answer.completion_tokens),
    }


def sse(data: bytes, event: bytes = b"") -> bytes:
    """A server-sent event whose data is JSON."""
    data = LINE_ENDS.sub(lambda end: b"\\u%04x" % ord(end[0].decode()), data)
    name = b"event: %b\n" % event if event else b""
    return b"%bdata: %b\n\n" % (name, data)


class ChatResponse(BaseModel):
    """The answer of `POST /`: exactly these keys."""

    response: str
    history: list[Turn]
    status: Literal[200] = 200
    time: str = Field(examples=["2026-01-31 12:00:00"])


CHAT_EXAMPLE = {"example": {"prompt": "What is the capital of France?", "history": []}}


class ChatRequest(SamplingFields, json_schema_extra=CHAT_EXAMPLE):
    """The body of `POST /`."""

    prompt: Text = Field(min_length=1)
    """What the user says next."""
    history: list[Turn] = Field([], fail_fast=True)
    """The conversation before it, as the last answer gave it."""
    max_new_tokens: TokenLimit = None
    """Longest answer in tokens; the default is 512 (8192 if the model thinks), or what
    the context has left."""

    def turns(self) -> list[Turn]:
        return [*self.history, Turn(role="user", content=self.prompt)]

    def to_response(self, answer: Answer) -> ChatResponse:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        turns = [*self.turns(), Turn(role="assistant", content=answer.text)]
        return ChatResponse(response=answer.text, history=turns, time=now)

    def to_events(self, answer: Answer, sent: int) -> Iterator[bytes]:
        """The next server-sent events; `sent` characters are out already."""
        if delta := answer.text[sent:]:
            yield sse(b'{"delta": %b}' % to_json(delta))
        if answer.finish_reason:
            yield sse(to_json(self.to_response(answer)))
            end = {"finish_reason": answer.finish_reason} | answer.usage()
            yield sse(to_json(end), b"end")


# ------------------------------------------------------------------------------
# Functions and JSON in answers
#
# phi-4's template knows no functions. They are described in the system's turn; calls
# and results are text between marks, which the texts of users and results cannot have.
# A grammar holds an answer to a JSON schema, or from the mark of a call on to the
# function's name and schema.

CALL_MARK, MAX_CALLS = "<tool_call>", 16
CALL, END_CALL = CALL_MARK + '{"name": "%s", "arguments": ', "}</tool_call>"
ENDS_OF_CALL = tuple(END_CALL[:length] for length in range(1, len(END_CALL)))
CALL_HEAD = re.compile(CALL % '([^"]+)')
# Also what reads like a mark: in capitals, in full width, with something between its
# words, or something that nobody sees inside of them.
UNSEEN = "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]*"
TOOL, OF_TOOL = UNSEEN.join("tool"), f"{UNSEEN.join('call')}|{UNSEEN.join('response')}"
MARKS = re.compile(
    f"[<＜﹤‹〈⟨《«](?=[\\W_]{{0,9}}{TOOL}[\\W_]{{0,9}}({OF_TOOL}))", re.IGNORECASE
)
FUNCTIONS = """You can call functions. Each of these lines describes one, as JSON:
%s
To call a function, write nothing but
<tool_call>{"name": "its name", "arguments": {"parameter": "value"}}</tool_call>
Its result comes as <tool_response>. Where no function helps, answer without one."""


def show_functions(functions: Iterable[Any]) -> str:
    """What the model is told of functions that it may call."""
    keys = ("name", "description", "parameters")
    shown = [{key: getattr(each, key) for key in keys} for each in functions]
    return FUNCTIONS % "\n".join(json.dumps(each, ensure_ascii=False) for each in shown)


def without_marks(text: str) -> str:
    """A text that the model cannot take for a call or a result."""
    return MARKS.sub("&lt;", text)


def show_calls(calls: Iterable[Any]) -> str:
    """Calls as the model has written them, with no mark inside of the arguments."""
    escaped = partial(MARKS.sub, lambda mark: f"\\u{ord(mark[0]):04x}")
    shown = [
        CALL % each.name + escaped(each.arguments or "{}") + END_CALL for each in calls
    ]
    return "\n".join(shown)


# A string of JSON, which may not have come to its end, or a bracket.
JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\]]', re.DOTALL)


def _end_of_json(text: str, start: int) -> int:
    """Where the object that starts there ends; the end of the text if it goes on."""
    if text.find(END_CALL, start) < 0 and not text.endswith(ENDS_OF_CALL):
        return len(text)  # cheap, for this is asked at every token
    depth = 0
    for part in JSON_PART.finditer(text, start):
        depth += part[0] in "{["
        depth -= part[0] in "}]"
        if not depth:
            return part.end()
    return len(text)


def split_calls(text: str) -> tuple[str, list[dict[str, str]]]:
    """The text before the first call, and the name and the arguments of each call, as
    far as they have come."""
    content = text.partition(CALL_MARK)[0]
    calls, at = [], len(content)
    while head := CALL_HEAD.match(text, at):
        start = head.end()
        end = _end_of_json(text, start)
        calls.append({"name": head[1], "arguments": text[start:end]})
        at = end + len(END_CALL) + 1  # each is on a line of its own
    return content, calls


def new_parts(
    calls: list[dict[str, Any]], known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What a stream sends of calls, where it has sent the known ones."""
    for call, old in zip_longest(calls, known[: len(calls)]):
        if not old:
            yield call
            continue
        arguments = call["function"]["arguments"]
        if new := arguments.removeprefix(old["function"]["arguments"]):
            yield {"index": call["index"], "function": {"arguments": new}}


def answer_grammar(
    schema: dict[str, Any] | None,
    functions: Sequence[Any],
    must_call: bool = False,
    parallel: bool = True,
) -> str | None:
    """What an answer has to be, in llguidance's Lark; None: any text.

    `schema` is of an answer that calls no function, None if that is any text.
    """
    answer = "TEXT" if schema is None else _json_rule(schema)
    if not functions:
        return None if schema is None else f"start: {answer}"
    more = f' ("\\n{CALL_MARK}" body){{0,{MAX_CALLS - 1}}}' if parallel else ""
    start = f"mark body{more}" if must_call else f"{answer} | mark body{more}"
    # Text may stand before a call, unless the answer must be a call or JSON.
    after_text = schema is None and not must_call
    mark = f'mark[lazy]: TEXT "{CALL_MARK}"' if after_text else f'mark: "{CALL_MARK}"'
    bodies = " | ".join(map(_call_rule, functions))
    return f"""start: {start}
{mark}
body: ({bodies}) "{END_CALL}"
TEXT: /(.|\\n)*/"""


def keywords(text: str) -> set[str]:
    return {*text.split()}


# Keywords whose value is a schema, or a list of them; schemas by name; and others that
# llguidance 1.9.1 knows. Other keywords have no effect; those in LACKING it lacks.
NESTED = keywords(
    "items additionalItems additionalProperties prefixItems allOf anyOf oneOf"
)
NAMED = keywords("properties patternProperties $defs definitions")
PLAIN = keywords("""
    $ref $schema type const enum required minItems maxItems minProperties maxProperties
    minLength maxLength pattern format multipleOf minimum maximum exclusiveMinimum
    exclusiveMaximum
""")
LACKING = keywords("""
    $dynamicRef $recursiveRef contains contentSchema dependencies dependentRequired
    dependentSchemas else if maxContains minContains not propertyNames then
    unevaluatedItems unevaluatedProperties uniqueItems
""")
# Other formats are remarks, for JSON Schema, and llguidance refuses them.
FORMATS = keywords("date-time time date duration email hostname ipv4 ipv6 uuid uri")
LOOK_AROUND = re.compile(r"\(\?<?[=!]")
# llguidance's own limits do not stop more than this, which could take minutes and
# hundreds of MB.
MAX_SCHEMA, MAX_MULTIPLE, MAX_PATTERNS, MAX_NAME = 262_144, 20_000, 100, 64
# It counts in floats: integers from EXACT on lose digits, and -2**63 ends the process
# with a stack overflow. LARGEST is the last float before 2**63.
EXACT, LARGEST = 2**53, 2**63 - 1024


class Preparation:
    """Rewrites a JSON schema so that llguidance accepts it. What llguidance lacks is a
    ValueError, or is left out if `lenient`; otherwise it accepts no answer that the schema
    does not."""

    def __init__(self, lenient: bool) -> None:
        self.lenient = lenient
        self.places: set[str] = set()  # JSON pointers to schemas
        self.refs: set[str] = set()
        self.num_patterns = 0

    def prepared(self, schema: Any) -> Any:
        """The whole schema. Raises ValueError."""
        kept = self._schema(schema, "")
        # A $ref has to lead to a place that was checked as a schema.
        if wrong := [ref for ref in self.refs if unquote(ref[1:]) not in self.places]:
            why = f"a $ref leads to {min(wrong)[:100]}, which is no schema in it"
            raise ValueError(why)
        if self.num_patterns > MAX_PATTERNS:
            raise ValueError(f"it has over {MAX_PATTERNS} patternProperties")
        return kept

    def _schema(self, schema: Any, place: str) -> Any:
        self.places.add(place)
        if isinstance(schema, list):
            return [self._schema(each, f"{place}/{n}") for n, each in enumerate(schema)]
        if not isinstance(schema, dict):
            return schema
        kept = {}
        for key, value in _without_property_names(schema).items():
            if key in NAMED and isinstance(value, dict):
                kept[key] = {
                    name: self._schema(each, f"{place}/{key}/{_in_pointer(name)}")
                    for name, each in value.items()
                }
            elif key in NESTED:
                kept[key] = self._schema(value, f"{place}/{key}")
            elif key in PLAIN or key in NAMED:
                kept[key] = value
            elif key in LACKING and value is not False and not self.lenient:
                raise ValueError(f'"{key}" cannot be used')
        if isinstance(ref := kept.get("$ref"), str):
            if not ref.startswith("#"):
                raise ValueError(f"a $ref leads out of the schema: {ref[:100]}")
            self.refs.add(ref)
        self._text(kept)
        self._numbers(kept)
        self._object(kept)
        return kept

    def _text(self, schema: dict[str, Any]) -> None:
        """Where a class of characters excludes quotes or backslashes, llguidance lets them
        through, unless it excludes a control character, too: so a tab is added to it."""
        name, pattern = schema.get("format"), schema.get("pattern")
        if isinstance(name, str) and name not in FORMATS:
            del schema["format"]
        if not isinstance(pattern, str):
            return
        unknown = LOOK_AROUND.search(pattern) or r"\P{" in pattern
        if unknown and self.lenient:  # such as zod's for an address
            del schema["pattern"]
        elif r"\P{" in pattern:
            raise ValueError(r"a pattern: \P{...} cannot be used")
        else:
            schema["pattern"] = excluding_tabs(pattern)

    def _numbers(self, schema: dict[str, Any]) -> None:
        for keyword in ("const", "enum"):
            if _has_inexact(schema.get(keyword)):
                why = f"{keyword} has a number of more digits than can be kept"
                raise ValueError(why)
        for keyword in ("minimum", "maximum"):
            if keyword in schema:
                schema[keyword] = _inner_bound(schema[keyword], keyword)
        for keyword in ("minimum", "maximum"):
            exclusive = f"exclusive{keyword.title()}"
            bound = schema.get(exclusive)
            if isinstance(bound, int | float) and not isinstance(bound, bool):
                # It may let an exclusive bound through; a step further in, it does not.
                bound = _inner_bound(bound, keyword)
                whole = schema.get("type") == "integer" and isinstance(bound, int)
                step = 1 if whole else max(abs(bound), 1) * 1e-9
                step = step if keyword == "minimum" else -step
                del schema[exclusive]
                inside = _narrower(schema.get(keyword), bound + step, keyword)
                schema[keyword] = _inner_bound(inside, keyword)

    def _object(self, schema: dict[str, Any]) -> None:
        """Keep keys apart. llguidance takes "\\u0061" for another key than "a" where it
        knows only which names a key may not be, but not where a pattern says what it
        is. And it counts a repeated key twice."""
        names, patterns = schema.get("properties"), schema.get("patternProperties")
        others = schema.get("additionalProperties", True)
        if isinstance(patterns, dict):
            self.num_patterns += len(patterns)
            pairs = patterns.items()
            patterns = {excluding_tabs(pattern): value for pattern, value in pairs}
            schema |= {"patternProperties": patterns, "additionalProperties": False}
        elif isinstance(names, dict) and names and others is not False:
            schema["additionalProperties"] = False
            if others in (True, {}) and all(map(str.isprintable, names)):
                schema["patternProperties"] = {"": {}}
            elif max(map(len, names)) <= MAX_NAME:
                self.num_patterns += 1
                schema["patternProperties"] = {f"^{_all_but(names)}$": others}
        least, required = schema.get("minProperties"), schema.get("required")
        if isinstance(least, int) and least > 1:
            certain = len({*map(str, required)}) if isinstance(required, list) else 0
            if least > certain and not self.lenient:
                why = "minProperties can be as many as are required, not more"
                raise ValueError(why)
            del schema["minProperties"]


def _without_property_names(schema: dict[str, Any]) -> dict[str, Any]:
    """The same without propertyNames, if it can be said in other words, as it can where
    zod writes it: for a record of texts, or of an enum."""
    asked, rest = schema.get("propertyNames"), dict(schema)
    rest.pop("propertyNames", None)
    if asked is None or asked in ({}, {"type": "string"}):
        return rest
    names = asked.get("enum") if isinstance(asked, dict) else None
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or asked.keys() - {"enum", "type"} or rest.get("properties"):
        return schema
    others = rest.get("additionalProperties", {})
    rest["properties"] = dict.fromkeys(names, others)
    return rest | {"additionalProperties": False}


def _in_pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def excluding_tabs(pattern: str) -> str:
    """The regular expression with a tab added to each negated class of characters."""
    return re.sub(
        r"\\.|\[\^(?!\])", lambda part: part[0].replace("[^", r"[^\t"), pattern
    )


def _has_inexact(data: Any) -> bool:
    """Whether JSON has a number that llguidance would change."""
    if isinstance(data, dict):
        return _has_inexact([*data.values()])
    if isinstance(data, list):
        return any(map(_has_inexact, data))
    if isinstance(data, float) and float(f"{data:.15g}") != data:
        return True
    return isinstance(data, int | float) and not abs(data) < EXACT


def _narrower(bound: Any, other: Any, keyword: str) -> Any:
    if not isinstance(bound, int | float):
        return other if bound is None else bound
    return max(bound, other) if keyword == "minimum" else min(bound, other)


def _inner_bound(bound: Any, keyword: str) -> Any:
    """The nearest bound that llguidance has exactly, so that no answer is outside."""
    if not isinstance(bound, int | float) or not abs(bound) >= EXACT:
        return bound
    near = max(-LARGEST, bound) if keyword == "minimum" else min(LARGEST, bound)
    if abs(near) > LARGEST:
        raise ValueError("bounds of numbers beyond 2**63 are not supported")
    # A multiple of this has at most 15 digits before its zeros, and is a float.
    step = 1024 * 10 ** (len(str(abs(int(near)))) - 15)
    if keyword == "minimum":
        return -(-int(near) // step) * step
    return int(near) // step * step


def _all_but(names: Iterable[str]) -> str:
    """A regular expression of all texts but these."""
    rests: dict[str, list[str]] = {}
    for name in names:
        rests.setdefault(name[:1], []).append(name[1:])
    whole = rests.pop("", None)  # one of them ends here
    other = f"[^\\t{re.escape(''.join(rests))}]" if rests else r"[\s\S]"
    ways = [rf"{other}[\s\S]*"]
    ways += [re.escape(first) + _all_but(rest) for first, rest in rests.items()]
    return f"({'|'.join(ways)}){'' if whole else '?'}"


def _json_rule(schema: dict[str, Any], lenient: bool = False) -> str:
    """JSON by a schema, on one line, as json.dumps writes it. What the schema says of
    llguidance's options does not count. Raises ValueError for what takes too long."""
    options = {"whitespace_flexible": False, "lenient": lenient}
    options |= {"item_separator": ", ", "key_separator": ": "}
    prepared = Preparation(lenient).prepared(schema)
    text = json.dumps(prepared | {"x-guidance": options})
    if len(text) > MAX_SCHEMA:
        raise ValueError(f"it has over {MAX_SCHEMA} characters")
    multiple = 1
    for each in set(re.findall(r'"multipleOf": ([\d.e+-]{1,40})', text)):
        multiple = math.lcm(multiple, Fraction(each).numerator)
        if multiple > MAX_MULTIPLE:
            why = f"the least common multiple of its multipleOf is over {MAX_MULTIPLE}"
            raise ValueError(why)
    return f"%json {text}"


def _call_rule(function: Any) -> str:
    """What a call has between `CALL_MARK` and `END_CALL`."""
    schema = function.parameters or {"properties": {}}
    if "properties" in schema:  # few functions take arguments that they do not name
        schema = {"additionalProperties": False} | schema
    head = json.dumps((CALL % function.name).removeprefix(CALL_MARK))
    return f"{head} {_json_rule({'type': 'object'} | schema, not function.strict)}"


# Limits of a grammar, so that it does not slow down other requests: about 0.3 s to compile,
# 20 ms for a token and 50 MB, as far as llguidance can bound them.
GRAMMAR_LIMITS = {"max_grammar_size": 20_000, "max_lexer_states": 20_000}
GRAMMAR_LIMITS |= {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 50_000}
GRAMMAR_LIMITS |= {"step_max_items": 5_000}


def grammar_tokenizer(model: Any, tokenizer: Any, ends: list[int]) -> Any:
    """What llguidance has to know of a tokenizer; takes half a second."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=model.config.vocab_size, eos_token=ends)


def compile_grammar(tokenizer: Any, grammar: str) -> Any:
    """An LLMatcher. Raises ValueError for a grammar that is wrong, that nothing can
    satisfy, or that is too large."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**GRAMMAR_LIMITS, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    mask = matcher.compute_bitmask()  # the first takes longest, finds empty languages
    if not matcher.is_error():
        byte = next(n for n, bits in enumerate(mask) if bits)
        matcher.consume_token(8 * byte + (mask[byte] & -mask[byte]).bit_length() - 1)
        matcher.compute_bitmask()  # the second finds what is too complex
    if why := grammar_error(matcher):
        raise ValueError(why)
    matcher.reset()
    if _thinks(tokenizer):
        grammar = THOUGHT + grammar.replace("start:", "answer:", 1)
        return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    return matcher


@cache
def grammar_threads() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def allowed_tokens(matchers: list[tuple[Any, int]], shape: tuple[int, int]) -> Any:
    """A bit for each token, (rows, bytes), which is set where the row's grammar allows the
    token. Each matcher comes with its row; `shape` is (rows, tokens)."""
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

    mask = allocate_token_bitmask(*shape)
    fill_next_token_bitmask_par(grammar_threads(), matchers, mask)
    return mask.view("uint8")


# A model that thinks may do so before an answer that a grammar holds. llguidance takes
# the marks for control tokens, which no text has.
THOUGHT = r"""start: (<think> THOUGHT </think>)? answer
THOUGHT: /(.|\n)*/ & ~/(.|\n)*<\/think>(.|\n)*/
"""


def _thinks(tokenizer: Any) -> bool:
    marks = THINK, END_THINK
    return all(len(tokenizer.tokenize_str(m, parse_special=True)) == 1 for m in marks)


# What llguidance says in words of its own, and what it means to the author of a schema.
TOO_COMPLEX = "it is too complex"
MEANINGS = (
    (r"oneOf .*coerce_one_of.*", "oneOf needs alternatives that exclude each other"),
    (r'failed to parse "%json": recursion.*', "it is nested too deeply"),
    (r'failed to parse "%json": .*', "not JSON: a lone surrogate, NaN or Infinity"),
    (r"regex parse error: .*error: (.*)", r"a pattern or a limit: \1"),
    (r"regex parse error: .*", "a pattern or a limit is too long"),
    (r"lookarounds not supported.*", r"a pattern: look-around and \\b cannot be used"),
    (r"Failed to generate regex for \w+ range.*", "bounds of numbers are too large"),
    (r"Unsatisfiable schema: Regex is empty.*", "no text satisfies all of it"),
    (r"Unsatisfiable schema: (.*)", r"nothing satisfies it: \1"),
    (r"Unable to determine if regex is empty.*", "limits of a text are too complex"),
    (r"circular references with.*", "a $ref beside other keywords leads to itself"),
    (r"patternProperty regexes.*", "patterns of properties overlap"),
    (r"NoExtensionBias", "nothing satisfies it: a $ref leads only to itself"),
    (r"Pointer '(.*)' does not exist", r"a $ref leads to \1, which does not exist"),
    (r"Expected f64", "Expected a number"),
    (r"(grammar size|initial lexer|lexer|parser|fuel|DNF|Schema inter).*", TOO_COMPLEX),
)


def grammar_error(matcher: Any) -> str:
    """Why a matcher is stuck, on one line and without the grammar; empty if it is not."""
    if not (error := matcher.get_error()):  # as after nearly every token
        return ""
    why = re.split(r"\n +\d+ \| |<non-verbose", error)[0]
    why = one_line(why.rpartition("JSON schema: ")[2])
    for words_of_library, meaning in MEANINGS:
        if re.match(words_of_library, why, re.IGNORECASE):
            why = re.sub(words_of_library, meaning, why, flags=re.IGNORECASE)
            break
    return why


# Grammars that are compiled at once, and what one may take; 0.3 is usual for the largest.
COMPILERS, COMPILE_SECONDS = 2, 15


class GrammarCompiler:
    """Compiles what holds answers to their grammars, in threads."""

    def __init__(self, model: Any, tokenizer: Any, ends: list[int]) -> None:
        self.ll_tokenizer = grammar_tokenizer(model, tokenizer, ends)
        self.turns = asyncio.Semaphore(COMPILERS)
        self.pool = ThreadPoolExecutor(COMPILERS)

    async def compile(self, body: SamplingFields, in_thread: Callable) -> Any:
        """The matcher of an answer, None if it has no grammar. `in_thread(pool, work)`
        does the work unless the request has ended before. Raises a 400 or a 503."""
        if not (body.is_json() or body.call_mark()):
            return None
        if WORLD_SIZE > 1:  # each process would need one of its own
            raise schema_error(body.main_schema(), "not under torchrun")
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                await self.turns.acquire()
        except TimeoutError as error:
            raise unavailable("many schemas wait to be compiled") from error
        compile_one = partial(compile_grammar, self.ll_tokenizer)
        work = in_thread(self.pool, partial(body.matcher, compile_one))
        compiling = asyncio.ensure_future(work)
        # A thread cannot be ended: until it ends by itself, nobody else has its turn.
        compiling.add_done_callback(self.compiled)
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                return await asyncio.shield(compiling)
        except TimeoutError as error:
            raise schema_error(body.main_schema(), "that takes too long") from error

    def compiled(self, compiling: asyncio.Future) -> None:
        self.turns.release()
        if not compiling.cancelled():
            compiling.exception()  # or asyncio logs one that nobody waits for


# ------------------------------------------------------------------------------
# POST /v1/chat/completions
# ------------------------------------------------------------------------------


# Fields of OpenAI and vLLM that would change the answer, and are not supported: each is
# accepted at the value that has no effect, the one in NEUTRAL or else an empty one.
REFUSED = """
    add_generation_prompt add_special_tokens allowed_token_ids audio bad_words best_of
    chat_template continue_final_message documents echo function_call functions grammar
    guided_choice guided_grammar guided_json guided_regex include_stop_str_in_output
    length_penalty logits_processors logprob_token_ids logprobs modalities moderation n
    prompt_logprobs regex repetition_detection return_prompt_text return_token_ids
    skip_special_tokens spaces_between_special_tokens stop_token_ids structured_outputs
    top_logprobs truncate_prompt_tokens use_beam_search verbosity vllm_xargs
    watermarking web_search_options
"""
NEUTRAL = {"add_generation_prompt": True, "best_of": 1, "length_penalty": 1, "n": 1}
NEUTRAL |= {"function_call": "none"}
NEUTRAL |= {"modalities": ["text"], "skip_special_tokens": True, "verbosity": "medium"}
NEUTRAL |= {"spaces_between_special_tokens": True}
NEUTRAL |= {"web_search_options": None, "prompt_logprobs": None}


def refuse(value: Any, info: pydantic.ValidationInfo) -> None:
    """Raises an error for a value that has an effect."""
    name = info.field_name
    has_effect = bool(value)
    if name in NEUTRAL:
        has_effect = value not in (None, NEUTRAL[name])
    if has_effect:
        raise PydanticCustomError("unsupported_parameter", "is not supported")


Refused = Annotated[Any, AfterValidator(refuse), Field(description="Not supported.")]


class StreamOptions(Strict, extra="ignore"):
    include_usage: bool | None = None


class TextPart(Strict, extra="ignore"):
    type: Literal["text"]
    text: Text


OPTIONAL: Any = Field(None, validate_default=True)  # looked at where it is missing, too


def goes_with_type(given: Any, info: pydantic.ValidationInfo) -> Any:
    """Raises an error if the type has the name of this field, and the field is not given."""
    if given is None and info.data.get("type") == info.field_name:
        raise PydanticCustomError("missing", "is missing")
    return given


GOES_WITH_TYPE = AfterValidator(goes_with_type)


def as_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


class Function(Strict, extra="ignore"):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    arguments: Text = "{}"
    """Of a call: JSON."""

    @pydantic.field_validator("parameters")
    @classmethod
    def are_an_object(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given and given.get("type", "object") != "object":
            raise PydanticCustomError("parameters", 'are not of the type "object"')
        return given


class Tool(Strict, extra="ignore"):
    """A function that is offered or called."""

    type: Literal["function"] = "function"
    function: Function


class ToolChoice(Strict, extra="ignore"):
    type: Literal["none", "auto", "required", "function"]
    function: Annotated[Function | None, GOES_WITH_TYPE] = OPTIONAL


AS_CHOICE = BeforeValidator(
    lambda given: {"type": given} if isinstance(given, str) else given,
    json_schema_input_type=Literal["none", "auto", "required"] | ToolChoice,
)


class OpenAITurn(Strict, extra="ignore"):
    role: Literal["user", "assistant", "system", "developer", "tool"]
    content: one_or_more(TextPart, as_part, min_length=1) | None = OPTIONAL
    tool_calls: list[Tool] | None = Field(None, max_length=128, fail_fast=True)
    function_call: Refused = None

    @pydantic.field_validator("content")
    @classmethod
    def can_be_without(cls, given: Any, info: pydantic.ValidationInfo) -> Any:
        if given is None and info.data.get("role") not in ("assistant", "tool", None):
            raise PydanticCustomError("missing", "is missing")
        return given

    def turn(self) -> Turn:
        """As the template takes it."""
        text = "".join(part.text for part in self.content or [])
        if self.role == "assistant":
            text += show_calls(each.function for each in self.tool_calls or [])
            return Turn(role="assistant", content=text)
        if self.role in ("system", "developer"):
            return Turn(role="system", content=text)
        text = without_marks(text)
        if self.role == "tool":
            text = f"<tool_response>{text}</tool_response>"
        return Turn(role="user", content=text)


class NamedSchema(Strict, extra="ignore"):
    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict, extra="ignore"):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[NamedSchema | None, GOES_WITH_TYPE] = OPTIONAL


refused: Any = dict.fromkeys(REFUSED.split(), (Refused, None))
Refusals = pydantic.create_model("Refusals", __base__=SamplingFields, **refused)

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
OPENAI_EXAMPLE = {"example": {"model": "phi-4", "messages": [QUESTION]}}


class OpenAIMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    """Thinking before the content; absent where the model has not thought."""
    refusal: None = None
    tool_calls: list[dict[str, Any]] | None = None
    """Absent where no function is called."""


class Choice(BaseModel):
    index: Literal[0] = 0
    message: OpenAIMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, int | dict[str, int]]


class Health(BaseModel):
    status: Literal["ok", "loading", "down", "draining"]
    model: str
    device: str


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["local"] = "local"
    max_model_len: int
    """Tokens of a prompt and its answer together."""


class ModelList(BaseModel):
    """The answer of `GET /v1/models`: the one model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


# Options of the routes, most of them for /docs.
SSE = {200: {"content": {"text/event-stream": {}}}}
TEXT = {200: {"content": {"text/plain": {}}}}
ERRORS = {code: {"model": ErrorBody} for code in ("4XX", "5XX")}
OPENAI_ERRORS = {code: {"model": OpenAIErrorBody} for code in ("4XX", "5XX")}
CHAT = {"response_model": ChatResponse, "responses": SSE | ERRORS, "tags": ["Chat"]}
MODELS = {"responses": OPENAI_ERRORS, "tags": ["OpenAI API"]}
OPENAI = {"response_model": ChatCompletion, "responses": SSE | OPENAI_ERRORS}
OPENAI |= {"tags": ["OpenAI API"]}
FIGURES = {"response_class": Response, "responses": TEXT | ERRORS, "tags": ["Server"]}


def show_chunk(
    fields: dict[str, Any], delta: dict[str, Any], reason: FinishReason | None = None
) -> bytes:
    """The server-sent event of one choice; `fields` are the same in all of an answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return sse(to_json(fields | {"choices": [choice]}))


class OpenAIRequest(Refusals, extra="ignore", json_schema_extra=OPENAI_EXAMPLE):
    """The body of `POST /v1/chat/completions`. Fields that are not listed are ignored."""

    model: Text | None = None
    messages: list[OpenAITurn] = Field(min_length=1, fail_fast=True)
    max_tokens: Annotated[TokenLimit, NO_LIMIT] = None
    max_completion_tokens: Annotated[TokenLimit, NO_LIMIT] = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128, fail_fast=True)
    tool_choice: Annotated[ToolChoice, AS_CHOICE] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    """false leaves `reasoning_content` out."""

    @pydantic.model_validator(mode="after")
    def go_together(self) -> Self:
        """Raises a 400 for fields that do not."""
        if self.must_call() and not self.offered():
            why = "tool_choice asks for a function, and tools has none that fits"
            raise ClientError(why, "tool_choice")
        structured = self.is_json() or self.call_mark()
        if structured and (self.ignore_eos or self.min_tokens):
            why = "a schema or tools go without ignore_eos and min_tokens"
            raise ClientError(why, "ignore_eos" if self.ignore_eos else "min_tokens")
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """None for text."""
        if not self.response_format or self.response_format.type == "text":
            return None
        if self.response_format.type == "json_object":
            return {"type": "object"}
        return self.response_format.json_schema.definition

    def must_call(self) -> bool:
        choice = self.tool_choice
        return choice is not None and choice.type in ("required", "function")

    def offered(self) -> list[Function]:
        """The functions that the answer may call."""
        functions = [tool.function for tool in self.tools or []]
        choice = self.tool_choice
        if choice and choice.type == "function":
            return [each for each in functions if each.name == choice.function.name]
        return [] if choice and choice.type == "none" else functions

    def is_json(self) -> bool:
        return self.schema_of_answer() is not None

    def call_mark(self) -> str | None:
        return CALL_MARK if self.offered() else None

    def grammar_of_answer(self) -> str:
        """What an answer has to be, in llguidance's Lark."""
        parallel = self.parallel_tool_calls
        if parallel is None:  # a weak model that must call does not stop by itself
            parallel = not self.must_call()
        options = self.must_call(), parallel
        return answer_grammar(self.schema_of_answer(), self.offered(), *options)

    def matcher(self, compile_grammar: Callable[[str], Any]) -> Any:
        """What holds the answer to its schemas. Raises a 400 that names the wrong one."""
        try:
            return compile_grammar(self.grammar_of_answer())
        except SCHEMA_ERRORS as error:
            for param, schema, functions in self.schemas_alone():
                try:
                    compile_grammar(answer_grammar(schema, functions))
                except SCHEMA_ERRORS as wrong:
                    raise schema_error(param, wrong) from error
            raise schema_error(self.main_schema(), error) from error

    def schemas_alone(self) -> Iterator[tuple[str, Any, list[Function]]]:
        """Each with its place in the body, as `answer_grammar` takes it."""
        if self.is_json():
            yield "response_format", self.schema_of_answer(), []
        for number, tool in enumerate(self.tools or []):
            yield f"tools[{number}].function.parameters", None, [tool.function]

    def main_schema(self) -> str:
        """The field that is named where it is not known which schema is wrong."""
        return "tools" if self.offered() else "response_format"

    def turns(self) -> list[Turn]:
        turns = [message.turn() for message in self.messages]
        if functions := self.offered():
            text = show_functions(functions)
            if turns[0].role == "system":
                text = f"{turns.pop(0).content}\n\n{text}"
            turns.insert(0, Turn(role="system", content=text))
        return turns

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def parts(
        self, answer: Answer, end: int | None = None
    ) -> tuple[str | None, str, list[dict[str, Any]]]:
        """The thinking of an answer, its text and the calls in it, of its first `end`
        characters."""
        thinking, text = answer.parts(end)
        if self.include_reasoning is False:
            thinking = None
        if not self.offered() or (self.is_json() and not text.startswith(CALL_MARK)):
            return thinking, text, []
        text, calls = split_calls(text)
        first = {"index": 0, "id": "", "type": "function"}
        parts = [first | {"function": call} for call in calls]
        for index, part in enumerate(parts):
            part |= {"index": index, "id": f"call_{answer.id[-24:]}{index}"}
        return thinking, text, parts

    def finish_reason(self, answer: Answer) -> FinishReason | None:
        reason = answer.finish_reason
        called = reason == "stop" and self.parts(answer)[2]
        return "tool_calls" if called else reason

    def to_response(self, answer: Answer) -> dict[str, Any]:
        thinking, text, calls = self.parts(answer)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        message["refusal"] = None
        if thinking is not None:
            message |= {"content": text or None, "reasoning_content": thinking}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
            for call in calls:  # their numbers are for streams
                del call["index"]
        choice = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = self.finish_reason(answer)
        fields = answer.openai_fields | {"object": "chat.completion"}
        return fields | {"choices": [choice], "usage": answer.openai_usage()}

    def to_events(self, answer: Answer, sent: int) -> Iterator[bytes]:
        """The next server-sent events; `sent` characters are out already."""
        fields = answer.openai_fields | {"object": "chat.completion.chunk"}
        chunk = partial(show_chunk, fields)
        thought, before, known = self.parts(answer, sent)
        thinking, text, calls = self.parts(answer)
        if not sent:
            begun = text or thinking is not None or not answer.text
            content = "" if begun else None
            yield chunk({"role": "assistant", "content": content})
        if answer.thinking and thinking is None:
            yield b": thinking\n\n"  # for proxies, which close what is silent
        if thinking and (delta := thinking[len(thought or "") :]):
            yield chunk({"reasoning_content": delta})
        if delta := text[len(before) :]:
            yield chunk({"content": delta})
        for part in new_parts(calls, known):
            yield chunk({"tool_calls": [part]})
        if answer.finish_reason:
            yield chunk({}, self.finish_reason(answer))
            if self.stream_options and self.stream_options.include_usage:
                usage = {"choices": [], "usage": answer.openai_usage()}
                yield sse(to_json(fields | usage))
            yield sse(b"[DONE]")


# ------------------------------------------------------------------------------
# GET /, the chat page
# ------------------------------------------------------------------------------


def page_headers(page: str) -> dict[str, str]:
    """Headers that let the browser run only the page's own script, and load nothing."""

    def hashed(tag: str) -> str:
        text = re.search(f"<{tag}.*?>(.*)</{tag}>", page, re.DOTALL)[1]
        return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"

    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; "
    policy += "connect-src 'self'; frame-ancestors 'none'; img-src data:; "
    policy += "require-trusted-types-for 'script'; "
    policy += f"script-src {hashed('script')}; style-src {hashed('style')}"
    return {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


# ------------------------------------------------------------------------------
# GET /metrics
# ------------------------------------------------------------------------------

REQUESTS = Counter("phi4_requests", "Requests answered", ["route", "status"])
PROMPT_TOKENS = Counter("phi4_prompt_tokens", "Tokens of prompts")
NEW_TOKENS = Counter("phi4_completion_tokens", "Tokens generated")
TTFT = Histogram("phi4_time_to_first_token_seconds", "Arrival to first token")
TPOT = Histogram("phi4_time_per_output_token_seconds", "Mean time of a later token")
RUNNING = Gauge("phi4_requests_in_flight", "Requests being generated")
WAITING = Gauge("phi4_requests_waiting", "Admitted requests that wait for a place")
CACHE = Gauge("phi4_cache_usage_ratio", "Used part of the KV cache, 0 to 1")
METRICS = exposition.CONTENT_TYPE_LATEST  # their media type


def observe(answer: Answer, ttft: float, decode: float) -> None:
    """Count an answer that has ended: the first token came after `ttft` seconds, 0 if none
    came, and the others within `decode` seconds."""
    PROMPT_TOKENS.inc(answer.prompt_tokens)
    NEW_TOKENS.inc(answer.completion_tokens)
    if ttft:
        TTFT.observe(ttft)
    if (later := answer.completion_tokens - 1) > 0:
        TPOT.observe(decode / later)


def show_metrics(admitted: int, settings: Settings, cache_usage: float) -> bytes:
    """In Prometheus's format. `admitted` is how many requests run or wait."""
    RUNNING.set(min(admitted, settings.max_in_flight))
    WAITING.set(max(admitted - settings.max_in_flight, 0))
    CACHE.set(cache_usage)
    return exposition.generate_latest()


# ------------------------------------------------------------------------------
# What a stranger may send: limits of a connection, of a head and of a body
# ------------------------------------------------------------------------------


# Of a head that is not complete; a complete one may have twice as many.
MAX_HEAD_BYTES, MAX_CONNECTIONS = 8192, 2000
CLIENT_SECONDS = 10  # for a head, and to stop sending after a response
CLOSE = {"Connection": "close"}  # the rest of the body is not wanted
MAX_FIELDS = 10_000  # of a body; a context of 16384 tokens holds 4,000


def check_head(request: Request) -> None:
    """Raises a 400 if a proxy could see another end of the body than this server; and,
    where there is no key, a 403 if Host is a name that is not this machine's: a web page
    whose name was made to lead here (DNS rebinding) would be answered."""
    if {"content-length", "transfer-encoding"} <= {*request.headers}:
        raise HTTPException(400, "Content-Length beside Transfer-Encoding", CLOSE)
    path, prefix = request["path"], request["root_path"]
    if path == prefix:
        request.scope["path"] += "/"  # /phi4 is /phi4/
    if request.method == "GET" and path.removeprefix(prefix) in ("", "/"):
        return  # the chat page has no secret, and says what to do about a 403
    settings = request.app.state.engine.settings
    names = f"localhost {socket.gethostname()} {settings.host} {settings.allowed_hosts}"
    host = request.headers.get("host") or "localhost"  # HTTP/1.0 needs none
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        if not settings.api_key and not {name, "*"} & {*words(names.lower())}:
            ipaddress.ip_address(name)
    except ValueError as error:
        why = f"this is not the server {host!r}: see --allowed-hosts"
        raise HTTPException(403, why, CLOSE) from error


class BoundedRequest(Request):
    """A request whose body comes within the limits of size and time."""

    async def stream(self) -> AsyncIterator[bytes]:
        """Raises HTTPException: 400, 408 or 413."""
        settings = self.app.state.engine.settings
        limit, size = settings.max_body_bytes, 0
        try:
            async with asyncio.timeout(settings.body_timeout):
                async for piece in super().stream():
                    size += len(piece)
                    if size <= limit:
                        yield piece
                    elif size > 16 * limit:  # at once, a reset would overtake the 413
                        break
        except TimeoutError as error:
            raise HTTPException(408, "the body came too slowly", CLOSE) from error
        except ClientDisconnect as error:  # or h11 has answered a 400 for what came
            raise HTTPException(400, "the body broke off", CLOSE) from error
        if size > limit:  # Protocol reads the rest, if there is any, and drops it
            raise HTTPException(413, f"the body has over {limit} bytes")

    async def json(self) -> Any:
        """Raises a 400 for another encoding, and for more fields than can be validated
        in an instant; ValueError for what is not JSON."""
        if len(re.findall(rb'"\s*:', await self.body())) > MAX_FIELDS:
            raise HTTPException(400, f"the body has over {MAX_FIELDS} fields")
        try:
            return await super().json()
        except UnicodeDecodeError as error:
            why = f"send JSON in UTF-8, not compressed ({error})"
            raise HTTPException(400, why) from error
        except RecursionError as error:
            raise HTTPException(400, "the JSON is nested too deeply") from error


class BoundedConnection(h11.Connection):
    """Refuses a body in many tiny chunks: each takes a step in Python."""

    num_chunks = num_bytes = 0

    def next_event(self) -> Any:
        """Raises RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.num_chunks = self.num_bytes = 0
        elif isinstance(event, h11.Data):
            self.num_chunks += 1
            self.num_bytes += len(event.data)
            if self.num_chunks > 256 and self.num_bytes < 256 * self.num_chunks:
                raise h11.RemoteProtocolError("chunks are too small")
        return event


class Protocol(H11Protocol):
    """uvicorn's side of a connection, which no client can keep busy or open for long."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = BoundedConnection(h11.SERVER, MAX_HEAD_BYTES)
        close = self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(CLIENT_SECONDS, close)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        super()._unset_keepalive_if_required()  # or the clock keeps all this alive

    def _unset_keepalive_if_required(self) -> None:
        """uvicorn stops the clock at any byte; here only a whole head of a request stops
        it, and nothing that comes after a response."""
        if self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY):
            super()._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """In pieces, for h11 looks at the size of incomplete heads only."""
        for start in range(0, len(data), MAX_HEAD_BYTES):
            if not self.transport.is_closing():
                super().data_received(data[start : start + MAX_HEAD_BYTES])
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            self.flow.pause_reading()  # of the rest of a refused body it takes little
            self.loop.call_later(0.05, self.flow.resume_reading)

    def handle_events(self) -> None:
        """uvicorn stops reading when a second request follows one that is not answered,
        and would not see the client leave. Here it may send 64 KiB of that."""
        try:
            super().handle_events()
        except h11.LocalProtocolError:  # from a 400 after a response has begun
            self.transport.abort()
        if self.flow.read_paused and self.conn.their_state is not h11.SEND_BODY:
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > 65536:
                self.transport.abort()


APP_OPTIONS: dict[str, Any] = {
    "title": "phi-4 chat server",
    "version": "1.0.0",
    "redoc_url": None,
    "redirect_slashes": False,  # it would lead to whatever Host says
    "exception_handlers": ERROR_HANDLERS,
}
CORS_OPTIONS = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["*"]}
# No WebSocket: uvicorn would leave a POST that asks for one without an answer.
UVICORN_OPTIONS: dict[str, Any] = {
    "http": Protocol,
    "ws": "none",
    "log_config": None,
    "limit_concurrency": MAX_CONNECTIONS,
    "timeout_keep_alive": CLIENT_SECONDS,
    "timeout_graceful_shutdown": 5,
}


class Server(uvicorn.Server):
    """uvicorn's server, which finishes what it has admitted before it shuts down.

    What happens on SIGTERM or Ctrl-C, in this order:
    1. `handle_exit`: new requests get a 503, admitted ones go on. Still listening.
    2. After --drain-timeout seconds the requests that are left get a 503, too.
    3. `on_tick`, ten times a second, ends the main loop once none is left.
    4. uvicorn's `shutdown`: the listener and, within 5 seconds, connections close.
    5. `Engine.lifespan`: the generation thread stops.
    6. `api.main` returns 0. uvicorn would raise the signal again if it stood in its
       `_captured_signals`, so `handle_exit` does not put it there.
    While the model loads, the process ends at once with 0; a second signal ends it at
    once with 128 and the signal's number.
    """

    def handle_exit(self, sig: int, frame: Any) -> None:
        engine: Any = self.config.app.state.engine  # an api.Engine
        if engine.phase == "loading":
            os._exit(0)
        if engine.phase == "draining":  # the second signal
            os._exit(128 + sig)
        engine.phase = "draining"
        logger.info("leaving: %d requests to finish", len(engine.admitted))
        give_up = partial(engine.release_all, unavailable("the server is leaving"))
        asyncio.get_running_loop().call_later(engine.settings.drain_timeout, give_up)

    async def on_tick(self, counter: int) -> bool:
        engine: Any = self.config.app.state.engine
        self.should_exit = engine.phase == "draining" and not engine.admitted
        return await super().on_tick(counter)


def serve(app: ASGIApp, root_path: str, listener: socket.socket) -> None:
    """Serve the application on a listening socket until a signal ends it."""
    config = uvicorn.Config(app, root_path=root_path, **UVICORN_OPTIONS)
    Server(config).run([listener])


# ------------------------------------------------------------------------------
# The middleware of every request, and the route that asks for the key
# ------------------------------------------------------------------------------


class RequestMiddleware:
    """Gives every request an id, and turns what is raised into a response. At the end it
    frees the request's place, counts it and logs it."""

    def __init__(self, app: ASGIApp, sends_id: bool = True) -> None:
        self.app, self.sends_id = app, sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, started, status = Request(scope, receive), time.monotonic(), 0
        request_id = request.headers.get("x-request-id", "")
        if not re.fullmatch(r"[\w.:-]{1,128}", request_id, re.ASCII):
            request_id = secrets.token_hex(8)

        async def labelled_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.sends_id:
                    message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            check_head(request)
            await self.app(scope, receive, labelled_send)
        except asyncio.CancelledError:
            logger.debug("%s ends, the server shuts down", request_id)
        except Exception as error:
            # h11 has answered a 400 for malformed bytes; nothing more can be sent.
            if not isinstance(error, HTTPException | h11.LocalProtocolError):
                logger.exception("%s failed", request_id)
            if not status:  # otherwise it is too late for another response
                response = await error_response(request, error)
                with contextlib.suppress(h11.LocalProtocolError):  # from the same 400
                    await response(scope, receive, labelled_send)
        finally:
            end_request(request, request_id, status or 500, started)


def end_request(request: Request, request_id: str, status: int, started: float) -> None:
    """Free the place of a request that has ended in whatever way, count and log it."""
    route = getattr(request.scope.get("route"), "path", "other")
    REQUESTS.labels(route, status).inc()
    path = request.scope["raw_path"].decode("latin-1")  # cannot hold a line break
    line = f"{request_id} {request.method} {path[:200]} {status}"
    # An api.Generation, once reply() has made one.
    generation: Any = getattr(request.state, "generation", None)
    if generation:
        request.state.client_watch.cancel()
        request.app.state.engine.release(generation, HTTPException(499))  # if it runs
        first, last = generation.first_token_time, generation.last_token_time
        ttft = max(first - generation.arrival_time, 0)  # 0: no token came
        observe(generation, ttft, last - first)
        line += f" in={generation.prompt_tokens} out={generation.completion_tokens}"
        line += f" first={ttft:.3f}s"
        logger.debug("%s answers %r", generation.id, generation.text)
    if why := getattr(request.state, "why", None):
        line += f" why={why[:200]!a}"
    level = logging.DEBUG if route == "/health" else logging.INFO
    logger.log(level, "%s total=%.3fs", line, time.monotonic() - started)
    # A connection that is kept alive keeps the scope of its last request.
    request.scope.get("state", {}).clear()


class SecuredRoute(APIRoute):
    """A route that needs the key, where one is set, and a loaded model. Both are looked
    at before the body is read."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_if_allowed(request: Request) -> Response:
            if request.app.state.engine.phase == "loading":
                raise unavailable("the server is loading")
            check_key(request)
            return await handle(BoundedRequest(request.scope, request.receive))

        return handle_if_allowed


def check_key(request: Request) -> None:
    """Raises a 401 without a valid key, where keys are set."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
    keys = words(request.app.state.engine.settings.api_key)
    # In constant time.
    matches = [secrets.compare_digest(given, key.encode()) for key in keys]
    if keys and not any(matches):
        why = "send a valid API key: Authorization: Bearer KEY"
        raise HTTPException(401, why, {"WWW-Authenticate": "Bearer"})
