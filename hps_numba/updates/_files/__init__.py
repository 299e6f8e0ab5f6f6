"""A folder as a bus: what its files hold and how they are replaced.

========= ==============================================================================
file      content
========= ==============================================================================
delta     one file of messages, which tells where it belongs and whether it is whole
manifest  which files there are: one small file that is replaced as a whole
position  how far one consumer has come, in a file of its own
locks     one producer a folder, one consumer a position
reading   how a file is read in few calls
writing   how a file is made durable before others see it
========= ==============================================================================
"""
