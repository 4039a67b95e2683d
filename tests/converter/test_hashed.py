import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from converter.hashed import HashedFile


@given(st.binary(max_size=100), st.lists(st.tuples(st.integers(0, 100), st.integers(0, 40))))
def test_the_hash_is_that_of_the_whole_file_whatever_was_read_of_it(tmp_path_factory, data, reads):
    path = tmp_path_factory.mktemp("hashed") / "a"
    path.write_bytes(data)
    file = HashedFile(path)
    for start, count in reads:
        start = min(start, len(data))
        file.add(start, np.frombuffer(data[start : start + count], np.uint8))
    assert file.nbytes == len(data)
    assert file.finish() == hashlib.sha256(data).hexdigest()


def test_bytes_in_their_order_are_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"head" + b"x" * 10 + b"tail")
    beside = []

    def read_beside(path, offset, count):
        beside.append((offset, count))
        return np.frombuffer(path.read_bytes()[offset : offset + count], np.uint8)

    monkeypatch.setattr("converter.hashed.read_bytes", read_beside)
    file = HashedFile(path)
    file.add(4, np.frombuffer(b"x" * 6, np.uint8))
    file.add(10, np.frombuffer(b"x" * 4, np.uint8))
    assert file.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert beside == [(0, 4), (14, 4)]
