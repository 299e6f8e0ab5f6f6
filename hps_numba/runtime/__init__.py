"""Runtime services without domain knowledge: thread pools, background jobs, timers, progress bars, forks."""
