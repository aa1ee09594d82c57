"""Data sets on disk: declarations, file lists, label maps, readers and step-indexed streams."""
