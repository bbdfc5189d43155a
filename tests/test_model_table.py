"""Parameters and multiply-adds of every size against the figures its paper gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import striate
from helpers import outline
from published import PARAMETERS

PAPER_COUNTS_OTHERWISE = {"crossformer_pp_small": 0.90}  # 4.9 in the paper; every other size of the family agrees


class Repeats:
    """Keep one of the blocks of every stage that are alike, and count what the others would have added."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        self.skipped = 0
        for stage in model.stage_list:
            alike: dict[str, list[nn.Module]] = {}
            for block in stage.blocks:
                alike.setdefault(description(block), []).append(block)
            stage.blocks = nn.ModuleList(blocks[0] for blocks in alike.values())
            for blocks in alike.values():
                self._watch(blocks[0], len(blocks) - 1, counter)

    def _watch(self, block: nn.Module, others: int, counter: FlopCounterMode) -> None:
        before = 0

        def enter(*_: Any) -> None:
            nonlocal before
            before = counter.get_total_flops()

        def leave(_block: Any, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
            assert not others or out.shape == args[0].shape  # the next one gets what this one got
            self.skipped += others * (counter.get_total_flops() - before)

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)


def description(block: nn.Module) -> str:
    """All that the work of a block can depend on: its modules, their settings, and the shapes of its parameters."""
    settings = [{key: v for key, v in vars(m).items() if not key.startswith("_")} for m in block.modules()]
    shapes = [(key, tuple(value.shape)) for key, value in block.state_dict().items()]
    return f"{block} {settings} {shapes}"


@pytest.mark.parametrize("name", striate.list_models())
def test_figures_of_the_table(name: str) -> None:
    info = striate.model_info(name)
    with outline():
        model = striate.create_model(name).eval()
        x = torch.zeros(1, *info.input_size)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get(name, count)
    assert round(count / 1e6, 1) == info.params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        repeats = Repeats(model, counter)
        assert model(x).shape == (1, 1000)
    found = (counter.get_total_flops() + repeats.skipped) / 2e9 / info.gmacs
    assert found == pytest.approx(PAPER_COUNTS_OTHERWISE.get(name, 1.0), abs=0.03 if info.gmacs > 0.1 else 0.2)
