"""The keys that a config of nested pydantic models takes, each with its type, default and meaning."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


@dataclass(frozen=True)
class Key:
    """path: dotted. kind: what may be given, in words. default: of pydantic, PydanticUndefined where there is none."""

    path: str
    kind: str
    default: Any
    description: str


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every leaf under `model`, depth first, in the order of definition; an optional part counts by its own keys."""
    for name, field in model.model_fields.items():
        part = submodel(field.annotation)
        if part is not None:
            yield from keys(part, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield Key(prefix + name, _kind(field.annotation), default, field.description or "")


def submodel(annotation: Any) -> type[BaseModel] | None:
    """The model that a field of this type holds, also when it may be None; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [submodel(part) for part in get_args(annotation)] if _is_union(annotation) else []
    return next((part for part in found if part is not None), None)


def item_model(annotation: Any) -> type[BaseModel] | None:
    """The model that the items of a list, or the values of a dict, of this type hold; None if they hold none."""
    if get_origin(annotation) in (tuple, list, dict):
        return next((part for part in map(submodel, get_args(annotation)) if part is not None), None)
    return None


def unknown_keys(model: type[BaseModel] | None, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of `tree`, with their values, that `model` (None: nothing) and its parts do not have."""
    for name, value in tree.items():
        field = None if model is None else model.model_fields.get(name)
        part = None if field is None else submodel(field.annotation)
        if isinstance(value, dict) and (field is None or part is not None):
            yield from unknown_keys(part, value, f"{prefix}{name}.")
        elif field is None:
            yield f"{prefix}{name}", value


def unfit_numbers(model: type[BaseModel] | None, tree: Any, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Values of `tree` that pydantic takes for numbers and nobody means so: dotted key, value, and what is wanted."""
    if isinstance(tree, float) and math.isinf(tree):
        yield path, tree, "must be a finite number"
    elif isinstance(tree, (list, tuple)):
        for number, item in enumerate(tree):
            yield from unfit_numbers(model, item, f"{path}[{number}]")
    elif isinstance(tree, dict):
        for name, value in tree.items():
            key = f"{path}.{name}" if path else str(name)
            field = None if model is None else model.model_fields.get(name)
            if field is None:  # a dict of parts, or of whatever has no settings of its own
                yield from unfit_numbers(model if isinstance(value, dict) else None, value, key)
                continue
            kinds = _kind(field.annotation).split("|")
            if isinstance(value, bool) and {"int", "float"} & set(kinds) and "true" not in kinds:
                yield key, value, "must be a number, not a switch"
            yield from unfit_numbers(submodel(field.annotation) or item_model(field.annotation), value, key)


def closest_key(model: type[BaseModel], path: str) -> str | None:
    """The key that `path` was probably meant to be: one with a very similar name in the same part, else with the same
    name elsewhere, else with a similar one; None if nothing is near."""
    known: dict[str, None] = {}
    for key in keys(model):
        names = key.path.split(".")
        known |= {".".join(names[:count]): None for count in range(1, len(names) + 1)}
    part, _, last = path.rpartition(".")
    by_end: dict[str, list[str]] = {}
    for key in known:
        by_end.setdefault(key.rpartition(".")[2], []).append(key)
    beside = {key.rpartition(".")[2]: [key] for key in known if key.rpartition(".")[0] == part}
    for candidates, cutoff in ((beside, 0.75), (by_end, 1.0), (beside, 0.6), (by_end, 0.7)):
        if near := difflib.get_close_matches(last, candidates, n=1, cutoff=cutoff):
            return difflib.get_close_matches(path, candidates[near[0]], n=1, cutoff=0)[0]
    return None


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _kind(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if _is_union(annotation):
        return "|".join(_kind(part) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        parts = get_args(annotation)
        return f"[{_kind(parts[0])}, ...]" if parts[-1] is ... else f"[{', '.join(map(_kind, parts))}]"
    return {str: "text", bool: "true|false"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def shown(value: Any) -> str:
    """A value as one would type it."""
    if value is PydanticUndefined:
        return "(required)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)
