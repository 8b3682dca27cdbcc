"""The blocks of a model, as rules name them."""

import pytest
import torch
from support.models import gpt2, llama
from torch import nn

from gws_compile import edge_blocks


def test_blocks_of_hugging_face_models():
    assert edge_blocks(gpt2(layers=4), first=1, last=2) == [
        "transformer.h.0.*",
        "transformer.h.2.*",
        "transformer.h.3.*",
    ]
    assert edge_blocks(llama(layers=3), first=2) == ["model.layers.0.*", "model.layers.1.*"]


def test_a_compiled_model_has_its_own_names():
    assert edge_blocks(torch.compile(llama()), last=1) == ["model.layers.1.*"]


class Stages(nn.Module):
    """Blocks in several lists, with experts inside, and a head in a list of its own."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})  # noqa: E731
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.one = nn.ModuleList(block() for _ in range(2))
        self.two = nn.ModuleList(block() for _ in range(3))
        self.head = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])


def test_blocks_are_counted_through_the_model():
    assert edge_blocks(Stages(), first=3, last=1) == ["one.0.*", "one.1.*", "two.0.*", "two.2.*"]
    assert edge_blocks(Stages()) == []


def test_errors():
    with pytest.raises(ValueError, match=r"first=2 and last=4 are more than the 5 blocks of the model: one.0 to two.2"):
        edge_blocks(Stages(), first=2, last=4)
    with pytest.raises(ValueError, match=r"first=1 .*the 0 blocks of the model, in which no numbered modules"):
        edge_blocks(nn.Linear(2, 2), first=1)
    with pytest.raises(ValueError, match="edge_blocks: last must be an int, 0 or more, got -1"):
        edge_blocks(Stages(), last=-1)
