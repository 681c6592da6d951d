# SPDX-License-Identifier: MIT
"""Where people put it: behind other servers' commands, in containers, on IPv6, with a
log that nobody reads; and how it ends when it cannot go on."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import preloaded
import pytest
import requests
import torch
from net import DEADLINE, free_port
from safetensors.torch import load_file, save_file
from server import ROOT, ended, forked, is_ready, narrow, running, wait_until
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import api
import model_download

# ------------------------------------------------------------------------------
# Settings that others wrote
# ------------------------------------------------------------------------------


def given(
    patch: pytest.MonkeyPatch, *arguments: str, **environment: str
) -> api.Settings:
    for name, value in environment.items():
        patch.setenv(name, value)
    patch.setattr(sys, "argv", ["api.py", *arguments])
    return api.read_settings(command_line=True)


WRONG = [
    (["--port", "0"], {}, "--port", "'0'"),
    (["--port=many"], {}, "--port", "'many'"),
    ([], {"PHI4_PORT": "99999"}, "environment variable PHI4_PORT", "'99999'"),
    (["--port", "70000"], {"PHI4_PORT": "80"}, "--port", "'70000'"),
    ([], {"PHI4_DTYPE": "int8"}, "environment variable PHI4_DTYPE", "'int8'"),
    (
        [],
        {"PHI4_MAX_IN_FLIGHT": "-1"},
        "environment variable PHI4_MAX_IN_FLIGHT",
        "'-1'",
    ),
    (["--max-new-tokens", "0"], {}, "--max-new-tokens", "'0'"),
    (["--device", "tpu"], {}, "--device", "'tpu'"),
    (["--dtype", "int8"], {}, "--dtype", "'int8'"),
    (["--api-key", " , "], {}, "--api-key", "empty"),
    ([], {"PHI4_DEMO": "perhaps"}, "environment variable PHI4_DEMO", "'perhaps'"),
    ([], {"PHI4_API_KEY": ""}, "environment variable PHI4_API_KEY", "empty"),
    ([], {"PHI4_API_KEY": " "}, "environment variable PHI4_API_KEY", "empty"),
    ([], {"PHI4_API_KEY": ","}, "environment variable PHI4_API_KEY", "empty"),
    ([], {"PHI4_API_KEY": " ,\t,\u3000"}, "environment variable PHI4_API_KEY", "empty"),
    (["--api-key", ""], {}, "--api-key", "empty"),
    (["--api-key=,"], {"PHI4_API_KEY": "right"}, "--api-key", "empty"),
    (["--API-KEY", ""], {}, "--api-key", "empty"),
    (["--api-key", "null"], {}, "--api-key", "empty"),
    ([], {"PHI4_API_KEY": "\udcff"}, "environment variable PHI4_API_KEY", "utf-8"),
    (["--root-path", "/ü"], {}, "--root-path", "ü"),
    (["--allowed-hosts", "http://phi4.example"], {}, "--allowed-hosts", "phi4.example"),
    (["--allowed-hosts", "phi4.example:8443"], {}, "--allowed-hosts", "phi4.example"),
]


@pytest.mark.parametrize(("arguments", "environment", "source", "value"), WRONG)
def test_a_wrong_setting_names_its_source_and_value(
    monkeypatch, caplog, arguments, environment, source, value
):
    with pytest.raises(SystemExit) as ended:
        given(monkeypatch, *arguments, **environment)
    assert ended.value.code == api.EXIT_WRONG_START
    (line,) = caplog.messages
    assert line.startswith(source + ",") and value in line


def test_two_wrong_settings_are_two_lines(monkeypatch, caplog):
    with pytest.raises(SystemExit):
        given(monkeypatch, "--port", "0", PHI4_DTYPE="int8")
    assert [text.split(",")[0] for text in sorted(caplog.messages)] == [
        "--port",
        "environment variable PHI4_DTYPE",
    ]


@pytest.mark.parametrize("port", ["tcp://10.96.0.12:6006", "udp://10.96.0.12:53", ""])
def test_what_kubernetes_and_compose_set_by_accident_is_not_set(monkeypatch, port):
    """A Service that is named phi4 gives all pods such variables."""
    settings = given(
        monkeypatch,
        PHI4_PORT=port,
        PHI4_SERVICE_HOST="10.96.0.12",
        PHI4_PORT_6006_TCP_ADDR="10.96.0.12",
        PHI4_MODEL="",
        PHI4_DEMO="",
        PHI4_MAX_NEW_TOKENS="",
        PHI4_DTYPE="",
        PHI4_CORS_ORIGINS="",
    )
    assert settings == api.Settings.model_construct()


def test_a_home_is_expanded(monkeypatch):
    assert given(monkeypatch, "--model=~/x").model == Path.home() / "x"
    assert given(monkeypatch, "--model=~nobody-here/x").model == Path("~nobody-here/x")
    assert given(monkeypatch, PHI4_MODEL="~/y").model == Path.home() / "y"


def test_a_missing_folder_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path / "no" / "folder")):
        model_download.check_complete(Path("no/folder"))


# ------------------------------------------------------------------------------
# Addresses
# ------------------------------------------------------------------------------


def answers(family: int, address: str, port: int) -> bool:
    with socket.socket(family) as probe:
        return probe.connect_ex((address, port)) == 0


HAS_V6 = socket.has_dualstack_ipv6() and Path("/proc/net/if_inet6").exists()
v6 = pytest.mark.skipif(not HAS_V6, reason="this machine has no IPv6")


@v6
@pytest.mark.parametrize(
    ("host", "v4", "v6"),
    [
        ("::", True, True),
        ("[::]", True, True),
        ("::1", False, True),
        ("0.0.0.0", True, False),
    ],
)
def test_a_host_is_listened_on_in_both_versions_of_ip(monkeypatch, host, v4, v6):
    settings, port = given(monkeypatch, "--host", host), free_port()
    with api.listen(settings.host, port):
        assert answers(socket.AF_INET, "127.0.0.1", port) is v4
        assert answers(socket.AF_INET6, "::1", port) is v6


@v6
def test_the_log_has_an_address_to_click_on(tiny_folder):
    options = "--model", str(tiny_folder), "--device", "cpu", "--host", "[::1]"
    with forked(*options, wait=False) as process:
        url = f"http://[::1]:{process.port}"
        wait_until(lambda: is_ready(url))
        assert f"listening on {url}\n" in process.log()
        assert "may ask" not in process.log()


@pytest.mark.parametrize(
    "host",
    [
        "http://127.0.0.1",
        "127.0.0.1:80",
        "no.such.name.invalid",
        "192.0.2.1",
        "..",
        "x" * 300,
    ],
)
def test_an_address_that_is_none_names_the_option(host):
    with pytest.raises(ValueError, match=r"--host .*--port 6\d+.*give another"):
        api.listen(host, 6006)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_a_connection_that_reads_nothing_is_ended_by_the_system():
    """After a time that is too long for a test."""
    port = free_port()
    with api.listen("127.0.0.1", port) as listener, socket.socket() as client:
        client.connect(("127.0.0.1", port))
        with listener.accept()[0] as accepted:
            wait = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert 10_000 <= wait <= 60_000


def test_a_port_in_use_says_which_and_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"--port {port}: .*Address already in use.*; free"
        ):
            api.listen("127.0.0.1", port)


def test_a_port_that_is_not_allowed_says_so(monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "create_server", refused)
    with pytest.raises(ValueError, match=r"--port 80: .*Permission denied; "):
        api.listen("0.0.0.0", 80)


# ------------------------------------------------------------------------------
# Other servers' commands
# ------------------------------------------------------------------------------

UVICORN = "uvicorn", "api:app", "--root-path", "/phi4", "--workers", "2"


def test_behind_uvicorns_command_all_is_as_without(tiny_folder, tmp_path):
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", *UVICORN, "--port", str(port)]
    own = {
        "PHI4_MODEL": str(tiny_folder),
        "PHI4_DEVICE": "cpu",
        "PHI4_API_KEY": "right",
    }
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | own, cwd=ROOT
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(
                lambda: process.poll() is not None or is_ready(url), 2 * DEADLINE
            )
            wait_until(lambda: log.read_text().count("INFO phi4: ready: tiny") == 2)
            key = {"Authorization": "Bearer right"}
            body = {"prompt": "x", "max_new_tokens": 2}
            assert requests.post(url, json=body, timeout=DEADLINE).status_code == 401
            answer = requests.post(url, json=body, headers=key, timeout=DEADLINE)
            assert answer.status_code == 200
            wrong = requests.post(
                url + "/v1/chat/completions", json={}, headers=key, timeout=DEADLINE
            )
            assert wrong.status_code == 400 and set(wrong.json()) == {"error"}
            schema = requests.get(url + "/openapi.json", timeout=DEADLINE).json()
            assert schema["servers"] == [{"url": "/phi4"}]
            wait_until(
                lambda: (
                    f"{answer.headers['X-Request-ID']} POST /phi4/ 200"
                    in log.read_text()
                )
            )
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE)
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()


def test_there_wrong_settings_are_named_too(tiny_folder):
    own = {"PHI4_MODEL": str(tiny_folder), "PHI4_DTYPE": "int8"}
    done = ended(["-m", "uvicorn", "api:app", "--port", str(free_port())], **own)
    assert done.returncode == api.EXIT_WRONG_START
    assert "environment variable PHI4_DTYPE, 'int8'" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------
# A log that nobody reads
# ------------------------------------------------------------------------------


@contextlib.contextmanager
def logging_to(log: int, folder: Path, *options: str) -> Iterator[Any]:
    """A server that is ready and whose standard error is this; it has a `url`."""
    port = free_port()
    command = [str(ROOT / "api.py"), "--model", str(folder), "--device", "cpu"]
    command += ["--port", str(port), *options]
    process = preloaded.start(command, log, log, dict(os.environ))
    process.url = f"http://127.0.0.1:{port}"
    try:
        wait_until(
            lambda: process.poll() is not None or is_ready(process.url), 2 * DEADLINE
        )
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_log_that_nobody_reads_stops_nothing(tiny_folder):
    reader, log = os.pipe()
    with (
        open(reader, "rb") as told,
        logging_to(log, tiny_folder) as process,
        requests.Session() as session,
    ):
        os.close(log)
        for _ in range(500):  # 200 kB of log; a pipe holds 64
            session.get(f"{process.url}/{'x' * 200}", timeout=DEADLINE)
        body = {"prompt": "x", "max_new_tokens": 2}
        assert session.post(process.url, json=body, timeout=DEADLINE).ok
        assert session.get(process.url + "/health", timeout=DEADLINE).ok
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
        said = told.read()
    assert b"INFO phi4: ready: tiny on cpu\n" in said
    assert len(said) > 50_000, "what the pipe had room for"  # a page ends with a line


def test_a_terminal_that_nobody_reads_stops_nothing(tiny_folder):
    """As over an ssh connection that hangs."""
    terminal, log = os.openpty()
    try:
        with logging_to(log, tiny_folder) as process, requests.Session() as session:
            assert os.get_blocking(log), "the shell's own terminal stays as it was"
            for _ in range(400):
                session.get(f"{process.url}/{'x' * 200}", timeout=DEADLINE)
            assert session.get(process.url + "/health", timeout=DEADLINE).ok
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0
    finally:
        os.close(terminal)
        os.close(log)


@pytest.mark.parametrize("log", ["no reader", "a full disk"])
def test_a_log_that_cannot_be_written_stops_nothing(tiny_folder, log):
    reader, pipe = os.pipe()
    os.close(reader)
    if log == "a full disk":
        os.close(pipe)
        pipe = os.open("/dev/full", os.O_WRONLY)
    with logging_to(pipe, tiny_folder, "--drain-timeout", "0") as process:
        os.close(pipe)
        body = {"prompt": "x", "max_new_tokens": 400, "stream": True}
        with requests.post(
            process.url, json=body, timeout=DEADLINE, stream=True
        ) as answer:
            assert answer.ok
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0


def test_a_long_line_is_written_whole_where_it_is_read(capfd):
    record = api.logger.makeRecord("phi4", 20, "", 0, "é" * 10_000, (), None)
    model_download.StderrHandler().emit(record)
    assert capfd.readouterr().err == "é" * 10_000 + "\n"


# ------------------------------------------------------------------------------
# The end
# ------------------------------------------------------------------------------


def test_a_lasting_failure_ends_the_process(tiny_folder):
    with narrow(tiny_folder) as served:
        with served.gate as gate:

            def fail_always(*_: object, **__: object) -> None:
                raise RuntimeError("broken for good")

            hook = served.model.register_forward_pre_hook(fail_always)
            statuses = []
            while not served.ended and len(statuses) < 50:
                statuses.append(served.post("x", max_new_tokens=2).status_code)
                time.sleep(0.05)
            hook.remove()
            assert gate.error is None
        wait_until(lambda: served.ended)
        assert served.ended == [api.EXIT_ENGINE]
        assert set(statuses) == {503}


def test_failures_with_answers_between_them_do_not(tiny_folder):
    with narrow(tiny_folder) as served:
        for _ in range(2 * api.MAX_FAILURES + 1):
            with served.gate as gate:
                gate.fail()
                assert served.post("x", max_new_tokens=2).status_code == 503
            wait_until(lambda: is_ready(served.url))
            assert served.post("x", max_new_tokens=2).ok
        assert not served.ended


# ------------------------------------------------------------------------------
# Weights that others have quantized; small machines
# ------------------------------------------------------------------------------


def copy_beside_weights(source: Path, folder: Path) -> None:
    """Give a folder of weights the tokenizer and what else it lacks."""
    folder.mkdir(exist_ok=True)
    for file in source.glob("*"):
        if not (folder / file.name).exists() and "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())


def say_in_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def published(source: Path, folder: Path, **options: Any) -> Path:
    """A folder as people publish phi-4, quantized with bitsandbytes."""
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder)
    copy_beside_weights(source, folder)
    said = json.loads((folder / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "bitsandbytes"
    return folder


@pytest.fixture(scope="module")
def quantized_folder(tiny_folder, tmp_path_factory):
    return published(
        tiny_folder,
        tmp_path_factory.mktemp("quantized") / "phi-4-bnb-4bit",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module")
def eight_bit_folder(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "phi-4-bnb-8bit"
    return published(tiny_folder, folder, load_in_8bit=True)


@pytest.mark.parametrize(
    ("name", "stored"),
    [("quantized_folder", torch.uint8), ("eight_bit_folder", torch.int8)],
)
def test_a_folder_that_is_quantized_already_is_served(request, name, stored):
    with running(model=request.getfixturevalue(name), dtype="auto") as served:
        layer = served.model.model.layers[0].mlp.down_proj.weight
        assert layer.dtype == stored
        assert served.token_budget == api.SHARED_TOKENS
        first = served.answer("x", max_new_tokens=8)
        assert served.answer("x", max_new_tokens=8) == first


def test_fp8_in_blocks_is_served_without_a_gpu(tiny_folder, tmp_path, monkeypatch):
    copy_beside_weights(tiny_folder, tmp_path)
    blocks = {"activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    say_in_config(tmp_path, quantization_config={"quant_method": "fp8", **blocks})
    weights = load_file(tiny_folder / "model.safetensors")
    stored = dict(weights)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = (size // 32 for size in weights[name].shape)
        blocked = weights[name].reshape(rows, 32, columns, 32)
        scales = blocked.abs().amax((1, 3), keepdim=True) / 448
        eights = (blocked / scales).to(torch.float8_e4m3fn)
        stored[name] = eights.reshape(weights[name].shape)
        stored[f"{name}_scale_inv"] = scales[:, 0, :, 0].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with running(model=tmp_path) as served:
        name = "model.layers.1.mlp.down_proj.weight"
        loaded = served.model.get_parameter(name)
        torch.testing.assert_close(loaded, weights[name], rtol=0.07, atol=0.01)
        assert len(served.answer("x", max_new_tokens=8)) > 0
    with pytest.raises(
        ValueError, match="--device cpu only, on machines without a GPU"
    ):
        model_download.check_format(tmp_path, on_gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match="--device cpu only, on machines without a GPU"
    ):
        model_download.check_format(tmp_path, on_gpu=False)


def test_eight_bits_on_a_gpu_without_a_search_for_outliers(eight_bit_folder, tmp_path):
    folder = shutil.copytree(eight_bit_folder, tmp_path / "copy")
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    model_download.check_format(folder, on_gpu=False)
    with pytest.raises(
        ValueError, match=r'config\.json needs "llm_int8_threshold": 0\.0'
    ):
        model_download.check_format(folder, on_gpu=True)
    say_in_config(folder, quantization_config=said | {"llm_int8_threshold": 0.0})
    model_download.check_format(folder, on_gpu=True)


GROUP = {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}
NOT_SERVED = [
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
    ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
    ({"quant_method": "hqq", "load_in_4bit": True}, "hqq"),
    ({"quant_method": "torchao", "quant_type": {}}, "torchao"),
    ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
    ({"quant_method": "quark"}, "quark"),
    ({"quant_method": "mxfp4"}, "mxfp4"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt"),
    ({"quant_method": "exl2", "bits": 4.25}, "exl2"),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": GROUP},
        },
        "compressed-tensors pack-quantized",
    ),
    ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ({"quant_method": "a\n\x1b[2J"}, "a"),
    ({"group_size": 64, "bits": 4}, "a format without a name"),
]


@pytest.mark.parametrize(("quantized", "named"), NOT_SERVED)
def test_other_formats_are_refused_by_name(tiny_folder, tmp_path, quantized, named):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    say_in_config(folder, quantization_config=quantized)
    for quantize in "none", "int4":
        settings = api.Settings(model=folder, device="cpu", quantize=quantize)
        with pytest.raises(
            ValueError, match=f"quantized as {named}.*bitsandbytes$"
        ) as told:
            model_download.preflight(settings)
        assert str(told.value).isprintable()


@pytest.mark.parametrize("said", [["awq"], "awq", 4])
def test_a_format_that_is_none(tiny_folder, tmp_path, said):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    say_in_config(folder, quantization_config=said)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        model_download.preflight(api.Settings(model=folder, device="cpu"))


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        ("model.layers.0.mlp.down_proj.qweight", torch.int32),
        ("model.layers.0.mlp.down_proj.weight", torch.float8_e4m3fn),
        ("model.layers.0.mlp.down_proj.weight", torch.uint8),
    ],
)
def test_a_format_that_config_json_does_not_name(tiny_folder, tmp_path, tensor, dtype):
    """transformers would serve nonsense: scales that it ignores, or random weights."""
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.some_buffer"] = torch.ones(2, dtype=torch.int64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "consolidated.safetensors").write_bytes(b"")  # is not loaded
    settings = api.Settings(model=folder, device="cpu")
    assert model_download.preflight(settings).type == "cpu"
    weights[tensor] = torch.ones(2, 2).to(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"without a name in config\.json"):
        model_download.preflight(settings)


def test_a_format_that_is_not_served_is_a_wrong_start(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    say_in_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    done = ended([str(ROOT / "api.py"), "--device", "cpu", "--model", str(folder)])
    assert done.returncode == api.EXIT_WRONG_START
    assert "quantized as awq" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_phi3_that_was_made_a_llama_answers_the_same(phi4_folder, tmp_path):
    """As people publish phi-4: its tokenizer has the class of GPT-2's, and would get
    GPT-2's way to split a text."""
    copy_beside_weights(phi4_folder, tmp_path)
    said = json.loads((phi4_folder / "config.json").read_text())
    heads, groups = said["num_attention_heads"], said["num_key_value_heads"]
    dim = said["hidden_size"] // heads
    shares = {
        "qkv_proj": {
            "q_proj": heads * dim,
            "k_proj": groups * dim,
            "v_proj": groups * dim,
        },
        "gate_up_proj": dict.fromkeys(
            ("gate_proj", "up_proj"), said["intermediate_size"]
        ),
    }
    weights = load_file(phi4_folder / "model.safetensors")
    for name in list(weights):
        for joint, parts in shares.items():
            if joint in name:
                split = weights.pop(name).split(list(parts.values()))
                for part, weight in zip(parts, split, strict=True):
                    weights[name.replace(joint, part)] = weight.clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    say_in_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    text = "Hello, I'M 12345678 years   old\n\n  def f(x):\n\treturn x\n你好，世界"
    answers = []
    for folder in phi4_folder, tmp_path:
        with running(model=folder) as served:
            asked = served.post(text, max_new_tokens=8)
            answers.append((asked.headers["X-Prompt-Tokens"], asked.json()["response"]))
    assert answers[0] == answers[1]


def test_what_cannot_be_done_with_it_is_refused(quantized_folder, monkeypatch):
    settings = api.Settings(model=quantized_folder, device="cpu", quantize="int8")
    with pytest.raises(ValueError, match="quantized already"):
        model_download.preflight(settings)
    settings = api.Settings(model=quantized_folder, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(model_download, "WORLD_SIZE", 2)
        with pytest.raises(ValueError, match="one GPU"):
            model_download.preflight(settings)
    monkeypatch.setattr(model_download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        model_download.preflight(settings)


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "350000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_a_containers_quota_of_cpus_is_kept(tmp_path, monkeypatch, files, allowed):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(model_download, "CGROUPS", tmp_path)
    assert model_download.cpus(8) == allowed


def test_the_generation_thread_keeps_it(tiny_folder, monkeypatch):
    before, used = torch.get_num_threads(), []
    monkeypatch.setattr(model_download, "cpus", lambda most: before + 1)
    try:
        with running(model=tiny_folder) as served:
            hook = served.model.register_forward_pre_hook(
                lambda *_: used.append(torch.get_num_threads())
            )
            assert served.post("x", max_new_tokens=2).ok
            hook.remove()
    finally:
        torch.set_num_threads(before)
    assert {*used} == {before + 1}
