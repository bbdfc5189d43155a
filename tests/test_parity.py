"""Numbers recorded from the authors' own code: `fixtures/README.md` says how."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import striate
from helpers import relative
from striate.backbones.biformer import BiLevelRoutingAttention

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.json"))
OUTPUT, FEATURE, GRADIENT = 1e-4, 1e-3, 2e-3  # float32: the authors' code differs from its own float64 by up to 7e-5
EXACT, EXACT_GRADIENT = 1e-7, 1e-5  # float64, where thresholds would turn roundings of float32 into other spikes


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    record = json.loads((FIXTURES / f"{name}.json").read_text())
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return record, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def weight(key: str, shape: list[int]) -> np.ndarray:
    """The array that the recording put at `key`: a function of the key alone, scaled to keep activations in range."""
    normal = np.random.RandomState(zlib.crc32(key.encode())).randn(*shape)
    values = np.asarray(normal, dtype=np.float32)
    kind = key.split(".")[-1]
    if kind == "running_var":
        return np.float32(1) + np.float32(0.2) * np.abs(values)
    if kind.endswith("bias") or kind == "running_mean":
        return np.float32(0.1) * values
    if values.ndim > 1:
        return (values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return np.float32(1) + np.float32(0.1) * values


def official_weights(record: dict[str, Any]) -> dict[str, Tensor]:
    """A checkpoint of the authors' code; what it derives from its configuration is garbage here, not to be trusted."""
    state = {}
    for key, (shape, dtype, derived) in record["state"].items():
        if derived:
            state[key] = torch.full(shape, 1_000_000_000).to(getattr(torch, dtype))
        elif dtype == "int64":
            state[key] = torch.zeros(shape, dtype=torch.int64)
        else:
            factor = next((f for pattern, f in record["scaled"].items() if re.search(pattern, key)), 1.0)
            offset = next((o for pattern, o in record.get("shifted", {}).items() if re.search(pattern, key)), 0.0)
            array = np.float32(factor) * weight(key, shape) + np.float32(offset)
            state[key] = torch.from_numpy(np.ascontiguousarray(array)).reshape(shape)
    return state


def normal(shape: list[int], seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))


def build(record: dict[str, Any], state: dict[str, Tensor], **changes: Any) -> nn.Module:
    model = striate.create_model(record["model"], **{**record["kwargs"], **changes})
    striate.load_checkpoint(model, {"model": state})
    return model.eval().to(dtype(record))


def dtype(record: dict[str, Any]) -> torch.dtype:
    return getattr(torch, record.get("dtype", "float32"))


def output(record: dict[str, Any], result: Any) -> Tensor:
    return result if record["output"] == "logits" else torch.cat([m.mean((2, 3)) for m in result], 1)


def our_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, str]:
    """Our parameter name -> the authors', found by loading a number for each of theirs."""
    numbered = {key: torch.full_like(value, i, dtype=torch.float32) for i, (key, value) in enumerate(state.items())}
    striate.load_checkpoint(model, numbered)
    keys = list(state)
    return {name: keys[int(p.detach().flatten()[0])] for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_authors(name) -> None:
    record, want = read(name)
    state = official_weights(record)
    model = build(record, state)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    routes: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, BiLevelRoutingAttention):
            module.register_forward_pre_hook(lambda m, args: routes.append(m.routes(args[0].detach())))

    exact = dtype(record) == torch.float64
    x = normal(record["input_shape"], record["input_seed"]).to(dtype(record))
    result = model(x)
    got = output(record, result)
    assert relative(got, want["output"]) < (EXACT if exact else OUTPUT)

    assert len(routes) == len(record["tied_rows"])
    for i, tied in enumerate(record["tied_rows"]):
        if not tied:  # equal affinities may be broken either way
            assert torch.equal(routes[i].sort()[0], want[f"routes{i}"].long().sort()[0]), f"routes of block {i}"

    if record["output"] == "logits":
        with torch.no_grad():
            result = model.forward_intermediates(x, intermediates_only=True)
    for i, feature in enumerate([] if exact else result):
        assert relative(feature.flatten()[want[f"feature{i}_index"]], want[f"feature{i}_value"]) < FEATURE

    rel = EXACT_GRADIENT if exact else GRADIENT
    (got * normal(list(got.shape), record["probe_seed"])).sum().backward()
    norms = {key: p.grad.double().norm().item() for key, p in model.named_parameters()}
    total = sum(n**2 for n in norms.values()) ** 0.5
    assert total == pytest.approx(record["gradient_norm"], rel=rel)
    names = our_names(model, state)
    assert len(set(names.values())) == len(norms) == len(record["gradient_norms"])
    for key, norm in norms.items():
        assert norm == pytest.approx(record["gradient_norms"][names[key]], rel=rel, abs=1e-6 * total), key


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("biformer_tiny", {"topks": (1, 4, 15, 0)}),
        ("biformer_tiny", {"num_regions": 8}),
        ("biformer_stl", {"exact_means": True}),
        ("swin_tiny_det_224", {"dense": False}),
        ("swin_tiny_patch4_window7_224", {"dense": True}),
        ("swinv2_tiny_patch4_window8_256", {"pretrained_window": (12, 12, 12, 6)}),
        ("davit_tiny", {"window": (7, 6)}),
        ("maxvit_tiny_tf_224", {"img_size": 256}),
        ("crossformer_tiny", {"interval": (8, 4, 1, 1)}),
        ("crossformer_pp_small", {"group_size": (4, 4, 7, 7)}),
        ("spikformer_cifar10_4_384", {"num_heads": 6}),
        ("spike_driven_transformer_cifar10_2_512", {"timesteps": 3}),
        ("statten_cifar10_2_512", {"chunk_size": 1}),
        ("bivit_deit_tiny_sab_w1a1", {"num_heads": 6}),
        ("bivit_swin_tiny_sab_1w32a", {"dense": True}),
        ("reactdeit_small_patch16_224", {"num_heads": 12}),
    ],
)
def test_the_comparison_sees_a_small_difference(name, change) -> None:
    record, want = read(name)
    model = build(record, official_weights(record), **change)
    with torch.no_grad():
        result = model(normal(record["input_shape"], record["input_seed"]).to(dtype(record)))
    assert relative(output(record, result), want["output"]) > 5 * OUTPUT


def test_fixtures_cover_what_they_should() -> None:
    """Classification and dense code, sizes that need padding, all families; and they stay small."""
    records = [read(name)[0] for name in NAMES]
    assert {r["model"].split("_")[0] for r in records} >= {
        "swin", "swinv2", "biformer", "davit", "maxvit", "crossformer", "vig", "binaryvit", "bivit", "ecoformer",
        "metaspikformer", "mst", "qsd", "reactdeit", "spike", "spikformer", "statten",
    }  # fmt: skip
    assert {r["output"] for r in records} == {"logits", "pyramid_mean"}
    assert any(side % 32 for r in records for side in r["input_shape"][2:])
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < 2_000_000
