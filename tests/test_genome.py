"""The genome file: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo import genome
from llmevo.errors import GenomeError
from llmevo.genome import yamltext
from llmevo.genome.spec import ChoiceGene, FloatGene

ROOT = Path(__file__).resolve().parent.parent
SMALL = "genome: {models: [org/a, org/b], base_model: org/base}\ntasks: [one]\n"

# A file in mergekit-evolve's own format, every option of it used.
EVOLVE = """
genome:
    models:
      - NousResearch/Hermes-2-Pro-Mistral-7B
      - BioMistral/BioMistral-7B@main+some/adapter@v2
    merge_method: dare_ties
    base_model: mistralai/Mistral-7B-v0.1
    tokenizer_source: null
    layer_granularity: 8
    normalize: false
    allow_negative_weights: false
    smooth: false
    filters: [self_attn, mlp]
tasks:
  - alpaca_eval
  - name: spartqa_train
    weight: 0.5
    metric: "acc_norm,none"
limit: 100
num_fewshot: 3
shuffle: true
random_init: false
apply_chat_template: true
fewshot_as_multiturn: false
"""


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(GenomeError) as caught:
        genome.parse(text, "file.yaml", overrides)
    return str(caught.value)


def test_a_file_of_mergekit_evolve_is_read_as_it_reads_it() -> None:
    import yaml
    from mergekit.evo.config import EvolMergeConfiguration

    theirs = EvolMergeConfiguration.model_validate(yaml.safe_load(EVOLVE))
    ours = genome.parse(EVOLVE)
    assert [str(model) for model in theirs.genome.models] == ours.genome.models
    for name in (
        "merge_method",
        "layer_granularity",
        "normalize",
        "allow_negative_weights",
        "smooth",
        "filters",
    ):
        assert getattr(theirs.genome, name) == getattr(ours.genome, name)
    assert [(t.name, t.weight, t.metric) for t in theirs.tasks] == [
        (t.name, t.weight, t.metric) for t in ours.tasks
    ]
    for name in (
        "limit",
        "num_fewshot",
        "shuffle",
        "random_init",
        "apply_chat_template",
        "fewshot_as_multiturn",
    ):
        assert getattr(theirs, name) == getattr(ours, name)


@pytest.mark.parametrize("path", sorted((ROOT / "genomes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_genome_that_we_ship_loads(path: Path) -> None:
    loaded = genome.load(path)
    assert genome.parse(genome.dump(loaded)) == loaded
    assert path.read_text(encoding="utf-8").startswith("#")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [one]", ["file.yaml: `genome` is missing; add it."]),
        ("- 1", ["must be a mapping with the keys `genome` and `tasks`", "list"]),
        ("", ["must be a mapping", "NoneType"]),
        ("a: [", ["file.yaml, line 1", "not YAML"]),
        (SMALL + "serch: {}", ["`serch` is not a key; did you mean `search`?"]),
        (SMALL + "search: {trails: 3}", ["did you mean `search.trials`?"]),
        (SMALL + "search: {temperature: 3}", ["did you mean `llm.temperature`?"]),
        (SMALL + "search: {trials: 0}", ["`search.trials` must be greater than or equal to 1", "got 0"]),
        (SMALL + "search: {trials: many}", ["`search.trials` must be a valid integer", "'many'"]),
        (SMALL + "limit: .nan", ["`limit`", "nan"]),
        (SMALL + "search: {sigma0: .inf}", ["`search.sigma0`", "inf"]),
        (SMALL + "limit: 3\nlimit: 4", ["line 4: the key `limit` is given twice, first in line 3"]),
        (SMALL + "12: 3", ["the key `12` must be a string", "quotes"]),
        (SMALL.replace("org/b]", "org/a]"), ["`genome.models` must not name anything twice"]),
        (
            SMALL.replace("org/b]", "a@b@c]"),
            ["`genome.models` must be `path[@revision][+adapter[@revision]]`"],
        ),
        (SMALL.replace("org/b]", "+b]"), ["`genome.models` must be `path"]),
        (SMALL.replace("[one]", "[one, one]"), ["`tasks` must not name a task twice"]),
        (SMALL.replace("[one]", "[{name: one, wieght: 2}]"), ["did you mean `tasks.0.weight`?"]),
        (SMALL.replace("[one]", "[]"), ["`tasks` must have at least 1 item"]),
        (SMALL + "warm_start: [3]", ["`warm_start.0` must be a valid string, but got 3"]),
        (SMALL + "warm_start: [{models: []}]", ["`warm_start.0` must be a mergekit configuration"]),
        (SMALL + "warm_start: [nowhere.yaml]", ["nowhere.yaml: it cannot be read", "check the path"]),
    ],
)
def test_a_refusal_names_the_key_and_the_remedy(text: str, said: list[str]) -> None:
    message = refusal(text)
    for part in said:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("{float: [1, 0]}", "`low <= high` must hold"),
        ("{float: [0, x]}", "`genome.parameters.weight.float.1` must be a valid number"),
        ("{float: [0, 1], log: true}", "`low > 0` must hold"),
        ("{float: [0, 1], init: 2}", "0 <= init <= 1"),
        ("{float: [0, 1], stepp: 2}", "`genome.parameters.weight.stepp` is not a key"),
        ("{int: [0, 1.5]}", "`genome.parameters.weight.int.1` must be a valid integer"),
        ("{choice: []}", "must have at least 1 item"),
        (".nan", "file.yaml: `genome.parameters.weight` must be a finite number, but got nan"),
        ("{a: .inf}", "file.yaml: `genome.parameters.weight.a` must be a finite number, but got inf"),
        ("null", "file.yaml: `genome.parameters.weight` must be a value or a gene, but got null"),
        ("[1, 2]", "`genome.parameters.weight` must be a value, or a gene"),
        ("{choice: [[1]]}", "`genome.parameters.weight.choice.0` must be a value"),
        ("{a: {float: [1, 0]}}", "`genome.parameters.weight.a`: `low <= high` must hold"),
    ],
)
def test_a_gene_is_checked_where_it_is_written(setting: str, said: str) -> None:
    text = SMALL.replace("org/base}", f"org/base, parameters: {{weight: {setting}}}}}")
    assert said in refusal(text)


def test_all_that_is_wrong_is_listed_line_by_line() -> None:
    message = refusal(SMALL + "limit: -1\nserch: 3\nsearch: {seed: x}")
    assert message.splitlines()[0] == "file.yaml: 3 things are wrong:"
    assert [line.split("`")[1] for line in message.splitlines()[1:]] == [
        "limit",
        "search.seed",
        "serch",
    ]


def test_parameters_are_fixed_or_genes_for_all_or_for_each() -> None:
    loaded = genome.parse(
        SMALL.replace(
            "org/base}",
            "org/base, parameters: {weight: {a: {float: [0, 2e0]}, b: 3e-1}, lambda: 1, "
            "rescale: {choice: [true, false]}}}",
        )
    )
    each = loaded.genome.parameters["weight"]
    assert isinstance(each, dict)
    assert each == {"a": FloatGene(float=(0, 2)), "b": 0.3}
    assert loaded.genome.parameters["lambda"] == 1
    assert loaded.genome.parameters["rescale"] == ChoiceGene(choice=[True, False])


def test_overrides_are_yaml_and_apply_in_order() -> None:
    loaded = genome.parse(
        SMALL,
        overrides=(
            "search.trials=20",
            "search.trials=30",
            "tasks=[{name: x}]",
            "tasks.0.weight=2",
            "genome.filters=[mlp]",
            "llm.temperature=null",
        ),
    )
    assert (loaded.search.trials, loaded.tasks[0].weight, loaded.genome.filters) == (30, 2.0, ["mlp"])
    assert loaded.llm.temperature is None


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("trials", "must be KEY=VALUE"),
        ("a..b=1", "must be KEY=VALUE"),
        ("search.trails=1", "did you mean `search.trials`?"),
        ("tasks.5.weight=1", "'5' must be a key of a mapping or an index, but got a list of 1"),
        ("search.trials=[", "--set search.trials=["),
        ("tasks.0.weight=1", "got 'one'"),
    ],
)
def test_a_wrong_override_is_named(assignment: str, said: str) -> None:
    assert said in refusal(SMALL, assignment)


def test_a_billion_laughs_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "once its aliases are expanded" in refusal("\n".join(lines))
    merged = ["a0: &a0 {x: 1}"]
    merged += [f"a{i}: &a{i} {{'<<': [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10)]
    assert "once its aliases are expanded" in refusal("\n".join(merged))


def test_yaml_beyond_the_caps_is_refused() -> None:
    assert "at most 1048576 bytes" in refusal("#" * (1 << 20) + "\n" + SMALL)
    assert "nests deeper" in refusal("a: " + "[" * 2000 + "]" * 2000)
    assert "contains itself" in refusal("a: &a [*a]")
    assert "more than 100 aliases" in refusal("a: &a 1\nb: [" + ", ".join(["*a"] * 101) + "]")
    assert "not YAML" in refusal("!!python/object/apply:os.system ['true']")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "genome.yaml"
    with pytest.raises(GenomeError, match="cannot be read"):
        genome.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GenomeError, match="must be UTF-8"):
        genome.load(path)
    with path.open("wb") as file:
        file.truncate(1 << 33)  # a sparse file: reading all of it would take the memory of the machine
    with pytest.raises(GenomeError, match="at most"):
        genome.load(path)


def test_a_warm_start_is_read_beside_the_file(tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "org/a"}]}
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: org/a}]\n")
    path = tmp_path / "genome.yaml"
    path.write_text(SMALL + "warm_start: [r.yaml]\n")
    assert genome.load(path).warm_start == [recipe]
    before = genome.fingerprint(genome.load(path))
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: org/b}]\n")
    assert genome.fingerprint(genome.load(path)) != before


def test_the_difference_is_by_field_and_knows_what_may_change() -> None:
    old = genome.parse(SMALL)
    more = genome.parse(
        SMALL, overrides=("search.trials=80", "run.workers=4", "run.timeout=9", "llm.timeout=5")
    )
    assert genome.fingerprint(more) == genome.fingerprint(old)
    assert genome.resumable_difference(old, more) == []
    assert genome.diff(old, more)[0] == "search.trials: 100 -> 80"
    other = genome.parse(SMALL, overrides=("search.trials=80", "search.seed=1", "genome.models=[org/a]"))
    assert genome.fingerprint(other) != genome.fingerprint(old)
    assert genome.resumable_difference(old, other) == [
        'genome.models.1: "org/b" -> (absent)',
        "search.seed: 0 -> 1",
    ]
    assert genome.diff(old, old) == []


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    )
)
def test_what_yaml_writes_is_read_back(data: object) -> None:
    assert yamltext.parse(yamltext.dump(data), "x") == data


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused_with_a_reason(text: str) -> None:
    try:
        genome.parse(text)
    except GenomeError as error:
        assert str(error).startswith("genome")  # noqa: PT017  (a text that happens to be a genome is fine)


def test_reading_a_genome_needs_no_torch() -> None:
    code = (
        "import sys; from llmevo import genome; genome.load('genomes/llm-evo-merge-llama31.yaml');"
        "assert not {'torch', 'mergekit', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
