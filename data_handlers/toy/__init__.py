"""A generated world of street scenes, for the demo and the tests."""

# Toy data sets and their splits. The numbers go into random seeds: a data set, once made, must stay the same.
TOY_DOMAINS = {"gta5": 1, "synthia": 2, "cityscapes": 3}
TOY_SPLITS = {"train": 0, "val": 1}
MOST_TOY_FRAMES = 99_999  # GTA5's file names have five digits
