"""YAML text as a tree of mappings, lists and letters.

    parse_yaml("run: {dir: 0042, steps: 5}") == {"run": {"dir": "0042", "steps": "5"}}

No value is converted: `off` and `0042` stay as written, and convert.py knows what a setting must be. Aliases, tags and
repeated keys are errors. The text is read event by event up to limits of depth and number, so that no text takes long.
"""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from megasora.errors import MegaSoraError

MAX_DEPTH = 16
MAX_EVENTS = 20_000  # keys, values, starts and ends
NOT_ACCEPTED = {"*": "YAML aliases (*name) are not accepted", "!": "YAML tags (!name) are not accepted"}

Tree = dict[str, "Tree"] | list["Tree"] | str


class LettersDumper(yaml.SafeDumper):
    """Writes text without the quotes that keep YAML from reading it as a number or a bool."""

    yaml_implicit_resolvers: dict = {}


def parse_yaml(text: str, source: str) -> Tree:
    """The one document in `text`; "" if there is none. Raises MegaSoraError, which begins with `source`."""
    events = checked_events(text, source)
    try:
        tree: Tree = ""
        for event in events:
            if isinstance(event, yaml.NodeEvent):
                tree = build_tree(event, events, source, "")
    except yaml.YAMLError as error:
        raise MegaSoraError(f"{source} is not valid YAML: {describe(error)}") from None
    return tree


def checked_events(text: str, source: str) -> Iterator[yaml.Event]:
    depth, documents = 0, 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise MegaSoraError(f"{source}: {NOT_ACCEPTED['*']}; write the value out")
        if getattr(event, "tag", None) is not None:
            raise MegaSoraError(f"{source}: {NOT_ACCEPTED['!']}; write the value alone")
        if documents > 1:
            raise MegaSoraError(f"{source} is not valid YAML: expected a single document")
        if depth > MAX_DEPTH:
            raise MegaSoraError(f"{source}: nested more than {MAX_DEPTH} deep; a configuration has sections of keys")
        if number > MAX_EVENTS:
            raise MegaSoraError(f"{source}: more than {MAX_EVENTS} keys and values; give only those that you change")
        yield event


def build_tree(event: yaml.Event, events: Iterator[yaml.Event], source: str, prefix: str) -> Tree:
    """The node that starts with `event`. `prefix`: its dotted key with a dot, "" for the root."""
    if isinstance(event, yaml.ScalarEvent):
        return event.value
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Tree] = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(build_tree(item, events, source, prefix))
        return items
    mapping: dict[str, Tree] = {}
    first_lines: dict[str, int] = {}
    while not isinstance(name := next(events), yaml.MappingEndEvent):
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarEvent):
            raise MegaSoraError(f"{source}: the key in line {line} is not a word")
        if name.value in mapping:
            raise MegaSoraError(
                f"{source}: {prefix}{name.value} occurs twice, lines {first_lines[name.value]} and {line}"
            )
        first_lines[name.value] = line
        mapping[name.value] = build_tree(next(events), events, source, f"{prefix}{name.value}.")
    return mapping


def describe(error: yaml.YAMLError) -> str:
    """One line on what is wrong, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def letters(tree: Tree) -> str:
    """A value as it is written after `key=`; lists and mappings in brackets."""
    return tree if isinstance(tree, str) else dump_letters(tree, flow=True)


def dump_letters(tree: Tree, flow: bool) -> str:
    """YAML of a mapping or list of letters. `flow`: in brackets, on one line."""
    text = yaml.dump(
        tree, Dumper=LettersDumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=1 << 30
    )
    return text.rstrip()
