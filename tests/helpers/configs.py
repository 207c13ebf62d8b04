"""The recipes of `configs/`, as the command line reads them."""

import importlib.util

from tests.helpers import REPOSITORY


def load(name, arg=None):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def digits(arg=None):
    return load("digits", arg)
