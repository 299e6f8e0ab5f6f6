"""A fleet of parameter servers on Ray Serve (extra ``ray``).

::

    from hps_numba.frontends import ray_serve

    ray_serve.run("ps.json", replicas=3)          # or: ray.serve.run(ray_serve.app("ps.json", replicas=3))

Every replica is a whole server, as ``hps-numba serve`` starts one, and speaks the Open Inference Protocol. Rows that replicas
share come from a tier that they share (Redis Cluster), updates from a bus; nothing passes between replicas, and no row passes
through Ray's object store.
"""

from __future__ import annotations

from hps_numba.frontends.ray_serve.deployment import ModelVersion, app, apps, build, run

__all__ = ["ModelVersion", "app", "apps", "build", "run"]
