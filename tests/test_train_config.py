"""The configuration: seven groups, strict keys and types, packaged recipes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from striate.train.config import (
    FREE_KEYS,
    GROUPS,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
    config_changes,
    dump_config,
    load_config,
    parse_config,
    read_config_file,
    recipe_names,
    train_parser,
)

NEEDED = ["--model.name", "m", "--data.name", "d"]


def plain() -> TrainConfig:
    return TrainConfig(model=ModelConfig(name="m"), data=DataConfig(name="d"))


def test_seven_groups_of_documented_keys() -> None:
    assert list(GROUPS) == ["model", "data", "augment", "loss", "optim", "schedule", "run"]
    assert [item.name for item in fields(TrainConfig)] == list(GROUPS)
    keys = [f"{group}.{item.name}" for group, cls in GROUPS.items() for item in fields(cls)]
    assert len(keys) <= 75
    assert set(keys) >= FREE_KEYS
    text = train_parser().format_help()
    for group, cls in GROUPS.items():
        for item in fields(cls):
            assert f"--{group}.{item.name}" in text
            assert "".join(item.metadata["help"].split()) in "".join(text.split())


def test_command_line_gives_the_dataclass_defaults() -> None:
    assert parse_config(NEEDED) == plain()


def test_every_key_can_be_set_on_the_command_line() -> None:
    """A key whose option went elsewhere would keep its default."""
    values: dict[type, Any] = {str: "text", float: 0.25, int: 2, bool: True, dict: {"a": {"b": [1, 2.5]}}}
    special = {
        "model.in_chans": 1,
        "data.image_size": [32, 48],
        "augment.scale": [0.3, 0.9],
        "optim.clip_mode": "value",
        "schedule.name": "poly",
        "schedule.min_lr": 0.01,
        "run.precision": "bfloat16",
        "run.parallel": "fsdp",
        "loss.name": "binary_cross_entropy",
        "loss.feature_weight": 0.0,
        "model.freeze": ["stem"],
        "schedule.image_sizes": {2: 48},
    }
    nullable = {
        "model.checkpoint_path": "text",
        "model.num_classes": 2,
        "data.root": "text",
        "augment.auto_augment": "text",
        "loss.tet": 0.25,
        "loss.teacher": "text",
        "optim.reference_batch": 2,
        "optim.layer_decay": 0.25,
        "optim.clip_grad": 0.25,
        "optim.ema_decay": 0.25,
        "run.output": "text",
        "run.compile": "text",
    }
    words, wanted = [], {}
    for group, cls in GROUPS.items():
        for item in fields(cls):
            key = f"{group}.{item.name}"
            default = item.default if item.default is not MISSING else {} if item.default_factory is dict else "x"
            value = special.get(key, nullable.get(key, values.get(type(default))))
            assert value is not None, key
            words += [f"--{key}", value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)]
            wanted[key] = tuple(value) if isinstance(value, list) and key != "model.freeze" else value
    config = parse_config(words)
    assert {f"{group}.{key}": value for group, keys in asdict(config).items() for key, value in keys.items()} == wanted


def test_dump_is_read_back(tmp_path: Path) -> None:
    config = parse_config([*NEEDED, "--data.image_size", "[32, 48]", "--optim.options", "{betas: [0.9, 0.98]}"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert parse_config(["--config", str(tmp_path / "c.yaml")]) == config


def test_command_line_wins_over_the_file_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {name: a}\ndata: {name: d}\noptim: {lr: 1e-2, weight_decay: 1e-3}\n")
    (tmp_path / "b.yaml").write_text("optim:\n  weight_decay: 2e-3\n")
    config = parse_config(
        ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}", "--optim.lr", "3e-3"]
    )
    assert (config.model.name, config.optim.lr, config.optim.weight_decay) == ("a", 3e-3, 2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], r"--optim.lrr.*did you mean optim.lr\?"),
        (["--epochs", "3"], "--epochs"),
        (["--schedule.epoch", "3"], "--schedule.epoch "),
        (["--optim.lr", "fast"], "optim.lr.*Expected a float.*fast"),
        (["--data.batch_size", "1.5"], "data.batch_size.*int.*1.5"),
        (["--run.tensorboard", "maybe"], "run.tensorboard.*bool.*maybe"),
        (["--run.precision", "float64"], "run.precision.*float64"),
        (["--model.options", "[1]"], "model.options.*dict"),
        (["--augment.scale", "[0.1]"], "augment.scale"),
        (["stray"], "stray"),
        (["--config", "no/such/recipe"], "no configuration file no/such/recipe, and no packaged recipe"),
        (["--optim.lr", "0"], "optim.lr is 0.0, but must be > 0"),
        (["--optim.lr", ".nan"], "optim.lr is nan, but must be > 0"),
        (["--optim.clip_grad", "0"], "optim.clip_grad is 0.0, but must be > 0, or null"),
        (["--optim.ema_decay", "1"], "optim.ema_decay is 1.0, but must be in"),
        (["--optim.reference_batch", "0"], "optim.reference_batch is 0"),
        (["--optim.layer_decay", "1.5"], "optim.layer_decay is 1.5"),
        (["--augment.scale", "[0.9, 0.1]"], "augment.scale is .*0 < smallest <= largest <= 1"),
        (["--augment.label_smoothing", "1"], "augment.label_smoothing is 1.0"),
        (["--augment.mixup", "0.2", "--data.batch_size", "9"], "data.batch_size is 9, but must be even"),
        (["--schedule.epochs", "0"], "schedule.epochs is 0, but must be >= 1"),
        (["--schedule.epochs", "5", "--schedule.warmup_epochs", "5"], "warmup_epochs is 5.0.*less than"),
        (["--schedule.min_lr", "1"], "schedule.min_lr is 1.0"),
        (["--model.in_chans", "4"], "model.in_chans is 4, but must be 3 or 1"),
        (["--model.drop_path_rate", "1"], "model.drop_path_rate is 1.0"),
        (["--data.workers", "-1"], "data.workers is -1"),
        (["--data.image_size", "[32, 0]"], r"data.image_size is \(32, 0\)"),
        (["--run.seed", "-1"], "run.seed is -1"),
        (["--run.parallel", "fsdp", "--run.precision", "float16"], "run.precision is float16, but must be bfloat16 or"),
        (
            ["--run.parallel", "fsdp", "--optim.clip_grad", "1", "--optim.clip_mode", "agc"],
            "clip_mode is agc, but must be norm or value",
        ),
        (["--schedule.image_sizes", "{-1: 64}"], "schedule.image_sizes"),
        (["--data.broken_limit", "2"], "data.broken_limit is 2.0"),
        (["--run.log_steps", "0"], "run.log_steps is 0"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_config([*NEEDED, *words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", r"optim.lrr.*did you mean optim.lr\?"),
        ("optin:\n  lr: 1\n", "unknown group 'optin'"),
        ("optim: 3\n", "group 'optim' holds 3"),
        ("- optim\n", "holds list"),
        ("optim: {lr: 1\n", "is not YAML"),
        ("optim:\n  lr: fast\n", "optim.lr.*float.*fast"),
        ("", "holds NoneType"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        parse_config([*NEEDED, "--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(caught.value)


def test_required_keys() -> None:
    with pytest.raises(ValueError, match="data.name"):
        parse_config([])


def test_changes_that_matter_and_changes_that_do_not(tmp_path: Path) -> None:
    old = yaml.safe_load(dump_config(plain()))
    assert config_changes(old, plain()) == []
    new = parse_config([*NEEDED, "--data.workers", "7", "--run.output", "o", "--run.log_steps", "3"])
    assert config_changes(old, new) == []
    new = parse_config([*NEEDED, "--data.image_size", "[32, 32]", "--run.seed", "1"])
    assert config_changes(old, new) == ["data.image_size: None -> [32, 32]", "run.seed: 0 -> 1"]
    del old["optim"]["weight_decay"]
    assert config_changes(old, plain()) == []
    assert config_changes(old, parse_config([*NEEDED, "--optim.weight_decay", "1"])) == [
        "optim.weight_decay: 0.05 -> 1.0"
    ]


def test_recipes_by_name_and_path() -> None:
    names = recipe_names()
    assert {"biformer/nano_fashion", "swin/tiny_in1k", "biformer/stl_in1k"} <= set(names)
    by_name = load_config("biformer/nano_fashion")
    assert load_config("configs/biformer/nano_fashion.yaml") == by_name
    assert load_config("biformer/nano_fashion", {"optim.lr": 0.5, "data.image_size": [48, 48]}).optim.lr == 0.5
    with pytest.raises(ValueError, match="biformer/nano_fashion"):
        load_config("biformer/nano_fashon")


def test_configuration_does_not_import_torch() -> None:
    code = (
        "import sys; from striate.train.config import parse_config\n"
        "parse_config(['--config', 'biformer/nano_fashion'])\n"
        "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parent.parent)


def test_yaml_file_reader_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"c\.yaml"):
        read_config_file(tmp_path / "c.yaml")


def test_option_dicts_are_not_shared() -> None:
    first = AugmentConfig()
    first.options["x"] = 1
    assert AugmentConfig().options == {}
