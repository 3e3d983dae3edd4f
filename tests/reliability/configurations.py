"""Mutated configurations: each one is refused by an error that says what is wrong, or builds; none raises from inside.

A mutation gives one key a value of another kind, out of range, huge or malformed, removes it, or adds one that is not
known; in the tree, in the text of the file, or as an override. What is left then builds model, conditioning, trainer
and data loader, as `python -m controlnet.train` does before the first step.
"""

import collections
import copy
import random
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from controlnet import build, config
from controlnet.checkpoints import CheckpointError
from controlnet.config import ConfigError
from controlnet.config.checks import every_key
from controlnet.config.stages import ARGUMENTS, STAGES
from controlnet.data import build_loader
from controlnet.data.shards import DataError
from controlnet.training.distributed import StopRequest, World
from controlnet.training.trainer import Trainer
from tests.controlnet import tiny_run
from tests.controlnet.shard_files import write_shard

SECONDS = 60  # of one configuration; more is a hang
REFUSALS = (ConfigError, DataError, CheckpointError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**12, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"),
    "", "abc", "null", "\0", "1e-4", "${nowhere}", "${oc.env:CN_NOT_SET}", "${model}", "${", "???", "x" * 10_000,
    [], [1], [None], [[[]]], [-1] * 3, ["a", 1], list(range(1000)), {}, {"a": 1}, {"_target_": "os.system"}, {1: 2},
    {"params": 3}, {"target": None}, "/", "/nowhere", "../..", "1, 2, 3", "nan",
)  # fmt: skip
TEXTS = (
    "", "\0", "- 1", "a: [", "a: {b: c", "&a [*a]", "a: &a {b: *a}", "model: &m {unet_config: *m}", "\ufeff", "é: 1",
    "model: 3", "model:\n\t- x", "? {a: b}\n: c", "!!python/object/apply:os.system [true]", "%YAML 9.9\n---\na: 1",
    "[" * 3000, "a: " + "{b: " * 3000, "a: 1\na: 2", "---\na: 1\n---\nb: 2", "model: !!binary xyz", "x: 2020-01-01",
    "model: {unet_config: {params: [1]}}", "model: {params: {params: {params: 1}}}", "trainer: [1, 2]",
    "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]),
)  # fmt: skip


def targets(tree: Mapping[str, Any]) -> list[str]:
    """Every dotted path that a configuration may hold, of parts those of all their classes."""
    paths = [path for path, _ in every_key()]
    paths += ["trainer", "exp_manager", "model", "data", "optim", "data.train", "model.image_logger"]
    for stage, classes in STAGES.items():
        paths += [f"model.{stage}", f"model.{stage}._target_", f"model.{stage}.target", f"model.{stage}.params"]
        paths += [f"model.{stage}.{key}" for name in classes for key in ARGUMENTS[name]]
    return sorted(set(paths))


def put(tree: dict, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            return
    tree[name] = value


def mutations(base: dict, rounds: int, seed: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(what is changed, a function that reads the mutated configuration): each text once, then `rounds` of the rest."""
    for text in TEXTS:
        yield f"file {text[:40]!r}", lambda text=text: _from_text(text)
    rng, paths = random.Random(seed), targets(base)
    for _ in range(rounds):
        kind, tree = rng.randrange(6), copy.deepcopy(base)
        path, value = rng.choice(paths), rng.choice(VALUES)
        if kind < 3:
            put(tree, path, value)
            yield f"{path}={str(value)[:40]!r}", lambda tree=tree: config.compose(tree)
        elif kind == 3:
            text = f"{path}={value}"
            yield f"override {text[:80]!r}", lambda text=text, tree=tree: config.compose(tree, [text])
        elif kind == 4:
            letters = list(path)
            letters[rng.randrange(len(letters))] = rng.choice("abcxyz._-0 ")
            text = "".join(letters) + "=1"
            yield f"override {text!r}", lambda text=text, tree=tree: config.compose(tree, [text])
        else:
            text = yaml.safe_dump(base)
            place = rng.randrange(len(text))
            text = (
                text[:place]
                + rng.choice(["", "\0", "\t", "[", "{", ":", "&a", "*a", "\n", "-", "'"])
                + text[place + 1 :]
            )
            yield f"file changed at {place}", lambda text=text: _from_text(text)


def _from_text(text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return config.load(path)


def prepare(cfg: Any) -> None:
    """What training does with a configuration before its first step."""
    model = build.build_model(cfg.model)
    conditioning = build.build_conditioning(cfg.model)
    world = World(0, 1, 0, torch.device("cpu"))

    def make_loader(position: Any) -> Any:
        return build_loader(cfg.data, factor=conditioning.factor, batch_size=cfg.model.micro_batch_size, seed=0)

    trainer = Trainer(cfg, world, model, conditioning, make_loader, StopRequest())
    loader = trainer.make_loader(None)
    loader.close()


def outcome(read: Callable[[], Any]) -> tuple[str, str]:
    """("built", "refused", "raised" or "hung", the message)."""

    def ring(*_: Any) -> None:
        raise TimeoutError("no answer")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        prepare(read())
    except REFUSALS as error:
        empty = not str(error).strip()
        return ("raised", "an error without words") if empty else ("refused", f"{type(error).__name__}: {error}")
    except TimeoutError as error:
        return "hung", str(error)
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "built", ""


def base(folder: Path) -> dict:
    """A configuration that trains, on one shard in `folder`."""
    tree = copy.deepcopy(tiny_run.BASE)
    tree["exp_manager"]["explicit_log_dir"] = str(folder / "run")
    shard = write_shard(folder / "0.tar", range(4), size=16)
    tree["data"] = {"num_workers": 0, "train": {"dataset_path": [str(shard)], "augmentations": {"center_crop_h_w": 16}}}
    return tree


def campaign(rounds: int, seed: int) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = base(Path(folder))
        kind, message = outcome(lambda: config.compose(tree))
        assert kind == "built", message
        for what, read in mutations(tree, rounds, seed):
            kind, message = outcome(read)
            counts[kind] += 1
            if kind in ("raised", "hung"):
                print(f"{kind}: {what}: {message[:300]}", flush=True)
    return dict(counts)
