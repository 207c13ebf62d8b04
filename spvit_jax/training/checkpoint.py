"""Checkpoints: asynchronous, atomic, the last n and the best. The only file that uses orbax.

A checkpoint is the train state as nested dictionaries under the names of its leaves, so that
what is missing, unexpected or of another shape can be reported before anything is read; and the
configuration of its model, so that its weights can be taken to another resolution.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import re
from collections.abc import Iterator
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from spvit_jax import distributed, paths
from spvit_jax.classes import ClassNames
from spvit_jax.errors import InputError, WriteError, check_shapes, first_line
from spvit_jax.models import ModelConfig
from spvit_jax.models.naming import named_leaves
from spvit_jax.training.state import Variables

log = logging.getLogger("spvit_jax")

_FOLDER = "checkpoints"  # in the workdir
_CORRUPT = "corrupt-checkpoints"  # in the workdir: for checkpoints that could not be read
_ITEM = "default"
_MODEL = "model"  # key in an item's metadata: the model's configuration
_CLASSES = "classes"  # likewise: the names of the classes by number
_rank = operator.itemgetter("top1")  # of an evaluation's metrics, that which ranks checkpoints
_SMALLEST_PART = 64 * 1024  # bytes that each device writes of what all hold; it is a program more


class Checkpoints:
    """Checkpoints of one run; a context manager that waits for the last save on exit."""

    def __init__(
        self,
        workdir: epath.Path,
        model: ModelConfig,
        class_names: ClassNames | None,
        *,
        keep_last: int,
        keep_best: int,
    ):
        """Opens a workdir for the checkpoints of a model, the last ones and the best.

        Args:
          workdir: folder of the run.
          model: configuration of the model whose train state is saved.
          class_names: names of the classes by number, saved with each checkpoint; None if unknown.
          keep_last: number of the newest checkpoints to keep.
          keep_best: number of the best checkpoints to keep.
        """
        self._workdir = paths.absolute(workdir)
        self._metadata: dict[str, Any] = {_MODEL: model.to_dict()}
        if class_names is not None:
            self._metadata[_CLASSES] = list(class_names)
        policies = [
            preservation.LatestN(n=keep_last),
            preservation.BestN(
                n=keep_best, get_metric_fn=_rank, keep_checkpoints_without_metrics=False
            ),
        ]
        self._options = ocp.CheckpointManagerOptions(
            best_fn=_rank,
            preservation_policy=preservation.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A save ends when all processes have taken part. After an error they only do if it is one
        # that all have, as of the loss, which they share.
        alone = jax.process_count() == 1
        if alone or error is None or isinstance(error, FloatingPointError):
            with self._writable():
                self._manager.close()

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Starts to save the state after a step asynchronously; it is copied before this returns.

        Args:
          step: number of steps taken.
          state: pytree of arrays.
          metrics: metrics of an evaluation at this step, by which the best checkpoints are kept.

        Raises:
          WriteError: this checkpoint, or the one before it, cannot be written.
        """
        exists = step in self._manager.all_steps()
        if exists and metrics is not None and not self.has_metrics(step):
            # Saved when a SIGTERM came during its evaluation. Metrics cannot be added to it.
            self._manager.delete(step)
            exists = False
        if not exists:
            item = ocp.args.PyTreeSave(_to_tree(state), custom_metadata=self._metadata)
            with self._writable():
                self._manager.save(step, args=item, metrics=metrics)

    def has_metrics(self, step: int) -> bool:
        """Returns whether there is a checkpoint of a step with the metrics of its evaluation."""
        return step in self._manager.all_steps() and self._manager.metrics(step) is not None

    def wait(self) -> None:
        """Waits until all processes have written everything that was saved to disk.

        Raises:
          WriteError: a checkpoint cannot be written.
        """
        with self._writable():
            self._manager.wait_until_finished()

    def restore(self, abstract: Any) -> Any | None:
        """Reads the newest readable checkpoint; moves unreadable newer ones aside, with a warning.

        Args:
          abstract: pytree like the state, of shapes with shardings.

        Returns:
          The state, or None if there is no checkpoint.

        Raises:
          InputError: the checkpoint is of another model, or there are some and none can be read.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            directory = self._workdir / _FOLDER / str(step)
            state, problem = None, ""
            try:
                state = _from_tree(_read(directory, _to_tree(abstract)), abstract)
            except InputError:
                raise
            except Exception as error:  # whatever a damaged file makes orbax raise
                problem = first_line(error)
            # A file may be damaged where only some of the processes read it.
            problems = [text for text in distributed.gather(problem) if text]
            if not problems:
                return state
            damaged.append(self._move_aside(directory))
            if distributed.is_primary():
                log.warning(
                    "warning: checkpoint %d cannot be read and was moved to %s; falling back to "
                    "the one before it (%s)",
                    step,
                    damaged[-1],
                    problems[0],
                )
        if damaged:
            raise InputError(
                f"none of the checkpoints in {self._workdir} could be read; they are now in "
                f"{damaged[0].parent}. Start the command again to begin from scratch"
            )
        return None

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Raises a `WriteError` in place of any exception of orbax, as on a full disk."""
        try:
            yield
        except Exception as error:
            last = newest(self._workdir)
            there = "there is none yet" if last is None else f"the last one is of step {last}"
            advice = "Start" if paths.is_remote(self._workdir) else "Make room and start"
            raise WriteError(
                f"a checkpoint in {self._workdir} cannot be written: {_reason(error)}; {there}. "
                f"{advice} the same command again to go on from it"
            ) from error

    def _move_aside(self, directory: epath.Path) -> epath.Path:
        self._manager.close()
        target = self._workdir / _CORRUPT / directory.name
        if distributed.is_primary():
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                target.rmtree()
            paths.move_folder(directory, target)
        distributed.gather("")  # other processes open the folder again after the move
        self._manager = self._open()
        return target

    def _open(self) -> ocp.CheckpointManager:
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_PART)
        types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(_ITEM, ocp.args.PyTreeSave, handler)
        folder = self._workdir / _FOLDER
        return ocp.CheckpointManager(folder, options=self._options, handler_registry=handlers)


def newest(workdir: epath.Path) -> int | None:
    """Returns the step of the newest complete checkpoint in a workdir; None without any."""
    steps = [path for path in (workdir / _FOLDER).glob("*") if path.name.isdigit()]
    if paths.is_remote(workdir):  # where a checkpoint has its name before it is complete
        steps = [path for path in steps if ocp.utils.is_checkpoint_finalized(path)]
    return max((int(path.name) for path in steps), default=None)


def find(path: epath.Path, *, which: str = "best") -> epath.Path:
    """Returns the directory of one checkpoint.

    Args:
      path: workdir, or the directory of a checkpoint in it.
      which: "best", "last" or a step, where the path is a workdir.

    Raises:
      InputError: there is no such checkpoint.
    """
    if (path / _ITEM).is_dir():
        return paths.absolute(path)
    folder = paths.absolute(path / _FOLDER)
    if not folder.is_dir():
        raise InputError(f"{path} is neither a workdir nor a checkpoint: it has no {_FOLDER}/")
    options = ocp.CheckpointManagerOptions(best_fn=_rank, read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = {"best": manager.best_step(), "last": manager.latest_step()}
        step = steps.get(which, which)
        if step is None:
            step = manager.latest_step()
        if not str(step).isdigit() or int(step) not in manager.all_steps():
            known = ", ".join(str(s) for s in sorted(manager.all_steps())) or "none"
            raise InputError(f"{path} has no checkpoint {which!r}; its steps are {known}")
    return folder / str(step)


def choose(checkpoint: epath.Path, weights: str) -> tuple[str, bool]:
    """Returns which weights of a checkpoint a choice means, and whether it has a moving average.

    Args:
      checkpoint: directory from `find`.
      weights: "ema", "model", or "auto" for the moving average where there is one.

    Raises:
      InputError: the checkpoint is damaged, or has no moving average.
    """
    if weights not in ("auto", "ema", "model"):
        raise InputError(f"weights is {weights!r}; expected 'auto', 'ema' or 'model'")
    with _readable(checkpoint):
        sections = {name.split("/")[0] for name in _saved_shapes(checkpoint)}
    if weights == "auto":
        weights = "ema" if "ema" in sections else "model"
    if weights not in sections:
        raise InputError(f"checkpoint {checkpoint} has no {weights!r}; choose --weights=model")
    return weights, "ema" in sections


def load_variables(checkpoint: epath.Path, like: Variables, *, weights: str = "auto") -> Variables:
    """Reads the weights alone from a checkpoint of training.

    Args:
      checkpoint: directory from `find`.
      like: variables of the model as arrays, or as shapes with shardings.
      weights: "ema", "model" or "auto", as in `choose`.

    Raises:
      InputError: the checkpoint is damaged, of another model, or has no moving average.
    """
    weights, _ = choose(checkpoint, weights)
    abstract = {weights: like}
    with _readable(checkpoint):
        return _from_tree(_read(checkpoint, _to_tree(abstract), partial=True), abstract)[weights]


def model_of(checkpoint: epath.Path) -> dict[str, Any] | None:
    """Returns the configuration of a checkpoint's model, as of `ModelConfig.to_dict`, if saved.

    Raises:
      InputError: the checkpoint is damaged.
    """
    with _readable(checkpoint):
        return (_metadata(checkpoint).custom_metadata or {}).get(_MODEL)


def class_names_of(checkpoint: epath.Path) -> ClassNames | None:
    """Returns the names of a checkpoint's classes by number, if saved.

    Raises:
      InputError: the checkpoint is damaged.
    """
    with _readable(checkpoint):
        names = (_metadata(checkpoint).custom_metadata or {}).get(_CLASSES)
        return None if names is None else tuple(names)


def save_variables(
    workdir: epath.Path,
    variables: Variables,
    model: ModelConfig,
    class_names: ClassNames | None = None,
) -> None:
    """Writes a workdir whose one checkpoint, at step 0, has weights alone.

    Args:
      workdir: folder to write to.
      variables: weights to save.
      model: configuration of the model.
      class_names: names of the classes by number; None if unknown.

    Raises:
      WriteError: the checkpoint cannot be written.
    """
    with Checkpoints(workdir, model, class_names, keep_last=1, keep_best=1) as checkpoints:
        checkpoints.save(0, {"model": variables})


def _read(directory: epath.Path, target: dict[str, Any], *, partial: bool = False) -> Any:
    """Reads the arrays of a checkpoint.

    Args:
      directory: directory of the checkpoint.
      target: shapes with shardings, as nested dictionaries.
      partial: whether to read only the top-level names of `target`.

    Raises:
      InputError: the arrays in the checkpoint have other names or shapes.
    """
    expected = traverse_util.flatten_dict(target, sep="/")
    saved = _saved_shapes(directory)
    if partial:
        sections = {name.split("/")[0] for name in expected}
        saved = {k: v for k, v in saved.items() if k.split("/")[0] in sections}
    check_shapes({k: v.shape for k, v in expected.items()}, saved, f"checkpoint {directory}")
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), target
    )
    with _reader() as checkpointer:
        return checkpointer.restore(
            directory / _ITEM,
            args=ocp.args.PyTreeRestore(
                item=target, restore_args=restore_args, partial_restore=partial
            ),
        )


def _reader() -> ocp.Checkpointer:
    """Returns an orbax checkpointer for this process alone, which waits for no other process.

    Each process reads what its devices hold, and may fail to where others do not.
    """
    rank = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"reader{rank}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _saved_shapes(directory: epath.Path) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(_metadata(directory).tree, sep="/")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}


def _metadata(directory: epath.Path) -> Any:
    with _reader() as checkpointer:
        metadata = checkpointer.metadata(directory / _ITEM).item_metadata
    if metadata is None:
        raise FileNotFoundError("its metadata are missing")
    return metadata


@contextlib.contextmanager
def _readable(checkpoint: epath.Path) -> Iterator[None]:
    """Raises an `InputError` in place of any exception of orbax, as for a damaged file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read: {first_line(error)}") from error


def _reason(error: Exception) -> str:
    """Returns the reason of a failed write, without the paths that tensorstore begins with."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if remote := re.findall(r"gs://\S+: ([^\[]+)", str(error)):
        return remote[-1].strip()
    return getattr(error, "strerror", None) or first_line(error)


def _to_tree(state: Any) -> dict[str, Any]:
    return traverse_util.unflatten_dict(named_leaves(state), sep="/")


def _from_tree(tree: dict[str, Any], like: Any) -> Any:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in named_leaves(like)])
