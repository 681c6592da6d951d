# SPDX-License-Identifier: MIT
"""How a step is prepared on a GPU's host, and when its outputs are delivered."""

import copy
from typing import Any

import pytest
import torch
from overlap import Past
from played_gpu import create_manager, generated, gpu_model, plain_model, results
from server import wait_until
from transformers.generation.continuous_batching import input_outputs

import api

PROMPTS = [
    [5, 6, 7],
    [8] * 40,
    [9],
    list(range(3, 130)),  # in two steps
    [*range(3, 90), 5],  # begins like the one before
    [7] * 100,
    list(range(20, 52)),  # two pages
]


class Compared:
    """Has the library fill the buffers, too, and compares what it fills them with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: set[tuple[bool, bool, bool]] = set()  # of steps
        ours = api.FlashIOs.prepare_batch_tensors
        theirs = input_outputs.ContinuousBatchingIOs.prepare_batch_tensors

        def prepare(
            host: Any, requests: list[Any], processors: Any, *more: Any
        ) -> None:
            states = [each.state for each in requests]
            before = [
                (s.position_offset, copy.copy(s.tokens_to_process)) for s in states
            ]
            theirs(host, requests, processors, True, *more[1:])
            expected = self.filled(host), [vars(s).copy() for s in states]
            for state, (offset, tokens) in zip(states, before, strict=True):
                state.position_offset, state.tokens_to_process = offset, tokens
            host._bulk_input_tensor.fill_(-7)
            host.num_q_tokens = host.total_seqlen_q = host.num_request_in_batch = -7
            ours(host, requests, processors, *more)
            found = self.filled(host), [vars(s).copy() for s in states]
            assert found == expected
            lengths = [each.query_length for each in requests]
            cached = sum(offset for offset, _ in before) > 0
            self.kinds.add((max(lengths) == 1, len(lengths) > 1, cached))

        monkeypatch.setattr(api.FlashIOs, "prepare_batch_tensors", prepare)

    def filled(self, host: Any) -> dict[str, Any]:
        """What counts of a host's buffers: the device's are cut to what a step has."""
        tokens, rows = host.num_q_tokens, host._get_num_sequences(True)
        (ends_k,) = host.cumulative_seqlens_k.values()
        pages = [
            host.block_table[
                0, row, : -(-(ends_k[row + 1] - ends_k[row]) // 16)
            ].tolist()
            for row in range(host.num_request_in_batch)
        ]
        tensors = {
            "input_ids": host.input_ids[:tokens],
            "position_ids": host.position_ids[:tokens],
            "cu_seqlens_q": host.cumulative_seqlens_q[: rows + 1],
            "cu_seqlens_k": ends_k[: rows + 1],
            "logits_indices": host.logits_indices[:rows],
        }
        fields = (
            "num_q_tokens",
            "num_request_in_batch",
            "total_seqlen_q",
            "max_kv_read",
        )
        fields += ("use_block_table", "req_id_to_new_token_position")
        return {
            **{name: tensor.tolist() for name, tensor in tensors.items()},
            **{name: copy.copy(getattr(host, name)) for name in fields},
            "total_seqlen_k": dict(host.total_seqlen_k),
            "requests": list(map(id, host.requests_in_batch)),
            "pages": pages,
        }


def test_the_buffers_are_filled_as_by_the_library(
    played_gpu: pytest.MonkeyPatch,
) -> None:
    model = gpu_model(played_gpu)
    manager = create_manager(model)
    compared = Compared(played_gpu)
    manager.warmup()
    for i, prompt in enumerate(PROMPTS):
        manager.add_request(prompt, str(i), max_new_tokens=20 + i)
    manager.start()
    found = results(manager, set(map(str, range(len(PROMPTS)))))
    manager.stop(block=True, timeout=30)
    expected = generated(plain_model(), PROMPTS, 20)
    assert [found[str(i)][:20] for i in range(len(PROMPTS))] == expected
    # Steps that decode, of one row and of several; and with prompts, some of them begun.
    decoding = {
        (several, cached) for all_new, several, cached in compared.kinds if all_new
    }
    assert {(True, True), (False, True)} <= decoding
    assert {(False, True, True), (False, True, False)} <= compared.kinds


@pytest.mark.parametrize(("seconds", "launched"), [(0, 2), (10, 3)])
def test_outputs_come_when_the_next_step_is_launched(
    played_gpu: pytest.MonkeyPatch, seconds: float, launched: int
) -> None:
    """Where the event loop needs longer for them than the thread sleeps; those of the last
    step are delivered though none follows."""
    played_gpu.setattr(api, "OUTPUT_SECONDS", seconds)
    manager = create_manager(gpu_model(played_gpu))
    manager.warmup()
    steps: list[int] = []
    compute = api.FlashRunner.compute_batch

    def launch(self: Any, *step: Any) -> None:
        steps.append(1)
        compute(self, *step)

    played_gpu.setattr(api.FlashRunner, "compute_batch", launch)
    delivered: list[tuple[int, Any]] = []
    api.start_thread(
        manager, lambda outputs: delivered.extend((len(steps), one) for one in outputs)
    )
    manager.add_request([5, 6, 7], "0", max_new_tokens=8, streaming=True)
    wait_until(lambda: delivered and delivered[-1][1].is_finished())
    manager.stop(block=True, timeout=30, hard_stop=True)
    assert [len(one.generated_tokens) for _, one in delivered] == list(range(1, 9))
    # The first step gave the first token; the second was launched before that was known.
    assert [at for at, _ in delivered[:6]] == list(range(launched, launched + 6))


def test_few_outputs_are_delivered_before_the_sleep(
    played_gpu: pytest.MonkeyPatch,
) -> None:
    played_gpu.setattr(torch, "Event", Past)
    manager = create_manager(gpu_model(played_gpu))
    manager.warmup()
    manager.add_request([5, 6, 7], "0", max_new_tokens=8)
    manager.start()
    results(manager, {"0"})
    processor = manager.batch_processor
    manager.stop(block=True, timeout=30)
    delivered: list[int] = []
    played_gpu.setattr(
        processor.router,
        "deliver_batch",
        lambda outputs: delivered.append(len(outputs)),
    )
    ios = processor.inputs_and_outputs
    running = ios.io_pairs[1 - ios.current_pair].device_io
    running.shape = api.StepShape(1, False, 7)  # no step had it
    processor.idle_times[running.shape] = 0.02  # so it would sleep for 10 ms
    processor.held.extend(range(100))
    processor.update_batch()
    assert delivered == [100] and processor.waited == pytest.approx(0.01)
    processor.idle_times[running.shape] = 0.02
    processor.held.extend(range(300))
    processor.update_batch()
    assert delivered == [100] and processor.waited == 0
    processor.deliver()
    processor.deliver()  # there is nothing left
    assert delivered == [100, 300] and not processor.held
