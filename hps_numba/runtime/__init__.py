"""Threads, background work, timers and forks."""
