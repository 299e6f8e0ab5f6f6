"""What an application asks Ray Serve for: replicas, when to start more, memory by the plan, GPUs; nothing is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.inference_suite import write_suite

from hps_numba import ConfigError, ModelFileError, read_config
from hps_numba.frontends import ray_serve
from hps_numba.frontends.ray_serve import ModelVersion
from hps_numba.server.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore")  # those that Ray gives when it is imported


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ray.serve", reason="needs the extra ray")
    return write_suite(tmp_path_factory.mktemp("ray"))


def deployed(application: Any) -> Any:
    """The deployment of an application."""
    return application._bound_deployment


def test_more_replicas_are_started_when_requests_wait(config: Path) -> None:
    some = deployed(ray_serve.app(config, replicas=2, max_replicas=6, requests_per_replica=3.0, max_queued_requests=40))
    scaling = some._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 6, 3.0)
    assert (some.max_ongoing_requests, some.max_queued_requests) == (64, 40)
    fixed = deployed(ray_serve.app(config, replicas=3))
    assert fixed.num_replicas == 3 and fixed._deployment_config.autoscaling_config is None


def test_a_replica_asks_for_what_the_plan_says(config: Path) -> None:
    plan = make_plan(read_config(config))
    wanted = {"num_cpus": 0.5, "num_gpus": 1, "memory": plan.host_bytes + plan.loading_bytes}
    assert deployed(ray_serve.app(config, cpus=0.5, gpus=1)).ray_actor_options == wanted
    assert deployed(ray_serve.app(config, memory=1 << 30)).ray_actor_options["memory"] == 1 << 30
    each = ray_serve.apps(config)
    assert set(each) == {"/v2/models/rows", "/v2/models/other", "/"}
    asked = [deployed(each[f"/v2/models/{name}"]).ray_actor_options["memory"] for name in ("rows", "other")]
    assert min(asked) > 0 and sum(asked) <= plan.host_bytes + 2 * plan.loading_bytes


def test_files_that_are_elsewhere_need_memory_to_be_said(config: Path, tmp_path: Path) -> None:
    moved = tmp_path / "ps.json"
    moved.write_text(config.read_text().replace(str(config.parent), "/of/another/node"))
    with pytest.raises(ModelFileError, match="memory="):
        ray_serve.app(moved)
    assert deployed(ray_serve.app(moved, memory=1 << 20)).ray_actor_options["memory"] == 1 << 20


def test_a_config_file_of_serve(config: Path) -> None:
    args = {
        "config": str(config),
        "replicas": 2,
        "limits": {"max_keys": 10},
        "versions": {"other": {"version": 7, "sparse_files": ["/a"]}},
    }
    some = deployed(ray_serve.build(args))
    assert some.user_config == {"other": {"version": 7, "sparse_files": ["/a"]}} and some.num_replicas == 2
    assert some.init_args[1].max_keys == 10


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda config: ray_serve.app(config, replicas=0), "replicas: expected at least 1, got 0"),
        (lambda config: ray_serve.app(config, replicas=3, max_replicas=2), "max_replicas: expected at least 3, got 2"),
        (lambda config: ray_serve.app(config, gpus=-1), "gpus: expected at least 0"),
        (lambda config: ray_serve.app(config, models=["nobody"]), "models: expected some of rows, other, got 'nobody'"),
        (lambda config: ray_serve.app(config, versions={"nobody": ModelVersion(1, [])}), "versions: .* got 'nobody'"),
        (lambda config: ray_serve.build({"config": config, "replica": 1}), "args: expected config .* got config, replica"),
        (lambda config: ray_serve.build({"config": config, "limits": {"max_key": 1}}), "limits: expected fields of Limits"),
    ],
)
def test_what_is_wrong_is_said_at_once(config: Path, make: Callable[[Path], Mapping[str, Any]], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make(config)
