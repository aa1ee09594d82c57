"""Helpers without domain knowledge: files, errors, PNG structure, loader processes."""
