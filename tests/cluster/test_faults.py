"""A few of the runs of `faults`, always the same."""

from tests.cluster.faults import run_lane

RUNS = 15


def test_faults_at_random_moments(tmp_path):
    results, _, left = run_lane(seed=7, numbers=list(range(RUNS)), folder=str(tmp_path / "lane"))
    assert [result for result in results if result.failed] == []
    assert len(results) == RUNS and not left
