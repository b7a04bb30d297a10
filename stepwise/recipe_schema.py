"""What the JSON schema of a recipe says: the keys of a place, what is wanted there, errors and the reference."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Key = tuple[str | int, ...]
Schema = Mapping[str, Any]

_TAGS = ("method", "measure", "kind")  # keys whose value tells the mappings of a union apart
_FORM = "target"  # the key whose form does
_WHAT = {
    "finite_number": "the number is not finite",
    "float_type": "the value is not a finite number",
    "int_type": "the value is not a whole number",
    "greater_than": "the number is out of range",
    "greater_than_equal": "the number is out of range",
    "less_than": "the number is out of range",
    "less_than_equal": "the number is out of range",
    "literal_error": "there is no such choice",
    "string_type": "the value is not a text",
    "bool_type": "the value is neither true nor false",
    "too_short": "there are too few entries",
    "too_long": "there are too many entries",
    "string_too_short": "the text is empty",
}


class Problem(NamedTuple):
    """One thing that is wrong, at a key."""

    key: Key
    what: str
    got: str
    wanted: str


def short(value: object) -> str:
    """A value as an error shows it: YAML's words, 80 characters at most."""
    text = {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Sequence[str]) -> str:
    """a, b or c."""
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else "".join(names)


def one_of(names: Sequence[str], *, near: str) -> str:
    """The names allowed; the likely one first, as a question."""
    meant = likely(near, names)
    return (f"{meant}? Allowed: " if meant else "one of ") + ", ".join(names)


def likely(written: str, names: Sequence[str]) -> str:
    """The name that was meant, or nothing: those a single edit away, else the most similar one."""
    near = [name for name in names if _one_edit(written.lower(), name)]
    return listed(near or difflib.get_close_matches(written.lower(), names, n=1, cutoff=0.5))


def _one_edit(a: str, b: str) -> bool:
    """Whether one letter was dropped, added or replaced, or two neighbours were swapped."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])


def explain(errors: Sequence[Any], value: object, root: Schema) -> list[Problem]:
    """Errors of pydantic about `value`, each once, in the words of the schema `root`."""
    problems: dict[Key, Problem] = {}
    for error in errors:
        for problem in _problems(error, value, root):
            problems.setdefault(problem.key, problem)
    return list(problems.values())


def _problems(error: Mapping[str, Any], value: object, root: Schema) -> Iterator[Problem]:
    kind, got, key = error["type"], short(error["input"]), _key(error["loc"], value)
    if kind == "conflict":
        for conflict in error["ctx"]["conflicts"]:
            yield Problem((*key, *conflict.key), conflict.what, conflict.got, conflict.wanted)
    elif kind == "extra_forbidden":
        wanted = _right_key(str(key[-1]), schema_at(key[:-1], value, root), root)
        yield Problem(key, "there is no such key", repr(key[-1]), wanted)
    elif kind == "missing":
        yield Problem(key, "a key is missing", "nothing", describe(schema_at(key, value, root), root))
    elif kind == "union_tag_not_found":
        yield _without_tag(key, error, value, root)
    elif kind == "union_tag_invalid":
        tag, names = _tag_and_names(schema_at(key, value, root), root)
        wanted = one_of(names, near=str(error["ctx"]["tag"]))
        yield Problem((*key, tag), f"there is no such {tag}", short(error["ctx"]["tag"]), wanted)
    elif error["loc"][-1:] == ("[key]",):
        wanted = describe(schema_at(key[:-1], value, root), root)
        yield Problem(key, "the name is not allowed", short(key[-1]), wanted)
    else:
        schema = schema_at(key, value, root)
        names = schema.get("enum", [])
        meant = likely(str(error["input"]), names)
        wanted = (f"{meant}? " if meant else "") + describe(schema, root)
        yield Problem(key, _WHAT.get(kind, "the value is not allowed"), got, wanted)


def _right_key(key: str, schema: Schema, root: Schema) -> str:
    keys = list(schema.get("properties", {}))
    allowed = f"the keys here are {', '.join(keys)}"
    if meant := likely(key, keys):
        return f"{meant}? Otherwise {allowed}"
    places = [place for section in sections(root) if key in section.schema["properties"] for place in section.places]
    return (f"{key} belongs to {_together(places)}; " if 0 < len(places) < 5 else "") + allowed


def _without_tag(key: Key, error: Mapping[str, Any], value: object, root: Schema) -> Problem:
    tag, names = _tag_and_names(schema_at(key, value, root), root)
    if not isinstance(error["input"], dict):
        return Problem(
            key, "the value is not allowed", short(error["input"]), describe(schema_at(key, value, root), root)
        )
    keys = list(error["input"])
    near = [name for name in keys if _one_edit(name.lower(), tag)]
    for written in near or difflib.get_close_matches(tag, keys, n=1, cutoff=0.5):
        wanted = f"{tag}? It says which of {listed(names)}"
        return Problem((*key, written), "there is no such key", repr(written), wanted)
    return Problem((*key, tag), "a key is missing", "nothing", f"{tag}: {listed(names)}")


class _Variant(NamedTuple):
    """One mapping of a union, and the schema of the key that tells it from the others."""

    name: str
    reference: Schema
    tag: Schema


def _variants(schema: Schema, root: Schema) -> tuple[str, list[_Variant]]:
    """The key that tells the mappings of a union apart, by its value or by the form of its value; and the mappings."""
    if "discriminator" in schema:
        tag, mapping = schema["discriminator"]["propertyName"], schema["discriminator"]["mapping"]
        return tag, [_Variant(name, {"$ref": target}, {"const": name}) for name, target in mapping.items()]
    found = []
    for branch in schema.get("oneOf", []):
        if "$ref" in branch:
            tag = _resolve(branch, None, root)["properties"][_FORM]
            found.append(_Variant(tag.get("const", tag["title"]), branch, tag))
    return _FORM, sorted(found, key=lambda variant: "const" not in variant.tag)  # a pattern may match a constant too


def _tag_and_names(schema: Schema, root: Schema) -> tuple[str, list[str]]:
    tag, variants = _variants(schema, root)
    return tag, [variant.name for variant in variants]


def _is_tag(value: object, tag: Schema) -> bool:
    if not isinstance(value, str):
        return False
    return value == tag["const"] if "const" in tag else re.search(tag["pattern"], value) is not None


def _key(loc: Sequence[str | int], value: object) -> Key:
    """A place in the recipe from pydantic's, which also names the variant of a union on its way."""
    key: list[str | int] = []
    for position, part in enumerate(loc):
        if isinstance(value, dict):
            tags = [value.get(tag) for tag in _TAGS]
            variant = (part in tags or _is_form(part)) and (part not in value or position + 1 < len(loc))
            if variant or (part == "[key]" and part not in value):
                continue
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            break
        key.append(part)
    return tuple(key)


def _is_form(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith("<") and part.endswith(">")


def schema_at(key: Key, value: object, root: Schema) -> Schema:
    """The schema that holds at a place of `value`; a union is resolved by the tag that is written there."""
    schema = _resolve(root, value, root)
    for part in key:
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) else None
            schema = schema.get("items", {})
        else:
            value = value.get(part) if isinstance(value, dict) else None
            schema = schema.get("properties", {}).get(part) or _tag_schema(part, schema, root) or _members(schema)
        schema = _resolve(schema, value, root)
    return schema


def _resolve(schema: Schema, value: object, root: Schema) -> Schema:
    while True:
        if "$ref" in schema:
            target = root["$defs"][schema["$ref"].rpartition("/")[2]]
            schema = {**target, **{key: item for key, item in schema.items() if key != "$ref"}}
        elif len(branches := [branch for branch in schema.get("anyOf", []) if branch.get("type") != "null"]) == 1:
            schema = {**branches[0], **{key: item for key, item in schema.items() if key != "anyOf"}, "nullable": True}
        elif "oneOf" in schema and isinstance(value, dict):
            tag, variants = _variants(schema, root)
            meant = [variant.reference for variant in variants if _is_tag(value.get(tag), variant.tag)]
            if not meant:
                return schema
            schema = meant[0]
        else:
            return schema


def _tag_schema(key: str, schema: Schema, root: Schema) -> Schema:
    """Schema of the key that tells the mappings of a union apart, where its value is none of theirs."""
    tag, names = _tag_and_names(schema, root)
    return {"type": "string", "description": "; ".join(names)} if names and key == tag else {}


def _members(schema: Schema) -> Schema:
    """Schema of the values of a mapping with free keys."""
    members = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")]
    return members[0] if isinstance(members[0], dict) else {}


def describe(schema: Schema, root: Schema) -> str:
    """What is wanted: type, bounds, choices, meaning."""
    schema = _resolve(schema, None, root)
    kind = _kind(schema, root) + (", or null" if schema.get("nullable") else "")
    meaning = schema.get("description")
    return f"{kind} ({meaning})" if meaning else kind


def _kind(schema: Schema, root: Schema) -> str:
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return listed(schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_kind(_resolve(branch, None, root), root) for branch in schema["anyOf"])
    if "discriminator" in schema:
        tag, names = _tag_and_names(schema, root)
        return f"a mapping with {tag}: {listed(names)}"
    if "oneOf" in schema:
        return f"a text or a mapping with {_FORM}"
    match schema.get("type"):
        case "number":
            return "a number" + _bounds(schema)
        case "integer":
            return "a whole number" + _bounds(schema)
        case "boolean":
            return "true or false"
        case "array":
            return "a list, each " + _kind(_resolve(schema.get("items", {}), None, root), root)
        case "object" if "properties" in schema:
            return "a mapping with keys such as " + ", ".join(list(schema["properties"])[:4])
        case "object":
            return "a mapping"
        case _:
            return "a text"


def _bounds(schema: Schema) -> str:
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    found = [f"{word} {schema[key]:.10g}" for key, word in words.items() if key in schema]
    return " " + " and ".join(found) if found else ""


class Section(NamedTuple):
    """A kind of mapping in a recipe: where it may stand, and its schema."""

    places: list[str]
    schema: Schema


def sections(root: Schema) -> list[Section]:
    """Every kind of mapping in a recipe, in the order of the schema."""
    found: dict[str, Section] = {}
    _collect(root, ("", ""), root, found)
    return list(found.values())


def _collect(schema: Schema, place: tuple[str, str], root: Schema, found: dict[str, Section]) -> None:
    """Add the mappings below `schema`; `place` is a dotted key and the tag of a variant of a union."""
    schema, dotted = _resolve(schema, None, root), place[0]
    if "oneOf" in schema:
        tag, variants = _variants(schema, root)
        for variant in variants:
            _collect(variant.reference, (dotted, f" with {tag}: {variant.name}"), root, found)
    elif "properties" in schema:
        label = "".join(place).strip() or "the top level"
        if section := found.get(schema["title"]):
            section.places.extend([label] if label not in section.places else [])
            return
        found[schema["title"]] = Section([label], schema)
        for key, part in schema["properties"].items():
            _collect(part, (f"{dotted}.{key}".lstrip("."), ""), root, found)
    elif members := _members(schema):
        _collect(members, (f"{dotted}.<name>", ""), root, found)
    elif schema.get("type") == "array":
        _collect(schema["items"], (f"{dotted}[]", ""), root, found)


def markdown(root: Schema) -> str:
    """The reference of every key, as docs/recipes.md holds it."""
    lines: list[str] = []
    for section in sections(root):
        lines += [
            "",
            "### " + _together([_quoted(place) for place in section.places]),
            "",
            "| key | value | default | meaning |",
            "|---|---|---|---|",
        ]
        required = section.schema.get("required", [])
        for key, part in section.schema["properties"].items():
            part = _resolve(part, None, root)
            kind = _kind(part, root) + (", or null" if part.get("nullable") else "")
            default = "needed" if key in required else _default(part)
            lines.append(f"| `{key}` | {kind} | {default} | {part.get('description', '')} |".replace("||", "|"))
    return "\n".join(lines).strip() + "\n"


def _together(places: Sequence[str]) -> str:
    """a, b or c; what follows " with " is told once, where it is the same."""
    endings = {place.partition(" with ")[2] for place in places}
    if len(places) == 1 or endings == {""} or len(endings) > 1:
        return listed(places)
    return f"{listed([place.partition(' with ')[0] for place in places])} with {endings.pop()}"


def _quoted(place: str) -> str:
    key, space, rest = place.partition(" ")
    return place if key == "the" else f"`{key}`{space}{rest}"


def _flow(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """A few plain values as YAML writes them in a line; nothing for what is larger."""
    parts = list(value.values()) if isinstance(value, Mapping) else list(value)
    if not 0 < len(parts) <= 6 or any(isinstance(part, dict | list) or part is None for part in parts):
        return ""
    told = [part if isinstance(part, str) else short(part) for part in parts]
    if isinstance(value, Mapping):
        return "`{" + ", ".join(f"{key}: {part}" for key, part in zip(value, told, strict=True)) + "}`"
    return "`[" + ", ".join(told) + "]`"


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return "see meaning"
    value = schema["default"]
    if isinstance(value, dict) and "kind" in value:
        value = {"kind": value["kind"]}
    if isinstance(value, dict | list):
        return _flow(value) or ("its defaults" if value else "none")
    return value if isinstance(value, str) else short(value)
