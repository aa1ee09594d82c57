"""The multi-scale ProCST trainer and everything the method itself defines."""
