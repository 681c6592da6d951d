# SPDX-License-Identifier: MIT
"""Weights in fewer bits, as far as a machine without a GPU can tell."""

from pathlib import Path

import pytest
import torch
from server import running
from torch import nn

import api
import model_download


@pytest.mark.parametrize(
    ("kind", "stored"), [("int8", torch.int8), ("int4", torch.uint8)]
)
def test_served_with_fewer_bits(
    tiny_folder: Path, kind: str, stored: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with running(model=tiny_folder, quantize=kind, dtype="bfloat16") as served:
        modules = served.model.model.layers.modules()
        layers = [each for each in modules if isinstance(each, nn.Linear)]
        assert layers and all(each.weight.dtype == stored for each in layers)
        asked = [served.post(prompt=f"{n}", max_new_tokens=8) for n in range(4)]
        assert [each.status_code for each in asked] == [200] * 4
        again = served.post(prompt="0", max_new_tokens=8).json()
        assert again["response"] == asked[0].json()["response"]
    assert not [each for each in caplog.records if each.name.startswith("bitsandbytes")]


def test_what_cannot_be_quantized_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = api.Settings(model=tiny_folder, device="cpu", quantize="int4")
    monkeypatch.setattr(model_download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        model_download.preflight(settings)
    monkeypatch.setattr(model_download, "WORLD_SIZE", 2)
    with pytest.raises(ValueError, match="one GPU"):
        model_download.preflight(settings)
