"""Pictures in tiles: how they are cut, and that training, cache, scores and chat show the same."""

from __future__ import annotations

import argparse
import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.toybox.world.__main__ import write_split
from lavis.chat import ChatEngine, ChatSettings, Conversation
from lavis.chat.command import add_chat_arguments, load_chat
from lavis.chat.server.prompts import Limits, Prompts
from lavis.chat.server.protocol import ChatBody
from lavis.common.config import load_config
from lavis.common.errors import ConfigError, DataError
from lavis.common.images import open_image, read_size
from lavis.common.paths import TOYBOX
from lavis.common.registry import PROCESSORS, TASKS
from lavis.common.tiles import Grid, TilesConfig
from lavis.common.types import IMAGE_PLACEHOLDER as P
from lavis.common.types import Sample
from lavis.common.videos import Picture, cut, open_pictures, parts_of
from lavis.datasets.collate import collate
from lavis.datasets.feature_cache import Counts
from lavis.datasets.instruction import InstructionDataset
from lavis.models.compute.schedule import StepSchedule
from lavis.processors.contracts import Turn
from lavis.processors.conversation import show_in_turns, tiles_text
from lavis.processors.text import process_around_images
from lavis.runners.agreement import fingerprint
from lavis.runners.estimate import Estimator
from lavis.runners.sharing import Sharing
from lavis.tasks.data import RunData
from lavis.tasks.scoring import predict
from tests.conftest import REPO

SIDE = 84
TILES = "preprocess.tiles.max=4"


# --- which grid -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "most", "wanted"),
    [
        ((84, 84), 6, (1, 1)),
        ((20, 60), 6, (1, 1)),  # smaller than a tile
        ((85, 84), 6, (1, 1)),  # a pixel more does not double it
        ((85, 85), 6, (1, 1)),
        ((125, 125), 6, (1, 1)),
        ((126, 126), 6, (2, 2)),  # a tile and a half
        ((150, 84), 6, (2, 1)),
        ((168, 168), 6, (2, 2)),
        ((900, 900), 6, (2, 2)),
        ((900, 900), 9, (3, 3)),
        ((900, 900), 3, (1, 1)),  # no grid of two or three distorts it less
        ((900, 600), 6, (3, 2)),
        ((600, 900), 6, (2, 3)),
        ((4000, 100), 6, (6, 1)),
        ((100, 4000), 6, (1, 6)),
        ((168, 84), 1, (1, 1)),
    ],
)
def test_the_grid_distorts_least(size: tuple[int, int], most: int, wanted: tuple[int, int]) -> None:
    assert TilesConfig(most).grid(*size, SIDE) == (*wanted, SIDE)


def test_a_grid_keeps_its_limits() -> None:
    tiles = TilesConfig(7)
    for width in range(1, 700, 37):
        for height in range(1, 700, 41):
            grid = tiles.grid(width, height, SIDE)
            assert grid.columns * grid.rows <= 7
            for count, pixels in ((grid.columns, width), (grid.rows, height)):
                assert count == 1 or 3 * count * SIDE <= 4 * pixels
            other = tiles.grid(height, width, SIDE)
            assert (other.columns, other.rows) == (grid.rows, grid.columns)


@pytest.mark.parametrize("size", [(190, 170), (300, 90), (84, 84)])
def test_tiles_are_the_picture(size: tuple[int, int]) -> None:
    """Side by side they are the resized picture, each pixel once."""
    noise = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    grid = TilesConfig(6).grid(*size, SIDE)
    whole = np.asarray(image.resize((grid.columns * SIDE, grid.rows * SIDE), Image.BICUBIC))
    tiles = [np.asarray(tile) for tile in cut(image, grid)]
    assert len(tiles) == grid.tiles
    rows = [tiles[i : i + grid.columns] for i in range(0, len(tiles), grid.columns)]
    if tiles:
        assert np.array_equal(np.vstack([np.hstack(row) for row in rows]), whole)


def test_a_row_stands_on_its_line() -> None:
    assert tiles_text(Grid(1, 1, SIDE)) == P
    assert tiles_text(Grid(3, 2, SIDE)) == f"{P}\n{P}{P}{P}\n{P}{P}{P}"
    text = f"<Img>{tiles_text(Grid(2, 2, SIDE))}</Img> What?"
    assert process_around_images(str.strip, text) == text
    turns = [Turn("user", f"<Img>{P}</Img> and {P}?"), Turn("assistant", P), Turn("user", "So?")]
    shown = show_in_turns(turns, [f"{P}\n{P}{P}", P])
    assert shown == (Turn("user", f"<Img>{P}\n{P}{P}</Img> and {P}?"), *turns[1:])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_header_gives_the_upright_size(orientation: int, tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (170, 84)), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_size(tmp_path / "x.jpg") == open_image(tmp_path / "x.jpg").size
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.jpg is not an image"):
        read_size(tmp_path / "x.jpg")


def test_a_file_is_read_once_for_all_its_tiles(tmp_path: Path) -> None:
    path, grid = tmp_path / "x.png", Grid(2, 1, SIDE)
    Image.effect_noise((200, 90), 90).save(path)
    parts = parts_of(path, grid)
    assert [p.tile and p.tile.number for p in parts] == [None, 0, 1]
    whole, *tiles = open_pictures([*parts, Picture(path)])
    assert whole.size == (200, 90)
    assert [t.size for t in tiles] == [(SIDE, SIDE)] * 2 + [(200, 90)]
    wanted = cut(open_image(path), grid)
    assert [t.tobytes() for t in tiles[:2]] == [t.tobytes() for t in wanted]


# --- limits ---------------------------------------------------------------------------------


def test_a_limit_of_tokens_leaves_fewer_tiles() -> None:
    def most(tiles: TilesConfig) -> int:
        return tiles.within(9, 500, "model.max_txt_len").max

    assert most(TilesConfig(6, max_tokens=46)) == 4
    assert most(TilesConfig(3, max_tokens=46)) == 3
    assert most(TilesConfig(6, max_tokens=27)) == 2
    with pytest.raises(ConfigError, match=r"max_tokens is 26, but a picture takes 9 .* each: 27"):
        most(TilesConfig(6, max_tokens=26))  # the whole and one part would be the same
    assert most(TilesConfig(6)) == 6
    with pytest.raises(ConfigError, match=r"tiles\.max_tokens is 8, but a picture takes 9"):
        TilesConfig(6, max_tokens=8).within(9, 500, "")
    with pytest.raises(
        ConfigError, match=r"tiles\.max is 6: a picture may take 7 x 9 tokens, but model\.max_txt"
    ):
        TilesConfig(6).within(9, 63, "model.max_txt_len")
    TilesConfig(6).within(9, 64, "model.max_txt_len")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max=0", r"preprocess\.tiles\.max must be at least 1, not 0"),
        ("max_tokens=0", r"preprocess\.tiles\.max_tokens must be at least 1, not 0"),
        ("mx=3", r"unknown key 'preprocess\.tiles\.mx'; did you mean 'max'"),
    ],
)
def test_settings_that_mean_nothing(option: str, message: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(world, f"preprocess.tiles.{option}")


def test_a_random_crop_of_a_tile(world: Path) -> None:
    random = "preprocess.vis_processor.train={name: blip2_image_train, image_size: 84}"
    with pytest.raises(ConfigError, match=r"toybox: preprocess\.tiles and Blip2ImageTrain, which"):
        load(world, TILES, random).build_split("train", train=True)


def test_a_context_that_is_too_short(model: Any) -> None:
    many = TilesConfig(model.context // 9)
    with pytest.raises(ConfigError, match=r"x 9 tokens, but the language model's context is"):
        ChatEngine(model, lambda _: torch.zeros(3, SIDE, SIDE), tiles=many)


# --- the toybox: training, cache, scores, chat, plan ------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one, two and four tiles."""
    out = tmp_path_factory.mktemp("world")
    for split, count in (("train", 6), ("test", 5)):
        write_split(out, split, count, seed=1)
        records = json.loads((out / f"{split}.json").read_text())
        for i, record in enumerate(records):
            path = out / "image" / record["image"]
            image = Image.open(path).resize([(84, 84), (200, 90), (180, 180)][i % 3])
            image.save(path)
    return out


def load(world: Path, *options: str) -> Any:
    annotations = "datasets.toybox.build_info.annotations"
    config = load_config(
        REPO / "lavis/projects/toybox/train.yaml",
        [
            f"env.cache_root={REPO}",
            f"{annotations}.train.storage={world / 'train.json'}",
            f"{annotations}.test.storage={world / 'test.json'}",
            f"datasets.toybox.build_info.images.storage={world / 'image'}",
            "run.num_workers=0",
            "run.feature_cache.enabled=false",
            *options,
        ],
    )
    return TASKS.get(config.run.task)(config)


@pytest.fixture(scope="module")
def model(world: Path) -> Any:
    return load(world).build_model(torch.device("cpu")).eval()


def test_a_sample_has_the_tiles_of_its_picture(world: Path, model: Any) -> None:
    (plain,) = load(world).build_split("train", train=True)
    (part,) = load(world, TILES).build_split("train", train=True)
    grids = [r.grids[0].tiles for r in part.records]
    assert grids == [(0, 2, 4)[i % 3] for i in range(len(grids))]
    for i, tiles in enumerate(grids):
        sample, whole = part[0, i], plain[0, i]
        assert isinstance(sample, Sample) and isinstance(whole, Sample)
        assert len(sample.spans.pixels) == 1 + tiles
        assert torch.equal(sample.spans.pixels[0], whole.spans.pixels[0])
        ids = sample.input_ids.tolist()
        assert ids.count(model.tokenizer.image_id) == 9 * (1 + tiles)
        assert part.lengths[i] == len(ids)
        newlines = (0, 1, 2)[i % 3]
        assert len(ids) == len(whole.input_ids) + 9 * tiles + newlines
        kept = (sample.labels != -100).sum()
        assert kept == (whole.labels != -100).sum()
    assert fingerprint([part]) != fingerprint([plain])


def test_packed_rows_are_rows_of_their_own(world: Path) -> None:
    task = load(world, TILES)
    (part,) = task.build_split("train", train=True)
    model = task.build_model(torch.device("cpu")).train()
    samples: Any = [part[0, i] for i in range(6)]
    together = model(collate(samples)).loss_sum.item()
    alone = sum(model(collate([sample])).loss_sum.item() for sample in samples)
    model.set_schedule(StepSchedule(reference=True))
    assert together == pytest.approx(alone, rel=1e-5)
    assert together == pytest.approx(model(collate(samples)).loss_sum.item(), rel=1e-5)


def test_kept_features_are_those_of_the_tiles(world: Path, model: Any, tmp_path: Path) -> None:
    def fill(*options: str) -> tuple[Any, Counts]:
        section = {"enabled": True, "dtype": "fp32", "dir": str(tmp_path / "f")}
        task = load(world, f"run.feature_cache={json.dumps(section)}", *options)
        (part,) = task.build_split("train", train=True)
        return part, task.cache_features(RunData([[part]], {}), torch.device("cpu"))

    assert fill()[1] == Counts(0, 6, 0)
    part, counts = fill(TILES)
    assert counts == Counts(6, 2 * (2 + 4), 0)  # the whole pictures were there
    (plain,) = load(world, TILES).build_split("train", train=True)
    for i in range(6):
        got, shown = part[0, i], plain[0, i]
        assert torch.equal(got.input_ids, shown.input_ids) and not len(got.spans.pixels)
        with torch.no_grad():
            wanted = model.encode_query(shown.spans.pixels)
        assert torch.allclose(got.spans.features, wanted, atol=1e-5)


def test_chat_and_scores_see_what_training_saw(world: Path, model: Any) -> None:
    task = load(world, TILES)
    (part,) = task.build_split("test", train=False)
    scored = predict(model, part, batch_size=5, max_new_tokens=3)
    chosen = task.config.preprocess.vis_processor.eval
    fit = task.config.fit("preprocess.vis_processor.eval", chosen)
    tiles = task.config.preprocess.tiles
    engine = ChatEngine(model, PROCESSORS.get("blip_image_eval")(fit), tiles=tiles)
    for i, record in enumerate(part.records[:3]):
        talk = Conversation(engine, ChatSettings(max_new_tokens=3))
        (image,) = talk.show(record.images[0])
        assert len(image.numbers) == (1, 3, 5)[i % 3]
        answer = talk.ask(record.turns[-2].text.removeprefix(f"<Img>{P}</Img> "))
        assert answer.prompt == model.encoder.prompt(part.turns(record)[:-1])
        assert answer.read() == scored[i].answer
        pixels = part.spans(record, 0, 0).pixels
        with torch.no_grad():
            assert torch.allclose(image.embeds, model.encode_image(pixels), atol=1e-5)
        again = talk.ask("What else?")
        again.read()
        cold = model.generate_ids([again.prompt], pixels, max_new_tokens=3)
        assert again.ids == cold[0]


def test_who_is_blind_sees_the_tiles_of_another(
    world: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = load(world, TILES).build_split("test", train=False)
    part = replace(part, records=part.records[:3])
    grids = {r.images: r.grids for r in part.records}
    shown: list[Any] = []
    spans = InstructionDataset.spans

    def watched(self: Any, record: Any, **where: int) -> Any:
        shown.append(record)
        return spans(self, record, **where)

    monkeypatch.setattr(InstructionDataset, "spans", watched)
    predict(model, part, batch_size=3, max_new_tokens=2, blind=True, seed=1)
    own = {r.sample_id: r.images for r in part.records}
    assert any(r.images != own[r.sample_id] for r in shown)
    assert all(r.grids == grids[r.images] for r in shown)


@pytest.fixture()
def wide(tmp_path: Path) -> Path:
    path = tmp_path / "wide.png"
    Image.effect_noise((200, 90), 90).save(path)
    return path


def tiled_chat() -> tuple[ChatEngine, ChatSettings]:
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    recipe = str(REPO / "lavis/projects/toybox/train.yaml")
    where = ["--checkpoint", str(TOYBOX / "checkpoint.pth"), "--device", "cpu"]
    root = ["--options", f"env.cache_root={REPO}", TILES]
    engine, settings, _ = load_chat(parser.parse_args(["--cfg-path", recipe, *where, *root]))
    return engine, settings


def test_the_server_shows_tiles(wide: Path) -> None:
    engine, settings = tiled_chat()
    url = f"data:image/png;base64,{base64.b64encode(wide.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "So?"}]
    body = {"model": "toy", "messages": [{"role": "user", "content": content}]}
    prompt = Prompts(engine, Limits(), settings)(ChatBody.read(json.dumps(body).encode()))
    talk = Conversation(engine)
    talk.show(wide)
    assert prompt.ids == talk.ask("So?").prompt
    assert prompt.ids.count(engine.tokenizer.image_id) == 9 * 3


def test_the_page_shows_tiles(wide: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra `web`")
    from lavis.chat.web.app import WebChat
    from lavis.chat.web.sessions import Session

    engine, settings = tiled_chat()
    session = Session("tab", "client", Conversation(engine))
    WebChat(engine, settings)._show(session, wide, "wide.png")
    (image,) = session.conversation.waiting
    assert image.places == f"{P}\n{P}{P}" and len(image.numbers) == 3


def test_the_plan_counts_the_largest_picture() -> None:
    def made(*options: str) -> Estimator:
        path = REPO / "lavis/projects/toybox/train.yaml"
        off = "run.feature_cache.enabled=false"
        config = load_config(path, [f"env.cache_root={REPO}", off, *options])
        return Estimator(config, Sharing("single", 1))

    plain, tiled = made(), made(TILES)
    assert tiled.batch(2).spans.pixels.shape == (2 * 5, 3, SIDE, SIDE)
    assert plain.batch(2).spans.pixels.shape == (2, 3, SIDE, SIDE)
    ids = tiled.batch(1).input_ids.flatten().tolist()
    assert ids.count(tiled.model.tokenizer.image_id) == 9 * 5
    assert tiled.length >= 9 * 5 > plain.model.encoder.num_query_token
    assert tiled.flops(StepSchedule()) > plain.flops(StepSchedule())  # a token's, more are images'
