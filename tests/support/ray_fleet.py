"""A fleet on a Ray cluster of this host, in a process of its own that does what lines of JSON tell it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.processes import environment
from support.servers import free_port
from support.waiting import HANG_SECONDS

__all__ = ["Fleet", "ray_fleet"]


class Fleet:
    """A Ray cluster with Ray Serve.

    Attributes:
        port: of the ingress, on loopback.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.port = free_port()
        self._log = (folder / "fleet.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.ray_fleet", str(nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,
            env=environment(
                RAY_SERVE_ENABLE_HA_PROXY="1",
                RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
                RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="1",
                RAY_SERVE_HAPROXY_METRICS_PORT=str(free_port()),  # a Prometheus exporter may have the usual one
                RAY_SERVE_HAPROXY_STATS_PORT=str(free_port()),
                RAY_USAGE_STATS_ENABLED="0",
                PYTHONWARNINGS="ignore",
            ),
            start_new_session=True,
        )
        try:
            self.tell("start")
        except RuntimeError as problem:
            self.close()
            pytest.skip(f"Ray does not start here: {problem}")

    def tell(self, command: str, **arguments: Any) -> Any:
        """Let the process do something; what it answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("> "):
                answer = json.loads(line[2:])
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["result"]
        raise RuntimeError(f"the process of the fleet ended: {Path(self._log.name).read_text()[-4000:]}")

    def run(self, config: Path, **options: Any) -> None:
        """``ray_serve.run``."""
        self.tell("run", config=str(config), port=self.port, **options)

    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        found: list[int] = self.tell("replicas")
        return found

    def close(self) -> None:
        """End all of it."""
        try:
            if self._process.poll() is None:
                self.tell("end")
                self._process.wait(HANG_SECONDS)
        finally:
            for process in _session(self._process.pid):
                os.kill(process, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._log):
                if stream is not None:
                    stream.close()


@contextmanager
def ray_fleet(folder: Path, nodes: int = 2) -> Iterator[Fleet]:
    """A fleet that ends with the block; without Ray the test is skipped, or fails with ``HPS_NUMBA_REQUIRE_SERVERS=1``."""
    if find_spec("ray") is None or sys.platform != "linux":
        missing = "needs Ray Serve on Linux: pip install 'hps-numba[ray]'"
        if os.environ.get("HPS_NUMBA_REQUIRE_SERVERS"):
            pytest.fail(missing)
        pytest.skip(missing)
    with (Path(tempfile.gettempdir()) / "hps_numba_tests_of_ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # replicas of Ray take fixed ports
        fleet = Fleet(folder, nodes)
        try:
            yield fleet
        finally:
            fleet.close()


def _session(leader: int) -> list[int]:
    """Processes that were started by the fleet and are still there."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != leader:
            try:
                if os.getsid(int(folder.name)) == leader:
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended
    return found


# -- the process ----------------------------------------------------------------------


def _replicas() -> list[int]:
    from ray._private.state import actors  # what is public needs the dashboard

    found = [actor for actor in actors().values() if actor["ActorClassName"].startswith("ServeReplica:")]
    return sorted(actor["Pid"] for actor in found if actor["State"] == "ALIVE")


def _say(**answer: Any) -> None:
    sys.stdout.write("> " + json.dumps(answer) + "\n")
    sys.stdout.flush()


def _main(nodes: int) -> None:
    commands = iter(sys.stdin)
    assert json.loads(next(commands))[0] == "start"
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from hps_numba.frontends import ray_serve
    from hps_numba.frontends.open_inference.limits import Limits

    size = {"num_cpus": 2, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**size)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    _say(result=nodes)
    for line in commands:
        command, arguments = json.loads(line)
        try:
            result: Any = None
            if command == "run":
                versions = arguments.pop("versions", {})
                if "limits" in arguments:
                    arguments["limits"] = Limits(**arguments["limits"])
                chosen = {model: ray_serve.ModelVersion(**version) for model, version in versions.items()}
                ray_serve.run(arguments.pop("config"), versions=chosen, **arguments)
            elif command == "replicas":
                result = _replicas()
            elif command == "delete":
                serve.delete(arguments["name"])
            elif command == "end":
                ray.shutdown()  # not Serve's, which waits half a minute for its controller
                cluster.shutdown()
            _say(result=result)
        except Exception as problem:
            _say(error=f"{type(problem).__name__}: {problem}")
        if command == "end":
            return


if __name__ == "__main__":
    _main(int(sys.argv[1]))
