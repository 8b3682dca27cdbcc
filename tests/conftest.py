import gc
import os

import pytest
import torch

from gws_compile.command_line.named_backend import forget_named_backends

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: OpenMP threads that wait for threads without a core make everything several times slower.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("GPU_TESTS_DEVICE") == "cpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def _no_backends_of_other_modules():
    """Backends follow every optimizer of the process; those of earlier tests lie in cycles and in torch's caches.

    What is alive now, a million objects by the end, is frozen: no collection looks at it again, which is most of the
    time that a collection takes.
    """
    torch._dynamo.reset()
    forget_named_backends()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries say at the end that they leak


@pytest.fixture(autouse=True)
def own_settings():
    """``gws`` leaves its options in the environment, for the processes that a script starts; not for the next test."""
    before = {name: value for name, value in os.environ.items() if name.startswith("GWS_")}
    yield
    for name in [name for name in os.environ if name.startswith("GWS_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def reset():
    """Nothing compiled; the same seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def one_thread(reset):
    """An embedding's gradient adds with atomics: on two threads plain Inductor differs from itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh(reset):
    """No backends of earlier tests either, which would follow the optimizers of this one."""
    gc.collect()
