"""The models that a network front end serves: the table sets of a server, and whole models over them.

Clients name models, never files: ``load`` deploys a model of the server's own config, or reads its files again.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from dataclasses import dataclass

from hps_numba.config.messages import show
from hps_numba.errors import ClosedError, HpsError, UnknownModelError
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError, message_of
from hps_numba.frontends.inference.tables import TableSetModel
from hps_numba.server.hps import HPS

__all__ = ["IndexEntry", "Repository"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexEntry:
    """A model in the index.

    Attributes:
        name: of the model.   version: in force, or empty.   state: READY or UNAVAILABLE.   reason: why it is not ready.
    """

    name: str
    version: str
    state: str
    reason: str = ""


class Repository:
    """The models of one server.

    Args:
        server: whose models are served, each under its name; those that are loaded later too.
        may_change: whether ``load`` and ``unload`` are allowed.

    Thread safety: every method. Changes take turns.
    """

    def __init__(self, server: HPS, *, may_change: bool = False) -> None:
        self.server = server
        self.may_change = may_change
        self._known = {entry.model: entry for entry in server.config.models}
        self._tables: dict[str, TableSetModel] = {}
        self._whole: dict[str, InferenceModel] = {}
        self._reasons: dict[str, str] = {}
        self._turn = threading.Lock()

    def add(self, model: InferenceModel) -> None:
        """Serve a whole model, which takes the place of the tables of the same name.

        Raises:
            InferenceError: 409, there is one of that name.
        """
        if model.name in self._whole:
            raise InferenceError(409, f"model {model.name!r}: expected another name, one is served by it already")
        self._whole[model.name] = model

    def model(self, name: str) -> InferenceModel:
        """A model that is served.

        Raises:
            UnknownModelError: there is none of that name now.   ClosedError: the server was closed.
        """
        found = self._whole.get(name) or self._tables.get(name)
        if found is not None and (name in self._whole or name in self.server.models):
            return found
        if self.server.closed:
            raise ClosedError("the server is closed")
        if name not in self.server.models:
            raise UnknownModelError(f"model: {show(name)} is not served, served are {', '.join(self.names()) or 'none'}")
        return self._tables.setdefault(name, TableSetModel(self.server, name))

    def names(self) -> tuple[str, ...]:
        """Names of the models that are served now."""
        return tuple(dict.fromkeys((*self._whole, *self.server.models)))

    def index(self) -> list[IndexEntry]:
        """Every model that is served or could be loaded."""
        entries = []
        for name in dict.fromkeys((*self.names(), *self._known)):
            try:
                versions = self.model(name).versions()
                entries.append(IndexEntry(name, versions[-1] if versions else "", "READY" if versions else "UNAVAILABLE"))
            except HpsError:
                entries.append(IndexEntry(name, "", "UNAVAILABLE", self._reasons.get(name, "unloaded")))
        return entries

    def ready(self) -> bool:
        """Whether every model that is served can answer."""
        return not self.server.closed and all(self.model(name).ready() for name in self.names())

    def load(self, name: str) -> None:
        """Deploy a model of the config; if it is deployed, read its files again, as ``HPS.replace_model``.

        Raises:
            InferenceError: 403, changes are not allowed.   UnknownModelError: the config has no such model.
            Otherwise as ``HPS.load_model`` and ``HPS.replace_model``.
        """
        self._check_changes()
        entry = self._known.get(name)
        if entry is None:
            raise UnknownModelError(f"model: expected one of the config ({', '.join(self._known)}), got {show(name)}")
        with self._turn:
            try:
                if name in self.server.models:
                    self.server.replace_model(name)
                else:
                    self.server.load_model(entry)
            except Exception as problem:
                self._reasons[name] = message_of(problem)
                raise
            self._tables.pop(name, None)
            self._reasons.pop(name, None)

    def unload(self, name: str) -> None:
        """Take a model out of service; rows in slower tiers stay there.

        Raises:
            InferenceError: 403, changes are not allowed.   UnknownModelError: no such model.
        """
        self._check_changes()
        with self._turn:
            self.server.unload_model(name)
            self._tables.pop(name, None)
            self._reasons[name] = "unloaded"

    def _check_changes(self) -> None:
        if not self.may_change:
            raise InferenceError(403, "models: loading and unloading is not allowed, start the server with --allow-control")

    def close(self) -> None:
        """Close the whole models. The server is its owner's."""
        with ExitStack() as closing:
            for model in self._whole.values():
                closing.callback(model.close)
            self._whole = {}
