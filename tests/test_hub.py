"""Models pushed to folders and hubs, and created from there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

import striate
from striate.hub import UnreachableError, factory, folders

FILES = ["README.md", "config.json", "model.safetensors"]
SWIN = dict(dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window=4, img_size=64)
Messages = Callable[[], list[str]]


def image_for(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *model.pretrained_cfg["input_size"])  # type: ignore[index, misc]


def nano(**kwargs: Any) -> nn.Module:
    model = striate.create_model("biformer_nano", **{"num_classes": 10, "in_chans": 1, **kwargs}).eval()
    with torch.no_grad():
        for buffer in model.buffers():  # running statistics that a fresh model does not have
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a saved `biformer_nano` of 10 classes for grey images."""
    striate.push(nano(), f"local-dir:{tmp_path}/nano")
    return tmp_path / "nano"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key)
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_every_file_may_be_read_by_whom_the_process_lets(saved: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {(saved / "config.json").stat().st_mode & 0o777}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("biformer_nano", dict(num_classes=10, in_chans=1, num_regions=(2, 4), drop_path_rate=0.1)),
        ("biformer_nano", dict(features_only=True, out_indices=(1, 3), feature_norms=True)),
        ("biformer_nano", dict(num_classes=0)),
        ("swin_tiny", dict(SWIN, num_classes=3, global_pool="max")),
        ("swin_tiny", dict(SWIN, features_only=True)),
        ("resnet18", dict(num_classes=7, in_chans=1)),
        ("vit_tiny_patch16_224", dict(img_size=64, depth=2, num_classes=4, global_pool="avg")),
    ],
)
def test_round_trip(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = striate.create_model(name, **kwargs).eval()
    address = striate.push(model, f"local-dir:{tmp_path / 'model'}")
    assert sorted(os.listdir(tmp_path / "model")) == FILES
    ours, timms = striate.create_model(address).eval(), timm.create_model(address, pretrained=True).eval()
    assert type(ours) is type(timms) is type(model)
    x = image_for(ours)
    assert x.shape[1] == kwargs.get("in_chans", 3)
    for found in (ours, timms):
        wanted, got = model(x), found(x)
        assert all(map(torch.equal, got, wanted)) if isinstance(wanted, list) else torch.equal(got, wanted)
    assert not any(m.drop_prob for m in ours.modules() if isinstance(m, timm.layers.DropPath))
    with safetensors.safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_what_changed_after_creation_is_saved(tmp_path: Path) -> None:
    model = nano(in_chans=3)
    model.reset_classifier(4, "max")  # type: ignore[operator]
    found = striate.create_model(striate.push(model, f"local-dir:{tmp_path}/m", label_names=list("abcd"))).eval()
    x = image_for(found)
    assert torch.equal(found(x), model(x))
    assert found.pretrained_cfg["num_classes"] == 4
    assert found.pretrained_cfg["label_names"] == ("a", "b", "c", "d")


def test_pushing_leaves_the_model_and_the_random_numbers_alone(tmp_path: Path) -> None:
    model = nano().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    striate.push(model, f"local-dir:{tmp_path}/m")
    assert torch.equal(torch.rand(3), wanted)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_wrapped_models_are_unwrapped(tmp_path: Path) -> None:
    model = nano()
    averaged = timm.utils.ModelEmaV3(model)
    found = striate.create_model(striate.push(averaged, f"local-dir:{tmp_path}/m")).eval()
    x = image_for(found)
    assert torch.equal(found(x), model(x))
    optimized = striate.optimize_for_inference(striate.create_model("swin_tiny", **SWIN).eval())
    found = striate.create_model(striate.push(optimized, f"local-dir:{tmp_path}/o")).eval()
    x = image_for(found)
    assert torch.allclose(found(x), optimized(x), atol=1e-5)


def test_arguments_of_the_user_go_first(saved: Path, messages: Messages) -> None:
    edit_config(saved, label_names=[str(i) for i in range(10)])
    model = striate.create_model(f"local-dir:{saved}")
    assert messages() == []
    other = striate.create_model(f"local-dir:{saved}", num_classes=5, drop_path_rate=0.2)
    (said,) = messages()
    assert "10 classes" in said
    assert "5" in said
    assert other.get_classifier().out_features == 5  # type: ignore[operator]
    assert other.pretrained_cfg["num_classes"] == 5
    assert "label_names" not in other.pretrained_cfg
    assert "label_names" in model.pretrained_cfg
    state = other.state_dict()
    kept = [key for key in state if not key.startswith("head.fc.")]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items() if key in kept)


def test_saved_and_unsaved_weights(saved: Path) -> None:
    state = striate.create_model(f"local-dir:{saved}").state_dict()
    fresh = striate.create_model(f"local-dir:{saved}", pretrained=False)
    assert not torch.equal(fresh.state_dict()["head.fc.weight"], state["head.fc.weight"])
    torch.save(state, saved / "other.pth")
    (saved / "model.safetensors").unlink()
    other = striate.create_model(f"local-dir:{saved}", checkpoint_path=saved / "other.pth")
    assert torch.equal(other.state_dict()["head.fc.weight"], state["head.fc.weight"])
    assert fresh.num_classes == 10
    striate.create_model(f"local-dir:{saved}", pretrained=False)


def test_a_timm_model_with_other_classes_is_still_loaded_strictly(tmp_path: Path, messages: Messages) -> None:
    model = striate.create_model("test_resnet", num_classes=7)
    address = striate.push(model, f"local-dir:{tmp_path}/r", label_names=list("abcdefg"))
    other = striate.create_model(address, num_classes=5)
    assert [said for said in messages() if "7 classes" in said and "5" in said]
    assert other.get_classifier().out_features == other.pretrained_cfg["num_classes"] == 5  # type: ignore[operator]
    assert "label_names" not in other.pretrained_cfg
    key = "layer1.0.conv1.weight"
    assert torch.equal(other.state_dict()[key], model.state_dict()[key])
    pyramid = striate.create_model(address, features_only=True).eval()
    assert len(pyramid(torch.randn(1, 3, 64, 64))) == 5
    assert "file" not in pyramid.pretrained_cfg
    assert "file" not in striate.create_model(address).pretrained_cfg
    again = striate.create_model(striate.push(other, f"local-dir:{tmp_path}/again"))
    assert again.num_classes == 5
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("layer4")}
    safetensors.torch.save_file(state, tmp_path / "r" / "model.safetensors")
    for classes in (7, 5):
        with pytest.raises(ValueError, match="layer4"):
            striate.create_model(address, num_classes=classes)


def test_features_from_a_saved_classifier(tmp_path: Path) -> None:
    model = striate.create_model("swin_tiny", **SWIN).eval()
    address = striate.push(model, f"local-dir:{tmp_path}/m")
    pyramid = striate.create_model(address, features_only=True, out_indices=(0, 2)).eval()
    wanted = striate.create_model("swin_tiny", features_only=True, out_indices=(0, 2), **SWIN).eval()
    striate.load_checkpoint(wanted, model.state_dict())  # type: ignore[arg-type]
    x = torch.randn(1, 3, 30, 70)  # a map as low as the window, where only the dense rule shifts
    assert all(map(torch.equal, pyramid(x), wanted(x)))


@pytest.mark.parametrize("name", ["org/model", "./folder", "C:\\folder", "/folder"])
def test_a_name_with_a_slash_names_both_fixes(name: str) -> None:
    with pytest.raises(ValueError, match="looks like") as error:
        striate.create_model(name)
    assert f"hf-hub:{name}" in str(error.value)
    assert f"local-dir:{name}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("s3:bucket", "unknown prefix 's3'.*local-dir:PATH or hf-hub:"),
        ("local-dir:", "local-dir:PATH"),
        ("hf-hub:", "hf-hub:org/name"),
        ("hf-hub:org/name@", "hf-hub:org/name@revision"),
        ("hf-hub:a/b/c", "a/b/c"),
        ("local-dir:/no/such/folder", "/no/such/folder is no folder"),
        ("biformer_nanoo", "did you mean biformer_nano"),
    ],
)
def test_bad_names(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        striate.create_model(name)


@pytest.mark.parametrize("target", ["model", "./model", "/tmp/model", "a/b/c"])
def test_bad_targets(target: str) -> None:
    with pytest.raises(ValueError, match="local-dir:"):
        striate.push(nano(), target)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, not an object"),
        ("\udcff", "not JSON"),
        (dict(architecture=None), "'architecture' is None"),
        (dict(architecture=3), "'architecture' is 3"),
        (dict(architecture="biformer_nanoo"), "no model 'biformer_nanoo'; did you mean biformer_nano"),
        (dict(architecture="hf-hub:org/evil"), "no model 'hf-hub:org/evil'"),
        (dict(num_classes="ten"), "'num_classes' is 'ten'"),
        (dict(num_classes=True), "'num_classes' is True"),
        (dict(num_classes=-1), "'num_classes' is -1"),
        (dict(num_classes=11), "'model_args' has 10 classes, but 'num_classes' is 11"),
        (dict(model_args=[1]), r"'model_args' is \[1\]"),
        (dict(model_args=dict(checkpoint_path="/etc/passwd")), "'model_args' may not hold checkpoint_path"),
        (dict(pretrained_cfg="x"), "'pretrained_cfg' is 'x'"),
        (dict(pretrained_cfg=dict(input_size=[3, 224])), r"'input_size' is \[3, 224\]; it must be three"),
        (dict(pretrained_cfg=dict(mean=["a"])), "'mean' is"),
        (dict(pretrained_cfg=dict(crop_pct=-1)), "'crop_pct' is -1"),
        (dict(label_names=[1, 2]), "'label_names' is"),
    ],
)
def test_a_malformed_config_is_refused_before_anything_is_built(
    change: str | dict[str, Any], words: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(change, str):
        (saved / "config.json").write_bytes(change.encode("utf-8", "surrogateescape"))
    else:
        edit_config(saved, **change)
    monkeypatch.setattr(factory.backbones, "create_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=words) as error:
        striate.create_model(f"local-dir:{saved}")
    assert "config.json" in str(error.value)
    with pytest.raises(ValueError, match=words):
        striate.pull(f"local-dir:{saved}")


@pytest.mark.parametrize("args", [dict(depths="abcd"), dict(dims=[32, 64]), dict(colour=3), dict(num_regions=-1)])
def test_absurd_arguments_are_a_value_error(args: dict[str, Any], saved: Path) -> None:
    edit_config(saved, model_args=args)
    with pytest.raises(ValueError, match="|".join(["biformer_nano", *args])):
        striate.create_model(f"local-dir:{saved}")


def test_absurd_arguments_of_a_timm_model(tmp_path: Path) -> None:
    address = striate.push(striate.create_model("test_resnet", num_classes=2), f"local-dir:{tmp_path}/r")
    edit_config(tmp_path / "r", model_args=dict(colour=3))
    with pytest.raises(ValueError, match="test_resnet cannot be created with.*colour"):
        striate.create_model(address)


def test_locations_in_a_config_are_not_followed(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    evil = dict(file="/no/such/file", url="http://localhost/x", hf_hub_id="org/evil", custom_load=True, future_key=1)
    edit_config(saved, pretrained_cfg={**config["pretrained_cfg"], **evil})
    model = striate.create_model(f"local-dir:{saved}")
    assert not {"file", "url", "hf_hub_id", "future_key"} & model.pretrained_cfg.keys()


def test_the_first_format_of_timm_is_read(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    flat = {**config["pretrained_cfg"], "architecture": "biformer_nano", "num_features": 256}
    (saved / "config.json").write_text(json.dumps(flat))
    model = striate.create_model(f"local-dir:{saved}", in_chans=1)
    assert model.num_classes == 10


def test_missing_and_damaged_weights(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    for damage, words in (
        (whole[:-1], "damaged"),
        (whole[: len(whole) // 2], "damaged"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"<html>", "web page"),
    ):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match=words):
            striate.create_model(f"local-dir:{saved}")
    weights.unlink()
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model.safetensors \(it has pytorch_model.bin\).*checkpoint_path"):
        striate.create_model(f"local-dir:{saved}")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        striate.pull(f"local-dir:{saved}", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["biformer_nano", "test_resnet"])
def test_weights_of_another_model_are_refused(name: str, tmp_path: Path) -> None:
    address = striate.push(striate.create_model(name, num_classes=2), f"local-dir:{tmp_path}/m")
    other = striate.create_model("swin_tiny", **SWIN)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=name) as error:
        striate.create_model(address)
    assert len(str(error.value)) < 1500


def test_a_push_replaces_only_what_it_wrote(saved: Path, messages: Messages) -> None:
    (saved / ".git").mkdir()
    (saved / ".git" / "HEAD").write_text("ref")
    (saved / "notes.txt").write_text("mine")
    first = contents(saved)
    striate.push(nano(num_classes=3), f"local-dir:{saved}", metrics={"top1": 50.0}, dataset="fashion_mnist")
    second = contents(saved)
    assert second[".git/HEAD"] == b"ref"
    assert second["notes.txt"] == b"mine"
    assert all(first[name] != second[name] for name in FILES)
    assert b"50" in second["README.md"]
    assert striate.create_model(f"local-dir:{saved}").num_classes == 3
    assert messages() == []
    (saved / "README.md").write_text((saved / "README.md").read_text().replace("# nano", "# My model"))
    striate.push(nano(), f"local-dir:{saved}")
    assert "# My model" in (saved / "README.md").read_text()
    assert "README.md was edited" in messages()[0]
    assert striate.create_model(f"local-dir:{saved}").num_classes == 10
    assert os.listdir(saved.parent) == ["nano"]


def test_a_push_does_not_take_over_other_folders(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ValueError, match=r"holds other files and no config\.json"):
        striate.push(nano(), f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match="is a file"):
        striate.push(nano(), f"local-dir:{tmp_path / 'thesis.tex'}")
    assert contents(tmp_path) == {"thesis.tex": b"words"}


def test_a_failed_push_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved.parent)
    target = f"local-dir:{saved}"
    changed = nano()
    changed.head.fc = nn.Linear(256, 3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"comes back differently|does not fit"):
        striate.push(changed, target)
    extended = nano()
    extended.extra = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"extra"):
        striate.push(extended, target)
    broken = nano()
    broken.head.fc.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, operator, index]
    with pytest.raises(ValueError, match=r"NaN \(head\.fc\.weight\)"):
        striate.push(broken, target)
    for bad, words in (
        (dict(label_names=["a"]), "1 label_names for 10 classes"),
        (dict(metrics={"top1": 1.0}), "need dataset"),
        (dict(metrics={"top1": float("nan")}, dataset="d"), "no finite number"),
        (dict(metrics={"top1": 1.0}, dataset="my data"), "no identifier"),
    ):
        with pytest.raises(ValueError, match=words):
            striate.push(nano(), target, **bad)  # type: ignore[arg-type]

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(safetensors.torch, "save_file", full)
        striate.push(nano(), target)
    for stage in ("_carry_over", "_flush"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(folders, stage, full)
            striate.push(nano(), target)
    rename = Path.rename

    def stuck(self: Path, goal: Path) -> Path:
        return full() or self if self.name == "new" else rename(self, goal)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "rename", stuck)
        striate.push(nano(), target)
    assert contents(saved.parent) == before


def test_altered_values_are_noticed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = safetensors.torch.save_file

    def corrupt(state: dict[str, torch.Tensor], *rest: Any) -> None:
        save({**state, "head.fc.bias": state["head.fc.bias"] + 1e-3}, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", corrupt)
    with pytest.raises(ValueError, match=r"comes back differently: 1 tensors \(head\.fc\.bias\)"):
        striate.push(nano(), f"local-dir:{saved}")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(2, 2), "a Linear cannot be described"),
        (lambda: timm.create_model("resnet18", features_only=True), "features_only"),
        (lambda: striate.create_model("resnet18", norm_layer=nn.BatchNorm2d), "norm_layer.*JSON"),
    ],
)
def test_models_that_cannot_be_described(make: Callable[[], nn.Module], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        striate.push(make(), f"local-dir:{tmp_path}/m")
    assert os.listdir(tmp_path) == []


def test_the_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = ["shirt", "shoe", "bag"]
    address = striate.push(
        nano(num_classes=3),
        "local-dir:hub/my_nano",
        label_names=labels,
        metrics={"top1": 88.25, "top5": 99},
        dataset="fashion_mnist",
        recipe="striate train --config x\n```\n",
        description="A small model.",
        licence="CC0-1.0",
    )
    card = ModelCard.load(tmp_path / "hub" / "my_nano" / "README.md")
    assert card.data.license == "cc0-1.0"
    assert card.data.library_name == "striate"
    assert card.data.datasets == ["fashion_mnist"]
    assert "image-classification" in card.data.tags
    assert [result.metric_value for result in card.data.eval_results] == [88.25, 99]
    assert {result.dataset_type for result in card.data.eval_results} == {"fashion_mnist"}
    family = striate.model_info("biformer_nano").family
    for words in (
        family.paper,
        family.source,
        family.licence,
        "A small model.",
        "shirt, shoe, bag",
        "88.25",
        "--config",
    ):
        assert words in card.text
    Image.effect_noise((40, 30), 50).save("photo.jpg")
    _, _, code = card.text.partition("```python\n")
    names: dict[str, Any] = {}
    exec(code.partition("```")[0], names)
    x = names["image"]
    assert torch.equal(names["model"].eval()(x), striate.create_model(address).eval()(x))
    assert names["scores"].shape == (3,)


def test_the_card_of_a_timm_model(tmp_path: Path) -> None:
    striate.push(striate.create_model("test_resnet", num_classes=2), f"local-dir:{tmp_path}/r")
    card = ModelCard.load(tmp_path / "r" / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.eval_results is None
    assert "datasets" not in card.data.to_dict()


def test_pull_copies_whole_models(saved: Path, tmp_path: Path) -> None:
    assert striate.pull(f"local-dir:{saved}") == saved
    copy = striate.pull(f"local-dir:{saved}", tmp_path / "deep" / "copy")
    assert contents(copy) == contents(saved)
    (saved / "README.md").unlink()
    striate.pull(f"local-dir:{saved}", copy)
    assert sorted(contents(copy)) == ["config.json", "model.safetensors"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="holds other files"):
        striate.pull(f"local-dir:{saved}", tmp_path / "other")


COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of huggingface_hub with two commits of `org/nano`, of 10 and of 3 classes, and no network."""
    root = tmp_path / "cache"
    repository = root / "models--org--nano"
    for commit, classes in zip(COMMITS, (10, 3), strict=True):
        striate.push(nano(num_classes=classes), f"local-dir:{repository / 'snapshots' / commit}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    (repository / "refs" / "v2").write_text(COMMITS[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


def test_create_from_a_hub(cache: Path) -> None:
    assert striate.create_model("hf-hub:org/nano").num_classes == 10
    assert striate.create_model("hf-hub:org/nano@v2").num_classes == 3
    assert striate.create_model(f"hf-hub:org/nano@{COMMITS[1]}", num_classes=5).num_classes == 5
    wanted = striate.create_model(f"local-dir:{cache / 'snapshots' / COMMITS[0]}").eval()
    x = image_for(wanted)
    assert torch.equal(striate.create_model("hf-hub:org/nano").eval()(x), wanted(x))


def test_pull_from_a_hub(cache: Path, tmp_path: Path) -> None:
    assert striate.pull("org/nano") == cache / "snapshots" / COMMITS[0]
    copy = striate.pull("hf-hub:org/nano@v2", tmp_path / "copy")
    assert contents(copy) == contents(cache / "snapshots" / COMMITS[1])
    assert striate.create_model(f"local-dir:{copy}").num_classes == 3


def test_offline_an_absent_file_is_not_known_to_be_absent(cache: Path, messages: Messages) -> None:
    snapshot = cache / "snapshots" / COMMITS[0]
    (snapshot / "README.md").unlink()
    copy = striate.pull("org/nano")
    assert (copy / "model.safetensors").is_file()
    assert any("README.md" in text and "left out" in text for text in messages())
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set, and org/nano is not in"):
        striate.create_model("hf-hub:org/nano")
    assert striate.create_model("hf-hub:org/nano", pretrained=False).num_classes == 10
