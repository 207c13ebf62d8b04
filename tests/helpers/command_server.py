"""A process that has imported what the commands need, and forks one for each line that it reads.

    python -m tests.helpers.command_server

Importing takes a command four seconds; forked it has them already, and nothing else. A line is a
JSON list: the module, its arguments, and the files for standard output and error. The answer is a
line with the exit code.
"""

import importlib
import json
import os
import runpy
import sys

IMPORTED = ("spvit_jax.plan", "spvit_jax.training.report")


def execute(module, args, *outputs):
    """Becomes the command, as `python -m` starts it."""
    for descriptor, path in enumerate((os.devnull, *outputs)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def serve():
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return execute(*json.loads(line))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
