"""What keeps a run alive: ranks, sharding, signals and exit codes, files written whole, run directories, checkpoints,
the log."""
