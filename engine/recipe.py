"""Recipes: YAML files of options, read with safe_load's types and refused where YAML would be silent."""

import yaml

from common import UserError, read_text

DEEPEST = 8  # levels of a recipe


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, aliases (a value could hold itself) and deep nesting."""

    depth = 0

    def compose_node(self, parent, index):
        event, self.depth = self.peek_event(), self.depth + 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported; write it out", problem_mark=event.start_mark)
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: str) -> dict:
    """The options of a recipe.

    Raises:
        UserError: no file, one that is no mapping, or one that YAML cannot read; with the line.
    """
    if not path:
        raise UserError("--config: name a recipe, for example --config recipes/digits_gtn.yaml")
    try:
        content = _Loader(read_text(path)).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"--config {path}: cannot read the recipe ({line}{error.problem})") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {path}: cannot read the recipe ({error})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path}: a recipe is a YAML mapping of options")
    return content
