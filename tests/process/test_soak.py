# SPDX-License-Identifier: MIT
"""A short soak in every run of the tests; `python tests/measure/soak.py` is the long one."""

from soak import run


def test_hundreds_of_mixed_requests():
    figures = run(["--requests", "600"])
    assert figures["wrong"] == 0, figures["first wrong"]
    assert figures["requests"] == 600 and figures["kinds"]["bursts"]
    assert figures["prompts with such an answer"] == 200


def test_the_engine_and_its_cache_are_empty_afterwards():
    figures = run(["--requests", "200", "--inside", "--seed", "1"])
    assert figures["wrong"] == 0, figures["first wrong"]
    assert figures["cache lost, bytes"] == 0


def test_a_request_may_leave_while_a_step_with_it_runs():
    """On a GPU the next step is prepared meanwhile; a CPU only plays it."""
    figures = run(["--requests", "300", "--overlapped", "--seed", "2"])
    assert figures["wrong"] == 0, figures["first wrong"]
    assert figures["cache lost, bytes"] == 0
