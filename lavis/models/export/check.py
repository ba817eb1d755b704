"""Reload an exported folder with Transformers alone, and compare it with what was recorded.

Run as a script, ``python -I check.py FOLDER RECORD``, in a process of its own, where the package
that wrote the folder cannot be imported. It prints one JSON object: what it measured, or under
``difference`` the first thing that is not the same.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class _Absent(importlib.abc.MetaPathFinder):
    """Hides this project, as on a machine that does not have it."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] == "lavis":
            raise ModuleNotFoundError(f"{fullname} is hidden", name=fullname)


class DifferenceError(Exception):
    """What the folder does otherwise."""


def check(folder: Path, record: Path) -> dict[str, Any]:
    """Compare pixels, prompts, image features, logits and greedy answers of every conversation.

    Returns:
        The largest differences, and how many answers are the same.

    Raises:
        DifferenceError: the first one past what rounding explains.
    """
    import torch
    import transformers as hf
    from PIL import Image
    from safetensors.torch import load_file

    hf.logging.set_verbosity_error()
    said = json.loads((record / "record.json").read_text(encoding="utf-8"))
    wanted = load_file(record / "record.safetensors")
    # Pillow's own resizing, with which the model was trained; the default differs by a grey level.
    processor = hf.AutoProcessor.from_pretrained(folder, backend="pil")
    tokenizer = processor.tokenizer
    model = _load(folder, said["class"]).to(said["device"])
    pictures = [Image.open(record / name) for name in said["pictures"]]
    dtype, limit = model.dtype, said["tolerance"]
    result = {"features": 0.0, "logits": 0.0, "same": 0, "conversations": len(said["asked"])}
    for n, asked in enumerate(said["asked"]):
        at = f"conversation {n + 1}"
        shown = [pictures[i] for i in asked["pictures"]]
        text = tokenizer.apply_chat_template(
            asked["messages"], add_generation_prompt=True, tokenize=False
        )
        given = processor(
            text=text, images=shown or None, add_special_tokens=False, return_tensors="pt"
        )
        ids = given["input_ids"]
        _same(f"{at}, prompt", ids[0].tolist(), wanted[f"{n}.prompt"].tolist(), tokenizer)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            if shown:
                pixels = given["pixel_values"]
                _close(f"{at}, pixels", pixels, wanted[f"{n}.pixels"], 1e-5)
                inputs["pixel_values"] = pixels.to(dtype)
            inputs = {k: v.to(said["device"]) for k, v in inputs.items()}
            if shown:
                features = model.get_image_features(inputs["pixel_values"]).pooler_output
                features = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
                far = _close(f"{at}, image features", features, wanted[f"{n}.features"], limit)
                result["features"] = max(result["features"], far)
            logits, answer = wanted[f"{n}.logits"], wanted[f"{n}.answer"].tolist()
            more = torch.tensor([answer[:-1]], dtype=torch.int64, device=said["device"])
            whole = torch.cat([inputs["input_ids"], more], 1)
            forced = inputs | {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            got = model(**forced, use_cache=False).logits[0, -len(answer) :].float().cpu()
            off = _close(f"{at}, logits", got[:, : logits.shape[1]], logits, limit)
            result["logits"] = max(result["logits"], off)
            new = model.generate(**inputs, max_new_tokens=len(answer), do_sample=False)
        tokens = new[0, ids.shape[1] :].tolist()
        result["same"] += _answers(f"{at}, answer", tokens, answer, logits, off)
    return result


def _load(folder: Path, family: str) -> Any:
    """The folder's model, every weight of which has a place, and which is of the class meant."""
    import transformers as hf

    model, info = hf.AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    for what, names in info.items():
        if names:
            raise DifferenceError(
                f"weights, {what.replace('_', ' ')}: {sorted(map(str, names))[:4]}"
            )
    if type(model).__name__ != family:
        raise DifferenceError(f"the class is {type(model).__name__}, not {family}")
    return model.eval()


def _same(what: str, got: Sequence[int], wanted: Sequence[int], tokenizer: Any) -> None:
    if got == wanted:
        return
    first = next(
        (n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b),
        min(len(got), len(wanted)),
    )
    around = slice(max(first - 4, 0), first + 4)
    ours, theirs = (tokenizer.convert_ids_to_tokens(x[around]) for x in (wanted, got))
    raise DifferenceError(f"{what}: token {first} is another: {theirs}, not {ours}")


def _close(what: str, got: Any, wanted: Any, limit: float) -> float:
    """The largest difference of a number; refuse one whose length is more than this share."""
    got = got.float().cpu().reshape(-1)
    wanted = wanted.float().reshape(-1)
    if got.shape != wanted.shape:
        raise DifferenceError(f"{what}: {len(got)} numbers, not {len(wanted)}")
    share = float((got - wanted).norm() / wanted.norm())
    if not share <= limit:  # nor not a number
        first = int(((got - wanted).abs() > limit * wanted.abs().max()).nonzero()[0])
        raise DifferenceError(
            f"{what}: {share:.1e} of their length away, more than {limit:.0e}; number {first} is "
            f"{float(got[first]):.6g}, not {float(wanted[first]):.6g}"
        )
    return float((got - wanted).abs().max())


def _answers(what: str, got: list[int], wanted: list[int], logits: Any, off: float) -> int:
    """1 if the tokens are the same, 0 if the first other one is as likely, but for rounding."""
    if got == wanted:
        return 1
    pairs = zip(got, wanted, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if at is not None and logits[at, wanted[at]] - logits[at, got[at]] <= 2 * off:
        return 0
    raise DifferenceError(f"{what}: {got}, not {wanted}")


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())
    try:
        result = check(Path(sys.argv[1]), Path(sys.argv[2]))
        assert "lavis" not in sys.modules
    except DifferenceError as difference:
        result = {"difference": str(difference)}
    print(json.dumps(result))  # noqa: T201  what the caller reads
