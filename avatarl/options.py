"""A command's options: those of a public function, parsed by jsonargparse; a mistake becomes one line to act on."""

from __future__ import annotations

import dataclasses
import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import get_args, get_origin, get_type_hints

from .errors import UserError, nearest_name
from .places import read_recipe, read_settings


def make_parser(prog: str, description: str | None):
    """Return a parser of one command."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    # A recipe may name no module for the parser to import but those with the settings' own classes.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["avatarl"])

    class Help(DefaultHelpFormatter):
        """Help without the markup of docstrings, and without a default that is None."""

        def _get_help_string(self, action) -> str:
            text = re.sub(r":\w+:`[~.]?([^`]*)`", r"\1", super()._get_help_string(action)).replace("``", "")
            return text.replace(", default: %(default)s", "") if action.default is None else text

        def _format_action_invocation(self, action) -> str:
            return super()._format_action_invocation(action).replace(" \b", "")

    # Options may not be abbreviated: a launcher in front of this command would take prefixes for its own options.
    return ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, formatter_class=Help
    )


def add_function(
    parser, function: Callable, positional: str = "", skip: Collection[str] = (), names: Mapping[str, str] | None = None
) -> tuple[str, type] | None:
    """Add a function's parameters as options: types and defaults from its signature, help from its docstring.

    A required dataclass of settings stands for its fields, which a recipe may hold; an optional one is a group of its
    name. A list takes several values. A flag that is off by default takes none.

    Args:
        parser: Where to add them.
        function: A function with type hints and a docstring with ``Args:``.
        positional: The parameter that is given without its name.
        skip: Parameters that are no options.
        names: Options whose name differs from the parameter's.

    Returns:
        The required dataclass: the parameter's name and the class.
    """
    from docstring_parser import parse as parse_docstring

    help_of = {each.arg_name: each.description for each in parse_docstring(function.__doc__ or "").params}
    types, config = get_type_hints(function), None
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip:
            continue
        kind, is_required = types[name], parameter.default is parameter.empty
        kinds = get_args(kind) or (kind,)
        if settings := next(filter(dataclasses.is_dataclass, kinds), None):
            if is_required:
                config = name, settings
                _add_recipe(parser)
            parser.add_class_arguments(settings, None if is_required else name)
            continue
        option = {"help": help_of[name]}
        name = (names or {}).get(name, name)
        if kind is bool and parameter.default is False:
            option["action"] = "store_true"
        else:
            option["type"] = str if str in kinds else kind
            if any(get_origin(each) in (Sequence, list) for each in (kind, *kinds)):
                option |= {"nargs": "+", "type": str}
            if not is_required:
                option["default"] = parameter.default
        if name == positional:
            option |= {} if is_required else {"nargs": "?"}
        else:
            name = f"--{name}"
            option |= {"required": True} if is_required else {}
        parser.add_argument(name, **option)
    return config


def _add_recipe(parser) -> None:
    """Add the option ``--config``, whose paths are looked for where a run or comparison lies now."""
    from jsonargparse import ActionConfigFile

    class Recipe(ActionConfigFile):
        def __call__(self, parser, settings, value, option_string=None):
            written, found = read_settings(value), read_recipe(value)
            super().__call__(parser, settings, value, option_string)
            for name in (name for name in found if found[name] != written.get(name)):
                settings[name] = found[name]

    parser.add_argument(
        "--config",
        action=Recipe,
        help="A recipe (YAML). Later options, and later recipes, replace its settings.",
    )


def parse(parser, arguments: Sequence[str]) -> dict:
    """Parse a command line into settings by name; a group of a dataclass becomes one.

    Raises:
        UserError: naming the setting, its value and what is accepted, or the nearest known setting.
    """
    if sum(argument.split("=")[0] == "--critic" for argument in arguments) > 1:  # the parser would use the last one
        (critic,) = (action for action in parser._actions if action.dest == "critic")
        several = "--critic A B" if critic.nargs == "+" else "--critic '[A, B]'"
        raise UserError(f"critic is given more than once; expected {several} for several")
    return parser.instantiate(_checked(parser, lambda: parser.parse_args(list(arguments)))).as_dict()


def parse_settings(parser, nested: dict) -> dict:
    """Parse settings that are nested as in a recipe, as :func:`parse` does those of a command line."""
    return parser.instantiate(_checked(parser, lambda: parser.parse_object(nested))).as_dict()


def _checked(parser, read: Callable):
    try:
        settings = read()
    except ArgumentError as error:
        raise UserError(_explain(error, parser)) from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # numbers and nesting that the parser does not expect
        raise UserError(f"config cannot be read ({error}); expected settings by name") from error
    # The parser accepts a group that is not one. Outer groups come before those within them.
    optional = {action.dest for action in parser._actions if action.default is None}
    for group in sorted({action.dest.rpartition(".")[0] for action in parser._actions if "." in action.dest}):
        if not hasattr(settings[group], "as_dict") and not (settings[group] is None and group in optional):
            raise UserError(f"{group} is {settings[group]!r}; expected its settings by name")
    return settings


def _explain(error: ArgumentError, parser) -> str:
    """Say in one line which field is wrong, what was found, and what is accepted or the nearest known option."""
    message = " ".join(str(error).split())
    if wrong := re.match(r'Parser key "([\w.]+)": (.*)(?:Given value:|Got value:) (.*)$', message):
        field, reasons, value = wrong.groups()
        reasons = reasons.split("Given value type")[0]
        types = dict.fromkeys(re.findall(r"<class '(?:\w+\.)*(\w+)'>|Literal\[(.*?)\]", reasons))
        accepted = " or ".join(name or choices for name, choices in types) or reasons.strip()
        return f"{field} is {value!r}; expected {accepted.replace('NoneType', 'null')}"
    if wrong := re.match(r'Parser key "([\w.]+)": Unable to load config', message):
        return f"{wrong[1]} is neither a file nor a setting; expected its settings by name, as {wrong[1]}.NAME"
    unknown = re.search(
        r"unrecognized arguments: --([\w.]+)|(?:Group|Key) '([\w.]+)' does not accept option '([\w.]+)'"
        r"|[Oo]ption '([\w.]+)'",
        message,
    )
    if unknown is None:
        return message
    name = ".".join(part for part in unknown.groups() if part)
    known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    return f"{name} is not a setting of {parser.prog}{nearest_name(name, known)}"
