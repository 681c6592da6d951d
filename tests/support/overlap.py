# SPDX-License-Identifier: MIT
"""A GPU's order of things, played on a CPU: the engine prepares a step while the one
before it runs, and looks at that one's tokens only afterwards.

    TEST_OVERLAPPED=1 python -m pytest      has every server in this process do it
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import (
    initialization,
    input_outputs,
)

WANTED = bool(os.environ.get("TEST_OVERLAPPED"))


class Past:
    """A stream or an event of a CPU, where everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def nothing(self, *_: Any) -> None:
        pass

    record_event = wait_event = synchronize = nothing

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def overlapped(wanted: bool = True) -> Iterator[None]:
    """Engines that are loaded inside have two sets of buffers, which take turns."""
    if not wanted:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Event", Past)
        patch.setattr(input_outputs, "create_device_stream", Past)
        async_ios = input_outputs.ContinuousBatchingAsyncIOs
        patch.setattr(async_ios, "_supported_device_types", ("cpu",))

        def decide(cb_config: Any, **_: Any) -> None:
            cb_config.use_async_batching = True

        patch.setattr(initialization, "decide_use_async_batching", decide)
        yield
