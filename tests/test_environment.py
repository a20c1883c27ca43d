"""environment.py, probes.py and combinations.py against faked installations: metadata, modules, compilers, drivers."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from torchaccel import combinations, probes

# the package re-exports a function of the same name, so that `import torchaccel.environment as ...` may give that
environment = importlib.import_module("torchaccel.environment")


provenance = importlib.import_module("torchaccel.provenance")

MODULES = ("torch_tensorrt", "tensorrt", "tensorrt_rtx")
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x@y)\nGCC version: 12.2.0"
)
CLOSED_DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0"
)


def clear_caches() -> None:
    for function in vars(probes).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without driver, GPU or nvidia-smi, and without what an earlier test imported or found."""
    clear_caches()
    imported = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    monkeypatch.setattr(probes, "_DRIVER_FILE", tmp_path / "no-driver")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    put_on_path(monkeypatch, tmp_path / "no-smi", "nvidia-smi", "#!/bin/sh\nexit 9\n")
    for name in ("CC", "CXX", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(imported)
    clear_caches()


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty site-packages that stands in for the real one."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(
        sys, "path", [str(folder), *(p for p in sys.path if "-packages" not in p and Path(p) != Path.cwd())]
    )
    importlib.invalidate_caches()
    return folder


def install(site: Path, name: str, version: str, **modules: str) -> None:
    """Write the metadata of a distribution, and its modules as packages with the given source."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module, source in modules.items():
        package = site.joinpath(*module.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
    importlib.invalidate_caches()


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100") -> None:
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=80 << 30, uuid="1234-abcd"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    clear_caches()


@pytest.fixture
def nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Put an nvidia-smi that prints a text on the path; its arguments go to the file that is returned."""

    def write(output: str) -> Path:
        log = tmp_path / "smi.log"
        script = f"#!/bin/sh\necho \"$@\" >>'{log}'\ncat <<'TEXT'\n{output}\nTEXT\n"
        put_on_path(monkeypatch, tmp_path / "smi", "nvidia-smi", script)
        clear_caches()
        return log

    return write


def component(name: str) -> Any:
    return next(one for one in environment._components() if one.name == name)


def problem_names() -> list[str]:
    return [problem.name for problem in combinations.bad_combinations()]


# ---- importing the file ----


@pytest.mark.parametrize(
    ("how", "heavy"),
    [
        ("import torchaccel", {"tensorrt", "tensorrt_rtx", "torch_tensorrt"}),
        # the file by itself, without the package around it
        (
            f"import runpy; runpy.run_path({probes.__file__!r})",
            {"tensorrt", "tensorrt_rtx", "torch_tensorrt", "onnx", "onnxscript", "triton", "rich"},
        ),
    ],
    ids=["package", "file"],
)
def test_importing_it_imports_no_engine_and_initialises_no_cuda(how: str, heavy: set[str]) -> None:
    code = f"import sys, torch\n{how}\nprint(sorted({heavy!r} & set(sys.modules)), torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


# ---- small probes ----


@pytest.mark.parametrize("spelling", ["fake-dist", "Fake_Dist", "fake.dist"])
def test_distribution_version_takes_any_spelling(site: Path, spelling: str) -> None:
    install(site, "fake-dist", "1.2.3")
    assert probes.distribution_version(spelling) == "1.2.3"


def test_distribution_version_of_nothing(site: Path) -> None:
    assert probes.distribution_version("fake-dist") is None


def test_a_failed_import_is_one_line_and_silent_and_tried_once(
    site: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log = site / "attempts"
    source = f"""
import logging, os, sys, warnings
open({str(log)!r}, "a").write("x")
print("python noise"); print("python noise", file=sys.stderr)
os.write(1, b"native noise"); os.write(2, b"native noise")
logging.getLogger("fake").critical("logged noise")
warnings.warn("deprecated", DeprecationWarning)
raise RuntimeError("libfake.so is missing\\nlook for it")
"""
    install(site, "fake", "1.0", fake_broken=source)
    first, second = probes.import_problem("fake_broken"), probes.import_problem("fake_broken")
    assert first == second == "RuntimeError: libfake.so is missing"
    assert log.read_text() == "x"
    print("afterwards", flush=True)
    os.write(1, b"native afterwards")
    logging.getLogger("fake").critical("logged afterwards")
    captured = capfd.readouterr()
    assert captured.out == "afterwards\nnative afterwards"
    assert "noise" not in captured.err
    assert caplog.messages == ["logged afterwards"]


def test_a_good_import_with_warnings_is_no_problem(site: Path) -> None:
    install(site, "fake", "1.0", fake_warns="import warnings; warnings.warn('old', DeprecationWarning)")
    assert probes.import_problem("fake_warns") is None


def test_an_installation_after_a_failed_probe_is_seen(site: Path) -> None:
    assert probes.import_problem("fake_late") == "fake_late is not installed"
    install(site, "fake", "1.0", fake_late="")
    assert probes.import_problem("fake_late") is None


def test_torch_tensorrt_is_not_even_imported_without_a_gpu(site: Path) -> None:
    install(site, "torch-tensorrt", "2.11.0", torch_tensorrt=f"open({str(site / 'touched')!r}, 'w')")
    assert "there is no NVIDIA driver" in probes.import_problem("torch_tensorrt")
    assert not (site / "touched").exists()


def test_torch_tensorrt_is_imported_with_one(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "torch-tensorrt", "2.11.0", torch_tensorrt="")
    fake_gpu(monkeypatch)
    assert probes.import_problem("torch_tensorrt") is None


def test_an_alias_is_not_taken_for_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt_rtx"))
    assert "gives tensorrt_rtx" in probes.import_problem("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    assert probes.import_problem("tensorrt") is None


@pytest.mark.parametrize(("text", "version"), [(OPEN_DRIVER, "580.95.05"), (CLOSED_DRIVER, "535.104.05")])
def test_driver_version_from_the_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, version: str
) -> None:
    (tmp_path / "driver").write_text(text)
    monkeypatch.setattr(probes, "_DRIVER_FILE", tmp_path / "driver")
    assert probes.driver_version() == version


def test_driver_version_from_nvidia_smi(nvidia_smi: Callable[[str], Path]) -> None:
    assert probes.driver_version() is None
    nvidia_smi("580.159.04\n580.159.04")
    assert probes.driver_version() == "580.159.04"


def test_a_failing_or_hanging_command_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.run_tool("sh", "-c", "echo text; exit 3") is None
    assert probes.run_tool("/no/such/command") is None

    def hang(*args: Any, **kwargs: Any) -> None:
        assert kwargs["timeout"] <= 10
        raise subprocess.TimeoutExpired(args[0], kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert probes.run_tool("sleep", "60") is None


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.gpus() == ()
    fake_gpu(monkeypatch)
    assert probes.gpus() == (environment.Gpu(0, "NVIDIA H100", (9, 0), 80 * 1024),)


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, nvidia_smi: Callable[[str], Path]) -> None:
    assert combinations.device_problem("triton") == "there is no NVIDIA driver"
    nvidia_smi("580.95.05")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in combinations.device_problem("triton")
    assert component("Triton").remedy == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    nvidia_smi("470.57.02")
    assert "needs driver 580" in combinations.device_problem("triton")
    monkeypatch.setattr(torch.version, "cuda", None)
    clear_caches()
    assert "built without CUDA" in combinations.device_problem("triton")


def test_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "compilers"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    assert probes.cxx_compiler() is probes.c_compiler() is None
    for name in ("g++", "clang", "mine"):
        (folder / name).touch(0o755)
    clear_caches()
    assert probes.cxx_compiler() == str(folder / "g++")
    assert probes.c_compiler() == str(folder / "clang")
    monkeypatch.setenv("CXX", "mine -O2")
    monkeypatch.setenv("CC", "absent")
    clear_caches()
    assert probes.cxx_compiler() == str(folder / "mine")
    assert probes.c_compiler() is None


# ---- which TensorRT, on which GPU ----


def test_the_tensorrt_of_torch_tensorrt(site: Path) -> None:
    install(site, "tensorrt", "10.15.1")
    install(site, "tensorrt-rtx", "1.6.1")
    assert probes.tensorrt_of_torch_tensorrt() is None
    install(site, "torch-tensorrt", "2.11.0")
    assert probes.tensorrt_of_torch_tensorrt() == "tensorrt"
    install(site, "torch-tensorrt-rtx", "2.14.0")
    assert probes.tensorrt_of_torch_tensorrt() == "tensorrt_rtx"


@pytest.mark.parametrize(
    ("module", "distribution", "version", "capability", "refused"),
    [
        ("tensorrt_rtx", "tensorrt-rtx", "1.7.0.12", (9, 0), True),
        ("tensorrt_rtx", "tensorrt-rtx", "1.10.0", (9, 0), True),
        ("tensorrt_rtx", "tensorrt-rtx", "1.6.1.120", (9, 0), False),
        ("tensorrt_rtx", "tensorrt-rtx", "1.7.0.12", (8, 9), False),
        ("tensorrt_rtx", "tensorrt-rtx", "1.7.0.12", (12, 0), False),
        ("tensorrt_rtx", "tensorrt_rtx_cu13", "1.4.0.76", (7, 5), False),
        ("tensorrt_rtx", "tensorrt-rtx", "1.4.0.76", (7, 0), True),
        ("tensorrt", "tensorrt", "10.15.1.29", (7, 0), True),
        ("tensorrt", "tensorrt", "11.0.0", (7, 0), True),
        ("tensorrt", "tensorrt", "10.4.0", (7, 0), False),
        ("tensorrt", "tensorrt", "11.0.0", (7, 5), False),
        ("triton", "triton", "3.6.0", (6, 1), True),
        ("triton", "triton", "3.6.0", (7, 0), False),
    ],
)
def test_a_refused_gpu(
    *,
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    distribution: str,
    version: str,
    capability: tuple[int, int],
    refused: bool,
) -> None:
    install(site, distribution, version, **{module: ""})
    fake_gpu(monkeypatch, capability, "NVIDIA Test")
    problem = combinations.device_problem(module)
    found = combinations.bad_combinations()
    if refused:
        assert f"NVIDIA Test is {capability[0]}.{capability[1]}" in problem
        assert [(p.name.split()[-2:], p.reason) for p in found] == [(["NVIDIA", "Test"], problem)]
        assert found[0].remedy
    else:
        assert problem is None
        assert found == ()


def test_torch_tensorrt_is_refused_for_the_tensorrt_beneath(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "torch-tensorrt-rtx", "2.14.0")
    install(site, "tensorrt-rtx", "1.7.0")
    fake_gpu(monkeypatch)
    assert "refuse 9.0" in combinations.device_problem("torch_tensorrt")
    assert combinations.device_problem("tensorrt") is None
    assert combinations.device_problem("tensorrt", index=3) == "PyTorch sees 1 GPUs, and no 3"


# ---- bad combinations ----


def test_nothing_installed_is_no_bad_combination(site: Path) -> None:
    assert combinations.bad_combinations() == ()


def test_a_fitting_installation_is_no_bad_combination(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0+cu130")
    install(site, "torch-tensorrt-rtx", "2.14.0", torch_tensorrt="")
    install(site, "tensorrt-rtx", "1.6.1.120", tensorrt_rtx="", **{"tensorrt_rtx.plugin": ""})
    fake_gpu(monkeypatch)
    assert combinations.bad_combinations() == ()


def test_the_placeholder(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "torch-tensorrt-rtx", "0.0.1", torch_tensorrt="raise ImportError('empty')")
    fake_gpu(monkeypatch)
    (problem,) = combinations.bad_combinations()
    assert "torch-tensorrt-rtx 0.0.1 is an empty placeholder" in problem.reason
    assert problem.remedy == 'pip install "torchaccel[rtx]"'


@pytest.mark.parametrize(
    ("distribution", "remedy"),
    [
        (
            "torch-tensorrt",
            'pip install "torch-tensorrt==2.11.*" --extra-index-url https://download.pytorch.org/whl/cu128',
        ),
        ("torch-tensorrt-rtx", 'pip install "torchaccel[rtx]"'),
    ],
)
def test_torch_tensorrt_for_another_torch(
    site: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, remedy: str
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    install(site, distribution, "2.14.0", torch_tensorrt="raise ImportError('undefined symbol')")
    fake_gpu(monkeypatch)
    (problem,) = combinations.bad_combinations()
    assert problem.name == f"{distribution} 2.14.0 beside PyTorch 2.11.0+cu128"
    assert problem.remedy == remedy


@pytest.mark.parametrize("plugin", [True, False])
def test_torch_tensorrt_rtx_2_11_beside_a_plugin_package(
    site: Path, monkeypatch: pytest.MonkeyPatch, plugin: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    install(site, "torch-tensorrt-rtx", "2.11.0")
    install(site, "tensorrt-rtx", "1.4.0.76", tensorrt_rtx="")
    if plugin:
        install(site, "plugin-of-rtx", "1.0", **{"tensorrt_rtx.plugin": ""})
    names = ["torch-tensorrt-rtx 2.11.0 beside tensorrt-rtx 1.4.0.76"] if plugin else []
    assert problem_names() == names


def test_both_torch_tensorrts(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    install(site, "torch-tensorrt", "2.14.0")
    install(site, "torch-tensorrt-rtx", "2.14.0")
    assert problem_names() == ["torch-tensorrt and torch-tensorrt-rtx"]


@pytest.mark.parametrize(
    ("torch_tensorrt", "uninstall"),
    [
        ("torch-tensorrt", "tensorrt-rtx"),
        ("torch-tensorrt-rtx", "tensorrt tensorrt-cu13"),
        (None, "tensorrt-rtx"),
    ],
)
def test_both_tensorrts(
    site: Path, monkeypatch: pytest.MonkeyPatch, torch_tensorrt: str | None, uninstall: str
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    install(site, "tensorrt", "10.15.1", tensorrt="")
    install(site, "tensorrt-cu13", "10.15.1")
    install(site, "tensorrt-rtx", "1.6.1", tensorrt_rtx="")
    if torch_tensorrt:
        install(site, torch_tensorrt, "2.14.0")
    (problem,) = combinations.bad_combinations()
    assert problem.name == "TensorRT and TensorRT-RTX"
    assert problem.remedy == f"pip uninstall -y {uninstall}"


@pytest.mark.parametrize(("driver", "wheels"), [("580.95.05", "cu130"), ("535.104.05", "cu126")])
def test_a_cpu_only_torch_beside_a_gpu(
    site: Path, monkeypatch: pytest.MonkeyPatch, nvidia_smi: Callable[[str], Path], driver: str, wheels: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.14.0+cpu")
    assert combinations.bad_combinations() == ()  # no GPU: nothing wrong with it
    nvidia_smi(driver)
    (problem,) = combinations.bad_combinations()
    assert problem.name == "CPU-only PyTorch beside an NVIDIA GPU"
    assert '"torch==2.14.0"' in problem.remedy
    assert problem.remedy.endswith(f"--index-url https://download.pytorch.org/whl/{wheels}")


@pytest.mark.parametrize(
    ("cuda", "driver", "old"),
    [("13.0", "575.57", True), ("13.0", "580.1", False), ("12.8", "535.1", False), ("12.8", "470.57.02", True)],
)
def test_a_driver_too_old(
    *,
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    nvidia_smi: Callable[[str], Path],
    cuda: str,
    driver: str,
    old: bool,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    nvidia_smi(driver)
    assert problem_names() == (["NVIDIA driver too old for this PyTorch"] if old else [])
    fake_gpu(monkeypatch)  # where PyTorch sees the GPU all the same, nothing is wrong
    assert problem_names() == []


def test_an_installed_library_that_does_not_import(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "tensorrt-rtx", "1.4.0.76", tensorrt_rtx="raise OSError('libtensorrt_rtx.so.1: cannot open')")
    (problem,) = combinations.bad_combinations()
    assert problem.name == "TensorRT-RTX does not import"
    assert problem.reason == "OSError: libtensorrt_rtx.so.1: cannot open"
    assert problem.remedy == 'pip uninstall -y tensorrt-rtx && pip install "tensorrt-rtx>=1.4,<1.7"'


def test_a_torch_tensorrt_that_does_not_import(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    install(site, "torch-tensorrt", "2.11.0", torch_tensorrt="raise OSError('libcudart.so.13: cannot open')")
    assert combinations.bad_combinations() == ()  # without a GPU it is not tried
    fake_gpu(monkeypatch)
    assert problem_names() == ["Torch-TensorRT does not import"]


def test_the_versions_in_remedies_are_those_of_the_extras() -> None:
    setup = (Path(__file__).parents[1] / "setup.cfg").read_text()
    assert probes.LIBRARIES["tensorrt"].requirement in setup
    upper = probes.LIBRARIES["tensorrt_rtx"].requirement.split(",")[1]
    assert f"tensorrt-rtx>=1.6,{upper}" in setup


# ---- the whole picture ----


def test_environment_here() -> None:
    found = environment.environment()
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["torch"] == torch.__version__
    assert plain["python"] == ".".join(map(str, sys.version_info[:3]))
    names = ["PyTorch CUDA", "Torch-TensorRT", "TensorRT", "TensorRT-RTX", "ONNX export", "Inductor on CPU", "Triton"]
    assert [component["name"] for component in plain["components"]] == names
    usable = {component.name: component.usable for component in found.components}
    assert usable["ONNX export"]
    assert not usable["PyTorch CUDA"]
    assert all(c.usable != bool(c.reason) and c.usable != bool(c.remedy) for c in found.components)


def test_environment_with_a_gpu(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "tensorrt", "10.15.1", tensorrt="")
    install(site, "torch-tensorrt", torch.__version__, torch_tensorrt="raise OSError('libnvinfer.so.10')")
    fake_gpu(monkeypatch)
    found = environment.environment()
    components = {component.name: component for component in found.components}
    assert found.to_dict()["gpus"] == [
        {"index": 0, "name": "NVIDIA H100", "compute_capability": [9, 0], "memory_mib": 81920}
    ]
    assert found.torch_tensorrt == f"torch-tensorrt {torch.__version__}"
    assert components["PyTorch CUDA"].usable
    assert components["TensorRT"].usable
    assert components["Torch-TensorRT"].reason == "OSError: libnvinfer.so.10"
    assert components["TensorRT-RTX"].reason == "tensorrt_rtx is not installed"
    assert components["TensorRT-RTX"].remedy == 'pip install "tensorrt-rtx>=1.4,<1.7"'
    assert [problem.name for problem in found.problems] == ["Torch-TensorRT does not import"]


def test_tensorrt_rtx_without_a_gpu_builds_engine_files(site: Path) -> None:
    install(site, "tensorrt-rtx", "1.4.0.76", tensorrt_rtx="")
    (rtx,) = [part for part in environment.environment().components if part.name == "TensorRT-RTX"]
    assert not rtx.usable
    assert rtx.reason == "there is no NVIDIA driver; it builds engine files, but runs none"


def test_what_is_missing_comes_before_the_gpu_and_what_is_installed_after(site: Path) -> None:
    assert component("Torch-TensorRT").reason == "torch_tensorrt is not installed"
    assert component("Torch-TensorRT").remedy.startswith("pip install")
    install(site, "torch-tensorrt", torch.__version__, torch_tensorrt="")
    assert component("Torch-TensorRT").reason == "there is no NVIDIA driver"
    assert component("Torch-TensorRT").remedy.startswith("install the NVIDIA driver")


def test_triton_is_refused_by_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (6, 1))
    assert not component("Triton").usable
    assert component("Triton").remedy == 'use backend="eager" on this GPU'


def test_missing_compilers_and_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def inductor() -> Any:
        clear_caches()
        return component("Inductor on CPU")

    with monkeypatch.context() as patched:
        patched.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
        patched.setenv("CXX", sys.executable)  # anything that can be run
        assert (inductor().reason, inductor().remedy) == ("Python.h is missing", "apt-get install python3-dev")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not inductor().usable
    assert inductor().remedy == "apt-get install g++"


def test_the_tables_keep_commands_whole(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    install(site, "torch-tensorrt-rtx", "0.0.1")
    install(site, "tensorrt", "10.15.1", tensorrt="raise ImportError('no [markup] here')")
    fake_gpu(monkeypatch, (7, 5), "Tesla T4")
    found = environment.environment()
    monkeypatch.undo()  # rich imports parts of itself while it prints
    remedies = {item.remedy for item in (*found.problems, *found.components) if item.remedy}
    wrapped, whole = StringIO(), StringIO()
    Console(file=wrapped, width=60).print(found)
    Console(file=whole, width=60).print(found, soft_wrap=True)
    for part in ("Tesla T4", "7.5", "81920", "torch-tensorrt-rtx 0.0.1", "10.15.1", "[rtx]", "[markup]", *remedies):
        assert part in " ".join(wrapped.getvalue().split()), part
    for remedy in remedies:
        assert any(line.endswith(remedy) for line in whole.getvalue().splitlines()), remedy


# ---- provenance ----


def test_gpu_state(monkeypatch: pytest.MonkeyPatch, nvidia_smi: Callable[[str], Path], tmp_path: Path) -> None:
    assert provenance.gpu_state(0) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.gpu_state(0) == {}  # no nvidia-smi at all
    monkeypatch.setenv("PATH", os.defpath)
    log = nvidia_smi("1980, 3201, 41, 120.50, [N/A]")
    fake_gpu(monkeypatch)
    expected = {"sm_clock_mhz": 1980.0, "memory_clock_mhz": 3201.0, "temperature_c": 41.0, "power_w": 120.5}
    assert provenance.gpu_state(0) == expected
    # by UUID: nvidia-smi's own count ignores CUDA_VISIBLE_DEVICES
    assert log.read_text().split()[0] == "--id=GPU-1234-abcd"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the package, with folders that sort differently in git, a __pycache__ and an empty folder."""
    copy = tmp_path / "checkout" / "torchaccel"
    shutil.copytree(Path(provenance.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("a/b.py", "a.py", "a0.py", "__pycache__/a.pyc"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("")
    (copy / "empty").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(copy / "provenance.py"))
    return copy


def test_provenance_in_a_checkout(package: Path) -> None:
    (package.parent / ".gitignore").write_text("__pycache__/\n")
    git(package.parent, "init", "-q")
    git(package.parent, "add", "-A")
    git(package.parent, "commit", "-q", "-m", "x")
    found = provenance.provenance()
    assert found["commit"] == git(package, "rev-parse", "HEAD")
    assert found["tree"] == git(package, "rev-parse", "HEAD:torchaccel")
    assert found["environment"]["torch"] == torch.__version__
    assert not {"components", "problems"} & set(found["environment"])
    (package / "a.py").write_text("edited")
    assert provenance.provenance()["tree"] != found["tree"]


def test_provenance_without_git(package: Path) -> None:
    git(package.parent, "init", "-q")
    git(package.parent, "commit", "-q", "--allow-empty", "-m", "x")
    (package / "a.py").write_text("edited")
    before = provenance.provenance()
    assert before["commit"] is None  # in a checkout, of something else: the file is not tracked
    git(package.parent, "add", "torchaccel/[!_]*", "torchaccel/__init__.py", "torchaccel/__main__.py")
    assert before["tree"] == git(package.parent, "write-tree", "--prefix=torchaccel/")
    shutil.rmtree(package.parent / ".git")
    assert provenance.provenance() == before


def test_provenance_imports_nothing(site: Path) -> None:
    install(site, "tensorrt-rtx", "1.4.0.76", tensorrt_rtx="raise AssertionError")
    assert provenance.provenance()["environment"]["tensorrt_rtx"] == "1.4.0.76"
    assert "tensorrt_rtx" not in sys.modules
    assert probes._import_failure.cache_info().currsize == 0
