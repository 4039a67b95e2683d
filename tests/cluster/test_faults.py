"""A few of the runs of `faults`, always the same."""

from tests.cluster.faults import run_lanes

RUNS = 15


def test_faults_at_random_moments(tmp_path):
    lanes = run_lanes(seed=7, numbers=range(RUNS), lanes=3, folder=tmp_path)
    results = [result for found, _, _ in lanes for result in found]
    assert [result for result in results if result.failed] == []
    assert len(results) == RUNS
    assert [left for _, _, left in lanes] == [[], [], []]
