"""Every kind of memory can be read, by one thread and by several."""

import pytest

from bench.bandwidth import KINDS, read_bandwidth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_reads(kind, threads):
    found = read_bandwidth(threads, kind, nbytes=8 << 20, passes=3)
    assert (found.kind, found.threads) == (kind, threads)
    assert found.best >= found.median > 0


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="huge pages"):
        read_bandwidth(1, "hugepages")
