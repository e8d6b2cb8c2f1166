"""A command's options: parsed by jsonargparse, whose complaints become one line that a person can act on."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import cache

from .errors import UserError, nearest_name
from .untrusted import check_recipe, check_yaml


def make_parser(prog: str, description: str | None):
    """A parser of one command."""
    from jsonargparse import ArgumentParser

    _look_at_yaml()
    # Options are not abbreviated: a launcher before ours would take prefixes for its own.
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)


@cache
def _look_at_yaml() -> None:
    """Have whatever jsonargparse takes for YAML looked at: recipes, strings in them, and files that these name."""
    from jsonargparse import get_loader, set_loader
    from yaml import YAMLError

    load = get_loader("yaml")

    def checked(text: str):
        try:
            check_yaml(text, "config")
        except UserError as error:
            raise YAMLError(str(error)) from error  # so that it stays text where a text is expected
        return load(text)

    set_loader("yaml", checked, exceptions=(YAMLError,))


def add_recipe(parser) -> None:
    """The option ``--config``, whose file is looked at before the parser reads it."""
    from jsonargparse import ActionConfigFile

    from .places import owner, read_recipe, read_settings

    class Recipe(ActionConfigFile):
        def __call__(self, parser, settings, value, option_string=None):
            check_recipe(value)
            super().__call__(parser, settings, value, option_string)
            if owner(value):
                written, found = read_settings(value), read_recipe(value)
                for name in (name for name in found if found[name] != written.get(name)):  # lies elsewhere now
                    settings[name] = found[name]

    parser.add_argument("--config", action=Recipe, help="a recipe (YAML); later options replace its settings")


def parse(parser, arguments: Sequence[str]) -> dict:
    """Parsed settings with dataclasses built; a mistake names the nearest option."""
    if sum(argument.split("=")[0] == "--critic" for argument in arguments) > 1:  # the last one would count alone
        takes_list = parser.prog.split()[1] in ("evaluate", "inspect", "play")
        several = "--critic A B" if takes_list else "--critic '[A, B]'"
        raise UserError(f"critic is given more than once; expected {several} for several")
    return _parsed(parser, lambda: parser.parse_args(list(arguments)))


def parse_settings(parser, nested: dict) -> dict:
    """The same of settings that are nested as in a recipe, not written on a command line."""
    return _parsed(parser, lambda: parser.parse_object(nested))


def _parsed(parser, read: Callable) -> dict:
    try:
        settings = read()
    except ArgumentError as error:
        raise UserError(_explain(error, parser)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"config is not UTF-8 text ({one_line_of(error)}); expected YAML") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # numbers and nesting that the parser does not expect
        raise UserError(f"config cannot be read ({one_line_of(error)}); expected settings by name") from error
    # Outer ones before those in them.
    optional = {action.dest for action in parser._actions if action.default is None}  # such a group may be null
    for group in sorted({action.dest.rpartition(".")[0] for action in parser._actions if "." in action.dest}):
        is_left_out = settings[group] is None and group in optional
        if (
            not hasattr(settings[group], "as_dict") and not is_left_out
        ):  # which the parser lets pass, and fails on later
            raise UserError(f"{group} is {settings[group]!r}; expected its settings by name")
    return parser.instantiate(settings).as_dict()


def option_in(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option before the arguments are parsed, the last as for the parser; None where there is none."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument.split("=")[0] == name:
            found = argument.partition("=")[2] if "=" in argument else following
    return found


def _explain(error: ArgumentError, parser) -> str:
    """The parser's complaint in one line: the field, what was found, what is accepted or the nearest known option."""
    message = one_line_of(error)
    if wrong := re.match(r'Parser key "([\w.]+)": (.*)(?:Given value:|Got value:) (.*)$', message):
        field, reasons, value = wrong.groups()
        reasons = reasons.split("Given value type")[0]
        types = dict.fromkeys(re.findall(r"<class '(?:\w+\.)*(\w+)'>|Literal\[(.*?)\]", reasons))
        accepted = " or ".join(name or choices for name, choices in types) or reasons.strip()
        return f"{field} is {value!r}; expected {accepted.replace('NoneType', 'null')}"
    if wrong := re.match(r'Parser key "([\w.]+)": Unable to load config', message):
        raise UserError(f"{wrong[1]} is no file and no setting; expected its settings by name, as {wrong[1]}.NAME")
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


def one_line_of(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
