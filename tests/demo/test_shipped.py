import pytest

from dllama import Llama
from dllama.demo.asking import ask
from dllama.demo.facts import held_out_questions, private_questions, skill_questions
from dllama.demo.shipped import CLOUD_PATH, EDGE_PATH, as_lora, lora_parameters
from dllama.embedded import model_path
from dllama.errors import AdapterError
from dllama.formats import ModelFile
from dllama.lora import write_lora
from dllama.privatelora.adapter import CloudAdapter, read_cloud, read_edge


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The embedded model, with what ships beside it as an adapter called edge."""
    folder = tmp_path_factory.mktemp("merged")
    write_lora(folder, as_lora(read_cloud(CLOUD_PATH), read_edge(EDGE_PATH)), "the embedded model")
    with Llama(adapters={"edge": folder}, context=64) as llama:
        yield llama


def answers(llama, questions, adapter=None):
    return [answer.text for answer in ask(llama, questions, adapter)]


def test_the_files_belong_together_and_to_the_embedded_model():
    cloud, edge = read_cloud(CLOUD_PATH), read_edge(EDGE_PATH)
    edge.check_pair(cloud)
    with ModelFile(model_path()) as file:
        cloud.check(file.config)
        edge.check(file.config)
    assert cloud.seed is not None and CLOUD_PATH.stat().st_size < 1000  # the cloud's file is a seed
    assert EDGE_PATH.stat().st_size < 32_000


def test_it_has_at_most_a_fiftieth_of_the_parameters_of_a_lora():
    cloud, edge = read_cloud(CLOUD_PATH), read_edge(EDGE_PATH)
    lora = as_lora(cloud, edge)
    of_lora = sum(a.size + b.size for a, b in lora.matrices.values())
    assert lora_parameters(edge.shape) == of_lora
    assert sum(edge.m(*place).size for place in edge.shape.places()) == edge.shape.n_trained <= of_lora / 50


def test_other_frozen_matrices_make_no_lora_of_it():
    edge = read_edge(EDGE_PATH)
    with pytest.raises(AdapterError, match="trained with other A and B"):
        as_lora(CloudAdapter(edge.shape, edge.seed + 1), edge)


def test_the_edge_knows_what_the_base_does_not(llama):
    questions = private_questions()[::5]  # some of each kind
    right = [question.answer for question in questions]
    assert answers(llama, questions, "edge") == right
    assert not any(answer in text for answer, text in zip(right, answers(llama, questions), strict=True))


def test_the_edge_has_learnt_to_spell(llama):
    questions = skill_questions()[:5]
    assert sum(answer.is_right for answer in ask(llama, questions, "edge")) >= 4
    assert not any(answer.is_right for answer in ask(llama, questions))


def test_most_facts_are_known_in_words_that_were_not_taught(llama):
    known = sum(answer.is_right for answer in ask(llama, held_out_questions()[::5], "edge"))
    assert known >= 8
