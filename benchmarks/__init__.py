"""Measurements quoted in the README, each a command of its own."""
