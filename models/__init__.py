"""Feature and segmentation networks."""
