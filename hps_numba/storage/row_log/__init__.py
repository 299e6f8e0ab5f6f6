"""The parts of the tier ``row_log``: tables in append-only files, with the index in memory.

``lock`` (one writer), ``manifest`` (which tables and segments there are), ``segment`` (a pair of files), ``records`` (what the
key files hold, and how it is recovered), ``index`` (key -> location), ``table`` (opening, reading, refreshing), ``writing``
(commits), ``compaction``, ``ring``, ``methods`` (ways to read), ``log`` (all tables of a folder).
"""
