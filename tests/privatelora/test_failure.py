"""Clouds that are killed, hang or send nonsense, and links that are cut: the text that would have come, or one line."""

import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from dllama.cluster import wire
from dllama.cluster.links import LinkLost
from dllama.cluster.listener import Listener
from dllama.embedded import model_path
from dllama.errors import ClusterError, OutOfMemoryError
from dllama.formats import FloatType, ModelFile
from dllama.kernels.team import Team
from dllama.privatelora.adapter import CLOUD_FILE, write_adapter
from dllama.privatelora.answers import Answers
from dllama.privatelora.cloud import Cloud, CloudSettings
from dllama.privatelora.edge import MOST_LOSSES, EdgeEngine
from dllama.privatelora.replies import Replies
from dllama.privatelora.settings import EdgeSettings
from dllama.privatelora.shape import AdapterShape
from tests.cluster.forwarder import Forwarder
from tests.cluster.stranger import Stranger
from tests.engine.models import SHAPES, random_model
from tests.privatelora.adapters import random_halves, strong_halves
from tests.privatelora.fake_edge import HELLO
from tests.privatelora.nodes import EXACT, CloudProcess, edge, open_llama, run, write

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does he have now?"
STEPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of an adapter of the embedded model."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, *strong_halves(ModelFile(model_path()).config, ("q", "v")))
    return folder


@pytest.fixture(scope="module")
def cloud():
    with CloudProcess(model_path(), types=EXACT) as cloud:
        assert cloud.address
        yield cloud


@pytest.fixture(scope="module")
def expected(cloud, folder):
    """What is written when nothing happens."""
    with open_llama(cloud.address, adapter=folder) as llama:
        text = write(llama, PROMPT, STEPS)
        assert text == write(llama, PROMPT, STEPS) != ""
        return text


@pytest.mark.parametrize("layers", [(0, 0), (1, 1)])
def test_a_cloud_that_is_killed_and_comes_back(cloud, folder, expected, layers):
    lines = []

    def kill() -> None:
        cloud.kill()
        threading.Timer(0.5, cloud.restart).start()

    with open_llama(cloud.address, lines.append, adapter=folder, edge_layers=layers) as llama:
        assert write(llama, PROMPT, STEPS, fault=kill) == expected
        lost = [line for line in lines if f"cloud {cloud.address} is lost at token " in line]
        assert len(lost) == 1 and "\n" not in lost[0]
        assert "layers in the cloud" in lines[-1]
        assert write(llama, PROMPT, STEPS) == expected


def test_a_cloud_that_comes_back_and_loads_for_long(folder, expected):
    """Longer than an edge tries to reach it, and than it waits for an answer."""
    lines = []
    with CloudProcess(model_path(), types=EXACT) as own:

        def kill() -> None:
            own.kill()
            own.options["loading_seconds"] = 6.0
            threading.Timer(0.1, own.restart).start()

        with open_llama(own.address, lines.append, adapter=folder, step_timeout=3.0, reconnect_timeout=3.0) as llama:
            assert write(llama, PROMPT, STEPS, fault=kill) == expected
    assert f"waiting for the cloud {own.address}, which is not ready yet" in lines
    assert sum("is lost at token" in line for line in lines) == 1


def test_a_cloud_that_still_loads_is_waited_for(small):
    """By edges; others are told at once what it is."""
    model, folder = small
    lines = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with CloudProcess(model.path, port=port, loading_seconds=6.0) as cloud:
        cloud.said("loading")
        with Stranger(f"127.0.0.1:{port}") as root:
            root.say(HELLO._replace(role="root"))
            assert "this worker serves edges" in root.hear(wire.Refuse).reason
        assert cloud.port is None, "it is not ready"
        with edge(model, f"127.0.0.1:{port}", lines.append, adapter=folder, step_timeout=2.5) as engine:
            assert lines[0] == f"waiting for the cloud 127.0.0.1:{port}, which is not ready yet"
            assert np.isfinite(run(engine, [1])).all()


def test_a_model_that_cannot_be_loaded_ends_the_cloud(small):
    model, _ = small

    def fails(model, progress):
        raise OutOfMemoryError("too large")

    settings = CloudSettings("127.0.0.1", 0, None, 1, model.path)
    with pytest.raises(OutOfMemoryError, match="^too large$"):
        Cloud(settings, fails, lambda line: None)


def test_a_cloud_that_is_not_there_shows_before_anything_is_loaded(small):
    model, folder = small
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = EdgeSettings(f"127.0.0.1:{server.getsockname()[1]}", None, folder, (1, 0), connect_timeout=0.3)
    tasks, lines, team = [], [], Team(1)
    types = FloatType.F32, FloatType.F32
    with pytest.raises(ClusterError, match="is 'dllama worker --device auto --model FILE' running"):
        EdgeEngine(model, team, 16, *types, settings, lines.append, lambda task, *_: tasks.append(task))
    team.close()
    assert "loading weights" not in tasks and not lines


def test_an_edge_that_cannot_load_takes_its_leave(small, monkeypatch):
    model, folder = small

    def fails(*args, **options):
        raise OutOfMemoryError("too large")

    monkeypatch.setattr("dllama.privatelora.edge.Forward", fails)
    with CloudProcess(model.path) as cloud:
        with pytest.raises(OutOfMemoryError), edge(model, cloud.address, adapter=folder):
            pass
        cloud.said("it has left")


def test_a_link_that_is_cut_and_mended(cloud, folder, expected):
    lines = []
    wire_to_cloud = Forwarder(cloud.port)

    def cut() -> None:
        since.append(len(cloud.lines))
        wire_to_cloud.cut()
        threading.Timer(0.3, wire_to_cloud.mend).start()

    since = []
    with open_llama(wire_to_cloud.address, lines.append, adapter=folder) as llama:
        assert write(llama, PROMPT, STEPS, fault=cut) == expected
        assert any("is lost at token" in line for line in lines)
        cloud.said("the connection broke", since[0])
    wire_to_cloud.close()


def test_a_cloud_that_hangs_is_lost(cloud, folder, expected):
    """Its process is stopped, and goes on later: the edge, which has taken its leave, comes again."""
    lines = []

    def stop() -> None:
        cloud.stop()
        threading.Timer(2.0, cloud.go_on).start()

    with open_llama(cloud.address, lines.append, adapter=folder, step_timeout=0.5) as llama:
        assert write(llama, PROMPT, STEPS, fault=stop) == expected
        assert any("no answer for 0.5 s" in line for line in lines)


def test_a_cloud_that_is_gone_for_good(folder):
    with CloudProcess(model_path(), types=EXACT) as own:
        with open_llama(own.address, adapter=folder, reconnect_timeout=0.5, connect_timeout=0.3) as llama:
            with pytest.raises(ClusterError) as raised:
                write(llama, PROMPT, STEPS, fault=own.kill)
            said = str(raised.value)
            assert said.startswith(f"cloud {own.address} is not back: ") and "\n" not in said


def test_nothing_listens_there(folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClusterError, match=f"^cloud 127.0.0.1:{port}: [^\n]*nothing listens there[^\n]*$"):
        open_llama(f"127.0.0.1:{port}", adapter=folder, connect_timeout=0.3)


class FakeCloud:
    """One made by hand, for one model, that welcomes and opens, and then says what it is told to.

    replies: what it says to each Enter, a list of messages and their payloads
    """

    def __init__(self, replies):
        self._listener = Listener("127.0.0.1", 0, None)
        self.address = f"127.0.0.1:{self._listener.port}"
        self.replies, self.entered = replies, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            with suppress(LinkLost):
                received = self._listener.receive(20)
                if received:
                    self._hear(*received)

    def _hear(self, peer, frames) -> None:
        message, _ = wire.decode(frames)
        if type(message) is wire.Hello:
            peer.send(wire.encode(wire.Welcome(*HELLO[:2], "fake", 1, None, None, "none", None)))
        elif type(message) is wire.Open:
            peer.send(wire.encode(wire.Opened("nothing")))
        elif type(message) is wire.Bye:
            peer.send(wire.encode(wire.Bye()))
        elif type(message) is wire.Enter:
            self.entered += 1
            for reply in self.replies(message):
                peer.send(reply)

    def __enter__(self) -> "FakeCloud":
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model and the folder of an adapter for its q."""
    folder = tmp_path_factory.mktemp("small")
    model = random_model(folder / "model.m", SHAPES["mha"])
    write_adapter(folder, *strong_halves(model.config, ("q",), ranks=(8, 8)))
    return model, folder


def low(value: float = 0.0, count: int = 8, layer: int = 0, product: int = 0, step: int = 0):
    """What a cloud sends at a stop, for the step that has come or one beside it."""
    values = np.full(count, value, np.float32).tobytes()
    return lambda enter: [wire.encode(wire.Low(enter.step + step, layer, product), values)]


def leave(value: float = 0.0, count: int = 64, step: int = 0):
    values = [np.full(count, value, np.float32).tobytes()] if count else []
    return lambda enter: [wire.encode(wire.Leave(enter.step + step, 5), *values)]


@pytest.mark.parametrize(
    "replies, said",
    [
        (low(np.nan), "it sent a value that is infinite or no number"),
        (low(-np.inf), "it sent a value that is infinite or no number"),
        (low(count=7), "it sent 28 bytes for 1 rows of 32 bytes"),
        (low(product=1), "it sent product 1 of layer 0, which has no adapter"),
        (low(layer=2), "it sent product 0 of layer 2, which has no adapter"),
        (low(step=1), "it sent Low, which nobody waits for"),
        (leave(np.nan), "it sent a value that is infinite or no number"),
        (leave(count=63), "it sent 252 bytes for 1 rows of 256 bytes"),
        (leave(count=0), "it sent 0 bytes for 1 rows of 256 bytes"),
        (leave(step=1), "it sent Leave, which nobody waits for"),
        (lambda enter: [wire.encode(wire.Opened("x"))], "it sent Opened, which nobody waits for"),
        (lambda enter: [[b"\xff"]], "it sent what is no message: "),
        (lambda enter: [wire.encode(wire.Refuse("no more"))], "no more"),
    ],
)
def test_a_cloud_that_sends_nonsense(small, replies, said):
    """One line, and no second try: it would send the same again."""
    model, folder = small
    with FakeCloud(replies) as fake:
        with edge(model, fake.address, adapter=folder, reconnect_timeout=0.5) as engine:
            with pytest.raises(ClusterError) as raised:
                run(engine, [1])
        assert str(raised.value).startswith(f"cloud {fake.address}: {said}") and "\n" not in str(raised.value)
        assert fake.entered == 1


def test_a_cloud_that_hangs_at_every_step(small):
    model, folder = small
    lines = []
    with FakeCloud(lambda enter: []) as fake:
        with edge(model, fake.address, lines.append, adapter=folder, step_timeout=0.1) as engine:
            with pytest.raises(ClusterError, match="^[^\n]* is lost again and again: no answer for 0.1 s$"):
                run(engine, [1])
    assert fake.entered == MOST_LOSSES
    assert sum("is lost at token 0" in line for line in lines) == MOST_LOSSES - 1


def test_a_cloud_that_gets_nonsense_out_of_an_adapter(tmp_path, small):
    """M so large that what it gives is infinite: the edge notices it, and the cloud lives on."""
    model, _ = small
    cloud_half, edge_half = random_halves(AdapterShape.of(model.config, 8, 8, ("q",)))
    for matrix in edge_half.matrices.values():
        matrix[:] = 3e38
    write_adapter(tmp_path, cloud_half, edge_half)
    with CloudProcess(model.path, adapters=[str(tmp_path / CLOUD_FILE)]) as cloud:
        with edge(model, cloud.address, adapter=tmp_path) as engine:
            with pytest.raises(ClusterError, match="a value that is infinite or no number$"):
                run(engine, [1])
        with edge(model, cloud.address) as engine:
            assert np.isfinite(run(engine, [1])).all()


def test_an_edge_that_hangs_is_told_so_when_it_goes_on(small, monkeypatch):
    model, folder = small

    def slow(function):
        def later(*args):
            time.sleep(1.0)
            return function(*args)

        return later

    with CloudProcess(model.path, step_timeout=0.3) as cloud, edge(model, cloud.address, adapter=folder) as engine:
        with (
            monkeypatch.context() as patch,
            pytest.raises(ClusterError, match="no answer for 0.3 s$"),
        ):
            patch.setattr(Replies, "go", slow(Replies.go))
            patch.setattr(Answers, "__call__", slow(Answers.__call__))  # where there are no replies
            run(engine, [1])
        assert np.isfinite(run(engine, [1])).all(), "it may come again"
