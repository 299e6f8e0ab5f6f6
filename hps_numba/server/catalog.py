"""What a server serves: models by name and tables by number or name. Every part of a server finds them here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from hps_numba.config.arguments import as_device
from hps_numba.config.messages import show
from hps_numba.errors import ClosedError, DeviceError, UnknownModelError
from hps_numba.server.model import ServedModel
from hps_numba.server.stats import TableStats
from hps_numba.server.table import PlainLookup, ServedTable

__all__ = ["Catalog", "Models"]


class Models(dict[str, "ServedModel"]):
    """Deployed models by name.

    Attributes:
        plain: lookups of their tables with plain arrays, by how a lookup before named the table: model, table and its type,
            device and its type, as 1 is equal to True; and by the GPU that has the keys, or None, and their type.
    """

    def __init__(self, models: Mapping[str, ServedModel] | None = None) -> None:
        super().__init__(models or {})
        self.plain: dict[tuple[Any, ...], PlainLookup] = {}


class Catalog:
    """The deployed models of a server.

    Args:
        key_bits: of the keys of all tables, 64 or 32.

    Attributes:
        models: by name; replaced as a whole, never changed, so that lookups read it without a lock.
        closed: the server was closed.

    Thread safety: every method from any thread; one thread at a time sets the attributes.
    """

    def __init__(self, key_bits: int) -> None:
        self.key_bits = key_bits
        self.closed = False
        self.models = Models()

    def check_open(self) -> None:
        """
        Raises:
            ClosedError: the server was closed.
        """
        if self.closed:
            raise ClosedError("the server is closed")

    def model(self, name: str, device_id: int | None = None) -> ServedModel:
        """A deployed model.

        Args:
            device_id: where it has to be deployed; None: anywhere.

        Raises:
            UnknownModelError: no such model.   DeviceError: it is not deployed there.   ClosedError: the server was closed.
        """
        found = self.models.get(name) if isinstance(name, str) else None
        if found is None:
            self.check_open()
            raise UnknownModelError(
                f"model_name: {show(name)} is not deployed, deployed are {', '.join(self.models) or 'none'}"
            )
        if device_id is not None:
            if device_id.__class__ is not int:
                device_id = as_device(device_id)
            devices = found.model.deployed_device_list
            if device_id not in (devices or (0,)):
                where = list(devices) or "the CPU"
                raise DeviceError(f"device_id: model {name!r} is deployed on {where}, not on {device_id}")
        return found

    def table(self, model_name: str, table_id: int | str, device_id: int | None = None) -> ServedTable:
        """A table of a deployed model.

        Raises:
            UnknownModelError: no such model or table.   Otherwise as ``model``.
        """
        return self.model(model_name, device_id).table(table_id)

    def stats(self) -> dict[str, dict[str, TableStats]]:
        """Counts of the tables of all models, without those that are unloaded meanwhile.

        Raises:
            ClosedError: the server was closed.
        """
        self.check_open()
        counts = {}
        for name, model in self.models.items():
            try:
                counts[name] = {table.spec.name: table.stats(model.version, model.groups.bytes_for) for table in model.tables}
            except ClosedError:
                self.check_open()
                if self.models.get(name) is model:
                    raise
        return counts

    def explain(self, model: ServedModel, problem: ClosedError) -> NoReturn:
        """Raise what a caller has to know when a lookup met something closed: the server was closed, or the model unloaded."""
        if self.closed:
            raise ClosedError("the server is closed") from problem
        if self.models.get(model.name) is model:
            raise problem
        raise UnknownModelError(f"model_name: {model.name!r} was unloaded during the lookup") from problem
