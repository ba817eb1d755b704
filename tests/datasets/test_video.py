"""Videos: which frames are shown, and that training, cache, scores and chat show the same ones."""

from __future__ import annotations

import argparse
import json
import logging
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.toybox.world.__main__ import write_split
from examples.toybox.world.clips import write_video
from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.chat.cache import ConversationCache
from lavis.chat.command import add_chat_arguments, load_chat
from lavis.chat.web import images as uploads
from lavis.chat.web.images import open_upload
from lavis.chat.web.texts import VisitorError
from lavis.common import videos
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError
from lavis.common.frames import VideoConfig
from lavis.common.images import TooLargeError, is_video
from lavis.common.paths import TOYBOX
from lavis.common.registry import PROCESSORS, TASKS
from lavis.common.schema import (
    AnnotationConfig,
    BuildInfo,
    DatasetConfig,
    ImagesConfig,
    PreprocessConfig,
    ProcessorConfig,
    SplitProcessors,
)
from lavis.common.types import IMAGE_PLACEHOLDER, BadSample, Sample
from lavis.common.videos import (
    Picture,
    check_media,
    contact_sheet,
    open_frames,
    open_pictures,
    preview,
    read_header,
    read_video,
)
from lavis.datasets.builders import InstructionBuilder
from lavis.datasets.feature_cache import Counts
from lavis.datasets.instruction import InstructionDataset
from lavis.processors.config import ImageEvalConfig, ImageTrainConfig
from lavis.processors.conversation import ChatML, ConversationEncoder, Turn, place_images
from lavis.runners.agreement import fingerprint
from lavis.tasks.data import RunData
from lavis.tasks.scoring import predict
from tests.conftest import REPO

av = pytest.importorskip("av")
EVAL = ImageEvalConfig("blip_image_eval", 14)


# --- which frames ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "most", "wanted"),
    [
        (1, 4, [0]),
        (3, 4, [0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (7, 4, [0, 1, 2, 3]),
        (8, 4, [0, 2, 4, 6]),
        (11, 4, [0, 2, 4, 6]),
        (12, 4, [0, 3, 6, 9]),
        (9, 1, [0]),
    ],
)
def test_without_a_rate_frames_are_those_of_the_original(
    total: int, most: int, wanted: list[int]
) -> None:
    assert VideoConfig(most).choose(total, 30.0) == wanted


@pytest.mark.parametrize(
    ("total", "rate", "fps", "wanted"),
    [
        (10, 5, 1, [0, 5]),
        (11, 5, 1, [0, 5, 10]),
        (10, 5, 2, [0, 2, 5, 7]),
        (4, 5, 25, [0, 1, 2, 3]),  # no frame twice
        (1, 5, 0.1, [0]),
        (90, 29.97, 1, [0, 29, 59, 89]),
        (1000, 30, 3, [0, 166, 333, 500, 666, 833]),  # too many: the whole of it, not its start
    ],
)
def test_frames_at_a_rate(total: int, rate: float, fps: float, wanted: list[int]) -> None:
    assert VideoConfig(6, fps).choose(total, rate) == wanted


def test_a_limit_of_tokens_takes_frames_away() -> None:
    assert VideoConfig(6, 1.0, max_tokens=40).within(9) == VideoConfig(4, 1.0, max_tokens=40)
    assert VideoConfig(3, max_tokens=40).within(9).max_frames == 3
    assert VideoConfig(3).within(9).max_frames == 3
    with pytest.raises(ConfigError, match=r"video\.max_tokens is 8, but one frame takes 9"):
        VideoConfig(max_tokens=8).within(9)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("fps=0", r"preprocess\.video\.fps must be positive, not 0"),
        ("max_frames=0", r"preprocess\.video\.max_frames must be at least 1, not 0"),
        ("max_tokens=0", r"preprocess\.video\.max_tokens must be at least 1, not 0"),
        ("fsp=1", r"unknown key 'preprocess\.video\.fsp'; did you mean 'fps'"),
    ],
)
def test_settings_that_mean_nothing(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(REPO / "lavis/projects/toybox/video.yaml", [f"preprocess.video.{option}"])


# --- files ----------------------------------------------------------------------------------


def write(path: Path, levels: list[int], codec: str = "mpeg4", rate: int = 5) -> Path:
    """A video of 64 x 64 with a frame of each gray level."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (level,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def level(image: Image.Image) -> float:
    return float(image.convert("L").getpixel((32, 32)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames, frame ``i`` of gray level ``20 * i``."""
    return write(tmp_path_factory.mktemp("video") / "v.mp4", [20 * i for i in range(10)])


def test_a_video_is_read(video: Path) -> None:
    assert read_header(video) == (10, 5.0)
    frames = read_video(video, VideoConfig(4))
    assert [frame.size for frame in frames] == [(64, 64)] * 4
    assert [level(f) for f in frames] == pytest.approx([0, 40, 80, 120], abs=6)
    frames = read_video(video, VideoConfig(fps=1))
    assert [level(f) for f in frames] == pytest.approx([0, 100], abs=6)


def test_a_file_that_does_not_say_how_many_frames_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mkv", [20 * i for i in range(10)])
    with av.open(str(path)) as container:
        assert not container.streams.video[0].frames
    frames, rate = read_header(path)
    assert (frames, rate) == (10, pytest.approx(5, rel=0.01))
    with pytest.raises(TooLargeError):
        read_header(path, max_pixels=64 * 64 * 9)
    assert read_header(path, max_pixels=64 * 64 * 10).frames == 10


def test_pictures_are_opened_in_their_order(video: Path, tmp_path: Path) -> None:
    still = tmp_path / "a.png"
    Image.new("RGB", (64, 64), (33,) * 3).save(still)
    images = open_pictures(
        [Picture(video, 1), Picture(video, 9), Picture(still), Picture(video, 0)]
    )
    assert [level(image) for image in images] == pytest.approx([20, 180, 33, 0], abs=6)


def test_too_large(video: Path) -> None:
    assert read_header(video, max_pixels=64 * 64 * 10).frames == 10
    with pytest.raises(TooLargeError, match="is too large: its frames have over 40959 pixels"):
        read_header(video, max_pixels=64 * 64 * 10 - 1)


def test_what_is_a_video(video: Path, tmp_path: Path) -> None:
    still = tmp_path / "a.mp4"
    Image.new("RGB", (4, 4)).save(still, "PNG")
    assert [is_video(p) for p in (video, str(video), still, tmp_path, tmp_path / "x")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    check_media(str(video))
    check_media(still)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as a video"):
        check_media(cut)


def test_a_playlist_is_not_followed(video: Path, tmp_path: Path) -> None:
    """Else a visitor's upload, or a record, would have other files or addresses read."""
    for name, text in (
        ("a.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n"),
        ("a.ffconcat", f"ffconcat version 1.0\nfile {video.name}\n"),
    ):
        path = video.parent / name
        path.write_text(text)
        assert not is_video(path)
        with pytest.raises(DataError, match="cannot be read as a video"):
            read_header(path)


def test_a_contact_sheet(video: Path) -> None:
    sheet = preview(video)
    assert sheet.size == (128, 128)
    small = sheet.convert("L").resize((2, 2), Image.Resampling.BOX)
    assert list(small.tobytes()) == pytest.approx([0, 40, 80, 120], abs=6)
    frames = [Image.new("L", (2, 2), n) for n in range(9)]
    assert contact_sheet(frames[:1]) is frames[0]
    shown = contact_sheet([f.convert("RGB") for f in frames]).convert("L")
    assert [shown.getpixel((x, y)) for y in (0, 2) for x in (0, 2)] == [0, 3, 5, 8]


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [  # as a phone writes it, and where the light upper left corner is to be seen
        ((1, 0, 0, 1), (0, 0)),
        ((0, 1, -1, 0), (1, 0)),
        ((-1, 0, 0, -1), (1, 1)),
        ((0, -1, 1, 0), (0, 1)),
    ],
)
def test_frames_are_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: tuple[int, int]
) -> None:
    path = tmp_path / "v.mp4"
    picture = Image.new("RGB", (96, 64))
    picture.paste("white", (0, 0, 48, 32))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())

    def fixed(a: int, b: int, c: int, d: int) -> bytes:
        one = 1 << 16
        return struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)

    content = path.read_bytes()
    at = content.index(fixed(1, 0, 0, 1), content.index(b"tkhd"))
    path.write_bytes(content[:at] + fixed(*matrix) + content[at + 36 :])
    (frame,) = open_frames(path, [0])
    assert frame.size == ((64, 96) if matrix[0] == 0 else (96, 64))
    small = frame.convert("L").resize((2, 2), Image.Resampling.BOX)
    levels = {(x, y): small.getpixel((x, y)) for x in (0, 1) for y in (0, 1)}
    assert max(levels, key=levels.get) == corner  # type: ignore[arg-type]
    assert sorted(levels.values())[2] < 60 < 200 < levels[corner]  # type: ignore[type-var, operator]


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 999])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(content)
    for read in (read_header, lambda p: open_frames(p, [0])):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path} cannot be read as a video: ")


def test_one_that_ends_early(video: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(video.read_bytes()[:-200])
    with pytest.raises(DataError, match=str(path)):
        open_frames(path, [0, 9])
    with pytest.raises(DataError, match="ends after 1 of the 2 frames wanted"):
        open_frames(video, [9, 10])


def test_sound_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=80)
        frame.planes[0].update(bytes(160))
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError) as caught:
        read_header(path)
    assert str(caught.value) == f"{path} has no video stream"


# --- samples --------------------------------------------------------------------------------


@pytest.fixture()
def folder(video: Path, tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v.mp4").write_bytes(video.read_bytes())
    record = {"video": "v.mp4", "instruction": "<Img><ImageHere></Img>a", "output": "b<ImageHere>"}
    (tmp_path / "ann.json").write_text(json.dumps([record]))
    return tmp_path


def build(
    folder: Path,
    tokenizer: Any,
    own: int | None = 4,
    tokens: int = 2,
    processor: ProcessorConfig = EVAL,
    on_bad: str = "error",
    **video: Any,
) -> InstructionDataset:
    info = BuildInfo({"train": AnnotationConfig("ann.json")}, ImagesConfig("videos"), own)
    builder = InstructionBuilder(
        "clips",
        DatasetConfig(info, data_type="videos"),
        PreprocessConfig(SplitProcessors(train=processor), video=VideoConfig(**video)),
        str(folder),
    )
    encoder = ConversationEncoder(
        tokenizer, ChatML(tokenizer), num_query_token=tokens, max_txt_len=99
    )
    return builder.build("train", encoder, train=True, seed=1, on_bad=on_bad)


def test_a_sample_from_end_to_end(folder: Path, tokenizer: Any) -> None:
    dataset = build(folder, tokenizer)
    sample = dataset[0, 0]
    assert isinstance(sample, Sample)
    assert dataset.lengths == (len(sample.input_ids),)
    assert sample.spans.pixels.shape == (4, 3, 14, 14)
    means = sample.spans.pixels.mean((1, 2, 3))
    assert (means.diff() > 0.3).all()  # the frames in order, ever lighter
    spans = (sample.input_ids == tokenizer.image_id).nonzero().flatten()
    assert torch.equal(spans, torch.arange(8) + spans[0])  # four frames of two ids, in one run
    assert dataset.turns(dataset.records[0])[1].text == "b<ImageHere>"  # an answer's is text
    # the file is damaged after the check
    (folder / "videos" / "v.mp4").write_bytes(b"")
    bad = dataset[0, 0]
    assert isinstance(bad, BadSample)
    assert "cannot be read as a video" in bad.reason


def test_where_the_number_of_frames_is_set(folder: Path, tokenizer: Any) -> None:
    def frames(*args: Any, **video: Any) -> tuple[int, ...]:
        return build(folder, tokenizer, *args, **video).records[0].frames

    assert frames(None, max_frames=2) == (0, 5)
    assert frames(5, max_frames=2) == (0, 2, 4, 6, 8)  # the data set's
    assert frames(None, fps=1.0) == (0, 5)
    assert frames(5, max_tokens=6) == (0, 3, 6)  # of two tokens
    assert len(frames(None)) == 10
    with pytest.raises(ConfigError, match=r"preprocess\.video\.max_tokens is 1"):
        frames(5, max_tokens=1)


def test_other_frames_are_other_data(folder: Path, tokenizer: Any) -> None:
    prints = [fingerprint([build(folder, tokenizer, n)]) for n in (2, 3, 2)]
    assert prints[0] == prints[2] != prints[1]


def test_a_broken_video_is_a_bad_sample(
    folder: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    records = json.loads((folder / "ann.json").read_text())
    (folder / "videos" / "broken.mp4").write_bytes(b"hello")
    records.insert(0, records[0] | {"video": "broken.mp4", "id": "lost"})
    (folder / "ann.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"id lost\).*broken.mp4 cannot be read as a video"):
        build(folder, tokenizer)
    with caplog.at_level(logging.WARNING):
        dataset = build(folder, tokenizer, on_bad="skip")
    assert len(dataset) == 1 and "id lost" in caplog.text


def test_frames_are_cropped_and_flipped_alike(tmp_path: Path, tokenizer: Any) -> None:
    """Else what stands still would move, and left would be right in every other frame."""
    (tmp_path / "videos").mkdir()
    half = Image.new("RGB", (64, 64))
    half.paste("white", (0, 0, 32, 64))
    write_video([half.resize((84, 84))] * 6, tmp_path / "videos" / "v.mp4")
    record = {"video": "v.mp4", "instruction": "<ImageHere>", "output": "b"}
    (tmp_path / "ann.json").write_text(json.dumps([record]))
    random = ImageTrainConfig("blip2_image_train", 14)
    dataset = build(tmp_path, tokenizer, processor=random)
    seen = []
    for epoch in range(4):
        sample = dataset[epoch, 0]
        assert isinstance(sample, Sample)
        assert (sample.spans.pixels - sample.spans.pixels[0]).abs().max() < 0.3
        seen.append(sample.spans.pixels[0])
    assert max(float((s - seen[0]).abs().max()) for s in seen) > 1  # epochs differ


def test_too_many_frames_for_the_text_length(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"image 5 of 10 ends at token 107, past max_txt_len 99"):
        build(folder, tokenizer, 10, 16)


# --- the toybox: cache, scores, chat ----------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_split(out, "clips", 4, seed=1)
    write_split(out, "clips_test", 10, seed=1)
    return out


def load(world: Path, *options: str) -> Any:
    annotations = "datasets.toybox.build_info.annotations"
    config = load_config(
        REPO / "lavis/projects/toybox/video.yaml",
        [
            f"env.cache_root={REPO}",
            f"{annotations}.train.storage={world / 'clips.json'}",
            f"{annotations}.test.storage={world / 'clips_test.json'}",
            f"datasets.toybox.build_info.images.storage={world / 'image'}",
            "run.num_workers=0",
            *options,
        ],
    )
    return TASKS.get(config.run.task)(config)


def kept(folder: Path, **settings: Any) -> str:
    section = {"enabled": True, "dtype": "fp32", "dir": str(folder)} | settings
    return f"run.feature_cache={json.dumps(section)}"


def fill(task: Any) -> tuple[InstructionDataset, Counts]:
    (part,) = task.build_split("train", train=True)
    return part, task.cache_features(RunData([[part]], {}), torch.device("cpu"))


@pytest.fixture(scope="module")
def model(world: Path) -> Any:
    return load(world, "run.feature_cache.enabled=false").build_model(torch.device("cpu")).eval()


def test_kept_features_are_those_of_the_frames(world: Path, model: Any, tmp_path: Path) -> None:
    part, counts = fill(load(world, kept(tmp_path / "f")))
    assert counts == Counts(0, 12, 0)  # of four videos three frames, at two a second
    (plain,) = load(world, "run.feature_cache.enabled=false").build_split("train", train=True)
    for i in range(4):
        got, shown = part[0, i], plain[0, i]
        assert isinstance(got, Sample) and isinstance(shown, Sample)
        assert torch.equal(got.input_ids, shown.input_ids) and not len(got.spans.pixels)
        with torch.no_grad():
            wanted = model.encode_query(shown.spans.pixels)
        assert torch.allclose(got.spans.features, wanted, atol=1e-5)
        assert (wanted[0] - wanted[-1]).abs().max() > 0.01 or "motion" in str(part.records[i])
    # What is there is found again, whatever other frames are wanted besides.
    assert fill(load(world, kept(tmp_path / "f")))[1] == Counts(12, 0, 0)
    assert fill(load(world, kept(tmp_path / "f"), "preprocess.video.fps=4"))[1] == Counts(12, 8, 0)


def test_kept_views_are_drawn_alike_for_all_frames(world: Path, tmp_path: Path) -> None:
    random = "preprocess.vis_processor.train={name: blip2_image_train, image_size: 84}"
    task = load(world, kept(tmp_path / "f", views=2), random, "preprocess.video.max_frames=1")
    still = world / "image" / "clips"
    part, counts = fill(task)
    assert counts == Counts(0, 8, 0)
    source, (path, *_) = part.features, sorted(still.iterdir())
    assert source is not None
    image = open_frames(path, [0])[0]
    views = [source.draw(image, path, n) for n in (0, 1, 0)]
    assert torch.equal(views[0], views[2]) and not torch.equal(views[0], views[1])


def test_a_video_that_ends_early_is_left_out_of_the_cache(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "world"
    (copy / "image" / "clips").mkdir(parents=True)
    for file in world.glob("clips*.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    for file in (world / "image" / "clips").iterdir():
        (copy / "image" / "clips" / file.name).write_bytes(file.read_bytes())
    path = copy / "image" / "clips" / "00002.mp4"
    content = path.read_bytes()
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])
    assert read_header(path).frames == 5  # which is all that is read before
    with pytest.raises(DataError, match=r"00002\.mp4"):
        fill(load(copy, kept(tmp_path / "f")))
    part, counts = fill(load(copy, kept(tmp_path / "g"), "run.on_bad_sample=skip"))
    assert counts == Counts(0, 9, 1)
    samples = [part[0, i] for i in range(4)]
    assert [isinstance(s, BadSample) for s in samples] == [False, False, True, False]


def test_videos_are_scored(
    world: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = load(world, "run.feature_cache.enabled=false").build_split("test", train=False)
    longer = replace(part.records[1], frames=(0, 1, 2, 3, 4))  # as with clips of several lengths
    part = replace(part, records=[part.records[0], longer, *part.records[2:]])
    asked: list[Any] = []
    answers = model.answers

    def watched(prompts: Any, **options: Any) -> Any:
        def read() -> Any:
            for some in prompts:
                asked.append(some)
                yield some

        return answers(read(), **options)

    monkeypatch.setattr(model, "answers", watched)
    seen = predict(model, part, batch_size=4, max_new_tokens=3)
    assert [p.image for p in seen] == [str(r.video) for r in part.records]
    assert {p.kind for p in seen} == {"moves", "appears", "disappears", "changes", "motion"}
    blind = predict(model, part, batch_size=4, max_new_tokens=3, blind=True, seed=1)
    assert [p.question for p in blind] == [p.question for p in seen]
    spans = [i.count(model.tokenizer.image_id) // 9 for p in asked for i in p.ids]
    assert sum(spans[:10]) == sum(spans[10:]) == 9 * 3 + 5
    assert (
        sum(len(p.spans.pixels) for p in asked[:3])
        == sum(len(p.spans.pixels) for p in asked[3:])
        == 32
    )
    first, other = (torch.cat([p.spans.pixels for p in asked[i : i + 3]]) for i in (0, 3))
    assert not torch.equal(first, other)


def test_chat_sees_what_training_saw(world: Path, model: Any) -> None:
    task = load(world, "run.feature_cache.enabled=false")
    (part,) = task.build_split("test", train=False)
    record = part.records[0]
    question = record.turns[0].text.removeprefix("<Img><ImageHere></Img> ")
    chosen = task.config.preprocess.vis_processor.eval
    fit = task.config.fit("preprocess.vis_processor.eval", chosen)
    processor = PROCESSORS.get("blip_image_eval")(fit)
    engine = ChatEngine(model, processor, video=task.config.preprocess.video)
    talk = Conversation(engine, ChatSettings(max_new_tokens=4))
    (clip,) = talk.show(record.video)
    assert clip.name == record.video.name and clip.embeds.shape[:2] == (3, 9)
    answer = talk.ask(question)
    assert answer.prompt == model.encoder.prompt(part.turns(record)[:1])
    pixels = part.spans(record, 0, 0).pixels
    content = engine.content(answer.prompt, answer.images)
    logits = engine.extend(ConversationCache(), content, answer.images)
    with torch.no_grad():
        soft = model.encode_image(pixels)
        assert torch.allclose(clip.embeds, soft, atol=1e-5)
        embeds = model.embed(torch.tensor([answer.prompt]), soft)
        hidden = model.language.hidden(embeds, torch.arange(len(answer.prompt))[None])
        # each frame stands in its place
        assert torch.allclose(logits, model.language.logits(hidden[0, -1]), atol=1e-4)
    wanted = model.generate_ids([answer.prompt], pixels, max_new_tokens=4)
    answer.read()
    assert answer.ids == wanted[0]
    # A picture and the video again, each in its place; and what is computed is kept.
    picture = engine.encode_image(Image.new("RGB", (84, 84), "red"), "red")
    talk.show(picture, clip)
    both = talk.ask("<ImageHere> or <ImageHere>?")
    assert both.reused > 27 and both.prompt.count(model.tokenizer.image_id) == 9 * (3 + 1 + 3)
    both.read()
    red = processor(Image.new("RGB", (84, 84), "red"))[None]
    shown = torch.cat([pixels, red, pixels])
    assert both.ids == model.generate_ids([both.prompt], shown, max_new_tokens=4)[0]
    assert [e["images"] for e in talk.to_dict()["exchanges"]] == [[clip.name], ["red", clip.name]]


def test_a_limit_of_tokens_holds_in_chat(world: Path, model: Any) -> None:
    path = world / "image" / "clips" / "00000.mp4"
    engine = ChatEngine(model, lambda _: torch.zeros(3, 84, 84), video=VideoConfig(max_tokens=20))
    assert len(engine.encode_image(path).numbers) == 2
    with pytest.raises(ConfigError, match=r"preprocess\.video\.max_tokens"):
        ChatEngine(model, lambda _: torch.zeros(3, 84, 84), video=VideoConfig(max_tokens=8))


def test_a_video_of_a_forgotten_turn_keeps_its_form(tokenizer: Any) -> None:
    encoder = ConversationEncoder(tokenizer, ChatML(tokenizer), num_query_token=2)
    old = place_images("a", [IMAGE_PLACEHOLDER * 3])
    assert old == "<Img><ImageHere><ImageHere><ImageHere></Img> a"
    ids, dropped = encoder.latest(
        [(old, "b"), (place_images("<ImageHere>c", [IMAGE_PLACEHOLDER]), "d")], "e", 0
    )
    moved = "<Img><ImageHere><ImageHere><ImageHere></Img><Img><ImageHere></Img> e"
    assert dropped == 2 and ids == encoder.prompt([Turn("user", moved)])


def test_places_of_videos_among_pictures() -> None:
    one, two = IMAGE_PLACEHOLDER, 2 * IMAGE_PLACEHOLDER
    assert (
        place_images("<ImageHere>, <ImageHere>", [two, one])
        == "<ImageHere><ImageHere>, <ImageHere>"
    )
    assert place_images("x", [one, two]) == (
        "<Img><ImageHere></Img><Img><ImageHere><ImageHere></Img> x"
    )
    assert place_images("x", []) == "x"
    with pytest.raises(DataError, match=r"names 1 images \(<ImageHere>\), but 2 are new"):
        place_images("<ImageHere>", [two, one])


def test_the_chat_of_a_run_shows_the_frames_of_the_run(world: Path) -> None:
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    recipe = str(REPO / "lavis/projects/toybox/video.yaml")
    where = ["--checkpoint", str(TOYBOX / "checkpoint.pth"), "--device", "cpu"]
    root = ["--options", f"env.cache_root={REPO}"]
    engine, _, _ = load_chat(parser.parse_args(["--cfg-path", recipe, *where, *root]))
    assert engine.video == VideoConfig(fps=2)


def test_a_video_that_a_visitor_sends(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = open_upload(video, "v.mp4", VideoConfig(2))
    assert [level(f) for f in frames] == pytest.approx([0, 100], abs=6)
    still = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(still)
    assert [f.size for f in open_upload(still, "a.png", VideoConfig(2))] == [(4, 4)]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:200])

    def refused(path: Path) -> str:
        with pytest.raises(VisitorError) as caught:
            open_upload(path, path.name, VideoConfig(2))
        assert path.name in caught.value.text("en") and path.name in caught.value.text("zh")
        assert str(path) not in caught.value.text("en")
        return caught.value.key

    assert refused(cut) == "broken_video"
    monkeypatch.setattr(uploads, "MAX_VIDEO_PIXELS", 64 * 64 * 9)
    assert refused(video) == "long_video"

    def missing(extra: str, what: str) -> None:
        raise ConfigError(f"{what} needs {extra}")

    monkeypatch.setattr(videos, "check_packages", missing)
    videos._import_av.cache_clear()
    assert refused(video) == "no_video"
