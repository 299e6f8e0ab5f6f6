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
from hps_numba.kernels.layouts.cache import KEYS_OF_A_BLOCK_AFTER, TABLE_WORDS

__all__ = [
    "CAPTURED",
    "COPY_FUNCTIONS",
    "DRIVER_FUNCTIONS",
    "LOOKUP_WORDS",
    "NO_EVENT",
    "TABLES_WORDS",
    "WORK_WORDS",
    "start_copies",
    "start_kernels",
    "start_lookup",
    "start_tables",
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
#: words of a prepared lookup of several tables; those of the same name as in ``LOOKUP_WORDS``
TABLES_WORDS = (
    "work",
    "context",
    "stream",
    "event",
    "count",
    "tables",  # how many
    "words",  # address of the argument ``words`` of the lookup
    "insert_words",  # of the insertion, or 0: there is none
    "blocks",
    "keys_of_block",
    "touch_blocks",
    "insert_blocks",
    "tiles_of_block",
    "max_blocks",  # of all tables
    "min_blocks",
    "sets",  # of the largest cache
)
_OF_TABLES = {name: 8 * i for i, name in enumerate(TABLES_WORDS)}
_TABLES, _WORDS, _INSERT_WORDS = _OF_TABLES["tables"], _OF_TABLES["words"], _OF_TABLES["insert_words"]
_T_BLOCKS, _T_KEYS_OF_BLOCK, _T_SETS = _OF_TABLES["blocks"], _OF_TABLES["keys_of_block"], _OF_TABLES["sets"]
_T_TOUCH_BLOCKS, _T_INSERT_BLOCKS = _OF_TABLES["touch_blocks"], _OF_TABLES["insert_blocks"]
_T_TILES_OF_BLOCK, _T_MAX_BLOCKS = _OF_TABLES["tiles_of_block"], _OF_TABLES["max_blocks"]
_T_MIN_BLOCKS = _OF_TABLES["min_blocks"]
_TABLE_BYTES = 8 * TABLE_WORDS
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


@host_kernel
def start_tables(driver, prepared, words, n, keys, key_step, out, out_step):
    """Start the kernels of a prepared lookup of several tables.

    Args (int64):
        driver: as for ``start_kernels``.   prepared: address of ``TABLES_WORDS``.
        words: address of keys, n and out of each table; or 0: each table has ``n`` keys.
        n: most keys of a table, 1 or more.
        keys, key_step, out, out_step: if ``words`` is 0, addresses of the keys and rows of the first table, and bytes from one
            table to the next.

    Returns:
        As ``start_kernels``.

    **Writes:** as ``start_lookup``.
    """
    tables = load_word(prepared + _TABLES)
    to, insert = load_word(prepared + _WORDS), load_word(prepared + _INSERT_WORDS)
    for i in range(tables):
        at = _TABLE_BYTES * i
        some, count, rows = keys + key_step * i, n, out + out_step * i
        if words != 0:
            some, count, rows = load_word(words + at), load_word(words + at + 8), load_word(words + at + 16)
        store_word(to + at, some)
        store_word(to + at + 8, count)
        store_word(to + at + 16, rows)
        if insert != 0:
            store_word(insert + at, some)
            store_word(insert + at + 8, count)
            store_word(insert + at + 16, rows)
    grid_rows = tables << 32
    keys_of_block, tiles = load_word(prepared + _T_KEYS_OF_BLOCK), load_word(prepared + _T_TILES_OF_BLOCK)
    store_word(load_word(prepared + _T_BLOCKS), (n + keys_of_block - 1) // keys_of_block | grid_rows)
    wanted = max(load_word(prepared + _T_MIN_BLOCKS), tables * n // KEYS_OF_A_BLOCK_AFTER)
    limit = min(load_word(prepared + _T_MAX_BLOCKS), wanted) // tables
    touch_blocks, insert_blocks = load_word(prepared + _T_TOUCH_BLOCKS), load_word(prepared + _T_INSERT_BLOCKS)
    if touch_blocks != 0:
        store_word(touch_blocks, max(1, min((n + tiles - 1) // tiles, limit)) | grid_rows)
    if insert_blocks != 0:
        inserting = min(n, load_word(prepared + _T_SETS))
        store_word(insert_blocks, max(1, min((inserting + tiles - 1) // tiles, limit)) | grid_rows)
    return start_kernels(
        driver,
        load_word(prepared + _WORK),
        load_word(prepared + _CONTEXT),
        load_word(prepared + _STREAM),
        load_word(prepared + _EVENT),
        load_word(prepared + _COUNT),
    )
