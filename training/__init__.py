"""What every training shares: loop, checkpoints, run folders, flags, validation, progress, several processes."""
