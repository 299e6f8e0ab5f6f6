"""A benchmark of a server: what it asks for, case by case, and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hps_numba.cli._profile_keys import Distribution, DrawnKeys
from hps_numba.cli._profile_target import keys_of_model, model_of
from hps_numba.cli._request_files import RequestTable
from hps_numba.cli._serve_load import clock
from hps_numba.cli._serve_load.connection import Access, ModelFacts, Target
from hps_numba.cli._serve_load.load import Case, Load, Settings, measure, wires_of
from hps_numba.cli._serve_load.targets import target_of
from hps_numba.cli._serve_load.tensors import Shape, form_of, table_inputs
from hps_numba.config import read_config
from hps_numba.errors import ConfigError

__all__ = ["Benchmark"]

_TABLE_SIZE = 100_000


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What ``hps-numba benchmark serve`` measures.

    Attributes:
        model: on the server; None for its only one.
        protocol: auto, named or flat.
        tables: of a request; empty: those of the metadata or of the config.
        keys: of a request, over all its tables.
        config: a ps_config whose sparse models hold the keys; None: keys 0 .. table_size - 1.
    """

    url: str
    access: Access
    cases: Sequence[Case]
    settings: Settings
    distribution: Distribution
    model: str | None = None
    protocol: str = "auto"
    tables: Sequence[str] = ()
    keys: Sequence[int] = (32,)
    config: Path | None = None
    table_size: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def run(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Measure all cases; ``say`` is told what is measured.

        Raises:
            ServeError: the server cannot be reached, or refuses a request.
            ConfigError: the model has no such inputs.   Otherwise as ``read_config`` and ``open_model``.
        """
        return clock.run(self._run(say))

    async def _run(self, say: Callable[[str], None]) -> dict[str, Any]:
        target = target_of(self.url, self.access)
        try:
            say("asking for metadata")
            facts = await target.facts(self.model or await self._only_model(target))
            form = form_of(facts, self.protocol)
            sources = self._sources(facts, form)
            loads = [await self._load(target, facts, form, sources, keys) for keys in self.keys]
            results = [one for load in loads for one in await measure(target, load, self.cases, self.settings, say)]
        finally:
            await target.close()
        return {
            "url": self.url,
            "model": facts.name,
            "platform": facts.platform,
            "protocol": form,
            "tables": {name: source.facts() for name, source in sources.items()},
            "settings": asdict(self.settings),
            "requests": [self._facts(load) for load in loads],
            "results": results,
        }

    async def _only_model(self, target: Target) -> str:
        names = await target.models()
        if len(names) != 1:
            raise ConfigError(
                f"--model: expected one of the models of the server, {', '.join(names) or 'which has none'}, got none"
            )
        return names[0]

    def _sources(self, facts: ModelFacts, form: str) -> dict[str, DrawnKeys]:
        """Where the keys of each table come from, in the order of the tables."""
        seed = self.settings.seed
        if self.config is not None:
            config = read_config(self.config)
            names = [model.model for model in config.models]
            specs = model_of(config, facts.name if facts.name in names else None).tables(config.folder)
            wanted = self._known(self.tables or [spec.name for spec in specs], [spec.name for spec in specs])
            return {spec.name: DrawnKeys(self.distribution, keys_of_model(spec), seed) for spec in specs if spec.name in wanted}
        inputs = table_inputs(facts)
        if form == "named":
            names = self._known(self.tables or inputs, inputs)
        else:
            names = list(self.tables) or inputs or ["KEYS"]
        return {name: DrawnKeys(self.distribution, self.table_size or _TABLE_SIZE, seed) for name in names}

    @staticmethod
    def _known(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
        for name in wanted:
            if name not in known:
                raise ConfigError(f"--table: expected a table, one of {', '.join(known)}, got {name!r}")
        return [name for name in known if name in wanted]

    async def _load(self, target: Target, facts: ModelFacts, form: str, sources: dict[str, DrawnKeys], keys: int) -> Load:
        counts = [keys // len(sources) + (number < keys % len(sources)) for number in range(len(sources))]
        tables = [RequestTable(name, count, source) for (name, source), count in zip(sources.items(), counts, strict=True)]
        wires = wires_of(target, facts, Shape(form, tables), self.parameters, self.settings)
        return Load(facts.name, keys, wires, await target.probe(wires[0]))

    @staticmethod
    def _facts(load: Load) -> dict[str, Any]:
        outputs = {name: {"datatype": kind, "shape": list(shape)} for name, (kind, shape) in load.probe.outputs.items()}
        return {
            "keys": load.keys,
            "distinct": len(load.wires),
            "request_bytes": load.request_bytes,
            "answer_tensor_bytes": load.probe.tensor_bytes,
            "outputs": outputs,
        }
