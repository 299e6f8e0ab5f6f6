"""``python -m hps_numba.compat script.py``."""

from hps_numba.compat.launch import main

main()
