"""Examples become token ids whose labels are on what the model should say, and nowhere else."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from sorsa_quickstart.answering import BASE
from sorsa_transformers.data import IGNORED, encode, encode_all


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def said(item: dict[str, list[int]], tokenizer) -> str:
    return tokenizer.decode([label for label in item["labels"] if label != IGNORED])


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "Two and two?", "completion": " four"},
        {"question": "Two and two?", "answer": " four"},
        {"instruction": "Two and two?", "output": " four"},
    ],
)
def test_a_completion_is_labelled_with_its_end_and_the_prompt_is_not(example, tokenizer):
    item = encode(example, tokenizer, max_length=64)
    assert len(item["input_ids"]) == len(item["labels"])
    assert item["input_ids"][0] == tokenizer.bos_token_id
    assert said(item, tokenizer) == " four" + tokenizer.eos_token
    assert "Two and two?" in tokenizer.decode(item["input_ids"])


@pytest.mark.parametrize("marked", [True, False], ids=["template-marks-turns", "template-without-marks"])
def test_the_assistants_words_are_labelled(marked, tokenizer):
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ]
    template = tokenizer.chat_template
    try:
        if not marked:
            tokenizer.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        text = said(encode({"messages": messages}, tokenizer, max_length=64), tokenizer)
    finally:
        tokenizer.chat_template = template
    assert "?" not in text
    assert "2" in text
    assert ("1" in text) == marked  # without marks, only the last turn can be told apart


def test_long_examples_are_cut_and_those_without_a_completion_left_out(tokenizer):
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a " * 100, "completion": "b"}
    assert len(encode(long, tokenizer, max_length=16)["input_ids"]) == 16
    assert len(encode_all([short, long], tokenizer, max_length=16)) == 1


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"text": "a"}], "expected messages, or one of prompt/completion"),
        ([{"prompt": "a " * 100, "completion": "b"}], "None of 1 examples has a completion within 16 tokens"),
        ([], "None of 0 examples"),
    ],
)
def test_data_that_cannot_be_trained_on_is_an_error(examples, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode_all(examples, tokenizer, max_length=16)
