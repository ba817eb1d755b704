"""Features on disk: what is found under a key is what was written under it, or nothing."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis.common import images
from lavis.common.errors import DataError
from lavis.common.hashing import file_digest
from lavis.common.registry import PROCESSORS
from lavis.datasets import features
from lavis.datasets.feature_store import FeatureStore
from lavis.datasets.features import (
    CachedFeatures,
    draw_view,
    is_random,
    transform_fingerprint,
)
from lavis.processors.config import ImageEvalConfig, ImageTrainConfig

SHAPE = (3, 4)
KEYS = [bytes([i]) * 32 for i in range(6)]
VALUES = [torch.arange(12.0).view(SHAPE) + i for i in range(6)]


def fill(folder: Path, numbers: list[int], dtype: str = "fp32") -> FeatureStore:
    store = FeatureStore(folder, SHAPE, dtype)
    with store.writer() as writer:
        for i in numbers:
            writer.add(KEYS[i], VALUES[i])
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
    assert found(store) == [0, 1, 3] and len(store) == 3
    assert found(pickle.loads(pickle.dumps(store))) == [0, 1, 3]  # a loader's worker


def test_other_shapes_and_types_are_apart(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    assert len(FeatureStore(tmp_path, (4, 3), "fp32")) == 0
    assert len(FeatureStore(tmp_path, SHAPE, "fp16")) == 0


def files(store: FeatureStore) -> tuple[Path, Path]:
    (data,), (index,) = store.folder.glob("*.data"), store.folder.glob("*.index")
    return data, index


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """In the data it costs its record, in an index entry too, in the header the shard."""
    store = fill(tmp_path, [0, 1, 2])
    for path, size, start in zip(files(store), (48, 48), (0, 16), strict=True):
        for position in range(path.stat().st_size):
            flip(path, position)
            lost = (position - start) // size
            expected = [i for i in range(3) if i != lost] if position >= start else []
            assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == expected
            flip(path, position)
    data, _ = files(store)
    flip(data, 50)
    assert found(fill(tmp_path, [1])) == [0, 1, 2]  # written again, beside the damaged one


def test_every_torn_tail_leaves_the_rest(tmp_path: Path) -> None:
    data, index = files(fill(tmp_path, [0, 1, 2, 3]))
    whole = data.read_bytes(), index.read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        cut = rng.randint(0, len(whole[0])), rng.randint(0, len(whole[1]))
        data.write_bytes(whole[0][: cut[0]])
        index.write_bytes(whole[1][: cut[1]])
        rows = min(cut[0] // 48, max(cut[1] - 16, 0) // 48)
        assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == list(range(rows))
    index.unlink()
    assert found(FeatureStore(tmp_path, SHAPE, "fp32")) == []


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
    digests = {tmp_path: "a"}
    cached = CachedFeatures(fill(tmp_path, []), "e", "t", 1, digests, {})
    before = cached.key(tmp_path, 0)
    assert features._FORMAT == (1, images.IMAGE_READING)
    monkeypatch.setattr(features, "_FORMAT", (1, images.IMAGE_READING + 1))
    assert cached.key(tmp_path, 0) != before


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
    views = []
    for seed, number, digest in [(1, 0, "a"), (1, 1, "a"), (2, 0, "a"), (1, 0, "b")]:
        view = draw_view(path, training, seed, number, digest)
        state = torch.get_rng_state()
        assert torch.equal(view, draw_view(path, training, seed, number, digest))
        assert torch.equal(state, torch.get_rng_state())
        views.append(view)
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_epochs_take_turns_and_what_is_missing_is_said(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store", SHAPE, "fp32")
    path, lost, broken = (tmp_path / name for name in ("a.png", "lost.png", "broken.png"))
    failures: dict[Any, str] = {lost: "no such file"}
    digests = {path: "11", broken: "22"}
    features = CachedFeatures(store, "encoder", "transform", 2, digests, failures)
    failures[features.key(broken, 0)] = "not an image"
    with store.writer() as writer:
        for view in range(2):
            writer.add(features.key(path, view), VALUES[view])
    store.refresh()
    assert [float(features.read(path, e)[0, 0]) for e in range(4)] == [0, 1, 0, 1]
    with pytest.raises(DataError, match="no such file"):
        features.read(lost, 0)
    with pytest.raises(DataError, match="not an image"):
        features.read(broken, 0)
    with pytest.raises(DataError, match="gone or damaged"):
        features.read(broken, 1)


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
