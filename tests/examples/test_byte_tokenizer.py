"""``examples/byte_tokenizer.py``: a token is a byte, whatever the text."""

import importlib
import sys
from pathlib import Path

import pytest

for package in ("tokenizers", "transformers"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
byte_tokenizer = importlib.import_module("byte_tokenizer").byte_tokenizer

TEXTS = (
    "",
    "\0",
    " def read(self):\r\n\t\treturn  0  \n",
    "don 't , a b . x",  # spaces that decoding may tidy up
    "\u0100 is how the special token is written, and <|endoftext|> how others are",
    "".join(map(chr, range(0x800))),
    "€ \ud7ff \ufeff \U0001f600 \U0010ffff \u0301e\u0301 ﬁ Å",  # nothing is normalized
)


@pytest.mark.parametrize("saved", [False, True])
def test_tokens_are_the_bytes_of_utf_8(saved, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_tokenizer()
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == tokenizer.vocab_size == 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens == list(text.encode()), text
        assert tokenizer.decode(tokens) == text


def test_every_byte_has_its_token():
    """Bytes that no UTF-8 has, too: their tokens are there, and are read as what stands for a broken character."""
    tokenizer = byte_tokenizer()
    for byte in range(256):
        assert tokenizer.decode([byte]) == bytes([byte]).decode("utf-8", "replace")
