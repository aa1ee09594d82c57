"""Values that flags about data can take. This module imports nothing heavy; the command lines read it first."""

from typing import Literal

# How a label file's values are read: label ids of the data set, or trainIds (0..C-1, and 255 for ignored pixels).
Labels = Literal["ids", "trainids"]
LABELS = ("ids", "trainids")

# Whether an image or label that cannot be used ends the run, or another one is taken in its place.
ON_BAD_IMAGE = ("stop", "skip")
OR_SKIP = "; or skip such images with --on_bad_image skip"  # end of messages

# How images are resized: with PyTorch's arithmetic, several times as fast, or with Pillow's, which the method uses.
Resample = Literal["exact", "fast"]
RESAMPLINGS = ("fast", "exact")

# What the IoU of a class without a labelled pixel is in scores: none, 0 where it was predicted, or 0.
AbsentClasses = Literal["left_out", "zero_if_predicted", "zero"]
ABSENT_CLASSES = ("left_out", "zero_if_predicted", "zero")
