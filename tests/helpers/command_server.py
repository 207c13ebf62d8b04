"""A process that has imported what the commands need, and forks those that tests start.

    python -m tests.helpers.command_server

Importing takes a command four seconds; forked it has them already, and nothing else. Each line is a
request in JSON, and each answer is a line: of a list (the module, its arguments, its environment,
and the files for standard output and error) the id of the process that it has become; of an id,
once that process has ended, its exit code.
"""

import gc
import importlib
import json
import os
import runpy
import sys

import jax
from numba.core.registry import cpu_target

IMPORTED = ("spvit_jax.plan", "spvit_jax.training.report", "spvit_jax.drawing.gallery")


def execute(module, args, environment, *outputs):
    """Becomes the command, as `python -m` starts it."""
    for descriptor, path in enumerate((os.devnull, *outputs)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    for name, value in environment.items():
        # JAX reads them when it is imported.
        if name.startswith("JAX_") and os.environ.get(name) != value:
            jax.config.update(name.lower(), int(value) if value.isdigit() else value)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def serve():
    for name in IMPORTED:
        importlib.import_module(name)
    # What Numba otherwise imports at the first call of a compiled function.
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
    gc.freeze()  # what all have is not looked through again by each
    gc.set_threshold(100_000, 20, 20)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, list):
            answer = os.fork()
            if not answer:
                return execute(*request)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
