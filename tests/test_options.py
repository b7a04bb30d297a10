"""The table of benchmarks/options.py, which runs every option: it knows every option of the schema, and no other."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stepwise import recipe_file, recipe_schema
from stepwise.recipe import Recipe, json_schema
from stepwise.recipe_file import Tree

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import options  # noqa: E402

TABLE = list(options.table())


def test_the_table_has_every_option_once() -> None:
    kinds = recipe_schema.sections(json_schema())
    wanted = {f"{kind.schema['title']}.{option}" for kind in kinds for option in kind.schema["properties"]}
    found = Counter(entry.name for entry in TABLE)
    assert found.keys() == wanted
    assert not [name for name, count in found.items() if count > 1]


def test_tests_that_show_an_option_exist() -> None:
    for entry in TABLE:
        if entry.test:
            file, _, name = entry.test.partition("::")
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), entry


def test_every_change_is_one_of_a_recipe_that_can_be_read() -> None:
    bases, trees = options.bases(), dict[str, Tree]()
    for entry in TABLE:
        if entry.base:
            if entry.base not in trees:
                whole, given = options.resolved(bases, entry.base)
                trees[entry.base] = changed(Tree("recipe", whole, {}), given)
            before, after = trees[entry.base], changed(trees[entry.base], entry.overrides)
            assert Recipe.model_validate(before.value) != Recipe.model_validate(after.value), entry


def changed(tree: Tree, overrides: Sequence[str]) -> Tree:
    for text in overrides:
        tree = recipe_file.override(tree, text.replace("URL", "http://127.0.0.1:1/v1"))
    return tree
