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


def tiny(data_dir, model="vit", **settings):
    """A run of four steps that compiles in seconds."""
    config = digits(model)
    config.data.update(data_dir=data_dir, batch_size=16, train_size=100)
    config.model.update({"depth": 1, "dim": 12} | settings)
    config.schedule.update(total="4 steps", warmup="1 steps")
    config.log_every = config.eval_every = config.checkpoint.every = "1 steps"
    config.checkpoint.keep_last = 9
    return config
