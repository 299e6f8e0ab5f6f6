"""Several calls of the CUDA driver in one call out of Python, without the GIL: those of a lookup.

The driver is reached by the addresses of its functions (``device.driver.driver_addresses``). *Why.* A call out of Python costs
as much as the driver's own work, and a lookup makes six: which context is current, whether the stream is being captured, two or
three kernels, an event. Together they cost as much as one.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.kernels.host.atomics import load_word, store_word
from hps_numba.kernels.layouts.cache import KEYS_OF_A_BLOCK_AFTER

__all__ = [
    "CAPTURED",
    "COPY_FUNCTIONS",
    "DRIVER_FUNCTIONS",
    "LOOKUP_WORDS",
    "NO_EVENT",
    "WORK_WORDS",
    "start_copies",
    "start_kernels",
    "start_lookup",
]

#: functions in the table of addresses, in this order
COPY_FUNCTIONS = ("cuStreamWaitValue64_v2", "cuMemcpyAsync")
DRIVER_FUNCTIONS = ("cuCtxGetCurrent", "cuCtxSetCurrent", "cuStreamIsCapturing", "cuLaunchKernelEx", "cuEventRecord")
_GET, _SET, _CAPTURING, _LAUNCH, _RECORD = (8 * i for i in range(len(DRIVER_FUNCTIONS)))

#: instead of a status: the stream is being captured, and nothing was started
CAPTURED = -1
NO_EVENT = 0

#: words of ``work`` that ``start_kernels`` uses itself
WORK_WORDS = 2
#: words of a prepared lookup, int64 each; the addresses point into the arguments of its kernels
LOOKUP_WORDS = (
    "work",  # address, as ``start_kernels`` takes it
    "context",
    "stream",
    "event",
    "count",  # of kernels
    "keys",  # address of the argument ``keys`` of the lookup, which ``n`` and ``out`` follow
    "blocks",  # address of its number of blocks
    "keys_of_block",
    "touch_blocks",  # address of the number of blocks of the touch kernel, or 0: there is none
    "insert_blocks",  # of the insertion, or 0: there is none
    "advance",  # address of its argument
    "tiles_of_block",  # of both
    "max_blocks",
    "min_blocks",
    "sets",
    "capacity",
)
(
    _WORK,
    _CONTEXT,
    _STREAM,
    _EVENT,
    _COUNT,
    _KEYS,
    _BLOCKS,
    _KEYS_OF_BLOCK,
    _TOUCH_BLOCKS,
    _INSERT_BLOCKS,
    _ADVANCE,
    _TILES_OF_BLOCK,
    _MAX_BLOCKS,
    _MIN_BLOCKS,
    _SETS,
    _CAPACITY,
) = (8 * i for i in range(len(LOOKUP_WORDS)))
_ONE_ROW = 1 << 32  # numbers of blocks are three int32, of which the second is 1


@intrinsic
def _call(typingctx, function, first, second, third, fourth):
    """The status of a C function with four pointer-sized arguments; one that takes fewer ignores the rest."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word] * 4)
        status = builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return builder.sext(status, word)

    return types.int64(*[types.int64] * 5), codegen


@host_kernel
def start_kernels(driver, work, context, stream, event, count):
    """Start kernels one after the other on a stream and record an event, unless the stream is being captured.

    Args (int64):
        driver: address of the addresses of ``DRIVER_FUNCTIONS``.
        work: address of int64 ``[WORK_WORDS + 3 * count]``: words to use, then for each kernel the addresses of its
            configuration, handle and arguments, as ``cuLaunchKernelEx`` takes them.
        context: handle of the stream's context, which is current meanwhile.   event: its handle, or NO_EVENT.

    Returns:
        0; CAPTURED; or the driver's status for the first call that failed, nothing after it was done.

    **Writes:** the first words of ``work``.
    """
    status = _call(load_word(driver + _GET), work, 0, 0, 0)
    if status != 0:
        return status
    previous = load_word(work)
    if previous != context:
        status = _call(load_word(driver + _SET), context, 0, 0, 0)
        if status != 0:
            return status
    status = _start(driver, work, stream, event, count)
    if previous != context:
        restored = _call(load_word(driver + _SET), previous, 0, 0, 0)
        if status == 0:
            status = restored
    return status


@host_kernel
def _start(driver, work, stream, event, count):
    """``start_kernels`` in the right context."""
    status = _call(load_word(driver + _CAPTURING), stream, work + 8, 0, 0)
    if status != 0:
        return status
    if load_word(work + 8) & 0xFFFFFFFF != 0:
        return CAPTURED
    for i in range(count):
        at = work + 8 * WORK_WORDS + 24 * i
        status = _call(load_word(driver + _LAUNCH), load_word(at), load_word(at + 8), load_word(at + 16), 0)
        if status != 0:
            return status
    if event != NO_EVENT:
        return _call(load_word(driver + _RECORD), event, stream, 0, 0)
    return status


@host_kernel
def start_copies(driver, stream, mark, value, groups, dst, src, size, total):
    """Put copies on a stream, each after a wait for a word of host memory; the device's context is current.

    Args (int64):
        driver: address of the addresses of ``COPY_FUNCTIONS``.
        mark: address of int64 ``[groups]`` in pinned memory; copy i waits until word i is ``value`` or more.
        dst, src: addresses.   size: bytes of a copy; ``total``: of all of them.

    Returns the driver's status for the first call that failed, nothing after it was done; or 0.
    """
    for group in range(groups):
        status = _call(load_word(driver), stream, mark + 8 * group, value, 0)
        if status != 0:
            return status
        start = group * size
        if start < total:
            status = _call(load_word(driver + 8), dst + start, src + start, min(size, total - start), stream)
            if status != 0:
                return status
    return 0


@host_kernel
def start_lookup(driver, lookup, keys, n, out):
    """Start the kernels of a prepared lookup with new keys and a new output.

    Args (int64):
        driver: as for ``start_kernels``.   lookup: address of ``LOOKUP_WORDS``.
        keys, n, out: as the lookup takes them; ``n`` is 1 or more.

    Returns:
        As ``start_kernels``.

    **Writes:** arguments and configurations of the kernels, and ``work``.
    """
    at = load_word(lookup + _KEYS)
    store_word(at, keys)
    store_word(at + 8, n)
    store_word(at + 16, out)
    keys_of_block = load_word(lookup + _KEYS_OF_BLOCK)
    store_word(load_word(lookup + _BLOCKS), (n + keys_of_block - 1) // keys_of_block | _ONE_ROW)
    tiles, max_blocks, sets = load_word(lookup + _TILES_OF_BLOCK), load_word(lookup + _MAX_BLOCKS), load_word(lookup + _SETS)
    max_blocks = min(max_blocks, max(load_word(lookup + _MIN_BLOCKS), n // KEYS_OF_A_BLOCK_AFTER))
    touch_blocks, insert_blocks = load_word(lookup + _TOUCH_BLOCKS), load_word(lookup + _INSERT_BLOCKS)
    if touch_blocks != 0:
        store_word(touch_blocks, min((n + tiles - 1) // tiles, max_blocks) | _ONE_ROW)
    if insert_blocks != 0:
        store_word(insert_blocks, min((min(n, sets) + tiles - 1) // tiles, max_blocks) | _ONE_ROW)
        store_word(load_word(lookup + _ADVANCE), max(1, 4 * n // load_word(lookup + _CAPACITY)))
    return start_kernels(
        driver,
        load_word(lookup + _WORK),
        load_word(lookup + _CONTEXT),
        load_word(lookup + _STREAM),
        load_word(lookup + _EVENT),
        load_word(lookup + _COUNT),
    )
