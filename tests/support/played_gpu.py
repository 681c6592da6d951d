# SPDX-License-Identifier: MIT
"""A machine whose CPU passes for a GPU: the GPU's attention and its runner, with small
sizes and with a reference in the place of the kernel."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import overlap
import pytest
import tiny
import torch
import transformers
from server import Running, running
from torch import Tensor
from transformers.generation.continuous_batching import (
    continuous_api,
    initialization,
    input_outputs,
)

import api
import model_download

SMALL = {
    "FLASH_PAGE_SIZE": 32,
    "MAX_GRAPH_TOKENS": 64,
    "GRAPH_STEP": 16,
    "CUDNN_MIN_TOKENS": 80,
    "DECODE_PROGRAMS": 8,
    "CHUNK": 16,
    "QUERY_BLOCK": 16,
}
PATHS: set[tuple] = set()  # the kernel, and whether all rows decode
SHAPES: set[tuple] = set()  # of the steps that would be CUDA graphs
INSTALL = api.install_patches


def attend_by_row(
    query: Tensor,
    pages: list[Tensor],
    rows: Tensor,
    ends: Tensor,
    used: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention, row by row, to pages of keys and of values; NaN where nothing is
    attended. `rows` is the block table, `ends` are the rows' in the query, (rows + 1,),
    `used` are the tokens that a row has in the cache."""
    out = torch.full_like(query, torch.nan)
    for row, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
        if start == end:
            continue
        length = int(used[row])
        mine = rows[row, : -(-length // pages[0].shape[1])].long()
        k, v = (x[mine].flatten(0, 1)[:length].transpose(0, 1)[None] for x in pages)
        q = query[start:end].transpose(0, 1)[None]
        mask = torch.ones(end - start, length, dtype=torch.bool)
        mask = mask.tril(length - (end - start))
        options = {"attn_mask": mask, "scale": scale, "enable_gqa": True}
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        out[start:end] = attended[0].transpose(0, 1)
    return out


def paged_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, step: api.ForwardContext
) -> Tensor:
    """`api.paged_attention`, which takes minutes in Triton's interpreter."""
    decoding = step.shape.decoding
    PATHS.add(("triton", decoding))
    pages = [x.unflatten(0, (-1, step.page_size)) for x in (k, v)]
    new, used = step.cu_seqlens_q.diff(), step.cu_seqlens_k.diff()
    # Each row has as many parts as it takes: of its keys if it decodes, or of its tokens.
    size = int(step.chunk_size)
    wanted = [-(-k // size) if n == 1 else 0 for n, k in zip(new, used, strict=True)]
    assert step.chunks[1].diff(prepend=torch.tensor([0])).tolist() == wanted
    assert (step.query_blocks is None) == decoding == (int(new.max()) == 1)
    return attend_by_row(q, pages, step.block_table, step.cu_seqlens_q, used, scale)


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """`varlen_attn`. Refuses what the kernel would get wrong."""
    decoding = max_q == 1
    PATHS.add(("torch", decoding))
    assert key.shape[1] == api.FLASH_PAGE_SIZE
    assert window_size == (-1, -1 if decoding else 0)
    # A step in which all rows decode is known for one: the kernel has a faster way.
    assert decoding == (int(cu_seq_q.diff().max()) == 1)
    # The kernel would drop what lies beyond.
    assert max_q >= cu_seq_q.diff().max() and max_k >= seqused_k.max()
    return attend_by_row(query, [key, value], block_table, cu_seq_q, seqused_k, scale)


class CpuRunner(api.FlashRunner):
    """The library pads for GPUs only: pretend."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.pad_inputs = True

    def _get_forward_fn(self, use_block_table: bool) -> tuple:
        found = super()._get_forward_fn(use_block_table)
        shape = self.pair.device_io.shape
        if shape.num_tokens <= api.MAX_GRAPH_TOKENS:
            SHAPES.add(shape)
        return found


torch_compile = torch.compile


def compile_all_but_unpack(function: Any, **options: Any) -> Any:
    if function is model_download.unpack:
        return function
    return torch_compile(function, **options)


@contextlib.contextmanager
def playing() -> Iterator[pytest.MonkeyPatch]:
    """For as long as it lasts. What install_patches sets stays set: it is undone."""
    with (
        overlap.overlapped(),
        tiny.one_thread(),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in SMALL.items():
            patch.setattr(api, name, value)
        patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        # The library's compiler for CPUs would be loaded for it, in seconds.
        patch.setattr(torch, "compile", compile_all_but_unpack)
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        nothing = lambda *_, **__: None
        patch.setattr(initialization, "ensure_decode_fast_path_is_available", nothing)
        for module, name in (
            (api.flash, "_loaded_implementation"),
            (api.flash, "_flash_with_kvcache_fn"),
            (continuous_api, "ModelRunner"),
            (continuous_api, "ContinuousBatchProcessor"),
            (continuous_api, "ContinuousBatchingAsyncIOs"),
            (continuous_api, "PagedAttentionCache"),
            (input_outputs, "ContinuousBatchingIOs"),
            (api.FlashRunner, "compiles"),
        ):
            patch.setattr(module, name, getattr(module, name))
        yield patch


def plain_model(layers: int = 3, context: int = 320) -> transformers.PreTrainedModel:
    """The same random model at each call."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=context,
        original_max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # or one would be as good as another
            parameter.data.uniform_(0.8, 1.2)
    return model


def install(
    patch: pytest.MonkeyPatch, triton: bool = True, compile_layers: bool = False
) -> str:
    """What api.install_patches does, with references in the place of kernels."""
    patch.setattr(model_download, "can_compile", lambda: triton)
    attention = INSTALL(torch.device("cuda"))
    patch.setattr(api, "paged_attention", paged_reference)
    patch.setattr(api, "varlen_attn", varlen_reference)
    patch.setattr(continuous_api, "ModelRunner", CpuRunner)
    if not compile_layers:
        patch.setattr(torch.nn.Module, "compile", lambda _, **options: None)
    return attention


def gpu_model(
    patch: pytest.MonkeyPatch, layers: int = 3, **options: bool
) -> transformers.PreTrainedModel:
    """That model with the GPU's attention; options are those of `install`."""
    attention = install(patch, **options)
    model = plain_model(layers)
    model.set_attn_implementation(attention)
    return model


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Running]:
    """A server whose engine takes the CPU for a GPU. Options are those of Settings."""
    with playing() as patch:
        patch.setattr(api, "install_patches", lambda _: install(patch))
        with running(**options) as served:
            yield served


def create_manager(
    model: transformers.PreTrainedModel, blocks: int = 200, **options: Any
) -> Any:
    """A manager with so many blocks of 16 tokens, for 8 requests at once. Options are
    those of Settings."""
    options |= {"max_in_flight": 8, "batch_tokens": 128, "cache_tokens": 16 * blocks}
    return api.create_manager(model, [-1], api.Settings(**options))


def generated(
    model: transformers.PreTrainedModel, prompts: list[list[int]], new: int = 24
) -> list[list[int]]:
    """The tokens of a plain `generate`, of all prompts at once."""
    longest = max(map(len, prompts))
    padding = [[0] * (longest - len(prompt)) for prompt in prompts]
    rows = zip(padding, prompts, strict=True)
    tokens = torch.tensor([before + prompt for before, prompt in rows])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": tokens.ne(0).long(), "max_new_tokens": new}
    return model.generate(tokens, **options)[:, longest:].tolist()


def results(manager: Any, names: set[str]) -> dict[str, list[int]]:
    """The tokens of requests that have been added, once all of them have ended."""
    done: dict[str, list[int]] = {}
    while done.keys() != names:
        output = manager.get_result(timeout=60)
        assert output and not output.error, output
        if output.is_finished():
            done[output.request_id] = output.generated_tokens
    return done
