"""What is wrong with a config, in the user's words: the key, its value, what is allowed, and the closest key."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from sieve.train.schema import closest_key, item_model, keys, shown, submodel, unfit_numbers, unknown_keys


class ConfigError(ValueError):
    """A user's mistake; its text is all that needs to be shown."""


def check_keys(model: type[BaseModel], tree: dict[str, Any]) -> None:
    """ConfigError for keys of `tree` that `model` does not have, before pydantic, whose errors name no neighbour; and for
    numbers that pydantic would take, as it takes true for 1."""
    lines = []
    for path, value in unknown_keys(model, tree):
        near = closest_key(model, path)
        hint = f"did you mean {near}?" if near else f"known are {_siblings(model, path)}"
        lines.append(f"{path}={shown(value)}: unknown key; {hint}")
    lines += [f"{path}={shown(value)}: {wanted}" for path, value, wanted in unfit_numbers(model, tree)]
    if lines:
        raise ConfigError("\n".join(lines))


def explain(error: ValidationError, model: type[BaseModel], tree: dict[str, Any]) -> ConfigError:
    """pydantic's errors, one a line, each with its full dotted key."""
    return ConfigError("\n".join(dict.fromkeys(_line(item, model, tree) for item in error.errors())))


def _line(item: Any, model: type[BaseModel], tree: dict[str, Any]) -> str:
    path, part = _path(item["loc"], model, tree)
    message = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]
    message = re.sub(r"^Input should be ", "must be ", message)
    message = re.sub(r", unable to parse .*$", "", message)
    if item["type"] == "missing":
        return f"{path}: is required"
    if part is not None:  # a check of a whole part names its keys without the path to them
        return _with_full_keys(message, part, path)
    if message.startswith(f"{path.rpartition('.')[2]}="):
        return path.rpartition(".")[0] + "." * ("." in path) + message
    if item["type"] == "tuple_type":  # a word of Python's
        message = f"must be a list, as [{'...' if isinstance(item['input'], (dict, type(None))) else shown(item['input'])}]"
    line = f"{path}={shown(item['input'])}: {message}"
    if item["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = difflib.get_close_matches(str(item["input"]), choices, n=1)
        line += f"; did you mean {near[0]}?" if near and len(choices) > 1 else ""
    return line


def _with_full_keys(message: str, part: type[BaseModel], path: str) -> str:
    """'topk=1 must be ...' of the part at 'attention' -> 'attention.topk=1 must be ...'."""
    if not path:
        return message
    names = "|".join(sorted(part.model_fields, key=len, reverse=True))
    message = re.sub(rf"(?<![\w.])({names})=", rf"{path}.\1=", message)
    return message if message.startswith(f"{path}.") else f"{path}: {message}"


def _path(loc: tuple[int | str, ...], model: type[BaseModel], tree: Any) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of an error's location, without the tags that pydantic adds for the members of a union, and the
    model that stands there, if it is a whole part."""
    names: list[str] = []
    part: type[BaseModel] | None = model
    items: type[BaseModel] | None = None  # what the items of the list or dict that was entered last are
    for item in loc:
        if part is not None and item in part.model_fields:
            names.append(str(item))
            annotation = part.model_fields[item].annotation
            part, items = submodel(annotation), item_model(annotation)
            tree = tree.get(item) if isinstance(tree, dict) else None
        elif isinstance(item, int) and isinstance(tree, (list, tuple)):
            names[-1] += f"[{item}]"
            tree = tree[item] if item < len(tree) else None
            part, items = items, None
        elif part is None and isinstance(tree, dict) and item in tree:
            names.append(str(item))
            tree = tree[item]
            part, items = items, None
    return ".".join(names), part if not names or isinstance(tree, dict) else None


def _siblings(model: type[BaseModel], path: str) -> str:
    folder = path.rpartition(".")[0]
    prefix = f"{folder}." if folder else ""
    names = dict.fromkeys(
        key.path.removeprefix(prefix).split(".")[0] for key in keys(model) if key.path.startswith(prefix)
    )
    return ", ".join(prefix + name for name in names) or _siblings(model, folder)
