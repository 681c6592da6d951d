# SPDX-License-Identifier: MIT
"""How many processes run tests, and fixtures: tiny models, and servers of them that
tests share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of torch, and of the servers that tests start: two processes run tests at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The GPU's kernel runs on a CPU, for tests of its own. Triton reads this at import.
os.environ.setdefault("TRITON_INTERPRET", "1")

import played_gpu as played
import scripted
import tiny
from server import ROOT, Running, running, wait_until

import model_download


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes share the files of tests; a single file stays in this one."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else 2


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level vocabulary of 290 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.tiny_model(folder, context=512, eos="never")
    return folder


@pytest.fixture(scope="session")
def phi4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with phi-4's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "phi-4"
    tiny.tiny_model(folder, "phi4", hidden=32, context=2048, eos="never")
    return folder


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model, converted at most once per checkout."""
    return model_download.demo_model(ROOT / "models")


@pytest.fixture(scope="session")
def counting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that a test can let say what it wants: see scripted.py."""
    folder = tmp_path_factory.mktemp("models") / "counting"
    scripted.counting_model(folder)
    return folder


@pytest.fixture(scope="session")
def server(tiny_folder: Path) -> Iterator[Running]:
    """A server of the tiny model that tests share and leave as they found it."""
    with running(model=tiny_folder) as served:
        yield served


@pytest.fixture(scope="session")
def phi4_server(phi4_folder: Path) -> Iterator[Running]:
    with running(model=phi4_folder) as served:
        yield served


@pytest.fixture(scope="session")
def counting(counting_folder: Path) -> Iterator[Running]:
    """A server of that model, for `say`."""
    with running(model=counting_folder, served_model_name="phi-4") as served:
        yield served


@pytest.fixture
def say(
    counting: Running, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """A function that sets what `counting` answers, one piece of text per token."""
    yield lambda *pieces: scripted.teach(monkeypatch, counting, pieces)
    counting.gate.allow()
    wait_until(counting.idle)  # before the pieces are taken away


@pytest.fixture
def write(
    counting: Running, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """A function that sets what the model of `counting` wants to write."""
    yield lambda text: scripted.prefer(monkeypatch, counting, text.encode())
    counting.gate.allow()
    wait_until(counting.idle)


@pytest.fixture
def played_gpu() -> Iterator[pytest.MonkeyPatch]:
    """A machine whose CPU passes for a GPU, as far as the attention can tell."""
    with played.playing() as patch:
        yield patch
