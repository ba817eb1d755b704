"""Builders, the instruction data set, the batch plan and collation."""

from lavis.common.registry import BUILDERS
from lavis.common.schema import DatasetConfig
from lavis.datasets.config import BenchmarkConfig

for _name in (
    "instruction",  # the user's own data
    "minigpt4_instruction",
    "llava_instruction",
    "llava_pretrain",
    "llava_instruct_100k",
    "llava_instruct_156k",
    "videochatgpt_100k",
):
    BUILDERS.register(_name, "lavis.datasets.builders:InstructionBuilder", config=DatasetConfig)
for _name in ("gqa", "vqav2", "textvqa", "pope", "mme", "mmbench"):
    BUILDERS.register(_name, "lavis.datasets.benchmarks:BenchmarkBuilder", config=BenchmarkConfig)
