# SPDX-License-Identifier: MIT
"""The GPU's attention, every path of it, on a CPU with a reference for the kernel."""

import random
import time
from typing import Any

import pytest
import torch
import transformers
from played_gpu import (
    PATHS,
    SHAPES,
    create_manager,
    generated,
    gpu_model,
    install,
    plain_model,
    results,
)

import api
import model_download


def answers(
    served: transformers.PreTrainedModel,
    prompts: list[list[int]],
    sampled: tuple = (),
) -> list[list[int]]:
    """All but the last prompt in flight at once, then that one; 24 tokens each."""
    manager = create_manager(served)
    SHAPES.clear()
    manager.warmup()
    captured = SHAPES.copy()
    manager.start()
    done: dict[str, list[int]] = {}
    try:
        for batch in (range(len(prompts) - 1), [len(prompts) - 1]):
            for i in batch:
                drawn = api.ChatRequest(prompt="x", temperature=1, seed=7)
                asked = {"sampling": api.Sampling(drawn, None)}
                extra = asked if i in sampled else {}
                manager.add_request(prompts[i], str(i), max_new_tokens=24, **extra)
            done |= results(manager, set(map(str, batch)))
    finally:
        manager.stop(block=True, timeout=30)
    assert captured == SHAPES  # no request has paid for a capture
    return [done[str(i)] for i in range(len(prompts))]


@pytest.fixture
def served(played_gpu: pytest.MonkeyPatch) -> transformers.PreTrainedModel:
    return gpu_model(played_gpu)


@pytest.mark.parametrize("triton", [True, False])
def test_every_path_equals_generate(
    played_gpu: pytest.MonkeyPatch, triton: bool
) -> None:
    served = gpu_model(played_gpu, triton=triton)
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
    options = {"fullgraph": True, "dynamic": True, "disable": not triton}
    assert compiled == [options] * 3
    expected = generated(plain_model(), prompts)
    for i, (answer, right) in enumerate(zip(mixed, expected, strict=True)):
        assert (answer == right) is (i not in (1, 3)), i
    kernel = "triton" if triton else "torch"
    assert {(kernel, True), (kernel, False)} == PATHS
    single: list[Any] = []
    sdpa = api.sdpa
    played_gpu.setattr(
        api, "sdpa", lambda *given, **more: single.append(1) or sdpa(*given, **more)
    )
    assert answers(served, [prompts[6]]) == [mixed[6]]
    assert len(single) == 9  # in 3 layers: both halves of the warm-up, then the prompt
    assert answers(served, [prompts[12]]) == [mixed[12]]
    assert len(single) == 15  # the warm-up's: the prompt is too short
    alone = answers(served, [prompts[1], prompts[3]], sampled=(0, 1))
    assert alone == [mixed[1], mixed[3]]  # the seed's answers, whatever else is there
    # A context that is shorter than the largest step.
    served.config.max_position_embeddings = 48
    assert answers(served, [prompts[1], prompts[3]], sampled=(0, 1)) == alone


def test_a_layer_that_computes_otherwise_keeps_its_forward(
    played_gpu: pytest.MonkeyPatch,
) -> None:
    """Granite's multiplies what it adds: the last layer is not cut there."""

    def model() -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        config = transformers.GraniteConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=200,
            max_position_embeddings=320,
            residual_multiplier=0.22,
            initializer_range=0.3,
            eos_token_id=2,
        )
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    rng = random.Random(5)
    prompts = [[rng.randrange(3, 200) for _ in range(n)] for n in (5, 17, 90, 33)]
    served = model()
    served.set_attn_implementation(install(played_gpu))
    assert answers(served, prompts) == generated(model(), prompts)


@pytest.mark.parametrize("longest", [1, 3])
def test_cancels_and_a_full_cache_leave_the_other_answers_right(
    played_gpu: pytest.MonkeyPatch, served: transformers.PreTrainedModel, longest: int
) -> None:
    rng = random.Random(4)
    prompts = [
        [rng.randrange(3, 200) for _ in range(rng.randint(5, 200))] for _ in range(60)
    ]
    manager = create_manager(served, 14 * longest)  # so many of them fit
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
    expected = generated(plain_model(), prompts)
    whole = [i for i in range(len(prompts)) if str(i) in done]
    for i in whole:
        assert done[str(i)] == expected[i], i
    assert min(map(len, (whole, cancelled, preempted))) > 4


def test_where_flash_attention_cannot_run_the_library_attends(
    played_gpu: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(model_download, "cpus", lambda most: threads)
    assert api.install_patches(torch.device("cpu")) == "sdpa"
    assert api.install_patches(torch.device("cuda")) == api.FLASH


def test_a_failed_warm_up_is_an_error(
    played_gpu: pytest.MonkeyPatch,
    served: transformers.PreTrainedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The library only logs it, and goes on to serve without that graph."""

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("no kernel image is available")

    played_gpu.setattr(api, "paged_attention", broken)
    with pytest.raises(RuntimeError, match=r"warm-up with \d+ tokens failed"):
        create_manager(served).warmup()
    assert "no kernel image is available" in caplog.text


@pytest.mark.parametrize("able", [True, False])
def test_compiles_if_that_is_possible(
    played_gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, able: bool
) -> None:
    played_gpu.setattr(model_download, "can_compile", lambda: able)
    played_gpu.setattr(api.FlashRunner, "compiles", None)
    assert api.install_patches(torch.device("cuda")) == api.FLASH
    assert api.FlashRunner.compiles is able
    assert len(caplog.records) == (not able)  # says what it costs


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "fits"),
    [(40, 10, 128, 1), (9, 3, 64, 1), (16, 1, 64, 1), (32, 1, 64, 0), (32, 32, 96, 0)],
)
def test_heads_that_the_kernel_cannot_do_have_torchs(
    heads: int, kv_heads: int, dim: int, fits: int
) -> None:
    """Those of Phi-3-mini, for one."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = transformers.Phi3Config(**sizes, hidden_size=heads * dim)
    assert model_download.fits_kernel(config) == bool(fits)


def test_compiling_needs_all_of_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_download.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr(
        model_download.importlib.util, "find_spec", lambda name: object()
    )
    monkeypatch.setattr(
        model_download.Path, "exists", lambda path: path.name == "Python.h"
    )
    assert model_download.can_compile()
    for module, name in (
        (model_download.shutil, "which"),
        (model_download.importlib.util, "find_spec"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda name: None)
            assert not model_download.can_compile()
    monkeypatch.setattr(model_download.Path, "exists", lambda path: False)
    assert not model_download.can_compile()
