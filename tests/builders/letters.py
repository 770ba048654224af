"""A tokenizer without a file: one token a letter."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 ("_", for padding and whatever is unknown) and 1 to 26."""
    vocabulary = {letter: index for index, letter in enumerate("_abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_", pad_token="_")
