"""The wire format of HugeCTR HPS, with an extension by headers.

========= ================================================================================================
file      content
========= ================================================================================================
codec     encodes and decodes packed pairs, and finds the last write of each key: one pass each, compiled
messages  whole messages: what they must be, their headers, and why one is skipped
========= ================================================================================================

A message is the topic ``hps_et.<model>.<table>``, no message key, and a value: ``HCTR``, the size of a row in bytes as uint32,
and pairs of a key (8 or 4 bytes) and a row (float32), all little-endian and without padding. A value without pairs changes
nothing. Headers say what this form has no room for; HugeCTR's readers do not look at them.
"""
