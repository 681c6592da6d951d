# SPDX-License-Identifier: MIT
"""A tiny model that says what a test wants, and a gate before its forward passes."""

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import overlap
import tiny
import torch
from transformers import Phi3ForCausalLM

LAST = 255  # the scripted model counts its tokens up to here, and starts again


@torch.no_grad()
def chain_model(folder: Path, logits: torch.Tensor) -> None:
    """Write a model to `folder` that looks at the last token only.

    `logits` is (vocabulary, vocabulary): row t holds the logits of what follows
    token t. The tokenizer is `tiny.small_tokenizer`.
    """
    hidden = 8 * math.ceil(len(logits) / 8)
    tiny.tiny_model(folder, hidden=hidden, layers=1, context=2048)
    model = Phi3ForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    # One-hot embeddings, which the final norm scales to the length sqrt(hidden).
    model.model.embed_tokens.weight.copy_(torch.eye(hidden)[: len(logits)])
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, : len(logits)] = logits.T / math.sqrt(hidden)
    model.save_pretrained(folder)


def counting_model(folder: Path) -> None:
    """Write a model whose answer to everything is the tokens 0, 1, 2 ... LAST, 0 ..."""
    size = len(tiny.small_tokenizer(folder))
    logits = torch.full((size, size), -50.0)
    logits[:, 0] = 0.0
    logits[range(LAST), range(1, LAST + 1)] = 50.0
    chain_model(folder, logits)


def teach(monkeypatch: Any, engine: Any, pieces: Sequence[bytes]) -> None:
    """Let an engine of the counting model say these pieces, one per token, and end."""
    assert len(pieces) < LAST
    table = [*pieces, *[None] * (len(engine.token_bytes) - len(pieces))]
    monkeypatch.setattr(engine, "token_bytes", table)
    config = engine.manager.generation_config
    monkeypatch.setattr(config, "eos_token_id", [len(pieces)])


class Gate:
    """Stands before each forward pass of a server's model; open at first and at the
    end of its `with`."""

    def __init__(self, engine: Any) -> None:
        self.changed, self.left, self.broken = threading.Condition(), math.inf, False
        engine.manager.model.register_forward_pre_hook(self.wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.allow()

    def allow(self, passes: float = math.inf) -> None:
        """Let this many more forward passes through."""
        with self.changed:
            # One more where an answer's token is read while the next step runs.
            self.left = passes + (overlap.WANTED and passes > 0)
            self.changed.notify_all()

    def fail(self) -> None:
        """Let the next forward pass raise, which ends the generation thread."""
        with self.changed:
            self.broken = True
            self.changed.notify_all()

    def wait(self, *_: Any) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.left > 0 or self.broken)
            if self.broken:
                self.broken, self.left = False, math.inf
                raise RuntimeError("injected")
            self.left -= 1
