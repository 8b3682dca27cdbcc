import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_stays():
    """Each case collects its garbage, and so does the backend: not through all that pytest and torch have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
