"""Training with validation through an engine: `python -m recipes.train_with_eval`.

A small ResNet learns scikit-learn's handwritten digits. It is compiled once, before the training; after every epoch
the compiled module validates with the weights of that moment, and so does the module itself. The two accuracies must
be equal at every epoch. At the end stands what the engine saved or cost, its build and all refreshes included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import torchaccel
from torchaccel import CompiledModule
from torchaccel.errors import TorchAccelError
from torchaccel.report import Report

TRAINING_BATCH, VALIDATION_BATCH = 64, 128
COLUMNS = ("epoch", "loss", "module", "engine", "differ", "module ms", "engine ms", "refresh ms")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, validate, compare; exits with a message where an epoch's accuracies differ or no engine served."""
    given = _parser().parse_args(arguments)
    if given.json is not None and given.json.is_dir():
        sys.exit(f"--json {given.json} is a folder: name a file in it, such as {given.json / 'train_with_eval.json'}")
    digits = load_digits(given.seed)
    torch.manual_seed(given.seed)
    try:
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
        model, build_ms = compile_once(ResNet(), digits, given)
        epochs = train(model, digits, given.epochs)
        outcome = Outcome(tuple(epochs), build_ms, model.report())
        print(f"\n{outcome.summary()}")
        if given.json is not None:
            given.json.write_text(json.dumps(outcome.to_dict() | {"seed": given.seed}, indent=1) + "\n")
    except TorchAccelError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"could not write {given.json}: {error}")
    if found := outcome.problems():
        sys.exit("\n".join(found))


# --- the network and the data ---


class Block(nn.Module):
    """Two convolutions beside a shortcut: [N, inputs, H, W] to [N, outputs, H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3, 1)
        self.shortcut = _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's activations."""
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Sequential):
    """A small residual network: digits [N, 1, 8, 8] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__(
            *(_convolution(1, 16, 3, 1), nn.ReLU()),
            *(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] from 0 to 1 and labels [N], three quarters to train with and a quarter to validate with."""

    training_images: Tensor
    training_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor

    def to(self, device: torch.device) -> Digits:
        """All of it on a device."""
        return Digits(*(tensor.to(device) for tensor in vars(self).values()))


def load_digits(seed: int) -> Digits:
    """The 1,797 digits that come with scikit-learn; nothing is downloaded."""
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        sys.exit(f"the digits come with scikit-learn, which is not installed ({error}): pip install scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8).astype("float32")
    parts = train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)
    training_images, validation_images, training_labels, validation_labels = map(torch.from_numpy, parts)
    return Digits(training_images, training_labels, validation_images, validation_labels)


# --- training and validation ---


def compile_once(net: nn.Module, digits: Digits, given: argparse.Namespace) -> tuple[CompiledModule, float]:
    """The drop-in for the network, and the ms that its engine took to build."""
    on_gpu = torch.cuda.is_available() and not (given.device or "cuda").startswith("cpu")
    started = time.perf_counter()
    model = torchaccel.compile(
        net,
        given.precision or ("fp16" if on_gpu else "fp32"),  # which is slower than fp32 on most CPUs
        inputs=digits.validation_images[:VALIDATION_BATCH],  # build now, so that the build has a time of its own
        backend=given.backend,
        device=given.device,
        dynamic_batch=(1, VALIDATION_BATCH, VALIDATION_BATCH),  # one engine: the last batch is smaller
    )
    return model, (time.perf_counter() - started) * 1e3


@dataclass(frozen=True)
class Epoch:
    """One epoch: the loss, both accuracies as fractions, and ms.

    `eval_ms` is the call of `eval()`, where a refresh happens; a backend that builds anew for new weights does so in
    its first validation batch, and the time is in `engine_ms`.
    """

    number: int
    loss: float
    images: int
    accuracy_module: float
    accuracy_engine: float
    predictions_differ: int
    module_ms: float
    eval_ms: float
    engine_ms: float
    refresh_ms: float
    batches: int

    def row(self) -> tuple[str, ...]:
        """What the table shows of it."""
        accuracies = (f"{self.accuracy_module:.4f}", f"{self.accuracy_engine:.4f}", str(self.predictions_differ))
        times = (f"{self.module_ms:.1f}", f"{self.engine_ms:.1f}", f"{self.refresh_ms:.1f}")
        return (str(self.number), f"{self.loss:.4f}", *accuracies, *times)


def train(model: CompiledModule, digits: Digits, epochs: int) -> list[Epoch]:
    """Train the module through the compiled one for some epochs, and validate with both after each."""
    digits = digits.to(next(model.parameters()).device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    table = Table(title="validation accuracy and time, by the module and by the engine", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    done = []
    with Live(table, console=Console(width=None if sys.stdout.isatty() else 100)):
        for number in range(1, epochs + 1):
            model.train()
            loss = train_epoch(model, optimizer, digits)
            done.append(validate(model, digits, number, loss))
            table.add_row(*done[-1].row())
    return done


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, digits: Digits) -> float:
    """One pass over the training images, shuffled; the mean loss. In training mode the module itself runs."""
    total = 0.0
    order = torch.randperm(len(digits.training_labels)).to(digits.training_labels.device)
    for chosen in order.split(TRAINING_BATCH):
        optimizer.zero_grad()
        loss = cross_entropy(model(digits.training_images[chosen]), digits.training_labels[chosen])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(chosen)
    return total / len(order)


def validate(model: CompiledModule, digits: Digits, number: int, loss: float) -> Epoch:
    """Validate with the module and with the engine, in turns first: who comes second finds the images in the cache."""
    labels = digits.validation_labels
    batches = digits.validation_images.split(VALIDATION_BATCH)
    _, eval_ms = timed(model.eval)
    runs: dict[str, Callable[[Tensor], Tensor]] = {"module": model.module, "engine": model}
    guesses, times = {}, {}
    for name in sorted(runs, reverse=number % 2 == 1):
        guesses[name], times[name] = timed(partial(predictions, runs[name], batches))
    accuracies = {name: (guess == labels).double().mean().item() for name, guess in guesses.items()}
    return Epoch(
        number,
        loss,
        images=len(labels),
        accuracy_module=accuracies["module"],
        accuracy_engine=accuracies["engine"],
        predictions_differ=int((guesses["module"] != guesses["engine"]).sum()),
        module_ms=times["module"],
        eval_ms=eval_ms,
        engine_ms=times["engine"],
        refresh_ms=model.report().refresh_ms,
        batches=len(batches),
    )


@torch.no_grad()
def predictions(run: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Tensor:
    """The likeliest digit of each image."""
    return torch.cat([run(batch).argmax(1) for batch in batches])


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its ms: from when the GPU is idle to when it is idle again."""
    _synchronize()
    started = time.perf_counter()
    result = function()
    _synchronize()
    return result, (time.perf_counter() - started) * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- what came of it ---


@dataclass(frozen=True)
class Outcome:
    """The epochs, the first build's ms, and the compiled module's report."""

    epochs: tuple[Epoch, ...]
    build_ms: float
    report: Report

    @property
    def module_ms(self) -> float:
        """What validating with the module alone took."""
        return sum(epoch.module_ms for epoch in self.epochs)

    @property
    def engine_ms(self) -> float:
        """What validating with the engine took, without the first build but with every refresh."""
        return sum(epoch.eval_ms + epoch.engine_ms for epoch in self.epochs)

    @property
    def saved_ms(self) -> float:
        """What the engine saved in all; less than nothing where it cost time."""
        return self.module_ms - self.engine_ms - self.build_ms

    @property
    def batches(self) -> int:
        """How many batches were validated."""
        return sum(epoch.batches for epoch in self.epochs)

    def problems(self) -> list[str]:
        """What is not as it has to be: unequal accuracies, a batch that no engine served, a refresh left out."""
        found = [
            f"epoch {epoch.number}: the accuracy is {epoch.accuracy_module:.4f} by the module and "
            f"{epoch.accuracy_engine:.4f} by the engine; {epoch.predictions_differ} of {epoch.images} predictions "
            f"differ. Rounding can do that where two digits are almost as likely: compare with --precision fp32."
            for epoch in self.epochs
            if epoch.accuracy_module != epoch.accuracy_engine
        ]
        served, refreshes = self.report.calls_by_engine, self.report.refreshes
        if served != self.batches:
            found.append(f"engines served {served} of {self.batches} validation batches.")
        if refreshes != len(self.epochs):
            found.append(f"the engine was refreshed {refreshes} times in {len(self.epochs)} epochs.")
        return found

    def summary(self) -> str:
        """Who served, and the time that it saved or cost."""
        report, gain_ms = self.report, (self.module_ms - self.engine_ms) / len(self.epochs)
        lines = [
            f"{report.backend}, {report.precision}, {report.device}: {report.calls_by_engine} of {self.batches} "
            f"validation batches by an engine; builds: {report.builds}, refreshes: {report.refreshes}",
            f"validation by the module: {self.module_ms:.0f} ms; by the engine, refreshes included: "
            f"{self.engine_ms:.0f} ms, after {self.build_ms:.0f} ms for the first build",
            f"in all the engine {'saved' if self.saved_ms > 0 else 'cost'} {abs(self.saved_ms):.0f} ms",
        ]
        if gain_ms <= 0:
            lines.append("not even without its build is it faster: so small a network has little to gain")
        elif self.saved_ms <= 0:
            lines.append(f"it gains {gain_ms:.1f} ms an epoch: {self.build_ms / gain_ms:.0f} epochs pay for its build")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        times = {name: getattr(self, name) for name in ("build_ms", "module_ms", "engine_ms", "saved_ms")}
        epochs = [asdict(epoch) for epoch in self.epochs]
        return {"epochs": epochs, **times, "problems": self.problems(), "report": self.report.to_dict()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.train_with_eval", description=(__doc__ or "").partition(": `")[0] + "."
    )
    parser.add_argument("--epochs", type=_count, default=8, metavar="N", help="passes over the training images (8)")
    parser.add_argument("--precision", help="fp32, tf32, fp16 or bf16 (fp16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--backend", default="auto", help="as of torchaccel.compile (auto)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (the GPU where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the split and the order (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the report to a file")
    return parser


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
