"""The embedded data set, the idx reader, the readers of train/data.py and the seeded samples."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from striate.train.augment import eval_transform, train_transform
from striate.train.config import AugmentConfig, DataConfig
from striate.train.data import (
    Batch,
    BrokenImage,
    EvalImages,
    TrainImages,
    eval_loader,
    open_source,
    open_sources,
    resolve_preprocess,
    train_loader,
)
from striate.train.datasets import FASHION_MNIST_CLASSES, SUBSET, make_fashion_mnist_subset
from striate.train.datasets.idx import read_idx, read_idx_split
from striate.train.datasets.make_fashion_mnist_subset import make_subset
from striate.train.sampler import SampleKey, TrainingOrder

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CPU = torch.device("cpu")
SUBSET_OPTIONS = {"name": "fashion-mnist-subset"}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder like Debian's with 700 + 120 random images, labels in random order."""
    rng = np.random.default_rng(1)
    for prefix, count in (("train", 700), ("t10k", 120)):
        labels = rng.permutation(np.arange(count, dtype=np.uint8) % 10)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def training_images(options: AugmentConfig, size: int = 16, seed: int = 5) -> TrainImages:
    config = DataConfig(**SUBSET_OPTIONS, image_size=size)
    preprocess = resolve_preprocess(config, 3, {"mean": (0.5,) * 3, "std": (0.25,) * 3})
    transform = train_transform(options, preprocess)
    return TrainImages(open_source(config, "train", 3).images, lambda epoch: transform, "RGB", seed)


class TestSubset:
    def test_size_and_balance(self) -> None:
        assert SUBSET.stat().st_size <= 3_000_000
        with np.load(SUBSET, allow_pickle=False) as arrays:
            assert arrays["train_images"].shape == (5000, 28, 28)
            assert arrays["train_images"].dtype == np.uint8
            assert np.bincount(arrays["train_labels"]).tolist() == [500] * 10
            assert arrays["test_images"].shape == (1000, 28, 28)
            assert np.bincount(arrays["test_labels"]).tolist() == [100] * 10
            assert tuple(arrays["classes"]) == FASHION_MNIST_CLASSES

    def test_content_is_pinned(self) -> None:
        digest = hashlib.sha256()
        with np.load(SUBSET, allow_pickle=False) as arrays:
            for key in ("train_images", "train_labels", "test_images", "test_labels"):
                digest.update(arrays[key].tobytes())
        assert digest.hexdigest() == "10e2c73b83c53eb264a8d3eb182ae4a010c75d9782f0813c1625877fd728d637"

    def test_notice_is_beside_it(self) -> None:
        notice = SUBSET.with_name("FASHION_MNIST_LICENSE.txt").read_text()
        assert "2017 Zalando SE" in notice
        assert "Permission is hereby granted" in notice

    def test_script_makes_it(self, idx_folder: Path, tmp_path: Path) -> None:
        """From the real files where they are installed, else from made-up ones against what the script promises."""
        if DEBIAN.is_dir():
            made = make_subset(DEBIAN)
            with np.load(SUBSET, allow_pickle=False) as arrays:
                assert sorted(arrays) == sorted(made)
                for key, value in made.items():
                    assert arrays[key].dtype == value.dtype
                    assert np.array_equal(arrays[key], value), key
        else:
            self._check_made(idx_folder, make_subset(idx_folder, 50, 10))

    def test_script_on_made_up_files(self, idx_folder: Path) -> None:
        self._check_made(idx_folder, make_subset(idx_folder, 50, 10))

    @staticmethod
    def _check_made(folder: Path, made: dict[str, np.ndarray]) -> None:
        for split, per_class in (("train", 50), ("test", 10)):
            images, labels = read_idx_split(folder, split)
            for label in range(10):
                first = np.flatnonzero(labels == label)[:per_class]
                mine = made[f"{split}_labels"] == label
                assert np.array_equal(made[f"{split}_images"][mine], images[first])
                assert np.array_equal(made[f"{split}_indices"][mine], first)

    def test_script_is_a_command_with_the_same_bytes_every_time(
        self, idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        few = ["--root", str(idx_folder), "--train-per-class", "20", "--test-per-class", "5"]
        for name in ("a.npz", "b.npz"):
            make_fashion_mnist_subset.main([*few, "--out", str(tmp_path / name)])
        assert "200 + 50 images" in capsys.readouterr().out
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
        assert not list(tmp_path.glob("*.tmp"))
        with pytest.raises(SystemExit, match="2"):
            make_fashion_mnist_subset.main(["--root", str(idx_folder), "--out", str(tmp_path / "c.npz")])
        assert "fewer than the 500 asked for" in capsys.readouterr().err
        assert not (tmp_path / "c.npz").exists()


class TestIdx:
    @pytest.mark.parametrize("name", ["x.gz", "x"])
    def test_reads_what_was_written(self, tmp_path: Path, name: str) -> None:
        array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
        write_idx(tmp_path / name, array)
        assert np.array_equal(read_idx(tmp_path / name), array)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "does not begin like"),
            (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x80\x3f", "does not begin like"),
            (b"\x00\x00\x08\x03\x00\x00", "does not fit its header"),
            (b"\x00\x00\x08\x01\x00\x00\x00\x05\x01\x02", "does not fit its header"),
            (b"\x00\x00\x08\x01\x00\x00\x00\x01\x01\x02", "does not fit its header"),
        ],
    )
    def test_damage_is_named(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(tmp_path / "x")

    def test_truncated_gzip(self, tmp_path: Path) -> None:
        write_idx(tmp_path / "x.gz", np.zeros((50, 28, 28), np.uint8))
        whole = (tmp_path / "x.gz").read_bytes()
        (tmp_path / "x.gz").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="whole gzip"):
            read_idx(tmp_path / "x.gz")

    def test_folder_errors(self, idx_folder: Path) -> None:
        with pytest.raises(ValueError, match="choose one of train, test"):
            read_idx_split(idx_folder, "dev")
        write_idx(idx_folder / "t10k-labels-idx1-ubyte.gz", np.zeros(7, np.uint8))
        with pytest.raises(ValueError, match=r"labels \(7,\)"):
            read_idx_split(idx_folder, "test")
        (idx_folder / "train-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
            read_idx_split(idx_folder, "train")


class TestSources:
    def test_subset(self) -> None:
        train, held_out = open_sources(DataConfig(**SUBSET_OPTIONS), 3)
        assert (len(train.images), len(held_out.images)) == (5000, 1000)
        assert train.classes == list(FASHION_MNIST_CLASSES)
        image, label = held_out.images[0]
        assert image.size == (28, 28)
        assert isinstance(label, int)

    def test_full_fashion_mnist(self, idx_folder: Path) -> None:
        train, held_out = open_sources(DataConfig(name="fashion-mnist", root=str(idx_folder)), 1)
        assert (len(train.images), len(held_out.images)) == (700, 120)
        images, labels = read_idx_split(idx_folder, "test")
        image, label = held_out.images[7]
        assert np.array_equal(np.asarray(image), images[7])
        assert label == labels[7]

    def test_own_npz(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (6, 9, 7, 3), np.uint8)
        labels = np.arange(6, dtype=np.int64) % 2
        np.savez(tmp_path / "own.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
        source = open_source(DataConfig(name="npz", root=str(tmp_path / "own.npz")), "train", 3)
        assert source.classes is None
        assert np.array_equal(np.asarray(source.images[3][0]), images[3])

    def test_bad_npz(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "few.npz", train_images=np.zeros((2, 4, 4), np.uint8))
        np.savez(tmp_path / "float.npz", train_images=np.zeros((2, 4, 4)), train_labels=np.zeros(2))
        (tmp_path / "text.npz").write_text("not a zip file")
        np.savez(tmp_path / "pickle.npz", train_images=np.array([{}], dtype=object), train_labels=np.zeros(1))
        for name, message in (
            ("few", "train_labels"),
            ("float", "must be uint8"),
            ("text", "is not a .npz"),
            ("pickle", "is not a .npz"),
        ):
            with pytest.raises(ValueError, match=message):
                open_source(DataConfig(name="npz", root=str(tmp_path / f"{name}.npz")), "train", 3)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"name": "torch/no_such_set", "root": "/tmp"}, "no_such_set"),
            ({"name": "hfids/some/set"}, "stream"),
            ({"name": "fashion-mnist"}, "data.root is needed"),
            ({"name": "npz"}, "data.root is needed"),
            ({"name": "fashion-mnist-subset", "options": {"download": True}}, "do not apply"),
            ({"name": "folder", "root": "/no/such/folder"}, "does not exist"),
        ],
    )
    def test_errors(self, config: dict[str, object], message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(DataConfig(**config), "train", 3)

    def test_unknown_split_of_the_subset(self) -> None:
        with pytest.raises(ValueError, match="choose train or validation"):
            open_source(DataConfig(**SUBSET_OPTIONS), "trian", 3)


class TestPreprocess:
    def test_model_gives_what_the_config_leaves_open(self) -> None:
        cfg = {"input_size": (3, 48, 40), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "crop_pct": 0.9}
        config = DataConfig(**SUBSET_OPTIONS, preprocess={"std": [0.25]})
        values = resolve_preprocess(config, 3, cfg)
        assert values["input_size"] == (3, 48, 40)
        assert values["mean"] == (0.1, 0.2, 0.3)
        assert values["std"] == (0.25, 0.25, 0.25)
        assert values["crop_pct"] == 0.9

    def test_grey_averages_a_colour_mean(self) -> None:
        values = resolve_preprocess(DataConfig(**SUBSET_OPTIONS, image_size=(8, 12)), 1, {"mean": (0.1, 0.2, 0.3)})
        assert values["input_size"] == (1, 8, 12)
        assert values["mean"] == pytest.approx((0.2,))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="unknown key 'meen'"):
            resolve_preprocess(DataConfig(**SUBSET_OPTIONS, preprocess={"meen": 0.5}), 3, {})
        with pytest.raises(ValueError, match="2 values for 3 channels"):
            resolve_preprocess(DataConfig(**SUBSET_OPTIONS, preprocess={"mean": [0.5, 0.5]}), 3, {})

    def test_eval_image_values(self) -> None:
        """A grey image of one value comes out normalised, whatever the resizing does."""
        images = [(Image.new("L", (28, 28), 51), 3)]
        config = DataConfig(**SUBSET_OPTIONS, image_size=32, preprocess={"mean": 0.1, "std": 0.2})
        transform = eval_transform(resolve_preprocess(config, 1, {}))
        image, label = EvalImages(images, transform, "L")[0]
        assert image.shape == (1, 32, 32)
        assert torch.allclose(image, torch.full_like(image, (0.2 - 0.1) / 0.2))
        assert label == 3


class TestAugmentation:
    def test_unknown_options(self) -> None:
        preprocess = resolve_preprocess(DataConfig(**SUBSET_OPTIONS, image_size=16), 3, {})
        with pytest.raises(ValueError, match="unknown key 'hflop'"):
            train_transform(AugmentConfig(options={"hflop": 1.0}), preprocess)
        with pytest.raises(ValueError, match="rand-q9"):
            train_transform(AugmentConfig(auto_augment="rand-q9"), preprocess)

    def test_full_posterize_gives_black(self) -> None:
        """Magnitude 10 asks for 0 bits."""
        preprocess = resolve_preprocess(DataConfig(**SUBSET_OPTIONS, image_size=16), 3, {"mean": (0,) * 3})
        transform = train_transform(AugmentConfig(scale=(1.0, 1.0), auto_augment="rand-m10-p1.0-inc1"), preprocess)
        (policy,) = [step for step in transform.transforms if hasattr(step, "ops")]
        (posterize,) = [step for step in policy.ops if step.name.startswith("Posterize")]
        black = posterize(Image.new("RGB", (8, 8), (200, 100, 50)))
        assert black.getextrema() == ((0, 0),) * 3

    @pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "augmix-m5-w4-d2", "3a"])
    def test_policies_work_on_many_images(self, policy: str) -> None:
        images = training_images(AugmentConfig(auto_augment=policy))
        for number in range(300):
            image = images[SampleKey(number, 0, 0)][0]
            assert torch.isfinite(image).all()

    def test_a_sample_is_a_function_of_its_key(self) -> None:
        options = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", erasing=1.0, color_jitter=0.4)
        images = training_images(options)
        key = SampleKey(17, 3, 0)
        first = images[key][0]
        torch.rand(7), np.random.rand(3)
        images[SampleKey(4, 3, 0)]
        assert torch.equal(images[key][0], first)
        for other in (SampleKey(17, 4, 0), SampleKey(17, 3, 1), SampleKey(18, 3, 0)):
            assert not torch.equal(images[other][0], first)
        assert not torch.equal(training_images(options, seed=6)[key][0], first)


class TestLoaders:
    def test_workers_do_not_change_the_batches(self) -> None:
        images = training_images(AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5))
        order = TrainingOrder(120, 20, seed=5, start_step=4, stop_step=9)
        loads = [list(train_loader(images, order, workers, CPU)) for workers in (0, 2)]
        assert len(loads[0]) == len(loads[1]) == 5
        for alone, helped in zip(*loads, strict=True):
            assert torch.equal(alone.images, helped.images)
            assert torch.equal(alone.labels, helped.labels)
            assert alone.broken == helped.broken == ()
        assert alone.images.shape == (20, 3, 16, 16)
        assert (alone.images.dtype, alone.labels.dtype) == (torch.float32, torch.int64)

    def test_transform_of_the_epoch(self) -> None:
        """Sides of 16 pixels, and 24 from epoch 1 on; a step has one size, and the loader does not stop between."""
        config = DataConfig(**SUBSET_OPTIONS)
        transforms = [train_transform(AugmentConfig(), resolve_preprocess(config, 1, {"input_size": (1, side, side)}))
                      for side in (16, 24)]  # fmt: skip
        few = [open_source(config, "train", 1).images[number] for number in range(8)]
        images = TrainImages(few, lambda epoch: transforms[epoch > 0], "L", 5)
        order = TrainingOrder(8, 4, seed=5, stop_step=6)
        sides = [batch.images.shape[-1] for batch in train_loader(images, order, 2, CPU)]
        assert sides == [16, 16, 24, 24, 24, 24]

    def test_batches_can_be_pinned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What torch does to a batch on its way to a GPU keeps its kind and the broken images."""
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: tensor + 0)
        batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]), (BrokenImage(3, "a.png", "gone"),))
        pinned = pin_memory(batch)
        assert isinstance(pinned, Batch)
        assert torch.equal(pinned.labels, batch.labels)
        assert pinned.images is not batch.images
        assert list(pinned.broken) == list(batch.broken)
        assert isinstance(pinned.broken[0], BrokenImage)

    @pytest.mark.parametrize("world_size", [1, 3])
    def test_evaluation_sees_every_image_once(self, world_size: int) -> None:
        source = open_source(DataConfig(**SUBSET_OPTIONS), "test", 1).images
        few = [source[number] for number in range(50)]
        transform = eval_transform(resolve_preprocess(DataConfig(**SUBSET_OPTIONS, image_size=28), 1, {}))
        images = EvalImages(few, transform, "L")
        seen = [batch[0] for rank in range(world_size) for batch in eval_loader(images, 7, 0, CPU, rank, world_size)]
        stacked = torch.cat(seen)
        assert len(stacked) == 50
        wanted = torch.stack([images[number][0] for number in range(50)])
        order = torch.cat([torch.arange(rank, 50, world_size) for rank in range(world_size)])
        assert torch.equal(stacked, wanted[order])
