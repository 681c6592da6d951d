# SPDX-License-Identifier: MIT
"""The GPU's kernel: what it computes, in Triton's interpreter, and that it compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from played_gpu import attend_by_row
from torch import Tensor

import api

pytest.importorskip("triton")
SCALE = 0.3
# (new tokens, cached tokens) of rows. Pages have 16 tokens; the sizes below are small.
DECODING = [(1, 0), (1, 14), (1, 15), (1, 16), (1, 31), (1, 32), (1, 33), (1, 200)]
MIXED = [(1, 30), (40, 0), (1, 100), (16, 16), (33, 95), (2, 7), (5, 130), (17, 15)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNK", "QUERY_BLOCK"):
        monkeypatch.setattr(api, name, 32)
    monkeypatch.setattr(api, "DECODE_PROGRAMS", 12)


def step_of(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, padding: int = 0
) -> tuple[Tensor, list[Tensor], api.ForwardContext]:
    """Random queries, keys and values whose pages belong to the rows in no order, and the
    step. `padding` rows and tokens come behind."""
    generator = torch.Generator().manual_seed(len(rows) + heads)
    new = torch.tensor([new for new, _ in rows] + [0] * padding)
    used = torch.tensor([sum(row) for row in rows] + [0] * padding)
    pages = -(-used // 16)
    order = torch.randperm(int(pages.sum()), generator=generator) + 1
    table = torch.full((len(used), int(pages.max()) + 1), -1, dtype=torch.int32)
    for row, mine in enumerate(order.split(pages.tolist())):
        table[row, : len(mine)] = mine
    shape = (len(order) + 1) * 16, kv_heads, 32
    cache = [torch.randn(shape, generator=generator) for _ in range(2)]
    tokens = int(new.sum()) + padding
    q = torch.randn(tokens, heads, 32, generator=generator)
    ends = [torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in (new, used)]
    shape = api.StepShape(tokens, bool((new <= 1).all()), 0)
    parts = api.cut_into_parts(shape, ends, heads, kv_heads)
    nowhere = torch.zeros(2 * tokens)
    return q, cache, api.ForwardContext(shape, 16, nowhere, table, *ends, *parts)


@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (2, 2)])
@pytest.mark.parametrize("rows", [DECODING, MIXED, [(1, 300)], [(70, 0)]])
def test_each_token_attends_to_what_is_before_it(
    rows: list[tuple[int, int]], heads: tuple[int, int]
) -> None:
    q, cache, step = step_of(rows, *heads, padding=3)
    pages = [x.unflatten(0, (-1, 16)) for x in cache]
    used = step.cu_seqlens_k.diff()
    expected = attend_by_row(q, pages, step.block_table, step.cu_seqlens_q, used, SCALE)
    found = api.paged_attention(q, *cache, SCALE, step)[: len(q) - 3]
    assert torch.allclose(found, expected[: len(q) - 3], atol=2e-6)


def test_pages_of_others_have_no_influence() -> None:
    """Nor has what a page holds behind the end of its row, were it not a number."""
    q, cache, step = step_of(MIXED, 4, 2)
    before = api.paged_attention(q, *cache, SCALE, step)
    used = torch.zeros(len(cache[0]), dtype=torch.bool)
    for row, length in enumerate(step.cu_seqlens_k.diff().tolist()):
        for at in range(length):
            slot = int(step.block_table[row, at // 16]) * 16 + at % 16
            used[slot] = True
    for each in cache:
        each[~used] = torch.nan
    assert torch.equal(api.paged_attention(q, *cache, SCALE, step), before)


@pytest.mark.parametrize("programs", [1, 12, 4096])
def test_all_keys_of_decoding_rows_are_in_parts(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And there is room for the parts, however long the rows are."""
    monkeypatch.setattr(api, "DECODE_PROGRAMS", programs)
    for length in (1, 31, 32, 33, 5000):
        rows = [(1, length - 1)] * 7 + [(3, 5)]
        *_, step = step_of(rows, 2, 2)
        size, (row, ends), blocks = step.chunk_size, step.chunks, step.query_blocks
        assert size % 32 == 0
        assert ends.tolist() == [
            -(-length // int(size)) * min(n + 1, 7) for n in range(8)
        ]
        assert int(ends[-1]) <= len(row)
        numbers = torch.arange(len(row))
        counted = torch.searchsorted(ends, numbers, right=True)
        assert torch.equal(row, counted.where(counted < 8, -1).int())
        assert blocks[1].tolist() == [0] * 7 + [1]


COMPILE = """
import sys
import api
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

floats = dict.fromkeys(("query", "keys", "values"), "*bf16")
floats |= dict.fromkeys(("logsumexp", "parts"), "*fp32")
numbers = {"scale": "fp32", "table_width": "i32"}


def shared(capability, kernel, out, warps, stages, **sizes):
    types = floats | numbers | {"out": out} | dict.fromkeys(sizes, "constexpr")
    types = {name: types.get(name, "*i32") for name in kernel.arg_names}
    options = {"num_warps": warps, "num_stages": stages}
    found = compile(
        ASTSource(kernel, types, {(kernel.arg_names.index(k),): v for k, v in sizes.items()}),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    return found.metadata.shared


phi4 = {"KV_HEADS": 10, "HEADS_PER_KV": 4, "DIM": 128}
phi4 |= {"PAGE": api.PAGE_SIZE, "BLOCK_N": api.KEY_BLOCK}
kernel = api.attend_to_parts
for card in map(int, sys.argv[1:]):
    print(
        shared(card, kernel, "*fp32", 4, 2, BLOCK_M=16, DECODING=True, **phi4),
        shared(card, kernel, "*bf16", 4, 3, BLOCK_M=api.QUERY_BLOCK, DECODING=False, **phi4),
        shared(card, api.merge_chunks, "*bf16", 1, 1, HEADS=40, DIM=128),
    )
"""
KIB = {80: 163, 86: 99, 90: 227}  # shared memory that a block of threads can have


def test_it_compiles_for_cards_of_phi4() -> None:
    """In a process of its own, where Triton does not interpret; one for all cards."""
    environment = {**os.environ, "PYTHONPATH": str(Path(api.__file__).parent)}
    del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-c", COMPILE, *map(str, KIB)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for kib, line in zip(KIB.values(), done.stdout.splitlines(), strict=True):
        assert max(map(int, line.split())) <= kib * 1024
