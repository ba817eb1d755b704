"""A SigLIP tower for the toybox: ``python -m examples.toybox.siglip --out DIR``.

Another vision side than ``blip2.pth``, in Transformers' own class. As SigLIP's (Zhai et al. 2023),
its loss is the sigmoid of each picture-word pair, but patch by patch: a patch is asked for the
words of its place of the grid, ``northwest big red circle``. It meets no language model, and no
picture shows a held-out pair.
"""

from __future__ import annotations

import argparse
import math
import random
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from examples.toybox.world.scenes import (
    COLOURS,
    COMPASS,
    GRID,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    draw,
    in_words,
    random_scene,
)  # fmt: skip
from lavis.common.cli import output_folder, positive, run_cli

WORDS = (*COMPASS, *SIZES, *COLOURS, *SHAPES, "empty")
PATCH = 14
SIDE = IMAGE_SIZE // PATCH
BATCH = 32
PEAK_LR = 2e-3
WARM_UP = 50  # steps


def main() -> int:
    """Parse the command line, train the tower and write its folder."""
    parser = argparse.ArgumentParser(description="Train the toybox's SigLIP tower.")
    parser.add_argument("--out", required=True, type=output_folder, help="folder to write")
    parser.add_argument("--pictures", type=positive, default=6000, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=1500, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    tower = train(args.pictures, args.steps, args.seed)
    tower.save_pretrained(args.out)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SiglipImageProcessor(size=size, resample=3).save_pretrained(args.out)
    print(f"{args.out}: {time.process_time():.0f} s of CPU")
    return 0


def train(count: int, steps: int, seed: int) -> SiglipVisionModel:
    """A tower that has learned from so many pictures, 32 of them at a step."""
    torch.manual_seed(seed)
    pixels, words = pictures(random.Random(f"{seed}/siglip"), count)
    config = SiglipVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    tower = SiglipVisionModel(config)
    head = nn.Linear(config.hidden_size, len(WORDS))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, PEAK_LR, (0.9, 0.98), weight_decay=0.05)
    progress = tqdm(range(steps), unit=" steps")
    for step in progress:
        rate = min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK_LR * rate
        chosen = torch.randint(count, (BATCH,))
        logits = head(tower(pixels[chosen] / 127.5 - 1).last_hidden_state)
        loss = F.binary_cross_entropy_with_logits(logits, words[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            right = ((logits > 0) == words[chosen].bool()).all(-1).float().mean()
            progress.set_postfix_str(f"loss {loss:.4f}, {right:.1%} of patches right")
    return tower


def pictures(rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
    """Draw pictures, (N, 3, 84, 84) of 0 to 255, and each patch's words, (N, 36, words) of 0 and 1.

    The patches are in reading order.
    """
    pixels, words = [], torch.zeros(count, GRID * GRID, len(WORDS))
    for number in tqdm(range(count), unit=" pictures"):
        scene = random_scene(rng, held_out=False)
        pixels.append(pil_to_tensor(draw(scene, rng)))
        for place, phrase in enumerate(in_words(scene)):
            words[number, place, [WORDS.index(word) for word in phrase.split()]] = 1
    cells = words.view(count, GRID, GRID, -1)
    patches = cells.repeat_interleave(SIDE // GRID, 1).repeat_interleave(SIDE // GRID, 2)
    return torch.stack(pixels), patches.flatten(1, 2)


if __name__ == "__main__":
    run_cli(main)
