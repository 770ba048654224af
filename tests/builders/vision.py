"""A tiny LLaVA with its processor, built without a file of theirs, and rows of images for them."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, LlavaProcessor

from builders.models import VISION, tiny_llava
from sorsa_quickstart.answering import load_base

TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
COLOURS = ("red", "green", "blue", "white")


def llava_and_processor() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The processor has the embedded base's tokenizer and one token more, <image>; the model has its vocabulary."""
    tokenizer = load_base()[1]
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    side = {"height": VISION["image_size"], "width": VISION["image_size"]}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class, which this strategy leaves out
        chat_template=TEMPLATE,
    )
    return tiny_llava(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")), processor


def image_rows(kind: str) -> list[dict[str, Any]]:
    """Questions about images of one colour, as TRL's SFT or DPO takes them."""
    side = VISION["image_size"]
    return [
        {
            "prompt": [{"role": "user", "content": "Which colour?"}],
            "images": [Image.new("RGB", (side, side), colour)],
            **({"completion": _said(colour)} if kind == "SFT" else {"chosen": _said(colour), "rejected": _said("no")}),
        }
        for colour in COLOURS
    ]


def _said(word: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": f" {word}"}]
