"""What several tests share. Tests import from here, and nothing from each other."""

import pathlib

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
