"""Names: listing, describing, creating, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import timm.data
import torch

import striate
from striate import backbones
from striate.backbones import _registry


def test_every_family_is_listed_and_described() -> None:
    names = striate.list_models()
    assert len(names) == len(set(names)) >= 18
    for name in names:
        info = striate.model_info(name)
        assert info.name == name
        assert name.startswith(info.family.name)
        assert name in striate.list_models(family=info.family.name)
        assert info.family.paper.startswith("https://arxiv.org/abs/")
        assert info.family.source.startswith("https://")
        assert info.family.licence
        assert info.params > 0
        assert info.gmacs > 0
        assert info.entry.__doc__


def test_patterns_and_families() -> None:
    assert striate.list_models("biformer_*") == striate.list_models(family="biformer")
    assert striate.list_models("bif*_t*") == ["biformer_tiny"]
    assert striate.list_models("no such") == []
    assert set(striate.list_models(family="swin")).isdisjoint(striate.list_models(family="swinv2"))


def test_names_are_in_natural_order() -> None:
    names = striate.list_models("swinv2_tiny*")
    assert names == ["swinv2_tiny_window8_256", "swinv2_tiny_window16_256"]


def test_unknown_family() -> None:
    with pytest.raises(ValueError, match="no family 'vgg'; there are biformer, .*swin, swinv2"):
        striate.list_models(family="vgg")


@pytest.mark.parametrize("call", [striate.create_model, striate.model_info])
def test_unknown_names_come_with_the_closest(call) -> None:
    with pytest.raises(ValueError, match=r"no model 'biformer_tinny'; did you mean .*biformer_tiny"):
        call("biformer_tinny")
    with pytest.raises(ValueError, match=r"no model 'qqqq'; striate.list_models\(\) shows ours, timm.list_models\(\)"):
        call("qqqq")


def test_closest_names_include_those_of_timm() -> None:
    with pytest.raises(ValueError, match=r"no model 'resnet5O'; did you mean .*resnet50"):
        striate.create_model("resnet5O")


def test_models_of_timm_are_created_as_timm_does() -> None:
    model = striate.create_model("resnet18", num_classes=3, in_chans=1)
    assert type(model) is timm.models.ResNet
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 3)
    assert striate.create_model("resnet18", features_only=True).feature_info.channels() == [64, 64, 128, 256, 512]


def test_names_that_timm_has_too_mean_ours_here_and_theirs_there() -> None:
    name = "swinv2_tiny_window8_256"
    assert isinstance(striate.create_model(name, depths=(1, 1, 1, 1)), backbones.swin.Swin)
    assert timm.models.model_entrypoint(name).__module__.startswith("timm.")


def test_a_name_is_registered_once() -> None:
    def swin_tiny(**kwargs: object) -> torch.nn.Module:
        raise AssertionError

    with pytest.raises(
        ValueError, match=r"swin_tiny is registered twice, by striate\.backbones\.swin and .*test_registry"
    ):
        _registry.register(backbones.swin.V1, params=1, gmacs=1)(swin_tiny)


def test_unknown_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"biformer_nano takes no argument 'depth', 'window'; it takes depths, dims, "):
        striate.create_model("biformer_nano", depth=3, window=7)


def test_arguments_of_a_pyramid_need_one() -> None:
    with pytest.raises(ValueError, match="out_indices, feature_norms go with features_only=True"):
        striate.create_model("biformer_nano", out_indices=(1,), feature_norms=True)


def test_arguments_that_are_none_count_as_not_given() -> None:
    model = striate.create_model("biformer_nano", num_classes=None, drop_path_rate=None, checkpoint_path=None)
    assert model.num_classes == 1000


def test_weights_that_nobody_has() -> None:
    with pytest.raises(ValueError, match=r"no working download of biformer_nano is known; pass checkpoint_path=FILE"):
        striate.create_model("biformer_nano", pretrained=True)
    with pytest.raises(ValueError, match=r"no weights biformer_nano\.in1k: .* pass checkpoint_path=FILE"):
        timm.create_model("biformer_nano.in1k")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("swin_tiny", {"window": 0}, r"window=0; give a positive integer"),
        ("swin_tiny", {"img_size": (224, 0)}, r"img_size=\(224, 0\); give a positive integer or two"),
        ("swin_tiny", {"version": 3}, r"version=3.*1 or 2"),
        ("swin_tiny", {"depths": (2, 2, 2)}, r"depths=\(2, 2, 2\), num_heads=\(3, 6, 12, 24\)"),
        (
            "biformer_nano",
            {"num_regions": 1},
            r"topks=\(1, 2, 4, 0\) exceed the 1x1 regions; pass a larger num_regions",
        ),
        ("biformer_nano", {"dims": (32, 64)}, r"dims=\(32, 64\).*one entry per stage"),
        ("biformer_nano", {"dims": (16, 32, 64, 64)}, r"16 is no multiple of head_dim=32"),
    ],
)
def test_arguments_that_do_not_fit_together(name, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        striate.create_model(name, **arguments)


def test_a_map_too_small_for_its_regions() -> None:
    model = striate.create_model("biformer_stl_nchw", depths=(1, 1, 1, 1))
    with pytest.raises(
        ValueError, match=r"a 4x4 map cannot be cut into num_regions=\(7, 7\); pass fewer regions or a larger"
    ):
        model(torch.zeros(1, 3, 64, 64))


def test_the_config_describes_the_model_as_built() -> None:
    model = striate.create_model("swin_tiny", depths=(1, 1, 1, 1), num_classes=7, in_chans=1, img_size=(96, 128))
    assert model.pretrained_cfg["num_classes"] == 7
    assert model.pretrained_cfg["input_size"] == (1, 96, 128)
    assert model.model_args == {"depths": (1, 1, 1, 1), "in_chans": 1, "img_size": (96, 128)}
    again = striate.create_model("swin_tiny", num_classes=7, **model.model_args)
    again.load_state_dict(model.state_dict())


def test_preprocessing_follows_from_the_config() -> None:
    data = timm.data.resolve_data_config({}, model=striate.create_model("swin_base_window12_384", depths=(1, 1, 1, 1)))
    assert data["input_size"] == (3, 384, 384)
    assert data["crop_pct"] == 1.0
    assert data["mean"] == timm.data.IMAGENET_DEFAULT_MEAN


def test_rectangular_windows_and_images() -> None:
    model = striate.create_model("swin_tiny", depths=(2, 2, 2, 2), window=(4, 7), img_size=(128, 224)).eval()
    assert model.layers[0].blocks[0].attn.window == (4, 7)
    assert model(torch.zeros(1, 3, 100, 250)).shape == (1, 1000)


def test_windows_are_no_larger_than_the_native_map() -> None:
    model = striate.create_model("swinv2_tiny_window16_256", depths=(1, 1, 1, 1))
    assert [stage.blocks[0].attn.window for stage in model.layers] == [(16, 16), (16, 16), (16, 16), (8, 8)]


TIMM = """
{imports}
ours = [name for name in striate.list_models() if timm.models.model_entrypoint(name).__module__.startswith("striate")]
assert "biformer_tiny" in ours and "swin_tiny" in ours, ours
assert not [name for name in striate.list_models() if not timm.is_model(name)]
assert set(ours) <= set(timm.list_models())
assert set(striate.list_models()) - set(ours) == {{n for n in striate.list_models() if n in {before!r}}}
model = timm.create_model("biformer_tiny", features_only=True, out_indices=(0, 2), depths=(1, 1, 1, 1))
assert type(model) is striate.backbones.FeaturePyramid, type(model)
maps = model(torch.zeros(1, 3, 64, 96))
assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 24), (256, 4, 6)]
assert model.feature_info.channels() == [64, 256]
model = timm.create_model("swin_tiny", pretrained=False, num_classes=5, drop_path_rate=0.1, depths=(1, 1, 1, 1))
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
"""


@pytest.mark.parametrize("imports", ["import striate, torch, timm", "import timm, torch, striate"])
def test_models_are_known_to_timm_in_both_import_orders(imports) -> None:
    origins = {name: timm.models.model_entrypoint(name).__module__ for name in striate.list_models()}
    before = [name for name, origin in origins.items() if not origin.startswith("striate")]
    code = TIMM.format(imports=imports, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_root(), check=False)
    assert done.returncode == 0, done.stderr


def _root() -> str:
    return striate.__path__[-1] if len(striate.__path__) > 1 else "."
