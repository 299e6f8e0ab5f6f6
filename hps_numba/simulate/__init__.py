"""Simulate cache policies over a trace of keys: hit rates of policies, sizes and geometries, before deployment.

>>> from hps_numba import simulate
>>> result = simulate.run("trace.npy", ["lru", "lfu", "my_policy.py:Mine"], "1%:20%:5", allow_code=True)  # doctest: +SKIP
>>> simulate.write_page(result, "report.html")                                                             # doctest: +SKIP

``run`` returns a ``Simulation``; ``advise`` finds the policy and size that reach a hit rate with the least memory;
``write_plot`` and ``write_page`` draw the results. ``open_trace`` has the options for reading traces. On the command line:
``hps-numba simulate``.
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
