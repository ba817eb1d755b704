"""Ask a model about one image: ``python test_model_chat.py --checkpoint PTH --image a.jpg``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis.common.cli import (
    TOYBOX,
    add_model_arguments,
    resolve_model_arguments,
    run_cli,
    setup_logging,
)
from lavis.common.errors import DataError, WeightsError
from lavis.common.paths import is_file

FIRST = "<Img><ImageHere></Img> Describe this image in detail."
SECOND = "Is there a refrigerator in the picture? Answer yes or no."
TOYBOX_SECOND = "图里有几个物体？"


def main() -> int:
    """Load the model, ask two questions in one conversation, print the answers."""
    parser = argparse.ArgumentParser(description="Ask two questions about an image.")
    add_model_arguments(parser)
    parser.add_argument("--image", help="image file; the toybox has one of its own")
    parser.add_argument("--question", default=FIRST, help="default: %(default)s")
    parser.add_argument("--second-question", help=f"default: {SECOND}; empty: only one question")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu or auto (default)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="default: %(default)s")
    args = parser.parse_args()
    setup_logging()
    toybox = resolve_model_arguments(args)
    if args.image is None:
        if not toybox:
            raise DataError("--image is missing: name an image file")
        args.image = str(TOYBOX / "image" / "scene.png")
    if args.second_question is None:
        args.second_question = TOYBOX_SECOND if toybox else SECOND

    from lavis.common.device import pick_device
    from lavis.common.images import open_image
    from lavis.models import load_model_and_preprocess

    image = open_image(Path(args.image))
    if not is_file(Path(args.checkpoint)):
        raise WeightsError(f"no checkpoint {args.checkpoint}")
    if "<ImageHere>" not in args.question:
        args.question = f"<Img><ImageHere></Img> {args.question}"
    model, vis_processors, _ = load_model_and_preprocess(
        "minigpt4qwen",
        args.model_type,
        is_eval=True,
        device=pick_device(args.device),
        cfg_path=args.cfg_path,
        options=args.options,
    )
    model.load_checkpoint(args.checkpoint)
    if "eval" not in vis_processors:
        raise DataError("the configuration's preprocess.vis_processor has no `eval`")
    pixels = vis_processors["eval"](image)[None]

    history: list[tuple[str, str]] = []
    for question in filter(None, (args.question, args.second_question)):
        answer, history = model.chat(question, history, pixels, max_new_tokens=args.max_new_tokens)
        print(f"User: {question}\nAssistant: {answer}\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
