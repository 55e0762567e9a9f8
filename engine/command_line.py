"""The command line: dataclasses become flags, a recipe sets their defaults, flags win over the recipe."""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import TypeVar, get_args, get_type_hints

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from common import UserError
from engine.config import RunConfig, ScriptOptions
from engine.recipe import read_recipe

Config = TypeVar("Config", bound=ScriptOptions)
Listing = list[str] | Callable[[], Iterable[str]]
HELP = "help and listings"
TIMM = {"--sched": "--lr_schedule", "--model_ema": "--model_ema_decay=0.9998"}  # options of its scripts that differ
set_parsing_settings(import_path_denylist=["*"])  # a `class_path` in a recipe would import what it names


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the example commands, shows types and defaults."""


def parse(config_class: type[Config], usage: str, listings: dict[str, Listing], argv=None) -> Config:
    """The command line as an instance of `config_class`.

    Args:
        config_class: a dataclass whose docstring describes its fields under "Args:".
        usage: example commands, shown by --help.
        listings: lines to print for each flag --list_<key>, or a function that makes them when asked for.
        argv: arguments; default: those of the process.

    Raises:
        UserError: an unknown flag or recipe key (with the nearest known one), a value of the wrong type or outside
            its range, or a flag that the run's method does not read.
    """
    argv = [_from_timm(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    for name, values in listings.items():
        if f"--list_{name}" in argv:
            for value in values() if callable(values) else values:
                print(value, flush=True)
            raise SystemExit(0)
    recipes, argv = _split_off_recipes(argv)
    argv = _name_positional(argv, config_class)
    config_class = config_class.with_method(_method(config_class, recipes, argv))
    parser = _parser(config_class, usage, listings)
    known = {name for action in parser._actions for name in action.option_strings}
    if wanted := {"-h", "--help", "--help_all"} & set(argv):
        config = config_class(**({"method": _method(config_class, recipes, argv)} if config_class.rows() else {}))
        _print_help(parser, None if "--help_all" in wanted else _essential(config))
        raise SystemExit(0)
    _check_names(argv, recipes, known)
    typed = _given(argv)
    config = _instance(config_class, parser, recipes, _spell_out(argv, config_class), {*typed})
    _settle_unread(config, typed, recipes)
    for part in config_class.__mro__:
        if "check" in vars(part):
            part.check(config)
    return config


def _from_timm(argument: str) -> str:
    """A flag of timm's by its name here."""
    name, given, value = argument.partition("=")
    return TIMM.get(name, name) + given + value


def _split_off_recipes(argv: list[str]) -> tuple[dict[str, dict], list[str]]:
    """The recipes of --config by path, and the other arguments: they win wherever they stand."""
    recipes, rest, arguments = {}, [], iter(argv)
    for argument in arguments:
        name, given, value = argument.partition("=")
        if name == "--config":
            path = value if given else next(arguments, "")
            recipes[path] = read_recipe(path)
        else:
            rest.append(argument)
    return recipes, rest


def _name_positional(argv: list[str], config_class: type[ScriptOptions]) -> list[str]:
    """The words that no flag takes become the values of the option `positional`: a list's flag takes all that follow,
    a boolean's only true and false."""
    if config_class.positional is None:
        return argv
    kinds = {f"--{name}": str(hint) for name, hint in _field_types(config_class)}
    rest, words, taken = [], [], 0
    for argument in argv:
        if re.match(r"--?[a-z]", argument):
            name, given, _ = argument.partition("=")
            hint = kinds.get(name, "")
            taken = 0 if given or name in ("-h", "--help") else len(argv) if "list" in hint else 1
            choices = ("true", "false") if "bool" in hint else None
        elif taken and (choices is None or argument in choices):
            taken -= 1
        else:
            words.append(argument)
            taken = 0
            continue
        rest.append(argument)
    return [*rest, f"--{config_class.positional}", *words] if words else rest


def _method(config_class: type[ScriptOptions], recipes: dict[str, dict], argv: list[str]) -> str:
    """The --method of flags, else of recipes, else the default."""
    found = [getattr(config_class, "method", "")] + [
        recipe["method"] for recipe in recipes.values() if "method" in recipe
    ]
    for place, argument in enumerate(argv):
        name, given, value = argument.partition("=")
        if name == "--method":
            found.append(value if given else "".join(argv[place + 1 : place + 2]))
    return str(found[-1])


def _parser(config_class: type[ScriptOptions], usage: str, listings: dict[str, Listing]) -> ArgumentParser:
    """A group of options for each dataclass in `config_class`."""
    parser = ArgumentParser(
        description=usage,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        add_help=False,
        usage=f"%(prog)s {'RUN... ' if config_class.positional else ''}[options]",
    )
    groups, hints = {}, get_type_hints(config_class)
    described = {name: text for part in reversed(config_class.__mro__) for name, text in _descriptions(part).items()}
    for each in sorted(fields(config_class), key=lambda each: _rank(config_class, each.name)):
        title = _title(config_class, each.name)
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        kind = hints[each.name]
        if nested := _nested(kind):  # makes a group of its own, which has its help as its title
            group.add_argument(f"--{each.name}", type=nested, default=nested(), help=title)
            next(action for action in parser._actions if action.dest == each.name).help = described.get(each.name)
        else:
            group.add_argument(f"--{each.name}", type=kind, default=default_of(each), help=described.get(each.name))
    group = parser.add_argument_group(HELP)
    if config_class.essential is None:
        group.add_argument("-h", "--help", action="store_true", help="show the options")
    else:
        group.add_argument("-h", "--help", action="store_true", help="show the usual options and those of --method")
        group.add_argument("--help_all", action="store_true", help="show all options")
    group.add_argument("--config", help="recipe: a YAML file of these options")
    for name in listings:
        group.add_argument(f"--list_{name}", action="store_true", help=f"print the known {name} and stop")
    return parser


def _descriptions(part: type) -> dict[str, str]:
    """What a dataclass says of its fields under "Args:"."""
    return {
        each.arg_name: " ".join((each.description or "").split())
        for each in docstring_parser.parse(part.__doc__ or "").params
    }


def default_of(each: Field) -> object:
    """An option's default."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def _nested(kind: object) -> type | None:
    """The dataclass that a field's type is, or may be."""
    return next((part for part in get_args(kind) or (kind,) if is_dataclass(part)), None)


def _owner(config_class: type, name: str) -> type:
    return next(part for part in config_class.__mro__ if name in vars(part).get("__annotations__", {}))


def _readers(config_class: type[ScriptOptions], name: str) -> list[str]:
    """The methods that read an option."""
    rows = config_class.rows().items()
    return [method for method, parts in rows if any(name in part.__dataclass_fields__ for part in parts)]


def _title(config_class: type[ScriptOptions], name: str) -> str:
    readers = ", ".join(_readers(config_class, name)) or "of your own"
    return vars(_owner(config_class, name)).get("title", f"--method {readers}")


def _rank(config_class: type[ScriptOptions], name: str) -> int:
    """The script's options come first, then its methods', then those of every run."""
    owner = _owner(config_class, name)
    shared = RunConfig.__mro__
    return 2 + shared.index(owner) if owner in shared else int(not issubclass(owner, ScriptOptions))


def _essential(config: ScriptOptions) -> set[str] | None:
    if config.essential is None:
        return None
    return {*config.essential, *(each.name for part in config.chosen() for each in fields(part))}


def _print_help(parser: ArgumentParser, shown: set[str] | None) -> None:
    """Of the options `shown`; None: of all."""
    for action in parser._actions:
        if shown is not None and action.dest not in shown and action.container.title != HELP:
            action.help = argparse.SUPPRESS
    parser.print_help()


def _check_names(argv: list[str], recipes: dict[str, dict], known: set[str]) -> None:
    for argument in argv:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in known:
            raise UserError(f"unknown option {flag}{_nearest(flag, known)}")
        if parts := _parts(flag, known):
            raise UserError(f"{flag}: takes no value itself; give its parts: {', '.join(parts)}")
    for path, recipe in recipes.items():
        for key, value in recipe.items():
            if f"--{key}" not in known or key.startswith(("help", "config", "list_")):
                raise UserError(f"--config {path}: unknown key '{key}'{_nearest(f'--{key}', known)}")
            if value is None or not (parts := _parts(f"--{key}", known)):
                continue
            if not isinstance(value, dict):
                names = ", ".join(part.rpartition(".")[2] for part in parts)
                raise UserError(f"--config {path}: '{key}' cannot be {value!r}; it is a mapping of any of {names}")
            for part in value:
                if (flag := f"--{key}.{part}") not in parts:
                    raise UserError(f"--config {path}: unknown key '{key}.{part}'{_nearest(flag, known)}")


def _parts(flag: str, known: set[str]) -> list[str]:
    """The flags of the dataclass that an option is; none for any other option."""
    return sorted(name for name in known if name.startswith(f"{flag}.") and not name.endswith("+"))


def _nearest(flag: str, known: set[str]) -> str:
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; --help_all lists the options"


def _spell_out(argv: list[str], config_class: type) -> list[str]:
    """`--flag` alone is `--flag=true` for a boolean, `--list 1 2` is `--list=[1,2]` for a list."""
    kinds = {f"--{name}": hint for name, hint in _field_types(config_class)}
    spelled, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        values = []
        while rest and not re.match(r"--[a-z]", rest[0]):
            values.append(rest.pop(0))
        name, given, value = argument.partition("=")
        hint = str(kinds.get(name, ""))
        if given and "list" in hint:
            argument, values = name, [value]
        if "bool" in hint and not values and not given:
            argument += "=true"
        elif "list" in hint and values and not values[0].startswith("["):
            # Words are quoted, so that a path may hold what means something in a list.
            words = [json.dumps(word) for word in values] if "str" in hint else values
            argument, values = f"{argument}=[{','.join(words)}]", []
        spelled += [argument, *values]
    return spelled


def _field_types(config_class: type) -> list[tuple[str, object]]:
    """(dotted name, type) of every field, those of nested dataclasses included."""
    found = []
    for name, hint in get_type_hints(config_class).items():
        found.append((name, hint))
        if nested := _nested(hint):
            found += [(f"{name}.{inner}", inner_hint) for inner, inner_hint in _field_types(nested)]
    return found


def _instance(
    config_class: type[Config], parser: ArgumentParser, recipes: dict[str, dict], argv: list[str], given: set[str]
) -> Config:
    """The options of recipes and flags, each of its type; `given` are the flags' fields."""
    namespace, kinds = Namespace(), dict(_field_types(config_class))
    try:
        for path, recipe in recipes.items():
            for key, value in _flat(recipe):
                if value is None and key in kinds and type(None) not in get_args(kinds[key]):
                    raise UserError(f"--config {path}: '{key}' has no value; give it one, or leave the line out")
            recipe = {key: value for key, value in recipe.items() if value is not None}
            given = given | {key.partition(".")[0] for key in recipe}
            namespace = parser.parse_object(recipe, namespace, defaults=False)
        values = vars(parser.instantiate(parser.parse_args(argv, namespace)))
    except (ArgumentError, ImportError, TypeError, RecursionError) as error:
        raise UserError(_in_words(error)) from None
    for each in fields(config_class):
        value = values[each.name]
        if _nested(kinds[each.name]) and each.name not in given:
            values[each.name] = default_of(each)
        elif value == "" or (isinstance(value, list) and "" in value):
            raise UserError(f"--{each.name} '': is empty; give a value, or leave the option out")
    return config_class(**{each.name: values[each.name] for each in fields(config_class)})


def _flat(recipe: dict) -> Iterable[tuple[str, object]]:
    """The keys and values of a recipe; those of a mapping as `key.part`."""
    for key, value in recipe.items():
        yield key, value
        yield from ((f"{key}.{part}", each) for part, each in value.items()) if isinstance(value, dict) else ()


def _given(argv: list[str]) -> dict[str, str]:
    """The flags that were given, as they were typed, by the names of their fields."""
    found, name = {}, ""
    for argument in argv:
        if re.match(r"--[a-z]", argument):
            name = re.split(r"[=.+]", argument.removeprefix("--"))[0]
            found[name] = argument
        else:
            found[name] = f"{found.get(name, '')} {argument}"
    return found


def _settle_unread(config: ScriptOptions, typed: dict[str, str], recipes: dict[str, dict]) -> None:
    """Options that the run's method does not read: a flag is refused, a recipe's keeps its default and is named."""
    unread = unread_options(config)
    if refused := [name for name in typed if name in unread]:
        flags = ", ".join(f"{typed[name]} (for {_few(_readers(type(config), name))})" for name in refused)
        raise UserError(f"{flags}: not read by --method {config.method}; leave {'them' if refused[1:] else 'it'} out")
    config.unread = tuple(dict.fromkeys(key for recipe in recipes.values() for key in recipe if key in unread))
    set_to_defaults(config, config.unread)


def unread_options(config: ScriptOptions) -> set[str]:
    """The names of the options that only other methods than the run's read."""
    optional = {each.name for parts in config.rows().values() for part in parts for each in fields(part)}
    return optional - {each.name for part in config.chosen() for each in fields(part)}


def set_to_defaults(config: ScriptOptions, names: Iterable[str]) -> None:
    """Give some of the options their defaults."""
    for each in fields(config):
        if each.name in names:
            setattr(config, each.name, default_of(each))


def changed_options(config: ScriptOptions, config_class: type[ScriptOptions]) -> dict[str, object]:
    """The options of a script that are not at its defaults; `config` may have others besides."""
    usual = {each.name: default_of(each) for each in fields(config_class.with_method(config.method))}
    return {name: value for name, value in config.as_dict().items() if name in usual and value != usual[name]}


def flags(options: Mapping[str, object], prefix: str = "--") -> list[str]:
    """Options as arguments; those without a value are left out."""
    words = []
    for name, value in options.items():
        flag = f"{prefix}{name}"
        if isinstance(value, Mapping):
            words += flags(value, f"{flag}.")
        elif value is True:
            words.append(flag)
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)] if value else [f"{flag}=[]"]
        elif value is not None:
            words += [f"{flag}=false"] if value is False else [flag, str(value)]
    return words


def _few(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _in_words(error: Exception) -> str:
    """jsonargparse's account of a wrong value as one line: --name value: expected type."""
    message = re.sub(r"\s+", " ", str(error)).strip()
    value = r"(?:Got|Given) value: ?(.*?)(?: - Expected a .*)?$"
    simple = re.search(rf'Parser key "([^"]+)": Expected an? (.+?)\. {value}', message)
    union = re.search(rf'Parser key "([^"]+)": Does not validate .*?Subtypes: \[(.+?)\] .*{value}', message)
    match = simple or union
    if not match:  # what Python says of a number of 5000 digits ends with advice to programmers
        return re.sub(r'^Parser key "([^"]+)":', r"--\1:", message).partition("; use sys.")[0]
    name, wanted, got = match.groups()
    if simple and union:  # a field of an optional nested dataclass
        name = f"{union[1]}.{name}"
    wanted = re.sub(r"<class '(\w+)'>", r"\1", wanted).replace("NoneType", "null").replace("typing.Literal", "one of ")
    return f"--{name} {got or repr(got)}: expected {wanted}"
