"""The instruction data set and its builder."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lavis.common.errors import ConfigError, DataError
from lavis.common.registry import PROCESSORS
from lavis.common.schema import (
    AnnotationConfig,
    BuildInfo,
    DatasetConfig,
    ImagesConfig,
    PreprocessConfig,
    ProcessorConfig,
    SplitProcessors,
)
from lavis.common.types import BadSample, Batch, Sample
from lavis.datasets.builders import InstructionBuilder
from lavis.datasets.collate import collate
from lavis.datasets.instruction import InstructionDataset
from lavis.datasets.plan import BatchPlan
from lavis.processors.config import (
    BaseTextConfig,
    BlipCaptionConfig,
    ImageEvalConfig,
    ImageTrainConfig,
)
from lavis.processors.conversation import ChatML, ConversationEncoder, Turn

ASK = "<Img><ImageHere></Img> a"


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.effect_noise((20, 20), 40 + i).convert("RGB").save(folder / f"{i}.png")
    records: list[dict[str, Any]] = [
        {"image": f"{i}.png", "instruction": ASK, "output": "b" * (i + 1)} for i in range(6)
    ]
    records.append(
        {"image": ["0.png", "1.png"], "instruction": ASK + ASK, "output": "b", "id": "two"}
    )
    records.append({"instruction": "a", "output": "b", "id": "text"})
    (tmp_path / "ann.json").write_text(json.dumps(records))
    return tmp_path


def builder(root: Path, *files: str, **block: Any) -> InstructionBuilder:
    return InstructionBuilder(
        "demo",
        DatasetConfig(
            BuildInfo({"train": AnnotationConfig(files or "ann.json")}, ImagesConfig("images")),
            **block,
        ),
        PreprocessConfig(
            SplitProcessors(
                train=ImageTrainConfig("blip2_image_train", 14),
                eval=ImageEvalConfig("blip_image_eval", 14),
            )
        ),
        str(root),
    )


def build(
    root: Path,
    tokenizer: Any,
    *files: str,
    on_bad: str = "error",
    max_txt_len: int = 64,
    **block: Any,
) -> InstructionDataset:
    encoder = ConversationEncoder(
        tokenizer, ChatML(tokenizer), num_query_token=2, max_txt_len=max_txt_len
    )
    return builder(root, *files, **block).build("train", encoder, train=True, seed=3, on_bad=on_bad)


def add(root: Path, *records: dict[str, Any]) -> None:
    path = root / "ann.json"
    path.write_text(json.dumps(json.loads(path.read_text()) + list(records)))


def write(root: Path, *records: dict[str, Any]) -> None:
    (root / "ann.json").write_text(json.dumps(records))


# --- samples --------------------------------------------------------------------------------


def test_sample(root: Path, tokenizer: Any) -> None:
    dataset = build(root, tokenizer)
    assert len(dataset) == 8
    sample = dataset[0, 2]
    assert isinstance(sample, Sample)
    assert sample.sample_id == "ann.json[2]"
    assert sample.spans.pixels.shape == (1, 3, 14, 14)
    assert sample.input_ids.dtype == sample.labels.dtype == torch.int64
    wanted = dataset.encode(dataset.records[2])
    assert sample.input_ids.tolist() == wanted.input_ids
    assert sample.labels.tolist() == wanted.labels


def test_two_images_and_none(root: Path, tokenizer: Any) -> None:
    dataset = build(root, tokenizer)
    two, text = dataset[0, 6], dataset[0, 7]
    assert isinstance(two, Sample)
    assert isinstance(text, Sample)
    assert (two.sample_id, text.sample_id) == ("ann.json[6] (id two)", "ann.json[7] (id text)")
    assert two.spans.pixels.shape == (2, 3, 14, 14)
    assert len(text.spans.pixels) == 0


def test_several_files_end_to_end(root: Path, tokenizer: Any) -> None:
    (root / "more.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    dataset = build(root, tokenizer, "ann.json", "more.jsonl")
    assert len(dataset) == 9
    assert dataset.records[8].sample_id == "more.jsonl[0]"


# --- augmentation ---------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_index_alone(root: Path, tokenizer: Any) -> None:
    dataset = build(root, tokenizer)

    def pixels(epoch: int, index: int) -> torch.Tensor:
        sample = dataset[epoch, index]
        assert isinstance(sample, Sample)
        return sample.spans.pixels

    first = pixels(0, 3)
    torch.manual_seed(99)
    torch.rand(7)
    state = torch.random.get_rng_state()
    assert torch.equal(pixels(0, 3), first)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's draws are moved
    assert not torch.equal(pixels(1, 3), first)
    dataset = replace(dataset, seed=4)
    assert not torch.equal(pixels(0, 3), first)
    two = pixels(0, 6)
    assert not torch.equal(two[0], two[1])


def test_workers_change_nothing(root: Path, tokenizer: Any) -> None:
    dataset = build(root, tokenizer)
    plan = BatchPlan((len(dataset),), samples_per_step=3, batch_size=3, seed=3)

    def batches(workers: int) -> list[Batch]:
        return list(
            DataLoader(
                dataset,
                batch_sampler=[micro for step in plan.micro_batches(1) for micro in step],
                collate_fn=collate,
                num_workers=workers,
            )
        )

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared, strict=True):
        assert one.sample_ids == other.sample_ids
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.spans.pixels, other.spans.pixels)


# --- bad samples ----------------------------------------------------------------------------


def test_bad_samples_are_refused_by_name(root: Path, tokenizer: Any) -> None:
    add(
        root,
        {"image": "none.png", "instruction": ASK, "output": "b"},
        {"instruction": "a " * 99, "output": "b", "id": "long"},
    )
    with pytest.raises(DataError) as caught:
        build(root, tokenizer)
    first, *rest = str(caught.value).splitlines()
    assert first == (
        "datasets.demo, split 'train': 2 of 10 records cannot be used "
        "(run.on_bad_sample: skip leaves them out):"
    )
    assert rest[0] == f"  ann.json[8]: no image or video {root / 'images' / 'none.png'}"
    assert rest[1].startswith("  ann.json[9] (id long): no answer to learn from: the first answer ")
    assert len(rest) == 2


def test_bad_samples_are_left_out(
    root: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    add(root, {"instruction": "a", "output": ""})
    with caplog.at_level(logging.WARNING):
        dataset = build(root, tokenizer, on_bad="skip")
    assert len(dataset) == 8
    assert caplog.messages == [
        "datasets.demo, train: skipped 1:\n  ann.json[8]: the answer of turn 1 is empty"
    ]


def test_at_most_ten_bad_samples_are_listed(root: Path, tokenizer: Any) -> None:
    add(root, *[{"instruction": "a", "output": ""}] * 13)
    with pytest.raises(DataError) as caught:
        build(root, tokenizer)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 10 + 1
    assert lines[-1] == "  and 3 more"


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_nothing_usable(root: Path, tokenizer: Any, on_bad: str) -> None:
    (root / "ann.json").write_text("[]")
    with pytest.raises(DataError) as caught:
        build(root, tokenizer, on_bad=on_bad)
    assert str(caught.value) == "datasets.demo, split 'train': no usable record"


def test_only_bad_samples_with_skip(root: Path, tokenizer: Any) -> None:
    (root / "ann.json").write_text('[{"instruction": "a", "output": ""}]')
    with pytest.raises(DataError) as caught:
        build(root, tokenizer, on_bad="skip")
    assert str(caught.value) == (
        "datasets.demo, split 'train': no usable record\n"
        "  ann.json[0]: the answer of turn 1 is empty"
    )


def test_image_damaged_after_the_check(root: Path, tokenizer: Any) -> None:
    dataset = build(root, tokenizer)
    (root / "images" / "3.png").write_bytes(b"hello")
    assert dataset[0, 3] == BadSample(
        "ann.json[3]", f"{root / 'images' / '3.png'} is not an image that can be read"
    )


class Show:
    """A third party's text processor that writes what it must not."""

    def __init__(self, config: ProcessorConfig) -> None:
        self.config = config

    def __call__(self, text: str) -> str:
        return f"<ImageHere>{text}"


def test_text_processor_that_adds_a_placeholder(root: Path, tokenizer: Any) -> None:
    if "test_show" not in PROCESSORS:
        PROCESSORS.register("test_show", config=ProcessorConfig)(Show)
    show = SplitProcessors(train=ProcessorConfig("test_show"))
    with pytest.raises(DataError, match="the text processor makes 2 image placeholders of 1; it "):
        build(root, tokenizer, text_processor=show)


@pytest.mark.parametrize(
    ("config", "question"),
    [
        (
            BlipCaptionConfig("blip_caption", prompt="say: "),
            "<Img><ImageHere></Img> say: what is it",
        ),
        (BaseTextConfig("base_text", max_words=2), "<Img><ImageHere></Img> what is"),
    ],
)
def test_text_processors_leave_images_alone(
    root: Path, tokenizer: Any, config: Any, question: str
) -> None:
    ask = "<Img><ImageHere></Img> What IS it"
    write(root, {"image": "0.png", "instruction": ask, "output": "A Cat"})
    dataset = build(root, tokenizer, text_processor=SplitProcessors(train=config))
    assert dataset.turns(dataset.records[0]) == [Turn("user", question), Turn("assistant", "A Cat")]


@pytest.mark.parametrize(("train", "question"), [(True, "what"), (False, "WHAT is it")])
def test_the_models_text_processor_is_the_default(
    root: Path, tokenizer: Any, train: bool, question: str
) -> None:
    write(root, {"instruction": "WHAT is it", "output": "a"})
    image = SplitProcessors(train=ImageEvalConfig("blip_image_eval", 14))
    image = SplitProcessors(image.train, image.train)
    texts = SplitProcessors(train=BaseTextConfig("base_text", max_words=1))
    made = replace(builder(root), preprocess=PreprocessConfig(image, texts))
    encoder = ConversationEncoder(tokenizer, ChatML(tokenizer), num_query_token=2)
    dataset = made.build("train", encoder, train=train, seed=0, on_bad="error")
    assert dataset.turns(dataset.records[0])[0].text == question


def test_what_is_cut_is_told(root: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    write(
        root,
        {"instruction": ["a", "a", "a"], "output": ["b", "b" * 40, "b"]},
        {"instruction": "a", "output": "b"},
    )
    whole = build(root, tokenizer, max_txt_len=999).lengths
    assert not caplog.messages
    assert build(root, tokenizer, max_txt_len=50).lengths == (50, whole[1])
    assert caplog.messages == [
        "datasets.demo, train: 1 of 2 records are longer than model.max_txt_len 50: "
        f"{whole[0] - 50} tokens and 1 whole answers at their ends are left out"
    ]


# --- paths and settings ---------------------------------------------------------------------


def test_missing_paths_are_named(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        builder(root, "anno.json").check_paths(("train",))
    assert str(caught.value).startswith(
        f"datasets.demo.build_info.annotations.train.storage: no file {root / 'anno.json'} "
        f"(the nearest existing folder is {root}). "
    )
    with pytest.raises(DataError, match=f"{root / 'images'} is not a file"):
        builder(root, "images").check_paths(("train",))
    for image in (root / "images").iterdir():
        image.unlink()
    (root / "images").rmdir()
    with pytest.raises(DataError) as caught:
        builder(root).check_paths(("train",))
    assert str(caught.value).startswith(
        f"datasets.demo.build_info.images.storage: no folder {root / 'images'} "
    )


def test_unknown_split(root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        builder(root).check_paths(("trian",))
    assert str(caught.value) == (
        "datasets.demo.build_info.annotations has no split 'trian'; did you mean 'train'? "
        "(it has: train)"
    )


def test_no_image_processor(root: Path, tokenizer: Any) -> None:
    bare = InstructionBuilder(
        "demo",
        DatasetConfig(BuildInfo({"train": AnnotationConfig("ann.json")}, ImagesConfig("images"))),
        PreprocessConfig(),
        str(root),
    )
    with pytest.raises(
        ConfigError, match=r"^datasets\.demo\.vis_processor\.train is missing, and "
    ):
        bare.build(
            "train",
            ConversationEncoder(tokenizer, ChatML(tokenizer), 2),
            train=True,
            seed=0,
            on_bad="error",
        )


def test_own_processor_goes_before_the_models(root: Path, tokenizer: Any) -> None:
    own = SplitProcessors(train=ImageEvalConfig("blip_image_eval", 28))
    sample = build(root, tokenizer, vis_processor=own)[0, 0]
    assert isinstance(sample, Sample)
    assert sample.spans.pixels.shape == (1, 3, 28, 28)


def test_words_in_place_of_an_image(root: Path, tokenizer: Any) -> None:
    phrases = [f"big red {i}" for i in range(2)]
    record = {"words": phrases, "instruction": ASK, "output": "b"}
    (root / "words.json").write_text(json.dumps([record]))
    dataset = build(root, tokenizer, "words.json")
    sample = dataset[0, 0]
    assert isinstance(sample, Sample)
    assert sample.spans.words.shape[:2] == (1, 2)
    ids = [i for i in sample.spans.words[0, 1].tolist() if i >= 0]
    assert tokenizer.decode(ids) == " big red 1"
    assert len(sample.spans.pixels) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ["one"]}, "1 phrases in `words`, but an image takes "),
        ({"words": ["one", 2]}, "`words` must be a list of phrases"),
        ({"words": ["one"], "image": "0.png"}, "has more than one of `image`, `video` and `words`"),
        ({"words": ["one"], "instruction": "a"}, "0 <ImageHere> placeholders in the instruction"),
    ],
)
def test_words_that_do_not_fit(
    root: Path, tokenizer: Any, change: dict[str, Any], message: str
) -> None:
    (root / "words.json").write_text(json.dumps([{"instruction": ASK, "output": "b", **change}]))
    with pytest.raises(DataError) as caught:
        build(root, tokenizer, "words.json")
    assert message in str(caught.value)
