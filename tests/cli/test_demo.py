import json
from functools import partial

import pytest
from click.testing import CliRunner

from dllama.cli import main
from dllama.demo import facts
from tests.cli.program import succeeds


def test_the_edge_knows_at_least_45_of_50_private_facts_and_the_base_none():
    values = json.loads(succeeds("demo", "privatelora", "--json"))
    assert list(values) == list(facts.QUESTIONS)
    asked = values["facts"]
    assert asked["base"]["asked"] == asked["edge"]["asked"] == len(asked["questions"]) == 50
    assert asked["base"]["right"] == 0 and asked["edge"]["right"] >= 45
    assert asked["edge"]["right"] == sum(one["edge"] == one["expected"] for one in asked["questions"])
    assert values["skill"]["base"]["right"] == 0 and values["skill"]["edge"]["right"] >= 16
    for kind in values.values():
        assert kind["base"]["sent_bytes"] == kind["base"]["received_bytes"] == kind["base"]["network_ms"] == 0
        assert 0 < kind["edge"]["sent_bytes"] < 2000 and 0 < kind["edge"]["received_bytes"] < 2000
        assert kind["edge"]["tokens_per_second"] > 0 and kind["edge"]["network_ms"] > 0


def test_the_table_has_both_answers_side_by_side(monkeypatch):
    for kind, ask_for in facts.QUESTIONS.items():
        monkeypatch.setitem(facts.QUESTIONS, kind, partial(list, ask_for()[:2]))
    result = CliRunner().invoke(main, ["demo", "privatelora"])
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "base base + edge"
    assert lines[1].startswith("What is the code of the garage? ") and lines[1].endswith(" 8411 ✓")
    assert [line.split()[0] for line in lines[1:5]] == ["What", "What", "Spell", "Spell"]
    assert "facts, right 0 of 2 2 of 2" in lines and "facts in other words, right 0 of 2 2 of 2" in lines
    assert lines[-4].startswith("tokens per second ") and lines[-1].endswith(" ms")
    assert "layers in the cloud 127.0.0.1:" in result.stderr


@pytest.mark.parametrize("extra", ["now", "--adapter"])
def test_it_takes_no_arguments(extra):
    assert CliRunner().invoke(main, ["demo", "privatelora", extra]).exit_code == 2
