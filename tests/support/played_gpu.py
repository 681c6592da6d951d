# SPDX-License-Identifier: MIT
"""A machine whose CPU passes for a GPU: the GPU's attention and its runner, with small
sizes and with a reference in the place of the kernel."""

import contextlib
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
    "PAGE_SIZE": 16,
    "MAX_GRAPH_TOKENS": 64,
    "GRAPH_STEP": 16,
    "CUDNN_MIN_TOKENS": 80,
    "CUDNN_MULTIPLE": 32,
    "SPLIT_KV_ABOVE": 40,
}
PATHS: set[tuple] = set()
SHAPES: set[tuple] = set()  # of the steps that would be CUDA graphs


def reference(
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
    num_splits: int | None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """`varlen_attn`, row by row; NaN where nothing is attended. Refuses what the kernel
    would get wrong."""
    PATHS.add((max_q == 1, block_table is not None, num_splits))
    # A step in which all rows decode is known for one: the kernel has a faster way.
    assert (max_q == 1) == (int(cu_seq_q.diff().max()) == 1)
    out = torch.full_like(query, torch.nan)
    for row in range(len(cu_seq_q) - 1):
        start, end = cu_seq_q[row : row + 2].tolist()
        if start == end:
            continue
        assert end - start <= max_q
        if block_table is None:
            first, last = cu_seq_k[row : row + 2].tolist()
            k, v = key[first:last], value[first:last]
        else:
            used = int(seqused_k[row])
            pages = block_table[row, : -(-used // api.PAGE_SIZE)].long()
            k, v = (x[pages].flatten(0, 1)[:used] for x in (key, value))
        assert len(k) <= max_k  # the kernel would drop what lies beyond
        q, k, v = (x.transpose(0, 1)[None] for x in (query[start:end], k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        mask = mask.tril(k.shape[2] - q.shape[2])
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        out[start:end] = attended[0].transpose(0, 1)
    return out


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
        patch.setattr(model_download, "can_compile", lambda: False)
        patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        nothing = lambda *_, **__: None
        patch.setattr(initialization, "ensure_decode_fast_path_is_available", nothing)
        for module, name in (
            (api.flash, "_loaded_implementation"),
            (api.flash, "_flash_with_kvcache_fn"),
            (continuous_api, "ModelRunner"),
            (input_outputs, "ContinuousBatchingIOs"),
            (api, "varlen_attn"),
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
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def gpu_model(
    patch: pytest.MonkeyPatch, compile_layers: bool = False, layers: int = 3
) -> transformers.PreTrainedModel:
    """That model with the GPU's attention."""
    patch.setattr(model_download, "can_compile", lambda: compile_layers)
    attention = api.install_patches(torch.device("cuda"))
    patch.setattr(api, "varlen_attn", reference)
    patch.setattr(continuous_api, "ModelRunner", CpuRunner)
    model = plain_model(layers)
    model.set_attn_implementation(attention)
    return model


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Running]:
    """A server whose engine takes the CPU for a GPU. Options are those of Settings."""
    with playing() as patch:
        install = api.install_patches

        def install_for_gpu(_: torch.device) -> str:
            attention = install(torch.device("cuda"))
            patch.setattr(api, "varlen_attn", reference)
            patch.setattr(continuous_api, "ModelRunner", CpuRunner)
            return attention

        patch.setattr(api, "install_patches", install_for_gpu)
        with running(**options) as served:
            yield served


def create_manager(model: transformers.PreTrainedModel, blocks: int = 200) -> Any:
    """A manager with so many blocks of 16 tokens, for 8 requests at once."""
    settings = api.Settings(max_in_flight=8, batch_tokens=128, cache_tokens=16 * blocks)
    return api.create_manager(model, [-1], settings)


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
