# SPDX-License-Identifier: MIT
"""The GPU's attention, every path of it, on a CPU with a reference for the kernel."""

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any

import overlap
import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation.continuous_batching import (
    continuous_api,
    initialization,
    input_outputs,
)

import api

SMALL = {
    "PAGE": 16,
    "GRAPHED": 64,
    "MULTIPLE": 16,
    "FAR": 80,
    "PLANNED": 32,
    "NEAR": 40,
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
            pages = block_table[row, : -(-used // api.PAGE)].long()
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
        if self.shape[0] <= api.GRAPHED:
            SHAPES.add(self.shape)
        return found


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine whose CPU passes for a GPU, as far as the attention can tell."""
    for name, value in SMALL.items():
        monkeypatch.setattr(api, name, value)
    monkeypatch.setattr(api, "can_compile", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    nothing = lambda *_, **__: None
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", nothing)
    # What pick_attention sets stays set: have it undone.
    for module, name in (
        (api.flash, "_loaded_implementation"),
        (api.flash, "_flash_with_kvcache_fn"),
        (continuous_api, "ModelRunner"),
        (input_outputs, "ContinuousBatchingIOs"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    fifo = api.batching.FIFOScheduler
    monkeypatch.setitem(api.batching.scheduler.SCHEDULER_MAPPING, "fifo", fifo)
    monkeypatch.setattr(api, "varlen_attn", api.varlen_attn)
    with overlap.overlapped():
        yield monkeypatch


def model(seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.Phi3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def engine(served: transformers.PreTrainedModel, blocks: int, pages: int) -> Any:
    greedy = transformers.GenerationConfig(eos_token_id=-1, pad_token_id=0)
    config = transformers.ContinuousBatchingConfig(
        page_size=16,
        num_blocks=blocks,
        max_batch_tokens=128,
        max_requests_per_batch=8,
        max_blocks_per_request=pages,
        q_padding_interval_size=16,
    )
    manager = served.init_continuous_batching(greedy, config)
    manager.logit_processor.supported_keys["sampling"] = tuple
    return manager


def generated(plain: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    (tokens,) = plain.generate(torch.tensor([prompt]), max_new_tokens=24, **options)
    return tokens[len(prompt) :].tolist()


def answers(
    served: transformers.PreTrainedModel,
    prompts: list[list[int]],
    sampled: tuple = (),
    pages: int = 20,
) -> list[list[int]]:
    """All but the last prompt in flight at once, then that one; 24 tokens each."""
    manager = engine(served, 200, pages)
    SHAPES.clear()
    manager.warmup()
    captured = SHAPES.copy()
    manager.start()
    done: dict[str, list[int]] = {}
    try:
        for batch in (range(len(prompts) - 1), [len(prompts) - 1]):
            for i in batch:
                extra = {"sampling": (1.0, 1.0, 0, 7)} if i in sampled else {}
                manager.add_request(prompts[i], str(i), max_new_tokens=24, **extra)
            while not all(str(i) in done for i in batch):
                output = manager.get_result(timeout=30)
                assert output and not output.error, output
                if output.is_finished():
                    done[output.request_id] = output.generated_tokens
    finally:
        manager.stop(block=True, timeout=30)
    assert captured == SHAPES  # no request has paid for a capture
    return [done[str(i)] for i in range(len(prompts))]


@pytest.fixture
def served(played_gpu: pytest.MonkeyPatch) -> transformers.PreTrainedModel:
    """A model with the GPU's attention."""
    played_gpu.setattr(api.varlen_attn, "__kwdefaults__", {"block_table": None})
    served = model()
    served.set_attn_implementation(
        api.pick_attention(torch.device("cuda"), "bfloat16", True)
    )
    played_gpu.setattr(api, "varlen_attn", reference)
    played_gpu.setattr(continuous_api, "ModelRunner", CpuRunner)
    return served


def test_every_path_equals_generate(
    played_gpu: pytest.MonkeyPatch, served: transformers.PreTrainedModel
) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [
        5,
        15,
        16,
        17,
        33,
        40,
        100,
        128,
        150,
        200,
        64,
        63,
        72,
    ]  # page borders too
    prompts = [
        torch.randint(3, 200, (n,), generator=generator).tolist() for n in lengths
    ]
    prompts.append(prompts[9][:160] + prompts[0])  # finds its beginning in the cache
    PATHS.clear()
    compiled: list[dict[str, bool]] = []
    played_gpu.setattr(
        torch.nn.Module, "compile", lambda _, **options: compiled.append(options)
    )
    mixed = answers(served, prompts, sampled=(1, 3))
    assert compiled == [{"fullgraph": True, "disable": True}] * 3  # no compiler here
    plain = model()
    for i, (prompt, answer) in enumerate(zip(prompts, mixed, strict=True)):
        assert (answer == generated(plain, prompt)) is (i not in (1, 3)), i
    assert {
        (True, True, 1),  # decoding near
        (True, True, None),  # and far
        (False, True, 1),  # prefill from pages
        (False, False, 1),  # prefill of nothing cached
    } == PATHS
    single: list[Any] = []
    kernel = api.sdpa
    played_gpu.setattr(
        api, "sdpa", lambda *given, **more: single.append(1) or kernel(*given, **more)
    )
    assert answers(served, [prompts[6]]) == [mixed[6]]
    assert len(single) == 9  # in 3 layers: both halves of the warm-up, then the prompt
    assert answers(served, [prompts[12]]) == [mixed[12]]
    assert len(single) == 15  # the warm-up's: the prompt is too short
    alone = answers(served, [prompts[1], prompts[3]], sampled=(0, 1))
    assert alone == [mixed[1], mixed[3]]  # the seed's answers, whatever else is there
    # A context that is shorter than the largest step.
    short = answers(served, [prompts[1], prompts[3]], sampled=(0, 1), pages=3)
    assert short == alone


@pytest.mark.parametrize("longest", [1, 3])
def test_cancels_and_a_full_cache_leave_the_other_answers_right(
    played_gpu: pytest.MonkeyPatch, served: transformers.PreTrainedModel, longest: int
) -> None:
    rng = random.Random(4)
    prompts = [
        [rng.randrange(3, 200) for _ in range(rng.randint(5, 200))] for _ in range(60)
    ]
    manager = engine(served, 14 * longest, 20)  # so many of them fit
    manager.warmup()
    processor, step = manager.batch_processor, manager._generation_step
    cancelled: set[str] = set()
    preempted: list[str] = []

    def step_and_cancel() -> None:
        step()  # whose tokens are not there yet
        for name in list(processor.scheduler.active_requests):
            if rng.random() < 0.02:
                cancelled.add(name)
                manager.cancel_request(name)

    manager._generation_step = step_and_cancel
    begin_again = api.batching.RequestState.create_equivalent_initial_request
    played_gpu.setattr(
        api.batching.RequestState,
        "create_equivalent_initial_request",
        lambda state: preempted.append(state.request_id) or begin_again(state),
    )
    done: dict[str, list[int]] = {}
    end = time.monotonic() + 120
    manager.start()
    try:
        for i, prompt in enumerate(prompts):
            manager.add_request(prompt, str(i), max_new_tokens=24)
        while len(done.keys() | cancelled) < len(prompts):
            if output := manager.get_result(timeout=0.1):  # a cancel brings none
                assert not output.error, output
                done[output.request_id] = output.generated_tokens
            assert time.monotonic() < end
    finally:
        manager.stop(block=True, timeout=30)
    plain = model()
    whole = [i for i in range(len(prompts)) if str(i) in done]
    for i in whole:
        assert done[str(i)] == generated(plain, prompts[i]), i
    assert min(map(len, (whole, cancelled, preempted))) > 4


def test_without_varlen_attn_the_library_attends(
    played_gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = torch.device("cuda")
    assert api.pick_attention(torch.device("cpu"), "bfloat16", True) == "sdpa"
    assert api.pick_attention(cuda, "float32", True) == "sdpa"
    played_gpu.setattr(api, "varlen_attn", None)
    assert api.pick_attention(cuda, "bfloat16", True) == "sdpa"
    assert len(caplog.records) == 2  # one line each says what it costs


@pytest.mark.parametrize(
    ("wanted", "able"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_layers_are_compiled_if_wanted_and_possible(
    played_gpu: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: bool,
    able: bool,
) -> None:
    played_gpu.setattr(api.varlen_attn, "__kwdefaults__", {"block_table": None})
    played_gpu.setattr(api, "can_compile", lambda: able)
    played_gpu.setattr(api.FlashRunner, "compiled", None, raising=False)
    assert api.pick_attention(torch.device("cuda"), "bfloat16", wanted) == api.FLASH
    assert api.FlashRunner.compiled is (wanted and able)
    assert len(caplog.records) == (wanted and not able)  # says what it costs


def test_compiling_needs_all_of_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(api.Path, "exists", lambda path: path.name == "Python.h")
    assert api.can_compile()
    for module, name in ((api.shutil, "which"), (api.importlib.util, "find_spec")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda name: None)
            assert not api.can_compile()
    monkeypatch.setattr(api.Path, "exists", lambda path: False)
    assert not api.can_compile()
