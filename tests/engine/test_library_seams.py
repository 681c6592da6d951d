# SPDX-License-Identifier: MIT
"""What api.py uses of its libraries beyond their documentation is still there. A red
test here names the seam that a new version has moved."""

import ast
import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h11
import pytest
import torch
import uvicorn
from fastapi.routing import APIRoute
from played_gpu import create_manager, generated, gpu_model, plain_model, results
from starlette.requests import Request
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    ContinuousBatchingConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers import modeling_flash_attention_utils as flash
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import continuous_batching as batching
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    FIFOScheduler,
    PagedAttentionCache,
    continuous_api,
    input_outputs,
    model_runner,
    scheduler,
    utils,
)
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

import api
import py_api

PREPARED = (
    "self requests_in_batch logits_processors use_decode_fast_path num_q_tokens"
    " max_kv_read use_padding"
)
KERNEL = (
    "query key value cu_seq_q cu_seq_k max_q max_k scale window_size enable_gqa"
    " seqused_k block_table"
)
CONFIG = (
    "page_size num_blocks max_batch_tokens max_requests_per_batch max_blocks_per_request"
    " allow_block_sharing scheduler_type auto_switch_to_flash q_padding_interval_size"
    " use_cuda_graph use_async_batching"
)
REQUEST = (
    "input_ids request_id max_new_tokens streaming eos_token_id logit_processor_kwargs"
)
# Overridden, replaced or called with arguments by position: all parameters count.
SIGNATURES: list[tuple[Callable, str]] = [
    (FIFOScheduler.clear_cancelled_requests, "self"),
    (FIFOScheduler._try_to_meet_safety_margin, "self"),
    (FIFOScheduler.schedule_batch, "self token_budget cache_budget"),
    (
        FIFOScheduler._infer_request_tokens,
        "self state request_ids_to_remove_from_waiting",
    ),
    (model_runner.ModelRunner._sample, "self scores output_ids"),
    (model_runner.ModelRunner.compute_batch, "self model batch_data"),
    (model_runner.ModelRunner._get_forward_fn, "self use_block_table"),
    (
        model_runner.ModelRunner._forward_process_and_sample,
        "self model batch_data carry_over_ids prev_output_ids output_ids",
    ),
    (model_runner.ModelRunner.warmup, "self model"),
    (model_runner.ModelRunner.run_one_warmup, "self model num_q_tokens max_kv_read"),
    (
        input_outputs.ContinuousBatchingIOs.prepare_batch_tensors,
        PREPARED,
    ),
    (
        input_outputs.ContinuousBatchingAsyncIOs.prepare_batch_tensors,
        PREPARED,
    ),
    (input_outputs.ContinuousBatchingIOs._get_graph_key, "self"),
    (input_outputs.ContinuousBatchingIOs.prepare_batch_update, "self"),
    (input_outputs.ContinuousBatchingAsyncIOs.swap_io_pairs, "self"),
    (input_outputs.ContinuousBatchingAsyncIOs.infer_carry_over_ids, "self"),
    (continuous_api.ContinuousBatchProcessor.update_batch, "self"),
    (continuous_api.ContinuousBatchProcessor.prepare_next_batch, "self"),
    (continuous_api.ContinuousBatchProcessor._generation_step, "self model"),
    (continuous_api.OutputRouter.fail_and_deliver, "self state error"),
    (input_outputs.ContinuousBatchingIOs._get_num_sequences, "self use_padding"),
    (continuous_api.OutputRouter.deliver, "self output"),
    (continuous_api.OutputRouter.deliver_batch, "self outputs"),
    (continuous_api.BackgroundThreadStatus.can_accept_new_requests, "self"),
    (continuous_api.ContinuousBatchProcessor.has_pending_requests, "self"),
    (ContinuousBatchingManager.start, "self"),
    (ContinuousBatchingManager.join, "self stop_trigger_time timeout"),
    (PagedAttentionCache.compute_free_capacity, "self relative"),
    (PagedAttentionCache.reset, "self"),
    (PagedAttentionCache.count_new_complete_blocks, "self state request_len"),
    (PagedAttentionCache.mark_complete_blocks, "self state complete_blocks"),
    (PagedAttentionCache.evict_cached_blocks, "self"),
    (utils.stream_context, "stream"),
    (
        flash.lazy_import_flash_attention,
        "implementation attention_wrapper allow_all_kernels",
    ),
    (uvicorn.Server.handle_exit, "self sig frame"),
    (uvicorn.Server.on_tick, "self counter"),
    (H11Protocol.__init__, "self config server_state app_state _loop"),
    (H11Protocol.data_received, "self data"),
    (H11Protocol.handle_events, "self"),
    (H11Protocol.timeout_keep_alive_handler, "self"),
    (H11Protocol._unset_keepalive_if_required, "self"),
    (h11.Connection.next_event, "self"),
    (APIRoute.get_route_handler, "self"),
    (Request.stream, "self"),
    (Request.json, "self"),
]
# Called with these by name, or with so many by position; there may be others.
TAKES: list[tuple[Callable, str]] = [
    (varlen_attn, KERNEL),
    (ContinuousBatchingConfig, CONFIG),
    (
        ContinuousBatchingManager.add_request,
        REQUEST,
    ),
    (ContinuousBatchingManager.stop, "timeout hard_stop"),
    (
        PreTrainedTokenizerBase.apply_chat_template,
        "add_generation_prompt sanitize_control_tokens",
    ),
]
# Replaced, or read, where the library itself looks them up.
GLOBALS: list[tuple[Any, str]] = [
    (continuous_api, "ModelRunner"),
    (continuous_api, "ContinuousBatchProcessor"),
    (continuous_api, "ContinuousBatchingAsyncIOs"),
    (continuous_api, "PagedAttentionCache"),
    (input_outputs, "ContinuousBatchingIOs"),
    (scheduler, "SCHEDULER_MAPPING"),
    (flash, "_loaded_implementation"),
    (flash, "_flash_with_kvcache_fn"),
    (torch.cpu, "_is_avx512_bf16_supported"),
    (torch._inductor.config, "coordinate_descent_tuning"),
    (nn.Module, "compile"),
    (PreTrainedConfig, "_attn_implementation"),
    (h11.Connection, "trailing_data"),
    (FlowControl, "pause_reading"),
    (FlowControl, "resume_reading"),
]
# Of the state of a request.
STATE = (
    "logit_processor_kwargs position_offset initial_tokens generated_tokens"
    " _true_initial_tokens _eos_token_ids status remaining_prefill_tokens"
)
# Of a manager that has run, as paths of attributes.
ATTRIBUTES = [
    "background_thread_status.fatal_error",
    "batch_processor.cache.bytes_per_sector",
    "batch_processor.cache.max_batch_tokens",
    "batch_processor.cache.max_blocks_per_request",
    "batch_processor.cache.num_blocks",
    "batch_processor.cache.num_sectors",
    "batch_processor.model_runner.cache",
    "batch_processor.model_runner.cb_config.max_requests_per_batch",
    "batch_processor.model_runner.inputs_and_outputs.compute_stream",
    "batch_processor.model_runner.inputs_and_outputs.current_pair",
    "batch_processor.model_runner.inputs_and_outputs.io_pairs",
    "batch_processor.model_runner.inputs_and_outputs.output_ids",
    "batch_processor.model_runner.use_cuda_graph_varlen",
    "batch_processor.scheduler.active_requests",
    "batch_processor.scheduler.block_new_requests",
    "batch_processor.scheduler.waiting_requests",
    "continuous_batching_config.page_size",
    "current_batch",
    "input_queue.qsize",
    "logit_processor.supported_keys",
    "output_router.deliver",
    "_wake_up_loop.wait",
]


@contextlib.contextmanager
def running(model: Any) -> Iterator[Any]:
    """A manager that is warmed up and started."""
    manager = create_manager(model)
    manager.warmup()
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True, timeout=30)


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(("function", "expected"), SIGNATURES)
def test_signatures(function: Callable, expected: str) -> None:
    assert parameters(function) == expected.split()


@pytest.mark.parametrize(("function", "expected"), TAKES)
def test_parameters_by_name(function: Callable, expected: str) -> None:
    assert set(expected.split()) <= set(parameters(function))


def test_fields_of_a_request() -> None:
    known = {field.name for field in dataclasses.fields(batching.RequestState)}
    # The library hides the status behind a property.
    assert {*STATE.split()} <= known | {name.lstrip("_") for name in known}


@pytest.mark.parametrize(("holder", "name"), GLOBALS)
def test_globals(holder: Any, name: str) -> None:
    assert hasattr(holder, name)


def test_bytes_of_a_byte_level_vocabulary() -> None:
    letters = bytes_to_unicode()
    assert (len(letters), letters[ord("a")], letters[ord(" ")]) == (256, "a", "Ġ")


def test_uvicorn_raises_again_what_stands_in_captured_signals() -> None:
    assert "_captured_signals" in inspect.getsource(uvicorn.Server.capture_signals)


def test_every_private_name_in_use_is_known_here() -> None:
    """A private name that the server begins to use belongs into the lists above."""
    sources = [Path(api.__file__).read_text(), inspect.getsource(py_api.Protocol)]
    names = {
        node.attr
        for tree in map(ast.parse, sources)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    } - {"_exit"}  # of os
    known = Path(__file__).read_text()
    assert names, "it uses no private name any more?"
    assert not [name for name in names if name not in known]


def test_attributes_of_a_manager(played_gpu: pytest.MonkeyPatch) -> None:
    with running(gpu_model(played_gpu)) as manager:
        manager.add_request([5, 6, 7], "one", max_new_tokens=2)
        assert results(manager, {"one"})
        for path in ATTRIBUTES:
            found: Any = manager
            for name in path.split("."):
                assert hasattr(found, name), f"{path}: no {name}"
                found = getattr(found, name)
        pairs = manager.batch_processor.model_runner.inputs_and_outputs.io_pairs
        assert len(pairs) == 2
        for pair in pairs:
            # By this name it is looked up where api.py replaces it.
            assert type(pair.host_io) is type(pair.device_io) is api.FlashIOs
            assert len(pair.host_io._bulk_input_tensor) == pair.host_io.static_inputs
        (allocator,) = manager.batch_processor.cache.cache_allocators.values()
        assert allocator.bytes_per_block and not allocator.ledger.cached_blocks
        assert allocator.tokens_per_page == 16 and allocator.block_table == {}
        # Blocks of all layers, their tokens, keys and values, heads, dim.
        layers, blocks = len(manager.model.model.layers), allocator.num_blocks
        assert allocator.cache_tensor.shape == (layers * (blocks + 2) * 16, 2, 2, 16)
        assert manager.batch_processor.cache.num_sectors == blocks


def test_the_library_takes_our_kernel_for_flash_attention(
    played_gpu: pytest.MonkeyPatch,
) -> None:
    api.install_patches(torch.device("cuda"))
    functions, _ = flash.lazy_import_flash_attention(api.FLASH)
    assert functions[2] is api.varlen_attn


def test_compiled_layers_have_no_graph_break(played_gpu: pytest.MonkeyPatch) -> None:
    """The whole warm-up with compiled layers, then answers that equal `generate`. The
    backend keeps what dynamo has traced, and runs it as it is."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = nn.Module.compile
    played_gpu.setattr(
        nn.Module,
        "compile",
        lambda module, **options: compiled(module, backend=backend, **options),
    )
    torch._dynamo.reset()
    prompts = [[5, 6, 7], [8] * 40, list(range(3, 90)), [9]]
    with running(gpu_model(played_gpu, compile_layers=True, layers=12)) as manager:
        warmed_up = len(graphs)
        for i, prompt in enumerate(prompts):
            manager.add_request(prompt, str(i), max_new_tokens=8)
        found = results(manager, set("0123"))
    expected = generated(plain_model(layers=12), prompts, 8)
    assert [found[str(i)] for i in range(len(prompts))] == expected
    # For a row and for several, of the last layer and of the others; requests add none.
    assert 0 < warmed_up <= 4
    assert len(graphs) == warmed_up
