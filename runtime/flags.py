"""A dataclass of settings that is the command line and the record of a run at once: a default, a line of help and
bounds for each field."""

from dataclasses import field, fields

from runtime.process import UserError


BOUNDS = {"at_least": lambda value, bound: value >= bound, "above": lambda value, bound: value > bound,
          "at_most": lambda value, bound: value <= bound, "below": lambda value, bound: value < bound}


def flag(default, help, **options):
    """A field that is also a flag. options: its bounds (see BOUNDS), and what argparse's add_argument takes."""
    bounds = {name: options.pop(name) for name in BOUNDS if name in options}
    return field(default=default, metadata={"argument": {"help": help, **options}, "bounds": bounds})


def flag_name(name):
    return "--" + name.replace("_", "-")


def spelled(value):
    return " ".join(value) if isinstance(value, tuple) else str(value)


def add_flags(parser, settings_class):
    """Adds a flag for each field to an argparse parser."""
    for setting in fields(settings_class):
        options = dict(setting.metadata["argument"])
        if setting.default not in ("", (), None):
            options["help"] += f" (default: {spelled(setting.default)})"
        if "action" not in options:
            options["type"] = str if isinstance(setting.default, tuple) else type(setting.default)
        parser.add_argument(flag_name(setting.name), **options)


def check_bounds(settings):
    """Raises UserError for a number of a settings object that is outside its bounds. 2**31 bounds all that have
    others, and a seed may be as large as numpy takes."""
    for setting in fields(settings):
        check_number(setting.name, getattr(settings, setting.name), **setting.metadata["bounds"])


def check_number(name, value, **bounds):
    """Raises UserError where a value is outside its bounds; NaN is outside all of them."""
    if bounds:
        bounds.setdefault("below", 2 ** 31)
    if not all(BOUNDS[kind](value, bound) for kind, bound in bounds.items()):
        expected = ", ".join(f"{kind.replace('_', ' ')} {bound}" for kind, bound in bounds.items())
        raise UserError(f"{flag_name(name)} is {value}; expected a number {expected}")
