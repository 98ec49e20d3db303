"""Arguments of the verbs that take a few settings and no recipe: the same key=value form, checked by OmegaConf."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import MissingMandatoryValue, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from moba_train.resolved import describe

T = TypeVar("T", bound=Any)


def parse(schema: type[T], arguments: list[str], usage: str) -> T:
    """``key=value`` arguments as a ``schema`` dataclass.

    Raises:
        ValueError: an argument that is no key=value, an unknown key, a wrong type, or a missing key that must be given.
    """
    for argument in arguments:
        if "=" not in argument:
            raise ValueError(f"{argument!r} is not key=value: moba-train {usage}")
        try:
            OmegaConf.from_dotlist([argument])
        except YAMLError:
            raise ValueError(f"{argument} cannot be read: close its brackets and quotes") from None
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(arguments))
        values = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = str(error).splitlines()[0].split(": ")[-1]
        raise ValueError(f"{key} is not given: moba-train {usage}") from None
    except ConfigKeyError as error:
        known = ", ".join(field.name for field in fields(schema))
        raise ValueError(f"{error.full_key} is unknown: choose from {known}") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{describe(error)}: moba-train {usage}") from None
    assert isinstance(values, schema)
    return values
