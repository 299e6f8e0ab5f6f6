"""A real Triton Inference Server on loopback, without Docker or a GPU: the one that the wheel of nvidia-pytriton carries.

It is set up once in a folder of the user's cache, or in the one that HPS_NUMBA_TRITON names. Where it cannot run, tests that
need it are skipped with the reason.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import pytest
from support.processes import ROOT, environment
from support.servers import free_port
from support.waiting import HANG_SECONDS, wait_until

__all__ = ["TritonServer", "perf_analyzer", "program_folder", "running"]

WHEEL = "nvidia-pytriton==0.7.0"  # Triton 2.51
CLIENT_WHEEL = "tritonclient==2.51.0"  # its Perf Analyzer runs with glibc 2.36; that of later ones does not


class TritonEnded(Exception):
    """The server ended by itself; what it logged."""


def missing(why: str) -> None:
    """Skip the test."""
    pytest.skip(f"needs Triton: {why}")


def program_folder() -> Path:
    """The folder in which the wheel is installed, in ``t``; it is made if needed."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        missing(f"its wheel is for Linux x86-64, this is {platform.system()} {platform.machine()}")
    given = os.environ.get("HPS_NUMBA_TRITON")
    place = Path(given) if given else platformdirs.user_cache_path("hps_numba", appauthor=False) / "triton"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:  # pytest-xdist may be several at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "t" / "pytriton").is_dir():
            _install(place / "t", WHEEL)
    return place


def _install(target: Path, wheel: str) -> None:
    """Install one wheel, and nothing that it asks for, in a folder of its own."""
    fresh = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(fresh), wheel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    if done.returncode:
        shutil.rmtree(fresh, ignore_errors=True)
        missing(f"pip cannot install {wheel}: {done.stderr.strip()[-300:]}")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def backend_for_this_python(place: Path, folder: Path) -> Path:
    """A folder of backends in ``folder``: the Python backend with the stub of this Python, and this checkout.

    The stub runs Python isolated: it takes the environment of the ``python3`` on PATH, and ignores PYTHONPATH. But models find
    what lies in the folder of the backend.
    """
    server = place / "t" / "pytriton" / "tritonserver"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        missing(f"{WHEEL} has no stub for Python {version}")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    links = [*(server / "backends" / "python").glob("*.so"), *(server / "backends" / "python").glob("*.py"), stub]
    for target in (*links, ROOT / "hps_numba"):
        link = backend / target.name
        if not link.is_symlink():
            link.symlink_to(target)
    stub.chmod(0o755)
    return backend.parent


def python_library() -> Path:
    """The folder of libpython, which the stub is linked with."""
    name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    places = [sysconfig.get_config_var("LIBDIR") or "/", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    found = next((Path(place) for place in places if (Path(place) / name).exists()), None)
    if found is None:
        missing(f"there is no {name}")
    assert found is not None
    return found


class TritonServer:
    """A server on loopback.

    Attributes:
        http, grpc, metrics: addresses, host:port.   log: file of what it and its models print.   models: the repository.
    """

    def __init__(self, models: Path, folder: Path, *options: str, **more: str) -> None:
        self.models, self.folder, self.options, self.more = models, folder, options, more
        self.log = folder / "triton.log"
        self.prefix = f"hps_triton_{uuid.uuid4().hex}_"
        self.process: subprocess.Popen[bytes] | None = None
        for attempt in range(5):  # a port that was free may be taken meanwhile
            self.http, self.grpc, self.metrics = (f"127.0.0.1:{free_port()}" for _ in range(3))
            try:
                self._start()
                return
            except TritonEnded as ended:
                self.stop()
                if attempt == 4 or "in use" not in str(ended):
                    raise

    def _start(self) -> None:
        place, library = program_folder(), python_library()
        libraries = [str(place / "t" / "nvidia_pytriton.libs"), str(library)]
        program = place / "t" / "pytriton" / "tritonserver" / "bin" / "tritonserver"
        program.chmod(0o755)
        backends = backend_for_this_python(place, self.folder)
        command = [str(program), f"--model-repository={self.models}", f"--backend-directory={backends}"]
        for kind, address in (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics)):
            host, _, port = address.partition(":")
            command += [f"--{kind}-address={host}", f"--{kind}-port={port}"]
        command += [f"--backend-config=python,shm-region-prefix-name={self.prefix}", "--model-control-mode=explicit"]
        command += self.options
        path = environment(**self.more)
        path["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path.get("PATH", "")])
        path["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=path, stdout=log, stderr=log, cwd=self.folder)
        wait_until(self.is_ready)

    def is_ready(self) -> bool:
        """Whether it answers, and every model that it was told to load."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise TritonEnded(self.text())
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=HANG_SECONDS) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace")

    def metric_lines(self) -> list[str]:
        """The text of its metrics, by lines."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=HANG_SECONDS) as answer:
            text: bytes = answer.read()
        return text.decode().splitlines()

    def stop(self) -> None:
        """End it, and remove the shared memory that its backend may leave behind."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(HANG_SECONDS)
            self.process = None
        for left in Path("/dev/shm").glob(f"{self.prefix}*"):
            left.unlink(missing_ok=True)


@contextmanager
def running(models: Path, folder: Path, *options: str, **more: str) -> Iterator[TritonServer]:
    """A server of a model repository.

    Args:
        folder: of its log and working directory.   options: further ones of ``tritonserver``, such as ``--load-model=m``.
        more: variables of the environment.
    """
    server = TritonServer(models, folder, *options, **more)
    try:
        yield server
    finally:
        server.stop()


def perf_analyzer(*words: str) -> str:
    """Run NVIDIA's Perf Analyzer; what it prints."""
    place = program_folder()
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "client").is_dir():
            _install(place / "client", CLIENT_WHEEL)
        libraries = place / "lib"
        libraries.mkdir(exist_ok=True)
        for name, pattern in (("libcudart.so.12", "libcudart-*.so.12*"), ("libb64.so.0d", "libb64-*.so.0d")):
            link, target = libraries / name, next((place / "t" / "nvidia_pytriton.libs").glob(pattern))
            if not link.is_symlink():
                link.symlink_to(target.resolve())
    program = next((place / "client").rglob("perf_analyzer"))
    command: Sequence[str] = [str(program), *words]
    path = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
