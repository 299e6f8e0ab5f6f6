"""The operations of ``simt.reference``, of ``cache.rows`` and of ``cache.parts`` for a GPU, for one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hps_numba.kernels.simt.cuda_memory import instruction, memory_names
from hps_numba.kernels.simt.cuda_pooling import pool_names
from hps_numba.kernels.simt.cuda_probe import probe_names
from hps_numba.kernels.simt.cuda_rows import row_names
from hps_numba.kernels.simt.cuda_warp import grid_names, lanes_of, warp_names

__all__ = ["names"]


def names(
    *,
    lanes: int,
    uniform: bool,
    out_vector: bool,
    pdl: bool,
    copies: bool,
    constants: dict[str, Any],
    device: Callable[..., Any],
) -> dict[str, Any]:
    """What ``compiler.specialize`` binds, by name; new device functions with each call, as numba keeps them for one chip.

    Args:
        lanes: in a tile, 4 or 8.
        uniform: all tiles of a warp take every branch with lane operations together, else each tile on its own.
        out_vector: answers are 16-byte aligned.
        pdl: the kernel may be started before the work that it follows has ended (``uses_pdl``).
        copies: the chip copies from global to shared memory asynchronously.
        constants: DIM and the types of rows.
        device: makes a device function.
    """
    tile = lanes_of(lanes, uniform, device)
    memory = memory_names()
    warp = warp_names(tile, memory["add64"], device)
    wait = instruction("griddepcontrol.wait; griddepcontrol.launch_dependents;" if pdl else "")
    bound = {
        **memory,
        **warp,
        **grid_names(lanes, device),
        **probe_names(tile, memory, device),
        "grid_dependency_sync": wait,
    }
    if "ROW_TYPE" in constants:
        bound |= row_names(constants, lanes, out_vector, tile.lane, warp["max_in_tile"], device)
    if "DIM" in constants:
        bound |= pool_names(constants, out_vector, copies)
    return bound
