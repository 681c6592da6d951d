# SPDX-License-Identifier: MIT
"""GET /metrics, and pages of other origins."""

from pathlib import Path

import pytest
import requests
from net import DEADLINE
from prometheus_client.parser import text_string_to_metric_families
from server import Running, narrow, running, wait_until


def figures(server: Running) -> dict[tuple[str, ...], float]:
    """The samples by name and label values, through Prometheus' own parser."""
    response = requests.get(server.url + "/metrics", timeout=DEADLINE)
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    families = [*text_string_to_metric_families(response.text)]
    assert all(family.documentation for family in families)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_requests_and_tokens_are_counted(server: Running) -> None:
    before = figures(server)
    done = server.post("count", max_new_tokens=7)
    streamed = server.post("count", max_new_tokens=7, stream=True)
    assert streamed.status_code == 200
    assert server.post("count", top_p=9).status_code == 422
    assert server.post("x" * 600).status_code == 400  # tokens that nobody computed
    requests.get(server.url + "/nowhere", timeout=DEADLINE)
    after = figures(server)

    def grown(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("phi4_requests_total", "/", "200") == 2
    assert grown("phi4_requests_total", "/", "422") == 1
    assert grown("phi4_requests_total", "other", "404") == 1
    prompt = int(done.headers["X-Prompt-Tokens"])
    assert grown("phi4_prompt_tokens_total") == 2 * prompt
    assert grown("phi4_completion_tokens_total") == 14
    for name in ("phi4_time_to_first_token", "phi4_time_per_output_token"):
        assert grown(f"{name}_seconds_count") == 2
        assert grown(f"{name}_seconds_sum") > 0
    # Of the process, as Prometheus' library tells them.
    assert {name for name, *_ in after} > {"python_info", "process_open_fds"}


def test_gauges_show_what_is_in_hand(tiny_folder: Path) -> None:
    names = "requests_in_flight", "requests_waiting", "cache_usage_ratio"
    with narrow(tiny_folder) as served:

        def gauges() -> list[float]:
            now = figures(served)
            return [now[f"phi4_{name}",] for name in names]

        *none, idle = gauges()
        assert none == [0, 0] and 0 <= idle < 0.01
        served.gate.allow(2)
        asked = [served.submit(f"{n}" * 300, max_new_tokens=9) for n in range(3)]
        served.wait_pending(3)
        wait_until(lambda: served.gate.held)
        *some, used = gauges()
        assert some == [2, 1]
        assert idle + 0.01 < used < 0.1  # 300 to 700 tokens of 16384
        served.gate.allow()
        assert all(each.result().ok for each in asked)
        wait_until(served.idle)
        assert gauges() == [0, 0, idle]  # what is kept for sharing can be given up


def preflight(server: Running, origin: str) -> requests.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return requests.options(server.url, headers=headers, timeout=DEADLINE)


def ask(server: Running, origin: str, key: str = "none") -> requests.Response:
    """What follows a preflight, or comes without one."""
    headers = {"Origin": origin, "Cookie": "a=b", "Authorization": f"Bearer {key}"}
    body = {"prompt": "x", "max_new_tokens": 1}
    return requests.post(server.url, json=body, headers=headers, timeout=DEADLINE)


def test_no_other_origin_may_ask(server: Running) -> None:
    for answer in (preflight(server, "https://a.example"), ask(server, "null")):
        assert not [name for name in answer.headers if "access-control" in name.lower()]


def test_the_origins_of_the_setting_may_ask(tiny_folder: Path) -> None:
    origins = "https://a.example, https://b.example:8443"
    with running(model=tiny_folder, cors_origins=origins, api_key="k") as served:
        for origin in origins.split(", "):
            allowed, answered, refused = (
                preflight(served, origin),  # a browser sends no key with it
                ask(served, origin, "k"),
                ask(served, origin, "wrong"),  # the page may read why
            )
            assert allowed.ok and answered.ok and refused.status_code == 401
            for answer in (allowed, answered, refused):
                assert answer.headers["Access-Control-Allow-Origin"] == origin
                assert "Access-Control-Allow-Credentials" not in answer.headers
        with pytest.MonkeyPatch.context() as patch:
            served.replace(patch, "apply_template", None)  # so that it fails
            failed = ask(served, origin, "k")
        assert failed.status_code == 500
        assert failed.headers["Access-Control-Allow-Origin"] == origin
        for origin in ("https://c.example", "https://a.example.evil", "null"):
            for answer in (preflight(served, origin), ask(served, origin, "k")):
                assert "Access-Control-Allow-Origin" not in answer.headers


def test_any_origin_never_goes_with_credentials(tiny_folder: Path) -> None:
    with running(model=tiny_folder, cors_origins="*") as served:
        origin = "https://a.example"
        for answer in (preflight(served, origin), ask(served, origin)):
            assert "Access-Control-Allow-Credentials" not in answer.headers
