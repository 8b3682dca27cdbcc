"""The example call that ``gws explain`` is given."""

import pytest
import torch

from gws_compile.command_line.model_factory import BadFactoryError, build, example_tensor


def test_example_tensors():
    assert example_tensor("x=2x3")[0] == "x"
    for text, shape, dtype in [
        ("2x3", (2, 3), torch.float32),
        (":int64", (), torch.int64),
        ("4:bool", (4,), torch.bool),
    ]:
        name, value = example_tensor(text)
        assert (name, tuple(value.shape), value.dtype) == (None, shape, dtype)
    values = example_tensor("1000:int64:7")[1]
    assert (values.min(), values.max()) == (0, 6)
    with pytest.raises(BadFactoryError, match="names no function"):
        build(":f", [])
