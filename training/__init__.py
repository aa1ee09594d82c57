"""The parts that all trainings share: loop, checkpoints, run folders, flags, validation, progress, processes."""
