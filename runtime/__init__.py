"""What keeps a run alive: ranks, signals and exit codes, files written whole, run directories, checkpoints, the log."""
