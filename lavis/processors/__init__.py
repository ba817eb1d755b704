"""Image transforms, text processors, the tokenizer, and conversation -> ids + labels."""

from lavis.common.registry import PROCESSORS
from lavis.processors.config import (
    BaseInstructionConfig,
    BaseTextConfig,
    BlipCaptionConfig,
    ImageEvalConfig,
    ImageTrainConfig,
)

PROCESSORS.register(
    "blip2_image_train", "lavis.processors.image:Blip2ImageTrain", config=ImageTrainConfig
)
PROCESSORS.register(
    "blip_image_eval", "lavis.processors.image:BlipImageEval", config=ImageEvalConfig
)
PROCESSORS.register(
    "base_instruction", "lavis.processors.text:BaseInstruction", config=BaseInstructionConfig
)
PROCESSORS.register("base_text", "lavis.processors.text:BaseText", config=BaseTextConfig)
PROCESSORS.register("blip_caption", "lavis.processors.text:BlipCaption", config=BlipCaptionConfig)
