# SPDX-License-Identifier: MIT
"""Starting: what a newcomer does wrong ends with one clear line and exit code 2."""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from net import DEADLINE
from safetensors.torch import load_file, save_file
from server import ROOT, ended, forked, running
from transformers import AutoTokenizer
from transformers.generation.continuous_batching import continuous_api

import api
import model_download


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return ended([str(ROOT / "api.py"), *arguments], **environment)


def refused(arguments: list[str], **environment: str) -> str:
    """What a wrong start says: one line, no traceback, exit code 2."""
    done = start(*arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "0"], "--port"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_option_is_named(arguments: list[str], says: str) -> None:
    """The other settings are test_places.py's, without a process for each."""
    assert says in refused(arguments)


def test_bad_environment_is_named() -> None:
    said = refused(["--max-new-tokens", "5"], PHI4_API_KEY=" , ")
    assert "environment variable PHI4_API_KEY, ' , ': " in said
    assert said.count("\n") == 1


def test_what_others_leave_in_the_environment_counts_as_not_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compose files make empty variables, Kubernetes one for a Service named phi4."""
    for name in api.Settings.model_fields.keys() - {"api_key"}:
        monkeypatch.setenv(f"PHI4_{name.upper()}", "")
    assert api.read_settings() == api.Settings.model_construct()
    monkeypatch.setenv("PHI4_PORT", "tcp://10.0.0.1:6006")
    assert api.read_settings().port == 6006


def test_no_model_folder() -> None:
    said = refused(["--model", "no/such/folder"])
    assert "no/such/folder" in said
    assert "model_download.py" in said and "--demo" in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name.replace("model.", "")):
        model_download.preflight(api.Settings(model=folder, device="cpu"))


LONGROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.1]}
PHI4_MINI = {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}
PHI4_MINI |= {"vocab_size": 200064, "rope_scaling": LONGROPE}


def copy_with(config: dict[str, Any], folder: Path, target: Path, without: str) -> Path:
    """A copy of a folder with another config.json."""
    shutil.copytree(folder, target)
    told = json.loads((folder / "config.json").read_text())
    del told[without]
    (target / "config.json").write_text(json.dumps(told | config))
    return target


@pytest.mark.parametrize(
    "config, says",
    [
        (PHI4_MINI, "longrope"),
        (PHI4_MINI | {"rope_scaling": None}, "0.75"),
        ({"rope_scaling": LONGROPE, "sliding_window": 262144}, "longrope"),  # Phi-3.5
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "yarn",
        ),  # as transformers 5 has it
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "0.5"),
        ({"sliding_window": 511}, "511"),  # Phi-3
        ({"model_type": "phimoe"}, "phimoe"),  # Phi-3.5-MoE
        ({"rope_scaling": "x"}, "damaged"),
    ],
)
def test_relatives_of_phi4_are_refused(
    tiny_folder: Path, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    """Before anything is loaded, with what is wrong and what is served."""
    folder = copy_with(config, tiny_folder, tmp_path / "copy", "rope_parameters")
    with pytest.raises(ValueError, match=says) as refusal:
        model_download.preflight(api.Settings(model=folder, device="cpu"))
    assert "phi-4-reasoning-plus" in str(refusal.value) or says == "damaged"


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": None, "rope_theta": 250000, "sliding_window": None},  # phi-4
        {"rope_theta": 500000, "max_position_embeddings": 32768},  # phi-4-reasoning
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"sliding_window": 512},
        {"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}},  # another's
    ],
)
def test_phi4_and_strangers_are_not_refused(
    tiny_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = copy_with(config, tiny_folder, tmp_path / "copy", "rope_parameters")
    model_download.preflight(api.Settings(model=folder, device="cpu"))


@pytest.mark.parametrize("quantize", ["none", "int8", "fp8"])
@pytest.mark.parametrize("kind", ["a tensor", "all tensors", "packed", "more"])
def test_files_that_do_not_have_the_weights(
    tiny_folder: Path, tmp_path: Path, kind: str, quantize: Any
) -> None:
    """transformers would put random numbers in their place, or leave out their scales,
    and answer with nonsense."""
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    says = f"lacks {re.escape(name)}"
    if kind == "a tensor":
        del weights[name]
    elif kind == "packed":
        weights[f"{name}_packed"] = weights.pop(name).to(torch.int32)
        says = "quantized as I32 without a name"
    elif kind == "more":
        weights = {key.removeprefix("model."): it for key, it in weights.items()}
        name = "layers.1.mlp.down_proj.lora_A.weight"
        weights[name] = torch.ones(1)
        says = f"has weights that config.json does not mention: {re.escape(name)}"
    else:  # as torch.compile's models are saved
        weights = {f"_orig_mod.{key}": value for key, value in weights.items()}
        says = r"lacks lm_head.weight, model.embed_tokens.weight, .* and [0-9]+ more"
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = api.Settings(model=folder, device="cpu", quantize=quantize)
    with pytest.raises(ValueError, match=says):
        api.Engine(settings).load()


def test_what_files_hold_beside_the_weights_is_left_alone(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["v_head.summary.weight"] = torch.ones(1, 8)
    weights["model.layers.7.mlp.down_proj.weight"] = torch.ones(1, 8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    api.Engine(api.Settings(model=folder, device="cpu")).load()


def test_port_in_use(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused(["--model", str(tiny_folder), "--device", "cpu", "--port", port])
        assert port in said and "in use" in said


def test_no_gpu(tiny_folder: Path) -> None:
    said = refused(["--model", str(tiny_folder)])
    assert "--demo" in said and "GPU" in said


def test_help_explains_every_setting() -> None:
    done = start("--help", COLUMNS="1000")  # no line is broken
    assert done.returncode == 0 and not done.stderr
    assert "environment variable" in done.stdout and "PHI4_" in done.stdout
    said = " ".join(done.stdout.split())
    for name, field in api.Settings.model_fields.items():
        explained = re.escape(f"{field.description} (default: {field.default})")
        assert re.search(rf" --{name.replace('_', '-')}[, ][^.]*{explained}", said), (
            name
        )
        unit = "Temperature" if name == "temperature" else "Seconds"
        assert field.annotation is not float or unit in field.description


@pytest.mark.parametrize(
    ("options", "reached"), [((), True), (("--host", "127.0.0.1"), False)]
)
def test_by_default_every_address_is_listened_on_and_the_log_says_where(
    tiny_folder: Path, options: tuple[str, ...], reached: bool
) -> None:
    def connects(address: str) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((address, process.port)) == 0

    arguments = ("--model", str(tiny_folder), "--device", "cpu", *options)
    with forked(*arguments) as process:
        assert connects("127.0.0.1")
        assert connects("127.0.0.2") is reached
        lines = process.log().splitlines()
    [told] = [line for line in lines if "listening on" in line]
    assert f":{process.port}" in told


@pytest.mark.parametrize(
    ("matrix", "dtype"), [(True, torch.bfloat16), (False, torch.float32)]
)
def test_auto_is_what_the_processor_is_fast_with(
    tiny_folder: Path, matrix: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: matrix)
    with running(model=tiny_folder, dtype="auto") as server:
        assert server.model.dtype == dtype
        assert server.post(max_new_tokens=2).ok


# Machines with a GPU, as far as they can be played here


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    card = {"capability": (9, 0), "free": 80 * 2**30, "count": 1}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_name", lambda *_: "Some Card")
    ones = torch.ones
    on_cpu = lambda *sizes, device, **more: ones(*sizes, **more)
    monkeypatch.setattr(torch, "ones", on_cpu)
    monkeypatch.setattr(cuda, "get_device_capability", lambda *_: card["capability"])
    monkeypatch.setattr(cuda, "mem_get_info", lambda *_: (card["free"], 80 * 2**30))
    return card


QWEN2 = {"model_type": "qwen2", "sliding_window": 16}


@pytest.mark.parametrize(
    "config, window",
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        (
            {"model_type": "mistral", "max_position_embeddings": 8192},
            4096,
        ),  # its default
        ({"model_type": "mistral", "sliding_window": 512}, 512),  # its whole context
        ({"model_type": "mistral", "sliding_window": None}, None),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, 16),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 2}, None),
        (QWEN2, None),
        ({"model_type": "llama"}, None),
        ({}, None),
    ],
)
def test_a_window_is_refused_on_a_gpu(
    tiny_folder: Path,
    tmp_path: Path,
    gpu: dict,
    config: dict[str, Any],
    window: int | None,
) -> None:
    """A GPU's attention has none here; a CPU's does."""
    folder = copy_with(config, tiny_folder, tmp_path / "copy", "sliding_window")
    model_download.preflight(api.Settings(model=folder, device="cpu"))
    on_gpu = api.Settings(model=folder, device="cuda:0")
    if window is None:
        model_download.preflight(on_gpu)
    else:
        with pytest.raises(ValueError, match=f"window of {window} tokens.*device cpu"):
            model_download.preflight(on_gpu)


def test_picks_the_gpu(gpu: dict, tiny_folder: Path) -> None:
    def pick(**options: Any) -> str:
        settings = api.Settings(model=tiny_folder, **options)
        return str(model_download.preflight(settings))

    assert pick() == pick(demo=True) == "cuda:0"
    assert pick(device="cuda:1") == "cuda:1"
    assert pick(device="cpu") == "cpu"


def test_card_without_bfloat16(gpu: dict, tiny_folder: Path) -> None:
    gpu["capability"] = (7, 5)
    for dtype in ("auto", "float32"):
        with pytest.raises(ValueError, match=r"Some Card.*no bfloat16.*8\.0"):
            model_download.preflight(api.Settings(model=tiny_folder, dtype=dtype))


def test_no_float32_on_a_gpu(gpu: dict, tiny_folder: Path) -> None:
    for device in ("auto", "cuda:1"):
        given = api.Settings(model=tiny_folder, dtype="float32", device=device)
        with pytest.raises(ValueError, match="--dtype float32 is for --device cpu"):
            model_download.preflight(given)
    given = api.Settings(model=tiny_folder, dtype="float32", device="cpu")
    assert model_download.preflight(given).type == "cpu"


def test_card_that_is_too_small(gpu: dict, tiny_folder: Path) -> None:
    gpu["free"] = 2**30
    with pytest.raises(ValueError, match=r"cuda:0: 2 GiB needed, 1 GiB free"):
        model_download.preflight(api.Settings(model=tiny_folder))


def test_a_share_of_the_weights_is_more_than_half(
    gpu: dict, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of torchrun split only the MLPs."""
    folder = shutil.copytree(tiny_folder, tmp_path / "large")
    monkeypatch.setattr(model_download, "check_complete", lambda _: None)
    monkeypatch.setattr(model_download, "check_format", lambda *_: None)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20 * 2**30)
    monkeypatch.setattr(model_download, "WORLD_SIZE", 2)
    gpu["free"] = 14 * 2**30
    with pytest.raises(ValueError, match="14 GiB needed, 14 GiB free"):
        model_download.preflight(api.Settings(model=folder))
    gpu["free"] = 15 * 2**30
    with (folder / "consolidated.safetensors").open("w") as beside:  # is not loaded
        beside.truncate(20 * 2**30)
    assert model_download.preflight(api.Settings(model=folder)).type == "cuda"


def test_the_demo_does_not_need_the_room_of_the_other_model(
    gpu: dict, tmp_path: Path
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(29 * 10**9)
    gpu["free"] = 8 * 2**30
    given = api.Settings(model=tmp_path, demo=True)
    assert model_download.preflight(given).type == "cuda"


OLD = "The NVIDIA driver on your system is too old (found version %d). Please update."
NO_IMAGE = "CUDA error: no kernel image is available for execution on the device\nmore"
CU126 = r"CUDA 13.*580.*not for RTX 50: pip install torch==2\.13\.0\+cu126 --index-url https"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("error", "built_for", "driver", "told"),
    [
        (
            AssertionError("Torch not compiled with CUDA"),
            None,
            0,
            "--demo works.*torch==.*/cu130",
        ),
        (RuntimeError(OLD % 12080), "13.0", 12080, f"12080.*{CU126}"),
        (RuntimeError("CUDA error: invalid image"), "13.0", 12040, CU126),
        (RuntimeError(OLD % 11040), "13.0", 11040, "11040.*Update the NVIDIA driver"),
        (RuntimeError(NO_IMAGE), "12.6", 13000, r"pip install torch==2\.13\.0$"),
        (RuntimeError("No CUDA GPUs are available"), "13.0", 13000, "--demo works"),
        (RuntimeError("Found no NVIDIA driver"), "13.0", 0, "--demo works"),
    ],
)
def test_torch_that_cannot_use_the_gpu(
    gpu: dict,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
    error: Exception,
    built_for: str | None,
    driver: int,
    told: str,
) -> None:
    """It says what to do; some find out only when they run something."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    holder, name = (torch, "ones") if late else (torch.cuda, "get_device_name")
    monkeypatch.setattr(holder, name, fail)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    version = lambda: driver
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", version, raising=False)
    with pytest.raises(ValueError, match=f"(?s)cuda:0 with torch 2.13.*{told}"):
        model_download.preflight(api.Settings(model=tiny_folder))


# Loading


def test_port_opens_at_once_and_answers_503_until_ready(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    load = api.Engine.load

    def slow(engine: api.Engine) -> None:
        gate.wait()
        load(engine)

    monkeypatch.setattr(api.Engine, "load", slow)
    with running(model=tiny_folder, wait=False) as server:
        health = requests.get(server.url + "/health", timeout=5)
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert health.json()["device"] == "cpu"  # the setting, for now
        for path in ("/", "/v1/chat/completions"):
            early = server.post(path=path)
            assert early.status_code == 503 and early.headers["Retry-After"] == "1"
        for path in ("/v1/models", "/metrics"):
            early = requests.get(server.url + path, timeout=5)
            assert early.status_code == 503 and early.headers["Retry-After"] == "1"
        early = server.post(unknown=1)
        assert early.status_code == 503
        gate.set()
        server.wait_ready()
        assert server.post(max_new_tokens=1).status_code == 200


def test_load_that_fails_ends_the_process(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "no such type"
    (folder / "config.json").write_text(json.dumps(config))
    with forked("--model", str(folder), "--device", "cpu", wait=False) as process:
        assert process.wait(DEADLINE) == api.EXIT_LOAD
        assert "cannot be served" in process.log()
        assert "Traceback" not in process.log()
        _, _, after = process.log().partition(" CRITICAL ")
        assert after.count("\n") == 1  # one line, whatever the library says


def test_load_that_fails_names_the_error(tiny_folder: Path, tmp_path: Path) -> None:
    """Some say nothing by themselves: KeyError's text is only the key."""
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{}")
    with forked("--model", str(folder), "--device", "cpu", wait=False) as process:
        assert process.wait(DEADLINE) == api.EXIT_LOAD
        assert "Error: " in process.log()


def test_vocabulary_that_the_model_lacks(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one", "too", "many"])
    tokenizer.save_pretrained(folder)
    with running(model=folder) as server:
        assert server.ended == [api.EXIT_LOAD]


def test_a_slow_first_start_of_the_thread_is_no_failure(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library sets the number of the step, which is watched, only after this."""
    reset = continuous_api.ContinuousBatchProcessor.reset

    def slow(processor: Any) -> None:
        time.sleep(1)
        reset(processor)

    monkeypatch.setattr(continuous_api.ContinuousBatchProcessor, "reset", slow)
    with running(model=tiny_folder) as served:
        assert served.works()
        assert not served.ended
