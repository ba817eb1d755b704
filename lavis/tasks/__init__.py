"""What is trained on what: a task builds model and data sets and defines a step."""

from lavis.common.registry import METRICS, TASKS

TASKS.register("image_text_pretrain", "lavis.tasks.image_text_pretrain:ImageTextPretrainTask")
TASKS.register(  # the original's name
    "deepspeed_image_text_pretrain", "lavis.tasks.image_text_pretrain:ImageTextPretrainTask"
)

for _name in ("gqa", "vqa", "textvqa", "pope", "mme", "mmbench"):
    METRICS.register(_name, f"lavis.tasks.sheets:{_name.upper()}")
