# SPDX-License-Identifier: MIT
"""The matrices of few rows: what the kernel computes, in Triton's interpreter, that it
compiles, and which matrices are its own."""

import os
import subprocess
import sys
from itertools import product as product_of
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import api
import model_download

try:
    import triton.language as tl
except ImportError:
    tl = None

E4M3 = torch.float8_e4m3fn
PACKED = {torch.int8: "int8", torch.uint8: "int4"}


def matrices(rows: int, kind: torch.dtype, columns: int = 192) -> list[Tensor | None]:
    """x, weight and their scales, with in_features of 512."""
    generator = torch.Generator().manual_seed(rows)
    if kind in PACKED:
        x = torch.randn(rows, 512, generator=generator)
        weight = torch.randn(columns, 512, generator=generator)
        packed, scale = model_download.ROUND[PACKED[kind]](weight)
        assert packed.dtype == kind
        return [x, packed, None, scale.float()]
    x = torch.randn(rows, 512, generator=generator).to(kind)
    weight = torch.randn(columns, 512, generator=generator).to(kind)
    if kind != E4M3:
        return [x, weight, None, None]
    scales = (torch.rand(n, 1, generator=generator) + 0.5 for n in (rows, columns))
    return [x, weight, *scales]


def product(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor | None
) -> Tensor:
    if weight.dtype in PACKED:
        weight, weight_scale = model_download.unpack(weight, weight_scale), None
    exact = x.double() @ weight.double().t()
    return exact if x_scale is None else exact * x_scale * weight_scale.t()


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def unpack_in_float32(half_bytes: Any, scales: Any, BLOCK_K: Any, GROUP: Any) -> Any:
    """As unpack_half_bytes, without the bits of bfloat16 that the interpreter lacks."""
    scale = tl.load(scales[:, None] + tl.arange(0, BLOCK_K // GROUP))[:, :, None]
    scale = tl.broadcast_to(scale, [scale.shape[0], BLOCK_K // GROUP, GROUP])
    return (half_bytes.to(tl.float32) - 8.0) * tl.reshape(scale, half_bytes.shape)


# The interpreter cannot multiply bfloat16.
@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        *product_of([1, 3, 16, 17, 64], [torch.float32, E4M3, *PACKED]),
        *product_of([65, 256], PACKED),
    ],
)
def test_the_kernel_multiplies(
    card: None, rows: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(api, "unpack_half_bytes", triton.jit(unpack_in_float32))
    given = matrices(rows, kind)
    found = api.multiply(*given)
    assert found.shape == (rows, 192) and found.dtype == torch.bfloat16
    assert error(found, product(*given)) < 0.004


@pytest.mark.parametrize("kind", [torch.bfloat16, E4M3, *PACKED])
def test_many_rows_are_the_librarys(kind: torch.dtype) -> None:
    given = matrices(300, kind)
    if kind in PACKED:
        given[0] = given[0].bfloat16()
    found = api.linear(*given)
    assert found.dtype == torch.bfloat16
    assert error(found, product(*given)) < 0.004


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "depth", "compiles", "ours"),
    [
        (torch.bfloat16, 64, 5120, 17920, True, True),
        (torch.bfloat16, 1, 64, 256, True, True),
        (torch.bfloat16, 65, 5120, 17920, True, False),  # many
        (torch.bfloat16, 8, 5152, 5120, True, False),  # no multiple of BLOCK_N
        (torch.bfloat16, 8, 5120, 576, True, False),  # no multiple of BLOCK_K_BYTES
        (torch.bfloat16, 8, 5120, 5120, False, False),  # no Triton
        (torch.int8, 256, 5120, 128, True, True),
        (torch.int8, 257, 5120, 128, True, False),
        (torch.int8, 8, 5120, 64, True, False),
        (torch.uint8, 256, 5120, 128, True, True),  # bytes; numbers are twice as many
        (torch.uint8, 8, 5120, 64, True, False),
    ],
)
def test_which_matrices_are_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
    kind: torch.dtype,
    rows: int,
    columns: int,
    depth: int,
    compiles: bool,
    ours: bool,
) -> None:
    """The kernel reads whole blocks of columns and of depth, and checks nothing."""
    called: list[str] = []
    monkeypatch.setattr(api.FlashRunner, "compiles", compiles)
    monkeypatch.setattr(api, "multiply", lambda *given: called.append("ours"))
    plain = SimpleNamespace(linear=lambda *given: called.append("the library's"))
    monkeypatch.setattr(api.nn, "functional", plain)
    x: Any = SimpleNamespace(is_cuda=True, shape=(rows, depth))
    monkeypatch.setattr(api.FlashRunner, "unpack", lambda weight, scale: weight)
    matrix = type("Matrix", (), {"__len__": lambda self: self.shape[0]})
    x, weight = matrix(), matrix()
    x.is_cuda, x.shape, weight.shape = True, (rows, depth), (columns, depth)
    if kind == torch.uint8:
        x.shape = (rows, 2 * depth)
    x.itemsize, weight.dtype = 2, kind
    api.linear._init_fn(x, weight, None, None)
    assert called == ["ours" if ours else "the library's"]


def test_a_compiled_layer_keeps_its_linear_whole() -> None:
    """No break of the graph, and no other result."""
    plain = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    x = torch.randn(1, 5, 256, dtype=torch.bfloat16)
    expected = plain(x)
    plain.__class__, plain.weight_scale = api.Linear, None
    with torch.no_grad():
        found = torch.compile(plain, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found, expected)


COMPILE = """
import itertools, sys
from types import SimpleNamespace
import api, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

kernel, launches = api.multiply_few_rows, []


class Launcher:
    def __getitem__(self, grid):
        return lambda *given, **options: launches.append(options)


api.multiply_few_rows = Launcher()
cards = [tuple(map(int, card.split(":"))) for card in sys.argv[1:]]
kinds = ("*bf16", torch.bfloat16), ("*fp8e4nv", torch.float8_e4m3fn)
kinds += ("*i8", torch.int8), ("*u8", torch.uint8)
for (capability, room), (kind, dtype) in itertools.product(cards, kinds):
    float8 = dtype == torch.float8_e4m3fn
    if float8 and capability < 89:
        continue
    properties = SimpleNamespace(shared_memory_per_block_optin=room)
    torch.cuda.get_device_properties = lambda device: properties
    for rows in (1, 32, 64, 200):
        x, scale = torch.empty(rows, 256).to(dtype if float8 else torch.bfloat16), None
        weight = torch.zeros(64, 128 if kind == "*u8" else 256).to(dtype)
        if dtype.itemsize == 1:
            scale = torch.ones(64, 8 if kind == "*u8" else 1)
        api.multiply(x, weight, scale if float8 else None, scale)
        sizes = launches[-1]
        stages = sizes.pop("num_stages")
        types = dict(x=kind if float8 else "*bf16", weight=kind, out="*bf16")
        types |= dict.fromkeys(("num_rows", "in_features", "out_features"), "i32")
        types |= dict.fromkeys(sizes, "constexpr")
        given = dict(x_scale="*fp32" if float8 else None)
        given["weight_scale"] = {"*bf16": None, "*u8": "*bf16"}.get(kind, "*fp32")
        types |= {name: kind or "constexpr" for name, kind in given.items()}
        sizes |= {name: None for name, kind in given.items() if not kind}
        types = {name: types[name] for name in kernel.arg_names}
        at = kernel.arg_names.index
        constants = {(at(name),): value for name, value in sizes.items()}
        aligned = ("x", "weight", "out", "in_features", "out_features")
        attributes = {(at(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(kernel, types, constants, attributes)
        options = {"num_warps": 4, "num_stages": stages}
        target = GPUTarget("cuda", capability, 32)
        made = compile(source, target=target, options=options)
        print(capability, made.metadata.shared, stages)
"""


# KiB of shared memory that a block of threads can have, and stages of 64 rows in bfloat16
# that fit into it.
CARDS = {80: (163, 5), 86: (99, 3), 89: (99, 3), 90: (227, 6)}


def test_it_compiles_for_cards_of_phi4() -> None:
    """With as many stages as fit. In a process of its own, where Triton does not
    interpret; one for all cards."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(Path(api.__file__).parent)}
    del environment["TRITON_INTERPRET"]
    cards = [f"{capability}:{kib * 1024}" for capability, (kib, _) in CARDS.items()]
    command = [sys.executable, "-c", COMPILE, *cards]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    for capability, (kib, stages) in CARDS.items():
        made = [line[1:] for line in lines if line[0] == capability]
        assert len(made) == (12 if capability < 89 else 16)
        assert max(shared for shared, _ in made) <= kib * 1024
        assert made[2][1] == stages
        found = [count for _, count in made]
        assert found[-8:-4] == [4, 4, 4, 4]  # int8: more gain nothing
        assert found[-4:] == ([3, 3, 2, 2] if kib == 99 else [3, 3, 3, 3])  # int4
