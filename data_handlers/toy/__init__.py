"""A generated world of street scenes, for the demo and the tests."""
