"""A forked child: a model on the CPU goes on working, whatever other threads were about; one on a GPU says why not."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import torchaccel
from tests.helpers import on_cpu
from tests.models import small_conv_net
from torchaccel.errors import BackendError
from torchaccel.pool import Pool

ROOT = Path(torchaccel.__file__).parents[1]
HEAD = """
import os, signal, sys, threading, time
import torch
import torchaccel
from tests.helpers import on_cpu
from tests.models import small_conv_net

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, as DataLoader's workers know
torch.set_grad_enabled(False)
module, x = small_conv_net(), torch.ones(2, 3, 8, 8)
model = on_cpu(module)
expected = model(x)

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for a lock is ended by this
        try:
            work()
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status
"""


def run(script: str) -> str:
    """The output of a script in a process of its own."""
    code = HEAD + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_model_on_the_cpu_serves_and_builds_in_a_child() -> None:
    run("""
        def work():
            assert torch.equal(model(x), expected)
            other = torch.randn(3, 3, 8, 8)
            assert torch.allclose(model(other), module(other), atol=1e-6)
            module.fc.bias.add_(1)
            assert torch.allclose(model(x), module(x), atol=1e-6)
            assert torchaccel.compile(module, "fp32", backend="eager")(x).shape == (2, 5)

        assert in_child(work) == 0
        assert torch.equal(model(x), expected)
    """)


def test_locks_that_other_threads_hold_do_not_stop_the_child() -> None:
    run("""
        held, done = threading.Event(), threading.Event()

        def hold():
            with model._state._lock, model._state.pool._lock:
                held.set()
                done.wait()

        holding = threading.Thread(target=hold, daemon=True)
        holding.start()
        held.wait()

        def work():
            assert torch.equal(model(x), expected)
            assert model(torch.ones(1, 3, 8, 8)).shape == (1, 5)
            model.refresh()

        status = in_child(work)
        done.set()
        holding.join()
        assert status == 0, status
    """)


def test_a_child_never_begins_with_the_tf32_settings_of_another_thread() -> None:
    run("""
        from torchaccel.precision import tf32_state

        held = threading.Event()
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

        def hold():
            with tf32_state(not before[1]):
                held.set()
                time.sleep(0.5)

        threading.Thread(target=hold, daemon=True).start()
        held.wait()

        def work():
            assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
            with tf32_state(True):
                pass

        assert in_child(work) == 0
    """)


def test_a_refresh_that_another_thread_was_at_is_made_up_for_in_the_child() -> None:
    run("""
        from torchaccel.weights import WeightRule

        refresh, begun, go_on, turns = WeightRule.refresh, threading.Event(), threading.Event(), []

        def slowly(rule, held, tensors):
            turns.append(1)
            if len(turns) == 3:
                begun.set()
                go_on.wait()
            refresh(rule, held, tensors)

        WeightRule.refresh = slowly
        for parameter in module.parameters():
            parameter.data.mul_(0.5)  # which nothing tracks
        refreshing = threading.Thread(target=model.refresh, daemon=True)
        refreshing.start()
        begun.wait()

        def work():
            assert torch.allclose(model(x), module(x), atol=1e-6)

        status = in_child(work)
        go_on.set()
        refreshing.join()
        assert status == 0, status
    """)


def test_the_workers_of_a_data_loader_can_use_a_model_on_the_cpu() -> None:
    run("""
        class Features(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                torch.set_grad_enabled(False)
                return model(torch.full((1, 3, 8, 8), float(index)))[0]

        loader = torch.utils.data.DataLoader(Features(), batch_size=4, num_workers=2, multiprocessing_context="fork")
        got = torch.cat(list(loader))
        assert torch.allclose(got, torch.cat([model(torch.full((1, 3, 8, 8), float(i))) for i in range(8)]))
    """)


def test_engines_on_a_gpu_are_refused_in_a_child_with_the_reason_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = on_cpu(small_conv_net()), torch.ones(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
        held = dict(model._state.built)
        monkeypatch.setattr(model._state, "device", torch.device("cuda", 0))
        model._state.after_fork()
        for use in (lambda: model(x), lambda: model(x), model.refresh):
            with pytest.raises(BackendError, match=r"forked .* CUDA does not survive a fork.* 'spawn'"):
                use()
        assert model._state._of_the_parent[1] == held  # freeing them would call CUDA
        monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for refused in (
            lambda: list(model.stream([x])),
            lambda: torchaccel.compile(small_conv_net(), "fp16"),
            lambda: torchaccel.compile(small_conv_net(), "fp16", device="cuda"),
        ):
            with pytest.raises(BackendError, match="forked"):
                refused()
        assert on_cpu(small_conv_net())(x).shape == (2, 5)


def test_a_pool_on_a_gpu_gives_no_more_turns_in_a_child() -> None:
    pool = Pool(torch.device("cpu"))
    pool._is_cuda = True
    pool.after_fork()
    for use in (lambda: pool.turn(list), pool.synchronize):
        with pytest.raises(BackendError, match="forked"):
            use()
