"""The load generator of ``hps-numba benchmark serve``: one thread that sends requests when they are due.

Problem: a client that sends a request when the last one was answered (a closed loop) slows down with the server, so that the
time in which nothing could be sent is in no percentile. Choice: an open loop, whose requests are due at times drawn before the
run; a request that finds no free connection waits in the client, and its latency counts from when it was due. The closed loop
is there as well, to compare with Perf Analyzer, which has only that.

The client must be cheap, as it may share the machine with the server: bodies are made before the run, answers are counted and
not decoded, connections call back without a task a request: 50 to 90 us of CPU for a small request. Turned down:
``tritonclient`` and ``httpx``, which take 185 and 480 us on the same machine, as much as the server or more.
"""
