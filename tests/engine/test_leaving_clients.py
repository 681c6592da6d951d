# SPDX-License-Identifier: MIT
"""Clients that leave, at whatever moment, free their places and disturb nobody."""

import threading
from concurrent.futures import ThreadPoolExecutor

import clients
import net
import pytest
import scripted
from server import LONG_PROMPT, narrow, running, wait_until


@pytest.fixture(scope="module")
def shared(tiny_folder):
    with narrow(tiny_folder) as served:
        yield served


def passes_after_leaving(served) -> int:
    """Forward passes that an answer of 490 tokens took although its client left."""
    with served.gate as gate:
        before = len(gate.tokens)
        gate.allow(3)
        body = {"prompt": "go", "max_new_tokens": 490}
        with net.connect(served.url, net.packet(body=body)):
            wait_until(lambda: gate.held)
        served.wait_pending(0)
    wait_until(served.idle)
    return len(gate.tokens) - before


def test_an_answer_is_not_computed_to_its_end(shared):
    assert passes_after_leaving(shared) < 50
    assert shared.works()


def test_a_lost_cancel_is_sent_again(shared, monkeypatch):
    """One that overtakes its own request is lost inside the library."""
    lost = []

    def lossy(name):
        if name in lost:
            cancel(name)
        lost.append(name)

    with monkeypatch.context() as patch:
        cancel = shared.replace(patch, "cancel_request", lossy)
        assert passes_after_leaving(shared) < 50
    assert len(lost) > 1
    assert shared.works()


def test_slots_are_freed_and_other_answers_stay_the_same(tiny_folder):
    with running(model=tiny_folder, max_in_flight=8, max_waiting=100) as served:
        before = clients.answers(served)
        assert len({*before}) == len(before) == 12
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(clients.answers, served)
            freed = clients.leave(served, 12)
        assert len(freed) > 8  # on a busy machine one may reach its end first
        assert beside.result() == before == clients.answers(served)
        wait_until(served.idle)


def test_a_client_that_leaves_while_waiting_gives_up_its_place(
    counting_folder, monkeypatch
):
    one = {"max_in_flight": 1, "max_waiting": 1}
    with narrow(counting_folder, **one) as served:
        scripted.teach(monkeypatch, served, [b"a"])
        served.gate.close()
        first = served.submit()
        wait_until(lambda: served.active)
        with net.connect(served.url, net.packet(body={"prompt": "hello"})):
            served.wait_pending(2)
        served.wait_pending(1)
        second = served.submit()
        served.wait_pending(2)
        served.gate.allow()
        assert first.result().json()["response"] == "a"
        assert second.result().json()["response"] == "a"
        wait_until(served.idle)


def test_who_was_preempted_comes_again_when_the_only_other_one_leaves(
    tiny_folder, monkeypatch
):
    with narrow(tiny_folder, cache_tokens=128) as served:

        def offload_and_stop():
            done = offload()
            if served.preempted:
                served.gate.close()
            return done

        offload = served.replace(monkeypatch, "offload_requests", offload_and_stop)
        served.gate.close()
        asked = []
        for prompt in "xy":  # either alone would fill most of the cache
            asked.append(
                served.clients.submit(served.stream, prompt, max_new_tokens=110)
            )
            served.wait_pending(len(asked))
        names = served.pending
        served.gate.allow()
        streams = [future.result() for future in asked]
        wait_until(lambda: served.preempted)
        (left,) = served.active
        streams.pop(names.index(left)).close()
        wait_until(lambda: left not in served.pending)
        served.gate.allow()
        (stream,) = streams
        assert '"status":200' in stream.text
        wait_until(served.idle)


def test_nothing_is_templated_for_clients_who_have_left(shared, monkeypatch):
    held = threading.Event()
    with monkeypatch.context() as patch:
        templated = shared.spy(patch, "apply_template")
        shared.in_tokenizer_thread(held.wait)
        try:
            with net.connect(shared.url, net.packet(body={"prompt": LONG_PROMPT})):
                shared.wait_pending(1)
            shared.wait_pending(0)
        finally:
            held.set()
        shared.in_tokenizer_thread(int).result()  # it has nothing else to do
        assert shared.works()
    seen = [len(turns[0].content) for (_, turns), _ in templated]
    assert seen and len(LONG_PROMPT) not in seen


def test_a_prompt_whose_client_left_meanwhile_is_not_computed(shared, monkeypatch):
    begun, left = threading.Event(), threading.Event()

    def slow(tokenizer, turns):
        if turns[0].content == LONG_PROMPT:
            begun.set()
            left.wait()
        return template(tokenizer, turns)

    with monkeypatch.context() as patch:
        template = shared.replace(patch, "apply_template", slow)
        added = shared.spy(patch, "add_request")
        try:
            with net.connect(shared.url, net.packet(body={"prompt": LONG_PROMPT})):
                assert begun.wait(net.DEADLINE)
            shared.wait_pending(0)
        finally:
            left.set()
        shared.in_tokenizer_thread(int).result()  # it has nothing else to do
        assert shared.works()
    assert added and max(len(args[0]) for args, _ in added) < 240
