"""Images in files: every kind of data set that has them, and files that are broken."""

from __future__ import annotations

import io
import itertools
import json
import shlex
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from striate.train.config import DataConfig, parse_config
from striate.train.data import (
    Batch,
    BrokenDataError,
    BrokenImage,
    BrokenImages,
    EvalImages,
    LabelledImages,
    TrainImages,
    eval_loader,
    open_source,
    open_sources,
    resolve_preprocess,
    train_loader,
)
from striate.train.sampler import SampleKey, TrainingOrder

CPU = torch.device("cpu")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ with the classes cat, dog, owl and val/ with cat and owl only, all of one colour per class."""
    colours = {"cat": (250, 0, 0), "dog": (0, 250, 0), "owl": (0, 0, 250)}
    for split, classes in (("train", ("cat", "dog", "owl")), ("val", ("cat", "owl"))):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (20, 24), colours[name]).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((2, 2), Image.Resampling.NEAREST))).permute(2, 0, 1)


def plain_images(images: LabelledImages, seed: int = 5) -> TrainImages:
    """Training images without augmentation."""
    return TrainImages(images, lambda epoch: to_tensor, "RGB", seed)


def batches(images: LabelledImages, workers: int = 0, epochs: int = 1, batch_size: int = 4) -> list[Batch]:
    order = TrainingOrder(len(images), batch_size, seed=5, stop_step=epochs * (len(images) // batch_size))
    return list(train_loader(plain_images(images), order, workers, CPU))


def colours(batches: list[Batch]) -> set[tuple[tuple[int, ...], int]]:
    """Which colours carry which label."""
    return {(tuple(image[:, 0, 0].tolist()), int(label)) for b in batches for image, label in zip(*b[:2], strict=True)}


class TestFolders:
    def test_folder_keeps_the_class_numbers_of_training(self, image_folder: Path) -> None:
        config = DataConfig(name="folder", root=str(image_folder))
        train, held_out = open_sources(config, 3)
        assert train.classes == held_out.classes == ["cat", "dog", "owl"]
        labels = {image.getpixel((0, 0)): label for image, label in (held_out.images[i] for i in range(8))}
        assert labels == {(250, 0, 0): 0, (0, 0, 250): 2}

    def test_folder_without_the_split_is_refused(self, image_folder: Path) -> None:
        config = DataConfig(name="folder", root=str(image_folder), eval_split="holdout")
        with pytest.raises(ValueError, match="no folder for the split 'holdout'"):
            open_sources(config, 3)

    def test_torchvision(self, image_folder: Path) -> None:
        source = open_source(DataConfig(name="torch/image_folder", root=str(image_folder)), "val", 3)
        assert source.classes == ["cat", "owl"]
        assert source.images[7][1] == 1


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 24), colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


COLOURS = {"cat": (250, 0, 0), "dog": (0, 250, 0), "owl": (0, 0, 250)}
SPLITS = {"train": ("cat", "dog", "owl"), "val": ("cat", "owl")}
LABELS = {(colour, label) for label, colour in enumerate(COLOURS.values())}


class TestFiles:
    """The same images of three classes in every kind of file; the evaluation split lacks the class in the middle."""

    @staticmethod
    def check(name: str, root: Path | None, **keys: Any) -> None:
        config = DataConfig(name=name, root=None if root is None else str(root), eval_split="val", **keys)
        train, held_out = open_sources(config, 3)
        assert train.classes == held_out.classes == list(COLOURS)
        assert (len(train.images), len(held_out.images)) == (12, 8)
        assert colours(batches(train.images)) == LABELS
        loader = eval_loader(EvalImages(held_out.images, to_tensor, "RGB"), 3, 0, CPU)
        seen = [Batch(*batch, ()) for batch in loader]
        assert [len(batch.labels) for batch in seen] == [3, 3, 2]
        assert colours(seen) == LABELS - {((0, 250, 0), 1)}

    def test_folder(self, image_folder: Path) -> None:
        self.check("folder", image_folder)

    def test_tar_of_class_folders(self, tmp_path: Path) -> None:
        for split, classes in SPLITS.items():
            members = {f"{name}/{i}.png": png(COLOURS[name]) for name in classes for i in range(4)}
            write_tar(tmp_path / f"{split}.tar", members)
        self.check("tar", tmp_path)

    @pytest.mark.parametrize("nested", [True, False], ids=["tar of tars", "folder of tars"])
    def test_tar_of_each_class(self, tmp_path: Path, nested: bool) -> None:
        for split, classes in SPLITS.items():
            folder = tmp_path / split
            folder.mkdir()
            tars = {}
            for name in classes:
                path = folder / f"{name}.tar"
                tars[path.name] = write_tar(path, {f"{name}_{i}.png": png(COLOURS[name]) for i in range(4)})
                if nested:
                    path.unlink()
            if nested:
                folder.rmdir()
                write_tar(tmp_path / f"{split}.tar", tars)
        self.check("tar", tmp_path)

    def test_tar_is_read_by_many_processes(self, tmp_path: Path) -> None:
        """A file that the parent has begun to read would have one position for all of them."""
        for split in SPLITS:
            members = {
                f"{name}/{i}.png": png((value, i, 9)) for name, value in (("a", 0), ("b", 99)) for i in range(40)
            }
            write_tar(tmp_path / f"{split}.tar", members)
        images = open_sources(DataConfig(name="tar", root=str(tmp_path), eval_split="val"), 3)[0].images
        alone, helped = batches(images), batches(images, workers=2)
        assert all(torch.equal(a.images, b.images) for a, b in zip(alone, helped, strict=True))
        assert all(b.broken == () for b in helped)

    def test_parquet(self, tmp_path: Path) -> None:
        """Hugging Face data sets, offline: a folder of parquet files named after the splits."""
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
        (tmp_path / "set").mkdir()
        for split, classes in SPLITS.items():
            rows = [(name, i) for name in classes for i in range(4)]
            data = {
                "image": [{"bytes": png(COLOURS[name]), "path": f"{name}{i}.png"} for name, i in rows],
                "label": [name for name, _ in rows],
            }
            file = f"{'validation' if split == 'val' else split}.parquet"
            datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / "set" / file)
        config = DataConfig(name=f"hfds/{tmp_path / 'set'}", root=str(tmp_path / "cache"))
        train, held_out = open_sources(config, 3)
        assert train.classes == held_out.classes == list(COLOURS)
        assert (len(train.images), len(held_out.images)) == (12, 8)
        assert colours(batches(train.images)) == LABELS

    @pytest.mark.parametrize("target_key", [None, "number"])
    def test_shards(self, tmp_path: Path, target_key: str | None) -> None:
        """WebDataset: three shards of a split, written by its own library."""
        for split, classes in SPLITS.items():
            with webdataset.ShardWriter(f"{tmp_path}/set-{split}-%03d.tar", maxcount=5, verbose=0) as shards:
                for number, name in enumerate(name for name in classes for _ in range(4)):
                    label = list(COLOURS).index(name)
                    target = {"cls": label} if target_key is None else {"json": {"number": label, "name": name}}
                    shards.write({"__key__": f"{split}/{number:04d}", "png": png(COLOURS[name]), **target})
        options = {} if target_key is None else {"target_key": target_key}
        config = DataConfig(
            name="wds/set", root=str(tmp_path), train_split="set-train", eval_split="*-val-*.tar", options=options
        )
        train, held_out = open_sources(config, 3)
        assert train.classes is None
        assert (len(train.images), len(held_out.images)) == (12, 8)
        assert colours(batches(train.images)) == colours(batches(train.images, workers=2)) == LABELS
        assert colours(batches(held_out.images)) == LABELS - {((0, 250, 0), 1)}
        shard = tmp_path / "set-train-002.tar"
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x00" * 4))
        broken = {image for batch in batches(train.images) for image in batch.broken}
        assert {image.path for image in broken} == {f"{shard}/train/0010.png", f"{shard}/train/0011.png"}

    @pytest.mark.parametrize(
        ("members", "options", "message"),
        [
            ({"a.png": b"", "a.cls": b"1", "b.png": b""}, {}, r"sample b has no class number \(\.cls\)"),
            ({"a.cls": b"1"}, {"input_key": "gif"}, r"sample a has no image \(\.gif\)"),
            ({"a.png": b"", "a.cls": b"cat"}, {}, "is not a shard with class numbers in .cls: .*'cat'"),
            ({"a.png": b"", "a.json": b"{}"}, {"target_key": "id"}, "class numbers in .json: KeyError"),
            (None, {}, "train-0.tar is not a shard .*ReadError"),
            ({"a.png": b"", "a.cls": b"1"}, {"inputkey": "png"}, "unexpected keyword argument 'inputkey'"),
        ],
    )
    def test_damaged_shards(
        self, tmp_path: Path, members: dict[str, bytes] | None, options: dict[str, str], message: str
    ) -> None:
        path = tmp_path / "train-0.tar"
        if members is None:
            path.write_bytes(b"text" * 200)
        else:
            write_tar(path, members)
        with pytest.raises(ValueError, match=message):
            open_source(DataConfig(name="wds", root=str(tmp_path), options=options), "train", 3)

    @pytest.mark.parametrize(
        ("name", "root", "message"),
        [
            ("tar", "", "neither train.tar nor a folder train"),
            ("tar", None, "data.root None does not exist"),
            ("wds", None, "data.root None does not exist"),
            ("wds", "", r"has no shards train-\*\.tar; a split is a name, or a pattern"),
            ("folder", "a.tar", "is a file; .*data.name tar"),
        ],
    )
    def test_errors(self, tmp_path: Path, name: str, root: str | None, message: str) -> None:
        write_tar(tmp_path / "a.tar", {"cat/1.png": png((1, 2, 3))})
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(DataConfig(name=name, root=None if root is None else str(tmp_path / root)), "train", 3)


def test_commands_of_the_manual() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("    striate train ")]
    configs = [parse_config(words) for words in commands]
    kinds = {config.data.name.partition("/")[0] for config in configs}
    assert kinds == {"folder", "tar", "npz", "fashion-mnist-subset", "fashion-mnist", "torch", "wds", "hfds"}
    for config in configs:
        resolve_preprocess(config.data, config.model.in_chans, {})


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no image", "header": whole[:20]}[kind]
    path.write_bytes(content)


class TestBrokenImages:
    """train/ of the image folder with one broken image in three."""

    @pytest.fixture
    def broken_folder(self, image_folder: Path) -> Path:
        for name, kind in (("cat", "truncated"), ("dog", "empty"), ("owl", "text")):
            damage(image_folder / "train" / name / "2.png", kind)
        damage(image_folder / "train" / "owl" / "3.png", "header")
        return image_folder

    def test_others_take_their_place(self, broken_folder: Path) -> None:
        images = open_source(DataConfig(name="folder", root=str(broken_folder)), "train", 3).images
        alone, helped = (batches(images, workers, epochs=6) for workers in (0, 2))
        for a, b in zip(alone, helped, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert a.broken == b.broken
        assert colours(alone) == LABELS
        broken = {image.number: image for batch in alone for image in batch.broken}
        assert sorted(broken) == [2, 6, 10, 11]
        assert broken[6].path == str(broken_folder / "train/dog/2.png")
        assert "UnidentifiedImageError" in broken[10].reason

    def test_a_replacement_is_a_function_of_its_key(self, broken_folder: Path) -> None:
        images = plain_images(open_source(DataConfig(name="folder", root=str(broken_folder)), "train", 3).images)
        keys = [SampleKey(2, epoch, copy) for epoch, copy in itertools.product(range(8), range(2))]
        first = [images[key] for key in keys]
        again = [images[key] for key in reversed(keys)][::-1]
        for (image, label, broken), (other, same_label, same_broken) in zip(first, again, strict=True):
            assert torch.equal(image, other)
            assert (label, broken) == (same_label, same_broken)
        assert len({label for _, label, _ in first}) == 3, "an image is not always replaced by the same other one"

    @pytest.mark.parametrize("error", [OSError, SyntaxError, KeyError, RuntimeError, Image.DecompressionBombError])
    def test_any_error_of_a_reader(self, error: type[Exception]) -> None:
        images = plain_images(FailingImages(error))
        _, label, broken = images[SampleKey(1, 0, 0)]
        assert label in (0, 2, 3)
        assert broken[0][:2] == (1, "image 1")
        assert broken[0].reason.startswith(error.__name__)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_errors_that_are_no_damage(self, error: type[BaseException]) -> None:
        with pytest.raises(error):
            plain_images(FailingImages(error))[SampleKey(1, 0, 0)]

    def test_decompression_bombs(self, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 480 pixels are more than twice as many
        images = open_source(DataConfig(name="folder", root=str(image_folder)), "train", 3).images
        with pytest.raises(BrokenDataError, match="20 training images .*DecompressionBombError"):
            plain_images(images)[SampleKey(0, 0, 0)]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_evaluation_stops(self, image_folder: Path, workers: int) -> None:
        damage(image_folder / "val" / "owl" / "1.png", "truncated")
        images = open_source(DataConfig(name="folder", root=str(image_folder)), "val", 3).images
        loader = iter(eval_loader(EvalImages(images, to_tensor, "RGB"), 4, workers, CPU))
        with pytest.raises(OSError, match=r"image 5 \(.*val/owl/1\.png\) cannot be read: OSError: .*truncated"):
            list(loader)
        if workers:
            loader._shutdown_workers()  # left to the garbage collector, it takes ten seconds

    def test_limit(self) -> None:
        broken = [BrokenImage(number, f"{number}.png", "OSError: truncated") for number in range(40)]
        known = BrokenImages(0.03, 100)
        assert known.add(broken[:2]) == broken[:2]
        assert known.add([broken[1], broken[2], broken[2]]) == [broken[2]]
        restored = BrokenImages(0.03, 100)
        restored.load(json.loads(json.dumps(known.state())))
        assert restored.add(broken[:3]) == []
        with pytest.raises(BrokenDataError, match=r"4 of 100 .*data.broken_limit 0.03 .*0\.png \(OSError.*raise data"):
            restored.add(broken[3:4])
        with pytest.raises(BrokenDataError, match=r"19\.png \(OSError: truncated\); and 20 more\. ") as caught:
            known.add(broken)
        assert "20.png" not in str(caught.value)
        with pytest.raises(BrokenDataError, match="1 of 100"):
            BrokenImages(0.0, 100).add(broken[:1])


class FailingImages:
    """Four black images with the labels 0 … 3, of which number 1 raises an error."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 1:
            raise self.error("reason")
        return Image.new("RGB", (4, 4)), index
