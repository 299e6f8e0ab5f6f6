"""Simulate cache policies over a trace of keys: hit rates of policies, sizes and geometries, before anything is deployed.

>>> from hps_numba import simulate
>>> result = simulate.run("trace.npy", ["lru", "lfu", "my_policy.py:Mine"], "1%:20%:5", allow_code=True)  # doctest: +SKIP
>>> simulate.write_page(result, "report.html")                                                             # doctest: +SKIP

``run`` simulates, ``Simulation`` is what it finds, ``advise`` says which policy and size reach a hit rate at the least memory,
``write_plot`` and ``write_page`` draw. ``open_trace`` has the options of traces. The command is ``hps-numba simulate``.
"""

from __future__ import annotations

from hps_numba.simulate.advice import Advice, Choice, advise
from hps_numba.simulate.candidates import known_names
from hps_numba.simulate.html_report import write_page
from hps_numba.simulate.plots import write_plot
from hps_numba.simulate.results import Run, Simulation
from hps_numba.simulate.simulation import DEFAULT_POLICIES, run
from hps_numba.traces.trace import Trace, open_trace

__all__ = [
    "DEFAULT_POLICIES",
    "Advice",
    "Choice",
    "Run",
    "Simulation",
    "Trace",
    "advise",
    "known_names",
    "open_trace",
    "run",
    "write_page",
    "write_plot",
]
