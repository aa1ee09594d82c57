"""Training of segmentation nets: on source, and adaptation to a target. One short file for each method."""
