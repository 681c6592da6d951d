# SPDX-License-Identifier: MIT
"""How a step is prepared on a GPU's host, and when its outputs are delivered."""

import copy
from typing import Any

import pytest
from overlap import Past
from played_gpu import create_manager, generated, gpu_model, plain_model, results
from server import wait_until

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
LONG = [*range(190, 3, -1), *range(3, 66)]


def warm_manager(played_gpu: pytest.MonkeyPatch) -> Any:
    manager = create_manager(gpu_model(played_gpu))
    manager.warmup()
    return manager


class BufferComparison:
    """Has the library fill the buffers first, and compares what both fill them with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: set[tuple[bool, bool, bool]] = set()  # of steps
        self.new_prompts: list[int] = []
        ours = api.FlashIOs.prepare_batch_tensors
        theirs = api.FlashIOs.__base__.prepare_batch_tensors
        assert theirs is not ours

        def prepare(
            host: Any, requests: list[Any], processors: Any, *more: Any
        ) -> None:
            states = [each.state for each in requests]
            before = [
                (s.position_offset, copy.copy(s.tokens_to_process)) for s in states
            ]
            theirs(host, requests, processors, True, *more[1:])
            expected = self.filled(host), [vars(s).copy() for s in states]
            total, longest = sum(host.total_seqlen_k.values()), host.max_length_q
            # Blocks as the library would lay out the cache.
            (allocator,) = host.cache.cache_allocators.values()
            stride = allocator.block_physical_stride // allocator.tokens_per_page
            pages = [[n // stride for n in row] for row in expected[0]["pages"]]
            expected[0]["pages"] = pages
            for state, (offset, tokens) in zip(states, before, strict=True):
                state.position_offset, state.tokens_to_process = offset, tokens
            host._bulk_input_tensor.fill_(-7)
            host.block_table.fill_(-7)
            host.num_q_tokens = host.num_request_in_batch = -7
            host.requests_in_batch = host.req_id_to_new_token_position = None
            host.use_block_table = None
            ours(host, requests, processors, *more)
            found = self.filled(host), [vars(s).copy() for s in states]
            assert found == expected
            lengths = [each.query_length for each in requests]
            is_new = total == sum(lengths)
            self.kinds.add((longest == 1, len(lengths) > 1, is_new))
            new_prompts = len(lengths) * (is_new and more[1] > api.MAX_GRAPH_TOKENS)
            self.new_prompts.append(new_prompts)
            assert host.shape == api.StepShape(more[1], longest == 1, new_prompts)

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
        fields = ("num_q_tokens", "num_request_in_batch", "max_kv_read")
        fields += ("use_block_table", "req_id_to_new_token_position")
        return {
            **{name: tensor.tolist() for name, tensor in tensors.items()},
            **{name: copy.copy(getattr(host, name)) for name in fields},
            "requests": list(map(id, host.requests_in_batch)),
            "pages": pages,
        }


def test_the_buffers_are_filled_as_by_the_library(
    played_gpu: pytest.MonkeyPatch,
) -> None:
    manager = create_manager(gpu_model(played_gpu))
    compared = BufferComparison(played_gpu)
    manager.warmup()
    assert compared.kinds  # its steps are compared, too, and do not count below
    compared.kinds.clear()
    compared.new_prompts.clear()
    for i, prompt in enumerate(PROMPTS):
        manager.add_request(prompt, str(i), max_new_tokens=20 + i)
    manager.start()
    found = results(manager, set(map(str, range(len(PROMPTS)))))
    # Alone: in two steps, both too large for a graph. The second has a cache.
    manager.add_request(LONG, "long", max_new_tokens=20)
    found |= results(manager, {"long"})
    manager.stop(block=True, timeout=30)
    expected = generated(plain_model(), [*PROMPTS, LONG], 20)
    assert [tokens[:20] for _, tokens in sorted(found.items())] == expected
    # Steps that decode, of one row and of several; with prompts, some of them begun.
    kinds = {(True, True, False), (True, False, False), (False, True, False)}
    assert kinds | {(False, True, True)} <= compared.kinds
    assert 1 in compared.new_prompts


@pytest.mark.parametrize(("seconds", "launched"), [(0, 2), (10, 3)])
def test_outputs_come_when_the_next_step_is_launched(
    played_gpu: pytest.MonkeyPatch, seconds: float, launched: int
) -> None:
    """They are held if the event loop needs longer for them than the thread sleeps. Those
    of the last step are delivered, though no step follows."""
    played_gpu.setattr(api, "OUTPUT_SECONDS", seconds)
    manager = warm_manager(played_gpu)
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
    played_gpu.setattr(api, "HOST_SECONDS", 0.005)
    played_gpu.setattr(api, "OUTPUT_SECONDS", 60e-6)
    processor = a_processor(played_gpu)
    done: list[Any] = []
    router = processor.real_router
    played_gpu.setattr(router, "deliver_batch", lambda outs: done.append(len(outs)))
    played_gpu.setattr(api.time, "sleep", lambda seconds: done.append(seconds))
    ios = processor.inputs_and_outputs
    running = ios.io_pairs[1 - ios.current_pair].device_io
    running.shape = api.StepShape(1, False, 7)  # no step had it

    def update(idle: float, held: int) -> list[Any]:
        done.clear()
        processor.waited, processor.idle_times[running.shape] = 0.0, idle
        processor.held.extend(range(held))
        processor.update_batch()
        return [*done, processor.waited]

    assert update(0.02, 100) == pytest.approx([100, 0.01, 0.01])
    assert update(0.02, 0) == pytest.approx([0.01, 0.01])
    assert update(0.0, 0) == [0.0]  # sleeping for no time would give the GIL away
    assert update(0.02, 300) == [0.0]
    processor.deliver()
    processor.deliver()  # there is nothing left
    assert done == [300] and not processor.held


def test_a_complete_answer_is_delivered_though_the_thread_dies(
    played_gpu: pytest.MonkeyPatch,
) -> None:
    """It waits for the launch of the next step, which fails."""
    played_gpu.setattr(api, "OUTPUT_SECONDS", 10)
    manager = warm_manager(played_gpu)
    schedule = api.Scheduler.schedule_batch

    def fail_behind_short(self: Any, *budgets: int) -> Any:
        if "long" in self.active_requests and "short" not in self.active_requests:
            raise RuntimeError("out of order")
        return schedule(self, *budgets)

    played_gpu.setattr(api.Scheduler, "schedule_batch", fail_behind_short)
    delivered: dict[str, Any] = {}
    for name, new_tokens in (("short", 6), ("long", 60)):
        manager.add_request([5, 6, 7], name, max_new_tokens=new_tokens, streaming=True)
    api.start_thread(
        manager, lambda outs: delivered.update((one.request_id, one) for one in outs)
    )
    wait_until(lambda: "long" in delivered and delivered["long"].error)
    assert len(delivered["short"].generated_tokens) == 6
    assert delivered["short"].is_finished() and not delivered["short"].error
    assert not manager.batch_processor or not manager.batch_processor.held


def test_outputs_are_delivered_before_a_row_looks_back(
    played_gpu: pytest.MonkeyPatch,
) -> None:
    """For that, the thread waits for the running step, and theirs is over."""
    played_gpu.setattr(api, "OUTPUT_SECONDS", 10)
    manager = warm_manager(played_gpu)
    held: list[int] = []  # whenever the thread waits
    processor = manager.batch_processor
    played_gpu.setattr(Past, "synchronize", lambda _: held.append(len(processor.held)))
    body = api.ChatRequest(prompt="x", frequency_penalty=1)
    asked = {"sampling": api.Sampling(body, None)}
    manager.add_request([5, 6, 7], "0", max_new_tokens=8, streaming=True, **asked)
    manager.start()
    results(manager, {"0"})
    manager.stop(block=True, timeout=30)
    assert len(held) > 8 and not any(held)


def a_processor(played_gpu: pytest.MonkeyPatch) -> Any:
    """Of a thread that has ended, behind an answer."""
    manager = warm_manager(played_gpu)
    manager.add_request([5, 6, 7], "0", max_new_tokens=8)
    manager.start()
    results(manager, {"0"})
    processor = manager.batch_processor
    manager.stop(block=True, timeout=30)
    return processor
