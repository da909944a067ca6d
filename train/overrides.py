"""From command-line overrides to a RunConfig. Hydra composes; nothing of Hydra or OmegaConf leaves this file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from sieve.train.config import RunConfig
from sieve.train.mistakes import ConfigError, check_keys, explain
from sieve.train.schema import shown
from sieve.train.settings_file import overrides_of

_CONFIGS = "sieve.configs"

C = TypeVar("C", bound=BaseModel)


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `overrides`, in Hydra's syntax, describe. ConfigError, fit to be shown, for any mistake in them."""
    return load(RunConfig, "config", overrides, RunConfig.of)


def load(
    model: type[C], root: str, overrides: Sequence[str], make: Callable[[dict[str, Any]], C] | None = None
) -> C:
    """The settings of `model` that the YAML file `root` and `overrides` describe; make: its own way from a dict.

    ConfigError, fit to be shown, for any mistake in them.
    """
    tree = compose_tree(overrides, root)
    check_keys(model, tree)
    try:
        return (make or model.model_validate)(tree)
    except ValidationError as error:
        raise explain(error, model, tree) from error


def compose_tree(overrides: Sequence[str], root: str = "config") -> dict[str, Any]:
    """What Hydra makes of the YAML files and the overrides: plain, resolved, not yet checked against a model."""
    groups = config_groups(root)
    normal = [_normal(text, groups) for given in overrides for text in _of_file(given)]
    try:
        with initialize_config_module(_CONFIGS, version_base="1.3"):
            composed = compose(root, overrides=normal)
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except InterpolationResolutionError as error:
        hint = "" if "${oc." in _first_line(error) or "nvironment variable" in _first_line(error) else (
            "; only keys that YAML or an override sets can be interpolated"
        )
        raise ConfigError(f"{error.full_key}: {_first_line(error)}{hint}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from error
    return {str(key): value for key, value in tree.items()}


def _of_file(text: str) -> list[str]:
    """config=FILE as the overrides that the file stands for; any other text as it is."""
    if not text.startswith("config="):
        return [text]
    path = Path(text.removeprefix("config="))
    try:
        return overrides_of(path)
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from error


def config_groups(root: str = "config") -> dict[str, list[str]]:
    """The groups in the defaults of the YAML file `root` and their choices, by the files that are there."""
    configs = resources.files(_CONFIGS)
    defaults = yaml.safe_load((configs / f"{root}.yaml").read_text())["defaults"]
    names = sorted(name for entry in defaults if isinstance(entry, dict) for name in entry)
    return {
        name: sorted(f.name.removesuffix(".yaml") for f in (configs / name).iterdir() if f.name.endswith(".yaml"))
        for name in names
    }


def _normal(text: str, groups: dict[str, list[str]]) -> str:
    """`text` as Hydra needs it: defaults stand in pydantic and not in YAML, so every value is an addition to that."""
    override = _parsed(text)
    key, value = override.key_or_group, override.value()
    if override.is_sweep_override():
        raise ConfigError(f"{text}: several values; start one run for each, or write a list as {key}='[a,b]'")
    if key == "hydra" or key.startswith("hydra."):
        raise ConfigError(f"{text}: Hydra itself takes no settings here; its output folder and logging are not used")
    if override.is_delete():
        return text
    if key == "experiment" and key in groups and value is None:
        return "~experiment"
    raw = text.split("=", 1)[1]
    if key == "attention" and isinstance(value, list):
        return f"++attention.layers={raw}"
    if key == "profile" and isinstance(value, bool):  # beside profile.KEY=VALUE, in any order
        return f"++profile.enabled={raw}"
    if key == "profile" and not isinstance(value, dict):
        raise ConfigError(f"{text}: must be true or false; one setting is profile.KEY=VALUE")
    if key not in groups:
        if (resources.files(_CONFIGS) / key).is_dir():
            raise ConfigError(f"{text}: this command has no such group; there are {', '.join(groups)}")
        return f"++{key}={raw}"
    choice = shown(value)
    if choice not in groups[key]:
        raise ConfigError(_no_choice(key, choice, groups[key]))
    return f"{key}='{choice}'"  # quoted, or zero=1 would be a number


def _parsed(text: str) -> Override:
    if text.startswith("--"):
        hint = "; torchrun, or deepspeed --no_local_rank, adds none" if text.startswith("--local") else ""
        raise ConfigError(f"{text}: unknown option; there are --help and --cfg job, all else is KEY=VALUE{hint}")
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text}: is not KEY=VALUE")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"{text}: cannot be read as KEY=VALUE; put lists and special characters in quotes, as in "
            "data.paths='[a,\"b c\"]'"
        ) from error


def _no_choice(group: str, choice: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(choice, choices, n=1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={choice}: no such choice; {hint}there are {', '.join(choices)}; one setting is {group}.KEY=VALUE"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
