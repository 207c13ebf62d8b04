"""The configuration of a run: every field with its meaning, and what is derived from it.

Recipes in `configs/` start from `base()` and change values; the command line changes them once
more (`--config.optim.lr=1e-3`). Nothing is derived before that. Then `resolve` turns durations
into steps, once, and what it returns is printed, written to the workdir and used.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spvit_jax import atomic
from spvit_jax.errors import InputError, nearest
from spvit_jax.models import (
    EvaluationProtocol,
    ModelConfig,
    evaluation_protocol,
    field_types,
    model_config,
)

log = logging.getLogger("spvit_jax")

_RECORD = "config.json"  # in a workdir
_DURATIONS = (
    "schedule.total",
    "schedule.warmup",
    "schedule.cooldown",
    "log_every",
    "eval_every",
    "checkpoint.every",
)
# Fields that may change between the start of a run and its continuation in the same workdir.
_CHANGEABLE = (
    "compilation_cache",
    "mesh",
    "model.attention",
    "data.data_dir",
    "data.threads",
    "data.eval_batch_size",
    "data.max_unreadable",
    "stall_timeout",
    "profile",
    "wandb",
    "writers",
)


def base() -> ConfigDict:
    """Returns a configuration with every field there is, for ImageNet at 224 pixels.

    A duration is a text such as "300 epochs", "5000 steps" or "1.28e6 examples".
    """
    config = ConfigDict()
    config.seed = 0  # random seed of the weights, the order of the data and everything else
    config.log_every = "50 steps"  # interval over which training metrics are averaged and written
    config.eval_every = "1 epoch"  # interval of evaluations on data.eval_split; a checkpoint each
    config.eval_raw = False  # evaluate the weights themselves too, beside their moving average

    # None: JAX_COMPILATION_CACHE_DIR, else in the workdir, or in ~/.cache for commands without one.
    config.compilation_cache = placeholder(str)  # folder that keeps compiled programs, or "off"

    config.model = model = ConfigDict()
    model.name = "deit_s"  # one of spvit_jax.models.list_models()
    # Each field of `models.ModelConfig` and of its families, which say what it means; None is the
    # named model's own value.
    for name, kind in field_types().items():
        model[name] = placeholder(kind)

    config.data = data = ConfigDict()
    data.dataset = "imagenet2012"  # "digits", a TFDS name, or "folder:PATH"
    data.data_dir = "data"  # where TFDS data sets are kept
    data.train_split = "train"  # split to train on
    data.eval_split = "validation"  # split to evaluate on during training
    data.minival = placeholder(object)  # held out of training as split "minival": 10000 or "1%"
    data.train_size = placeholder(object)  # examples, evenly by class: 200 or "1%"; None: all
    data.batch_size = 1024  # images per step, over all devices
    data.eval_batch_size = 1024  # images per step of evaluation
    data.max_unreadable = 100  # number of damaged images in a split at which a run stops
    data.mean = (0.485, 0.456, 0.406)  # mean of each channel, on a scale of 0 to 1
    data.std = (0.229, 0.224, 0.225)  # standard deviation of each channel, likewise
    data.threads = placeholder(int)  # decoding threads; None: one per core

    config.augment = augment = ConfigDict()
    augment.crop_scale = (0.08, 1.0)  # random crop's fraction of the image's area
    augment.crop_ratio = (3 / 4, 4 / 3)  # random crop's width over height
    augment.interpolation = "bicubic"  # of crops and RandAugment; or "bilinear", or "random"
    augment.flip = 0.5  # probability of a horizontal flip
    augment.repeats = 1  # consecutive copies of each image, each augmented anew
    augment.rand_augment = placeholder(str)  # timm's "rand-m9-mstd0.5-inc1"; None or "": off
    augment.three_augment = False  # grey, solarized or blurred, one of them (DeiT III)
    augment.color_jitter = 0.0  # strength of random brightness, contrast and saturation
    augment.erase = 0.0  # probability of filling a random box with noise
    augment.mixup = 0.0  # α of MixUp; 0 is off
    augment.cutmix = 0.0  # α of CutMix; 0 is off
    augment.mix_probability = 1.0  # probability of mixing a group at all
    augment.switch_probability = 0.5  # probability of CutMix rather than MixUp where both are on
    augment.mix_token = False  # paste a box of another image's patches behind the stem
    augment.mix_group_size = 128  # images that are mixed with each other, by one draw
    augment.eval_crop = placeholder(float)  # side kept by evaluation's crop; None: the model's
    augment.eval_interpolation = placeholder(str)  # of evaluation images; None: the model's
    augment.eval_crop_mode = placeholder(str)  # "center", or "squash" to the model's proportions

    config.token_labels = token_labels = ConfigDict()
    token_labels.path = placeholder(str)  # label maps of the train split; None: the image's label
    token_labels.official_axes = False  # take x for y where the authors' code does

    config.loss = loss = ConfigDict()
    loss.name = "cross_entropy"  # or one that training.losses.register_loss has added
    loss.label_smoothing = 0.1  # fraction of the target spread over all classes
    loss.dense_weight = 1.0  # weight of the loss of a dense head, where the model has one

    config.distill = distill = ConfigDict()
    distill.teacher = placeholder(str)  # workdir or file whose labels a distilled model learns

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # or "lamb", or "sgd" with momentum b1
    optim.lr = 1e-3  # learning rate that the warm-up reaches, absolute: nothing rescales it
    optim.min_lr = 1e-5  # final learning rate, also in the cooldown; lr for a constant rate
    optim.warmup_lr = 1e-6  # learning rate at the first step, if there is a warm-up
    optim.weight_decay = 0.05  # decoupled, times the learning rate; matrices only
    optim.b1 = 0.9  # Adam's decay of the first moment
    optim.b2 = 0.999  # Adam's decay of the second moment
    optim.eps = 1e-8  # Adam's epsilon
    optim.layer_decay = 1.0  # learning rate of each layer over that of the next; 1 is off
    optim.clip_norm = 0.0  # largest norm of the whole gradient; 0 is off
    optim.accumulate = 1  # micro-batches per step; batch_size counts all of them
    optim.ema = 0.0  # decay of the moving average of the weights; 0 is off

    config.schedule = schedule = ConfigDict()
    schedule.total = "300 epochs"  # duration of the run, warm-up and cooldown included
    schedule.warmup = "5 epochs"  # linear from warmup_lr to lr, over the cosine's beginning
    schedule.cooldown = "0 epochs"  # duration at min_lr, at the end

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = "1 epoch"  # interval of checkpoints beside those after evaluations
    checkpoint.keep_last = 2  # newest checkpoints kept
    checkpoint.keep_best = 1  # best ones kept, by top-1 of the evaluation
    config.init_from = placeholder(str)  # weights a new run starts from: workdir, .pth, …
    config.init_new_head = False  # whether a head for other classes may be replaced by a new one

    # Or 30 median steps if they are longer; six times that for compiling, evaluating and saving.
    config.stall_timeout = 300.0  # seconds without a step after which a run is ended; 0: never
    config.profile = profile = ConfigDict()
    profile.start = placeholder(int)  # steps after which a trace begins; None: where asked for
    profile.steps = 5  # steps in a trace
    config.wandb = placeholder(str)  # project of Weights & Biases to report to as well
    config.writers = placeholder(str)  # writers that training.writers.register_writer has added

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices along the data axis; -1: all that fsdp leaves
    mesh.fsdp = 1  # devices over which each parameter is split, by several dimensions if need be
    mesh.sharding = "fsdp"  # preset of spvit_jax.training.sharding: "fsdp" or "replicated"
    return config.lock()


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Reads the argument behind a config's colon, `s,384` or `model=mait,train_size=200`.

    Args:
      arg: "key=value" pairs with commas between them, or None; a value without a key is that of
        the default in its place.
      **defaults: the known keys and their values; a value is read as the default's type (`str`
        or `int` given as a type stand for a key without a default).

    Raises:
      InputError: a key is unknown or a value cannot be read.
    """
    values = ConfigDict({k: None if isinstance(v, type) else v for k, v in defaults.items()})
    keys = list(defaults)
    for place, pair in enumerate(filter(None, (arg or "").split(","))):
        key, separator, text = pair.partition("=")
        if not separator and place < len(keys):
            key, text = keys[place], pair
        if key not in defaults:
            raise InputError(
                f"config argument {pair!r} is not KEY=VALUE with a known key"
                f"{nearest(key, defaults)}"
            )
        kind = defaults[key] if isinstance(defaults[key], type) else type(defaults[key])
        try:
            values[key] = kind(text)
        except ValueError as error:
            raise InputError(
                f"config argument {pair!r}: expected {key} to be of type {kind.__name__}"
            ) from error
    return values


def steps_of(duration: str | int, *, batch_size: int, num_examples: int) -> int:
    """Returns a duration in steps, rounded to the nearest.

    Args:
      duration: "300 epochs", "5000 steps", "1.28e6 examples", or a number of steps.
      batch_size: examples per step.
      num_examples: examples per epoch.

    Raises:
      InputError: the duration cannot be read.
    """
    number, _, unit = str(duration).strip().partition(" ")
    steps_per = {
        "": 1.0,
        "step": 1.0,
        "epoch": num_examples / batch_size,
        "example": 1 / batch_size,
    }
    try:
        value = float(number) * steps_per[unit.strip().removesuffix("s")]
    except (ValueError, KeyError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(
            f"duration {duration!r} cannot be read; expected for example '300 epochs', "
            "'5000 steps' or '1.28e6 examples'"
        )
    return round(value)


def resolve(config: ConfigDict, *, num_examples: int) -> ConfigDict:
    """Returns a configuration with durations in steps and the evaluation protocol filled in.

    Args:
      config: configuration as the command line left it; it is not changed.
      num_examples: training examples per epoch.

    Raises:
      InputError: a duration cannot be read, or the durations or the learning rates contradict
        each other.
    """
    resolved = ConfigDict(copy.deepcopy(config.to_dict()))
    sizes = {"batch_size": config.data.batch_size, "num_examples": num_examples}
    for path in _DURATIONS:
        section, _, name = path.rpartition(".")
        fields = resolved[section] if section else resolved
        steps = steps_of(fields[name], **sizes)
        with fields.ignore_type():
            fields[name] = steps if section == "schedule" else max(steps, 1)
    shape = model_settings(resolved, num_classes=1).image_shape
    protocol = evaluation_of(resolved, shape)._asdict()
    resolved.augment.update({f"eval_{field}": value for field, value in protocol.items()})
    group, images = resolved.model.batch_norm_group, config.data.batch_size
    images //= max(config.optim.accumulate, 1)
    if group and images > group and images % group:
        raise InputError(
            f"model.batch_norm_group is {group}, which does not divide the {images} images of a "
            "batch (or of a micro-batch); choose one that does"
        )
    schedule = resolved.schedule
    if schedule.total < 1 or schedule.warmup + schedule.cooldown > schedule.total:
        raise InputError(
            f"the schedule has {schedule.total} steps in all, of them {schedule.warmup} of warm-up "
            f"and {schedule.cooldown} of cooldown; lengthen schedule.total or shorten the others"
        )
    _check_rates(resolved)
    return resolved


def _check_rates(config: ConfigDict) -> None:
    """Raises an `InputError` unless the learning rate rises to `lr` and falls, or stays there."""
    lr, min_lr, warmup_lr = (config.optim[name] for name in ("lr", "min_lr", "warmup_lr"))
    if not 0 < lr < math.inf:
        raise InputError(f"optim.lr is {lr:g}; expected a number above 0")
    for name, rate, when in (
        ("min_lr", min_lr, "rise to it"),
        ("warmup_lr", warmup_lr if config.schedule.warmup else 0.0, "begin with it and fall"),
    ):
        if not 0 <= rate <= lr:
            raise InputError(
                f"optim.{name} is {rate:g}, above optim.lr={lr:g}: the learning rate would {when}. "
                f"Expected 0 to optim.lr; for a constant rate set optim.{name}={lr:g} too"
            )


def model_settings(config: ConfigDict, *, num_classes: int) -> ModelConfig:
    """Returns the model's configuration: the named model with the fields that are not None."""
    fields = {k: v for k, v in config.model.to_dict().items() if v is not None}
    return model_config(fields.pop("name"), num_classes=num_classes, **fields)


def evaluation_of(config: ConfigDict, image_shape: tuple[int, int]) -> EvaluationProtocol:
    """Returns the resizing and cropping of evaluation images: as configured, else the model's."""
    protocol = evaluation_protocol(config.model.name, image_shape)
    chosen = {field: config.augment[f"eval_{field}"] for field in protocol._fields}
    return protocol._replace(**{k: v for k, v in chosen.items() if v is not None})


def claim_workdir(
    workdir: epath.Path, config: ConfigDict, *, in_use: bool, write: bool = True
) -> None:
    """Writes a run's configuration to its workdir, or refuses a workdir of another configuration.

    The folder is created if need be.

    Args:
      workdir: folder of the run.
      config: resolved configuration.
      in_use: whether the workdir holds checkpoints, with which the configuration must then agree.
      write: whether this process writes the file; all processes compare.

    Raises:
      InputError: the workdir belongs to another configuration, or cannot be written.
    """
    path = workdir / _RECORD
    if in_use and path.exists():
        try:
            # Its durations are in steps already; fields that it lacks are derived as for a new run.
            changes = differences(resolve(from_json(path), num_examples=1), config)
        except (OSError, ValueError) as error:
            changes = []
            log.warning(
                "warning: %s cannot be read (%s), so that nothing says whether the run in this "
                "workdir had other settings; it is written anew",
                path,
                str(error).partition("\n")[0],
            )
        if changes:
            raise InputError(
                f"workdir {workdir} belongs to a run with another configuration "
                f"({'; '.join(changes)}); choose another --workdir, or the same settings to go on"
            )
    if not write:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, to_json(config))
    except OSError as error:
        raise InputError(f"cannot write to workdir {workdir}: {error}") from error


def to_json(config: ConfigDict) -> str:
    """Returns a configuration as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(path: epath.Path) -> ConfigDict:
    """Reads a configuration from JSON; fields that the file lacks have their defaults.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file does not hold a configuration.
    """
    tree = json.loads(path.read_text())
    if not isinstance(tree, dict):
        raise ValueError(f"a {type(tree).__name__} and not an object")
    config = base()
    with config.unlocked(), config.ignore_type():
        config.update(tree)
    return config


def find_recorded(path: epath.Path) -> epath.Path | None:
    """Returns the file with the configuration of the run that a path belongs to; None without.

    Args:
      path: a workdir, or a checkpoint in one.
    """
    folders = (path, *list(path.parents)[:2])  # a checkpoint is WORKDIR/checkpoints/STEP
    files = [folder / _RECORD for folder in folders if (folder / "checkpoints").is_dir()]
    return next((file for file in files if file.exists()), None)


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lists the fields in which a run differs from the one it would continue, as 'key: a → b'."""
    before, after = flatten(json.loads(to_json(old))), flatten(json.loads(to_json(new)))
    return [
        f"{key}: {before.get(key)} → {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(_CHANGEABLE)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dictionaries as one, with keys such as 'optim.lr'."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
