"""FedAvg on the bench model with other packages: a PyTorch loop, pfl-research and Flower's simulation.

Every peer runs the same PyTorch step (see `launch.suites.population.torch_step`) on every core, in
processes that are started once and then run a round on request, so that peers can take turns within one
measurement:

    with ARRANGEMENTS["PyTorch, compiled"](task) as peer:
        losses = peer.round()

The packages are optional, so they are imported where they are used; a missing one is an `InputError`.
"""

# pyright: reportMissingImports=false

import contextlib
import functools
import importlib.util
import multiprocessing
import os
import pathlib
import pickle
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray

import numpy as np
from jaxtyping import Float

from hfedmoe_jax.errors import InputError
from launch.suites.population.torch_step import Settings, Task, initial, make_train

CLOSE_S = 30
"""Seconds that a process may take to stop."""


class Arrangement:
    """Processes that run a round on request; a context manager that ends them.

    Args:
      serve: the function of each process: `serve(connection, *arguments)` sends None when it is ready,
        then answers each True with {client: mean loss}, until it receives False.
      arguments: the arguments of each process.
      finish: called in this process at the end of each round.

    Raises:
      RuntimeError: a process died; the text ends with its last output.
    """

    def __init__(self, serve: Callable, arguments: list[tuple], finish: Callable[[], None] = lambda: None):
        self._finish = finish
        self._folder = tempfile.TemporaryDirectory()
        self._log = pathlib.Path(self._folder.name, "log")
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for each in arguments:
            connection, theirs = context.Pipe()
            # pfl-research sets up its processes' communication only in one of this name.
            process = context.Process(
                target=_in_process, args=(serve, str(self._log), theirs, *each), name="MainProcess"
            )
            process.start()
            theirs.close()
            self._connections.append(connection)
            self._processes.append(process)
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def round(self) -> Float[np.ndarray, " clients"]:
        """Runs one round and returns each client's mean cross-entropy over its steps, in nats."""
        for connection in self._connections:
            connection.send(True)
        losses = {client: loss for answer in self._receive() for client, loss in answer.items()}
        self._finish()
        return np.array([losses[client] for client in sorted(losses)])

    def close(self) -> None:
        """Ends the processes."""
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it has ended already
                connection.send(False)
        for connection, process in zip(self._connections, self._processes, strict=True):
            process.join(CLOSE_S)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._folder.cleanup()

    def __enter__(self) -> "Arrangement":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _receive(self) -> list:
        try:
            return [connection.recv() for connection in self._connections]
        except EOFError:
            printed = self._log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"a peer's process died: {' | '.join(printed[-5:])}") from None


def _in_process(serve, log, connection, *arguments):
    """Runs `serve` with its output, and that of its libraries, in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["OMP_NUM_THREADS"] = "1"  # there is one process per core
    serve(connection, *arguments)


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def require(*packages: str) -> None:
    """Checks that optional packages are installed.

    Raises:
      InputError: a package is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError("peers", package, "is not installed", "pip install 'hfedmoe-jax[peers]'")


def _require_torch(settings):
    require("torch")
    if settings.compiled and shutil.which(os.environ.get("CXX", "g++")) is None:
        problem = "torch.compile needs a C++ compiler"
        raise InputError("peers", "torch", problem, "install g++ or name one in CXX")


def pytorch(task: Task, settings: Settings) -> Arrangement:
    """Plain PyTorch: one process per core with a share of the clients, parameters in shared memory."""
    _require_torch(settings)
    start = initial(task)
    workers = min(num_cores(), len(task.labels))
    shared = RawArray("f", start.size)
    sums = [RawArray("f", start.size) for _ in range(workers)]
    current = np.frombuffer(shared, np.float32)
    current[:] = start
    parts = [np.frombuffer(each, np.float32) for each in sums]
    shares = np.array_split(np.arange(len(task.labels)), workers)

    def average():
        np.copyto(current, parts[0])
        for part in parts[1:]:
            np.add(current, part, out=current)

    split = zip(sums, shares, strict=True)
    arguments = [(task, settings, shared, part, share.tolist()) for part, share in split]
    return Arrangement(_serve_pytorch, arguments, average)


def _serve_pytorch(connection, task, settings, shared, part, clients):
    import torch

    start, weighted_sum = (torch.frombuffer(each, dtype=torch.float32) for each in (shared, part))
    weight = task.num_examples / task.num_examples.sum()
    train = make_train(task, settings)
    vector = torch.empty_like(start)
    connection.send(None)
    while connection.recv():
        losses = {}
        weighted_sum.zero_()
        for client in clients:
            vector.copy_(start)
            losses[client] = train(vector, client)
            weighted_sum.add_(vector, alpha=float(weight[client]))
        connection.send(losses)


def pfl_research(task: Task, settings: Settings) -> Arrangement:
    """pfl-research's simulation: one process per core with its torch.distributed backend.

    The number of processes divides the clients: otherwise its sampler does not draw each client once a round.
    """
    _require_torch(settings)
    require("pfl")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]  # a free one
    workers = max(n for n in range(1, num_cores() + 1) if len(task.labels) % n == 0)
    return Arrangement(_serve_pfl, [(task, settings, rank, workers, port) for rank in range(workers)])


def _serve_pfl(connection, task, settings, rank, workers, port):
    # The environment that torchrun sets; pfl reads it when it is imported.
    os.environ |= dict(
        TORCHELASTIC_RUN_ID="bench", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers),
        LOCAL_WORLD_SIZE=str(workers), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    losses = {}
    train = make_train(task, settings)
    num_clients = len(task.labels)

    class Model(torch.nn.Module):
        loss = None  # a PyTorchModel has to have one, and metrics; `train` computes the losses

        def __init__(self):
            super().__init__()
            self.vector = torch.nn.Parameter(torch.from_numpy(initial(task)))

        def metrics(self, *batch):
            return {}

    class Averaging(FederatedAveraging):
        def train_one_user(self, initial_model_state, model, user_dataset, central_context):
            client = user_dataset.user_id
            losses[client] = train(model.pytorch_model.vector.data, client)
            return model.get_model_difference(initial_model_state), Metrics()

    class Turns(TrainingProcessCallback):
        def on_train_begin(self, *, model):
            connection.send(None)
            connection.recv()
            return Metrics()

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            connection.send(dict(losses))
            losses.clear()
            return not connection.recv(), Metrics()

    def examples(client):
        count = int(task.num_examples[client])
        return Dataset(raw_data=[np.empty(count)], user_id=client)

    population = FederatedDataset(examples, get_user_sampler("minimize_reuse", list(range(num_clients))))
    parameters = NNAlgorithmParams(
        central_num_iterations=sys.maxsize, evaluation_frequency=sys.maxsize,
        train_cohort_size=num_clients, val_cohort_size=0,
    )  # fmt: skip
    module = Model()
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    local = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=task.learning_rate, local_batch_size=None
    )
    backend = SimulatedBackend(population, population, [WeightByDatapoints()])
    Averaging().run(parameters, backend, model, local, callbacks=[Turns()])


def flower(task: Task, settings: Settings) -> Arrangement:
    """Flower's simulation: its FedAvg with one Ray actor per core."""
    _require_torch(settings)
    require("flwr", "ray")
    return Arrangement(_serve_flower, [(task, settings, num_cores())])


def _serve_flower(connection, task, settings, cores):
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    num_clients = len(task.labels)

    class Turns(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            if not connection.recv():
                raise SystemExit
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            if failed := [reply.error.reason for reply in replies if reply.has_error()]:
                raise RuntimeError(failed[0])
            result = super().aggregate_train(server_round, replies)
            metrics = [reply.content["metrics"] for reply in replies]
            connection.send({int(each["client"]): each["loss"] for each in metrics})
            return result

    server = ServerApp()

    @server.main()
    def main(grid, context):
        grid.pull_interval = 0.02  # by default it polls ten times a second
        connection.send(None)
        strategy = Turns(fraction_evaluate=0.0, min_train_nodes=num_clients, min_available_nodes=num_clients)
        strategy.start(grid, ArrayRecord([initial(task)]), num_rounds=sys.maxsize)

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "task")
        path.write_bytes(pickle.dumps((task, settings)))
        run_simulation(
            server,
            _flower_client(str(path)),
            num_clients,
            backend_config={
                "init_args": {"num_cpus": cores, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )


@functools.cache
def _flower_task(path):
    """Returns the task of a Ray actor, read and compiled once."""
    task, settings = pickle.loads(pathlib.Path(path).read_bytes())
    return task, make_train(task, settings)


def _flower_client(path):
    import torch
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train_client(message, context):
        task, train = _flower_task(path)
        client = int(context.node_config["partition-id"])
        (array,) = message.content["arrays"].to_numpy_ndarrays()
        vector = torch.from_numpy(array)
        loss = train(vector, client)
        metrics = {"num-examples": float(task.num_examples[client]), "loss": loss, "client": client}
        content = RecordDict({"arrays": ArrayRecord([vector.numpy()]), "metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=message)

    return app


COMPILED = {"compiled": Settings(True, "mkl"), "compiled, oneDNN": Settings(True, "onednn")}

ARRANGEMENTS: dict[str, Callable[[Task], Arrangement]] = {
    "PyTorch": functools.partial(pytorch, settings=Settings(False, "mkl")),
    "PyTorch, oneDNN": functools.partial(pytorch, settings=Settings(False, "onednn")),
} | {
    f"{peer}, {how}": functools.partial(arrangement, settings=settings)
    for peer, arrangement in (("PyTorch", pytorch), ("pfl-research", pfl_research), ("Flower", flower))
    for how, settings in COMPILED.items()
}
"""Peers of `--peers` by name; a setting that does not work is an error and is not replaced by another."""
