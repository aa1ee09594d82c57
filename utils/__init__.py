"""Helpers without domain knowledge: files, errors, PNG structure, distances between Gaussians."""
