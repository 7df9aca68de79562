"""Parameter files: YAML read strictly, with errors that name the key, the value got and what to do."""

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

__all__ = ["nearest", "parse_section", "read_sections"]

Section = TypeVar("Section", bound=BaseModel)


def read_sections(path: Path | str) -> dict[str, Any]:
    """The sections of a parameter file. ValueError when it is missing, not YAML or not a mapping."""
    try:
        sections = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; run from the repository root, or name a parameter file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}; correct it") from None
    if not isinstance(sections, dict):
        raise ValueError(f"{path} holds {type(sections).__name__}, expected sections such as 'model:' and 'runs:'")
    return sections


def parse_section(config: type[Section], value: Any, key: str, source: Path | str) -> Section:
    """``value`` as a ``config``. ValueError, one line for each fault, with the key's full path below ``key``.

    Stricter than pydantic: a boolean is no number, and no number is infinite or NaN.
    """
    try:
        parsed = config.model_validate(value)
    except ValidationError as error:
        # A discriminated union reports one fault once; a plain union reports it for every member.
        lines = dict.fromkeys(_describe(config, value, key, fault) for fault in error.errors(include_url=False))
        raise ValueError("\n".join(f"{source}: {line}" for line in lines)) from None
    if faults := list(_no_numbers(value, parsed, key)):
        raise ValueError("\n".join(f"{source}: {fault}" for fault in faults))
    return parsed


def _no_numbers(given: Any, parsed: Any, path: str) -> Iterator[str]:
    """What pydantic took for a number though it is none: YAML reads ``yes`` as true and ``.inf`` as infinity."""
    if isinstance(parsed, BaseModel):
        parsed = dict(parsed)
    if isinstance(given, Mapping) and isinstance(parsed, Mapping):
        for name in given.keys() & parsed.keys():
            yield from _no_numbers(given[name], parsed[name], f"{path}.{name}" if path else str(name))
    elif isinstance(given, list | tuple) and isinstance(parsed, list | tuple):
        for i, (one, other) in enumerate(zip(given, parsed, strict=False)):
            yield from _no_numbers(one, other, f"{path}.{i}")
    elif isinstance(given, bool) and type(parsed) in (int, float):
        yield f"{path} = {given!r}: input should be a number"
    elif isinstance(parsed, float) and not math.isfinite(parsed):
        yield f"{path} = {given!r}: input should be a finite number"


def nearest(name: str, known: Sequence[str]) -> str:
    """What to write instead of an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean '{close[0]}'? (known: {', '.join(known)})"
    return f"choose one of: {', '.join(known)}" if known else "remove it"


def _describe(config: type[BaseModel], value: Any, key: str, fault: Mapping[str, Any]) -> str:
    location = _keys_in(value, fault["loc"], missing=fault["type"] == "missing")
    path = ".".join(part for part in (key, *map(str, location)) if part)
    if fault["type"] == "extra_forbidden":
        advice = nearest(str(location[-1]), _fields(config, location))
        return f"{path} is not a parameter (got {fault['input']!r}); {advice}"
    if fault["type"] == "missing":
        return f"{path} is missing; add it"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if fault["type"] in ("value_error", "assertion_error"):
        return message if path in message or not path else f"{path}: {message}"
    return f"{path} = {fault['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_in(value: Any, location: Sequence[Any], *, missing: bool) -> list[Any]:
    """The parts of an error's location that are keys of the file, not names of union members."""
    keys = []
    for i, part in enumerate(location):
        if (isinstance(value, Mapping) and part in value) or (
            isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        ):
            value = value[part]
        elif not (missing and i == len(location) - 1):
            continue
        keys.append(part)
    return keys


def _fields(config: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names that are known where the last key of ``location`` stands."""
    models = [config]
    for part in location[:-1]:
        inner = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [found for annotation in inner for found in _models(annotation)] or models
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, list, dict, tuple):
        for argument in get_args(annotation):
            yield from _models(argument)
