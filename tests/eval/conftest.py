"""What the tests of the evaluation share. Nothing is downloaded: the libraries are told so before they are imported."""

import os

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint, its conversion in it."""
    pytest.importorskip("transformers", reason="its models are compared with: pip install '.[eval]'")
    from tests.eval.models import build

    return build(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def problems(tmp_path):
    from tests.eval.models import write_problems

    return write_problems(tmp_path / "problems.jsonl")
