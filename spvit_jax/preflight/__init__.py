"""Checks of a run before its launch: compiled for TPUs that this machine does not have."""
