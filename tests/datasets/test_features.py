"""Features on disk: what is found under a key is what was written under it, or nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis.common import images
from lavis.common.errors import DataError, LavisError
from lavis.common.hashing import file_digest
from lavis.common.images import open_image
from lavis.common.registry import PROCESSORS
from lavis.common.videos import Picture
from lavis.datasets import feature_store, features
from lavis.datasets.feature_store import FeatureStore
from lavis.datasets.features import (
    CachedFeatures,
    FeatureIndex,
    is_random,
    transform_fingerprint,
)
from lavis.processors.config import ImageEvalConfig, ImageTrainConfig

SHAPE = (3, 4)
KEYS = [bytes([i]) * 32 for i in range(6)]
VALUES = [torch.arange(12.0).view(SHAPE) + i for i in range(6)]


def fill(folder: Path, numbers: list[int], dtype: str = "fp32") -> FeatureStore:
    store = FeatureStore(folder, SHAPE, dtype)
    for i in numbers:
        store.add(KEYS[i], VALUES[i])
    store.flush()
    return FeatureStore(folder, SHAPE, dtype)


def found(store: FeatureStore) -> list[int]:
    """Numbers of the undamaged records; whatever is returned must be right."""
    there = [i for i, key in enumerate(KEYS) if store.get(key) is not None]
    assert all(torch.equal(store.get(KEYS[i]), VALUES[i].to(store.dtype)) for i in there)
    return there


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_reads_what_was_written(tmp_path: Path, dtype: str) -> None:
    assert found(FeatureStore(tmp_path / "nowhere", SHAPE, dtype)) == []
    fill(tmp_path, [0, 1], dtype)
    store = fill(tmp_path, [3], dtype)
    assert found(store) == [0, 1, 3]
    assert found(pickle.loads(pickle.dumps(store))) == [0, 1, 3]  # a loader's worker


def test_a_byte_for_a_number(tmp_path: Path) -> None:
    """With a scale for each channel: one that is large in all does not blur the others."""
    torch.manual_seed(0)
    sizes = torch.tensor([1e-3, 1.0, 30.0, 0.0])
    values = torch.randn(5, 3, 4) * sizes
    store = FeatureStore(tmp_path, SHAPE, "int8")
    for key, value in zip(KEYS, values, strict=False):
        assert store.holds(value)
        store.add(key, value)
    store.flush()
    store = FeatureStore(tmp_path, SHAPE, "int8")
    (shard,) = store.folder.glob("*.safetensors")
    assert shard.stat().st_size < 5 * store.nbytes + 400
    for key, value in zip(KEYS, values, strict=False):
        got = store.get(key)
        assert got is not None and got.dtype == torch.float32
        step = value.abs().amax(0) / 127
        assert ((got - value).abs() <= step / 2 + 1e-7 * step).all()
        assert (got[value.abs().argmax(0), range(4)]).allclose(
            value[value.abs().argmax(0), range(4)]
        )
    assert not store.holds(torch.tensor([[float("nan")] * 4] * 3))
    assert not FeatureStore(tmp_path, SHAPE, "fp16").holds(torch.full(SHAPE, 1e6))
    assert store.holds(torch.full(SHAPE, 1e6))


def test_other_shapes_and_types_are_apart(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    assert not any(key in FeatureStore(tmp_path, (4, 3), "fp32") for key in KEYS)
    assert found(FeatureStore(tmp_path, SHAPE, "fp16")) == []


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """In a row's numbers, key or checksum it costs the row, in the header at most the shard."""
    store = fill(tmp_path, [0, 1, 2])
    (path,) = store.folder.iterdir()
    size = path.stat().st_size
    lost = []
    for position in range(size):
        flip(path, position)
        feature_store._mapped.cache_clear()
        kept = found(FeatureStore(tmp_path, SHAPE, "fp32"))  # each of them right
        flip(path, position)
        lost.append(3 - len(kept))
    assert set(lost[-3 * (48 + 32 + 8) :]) == {1} and set(lost) <= {0, 1, 3}
    flip(path, size - 1)
    feature_store._mapped.cache_clear()
    damaged = found(FeatureStore(tmp_path, SHAPE, "fp32"))
    assert len(damaged) == 2
    (gone,) = {0, 1, 2}.difference(damaged)
    assert found(fill(tmp_path, [gone])) == [0, 1, 2]  # written again, beside the damaged one


def test_a_torn_shard_leaves_the_others(tmp_path: Path) -> None:
    (torn,) = fill(tmp_path, [0, 1]).folder.iterdir()
    whole = torn.read_bytes()
    fill(tmp_path, [3])
    for size in range(len(whole)):
        torn.write_bytes(whole[:size])
        assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == [3]
    torn.unlink()
    assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == [3]


def test_shards_are_written_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many bytes, or so long; under their name only when they are whole."""
    monkeypatch.setattr(feature_store, "_BYTES", 2 * 48)
    store = FeatureStore(tmp_path, SHAPE, "fp32")
    for i in range(3):
        store.add(KEYS[i], VALUES[i])
    assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == [0, 1]
    monkeypatch.setattr(feature_store, "_SECONDS", -1)
    store.flush()
    store.add(KEYS[3], VALUES[3])
    assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == [0, 1, 2, 3]

    def full(path: Path, content: bytes) -> None:
        path.open("wb").write(content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LavisError, match=r"cannot be written: .*No space left on device\. What"):
        store.add(KEYS[4], VALUES[4])
    assert {p.suffix for p in store.folder.iterdir()} == {".safetensors"}
    assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == [0, 1, 2, 3]


def test_an_older_version_is_named_and_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = FeatureStore(tmp_path, SHAPE, "fp32").folder
    folder.mkdir()
    (folder / "0.index").write_bytes(b"LAVISFC1" + bytes(8 + 48))
    (folder / "0.data").write_bytes(bytes(48))
    assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == []
    (message,) = caplog.messages
    assert message.startswith(f"feature cache {folder}: 1 shards of an older version ")


class _Custom:
    """A third party's processor, which does not say whether it draws random numbers."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.rand(3, 2, 2)


def processor(name: str, **options: Any) -> Any:
    config = ImageTrainConfig if "train" in name else ImageEvalConfig
    return PROCESSORS.get(name)(config(name, **options))


def test_features_of_another_reading_of_pictures_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = CachedFeatures(_Custom(), 0, 1)
    cached.index = FeatureIndex(fill(tmp_path, []), "e", {tmp_path: "a"}, {})
    before = cached.key(Picture(tmp_path), 0)
    assert features._FORMAT == (2, images.IMAGE_READING)
    monkeypatch.setattr(features, "_FORMAT", (2, images.IMAGE_READING + 1))
    assert cached.key(Picture(tmp_path), 0) != before


def test_what_a_transform_is() -> None:
    evaluation, training = processor("blip_image_eval"), processor("blip2_image_train")
    assert not is_random(evaluation) and is_random(training) and is_random(_Custom())
    assert transform_fingerprint(evaluation, 1) == transform_fingerprint(evaluation, 2)
    prints = [
        transform_fingerprint(p, seed)
        for p, seed in [
            (evaluation, 1),
            (processor("blip_image_eval", image_size=56), 1),
            (processor("blip_image_eval", mean=(0.5, 0.5, 0.5)), 1),
            (training, 1),
            (training, 2),
            (processor("blip2_image_train", min_scale=0.7), 1),
            (_Custom(), 1),
        ]
    ]
    assert len(set(prints)) == len(prints)


def test_a_view_depends_on_content_seed_and_number_alone(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
    path = tmp_path / "a.png"
    Image.fromarray(noise).save(path)
    training = processor("blip2_image_train", image_size=14)
    store = FeatureStore(tmp_path, SHAPE, "fp32")
    views = []
    for seed, number, digest in [(1, 0, "a"), (1, 1, "a"), (2, 0, "a"), (1, 0, "b")]:
        cached = CachedFeatures(training, seed, 2)
        cached.index = FeatureIndex(store, "e", {path: digest}, {})
        view = cached.draw(open_image(path), path, number)
        state = torch.get_rng_state()
        assert torch.equal(view, cached.draw(open_image(path), path, number))
        assert torch.equal(state, torch.get_rng_state())
        views.append(view)
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_epochs_take_turns_and_what_is_missing_is_said(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store", SHAPE, "fp32")
    path, lost, gone = (tmp_path / name for name in ("a.png", "lost.png", "gone.png"))
    features = CachedFeatures(_Custom(), 0, 2)
    digests, failures = {path: "11", gone: "22"}, {lost: "no such file"}
    features.index = FeatureIndex(store, "encoder", digests, failures)
    for view in range(2):
        store.add(features.key(Picture(path), view), VALUES[view])
    store.flush()
    store.refresh()
    assert [float(features.read(Picture(path), e)[0, 0]) for e in range(4)] == [0, 1, 0, 1]
    with pytest.raises(DataError, match="no such file"):
        features.read(Picture(lost), 0)
    with pytest.raises(DataError, match="gone or damaged"):
        features.read(Picture(gone), 1)


def test_hashes_are_of_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"content")
    other.write_bytes(b"content")
    first = file_digest(one)
    assert first == file_digest(other)
    stat = one.stat()
    one.write_bytes(b"CONTENT")
    os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as copying tools do
    assert file_digest(one) != first
