# SPDX-License-Identifier: MIT
"""Weights in fewer bits, as far as a machine without a GPU can tell."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from server import running
from torch import nn

import api
import model_download

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("kind", "stored", "error"),
    [("int8", torch.int8, 0.012), ("int4", torch.uint8, 0.095)],
)
def test_served_with_fewer_bits(
    tiny_folder: Path, kind: str, stored: torch.dtype, error: float
) -> None:
    """Rounded while it loads, and computed with what the rounded weights stand for."""
    with running(model=tiny_folder, quantize=kind, dtype="bfloat16") as served:
        model = served.model
        weights = load_file(tiny_folder / "model.safetensors")
        named = dict(model.model.layers.named_modules(prefix="model.layers"))
        layers = {k: v for k, v in named.items() if isinstance(v, nn.Linear)}
        assert layers and all(v.weight.dtype == stored for v in layers.values())
        assert model.lm_head.weight.dtype == torch.bfloat16
        # Small steps cost more: each would unpack the weights.
        assert served.token_budget == api.SHARED_TOKENS
        answers = [served.answer(f"{n}", max_new_tokens=8) for n in range(4)]
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            tiny_folder, dtype="bfloat16"
        )
        for name, layer in layers.items():
            exact = weights[f"{name}.weight"].float()
            found = model_download.unpack(layer.weight, layer.weight_scale)
            assert (found - exact).norm() < error * exact.norm(), name
            plain.get_submodule(name).weight.data = found
    plain.save_pretrained(folder := tiny_folder.parent / f"unpacked-{kind}")
    for path in tiny_folder.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    with running(model=folder, dtype="bfloat16") as served:
        assert [served.answer(f"{n}", max_new_tokens=8) for n in range(4)] == answers
        assert served.token_budget == api.SMALL_STEP


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounding_is_undone_within_half_a_step(kind: str) -> None:
    """Of each row, or of each group: zeros, a largest below and above 0, and one that is
    far larger than the others, whose group alone loses by it."""
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1], x[2, 5], x[3, 5], x[4, 70] = 0, -9, 9, 500
    x[5] *= 2.0**-30
    packed, scale = model_download.ROUND[kind](x)
    groups = 1 if kind == "int8" else 128 // model_download.INT4_GROUP
    assert packed.shape == (6, 128 if kind == "int8" else 64)
    assert scale.shape == (6, groups)
    found = model_download.unpack(packed, scale).float()
    step = scale.float().abs().repeat_interleave(128 // groups, 1)
    wrong = (found - x.float()).abs()
    assert (wrong <= 0.51 * step + 0.005 * x.float().abs()).float().mean() > 0.97
    assert (wrong <= 1.02 * step + 0.005 * x.float().abs()).all()  # 8, where 7 is most
    assert not found[1].any()
    largest = x.float().abs().unflatten(1, (groups, -1)).amax(2)
    torch.testing.assert_close(
        found.abs().unflatten(1, (groups, -1)).amax(2), largest, rtol=0.01, atol=0
    )


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_it_is_bfloat16_that_is_rounded(
    tiny_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a CPU that is faster in float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    options = {"model": tiny_folder, "device": "cpu", "quantize": kind}
    settings = api.Settings(**options)
    model_download.preflight(settings)
    assert settings.dtype == "bfloat16"
    plain = api.Settings(model=tiny_folder, device="cpu")
    model_download.preflight(plain)
    assert plain.dtype == "float32"
    with pytest.raises(ValueError, match="not for rounded weights"):
        model_download.preflight(api.Settings(**options, dtype="float32"))


def small_qwen(**sizes: int) -> transformers.PreTrainedModel:
    config = transformers.Qwen2Config(
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        **{"hidden_size": 64, "intermediate_size": 128, **sizes},
    )
    return transformers.AutoModelForCausalLM.from_config(config).bfloat16()


def test_a_bias_is_kept(tmp_path: Path) -> None:
    """phi-4 has none; models of other families have."""
    model = small_qwen()
    attention = model.model.layers[0].self_attn
    attention.v_proj.bias.data.uniform_(-9, 9)
    model.save_pretrained(tmp_path)
    quantizer = model_download.rounding("int8", api.Linear)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="bfloat16", quantization_config=quantizer
    )
    asked = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        exact, found = (m(asked).logits.float() for m in (model, rounded))
    assert type(rounded.model.layers[0].self_attn.v_proj) is api.Linear
    assert (found - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_a_layer_takes_rows_without_a_batch(kind: str) -> None:
    """As models call layers that have some of the tokens only."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    weight, layer.weight_scale = model_download.ROUND[kind](
        layer.weight.data.bfloat16()
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias.data = layer.bias.data.bfloat16()
    layer.__class__ = api.Linear
    x = torch.randn(2, 3, 64).bfloat16()
    found = layer(x)
    assert found.shape == (2, 3, 32)
    assert len(found.unique()) > 100
    assert torch.equal(layer(x.flatten(0, 1)), found.flatten(0, 1))


def test_experts_cannot_be_rounded(tmp_path: Path) -> None:
    """They are no linear layers, and would stay as large as they are."""
    config = transformers.MixtralConfig(
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=64,
        intermediate_size=64,
        num_local_experts=2,
        vocab_size=100,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    quantizer = model_download.rounding("int8", api.Linear)
    with pytest.raises(ValueError, match=r"weights of Mixtral\w+ cannot be rounded"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype="bfloat16", quantization_config=quantizer
        )


def test_features_that_have_no_halves_are_named(tmp_path: Path) -> None:
    small_qwen(intermediate_size=96).save_pretrained(tmp_path)
    quantizer = model_download.rounding("int4", api.Linear)
    with pytest.raises(ValueError, match=r"int4 cannot halve Linear\(in_features=96"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype="bfloat16", quantization_config=quantizer
        )


def test_what_cannot_be_quantized_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = api.Settings(model=tiny_folder, device="cpu", quantize="int4")
    monkeypatch.setattr(model_download.importlib.util, "find_spec", lambda name: None)
    model_download.preflight(settings)  # needs no further package
    monkeypatch.setattr(model_download, "WORLD_SIZE", 2)
    with pytest.raises(ValueError, match="one GPU"):
        model_download.preflight(settings)


def float8_layers(model: nn.Module) -> list[nn.Module]:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert layers.pop() is model.lm_head and model.lm_head.weight.dtype != E4M3
    return layers


def test_served_in_float8(tiny_folder: Path, tmp_path: Path) -> None:
    """Rounded while it loads; and from a folder of FP8_DYNAMIC, with equal answers."""
    with running(model=tiny_folder, quantize="fp8", dtype="bfloat16") as served:
        layers = float8_layers(served.model)
        assert layers and all(each.weight.dtype == E4M3 for each in layers)
        assert served.token_budget == api.SMALL_STEP
        weights = load_file(tiny_folder / "model.safetensors")
        for name, layer in served.model.named_modules():
            if layer in layers:
                exact = weights[f"{name}.weight"]
                found = layer.weight.float() * layer.weight_scale
                # 3 bits behind the point: half of the last, of numbers down to 2**-6
                # of the scale, below which their distances stay the same.
                torch.testing.assert_close(
                    found, exact.float(), rtol=2**-4, atol=0.002 * float(exact.max())
                )
        expected = [served.answer(f"{n}", max_new_tokens=8) for n in range(4)]
        folders = [tmp_path / "exact", tmp_path / "rounded"]
        for folder, kind in zip(folders, (torch.float32, torch.bfloat16), strict=True):
            save_as_float8(tiny_folder, folder, served.model, kind)
    for folder in folders:
        with running(model=folder, dtype="bfloat16") as served:
            for layer in float8_layers(served.model):
                assert layer.weight.dtype == E4M3
                assert layer.weight_scale.dtype == torch.float32  # the kernels read it
            assert served.token_budget == api.SMALL_STEP
            answers = [served.answer(f"{n}", max_new_tokens=8) for n in range(4)]
            assert all(answers) and (answers == expected or folder != folders[0])


def save_as_float8(
    source: Path, folder: Path, model: nn.Module, kind: torch.dtype
) -> None:
    """A folder as llm-compressor's FP8_DYNAMIC makes it; its scales are bfloat16."""
    shutil.copytree(source, folder)
    stored = load_file(source / "model.safetensors")
    for name, parameter in model.named_parameters():
        is_scale = name.endswith("_scale")
        value = parameter.detach().clone()
        if is_scale or value.dtype == E4M3:
            stored[name] = value.to(kind) if is_scale else value
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FP8_DYNAMIC
    (folder / "config.json").write_text(json.dumps(config))


BITS = {"num_bits": 8, "type": "float", "symmetric": True, "observer": None}
GROUP = {
    "targets": ["Linear"],
    "weights": BITS | {"strategy": "channel", "dynamic": False},
    "input_activations": BITS | {"strategy": "token", "dynamic": True},
    "output_activations": None,
}
FP8_DYNAMIC = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": GROUP},
    "quantization_status": "compressed",
}


@pytest.mark.parametrize(
    "changed",
    [
        {"ignore": ["lm_head", "model.layers.0.mlp.down_proj"]},
        {"ignore": []},
        {"format": "pack-quantized"},
        {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"config_groups": {"group_0": GROUP, "group_1": GROUP}},
        {"config_groups": {"group_0": GROUP | {"targets": ["re:.*down.*"]}}},
        {"config_groups": {"group_0": GROUP | {"input_activations": None}}},
        {
            "config_groups": {
                "group_0": GROUP | {"weights": BITS | {"strategy": "tensor"}}
            }
        },
    ],
)
def test_other_ways_to_store_float8_are_refused(
    tiny_folder: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    """They would be read as what they are not."""
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FP8_DYNAMIC | changed
    (folder / "config.json").write_text(json.dumps(config))
    settings = api.Settings(model=folder, device="cpu")
    with pytest.raises(ValueError, match="quantized as compressed-tensors"):
        model_download.preflight(settings)


def test_float8_needs_a_card_that_has_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    settings = api.Settings(model=tiny_folder, device="cuda:0", quantize="fp8")
    with pytest.raises(ValueError, match=r"A100 has no float8.*--quantize int8"):
        model_download.preflight(settings)


def test_rows_are_rounded_to_their_largest() -> None:
    x = torch.tensor([[448.0, -1.0], [0.5, 0.25], [0.0, 0.0], [-3e4, 1.0]])
    rounded, scale = model_download.round_to_fp8(x.bfloat16())
    assert rounded.float().tolist()[:3] == [[448.0, -1.0], [448.0, 224.0], [0.0, 0.0]]
    torch.testing.assert_close(
        (rounded.float() * scale)[3, 0], torch.tensor(-3e4), rtol=0.01, atol=0
    )
    assert torch.isfinite(rounded.float()).all()
