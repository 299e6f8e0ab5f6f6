"""``python -m hps_numba`` is ``hps-numba``."""

from hps_numba.cli import main

main()
