"""What the optimizers of rows change goes to a bus of online updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.frontends._row_publishing import RowPublisher
from hps_numba.frontends.torch.optimizers import RowOptimizer
from hps_numba.updates import UpdateProducer

__all__ = ["publish_rows"]


def publish_rows(
    optimizer: RowOptimizer, bus: Mapping[str, Any] | UpdateProducer, *, interval_ms: float = 100.0, version: int | None = None
) -> RowPublisher:
    """Publish the rows that an optimizer changes to a bus of online updates, until the answer is closed.

    ::

        with publish_rows(rows, {"type": "files", "folder": "updates"}):
            ...  # train

    Args:
        optimizer: of this package; groups that are added to it later are not published.
        bus: ``type`` and the keys of a producer (``hps_numba.updates.open_producer``), or a producer.
        interval_ms: between two times of publishing; a row is sent once however many steps changed it meanwhile.
        version: of the model that the rows are of, or None.

    Raises:
        ConfigError: an argument is not as above.   TierUnavailable: the bus is not there.
    """
    if not isinstance(optimizer, RowOptimizer):
        raise ConfigError(f"optimizer: expected SGD, Adagrad or Adam of hps_numba.frontends.torch, got {show(optimizer)}")
    return RowPublisher(optimizer.trainers(), bus, interval_ms=interval_ms, version=version)
