"""What a compiled module holds besides the module: engines by signature, their weights, the report."""

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchaccel.build import Builder, Built, describe
from torchaccel.errors import AccuracyError, BuildError, DeviceMemoryError, StaleWeightsError
from torchaccel.fingerprint import Fingerprint, PendingCheck, equal
from torchaccel.forking import follow, forked_error
from torchaccel.helper import helper
from torchaccel.interrupts import uninterrupted
from torchaccel.memory import release_on_exhaustion
from torchaccel.options import Options
from torchaccel.plan_key import on_device, plan_key
from torchaccel.pool import Pool
from torchaccel.purity import attributes, differing
from torchaccel.report import Report
from torchaccel.runner import Runner
from torchaccel.signature import Call
from torchaccel.watch import WeightWatch

TRIES = 3  # to build an engine while another thread trains
UNTRACKED = "a write that PyTorch does not track"


@dataclass
class State:
    """What a compiled module holds besides the module: engines by signature, their weights, the report."""

    module: nn.Module
    options: Options
    device: torch.device
    build: Builder
    report: Report
    pool: Pool
    remake: Callable[[nn.Module], nn.Module]  # compiles another module with the same options
    built: dict[Any, Built] = field(default_factory=dict)
    runners: dict[Any, Runner] = field(default_factory=dict)  # changed under the lock alone, read without it
    stale: str = ""
    warned_of_gradients: bool = False
    _print: Fingerprint | None = None
    _attributes: dict[str, Any] = field(default_factory=dict)
    _attribute_was_set: bool = False
    _of_the_parent: Any = None  # in a forked child: the engines on a GPU, which are not to be used there
    _is_torn: bool = False  # some weights are new and others not: a refresh failed half-way
    _calls_since_check: int = 0
    _uses: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._check = PendingCheck()
        self.watch = WeightWatch(self.module)
        if self.device.type == "cuda":  # where calls are short enough for the look at the weights to matter
            helper.start()
        follow(self)

    def after_fork(self) -> None:
        """In a forked child: a lock of its own; and no engines, if those are on a GPU."""
        if not self._lock.acquire(blocking=False):
            self.watch.doubt()  # another thread, which is not here, may have been refreshing the weights
        self._lock = threading.RLock()
        if self.device.type == "cuda":  # kept, since to free them would call CUDA
            self._of_the_parent = self.runners, self.built, self._print, self._check
            self.runners, self.built, self._print, self._check = {}, {}, None, PendingCheck()

    def find(self, call: Call) -> Runner:
        """The runner for a call: the one that is there, one more on a plan that is there, or one that is built now."""
        runner = self.runners.get(call.key)
        if runner is None:
            making = functools.partial(self._miss, call)
            with uninterrupted():
                return release_on_exhaustion(making, describe(call.tensors), self.device, self.options.max_runners)
        runner.last_use = next(self._uses)
        return runner

    def _miss(self, call: Call) -> Runner:
        with self._lock:
            if call.key in self.runners:
                return self.runners[call.key]
            if self._of_the_parent is not None:
                raise forked_error()
            tensors = on_device(call, self.device)
            key = plan_key(call, self.options.dynamic_batch, self.built)
            runner = self._made(key, call, tensors)
            runner.plan_key, runner.last_use = key, next(self._uses)
            self.runners[call.key] = runner
            while len(self.runners) > self.options.max_runners:
                del self.runners[min(self.runners, key=lambda used: self.runners[used].last_use)]
            return runner

    def _made(self, key: Any, call: Call, tensors: list[torch.Tensor]) -> Runner:
        """A runner on the plan of that key, built where there is none or an old one.

        Where another thread writes to the weights meanwhile, an engine of the old ones is compared with the module on
        the new: then once more.
        """
        built = self.built.get(key)
        if built is not None and not built.stale:
            return built.runner(tensors, self.pool, self.options.cuda_graph)
        left = TRIES
        while True:
            left -= 1
            make = self._rebuild if key in self.built else self._build
            try:
                return make(key, call, tensors)
            except AccuracyError:
                if not left or not self.watch.changed():
                    raise
            self._take_weights_of_now()

    def _build(self, key: Any, call: Call, tensors: list[torch.Tensor]) -> Runner:
        started = time.perf_counter()
        self._take_weights_of_now()
        built, runner = self.build(call, tensors, self.pool)
        self.pool.synchronize()
        built.record.first_call_ms = _ms_since(started)
        self._register(key, built)
        return runner

    def _rebuild(self, key: Any, call: Call, tensors: list[torch.Tensor]) -> Runner:
        """Bring a plan that has weights of its own up to date, at the first call that needs it.

        Where that fails, and others may serve in its place, it is forgotten and built as any other.
        """
        started, built = time.perf_counter(), self.built[key]
        try:
            runner = self.build.rebuild(built, call, tensors, self.pool)
        except DeviceMemoryError:
            raise
        except (BuildError, AccuracyError) as error:
            if len(self.build.backends) == 1 or self.watch.changed():
                raise
            del self.built[key]
            self.report.events.append(f"{built.backend.name} does not serve the new weights: {error}")
            return self._build(key, call, tensors)
        self.pool.synchronize()
        built.record.refresh_ms = _ms_since(started)
        return runner

    def _register(self, key: Any, built: Built) -> None:
        if not self.built:
            self._attributes = attributes(self.module)
        self.built[key] = built
        self.report.builds += 1
        self.report.backend = built.backend.name
        self.report.engines.append(built.record)

    def _take_weights_of_now(self) -> None:
        """Before a build, which reads the weights as they are: engines that are there must have the same."""
        self.pool.turn(self.pool.wait_for_callers)
        if not self.built:  # nothing holds older ones: those of now are the ones to watch
            self.build.store.clear()
            self.watch.accept()
            self.watch.trust()
            self._print = self._print_of_now()
        elif self.watch.changed() or not self._print_is_of_now() or self._attributes_changed():
            self._take_change("a change that was found at a build")

    def _print_of_now(self) -> Fingerprint:
        """In a turn of the pool, so that it comes after whoever wrote the last, on whatever stream."""
        return self.pool.turn(self.watch.fingerprint)

    def _print_is_of_now(self) -> bool:
        return self._print is not None and equal(self._print_of_now(), self._print)

    def check_weights(self) -> None:
        """Act on a change of the module's weights that PyTorch tracks, and at times look for those that it does not."""
        if not self.built:
            return
        if self.options.on_weight_change == "ignore":
            if self._is_torn:
                self._mend()
            return
        if self.stale:
            raise StaleWeightsError(self.stale)
        if self.watch.changed():
            self._take_change()
        elif self.watch.shares_storage:
            self.check_untracked()  # a write to the whole bumps no version of the parts
        every = self.options.check_weights_every
        if every is not None:
            self._calls_since_check += 1
            if self._calls_since_check >= every or self._check.is_under_way:
                self._look_behind(start=self._calls_since_check >= every)

    def _look_behind(self, start: bool) -> None:
        """Start a look for untracked writes, or act on one whose result is there; the host waits for neither."""
        with uninterrupted():
            if not self._lock.acquire(blocking=False):
                return  # another thread builds or refreshes
            try:
                if start and self._print is not None and not self._check.is_under_way:
                    self._calls_since_check = 0
                    self._check.start(self._print_of_now(), self._print)
                if self._check.take():
                    self._take_change(UNTRACKED)
            finally:
                self._lock.release()

    def check_untracked(self) -> None:
        """Compare the fingerprint of the weights with that of the last refresh; waits for the device."""
        self._calls_since_check = 0
        if self.options.on_weight_change == "ignore" or not self.built:
            return
        if self.watch.changed():
            self._take_change()
        elif not self._print_is_of_now():
            self._take_change(UNTRACKED)

    def _take_change(self, what: str = "") -> None:
        with self._lock:
            if not what and not self.watch.changed():
                return  # another thread has taken it meanwhile
            if self.options.on_weight_change == "raise":
                self.stale = (
                    f"the weights of {type(self.module).__name__} changed after its engines were built"
                    f"{f' ({what})' if what else ''}; call refresh() to take the new ones."
                )
                raise StaleWeightsError(self.stale)
            self.refresh(what)

    def _mend(self) -> None:
        """Make up for a refresh that failed half-way, unless another thread has done so meanwhile."""
        with self._lock:
            if self._is_torn:
                self.refresh("a refresh that failed")

    def refresh(self, what: str = "") -> None:
        """Bring every engine up to date: in place where its weights are plain tensors, elsewhere at its next call.

        Enqueued on the current stream, in one turn of the pool: each call's result is from before or from after it.
        """
        with uninterrupted(), self._lock:
            if self._of_the_parent is not None:
                raise forked_error()
            started = time.perf_counter()
            self.stale = ""
            self._check.forget()
            self.watch.doubt()  # until all of it is done: a refresh that fails is made up for at the next call
            looks = bool(what) or self._attribute_was_set
            self._attribute_was_set = False
            anew = self.watch.structure_changed() or (looks and self._attributes_changed())
            if anew:
                self._drop_all()
            self.watch.accept()
            if not anew and self.built:
                self.pool.turn(self._read_weights)
                self._outdate([built for built in self.built.values() if not built.is_fresh_in_place()])
            if what:
                self.report.events.append(f"refreshed after {what}")
            self.watch.trust()
            if self._attribute_was_set:  # meanwhile, by another thread
                self.watch.doubt()
            self.report.refreshes += 1
            self.report.refresh_ms = _ms_since(started)
            for built in self.built.values():
                if not built.stale:
                    built.record.refresh_ms = self.report.refresh_ms

    def _read_weights(self) -> None:
        """Take the print and then the weights: what nothing tracks, written in between, is found at the next look."""
        try:
            self.pool.wait_for_callers()
            self._print = self.watch.fingerprint()
            self.build.store.refresh(self.module)
        except BaseException:
            self._is_torn = True
            raise
        self._is_torn = False

    def _outdate(self, outdated: list[Built]) -> None:
        """Mark plans that have weights of their own: the next call of each builds it again."""
        for built in outdated:
            built.stale = True
        for key in [key for key, runner in self.runners.items() if self.built[runner.plan_key].stale]:
            del self.runners[key]

    def note_attribute(self) -> None:
        """A plain attribute of the module was set, and engines have such values built in: the next call looks."""
        self._attribute_was_set = True
        self.watch.doubt()

    def _attributes_changed(self) -> bool:
        return bool(self.built) and bool(differing(self._attributes, attributes(self.module)))

    def _drop_all(self) -> None:
        """Forget every plan, runner and weight, and follow the module to its device; the next call builds."""
        self.runners.clear()
        self.built.clear()
        self.build.store.clear()
        self.report.events.append(
            "the module's structure, hooks, modes, attributes, dtypes or device changed: engines are new"
        )
        device = module_device(self.module) or self.device
        if device != self.device:
            calls = self.pool.calls
            self.device, self.pool, self.report.device = device, Pool(device), describe_device(device)
            self.pool.calls = calls

    def kept_runners(self) -> list[Runner]:
        """The runners that are kept, the most recently used last; other threads may go on calling."""
        return sorted(self.runners.values(), key=lambda runner: runner.last_use)

    def memory_mib(self) -> float:
        """Device memory of weights, engines, buffers and graphs; zero on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        runners = self.kept_runners()
        held = self.build.store.size_bytes() + sum(runner.engine_bytes() for runner in runners)
        return held / 2**20 + sum(runner.record.device_mib for runner in runners)


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3


def module_device(module: nn.Module) -> torch.device | None:
    """The device of the module's tensors; None where it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return None


def describe_device(device: torch.device) -> str:
    """A device with the GPU's name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
