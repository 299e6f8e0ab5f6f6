"""Several calls of the CUDA driver in one step out of Python: what a lookup has the driver do, without the GIL.

The driver is reached by the addresses of its functions (``devices.driver_addresses``). *Why.* A call out of Python costs as
much as the driver's own work, and a lookup makes six: which context is current, is the stream captured, two or three kernels,
an event. In one step they cost as much as one.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hps_numba.kernels.compile import host_kernel
from hps_numba.kernels.memory_words import load_word

__all__ = ["CAPTURED", "DRIVER_FUNCTIONS", "NO_EVENT", "start_kernels"]

#: what the table of addresses has, in this order
DRIVER_FUNCTIONS = ("cuCtxGetCurrent", "cuCtxSetCurrent", "cuStreamIsCapturing", "cuLaunchKernelEx", "cuEventRecord")
_GET, _SET, _CAPTURING, _LAUNCH, _RECORD = (8 * i for i in range(len(DRIVER_FUNCTIONS)))

#: instead of a status: the stream is being captured, and nothing was started
CAPTURED = -1
NO_EVENT = 0


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
        work: address of int64 ``[2 + 3 * count]``: two words to use, then for each kernel the addresses of its configuration,
            handle and arguments, as ``cuLaunchKernelEx`` takes them.
        context: handle of the stream's context, which is current meanwhile.   event: its handle, or NO_EVENT.

    Returns:
        0; CAPTURED; or the driver's status for the first call that failed, nothing after it was done.

    **Writes:** the first two words of ``work``.
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
        at = work + 16 + 24 * i
        status = _call(load_word(driver + _LAUNCH), load_word(at), load_word(at + 8), load_word(at + 16), 0)
        if status != 0:
            return status
    if event != NO_EVENT:
        return _call(load_word(driver + _RECORD), event, stream, 0, 0)
    return status
