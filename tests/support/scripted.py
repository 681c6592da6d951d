# SPDX-License-Identifier: MIT
"""Tiny models that say what a test wants."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from server import Running
from transformers import Phi3ForCausalLM

import api

LAST = 255  # the scripted model counts its tokens up to here, and starts again
EDIT = api.Runner.edit


@torch.no_grad()
def chain_model(folder: Path, logits: torch.Tensor, tokenizer: str = "small") -> None:
    """Write a model to `folder` that looks at the last token only.

    `logits` is (vocabulary, vocabulary): row t holds the logits of what follows
    token t. The tokenizer is one that `tiny.tiny_model` knows.
    """
    hidden = 8 * math.ceil(len(logits) / 8)
    tiny.tiny_model(folder, tokenizer, hidden=hidden, layers=1, context=2048)
    model = Phi3ForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    # One-hot embeddings, which the final norm scales to the length sqrt(hidden).
    model.model.embed_tokens.weight.copy_(torch.eye(hidden)[: len(logits)])
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, : len(logits)] = logits.T / math.sqrt(hidden)
    model.save_pretrained(folder)


def counting_model(folder: Path, tokenizer: str = "small") -> None:
    """Write a model whose answer to everything is the tokens 0, 1, 2 ... LAST, 0 ..."""
    size = len(getattr(tiny, f"{tokenizer}_tokenizer")(folder))
    logits = torch.full((size, size), -50.0)
    logits[:, 0] = 0.0
    logits[range(LAST), range(1, LAST + 1)] = 50.0
    chain_model(folder, logits, tokenizer)


def teach(monkeypatch: Any, served: Running, pieces: Sequence[bytes]) -> None:
    """Let a server of the counting model say these pieces, one per token, and end."""
    assert len(pieces) < LAST
    table = [*pieces, *[None] * (len(served.engine.token_bytes) - len(pieces))]
    monkeypatch.setattr(served.engine, "token_bytes", table)
    monkeypatch.setattr(served.generation_config, "eos_token_id", [len(pieces)])


def prefer(monkeypatch: Any, served: Running, text: bytes) -> None:
    """Let a server of the counting model want to write this text and end, byte by byte.
    Unlike with `teach`, the tokens are the text's own, and what the server does to
    logits counts: where it excludes the byte, the first token comes that it does not.
    Marks of thinking are tokens, where the tokenizer has them."""
    end = served.generation_config.eos_token_id[0]
    names = served.tokenizer.get_vocab()
    marks = {mark: names[mark] for mark in ("<think>", "</think>") if mark in names}
    sizes = [len(token or b"") for token in served.engine.token_bytes]

    def edit_preferred(runner: Any, logits: Any, state: Any, answer: list[int]) -> None:
        # With a GPU's order of things, the last token may not be known yet.
        unknown = api.answer_length(state) - len(answer)
        at = sum(sizes[token] for token in answer) + unknown
        logits.zero_()
        wanted = [
            id_ for mark, id_ in marks.items() if text.startswith(mark.encode(), at)
        ]
        logits[(wanted or [*text[at : at + 1], end])[0]] = 50
        EDIT(runner, logits, state, answer)

    monkeypatch.setattr(api.Runner, "edit", edit_preferred)
    never = property(lambda sampling: False, lambda sampling, value: None)
    monkeypatch.setattr(api.Sampling, "takes_likeliest", never, raising=False)
