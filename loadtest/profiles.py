"""Profiles of traffic in TOML, read strictly: what is unknown, missing or senseless is refused with file and key."""

from __future__ import annotations

import math
import random
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from loadtest.client import Api, Options
from loadtest.prompts import LANGUAGES, Part, Prompt, Sizing, needle_prompt, over_cap_prompt, sum_prompt, word_prompt
from loadtest.replay import read_prompts
from loadtest.shapes import Search, Stage
from loadtest.slo import Slo, SloError

FOLDER = Path(__file__).with_name("profiles")
KINDS = ("closed", "open", "stages", "spike", "soak", "search")
GENERATED = {"sum": sum_prompt, "word": word_prompt}
MOST_UNDER_WAY = 2000
"""Default bound on an open loop's requests under way: a greenlet and a socket each."""
MARGIN = 0.97
"""Of the cap that `tokens = "cap"` fills: lengths are estimates."""


class ProfileError(ValueError):
    """A profile that cannot be run; says what, where and what to do."""


class Table:
    """A table of a profile from which every key is taken once, with its type; `end` refuses what is left."""

    def __init__(self, found: Any, where: str) -> None:
        if not isinstance(found, dict):
            raise ProfileError(f"{where}: expected a table, found {found!r}")
        self._left, self.where = dict(found), where

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def fail(self, key: str, problem: str) -> ProfileError:
        """An error about one key."""
        return ProfileError(f"{self.where}: `{key}`: {problem}")

    def take(self, key: str, default: Any = ...) -> Any:
        """Any value.

        Raises:
            ProfileError: It is missing and there is no default.
        """
        if key not in self._left and default is ...:
            raise self.fail(key, "missing; add it")
        return self._left.pop(key, default)

    def number(self, key: str, default: Any = ..., *, least: float = 0.0, above: bool = False) -> Any:
        """A finite number of at least, or above, `least`."""
        value = self.take(key, default)
        if value is default and default is not ...:
            return value
        good = type(value) in (int, float) and math.isfinite(value) and (value > least if above else value >= least)
        if not good:
            raise self.fail(key, f"expected a number {'above' if above else 'of at least'} {least:g}, found {value!r}")
        return float(value)

    def whole(self, key: str, default: Any = ..., *, least: int = 1) -> Any:
        """An integer of at least `least`."""
        value = self.take(key, default)
        if value is default and default is not ...:
            return value
        if type(value) is not int or value < least:
            raise self.fail(key, f"expected a whole number of at least {least}, found {value!r}")
        return value

    def flag(self, key: str, default: bool | None) -> bool | None:
        """True or false."""
        value: bool | None = self.take(key, default)
        if value is not default and type(value) is not bool:
            raise self.fail(key, f"expected true or false, found {value!r}")
        return value

    def choice(self, key: str, known: Sequence[str], default: Any = ...) -> str:
        """One of some words."""
        value = self.take(key, default)
        if value not in known:
            raise self.fail(key, f"expected one of {', '.join(known)}, found {value!r}")
        return cast("str", value)

    def end(self) -> None:
        """Refuses keys that nothing has taken."""
        if self._left:
            raise self.fail(min(self._left), "unknown key; correct or remove it")


@dataclass(frozen=True)
class Traffic:
    """When requests are sent.

    Attributes:
        kind: One of `KINDS`.
        stages: In their order, the warm-up first; of a search the warm-up alone.
        search: The search, of that kind.
        think_s: Mean of the exponential pause of a closed loop's user between an answer and the next request.
        most_under_way: Bound on the requests that an open loop's source has under way.
    """

    kind: str
    stages: tuple[Stage, ...]
    search: Search | None
    think_s: float
    most_under_way: int

    @property
    def is_open(self) -> bool:
        """Whether slow answers do not keep requests from being sent."""
        return self.search is not None or any(stage.rate is not None for stage in self.stages)


@dataclass(frozen=True)
class Content:
    """One kind of prompt: a `[[prompts]]` of a profile.

    Attributes:
        kind: `sum`, `word`, `needle`, `over_cap` or `replay`.
        weight: How often, in relation to the others.
        languages: Drawn from evenly.
        tokens: Lengths of needles, drawn from evenly; `cap` is what the server takes at most.
        prompts: Of a replay.
    """

    kind: str
    weight: float
    languages: tuple[str, ...]
    tokens: tuple[int | str, ...] = ()
    prompts: tuple[Prompt, ...] = ()

    def part(self, sizing: Sizing, max_tokens: int, salt: str = "", begin: float = 0.0) -> Part | None:
        """Makes its prompts; lengths beyond the server's cap are left out, None if none is left.

        Args:
            sizing: How long a text is, and the cap.
            max_tokens: Of an answer.
            salt: Of the needles' lists.
            begin: Share of the file after which a replay begins.

        Raises:
            ProfileError: The cap is needed and not known.
        """
        if self.kind == "replay":
            first = int(begin * len(self.prompts))
            return Part(lambda _, number: self.prompts[(first + number) % len(self.prompts)], self.weight)
        if self.kind in GENERATED:
            make = GENERATED[self.kind]
            return Part(lambda rng, _: make(rng, rng.choice(self.languages)), self.weight)
        if sizing.cap is None and (self.kind == "over_cap" or "cap" in self.tokens):
            raise ProfileError(
                f"prompts of kind `{self.kind}` need the server's cap, which it does not state; set `cap`"
            )
        if self.kind == "over_cap":
            return Part(lambda rng, _: over_cap_prompt(rng, rng.choice(self.languages), sizing), self.weight)
        room = None if sizing.cap is None else round((sizing.cap - max_tokens) * MARGIN)
        wanted = [room if size == "cap" else size for size in self.tokens]
        fitting = [size for size in wanted if isinstance(size, int) and size > 0 and (room is None or size <= room)]
        return Part(partial(self._needle, fitting, sizing, salt), self.weight) if fitting else None

    def _needle(self, sizes: list[int], sizing: Sizing, salt: str, rng: random.Random, number: int) -> Prompt:
        # In turn, not drawn: a sweep of a few minutes has as many of each length.
        return needle_prompt(rng, rng.choice(self.languages), sizes[number % len(sizes)], sizing, salt)


@dataclass(frozen=True)
class Profile:
    """What to send, and when.

    Attributes:
        name: The file's, without its ending.
        description: One line for people.
        seed: Of prompts and arrivals.
        cap: The server's context in tokens, if it does not say so itself.
        options: How prompts are sent.
        traffic: When.
        contents: What.
        slo: What it has to keep, if the command line does not say; None: every request has to be good.
        source: The file as parsed, for `records.Run`.
    """

    name: str
    description: str
    seed: int
    cap: int | None
    options: Options
    traffic: Traffic
    contents: tuple[Content, ...]
    slo: Slo | None
    source: dict[str, Any]

    def parts(self, sizing: Sizing, salt: str = "", begin: float = 0.0) -> list[Part]:
        """The mix of prompts for a server.

        Args:
            sizing: How long a text is, and the server's cap.
            salt: What the lists of needles follow from beside the seed, so that no cache knows them from another run.
            begin: Share of their files after which replays begin; sources that begin apart do not ask the same at once.

        Raises:
            ProfileError: Nothing is left that the server takes.
        """
        made = [content.part(sizing, self.options.max_tokens, salt, begin) for content in self.contents]
        if not (parts := [part for part in made if part]):
            raise ProfileError(
                f"{self.name}: no prompt fits into the server's cap of {sizing.cap}; choose shorter `tokens`"
            )
        return parts


def find(name: str) -> Path:
    """The file of a profile given by its name or path.

    Raises:
        ProfileError: There is none.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise ProfileError(f"{name}: no such profile; name a TOML file or one of {known}")
    return path


def read(path: Path) -> Profile:
    """Reads and checks a profile.

    Raises:
        ProfileError: It cannot be run.
        ReplayError: A file of prompts cannot be replayed.
    """
    try:
        source = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ProfileError(f"{path}: no TOML ({cause}); correct it") from cause
    table = Table(source, str(path))
    contents = table.take("prompts")
    if not isinstance(contents, list) or not contents:
        raise table.fail("prompts", "expected one [[prompts]] or more")
    description = table.take("description")
    if not isinstance(description, str) or not description:
        raise table.fail("description", "expected a line of text")
    profile = Profile(
        path.stem,
        description,
        table.whole("seed", 0, least=0),
        table.whole("cap", None),
        _options(Table(table.take("options", {}), f"{path}: [options]")),
        _traffic(Table(table.take("traffic"), f"{path}: [traffic]")),
        tuple(_content(Table(c, f"{path}: prompts[{i}]"), path.parent) for i, c in enumerate(contents)),
        _slo(Table(table.take("slo"), f"{path}: [slo]")) if "slo" in table else None,
        source,
    )
    table.end()
    if profile.traffic.search and not profile.slo:
        raise table.fail("slo", "a search needs a table of what a rate has to keep; add it")
    return profile


def _options(table: Table) -> Options:
    default = Options()
    options = Options(
        cast("Api", table.choice("api", get_args(Api), default.api)),
        table.whole("max_tokens", default.max_tokens),
        table.flag("reasoning", default.reasoning),
        table.number("temperature", default.temperature),
        bool(table.flag("ignore_eos", default.ignore_eos)),
        table.number("timeout_s", default.timeout_s, above=True),
    )
    table.end()
    if options.api == "completions" and options.reasoning is not None:
        raise table.fail("reasoning", 'only a chat has it; remove it or set api = "chat"')
    return options


def _slo(table: Table) -> Slo:
    limits = {field.name: table.number(field.name, field.default) for field in fields(Slo)}
    table.end()
    try:
        return Slo(**limits)
    except SloError as cause:
        raise ProfileError(f"{table.where}: {cause}") from cause


def _traffic(table: Table) -> Traffic:
    kind = table.choice("kind", KINDS)
    warm_up = table.number("warm_up_s", 0.0)
    think, bound = table.number("think_s", 0.0), table.whole("most_under_way", MOST_UNDER_WAY)
    search: Search | None = None
    stages: list[Stage] = []
    if kind == "search":
        search = _search(table)
        first = Stage(warm_up, rate=search.start, warm_up=True)
    else:
        stages = _numbered(_stages(table, kind))
        first = Stage(warm_up, stages[0].users, stages[0].rate, warm_up=True)
    table.end()
    if len({stage.rate is None for stage in stages}) > 1:
        raise table.fail("stages", "expected users in all or a rate in all; make two profiles")
    if think and (search or stages[0].rate is not None):
        raise table.fail("think_s", "only users think; remove it or give users instead of a rate")
    return Traffic(kind, tuple([first] * (warm_up > 0) + stages), search, think, bound)


def _stages(table: Table, kind: str) -> list[Stage]:
    if kind == "stages":
        found = table.take("stages")
        if not isinstance(found, list) or not found:
            raise table.fail("stages", "expected one [[traffic.stages]] or more")
        stages = []
        for index, entry in enumerate(found):
            stage = Table(entry, f"{table.where}: stages[{index}]")
            stages.append(_stage(stage, _level(stage), stage.number("seconds", above=True)))
            stage.end()
        return stages
    key = _level(table)
    if kind == "spike":
        base, peak = table.take(key), table.take("peak")
        spans = [table.number(name, above=True) for name in ("before_s", "during_s", "after_s")]
        levels = [Table({key: level}, table.where) for level in (base, peak, base)]
        return [_stage(level, key, span) for level, span in zip(levels, spans, strict=True)]
    if kind == "soak":
        return [_stage(table, key, 60 * table.number("minutes", above=True))]
    wanted = "users" if kind == "closed" else "rate"
    if key != wanted:
        raise table.fail(key, f"a loop of kind `{kind}` has `{wanted}`")
    return [_stage(table, key, table.number("seconds", above=True))]


def _numbered(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, with those of one name told apart."""
    met = Counter[str]()
    numbered = []
    for stage in stages:
        met[stage.name] += 1
        numbered.append(replace(stage, turn=met[stage.name]))
    return numbered


def _level(table: Table) -> str:
    if ("users" in table) == ("rate" in table):
        raise table.fail("users", "expected either `users` (closed loop) or `rate` (requests per second, open loop)")
    return "users" if "users" in table else "rate"


def _stage(table: Table, key: str, seconds: float) -> Stage:
    if key == "users":
        return Stage(seconds, users=table.whole(key))
    return Stage(seconds, rate=table.number(key, above=True))


def _search(table: Table) -> Search:
    search = Search(
        table.number("start", above=True),
        table.number("factor", 1.5, least=1.0, above=True),
        table.number("most", above=True),
        table.whole("refine", 2, least=0),
        table.number("seconds", above=True),
        table.number("settle_s", 0.0),
    )
    if search.start > search.most or search.settle >= search.seconds:
        raise table.fail("start", "expected start <= most and settle_s < seconds")
    return search


def _content(table: Table, folder: Path) -> Content:
    kind = table.choice("kind", (*GENERATED, "needle", "over_cap", "replay"))
    weight = table.number("weight", 1.0, above=True)
    if kind == "replay":
        file = table.take("file")
        if not isinstance(file, str):
            raise table.fail("file", f"expected the path of a JSONL file, found {file!r}")
        table.end()
        return Content(kind, weight, (), prompts=read_prompts(folder / file))
    languages = table.take("languages", list(LANGUAGES))
    if not isinstance(languages, list) or not languages or any(language not in LANGUAGES for language in languages):
        raise table.fail("languages", f"expected some of {', '.join(LANGUAGES)}, found {languages!r}")
    tokens: Any = table.take("tokens") if kind == "needle" else []
    good = isinstance(tokens, list) and all(t == "cap" or (type(t) is int and t >= 64) for t in tokens)
    if not good or (kind == "needle" and not tokens):
        raise table.fail("tokens", f'expected a list of whole numbers of at least 64, or "cap"; found {tokens!r}')
    table.end()
    return Content(kind, weight, tuple(languages), tuple(tokens))
