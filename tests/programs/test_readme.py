# SPDX-License-Identifier: MIT
"""README.md: its commands are run, its outputs and tables are compared."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark
import net
import pytest
import requests
import torch
from net import DEADLINE, free_port
from openai.types.chat import completion_create_params
from server import ROOT, Running, running, spawned, wait_until

import api
import model_download
import py_api

README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:6006"

# Fenced blocks as (language, text), and their lines where they are commands.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.replace("\\\n", " ").splitlines()
]
# Commands inside of sentences.
INLINE = re.findall(r"`((?:python|pip|HF_ENDPOINT=|export|ssh) ?[^`\n]+)`", README)

# Beginnings of commands that no test can run as printed, and why.
NOT_RUN = {
    "pip install -r requirements.txt && python api.py --demo": ".ci/run does",
    "pip install -r tests/requirements.txt && python -m pytest": ".ci/run does",
    "docker run ": "needs a Docker daemon and a GPU",
    "pip install torch==2.13.0+cu126 ": "would replace the torch that is here",
}
# Commands that install what is installed here, so that no index is asked.
INSTALLED = (
    "pip install -i ",
    "pip install -r requirements.txt '",
)
# Beginnings of commands whose options are checked, because phi-4 itself is too large.
PARSED = ("python model_download.py", "HF_ENDPOINT=", "python api.py")
PARSED += (
    "python tests/measure/benchmark.py",
)  # test_benchmark.py runs it, on a tiny model
PARSED += ("torchrun ",)  # test_parallel.py runs it, on a tiny model
RUN = (*INSTALLED, "curl ", "python py_api.py", "ssh ", "python3 -m venv ")
RUN += ("ray start ", "serve run ")  # by test_ray.py, with the block of cluster.py


def one_with(language: str, part: str = "") -> str:
    """The text of the only block in this language that contains `part`."""
    (text,) = {text for kind, text in BLOCKS if kind == language and part in text}
    return text.strip()


def shown_after(part: str) -> str:
    """The block that follows the one with `part`: its output."""
    first = next(n for n, (_, text) in enumerate(BLOCKS) if part in text)
    return BLOCKS[first + 1][1].strip()


def test_every_block_has_a_test() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    for command in COMMANDS:
        assert command.startswith((*NOT_RUN, *PARSED, *RUN)), f"no test: {command}"
    for known in (*NOT_RUN, *PARSED, *RUN):
        assert any(command.startswith(known) for command in COMMANDS), known
    # The other blocks, which the tests below find by what is in them.
    others = sorted({(kind, text) for kind, text in BLOCKS if kind != "bash"})
    kinds = ["ini", "json", "nginx", *["python"] * 4, "text"]
    assert [kind for kind, _ in others] == kinds


# ------------------------------------------------------------------------------
# Commands, on the demo model as its users start it
# ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_process(demo_folder: Path) -> Iterator[Any]:
    """The real server, from the first command's second half."""
    with spawned(
        "--demo", "--max-new-tokens", "32", "--log-level", "warning"
    ) as served:
        yield served


@pytest.fixture(scope="module")
def demo(demo_process: Any) -> str:
    """Its HOST:PORT."""
    return f"127.0.0.1:{demo_process.port}"


def bash(command: str, demo: str, **options: Any) -> str:
    """What a command prints, run against the demo server; `python` is this one."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths)}
    done = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, demo)],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def timeless(text: str) -> str:
    """The text with one and the same time in it."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)


@pytest.mark.demo
def test_the_demo_says_that_it_is_one(demo_process: Any, demo_folder: Path) -> None:
    lines = demo_process.log().splitlines()
    [line] = [line for line in lines if "demo model" in line]
    assert "SmolLM2-135M" in line and "not phi-4" in line
    health = requests.get(demo_process.url + "/health", timeout=5).json()
    assert health["model"] == f"{demo_folder.name} (demo model, not phi-4)"
    assert "it is not phi-4" in README


@pytest.mark.demo
def test_the_first_curl_prints_what_is_shown(demo: str) -> None:
    command = one_with("bash", "curl http")
    told = json.loads(timeless(bash(command, demo)))
    shown = json.loads(timeless(shown_after(command)))
    assert told == shown
    assert list(told) == list(shown)


@pytest.mark.demo
def test_a_stream_is_as_described(demo: str) -> None:
    command = one_with("bash", "curl http").replace("curl ", "curl -N ")
    plain = timeless(bash(command, demo))
    told = timeless(bash(command.replace('?"}', '?", "stream": true}'), demo))
    first, *_, last, end = told.split("\n\n")
    assert f"`{first}`" in README
    event, data = end.split("\n")
    assert f"`{event}`" in README
    shown = data.partition(', "total')[0].replace('":', '": ').replace(',"', ', "')
    assert shown.partition(', "total')[0] + ", ...}`" in README
    assert (
        last.startswith('data: {"response":') and '`data: {"response": ...}`' in README
    )
    assert last == f"data: {plain}"


@pytest.mark.demo
@pytest.mark.parametrize(
    "command",
    sorted({c for c in COMMANDS + INLINE if c.startswith("python py_api.py")}),
)
def test_the_command_line_client_answers(command: str, demo: str) -> None:
    command += f" --url http://{ADDRESS}/"
    told = bash(command, demo, input="What is the capital of France?\n")
    assert told
    if "France" in command or "--chat" in command:
        assert told == "The capital of France is Paris."


@pytest.mark.demo
def test_python_with_a_history(demo: str) -> None:
    told = python(one_with("python", "import requests"), demo)
    first, second = told.split("\n", 1)
    assert first == "The capital of France is Paris."
    assert second


@pytest.mark.demo
def test_python_in_one_line(demo: str) -> None:
    (code,) = set(re.findall(r"`(requests\.post[^`]+)`", README))
    assert python(f"import requests\nprint({code})", demo)


@pytest.mark.demo
def test_the_openai_client_in_five_lines(demo: str) -> None:
    code = one_with("python", "from openai")
    assert len([line for line in code.splitlines() if line]) <= 6
    assert code.endswith("# " + python(code, demo))


@pytest.mark.demo
def test_an_object_of_a_class(demo: str) -> None:
    code = one_with("python", "class City")
    before = one_with("python", "from openai")
    assert code.endswith("# " + python(f"{before}\n{code}", demo).splitlines()[-1])


@pytest.mark.demo
def test_an_existing_openai_app_needs_only_the_address(demo: str) -> None:
    code = one_with("python", "from openai").replace('model="phi-4"', 'model="gpt-4o"')
    code = re.sub(r"OpenAI\(.*\)", "OpenAI()", code)
    (exported,) = [line for line in INLINE if line.startswith("export OPENAI")]
    assert "Paris" in bash(f"{exported}; python -c {shlex.quote(code)}", demo)


@pytest.mark.demo
def test_the_body_for_apipost(demo: str) -> None:
    (body,) = set(re.findall(r'`({"prompt": "你好"[^`]*})`', README))
    headers = {"Content-Type": "application/json"}
    url = f"http://{demo}/"
    told = requests.post(url, body.encode(), headers=headers, timeout=DEADLINE)
    assert told.ok, told.text
    assert requests.get(url + "openapi.json", timeout=DEADLINE).json()["paths"]


def python(code: str, demo: str) -> str:
    return bash(f"python -c {shlex.quote(code)}", demo)


@pytest.mark.parametrize(
    "command", sorted({c for c in COMMANDS + INLINE if c.startswith(INSTALLED)})
)
def test_installations_that_are_done(command: str) -> None:
    told = bash(command, "")
    assert "already satisfied: torch==2.13.0" in told
    assert "Downloading" not in told and "Installing" not in told


def test_the_virtual_environment(tmp_path: Path) -> None:
    (command,) = {c for c in COMMANDS + INLINE if " -m venv " in c}
    told = bash(
        f"cd {tmp_path} && {command} && python -c 'import sys; print(sys.prefix)'", ""
    )
    assert told == str(tmp_path / ".venv")


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh")
def test_the_forwarded_port() -> None:
    command = one_with("bash", "ssh -L").replace("PORT", "22022").replace("HOST", "::1")
    told = bash(command.replace("ssh ", "ssh -G "), ADDRESS)
    assert "localforward 6006 [127.0.0.1]:6006" in told
    assert "port 22022" in told and "user root" in told


@pytest.mark.parametrize(
    "command", sorted({c for c in COMMANDS + INLINE if c.startswith(PARSED)})
)
def test_options_of_commands_that_need_phi4(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    words = [word for word in shlex.split(command) if "=" not in word]
    if "api.py" in words:
        api.Settings(_cli_parse_args=words[words.index("api.py") + 1 :])
        return
    if words[1] == "tests/measure/benchmark.py":
        assert benchmark.parse(words[2:]).demo
        return
    asked = []

    def download(source: str, root: Path, repo: str | None) -> Path:
        asked.append(source)
        folder = root / (repo or model_download.MODELSCOPE_REPO)
        if repo:
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_download, "download", download)
    monkeypatch.setattr(sys, "argv", words[1:])
    assert model_download.main() == 0
    assert asked == ["huggingface" if "huggingface" in command else "modelscope"]
    assert capsys.readouterr().out.splitlines()[-1].strip() in COMMANDS + INLINE


# ------------------------------------------------------------------------------
# Tables and claims
# ------------------------------------------------------------------------------


def test_licences() -> None:
    """Those of the code, of phi-4 and of the demo model are named, each source's too."""
    *_, section = README.split("## Versions and licences")
    assert "own code: MIT" in section and "phi-4: MIT" in section
    assert re.search(r"SmolLM2-135M-Instruct: Apache-2\.0", section)
    sources = [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert len(sources) > 40
    for path in sources:
        assert path.read_text().startswith("# SPDX-License-Identifier: MIT\n"), path


def test_the_same_bitsandbytes_is_named(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(model_download, "named_format", lambda _: "bitsandbytes 4-bit")
    with pytest.raises(ValueError) as told:
        settings = api.Settings(model=tiny_folder, device="cpu")
        model_download.preflight(settings)
    named = re.search(r"pip install bitsandbytes==[\d.]+", str(told.value))
    assert named and named[0] in README
    needed = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    assert named[0].removeprefix("pip install ") in needed


def settings_table() -> str:
    """The table of options as the README shows it."""
    lines = ["| Option | Default | Meaning |", "|---|---|---|"]
    for name, field in api.Settings.model_fields.items():
        option, default = name.replace("_", "-"), field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        shown = f"`{default}`" if default != "" else "(empty)"
        lines.append(f"| `--{option}` | {shown} | {field.description} |")
    return "\n".join(lines)


def first_cells(header: str) -> set[str]:
    """What stands in the first column of the table that begins with `header`."""
    _, _, table = README.partition(header)
    rows = re.findall(r"^\| *([^|]*?) *\|", table.partition("\n\n")[0], re.MULTILINE)
    assert rows, header
    return {cell for row in rows for cell in row.replace("`", "").split(", ")}


FIELDS = {
    kind: re.findall(r"`(\w+)`", cell)
    for kind, cell in re.findall(
        r"^\| (Done|Refused|Ignored)[^|]* \| (.*) \|$", README, re.MULTILINE
    )
}
# Values that would change the answer, where 1 would be no such value.
TELLING = {"n": 2, "best_of": 2, "length_penalty": 2, "skip_special_tokens": False}
TELLING |= {"spaces_between_special_tokens": False, "add_generation_prompt": False}
TELLING |= {"modalities": ["audio"], "verbosity": "low"}


def test_every_field_of_the_openai_route_is_in_its_table() -> None:
    """Of OpenAI's, as its own package has them, and of the schema here."""
    schema = py_api.OpenAIRequest.model_json_schema()["properties"]
    refused = {
        name
        for name, field in schema.items()
        if field.get("description") == "Not supported."
    }
    assert set(FIELDS["Refused"]) == refused
    assert set(FIELDS["Done"]) == set(schema) - refused
    theirs = completion_create_params.CompletionCreateParamsBase.__annotations__
    listed = [name for names in FIELDS.values() for name in names]
    assert set(theirs) - {"stream"} <= set(listed)
    assert len(listed) == len(set(listed))


def test_refused_fields_are_refused_and_ignored_ones_are_ignored(
    server: Running,
) -> None:
    def ask(**more: Any) -> requests.Response:
        turns = [{"role": "user", "content": "hello"}]
        return server.post(
            path="/v1/chat/completions", messages=turns, max_tokens=4, **more
        )

    plain = ask().json()["choices"]
    for name in FIELDS["Refused"]:
        told = ask(**{name: TELLING.get(name, 1)})
        assert told.status_code == 400, name
        error = told.json()["error"]
        assert error["message"] == f"{name} is not supported" and error["param"] == name
        assert ask(**{name: None}).status_code == 200, name
    ignored = dict.fromkeys(FIELDS["Ignored"], 1) | {"unheard_of": {"a": 1}}
    assert ask(**ignored).json()["choices"] == plain
    neutral = py_api.NEUTRAL | {
        "logprobs": False,
        "top_logprobs": 0,
        "stop_token_ids": [],
    }
    assert ask(**neutral).json()["choices"] == plain


def test_what_the_model_is_told_of_functions() -> None:
    function = py_api.Function(
        name="get_weather", description="...", parameters={"x": 0}
    )
    printed = one_with("text").replace('"parameters": {...}', '"parameters": {"x": 0}')
    assert py_api.show_functions([function]) == printed
    marked = py_api.without_marks("<tool_call>")
    assert f"`{marked}`" in README


def test_the_table_of_settings_is_that_of_the_code() -> None:
    assert settings_table() in README, settings_table()


def test_the_table_of_fields_is_that_of_the_request() -> None:
    names = first_cells("| Field | Values | Default |\n|---|---|---|\n")
    assert names == set(api.ChatRequest.model_fields)


def test_the_exit_codes_are_those_of_the_code() -> None:
    codes = {0, api.EXIT_LOAD, api.EXIT_WRONG_START, api.EXIT_ENGINE}
    _, _, told = README.partition("Exit codes:")
    assert re.findall(r"\*\*(\d+)\*\*", told.partition("\n\n")[0]) == [
        *map(str, sorted(codes))
    ]


def test_every_address_is_mentioned() -> None:
    for path in [*api.create_app(api.Settings()).openapi()["paths"], "/docs"]:
        assert path in README, path


def test_the_versions_that_are_claimed() -> None:
    pinned = (ROOT / "requirements.txt").read_text()
    for version in set(re.findall(r"torch(?:==| )(\d+\.\d+\.\d+)", README)):
        assert f"torch=={version}\n" in pinned
        assert torch.__version__.startswith(version)
    (ray,) = set(re.findall(r"ray\[serve\]==[\d.]+", README))
    assert f"{ray}\n" in (ROOT / "tests" / "requirements.txt").read_text()
    claimed = re.findall(r"Python (\d\.\d+)", README)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in claimed


STATUSES = first_cells("| Status | When | What to do |\n|---|---|---|\n")


def test_the_table_of_errors_has_all_that_are_raised() -> None:
    text = "".join(Path(module.__file__).read_text() for module in (api, py_api))
    raised = set(re.findall(r"HTTPException\((\d+)", text))
    assert {"400", "503"} <= raised
    assert raised - {"499"} <= STATUSES  # that one's client has left


def test_each_status_in_the_table_happens_as_it_says(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def ask(
        path: str = "/", method: str = "POST", key: str = "right", **body: Any
    ) -> str:
        """The message of the error answer, which goes into `seen`."""
        headers = {"Authorization": f"Bearer {key}"}
        answer = requests.request(
            method, served.url + path, json=body, headers=headers, timeout=DEADLINE
        )
        seen[str(answer.status_code)] = answer
        told = answer.json()
        return told["error"]["message"] if "error" in told else str(told["detail"])

    options = {"max_in_flight": 1, "max_waiting": 0, "max_body_bytes": 1024}
    limits = {"body_timeout": 1, "request_timeout": 1}
    with running(model=tiny_folder, api_key="right", **options, **limits) as served:
        turns = [{"role": "user", "content": "hello"}]
        told = ask(prompt="hello", max_new_tokens=100_000)
        assert "100000" in told and "512" in told  # what the model can hold
        assert "tools" in ask("/v1/chat/completions", messages=turns, tools=[1])
        ask(prompt="hello", key="wrong")
        assert seen["401"].headers["WWW-Authenticate"] == "Bearer"
        ask("/nowhere")
        ask(method="PUT")
        ask(prompt="x" * 2000)
        assert "color" in ask(prompt="hello", color="red")
        half = "POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
        half += "Content-Length: 9\r\n\r\n"  # and no body
        seen["408"] = net.exchanged(served.url, half.encode())
        assert seen["408"].startswith(b"HTTP/1.1 408 ")
        served.gate.close()
        late = served.clients.submit(ask, prompt="hello")  # has the only place
        served.wait_pending(1)
        ask(prompt="hello")
        assert seen["503"].headers["Retry-After"]
        late.result()
        served.gate.allow()
        wait_until(served.idle)
        served.replace(monkeypatch, "apply_template", None)
        ask(prompt="hello")
        monkeypatch.setattr(served.engine.settings, "api_key", "")
        told = {"Host": "phi4.example"}
        seen["403"] = requests.post(served.url, json={}, headers=told, timeout=DEADLINE)
        assert "--allowed-hosts" in seen["403"].text
    assert set(seen) == STATUSES


# ------------------------------------------------------------------------------
# nginx and systemd
# ------------------------------------------------------------------------------

NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.fixture
def nginx(tmp_path: Path, server: Running) -> Iterator[str]:
    """The address of an nginx with the README's block, in front of `server`."""
    if NGINX is None and not os.environ.get("CI"):
        pytest.skip("nginx is not installed")
    port = free_port()
    block = one_with("nginx").replace(ADDRESS, server.url[7:])
    block = block.replace("listen 80;", f"listen 127.0.0.1:{port};")
    block = block.replace("client_header_timeout 10s;", "client_header_timeout 1s;")
    assert f":{port};" in block and server.url in block and " 1s;" in block
    paths = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid;\n"
        f"events {{}}\nhttp {{ access_log off; {paths}"
        f"{block} }}\n"
    )
    log = tmp_path / "log"
    with log.open("w") as output:
        command = [NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", "stderr"]
        process = subprocess.Popen(command, stderr=output)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(ready)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(DEADLINE)


def test_nginx_passes_answers_and_headers_on(nginx: str, server: Running) -> None:
    body = {"prompt": "hello", "max_new_tokens": 5}
    answer = requests.post(nginx, json=body, timeout=DEADLINE)
    assert answer.json()["response"] == server.answer(max_new_tokens=5)
    assert answer.headers["X-Finish-Reason"] == "length"
    assert answer.headers["X-Request-ID"]


def test_nginx_shows_the_chat_page(nginx: str) -> None:
    page = requests.get(nginx, timeout=DEADLINE)
    assert page.text == api.CHAT_PAGE
    assert "script-src 'sha256-" in page.headers["Content-Security-Policy"]


def test_nginx_passes_each_delta_on_at_once(nginx: str, server: Running) -> None:
    body = {"prompt": "hello", "max_new_tokens": 20, "stream": True}
    expected = server.answer(max_new_tokens=20)
    with server.gate as gate:
        gate.allow(12)  # prompt and some tokens: the answer cannot end yet
        answer = requests.post(nginx, json=body, stream=True, timeout=10)
        stream = net.events(answer)
        first = json.loads(next(stream)[1])["delta"]
        gate.allow()
        rest = [json.loads(data) for event, data in stream if event]
    *deltas, whole, end = rest
    assert first + "".join(item["delta"] for item in deltas) == expected
    assert whole["response"] == expected
    assert end["finish_reason"] == "length"


def test_nginx_frees_the_slot_of_a_client_that_left(
    nginx: str, server: Running
) -> None:
    body = {"prompt": "hello", "max_new_tokens": 400, "stream": True}
    with server.gate as gate:
        gate.allow(12)
        answer = requests.post(nginx, json=body, stream=True, timeout=10)
        stream = net.events(answer)  # kept: losing it would close the connection
        next(stream)
        assert server.pending
        answer.close()
        server.wait_pending(0)
    wait_until(server.idle)


def test_nginx_refuses_a_large_body_and_ends_half_a_header(nginx: str) -> None:
    refused = requests.post(nginx, b"x" * (2 << 20), timeout=DEADLINE)
    assert refused.status_code == 413
    assert "nginx" in refused.text  # not from the server behind it
    # Fails at the deadline where nginx has no limit.
    net.exchanged(nginx, b"POST / HTTP/1.1\r\nHost: x\r\nX-Half: ")


def test_the_systemd_unit(tmp_path: Path) -> None:
    text = one_with("ini", "ExecStart")
    restarted = f"Restart=on-failure\nRestartSec=10\nRestartPreventExitStatus={api.EXIT_WRONG_START}\n"
    assert restarted in text
    assert (
        int(re.search(r"TimeoutStopSec=(\d+)", text)[1]) > api.Settings().drain_timeout
    )
    program, options = re.search(r"ExecStart=(\S+) api\.py (.*)", text).groups()
    api.Settings(_cli_parse_args=options.split())
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("systemd-analyze is not installed; the unit was only read")
    unit = tmp_path / "phi-4.service"
    unit.write_text(text.replace(program, sys.executable))
    done = subprocess.run(
        [verifier, "verify", unit],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")
