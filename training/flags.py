"""Command-line flags and configurations from the fields of frozen dataclasses.

A field is declared once, by `option`: its name is the flag's, `--help` shows its default and help, and it says whether
it may change when a run is continued. A configuration is a frozen dataclass whose fields are such sections. Nothing
here imports PyTorch, so that a mistyped flag is answered at once.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, get_type_hints

from data_handlers.datasets import DATA_SETS, printed_description
from utils.errors import UserError

Section = TypeVar("Section")
Size = tuple[int, int]
LARGEST = 1e15  # the bound refuses NaN, infinity and integers that no float can hold


def option(
    default: Any,
    help: str,
    *,
    type: Callable[[str], Any] | None = None,
    nargs: int | str | None = None,
    choices: Sequence[Any] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    required: bool = False,
    may_change: bool = False,
    hidden: bool = False,
    keywords: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field that is a flag.

    Args:
        type: makes one value of its text; by default the type of `default`. A `UserError` of it is the answer.
        nargs: as in argparse; several values become a tuple.
        required: `section_from` refuses an empty value.
        may_change: a continued run may be given another value, as the result does not depend on it, or the machine
            decides it.
        hidden: `--help` does not show the flag.
        keywords: the value is a path, which becomes absolute, unless it is one of these words or empty.
    """
    metadata = {
        "help": help, "type": type or default.__class__, "nargs": nargs, "choices": choices, "metavar": metavar,
        "required": required, "may_change": may_change, "hidden": hidden, "keywords": keywords,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def path_option(default: Any, help: str, *, keywords: tuple[str, ...] = (), metavar: str = "PATH", **more: Any) -> Any:
    """An `option` whose value is a path."""
    return option(default, help, keywords=keywords, metavar=metavar, **more)


def size_option(help: str) -> Any:
    """An `option` of a width and a height, None until the configuration resolves it."""
    return option(None, help, type=int, nargs=2, metavar=("W", "H"))


def data_set_option(default: str, help: str) -> Any:
    """An `option` that names a data set (`find_data_set`)."""
    kinds = f"{', '.join(DATA_SETS)}, a description (.toml), or a folder of pictures"
    return path_option(default, f"{help}: {kinds}", keywords=tuple(DATA_SETS), metavar="NAME|FILE|DIR")


class PrintData(argparse.Action):
    """Prints the description of a data set and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        print(printed_description(arguments[1]), end="")
        parser.exit()


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--weight-decay" if name == "weight_decay" else f"--{name}"


class Parser(argparse.ArgumentParser):
    """Raises `UserError` for a bad command line.

    Attributes:
        spellings: its flags by their names with `_` in place of `-`; `parse` takes both alike.
    """

    def __init__(self, description: str | None) -> None:
        self.spellings: dict[str, str] = {}
        super().__init__(
            description=description, usage="python %(prog)s [flags]", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def options_of(*sections: type) -> dict[str, dataclasses.Field]:
    """The fields of the sections by name."""
    return {field.name: field for section in sections for field in dataclasses.fields(section)}


def build_parser(description: str | None, groups: Mapping[str, Sequence[type]], first: Sequence[str] = ()) -> Parser:
    """A parser of every field of the sections.

    Args:
        groups: sections by the title that `--help` shows.
        first: the flags that matter most, shown before all others.
    """
    parser = Parser(description)
    options = options_of(*(section for sections in groups.values() for section in sections))
    shown = {"the flags that matter most": list(first)} if first else {}
    for title, sections in groups.items():
        shown[title] = [name for name in options_of(*sections) if name not in first]
    for title, names in shown.items():
        group = parser.add_argument_group(title)
        for name in names:
            added = _add(group.add_argument, options[name])
            parser.spellings |= {_underscored(flag): flag for flag in added.option_strings}
    if options.keys() & {"source", "data_set"}:
        parser.add_argument_group("data sets").add_argument(
            "--print_data", action=PrintData, metavar="NAME", help="print the description of a data set, and end"
        )
    return parser


def _underscored(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_")


def _add(add_argument: Callable[..., Any], field: dataclasses.Field) -> argparse.Action:
    option = field.metadata
    names = dict.fromkeys([flag_of(field.name), f"--{field.name}"])  # both spellings where they differ
    default = shown_default(field)
    text = (option["help"] + (f" (default: {default})" if default else "")).replace("%", "%%")  # argparse formats it
    text = argparse.SUPPRESS if option["hidden"] else text
    if option["type"] is bool:
        action = argparse.BooleanOptionalAction if option["may_change"] or field.default else "store_true"
        return add_argument(*names, dest=field.name, action=action, help=text)
    metavar = option["metavar"] or (None if option["choices"] else {int: "N", float: "X"}.get(option["type"], "NAME"))
    return add_argument(
        *names, dest=field.name, type=option["type"], nargs=option["nargs"], choices=option["choices"], metavar=metavar,
        help=text,
    )  # fmt: skip


def shown_default(field: dataclasses.Field) -> str:
    """The default for a reader; '' where there is none, or where the help says it."""
    default = field.default
    if default in (None, "", False, (), 0) or "(default" in field.metadata["help"]:
        return ""
    return f"{default:.4g}" if isinstance(default, float) else as_given(default)


def parse(parser: Parser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The flags on the command line by field name, several values as a tuple; flags that are not given are missing.

    `-` and `_` within the name of a flag are the same. The value of `--preset` is a mapping of flags to values, which
    count as given, unless others are.

    Raises:
        UserError: an unknown flag, a value of the wrong kind, or one that is not UTF-8.
    """
    arguments, flag = sys.argv[1:] if arguments is None else arguments, ""
    for argument in arguments:
        flag = argument.partition("=")[0] if argument.startswith("--") else flag
        # Checkpoints, manifests and messages are UTF-8; Python passes on other bytes as lone surrogates.
        if argument.encode("utf-8", "replace").decode() != argument:
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise UserError(f"{flag} {shown}: not UTF-8; rename the file or folder")
    values = vars(parser.parse_args([_spelled(argument, parser.spellings) for argument in arguments]))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    preset = given.pop("preset", {})
    alien = " ".join(flag_of(name) for name in preset if f"--{name}" not in parser.spellings)
    check(not alien, f"--preset: --method {given.get('method')} does not have {alien}, which it sets; omit one of both")
    return {**preset, **given}


def _spelled(argument: str, spellings: Mapping[str, str]) -> str:
    """The argument with the name of a flag as the parser knows it."""
    name, equals, value = argument.partition("=")
    return f"{spellings.get(_underscored(name), name)}{equals}{value}" if name.startswith("--") else argument


def section_from(section: type[Section], flags: Mapping[str, Any]) -> Section:
    """A section with the given values, paths made absolute, and defaults for the rest.

    Raises `UserError`: a required flag is missing or empty, or the section refuses a value.
    """
    values = {}
    for name, field in options_of(section).items():
        value = flags.get(name, field.default)
        check(bool(value) or not field.metadata["required"], f"{flag_of(name)} is required (see --help)")
        keywords = field.metadata["keywords"]
        if keywords is not None and isinstance(value, tuple):
            check(all(value), f"{flag_of(name)} names an empty path")
            value = tuple(os.path.abspath(os.path.expanduser(path)) for path in value)
        elif keywords is not None and value and value not in keywords:
            value = os.path.abspath(os.path.expanduser(value))
        values[name] = value
    return section(**values)


class Config:
    """Base of configurations: frozen dataclasses of sections.

    A subclass declares `groups`, the sections of `--help` by title, `first`, the flags shown first, and `resolve`.
    """

    groups: ClassVar[Mapping[str, Sequence[type]]] = {}
    first: ClassVar[Sequence[str]] = ()

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """Raise `UserError` for flags on the command line that contradict each other or have no effect."""

    @classmethod
    def resolve(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """Replace values such as None or `auto` where the other flags decide them."""
        return flags

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Any:
        """The configuration for the given flags. Raises `UserError` for values out of range and contradictions."""
        defaults = {n: f.default for section in cls._sections().values() for n, f in options_of(section).items()}
        resolved = cls.resolve({**defaults, **flags})
        return cls(**{name: section_from(section, resolved) for name, section in cls._sections().items()})

    @classmethod
    def _sections(cls) -> dict[str, type]:
        types = get_type_hints(cls)
        return {field.name: types[field.name] for field in dataclasses.fields(cls)}

    def flags(self) -> dict[str, Any]:
        """The values of all fields by name."""
        sections = (getattr(self, field.name) for field in dataclasses.fields(self))
        return {n: getattr(section, n) for section in sections for n in options_of(type(section))}

    def may_change(self, name: str) -> bool:
        """Whether the flag of this name may differ when a run is continued."""
        return bool(options_of(*self._sections().values())[name].metadata["may_change"])

    def to_json(self) -> dict[str, Any]:
        """Nested plain values for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], origin: Path | str) -> Any:
        """The configuration that `to_json` made. Raises `UserError`, which names `origin`, for other content."""
        try:
            sections = {}
            for name, section in cls._sections().items():
                values = {k: tuple(v) if isinstance(v, list) else v for k, v in content[name].items()}
                _check_choices(section, values)
                sections[name] = section(**values)
            return cls(**sections)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{origin}: written by another version of this toolkit ({error}); finish the run with that version, or "
                "start a new one"
            ) from None

    def continued(self, given: Mapping[str, Any]) -> Any:
        """This configuration with the given flags. Raises `UserError` for one that a continued run may not change."""
        started = self.flags()
        changed = ", ".join(flag_of(n) for n, v in given.items() if v != started[n] and not self.may_change(n))
        try:
            wanted = type(self).from_flags({**started, **given})
        except UserError as error:
            raise UserError(f"{changed} changes the run's configuration: {error}" if changed else error) from None
        for name, value in wanted.flags().items():
            if value != started[name] and not self.may_change(name):
                # Another flag may decide this one, as --batch_size decides --batch_size_list.
                cause = flag_of(name) if name in given or not changed else changed
                raise UserError(
                    f"{cause}: the run was started with {as_given(started[name])}, the command line says "
                    f"{as_given(value)}; a continued run keeps its configuration: remove the flag or start a new run"
                )
        return wanted


def as_given(value: Any) -> str:
    """A value as it is given on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check(condition: bool, message: str) -> None:
    """Raise `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_positive(section: object, *names: str) -> None:
    """Raise `UserError` unless these fields of a section are greater than 0, or None."""
    _check_bounds(section, names, "greater than 0", lambda value: value > 0)


def check_not_negative(section: object, *names: str) -> None:
    """Raise `UserError` unless these fields of a section are 0 or greater, or None."""
    _check_bounds(section, names, "0 or greater", lambda value: value >= 0)


def _check_bounds(section: object, names: Sequence[str], words: str, holds: Callable[[float], bool]) -> None:
    for name in names:
        value = getattr(section, name)
        fits = value is None or all(holds(v) and v < LARGEST for v in (value if isinstance(value, tuple) else (value,)))
        check(fits, f"{flag_of(name)} is {as_given(value)[:20]}; it must be {words} and below {LARGEST:g}")


def _check_choices(section: type, values: Mapping[str, Any]) -> None:
    """Raise `UserError` for a value read from a file that is none of the choices; a parser checks its own."""
    for name, field in options_of(section).items():
        choices = field.metadata["choices"] or ()
        known = not choices or values.get(name, field.default) in (*choices, field.default)
        check(known, f"{flag_of(name)} {values.get(name)}: must be one of {', '.join(map(str, choices))}")
