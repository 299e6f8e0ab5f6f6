"""Redis Streams as a bus: what entries hold, and how one stream is read.

========== ==============================================================================
file       content
========== ==============================================================================
connecting options of a connection; streams, their nodes and the commands to them
entries    one message as one entry, and its id as an offset
scripts    what a server does in one step while a stream is read
reading    the readers of one stream: of a group, or from the oldest entry
holder     who reads a stream for a group, and whether that process is still there
========== ==============================================================================
"""
