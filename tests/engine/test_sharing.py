# SPDX-License-Identifier: MIT
"""Requests that begin alike compute that once, also those that arrive together."""

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import overlap
import played_gpu as played
import pytest
import torch
from played_gpu import create_manager, generated, plain_model, results
from server import wait_until
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import (
    compute_block_hash,
)

import api
import model_download

PAGE = 16
Make = Callable[..., Any]


@pytest.fixture(params=["cpu", "gpu"])
def make(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """Makes managers, whose threads end with the test. A CPU's knows the tokens of a step
    before it prepares the next one."""
    if request.param == "gpu":
        model = played.gpu_model(request.getfixturevalue("played_gpu"))
    else:
        threads = torch.get_num_threads()
        monkeypatch.setattr(model_download, "cpus", lambda most: threads)
        model = plain_model()
        model.set_attn_implementation(played.INSTALL(torch.device("cpu")))
    managers = []

    def make_one(**options: Any) -> Any:
        manager = create_manager(model, **options)
        manager.warmup()
        managers.append(manager)
        watch(manager)
        return manager

    yield make_one
    for manager in managers:
        manager.stop(block=True, timeout=30)


def page_hash(request: list[int], index: int) -> int:
    """The library's name for this page of a request, and for all pages that hold the same
    tokens behind the same beginning."""
    found = None
    for start in range(0, (index + 1) * PAGE, PAGE):
        found = compute_block_hash(found, request[start : start + PAGE])
    return found


def watch(manager: Any) -> None:
    """Fail a step in which two requests write to one page, or one writes other tokens to a
    page that was shared before. (It may write the same again: a request that began without
    that page, and had to wait while another computed it.) Fail a step, too, after which a
    page is shared whose tokens are not computed."""
    processor = manager.batch_processor
    (allocator,) = processor.cache.cache_allocators.values()
    schedule, update = processor.scheduler.schedule_batch, processor.update_batch

    def scheduled(*budgets: int) -> tuple:
        now = allocator.ledger.block_to_hash
        before = dict(now)
        found = schedule(*budgets)
        writers = Counter()
        for each in found[0] or ():
            state, pages = each.state, allocator.block_table[each.state.request_id]
            start = state.position_offset
            end = start + each.query_length
            for index in range(start // PAGE, -(-end // PAGE)):
                page = pages[index]
                writers[page] += 1
                known = before.get(page)
                if known is not None and known == now.get(page):  # it is shared
                    same = page_hash(state.initial_tokens, index)
                    assert known == same, "others' keys are overwritten"
                else:
                    assert writers[page] == 1, "two write to one page"
        return found

    def updated() -> None:
        update()
        for state in processor.scheduler.active_requests.values():
            pages = allocator.block_table[state.request_id]
            hashed = [page for page in pages if page in allocator.ledger.block_to_hash]
            assert len(hashed) * PAGE <= state.position_offset, "not computed"

    processor.scheduler.schedule_batch, processor.update_batch = scheduled, updated


def ask(
    manager: Any, prompts: list[list[int]], name: str = ""
) -> Callable[[], list[int]]:
    """Add them. Returns what tells the tokens of each that came from the cache."""
    samplings = []
    for i, prompt in enumerate(prompts):
        sampling = api.Sampling(api.ChatRequest(prompt="x"), None)
        samplings.append(sampling)
        options = {"max_new_tokens": 24, "sampling": sampling}
        manager.add_request(prompt, f"{name}{i}", **options)
    return lambda: [sampling.cached_tokens for sampling in samplings]


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 200) for _ in range(count)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49])
def test_the_same_prompt_at_the_same_time(make: Make, length: int) -> None:
    """All but its last token and what shares a page with that."""
    manager, prompt = make(), tokens(length, 1)
    cached = ask(manager, [prompt] * 5)
    manager.start()
    found = results(manager, set("01234"))
    (expected,) = generated(plain_model(), [prompt])
    assert all(answer == expected for answer in found.values())
    assert cached() == [0] + [(length - 1) // PAGE * PAGE] * 4


@pytest.mark.parametrize("begun", [40, 190])
def test_people_with_one_system_prompt(make: Make, begun: int) -> None:
    """Who arrive together: also where it takes several steps, of 128 tokens."""
    system = tokens(begun, 2)
    prompts = [system + tokens(n, 3 + n) for n in (1, 5, 30, 77, 8, 9, 10)]
    manager = make()
    schedule, computed = manager.batch_processor.scheduler.schedule_batch, []

    def counting(*budgets: int) -> tuple:
        found = schedule(*budgets)
        computed.append(found[2])
        return found

    manager.batch_processor.scheduler.schedule_batch = counting
    cached = ask(manager, prompts)
    manager.start()
    found = results(manager, set("0123456"))
    expected = generated(plain_model(), prompts)
    assert [found[str(i)] for i in range(7)] == expected
    assert cached() == [0] + [begun // PAGE * PAGE] * 6
    decoded = sum(map(len, expected)) - len(prompts)
    spare = len(prompts)  # a step that a request's end overtakes
    prefilled = sum(map(len, prompts)) - sum(cached())
    assert decoded <= sum(computed) - prefilled <= decoded + spare
    # A conversation goes on: only the last page of what was said is computed again.
    again = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
    cached = ask(manager, [[*turn, 7] for turn in again], "again")
    found = results(manager, {f"again{i}" for i in range(7)})
    assert list(map(found.get, (f"again{i}" for i in range(7)))) == generated(
        plain_model(), [[*turn, 7] for turn in again]
    )
    # The last token was never put in, and the library does not keep what the last step
    # has filled.
    assert cached() == [(len(turn) - 2) // PAGE * PAGE for turn in again]


def test_whoever_shares_goes_on_when_the_first_leaves(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled at once, while its prompt is computed, or in the step after."""
    system = tokens(90, 4)
    for late in range(4):
        manager = make()
        prompts = [system + tokens(n + late, n) for n in (70, 3, 20, 50)]
        step, steps = manager._generation_step, []

        def leave(
            step: Callable = step,
            steps: list = steps,
            manager: Any = manager,
            late: int = late,
        ) -> None:
            if len(steps) == late:
                manager.cancel_request("0")
            steps.append(1)
            step()

        manager._generation_step = leave
        ask(manager, prompts)
        manager.start()
        found = results(manager, set("123"))
        expected = generated(plain_model(), prompts)
        assert [found[str(i)] for i in (1, 2, 3)] == expected[1:]


def test_a_small_cache_and_beginnings_in_common(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted, cancelled, evicted, begun again: the answers are right."""
    rng = random.Random(5)
    systems = [tokens(n, n) for n in (0, 33, 64, 100)]
    prompts = [
        rng.choice(systems) + tokens(rng.randint(1, 60), 100 + i) for i in range(40)
    ]
    monkeypatch.setattr(api, "EVICTED_PAGES", 2)
    manager, preempted = make(blocks=24), []
    begin_again = api.batching.RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        api.batching.RequestState,
        "create_equivalent_initial_request",
        lambda state: preempted.append(state.request_id) or begin_again(state),
    )
    cached = ask(manager, prompts)
    manager.start()
    gone = {str(i) for i in range(0, 40, 9)}
    for name in gone:
        manager.cancel_request(name)
    found = results(manager, {str(i) for i in range(40)} - gone)
    expected = generated(plain_model(), prompts)
    assert all(found[name] == expected[int(name)] for name in found)
    assert preempted and any(cached())


def test_switched_off_nothing_is_shared(make: Make) -> None:
    manager, prompt = make(prefix_sharing=False), tokens(50, 6)
    cached = ask(manager, [prompt] * 4)
    manager.start()
    found = results(manager, set("0123"))
    assert list(found.values()) == generated(plain_model(), [prompt]) * 4
    assert cached() == [0] * 4


def test_pages_of_a_step_that_failed_are_not_shared(make: Make) -> None:
    """They were never computed: after the restart nobody finds them."""
    manager, prompt = make(), tokens(60, 7)
    compute = manager.batch_processor.model_runner.compute_batch

    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access")

    manager.batch_processor.model_runner.compute_batch = fail
    ask(manager, [prompt], "lost")
    api.start_thread(manager, lambda outputs: None)
    manager.join(time.perf_counter(), timeout=30)
    assert "illegal" in api.why_down(manager)
    manager.batch_processor.model_runner.compute_batch = compute
    done: dict[str, list[int]] = {}
    api.start_thread(
        manager,
        lambda outputs: done.update(
            {each.request_id: each.generated_tokens for each in outputs}
        ),
    )
    cached = ask(manager, [prompt])
    wait_until(lambda: len(done.get("0", ())) == 24)
    assert done["0"] == generated(plain_model(), [prompt])[0]
    assert cached() == [0]


def test_many_who_share_run_at_once(make: Make) -> None:
    """Of 8 places, with pages for all of them as long as they share. (A CPU reads the
    keys of each row into one buffer, which has room for less.)"""
    manager = make(blocks=34)
    if not manager.batch_processor.cache.max_blocks_per_request:
        pytest.skip("a CPU")
    system, most = tokens(192, 8), 0
    schedule = manager.batch_processor.scheduler.schedule_batch

    def counting(*budgets: int) -> tuple:
        nonlocal most
        found = schedule(*budgets)
        most = max(most, len(found[0] or ()))
        return found

    manager.batch_processor.scheduler.schedule_batch = counting
    cached = ask(manager, [system + tokens(3, n) for n in range(8)])
    manager.start()
    results(manager, set("01234567"))
    assert most == 8
    assert cached() == [0] + [192] * 7


def test_the_end_of_a_conversation_is_evicted_before_its_beginning(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "EVICTED_PAGES", 4)
    manager, prompt = make(), tokens(200, 9)
    manager.start()
    ask(manager, [prompt], "first")
    results(manager, {"first0"})
    cache = manager.batch_processor.cache
    (allocator,) = cache.cache_allocators.values()
    kept = len(allocator.ledger.cached_blocks)
    assert kept == 13 and cache.evict_cached_blocks()  # 6 of them, the half
    cached = ask(manager, [prompt], "again")
    results(manager, {"again0"})
    assert cached() == [(kept - 6) * PAGE]


def test_the_oldest_pages_are_evicted_first(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "EVICTED_PAGES", 4)
    manager = make(blocks=64)
    manager.start()
    kept = []
    for i in range(20):  # each leaves 4 pages or 5
        cached = ask(manager, [tokens(60, 1000 + i)], f"{i}-")
        results(manager, {f"{i}-0"})
        kept += cached()
    assert kept == [0] * 20
    for i, again in ((19, 48), (18, 48), (0, 0)):
        cached = ask(manager, [tokens(60, 1000 + i)], f"again{i}-")
        results(manager, {f"again{i}-0"})
        assert cached() == [again]


@pytest.mark.parametrize(
    ("first", "later", "most"),
    [
        ([100], 0, 100),  # alone: as many as --batch-tokens allow
        ([70, 70], 0, 48),  # SHARED_TOKENS
        ([3], 30, 31),  # too few for small steps
        ([3, 4], 30, 12),  # SMALL_STEP
        ([3, 4], 60, 48),  # MUCH_PREFILL or more are left
        ([3, 4, 5], 19, 12),  # many requests
        ([3, 4, 5], 30, 33),  # and LITTLE_PREFILL or more are left
        ([2] * 7, 19, 24),  # the multiple of SMALL_STEP that leaves room for prompts
    ],
)
def test_steps_of_several_requests_are_small(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    first: list[int],
    later: int,
    most: int,
) -> None:
    """No request then waits long for another. `later` is the length of a prompt that comes
    when all of the first ones decode."""
    values = {"SHARED_TOKENS": 48, "SMALL_STEP": 12, "SOME_REQUESTS": 3}
    values |= {"MANY_REQUESTS": 3, "MUCH_PREFILL": 40, "LITTLE_PREFILL": 20}
    for constant, value in values.items():
        monkeypatch.setattr(api, constant, value)
    manager, sizes, late = make(), [], []
    prompts = [tokens(length, 40 + i) for i, length in enumerate(first)]
    expected = generated(plain_model(), prompts)
    names = [str(i) for i in range(len(first))]
    if later:
        late = [tokens(later, 50)]
        expected += generated(plain_model(), late)
        names.append("late0")
    scheduler = manager.batch_processor.scheduler
    schedule = scheduler.schedule_batch

    def counting(*budgets: int) -> tuple:
        found = schedule(*budgets)
        if late and found[2] == len(first) and len(sizes) > 3:  # all decode
            ask(manager, [late.pop()], "late")
        sizes.append(found[2])
        return found

    scheduler.schedule_batch = counting
    ask(manager, prompts)
    manager.start()
    found = results(manager, {*names})
    assert max(sizes) == most
    assert [found[name] for name in names] == expected


def test_a_prompt_that_has_begun_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the cache has less left than the library keeps free for answers (15%): it
    does not wait until another answer ends. A new prompt does."""
    monkeypatch.setattr(api, "SHARED_TOKENS", 12)
    manager, ended = make(blocks=24), []
    scheduler = manager.batch_processor.scheduler
    meet, margins = scheduler._try_to_meet_safety_margin, []
    base = super(api.Scheduler, scheduler)._try_to_meet_safety_margin

    def watched() -> bool:
        margins.append(base())
        return meet()

    scheduler._try_to_meet_safety_margin = watched
    manager.add_request(tokens(30, 60), "first", max_new_tokens=40)
    manager.add_request(tokens(300, 61), "begun", max_new_tokens=4)
    manager.add_request(tokens(3, 62), "new", max_new_tokens=1)
    manager.start()
    while len(ended) < 3:
        output = manager.get_result(timeout=60)
        assert output and not output.error, output
        if output.is_finished():
            ended.append(output.request_id)
    assert not all(margins), "the cache was never that full"
    assert ended[0] == "begun" and {*ended} == {"begun", "first", "new"}


STEP_SECONDS = 0.2


class SlowStream:
    """Of a GPU, whose steps take STEP_SECONDS; an event that it records comes after one."""

    def __init__(self, *_: Any) -> None:
        self.busy_until = 0.0

    def record_event(self, event: Any) -> None:
        start = max(self.busy_until, time.monotonic())
        event.comes_at = self.busy_until = start + STEP_SECONDS

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class SlowEvent:
    comes_at = 0.0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def query(self) -> bool:
        return time.monotonic() >= self.comes_at

    def synchronize(self) -> None:
        time.sleep(max(0, self.comes_at - time.monotonic()))


def test_a_request_gets_into_the_next_step(played_gpu: pytest.MonkeyPatch) -> None:
    """If it arrives before the running one is half done."""
    played_gpu.setattr(torch, "Event", SlowEvent)
    played_gpu.setattr(played.input_outputs, "create_device_stream", SlowStream)
    manager = create_manager(played.gpu_model(played_gpu))
    manager.warmup()
    steps: list[set[str]] = []  # whose tokens came with each
    waits: list[float] = []

    def deliver(outputs: list[Any]) -> None:
        waits.append(manager.batch_processor.waited / STEP_SECONDS)
        steps.append({each.request_id for each in outputs})

    api.start_thread(manager, deliver)
    manager.add_request(tokens(20, 1), "long", max_new_tokens=200, streaming=True)

    def steps_until_answered(name: str) -> int:
        before = len(steps)
        wait_until(lambda: len(steps) > before)  # one has ended, the next begun
        time.sleep(STEP_SECONDS / 10)
        before = len(steps)
        manager.add_request(tokens(3, 2), name, max_new_tokens=1)
        wait_until(lambda: any(name in names for names in steps))
        return next(i for i, names in enumerate(steps[before:], 1) if name in names)

    found = [steps_until_answered(str(i)) for i in range(8)]
    manager.stop(block=True, timeout=30, hard_stop=True)
    # The running one and its own; more where this machine is slow.
    assert min(found) == 2 and found.count(2) > 3, found
    # At first it does not know how long the host is idle.
    assert 0.36 < statistics.median(waits[-10:]) < 0.5, waits


class LockedEvent(overlap.Past):
    """Of a GPU that is done, on a host where other threads hold Python's lock."""

    def synchronize(self) -> None:
        time.sleep(0.02)


def test_a_busy_host_prepares_the_next_step_at_once(
    played_gpu: pytest.MonkeyPatch,
) -> None:
    """Where the GPU waits for the host, or nearly, the host does not wait for requests."""
    played_gpu.setattr(torch, "Event", LockedEvent)
    manager = create_manager(played.gpu_model(played_gpu))
    manager.warmup()
    processor = manager.batch_processor
    manager.add_request(tokens(20, 1), "0", max_new_tokens=60)
    manager.start()
    results(manager, {"0"})
    manager.stop(block=True, timeout=30)
    assert processor.waited < 0.001
    ios, waits = processor.inputs_and_outputs, []
    running = ios.io_pairs[1 - ios.current_pair].device_io
    running.shape = api.StepShape(1, False, 7)  # no step had it
    for idle in (0.003, 0.007, 0.02, 9):
        processor.idle_times[running.shape] = idle
        processor.update_batch()
        waits.append(processor.waited)
    assert waits == pytest.approx([0, 0.002, 0.01, 0.2])
    # It waits for Python's lock, once, and seems idle for 20 ms in place of 1.
    played_gpu.setattr(LockedEvent, "query", lambda _: False)
    ended = ios.io_pairs[ios.current_pair].device_io
    ended.shape = api.StepShape(2, False, 7)
    processor.waited, processor.idle_times[ended.shape] = 0.0, 0.001
    processor.update_batch()
    assert processor.idle_times[ended.shape] < 0.01
