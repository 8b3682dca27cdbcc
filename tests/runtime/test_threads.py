"""`Backend.noise` concerns the calls of its own thread."""

import threading

import torch
from support.small_models import OneLayer

import gws_compile


def test_noise_is_switched_for_the_calls_of_one_thread():
    """Two threads: one switches the noise off while the other trains, in turn, with overlapping blocks."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    models = [OneLayer(bias=False) for _ in range(2)]
    backend = gws_compile.backend("fp6_e3m2", inner="eager")
    compiled = [torch.compile(model, backend=backend) for model in models]
    used = [lambda i=i: compiled[i](torch.eye(40)).detach().t() for i in range(2)]
    noisy = [used[0](), used[1]()]
    cast = [gws_compile.quantize(model.fc.weight.detach(), "fp6_e3m2") for model in models]
    turns, failures = [threading.Event() for _ in range(5)], []

    def first():
        with backend.noise(False):
            turns[0].set()
            turns[1].wait()  # the other one is inside its block, too
            failures.append(not torch.equal(used[0](), cast[0]))
        failures.append(not torch.equal(used[0](), noisy[0]))
        turns[2].set()
        turns[3].wait()

    def second():
        turns[0].wait()
        failures.append(not torch.equal(used[1](), noisy[1]))
        with backend.noise(False):
            with backend.noise(True):
                failures.append(not torch.equal(used[1](), noisy[1]))
            turns[1].set()
            turns[2].wait()  # the first one has left its block
            failures.append(not torch.equal(used[1](), cast[1]))
        failures.append(not torch.equal(used[1](), noisy[1]))
        turns[3].set()

    threads = [threading.Thread(target=one) for one in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [False] * 6
