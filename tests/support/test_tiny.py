# SPDX-License-Identifier: MIT
"""The stand-ins must be what the other tests take them for."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

TEXTS = [
    "你好，世界！",
    "👩\u200d👩\u200d👧\u200d👦 🏽 🇨🇳",
    "it's HE'LL  12345\n\n\tx = [1,2]\r\n   ",
    "한국어 العربية ไทย é \u3000",
    "\x00\x7f\ufeff",
    "",
]

# Texts and their ids in phi-4's own tokenizer.
KNOWN = {
    "it's HE'LL  1234\n": [275, 596, 11947, 6, 4178, 220, 220, 4513, 19, 198],
    "明天是星期四。": [31958, 36827, 21043, 78519, 23538, 64803, 1811],
    "👩\u200d👧": [9468, 239, 102, 378, 235, 9468, 239, 100],
    " \n\t y": [720, 197, 379],
}


@pytest.fixture(scope="module")
def phi4(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny.phi4_tokenizer(tmp_path_factory.mktemp("phi4"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny.small_tokenizer(tmp_path_factory.mktemp("small"))


def test_phi4_known_ids(phi4: PreTrainedTokenizerBase) -> None:
    ids = phi4.apply_chat_template(
        [{"role": "user", "content": "你好"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == [100264, 882, 100266, 57668, 53901, 100265, 100264, 78191, 100266]
    for text, known in KNOWN.items():
        assert phi4.encode(text) == known
    assert len(phi4) == 100352
    assert phi4.eos_token_id == 100265
    assert phi4.bos_token_id == 100257
    assert phi4.pad_token_id == 100349
    assert phi4.convert_tokens_to_ids(["<|endofprompt|>", "<|dummy_87|>"]) == [
        100276,
        100351,
    ]
    assert phi4.model_max_length == 16384


def test_phi4_special_tokens_swallow_white_space(phi4: PreTrainedTokenizerBase) -> None:
    assert phi4.encode("a \n<|im_end|> b") == [64, 100265, 65]


def test_phi4_template(phi4: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "system", "content": " be brief\n"},
        {"role": "user", "content": "{{ 1 }} <b>"},
        {"role": "tool", "content": "dropped"},
        {"role": "assistant", "content": ""},
    ]
    text = (
        "<|im_start|>system<|im_sep|> be brief\n<|im_end|>"
        "<|im_start|>user<|im_sep|>{{ 1 }} <b><|im_end|>"
        "<|im_start|>assistant<|im_sep|><|im_end|>"
    )
    assert phi4.apply_chat_template(turns, tokenize=False) == text
    prompt = phi4.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == text + "<|im_start|>assistant<|im_sep|>"


@pytest.mark.parametrize("name", ["phi4", "small"])
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_small_tokens_are_bytes(small: PreTrainedTokenizerBase) -> None:
    assert small.encode("你é") == list("你é".encode())
    assert len(small.encode("user")) == 1
    assert len(small) < 400


def answers(folder: Path, questions: Sequence[str], **sampling: object) -> list:
    """Return the ids of a 24-token answer to each of equally long questions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    output = model.generate(
        **prompts, max_new_tokens=24, **{"do_sample": False} | sampling
    )
    return output[:, prompts["input_ids"].shape[1] :].tolist()


QUESTIONS = [f"question {number:03}" for number in range(200)]


def test_greedy_answers_differ(tmp_path: Path) -> None:
    tiny.tiny_model(tmp_path, eos="never")
    found = answers(tmp_path, QUESTIONS)
    assert len(set(map(tuple, found))) == len(QUESTIONS)
    assert all(len(set(answer)) > 5 for answer in found)


def test_weights_follow_the_seed(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> str:
        tiny.tiny_model(tmp_path / name, seed=seed)
        content = (tmp_path / name / "model.safetensors").read_bytes()
        return hashlib.sha256(content).hexdigest()

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = weights("a", 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights("b", 0) == first
    assert weights("c", 1) != first


def test_end_tokens(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_model(tmp_path / "never", eos="never")
    torch.manual_seed(0)
    found = answers(tmp_path / "never", QUESTIONS, do_sample=True, top_k=0)
    special = set(tokenizer.added_tokens_decoder)
    assert not any(special & set(answer) for answer in found)
    assert {len(answer) for answer in found} == {24}

    tiny.tiny_model(tmp_path / "always", eos="always")
    ends = set(tokenizer.convert_tokens_to_ids(list(tiny.END_TOKENS)))
    assert {answer[0] for answer in answers(tmp_path / "always", QUESTIONS)} <= ends

    tiny.tiny_model(tmp_path / "natural", eos="natural")
    ended = [
        bool(ends & set(answer)) for answer in answers(tmp_path / "natural", QUESTIONS)
    ]
    assert any(ended) and not all(ended)


def test_bias(tmp_path: Path) -> None:
    tiny.tiny_model(tmp_path, eos="never", bias={65: tiny.CERTAIN})
    assert answers(tmp_path, ["x"]) == [[65] * 24]


def test_phi4_sized_model_records_its_context(tmp_path: Path) -> None:
    tiny.tiny_model(tmp_path, "phi4", layers=1, hidden=32, context=64, eos="never")
    assert len(answers(tmp_path, ["你好"])[0]) == 24
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert config.max_position_embeddings == 64
    assert not config.tie_word_embeddings
