# SPDX-License-Identifier: MIT
"""The contract through Ray Serve, on a cluster of two nodes started as README.md says."""

import contextlib
import http.client
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import net
import pytest
import ray_inside
import requests
import tiny
from net import DEADLINE
from server import ROOT, wait_until

README = (ROOT / "README.md").read_text()
START, SERVE = (  # without the comments behind them
    re.findall(rf"^{command} [^#\n]*[^#\s]", README, re.MULTILINE)
    for command in ("ray start", "serve run")
)
KEY = {"Authorization": "Bearer right"}
LONG = 100_000  # tokens that take longer than any deadline
DRAINED = 3000  # tokens that take longer than Ray needs to begin with its end


class Cluster:
    """A replica with one place, on two nodes. Ray listens on all addresses, so it is in a
    network namespace that has only loopback, and is reached through a socket that
    listens out here (ray_inside.py)."""

    def __init__(self, url: str, process: Any, logs: Path) -> None:
        self.url, self.process, self.logs = url, process, logs

    def run(self, command: str) -> None:
        """Run it in there; `ended` waits for that."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ended(self) -> None:
        assert self.process.stdout.readline() == "0\n"

    def serve_logs(self, of: str) -> list[Path]:
        return [*self.logs.glob(f"ray/session_2*/logs/serve/{of}*.log")]

    def health(self, timeout: float) -> requests.Response:
        return requests.get(f"{self.url}/health", timeout=timeout)

    def post(self, timeout: float = DEADLINE, **body: Any) -> requests.Response:
        body = {"prompt": "hello", **body}
        streamed = body.get("stream", False)
        return requests.post(
            self.url, json=body, headers=KEY, timeout=timeout, stream=streamed
        )

    def probe(self, *_: Any) -> int:
        """The status of a short request; 0 if it has to wait for a place."""
        try:
            answer = self.post(timeout=1, max_new_tokens=1)
        except requests.RequestException:
            return 0
        assert answer.ok or int(answer.headers["Retry-After"]) > 0
        return answer.status_code


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if "CI" in os.environ:
        pytest.skip("a cluster takes a minute: run this module by hand")
    if why := ray_inside.why_not():
        pytest.skip(why)
    model = tmp_path_factory.mktemp("ray") / "tiny"
    tiny.tiny_model(model, layers=1, hidden=32, context=2**17, eos="never")
    small = "--num-cpus=1 --object-store-memory=80000000"
    commands = [f"{line.replace('HEAD', '127.0.0.1')} {small}" for line in START]
    assert len(commands) == 2, commands
    settings = {"replicas": 1, "model": model, "device": "cpu", "dtype": "float32"}
    settings |= {"max_in_flight": 1, "max_waiting": 0, "cache_tokens": 2**17}
    settings |= {"drain_timeout": 2 * DEADLINE}
    commands.append(f"{SERVE[0]} --non-blocking")
    commands[-1] += "".join(f" {name}={value}" for name, value in settings.items())
    listener = socket.create_server(("127.0.0.1", 0))
    # Not in pytest's folder: the path of a socket may have 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name,
        (Path(name) / "inside.log").open("w") as log,
        listener,
        subprocess.Popen(
            [
                *ray_inside.ISOLATED,
                sys.executable,
                ray_inside.__file__,
                str(listener.fileno()),
            ],
            cwd=ROOT,
            env=ray_inside.environment(Path(name)) | {"PHI4_API_KEY": "right"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            pass_fds=[listener.fileno()],
        ) as process,
    ):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        served = Cluster(url, process, Path(name))
        try:
            for command in commands:
                served.run(command)
                served.ended()
            served.ready = served.health(DEADLINE)
            yield served
        finally:
            process.kill()  # and with it all that it has started
            print((served.logs / "inside.log").read_text()[-5000:])


def test_requests_come_when_the_model_is_loaded(cluster: Cluster) -> None:
    assert (cluster.ready.status_code, cluster.ready.json()["status"]) == (200, "ok")

    def first(log: str, event: str) -> str:
        """When Ray's log has it first."""
        text = "\n".join(path.read_text() for path in cluster.serve_logs(log))
        return min(re.findall(rf"^\S+ ([\d-]+ [\d:,]+) .*{event}", text, re.MULTILINE))

    assert first("replica", "ready: tiny on cpu") < first("proxy", "ring .* 1 replicas")


def test_a_stream_adds_up_to_the_plain_answer(cluster: Cluster) -> None:
    plain = cluster.post(max_new_tokens=40)
    assert plain.headers["X-Completion-Tokens"] == "40"
    deltas, last = net.told(cluster.post(max_new_tokens=40, stream=True))
    assert len(deltas) > 10
    assert "".join(deltas) == last["response"] == plain.json()["response"]


def test_the_chat_page_and_the_docs_need_no_key(cluster: Cluster) -> None:
    page = requests.get(cluster.url, timeout=DEADLINE)
    assert page.ok and "<textarea" in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    docs = requests.get(f"{cluster.url}/docs", timeout=DEADLINE)
    assert docs.ok
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', docs.text):
        assert requests.get(cluster.url + path, timeout=DEADLINE).ok, path


def test_keys(cluster: Cluster) -> None:
    answer = requests.post(cluster.url, json={"prompt": "hello"}, timeout=DEADLINE)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("given", ["the-one", None])
@pytest.mark.parametrize("prompt", ["hello", 5])
def test_one_request_id(cluster: Cluster, given: str | None, prompt: Any) -> None:
    headers = KEY | ({"X-Request-ID": given} if given else {})
    body = {"prompt": prompt, "max_new_tokens": 3}
    answer = requests.post(cluster.url, json=body, headers=headers, timeout=DEADLINE)
    assert answer.status_code == (200 if prompt == "hello" else 422)
    [told] = answer.raw.headers.getlist("x-request-id")
    assert told == (given or told) != ""
    # The server's own line, by the same name.
    line = f"{told} POST / {answer.status_code}"
    line += r" in=\d+ out=3 " if answer.ok else ""
    logs = cluster.serve_logs("replica")
    wait_until(lambda: any(re.search(line, log.read_text()) for log in logs))


@pytest.mark.parametrize("stream", [True, False])
def test_full_is_a_503_and_leaving_makes_room(cluster: Cluster, stream: bool) -> None:
    body = {"prompt": "hello", "max_new_tokens": LONG, "stream": stream}
    headers = KEY | {"Content-Type": "application/json"}
    address = cluster.url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(address)) as client:
        client.request("POST", "/", json.dumps(body), headers)
        if stream:
            assert client.getresponse().read(5) == b"data:"
        wait_until(lambda: cluster.probe() == 0)
        with ThreadPoolExecutor(6) as pool:  # each of two proxies lets one wait
            statuses = {*pool.map(cluster.probe, range(6))}
        assert 503 in statuses and 200 not in statuses
    wait_until(lambda: cluster.probe() == 200)


def test_an_answer_in_flight_outlives_the_application(cluster: Cluster) -> None:
    answer = cluster.post(max_new_tokens=DRAINED, stream=True)

    def gone() -> bool:
        with contextlib.suppress(requests.RequestException):  # one waits for the place
            return cluster.health(1).status_code == 404
        return False

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(net.told, answer)
        cluster.run("python -c 'from ray import serve; serve.delete(\"default\")'")
        wait_until(gone)
        assert not reading.done(), "too short an answer to tell"
        deltas, last = reading.result(2 * DEADLINE)
    assert "".join(deltas) == last["response"]
    assert len(last["response"]) > DRAINED / 4
    cluster.ended()


# ------------------------------------------------------------------------------
# The builder
# ------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Any]:
    """Gives the deployment that README.md's cluster.py describes."""
    build = runpy.run_path(str(ray_inside.save_cluster(tmp_path)))["app"]
    return lambda **arguments: build(arguments)._bound_deployment


def test_a_replica_has_a_gpu_unless_it_runs_on_the_cpu(built: Any) -> None:
    assert built().ray_actor_options["num_gpus"] == 1
    assert built(device="cuda:0").ray_actor_options["num_gpus"] == 1
    for arguments in ({"device": "cpu"}, {"demo": "true"}):
        options = built(**arguments, cpus="3").ray_actor_options
        assert (options["num_gpus"], options["num_cpus"]) == (0, 3)


def test_replicas_follow_the_requests_in_flight_if_asked(built: Any) -> None:
    def scale(**arguments: str) -> tuple[int, int, float]:
        config = built(**arguments)._deployment_config.autoscaling_config
        return config.min_replicas, config.max_replicas, config.target_ongoing_requests

    assert scale() == (1, 1, 256)
    assert scale(replicas="4", demo="true") == (4, 4, 16)
    assert scale(max_replicas="8", max_in_flight="32") == (1, 8, 32)
    with pytest.raises(ValueError):
        built(replicas="4", max_replicas="2")


def test_no_replica_is_sent_more_than_it_takes(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert built().max_ongoing_requests == 3 * 256
    monkeypatch.setenv("PHI4_MAX_IN_FLIGHT", "10")  # of the machine that runs `serve`
    assert built(max_waiting="5").max_ongoing_requests == 15
    drained = built(drain_timeout="100")._deployment_config.graceful_shutdown_timeout_s
    assert drained > 100


def test_the_command_of_the_readme(built: Any) -> None:
    for command in SERVE:
        program, *arguments = shlex.split(command)
        assert arguments[:2] == ["run", "cluster:app"], program
        assert built(**dict(each.split("=") for each in arguments[2:]))


def test_a_wrong_argument_is_named(built: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        built(max_tokens="5")
