import pytest

from tests.tokenizer.models import LLAMA2, train


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A small SentencePiece model of Llama 2's kind."""
    return train(tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture(scope="session")
def llama2_model(tmp_path_factory):
    """Llama 2's own SentencePiece model, in a folder that can be written to."""
    if not LLAMA2.exists():
        pytest.skip("needs Llama 2's tokenizer.model, which is not shipped")
    path = tmp_path_factory.mktemp("llama2") / "tokenizer.model"
    path.write_bytes(LLAMA2.read_bytes())
    return path


@pytest.fixture(params=["small_model", "llama2_model"])
def sentencepiece_model(request):
    return request.getfixturevalue(request.param)
