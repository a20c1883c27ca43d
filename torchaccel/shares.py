"""Where the time of a program goes, operator by operator: measured once, where parts of it run outside engines."""

import operator
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

WARM_UP_RUNS, RUNS = 2, 5
INSIDE = ""  # the label of what runs inside engines
CYCLES_PER_SECOND = 2e9  # about what a GPU's clock does; the wait below need not be exact
MAX_LEAD_S = 0.2

Label = Callable[[fx.Node], str | None]  # None for what takes no time worth a mark


def time_shares(
    module: fx.GraphModule, label: Label, inputs: tuple[torch.Tensor, ...], run: Callable[..., Any] | None = None
) -> dict[str, float]:
    """The share of a program's time, 0 to 1, that the nodes of each label take; the medians of several runs.

    `run(interpret, *inputs)` runs it in the modes that belong to it. On a GPU the device's time counts, not the host's.
    """
    device = next((tensor.device for tensor in inputs), torch.device("cpu"))
    runs = []
    host_s = 0.0
    for index in range(WARM_UP_RUNS + RUNS):
        timed = _Timed(module, label, device)
        started = time.perf_counter()
        timed.let_the_host_lead(host_s)
        (run or _plainly)(timed.run, *inputs)
        host_s = time.perf_counter() - started
        if index >= WARM_UP_RUNS:
            runs.append(timed.seconds())
        elif device.type == "cuda":
            torch.cuda.synchronize(device)
    shares = [_normalised(seconds) for seconds in runs]
    medians = {name: statistics.median(share[name] for share in shares) for name in runs[0]}
    return _normalised(medians)


def _plainly(interpret: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    return interpret(*inputs)


def _normalised(values: Any) -> dict[str, float]:
    total = sum(values.values()) or 1.0
    return {name: value / total for name, value in values.items()}


class _Timed(fx.Interpreter):
    """Runs a program node by node, with a mark on the current stream wherever the label changes."""

    def __init__(self, module: fx.GraphModule, label: Label, device: torch.device) -> None:
        super().__init__(module)
        self._label_of = label
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def run(self, *inputs: Any, **others: Any) -> Any:
        """The program's result; the time since the last mark ends here."""
        result = super().run(*inputs, **others)
        self._marks.append((INSIDE, self._now()))
        return result

    def run_node(self, n: fx.Node) -> Any:
        """One node; what only takes a result apart takes no time of its own."""
        if n.op.startswith("call_") and n.target is not operator.getitem:
            label = self._label_of(n)
            if label is not None and (not self._marks or self._marks[-1][0] != label):
                self._marks.append((label, self._now()))
        return super().run_node(n)

    def let_the_host_lead(self, seconds: float) -> None:
        """Keep a GPU waiting for as long as the host took last time, so that its own time is what counts."""
        if self._is_cuda:
            torch.cuda._sleep(int(min(2 * seconds, MAX_LEAD_S) * CYCLES_PER_SECOND))

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> Counter[str]:
        """The time of each label; waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        total: Any = Counter()
        for (label, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            total[label] += start.elapsed_time(end) / 1e3 if self._is_cuda else end - start
        return total
