import gc

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def _no_backends_of_other_modules():
    """Backends follow every optimizer of the process; those that earlier tests have dropped may lie in cycles."""
    gc.collect()
