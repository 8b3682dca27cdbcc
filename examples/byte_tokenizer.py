"""A Hugging Face tokenizer over bytes: token b is the byte b, and nothing is merged.

What reads a model with its tokenizer, as an evaluation harness does, can then read the small models of the examples.
"""

from __future__ import annotations

from text_data import VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes of UTF-8; any text comes back as it was, and none is taken for a special token.

    Byte 0 begins and ends a text, as in the models' configuration. A token of its own would be one too many for them.
    """
    characters = _characters_of_bytes()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=characters[0],
        eos_token=characters[0],
        # The special token is written as the character that stands for byte 0. In a text this character is two other
        # bytes; without these words it would be read as the special token.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _characters_of_bytes() -> list[str]:
    """The character that stands for each byte inside byte-level vocabularies, as GPT-2 has them.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, others = [], 0
    for byte in range(VOCABULARY):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(0x100 + others))
            others += 1
    return characters
