# SPDX-License-Identifier: MIT
"""Weights in fewer bits, as far as a machine without a GPU can tell."""

from pathlib import Path

import pytest
import torch
from conftest import running
from torch import nn

import api


def test_int8_serves_in_half_the_memory(tiny_folder: Path) -> None:
    with running(model=tiny_folder, quantize="int8", dtype="bfloat16") as served:
        model = served.engine.manager.model
        layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
        assert layers and all(m.weight.qdata.dtype == torch.int8 for m in layers)
        asked = [served.post(prompt=f"{n}", max_new_tokens=8) for n in range(4)]
        assert [each.status_code for each in asked] == [200] * 4
        again = served.post(prompt="0", max_new_tokens=8).json()
        assert again["response"] == asked[0].json()["response"]


def test_what_cannot_be_quantized_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = api.Settings(model=tiny_folder, device="cpu", quantize="int4")
    with pytest.raises(ValueError, match="needs a GPU"):
        api.preflight(settings)
    monkeypatch.setattr(api, "GPUS", 2)
    with pytest.raises(ValueError, match="one GPU"):
        api.preflight(settings)
