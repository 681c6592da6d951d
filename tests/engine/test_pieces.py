# SPDX-License-Identifier: MIT
"""A long text is tokenised in pieces, which gives the tokens of the whole text."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

import model_download

PARTS = [*"abzA日本語，。！ 12٣½²_'\n\r\t-.…é́💡שلЯＡ  \u00a0\u200b", " don't", "'s"]
PARTS += ["我们", " the ", "हिन्दी", "ﬁ", "<|im_end|>"]
PARTS += ["，你", " a", ", ", "\n\n", "ing"]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(PARTS) for _ in range(rng.randint(0, 80)))


class Pieces:
    """`model_download.PIECE` for texts that are a 500th as long; counts the cuts."""

    def __init__(self) -> None:
        self.pattern = re.compile(
            model_download.PIECE.pattern.replace("4096", "8"), re.DOTALL
        )
        self.cuts = 0

    def findall(self, text: str) -> list[str]:
        found = self.pattern.findall(text)
        self.cuts += max(0, len(found) - 1)
        return found


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    replaced = Pieces()
    monkeypatch.setattr(model_download, "PIECE", replaced)
    return replaced


def load(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["phi4_folder", "demo_folder"])
def test_the_tokens_are_those_of_the_whole_text(
    pieces: Pieces,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    folder = request.getfixturevalue(name)
    monkeypatch.setattr(model_download, "cpus", lambda most: 4)  # 3 pieces at once
    whole, cut = load(folder), load(folder)
    model_download.encode_in_pieces(cut)
    rng = random.Random(20)
    texts = [random_text(rng) for _ in range(2000)]
    found, expected = (
        tokenizer(texts, add_special_tokens=False)["input_ids"]
        for tokenizer in (cut, whole)
    )
    assert found == expected
    assert pieces.cuts > 1000


def test_the_engine_does_so(pieces: Pieces, phi4_server: Any) -> None:
    """On the event loop, and in the threads for longer texts."""
    for length in (10, 600, 3000):
        pieces.cuts = 0
        text = "word " * length
        # 400: more than the model's context holds, which is seen after tokenising.
        assert phi4_server.post(text, max_new_tokens=1).status_code in (200, 400)
        assert pieces.cuts >= length // 4


AS_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
# Words of a tokenizer that lists the letters it knows, as deepseek-llm's does: letters of
# other alphabets go on beyond a space.
LISTED_LETTERS = Split(Regex(r"\s?[A-Za-z]+|\s?[一-龥]+|[，。]"), "isolated")


def change(backend: Tokenizer, what: str) -> None:
    """Change one part of a tokenizer, so that a cut could change the tokens."""
    if what == "normalizer":
        backend.normalizer = normalizers.Prepend("x")
    elif what == "prefix space":
        backend.pre_tokenizer = ByteLevel(add_prefix_space=True)
    elif what == "words across spaces":
        backend.pre_tokenizer = AS_BYTES
    elif what == "no words":
        backend.pre_tokenizer = None
    elif what in WORDS:
        words = Split(Regex(WORDS[what]), "isolated")
        backend.pre_tokenizer = Sequence([words, AS_BYTES])
    else:
        backend.add_tokens([TOKENS[what]])


WORDS = {
    "commas in words": r"[^ 。]+|[ 。]",
    "capitals across spaces": r"\s?[a-z]+|\s?[一-龥]+|[，。]",
    "rare letters across spaces": r"\s?[A-Za-z]+|\s?[一-龠]+|[，。]",
}
TOKENS = {
    "token with a space": AddedToken("z a"),
    "token with a comma": AddedToken("o，h"),
    "token that takes the next space": AddedToken("hello", rstrip=True),
    "token before a word": AddedToken("，hello", single_word=True),
}


@pytest.mark.parametrize(
    "what",
    [
        "normalizer",
        "prefix space",
        "words across spaces",
        "no words",
        *WORDS,
        *TOKENS,
    ],
)
def test_a_tokenizer_whose_tokens_a_cut_could_change_is_left_alone(
    pieces: Pieces, tiny_folder: Path, what: str
) -> None:
    whole, cut = load(tiny_folder), load(tiny_folder)
    for tokenizer in (whole, cut):
        change(tokenizer.backend_tokenizer, what)
    model_download.encode_in_pieces(cut)
    text = "hello hello hello helloz a hello，hello hello，你 hello，hello hello"
    assert cut(text)["input_ids"] == whole(text)["input_ids"]
    assert not pieces.cuts


def test_cuts_are_between_letters_that_were_asked_about(
    pieces: Pieces, tiny_folder: Path
) -> None:
    """Where a tokenizer lists the letters it knows, others may go on beyond a space."""
    whole, cut = load(tiny_folder), load(tiny_folder)
    for tokenizer in (whole, cut):
        words = Sequence([LISTED_LETTERS, AS_BYTES])
        tokenizer.backend_tokenizer.pre_tokenizer = words
    model_download.encode_in_pieces(cut)
    for text in ("שלום עולם זה שלום עולם", "привет мир привет мир"):
        words = cut.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert len(words) == 1  # or this shows nothing
        assert cut(text)["input_ids"] == whole(text)["input_ids"]
        assert not pieces.cuts
    assert cut("hello " * 9)["input_ids"] == whole("hello " * 9)["input_ids"]
    assert pieces.cuts
