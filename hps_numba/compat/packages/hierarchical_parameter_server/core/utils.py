"""HugeCTR's module of this name helps its own modules; nothing in it is a lookup."""

from typing import NoReturn

from hps_numba.compat.out_of_scope import unknown

__all__: list[str] = []


def __getattr__(name: str) -> NoReturn:
    raise unknown(__name__, name)
