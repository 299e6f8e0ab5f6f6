"""The bytes of a ``row_log``: slots of rows, records of keys, locations.

Written and read by host kernels and ``storage.row_log``. Everything is made of 64-bit little-endian words::

    segment of rows    groups, each of which begins at a multiple of GROUP_BYTES, with zeros between them
        group          the slots of one commit, one after the other
        slot           checksum, key, row (float32; a last half word is zero)
    segment of keys    records, one after the other
        record         RECORD_WORDS words: mark of the kind, number in the segment, unit of the first slot, number of keys,
                       checksum of the keys, checksum of the words before; then the keys

    unit               8 bytes of a segment of rows
    location           of a row: segment << UNIT_BITS | unit; 0 is none, as segments count from 1

*What a checksum covers.* That of a slot: key and row, and by its seed the table, the segment and the unit, so that a block that
went to the wrong place, or is left of an older file, is no row. That of a record covers its position likewise.
*Why packed slots.* A slot may cross a 512-byte block: reading two blocks costs a disk what reading one does, and slots in
blocks of their own would double a table of 128 elements.
*Why erasures are written twice.* A damaged record of rows is rebuilt from its slots, which have the keys too. An erasure is
nowhere else.
"""

from __future__ import annotations

__all__ = [
    "ERASURE",
    "GROUP_BYTES",
    "PUT",
    "RECORD_WORDS",
    "SEGMENT_FIELDS",
    "SLOT_HEADER_BYTES",
    "UNIT_BITS",
    "UNIT_MASK",
    "slot_bytes",
]

GROUP_BYTES = 512
SLOT_HEADER_BYTES = 16
RECORD_WORDS = 6
#: the first words of records: the texts ``rowsput1`` and ``rowserz1``
PUT = int.from_bytes(b"rowsput1", "little")
ERASURE = int.from_bytes(b"rowserz1", "little")

UNIT_BITS = 40
UNIT_MASK = (1 << UNIT_BITS) - 1

#: words that kernels read of a segment: file descriptor, address and bytes of its mapping, seed of its checksums
SEGMENT_FIELDS = 4


def slot_bytes(dim: int) -> int:
    """Bytes of a slot for rows of ``dim`` elements."""
    return SLOT_HEADER_BYTES + (4 * dim + 7) // 8 * 8
