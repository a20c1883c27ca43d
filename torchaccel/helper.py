"""The compiled helper: `watch.cpp`, built once for each PyTorch and Python by the machine's own C++ compiler.

Nothing waits for it: it is compiled beside the first build of an engine, and until it is there, or where there is no
compiler, Python does the same work more slowly.
"""

import functools
import hashlib
import importlib.util
import logging
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import torch

from torchaccel.cache.folder import make_own_folder, own_folder
from torchaccel.cache.store import cache_folder
from torchaccel.probes import cxx_compiler

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("watch.cpp")
COMPILE_LIMIT_S = 300


class Helper:
    """The compiled functions, once they are there; `problem` says why they never will be."""

    def __init__(self) -> None:
        self.module: ModuleType | None = None
        self.problem = ""

    @functools.cached_property
    def _thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._prepare, name="torchaccel-helper", daemon=True)
        thread.start()
        return thread

    def start(self) -> None:
        """Load the helper in the background, and compile it first where this machine has none yet."""
        self._thread  # noqa: B018 - the first look starts it

    def wait(self) -> ModuleType | None:
        """The helper, as soon as it is there; None where it cannot be."""
        self._thread.join()
        return self.module

    def _prepare(self) -> None:
        try:
            path = _compiled()
            try:
                self.module = _load(path)
            except ImportError:  # what lies there is no library
                path.unlink()
                self.module = _load(_compiled())
        except (OSError, ImportError, subprocess.SubprocessError) as error:
            self.problem = f"{type(error).__name__}: {error}"
            logger.info("weights are watched in Python, since the helper cannot be compiled: %s", self.problem)


helper = Helper()


def _compiled() -> Path:
    """The shared library, compiled unless it is there; it appears whole or not at all."""
    name, known = f"watch-{_key()}{sysconfig.get_config_var('EXT_SUFFIX')}", own_folder(cache_folder())
    if known is not None and (known / name).is_file():
        return known / name
    compiler = cxx_compiler()
    if compiler is None:
        raise OSError("there is no C++ compiler: install g++, or set CXX")
    target = make_own_folder(cache_folder()) / name
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder) / "watch.so"
        command = [compiler, *_flags(), str(SOURCE), "-o", str(output), *_libraries()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise OSError(f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[-1])}")
        output.replace(target)
    return target


def _key() -> str:
    """What a library was compiled from and for."""
    built_for = (SOURCE.read_bytes(), torch.__version__, torch.__file__, sys.version, sysconfig.get_platform())
    return hashlib.sha256(repr(built_for).encode()).hexdigest()[:16]


def _flags() -> list[str]:
    torch_include = Path(torch.__file__).parent / "include"
    folders = (torch_include, torch_include / "torch/csrc/api/include", Path(sysconfig.get_path("include")))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ["-O1", "-std=c++20", "-fPIC", "-shared", abi, *(f"-isystem{folder}" for folder in folders)]


def _libraries() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python"]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("torchaccel_watch", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python extension")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
