# SPDX-License-Identifier: Apache-2.0
"""Policies by name: how a comparison, a command line or a file asks for one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from disca.cache.policy import CachePolicy, Resources
from disca.data.source import closest
from disca.errors import UserError

__all__ = ["POLICIES", "build_policy", "parse_spec", "policy_class"]

POLICIES: dict[str, str] = {
    "none": "disca.cache.none:NoCache",
    "cfg": "disca.cache.guided:Guided",
    "disca": "disca.cache.disca:LearnedPredictor",
    "reuse": "disca.cache.reuse:Reuse",
    "fora": "disca.cache.fora:Fora",
    "delta-dit": "disca.cache.delta_dit:DeltaDiT",
    "pab": "disca.cache.pab:PyramidAttentionBroadcast",
    "deepcache": "disca.cache.deepcache:DeepCache",
    "first-block": "disca.cache.first_block:FirstBlockCache",
    "adacache": "disca.cache.adacache:AdaCache",
    "taylorseer": "disca.cache.taylorseer:TaylorSeer",
    "predit": "disca.cache.predit:PrediT",
    "easycache": "disca.cache.easycache:EasyCache",
    "teacache": "disca.cache.teacache:TeaCache",
    "magcache": "disca.cache.magcache:MagCache",
    "icc": "disca.cache.icc:Icc",
}
"""Name to "module:class". A new policy is its own file and one line here."""

_FROM_RESOURCES = {"predictor": str}
"""Settings that name something of the resources instead of being an argument of the class."""


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``"name:key=value,key=value"`` into name and settings; values are read as YAML.

    Example::

        parse_spec("fora:interval=6")     # ("fora", {"interval": 6})
        parse_spec("reuse:full_steps=[0, 1, 5, 9]")

    Raises:
        UserError: it cannot be read.
    """
    name, _, text = spec.partition(":")
    if not text.strip():
        return name.strip(), {}
    try:
        settings = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError:
        settings = {"": None}
    names = re.findall(r"(?:^|,)\s*([^,=]+?)\s*=", re.sub(r"\[.*?\]|\{.*?\}", "", text))
    twice = sorted({key for key in names if names.count(key) > 1})
    if twice:
        raise UserError(f"the policy {spec!r} gives the setting {twice[0]!r} twice")
    if any(not (isinstance(key, str) and key) or value is None for key, value in settings.items()):
        raise UserError(
            f"cannot read the policy {spec!r}; write name:setting=value,setting=value, for example "
            "taylorseer:interval=6,order=1"
        )
    return name.strip(), settings


def policy_class(name: str) -> type[CachePolicy]:
    """Return the class of a policy.

    Raises:
        UserError: no policy of this name.
    """
    if name not in POLICIES:
        raise UserError(
            f"unknown policy {name!r}; there are: {', '.join(POLICIES)}"
            + closest(name, list(POLICIES))
        )
    module, _, attribute = POLICIES[name].partition(":")
    found: type[CachePolicy] = getattr(import_module(module), attribute)
    return found


def build_policy(
    spec: str, resources: Resources, changes: Mapping[str, Any] | None = None
) -> CachePolicy:
    """Build a policy from its name and settings.

    Args:
        spec: ``"name"`` or ``"name:setting=value,..."``; the settings are the arguments of the
            policy's class.
        resources: what the settings may name.
        changes: further settings.

    Raises:
        UserError: an unknown policy or setting, a missing one, or a value of the wrong type.
    """
    name, settings = parse_spec(spec)
    settings |= dict(changes or {})
    cls = policy_class(name)
    accepted = _settings(cls)
    for key, value in settings.items():
        if key not in accepted:
            raise UserError(
                f"policy {name!r} has no setting {key!r}; it has: "
                f"{', '.join(accepted) or 'none'}{closest(key, list(accepted))}"
            )
        try:
            settings[key] = TypeAdapter(accepted[key]).validate_python(value)
        except ValidationError as error:
            # One for each type that would do.
            reasons = dict.fromkeys(found["msg"] for found in error.errors(include_url=False))
            reason = "; or: ".join(reasons)
            raise UserError(f"policy {name!r}, setting {key!r}: {reason}, got {value!r}") from error
    try:
        return cls.from_settings(resources, **settings)
    except TypeError as error:
        missing = [
            key
            for key, parameter in inspect.signature(cls).parameters.items()
            if parameter.default is inspect.Parameter.empty
            and key in accepted
            and key not in (*settings, *_FROM_RESOURCES)
        ]
        if not missing:
            raise
        raise UserError(
            f"policy {name!r} needs the setting {missing[0]!r}, for example {name}:{missing[0]}=..."
        ) from error


def _settings(cls: type[CachePolicy]) -> dict[str, Any]:
    """Return the settings that a text can give, with their types.

    Those are the arguments whose annotation the module can evaluate when it runs; what it imports
    for the type checker alone, such as a network, comes from the resources.
    """
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in _FROM_RESOURCES:
            found[name] = _FROM_RESOURCES[name]
            continue
        try:
            found[name] = _evaluate(parameter.annotation, cls)
        except NameError:
            continue
    return found


def _evaluate(annotation: Any, cls: type[CachePolicy]) -> Any:
    def carrier() -> None: ...

    carrier.__annotations__ = {"value": annotation}
    return get_type_hints(carrier, globalns=cls.__init__.__globals__)["value"]
