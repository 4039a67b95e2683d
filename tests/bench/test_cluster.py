"""The parts of the cluster's measures that need no quiet machine."""

import os
import socket

import pytest

from bench import plot
from bench.cluster import PUBLISHED, figures
from bench.nodes import WARM_UP, Cluster, ClusterRun, last_line, listens, on_this_machine
from bench.runs import Weights
from bench.synth import write


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    weights = Weights("tiny", folder / "tiny.m", folder / "tiny.t", folder / "none.gguf")
    write("tiny", weights.model, tokenizer=weights.tokenizer)
    return weights


def a_run(token_ms: float, sent: int) -> ClusterRun:
    stats = {
        "decode_ms": [900.0] * WARM_UP + [token_ms - 2, token_ms, token_ms + 2],
        "inference_ms": [800.0] * WARM_UP + [token_ms - 1] * 3,
        "transfer_ms": [100.0] * WARM_UP + [1.0] * 3,
        "sent_bytes": [9] * WARM_UP + [sent] * 3,
        "received_bytes": [9] * WARM_UP + [2 * sent] * 3,
        "load_ms": 500.0,
        "prompt_tokens": 16,
        "prefill_ms": 50.0,
        "peak_rss_bytes": 1000,
        "token_ids": [5] * (WARM_UP + 3),
    }
    return ClusterRun.of(stats, 1.5)


def test_figures_are_of_the_mean_tokens_without_the_first_ones():
    found = figures([a_run(10, 3000), a_run(12, 3000), a_run(20, 3000)])
    assert (found["token"].low, found["token"].median, found["token"].high) == (10, 12, 20)
    assert found["inference"].median == 11
    assert found["transfer"].median == 1
    assert (found["sent_kb"].median, found["received_kb"].median) == (3, 6)


def test_one_node_runs_as_every_measure_starts_it(weights):
    with Cluster(on_this_machine(1), weights, context=64) as cluster:
        run = cluster.run(tokens=3, prompt=8)
    assert len(run.token_ids) == WARM_UP + 3 and run.prompt_tokens == 8
    assert [len(each) for each in (run.token_ms, run.inference_ms, run.transfer_ms, run.sent_bytes)] == [3] * 4
    assert min(run.token_ms) > 0 and run.prefill_ms > 0 and run.peak_bytes > 0 and run.first_token_s > 0
    assert not cluster.folder.exists()


def test_a_run_that_fails_gives_its_reason(weights):
    with Cluster(on_this_machine(1), weights, context=4) as cluster, pytest.raises(SystemExit, match="context"):
        cluster.run(tokens=3, prompt=8)


def test_listens_sees_ports_that_are_listened_on():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listens(os.getpid(), port)
    assert not listens(os.getpid(), port)


def test_last_line_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    assert last_line(log) == ""
    log.write_text("first\nError: second\n\n")
    assert last_line(log) == "Error: second"


def test_published_times_are_hardly_more_than_their_parts():
    """The published table gives averages: the parts leave out what is neither inference nor transfer."""
    for total, inference, transfer in PUBLISHED.values():
        assert 0 <= total - inference - transfer < 0.01 * total


def test_plot_draws_every_side(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    plot.bars(path, {"ours": {1: (100.0, 0.0), 2: (50.0, 5.0)}, "theirs": {1: (200.0, 1.0), 2: (120.0, 9.0)}})
    assert path.read_bytes().startswith(b"\x89PNG")
