"""Values for options, drawn by hypothesis from their types, and JSON documents changed at a random place."""

import copy
import random
from collections.abc import Iterable
from typing import Literal, get_args, get_origin

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

HUGE = [2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, -(2**63), -(10**20)]
ODD_NUMBERS = ["nan", "inf", "-inf", "1e400", "-0.0", "0x10", "1_000", "1e3", "٣", "½", "9" * 5000, "+5", " 5", "5 "]
ODD_WORDS = ["", " ", "null", "None", "true", "~", "[]", "{}", "[", "- a", "a: b", "!!python/name:os.system", "..", "."]
ODD_WORDS += [
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    "/nowhere/at/all",
    "a/b/c",
    "x" * 300,
    "é",
    "\udcff",
    "-",
    "--",
]
ODD_WORDS += [
    "a\nb",
    "\x1b[31mred",
    "%s%d",
    "$HOME",
    "~/x",
    "*",
    "?",
    "[a-",
    "pool:",
    "pool:-1",
    "timm:",
    "timm:x",
    "folder:",
]
ODD_WORDS += [
    "parquet:",
    "parquet:*",
    "folder:/",
    "nas_",
    "nas_x",
    "wrn",
    "wrn16_0",
    "wrn0_1",
    "densenet0_0",
    "1/1",
    "0/5",
]
ODD_VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3.5,
    -2.5,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    2**70,
    10**400,
    "",
    "x",
]
ODD_VALUES += [
    "1",
    "nan",
    [],
    {},
    [[]],
    [None],
    ["x"],
    [-1],
    [0] * 40,
    {"": 0},
    {"x": {}},
    [[1, 2], [3]],
    "é\n",
    1e-320,
]


def drawn(strategy: st.SearchStrategy, seed: int, count: int) -> list:
    """The first `count` values that hypothesis draws with a seed."""
    found: list = []

    @hypothesis.seed(seed)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @hypothesis.given(strategy)
    def keep(value) -> None:
        found.append(value)

    keep()
    return found[:count]


def words() -> st.SearchStrategy[str]:
    """Any text that a command line can hold; no place outside the folder where it is tried."""
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    return st.sampled_from(ODD_WORDS) | text.map(lambda word: word.lstrip("/").replace("..", "."))


def typed(hint: object, known: Iterable[str] = ()) -> st.SearchStrategy[list[str]]:
    """What may follow the flag of an option of that type: right values, wrong ones, and none or several."""
    return st.one_of(_right(hint, list(known)), _right(hint, list(known)), words().map(lambda word: [word]),
                     st.lists(words(), max_size=3))  # fmt: skip


def _right(hint: object, known: list[str]) -> st.SearchStrategy[list[str]]:
    one = lambda strategy: strategy.map(lambda value: [str(value)])  # noqa: E731
    if hint is bool:
        return st.sampled_from([[], ["true"], ["false"], ["yes"], ["2"]])
    if hint is int:
        numbers = st.integers(-2, 12) | st.integers() | st.sampled_from(HUGE)
        return one(numbers) | one(st.sampled_from(ODD_NUMBERS))
    if hint is float:
        return one(st.floats(0, 2) | st.floats()) | one(st.integers(-2, 100)) | one(st.sampled_from(ODD_NUMBERS))
    if hint is str:
        return one(st.sampled_from(known)) if known else one(words())
    if get_origin(hint) is Literal:
        return one(st.sampled_from(get_args(hint)))
    if get_origin(hint) in (list, tuple):
        inner = next((each for each in get_args(hint) if each is not Ellipsis), str)
        return st.lists(_right(inner, known), max_size=5).map(lambda found: [word for each in found for word in each])
    parts = [each for each in get_args(hint) if each is not type(None)]
    return st.one_of(*(_right(part, known) for part in parts)) if parts else one(words())


def mutated(document, random: random.Random, times: int = 1):
    """A copy of a JSON document in which a random value was replaced, removed, doubled or renamed."""
    document = copy.deepcopy(document)
    for _ in range(times):
        holders = [each for each in _holders(document) if each]
        if not holders:
            return copy.deepcopy(random.choice(ODD_VALUES))
        holder = random.choice(holders)
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        way = random.random()
        if way < 0.65:
            holder[key] = _like(holder[key], random)
        elif way < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[random.choice(["x", "", f"{key}_", "__class__"])] = holder.pop(key) if way < 0.9 else 1
        else:
            holder.insert(key, copy.deepcopy(holder[key]))
    return document


def _like(value, random: random.Random):
    """Another value: near the old one, or of any kind."""
    if isinstance(value, bool) or random.random() < 0.4:
        return copy.deepcopy(random.choice(ODD_VALUES))
    if isinstance(value, (int, float)):
        return random.choice([-value, value + 1, value - 1, value * 1000, value + 0.5, str(value), [value], 10**9])
    if isinstance(value, str):
        return random.choice(
            [value + "x", value[:-1], value.upper(), value * 500, value + "\n", random.choice(ODD_WORDS)]
        )
    return copy.deepcopy(random.choice(ODD_VALUES))


def _holders(document) -> list:
    """Every mapping and list in a document."""
    inner = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    own = [document] if isinstance(document, (dict, list)) else []
    return own + [holder for each in inner for holder in _holders(each)]


def damaged(data: bytes, random: random.Random) -> bytes:
    """Bytes cut short, changed, doubled or mixed up at a random place."""
    at, size = random.randrange(len(data) + 1), random.choice([1, 2, 8, 100])
    return random.choice([
        data[:at],
        data[:at] + random.randbytes(size) + data[at + size :],
        data[:at] + random.randbytes(size) + data[at:],
        data[:at] + data[at + size :],
        data[:at] + data[at : at + size] * 50 + data[at:],
        random.randbytes(random.choice([0, 1, 7, 8, 9, 100, 5000])),
        data[at:] + data[:at],
        data[:at] + bytes(size) + data[at + size :],
    ])  # fmt: skip
