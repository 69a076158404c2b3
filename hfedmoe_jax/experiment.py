"""A whole federated run without files: build it from a config, advance it a round, judge it.

`launch` adds work directories, checkpoints and figures; a notebook needs only this module:

    experiment = Experiment(config, make_mesh())
    state = experiment.init()
    for _ in range(config.fl.rounds):
        state, row, failures = experiment.step(state)

Axes: C clients in all, M clients of a round's cohort, L MoE layers, E experts.
"""

import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hfedmoe_jax.accounting import Ledger, account_round, enter, open_ledger
from hfedmoe_jax.algorithms import Portion, RoundMetrics, ServerState, build_algorithm, compose
from hfedmoe_jax.checks import check_config
from hfedmoe_jax.client import NONFINITE, OK, OVER_BUDGET, STATUS_NAMES, ClientData
from hfedmoe_jax.data import (
    Ahead,
    FederatedData,
    holdout_batches,
    host_of,
    load_federated,
    most_tokens,
    pad_batches,
    round_batches,
)
from hfedmoe_jax.devices import assign_devices, expert_budget, fraction_budget, read_profiles
from hfedmoe_jax.engines import Clients
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import (
    EvaluationBatches,
    Quality,
    client_spread,
    make_evaluate,
    make_usage,
    summarize,
)
from hfedmoe_jax.models import Params, build_model, model_cost
from hfedmoe_jax.optimizers import build_optimizer, per_expert
from hfedmoe_jax.population import NOBODY, Block, chunk_size, empty_places
from hfedmoe_jax.sums import power_below

COHORT_STREAM, DEVICE_STREAM = 101, 102  # the host's random streams, apart from those of the data


class RunState(NamedTuple):
    """Everything that a run changes; what a checkpoint holds.

    Attributes:
      round: rounds done.
      server: the algorithm's state.
      best: parameters of the best round so far by validation accuracy.
      best_accuracy, best_round: of that round (-1 and 0 before the first evaluation).
      ledger: totals.
    """

    round: np.ndarray
    server: ServerState
    best: Params
    best_accuracy: np.ndarray
    best_round: np.ndarray
    ledger: Ledger


class Outcome(NamedTuple):
    """The end of a run.

    Attributes:
      final, best: test quality of the last model, and of the best one by validation.
      client_accuracy: float [C], of the last model on each client's own held-out examples.
      client_spread: its mean, standard deviation and mean of the worst 10%.
      expert_load: [L, E], share of a layer's validation tokens that each expert served.
      usage_before, usage_after: [M, L, E], u_c (16) of the last cohort as its members reported it while
        training (NaN where a member failed), and under the aggregated model on the same batches.
    """

    final: Quality
    best: Quality
    client_accuracy: np.ndarray
    client_spread: tuple[float, float, float]
    expert_load: np.ndarray
    usage_before: np.ndarray
    usage_after: np.ndarray


class Experiment:
    """A run as a few methods over immutable parts.

    Args:
      config: of the run, see configs/hfedmoe.py.
      mesh: devices, see `make_mesh`.
      data: clients and splits; loaded by the config if not given.

    Attributes:
      model, algorithm, cost: see their modules.
      profiles: each client's device.
      budgets: int [C], experts that each client can train, over all layers.
      sizes: int [C], passages that each client trains on.
      num_passages: of all clients, those they hold out included.
      hosts: how many processes share the work; `data` then has this one's clients only.

    Raises:
      InputError: what the config asks for cannot be done.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, data: FederatedData | None = None):
        check_config(config)
        data = data if data is not None else load_federated(config)
        self.config, self.mesh = config, mesh
        self.num_clients = len(data.client_train)
        self.model = build_model(config.model, len(data.label_names), data.vocab_size, config.data.seq_len)
        self.init_key, self.round_key = jax.random.split(jax.random.key(config.seed))
        optimizer = per_expert(build_optimizer(config.client, config.client.optimizer, "client"))
        shapes = jax.eval_shape(self.model.init, self.init_key)
        self.cost = model_cost(
            config.model,
            shapes,
            jax.eval_shape(optimizer.init, shapes),
            config.fl.batch_size,
            config.data.seq_len,
        )
        classes, shares = read_profiles(config.devices)
        rng = np.random.default_rng([config.seed, DEVICE_STREAM])
        self.profiles = [classes[index] for index in assign_devices(self.num_clients, shares, rng)]
        self.budgets = self._budgets()
        self.chunk = chunk_size(config.fl.chunk, self.cost, mesh)
        self.num_passages = len(data.train.labels)
        self.sizes = np.array([len(rows) for rows in data.client_train])
        self.relative_sizes = (self.sizes * power_below(1 / self.sizes.max())).astype(np.float32)
        clients = Clients(self.budgets, most_tokens(data, config.fl))
        self.hosts = len({device.process_index for device in mesh.devices.flat})
        if self.num_clients < self.hosts:
            raise InputError(
                "fl.clients",
                self.num_clients,
                f"fewer than the {self.hosts} processes",
                "use at least a client a process",
            )
        # The hosts' answers to what needs everybody's data are alike; from here on each has its own.
        self._majority_label = np.bincount(data.train.labels).argmax()
        self.data = data if self.hosts == 1 else data.of_host(jax.process_index(), self.hosts)
        self.algorithm = build_algorithm(config, self.model, clients, mesh, self.chunk)
        self.personal = self.algorithm.composition.personal
        judged = (self.model, self.personal, mesh, self.chunk)
        self._evaluate = make_evaluate(*judged, config.model.eval_capacity_factor)
        self._usage = make_usage(*judged, config.model.capacity_factor, config.importance.unit)
        self._compiled: set[int] = set()  # tiers that have run: a first time is no measure of speed
        self._ahead: tuple[int, Ahead] | None = None  # the next round's data, assembled while this one runs

    def _budgets(self) -> np.ndarray:
        """Returns each client's budget; all experts for an algorithm that ignores budgets."""
        parts = compose(self.config)
        if parts.score == "none" and not parts.fail_over_budget:
            budgets = [self.cost.num_experts] * self.num_clients
        elif self.config.budget.fraction:
            budgets = [fraction_budget(self.config.budget.fraction, self.cost.num_experts)] * self.num_clients
        else:
            budgets = [expert_budget(profile, self.cost, self.config.fl.forward) for profile in self.profiles]
        return np.array(budgets, np.int32)

    def init(self) -> RunState:
        """Returns the state before the first round."""
        server = self.algorithm.init(jax.jit(self.model.init)(self.init_key))
        best = jax.tree.map(jnp.copy, server.params)
        return RunState(np.int64(0), server, best, np.float64(-1), np.int64(0), open_ledger())

    def cohort(self, round_number: int) -> np.ndarray:
        """Returns the clients of a round, int [M], sampled without replacement."""
        rng = np.random.default_rng([self.config.seed, COHORT_STREAM, round_number])
        return np.sort(rng.choice(self.num_clients, self.config.fl.clients_per_round, replace=False))

    def client_data(self, round_number: int, places: np.ndarray | None = None) -> ClientData:
        """Returns the input of a round, stacked over members of its cohort.

        Args:
          places: which members; a negative one gives zeros. Default: all, in order.
        """
        fl = self.config.fl
        cohort = self.cohort(round_number)
        places = np.arange(len(cohort)) if places is None else places
        clients = cohort[places[places >= 0]]
        rng = np.random.default_rng([self.config.seed, COHORT_STREAM, round_number, 1])
        available = rng.random(self.num_clients)[clients] >= fl.dropout_probability
        tokens, labels = round_batches(
            self.data, clients, round_number, fl.local_steps, fl.batch_size, self.config.seed
        )
        sizes = self.relative_sizes[clients]
        data = ClientData(clients.astype(np.int32), tokens, labels, sizes, self.budgets[clients], available)

        def spread(values):
            result = np.zeros((len(places), *values.shape[1:]), values.dtype)
            result[places >= 0] = values
            return result

        return jax.tree.map(spread, data)

    def blocks(self, round_number: int) -> Iterator[tuple[Block, ClientData]]:
        """Yields the blocks of a round with what this process's clients bring, as host arrays."""
        cohort = self.cohort(round_number)
        mine = np.array([device.process_index for device in self.mesh.devices[:, 0]]) == jax.process_index()
        for block in self.algorithm.plan(cohort, host_of(cohort, self.hosts)):
            places = np.where(mine[:, None], block.members, NOBODY).reshape(-1)
            yield block, self.client_data(round_number, places)

    def portions(self, round_number: int) -> Iterator[Portion]:
        """Yields the blocks of a round on the devices, then begins to assemble those of the next round."""

        def assembled(number: int) -> Ahead:
            return Ahead(self.algorithm.portion(*pair) for pair in self.blocks(number))

        number, ready = self._ahead or (None, None)
        self._ahead = None
        if number != round_number:
            if ready:
                ready.close()
            ready = assembled(round_number)
        yield from ready
        if round_number < self.config.fl.rounds:
            self._ahead = (round_number + 1, assembled(round_number + 1))

    def step(self, state: RunState) -> tuple[RunState, dict[str, float], list[str]]:
        """Runs one round; `state` is consumed (its buffers are donated).

        Returns:
          The new state, the round's row of metrics, and a line for each client whose update was not
          finite.
        """
        began = time.perf_counter()
        number, steps = int(state.round) + 1, self.config.fl.local_steps
        members = self.cohort(number)
        key = jax.random.fold_in(self.round_key, number)
        plan = self.algorithm.plan(members, host_of(members, self.hosts))
        tiers = {block.tier for block in plan}
        server, metrics = self.algorithm.round(state.server, self.portions(number), key)
        jax.block_until_ready(server.params)
        round_s = time.perf_counter() - began
        profiles = [self.profiles[c] for c in members]
        account = account_round(metrics, profiles, self.cost, steps, self.algorithm.scoring, self.personal)
        ledger = enter(state.ledger, account, metrics)
        if tiers <= self._compiled:
            ledger = ledger._replace(
                train_s=ledger.train_s + round_s, timed_steps=ledger.timed_steps + steps * len(members)
            )
        self._compiled |= tiers
        row = {"round": number, **round_row(metrics, self.cost.num_experts), **account._asdict()}
        row["empty_places_share"] = empty_places(plan, self.chunk)
        state = state._replace(round=np.int64(number), server=server)
        last = number == self.config.fl.rounds
        if number % self.config.eval.every == 0 or last:
            quality, client_accuracy = self.judge(server.params)
            mean, deviation, worst = client_spread(client_accuracy)
            row |= dict(
                validation_accuracy=quality.accuracy,
                validation_loss=quality.loss,
                validation_router_entropy=quality.router_entropy,
                client_accuracy_mean=mean,
                client_accuracy_std=deviation,
                client_accuracy_worst10=worst,
            )
            if quality.accuracy > state.best_accuracy:
                state = state._replace(
                    best=jax.tree.map(jnp.copy, server.params),
                    best_accuracy=np.float64(quality.accuracy),
                    best_round=np.int64(number),
                )
        ledger = ledger._replace(wall_s=ledger.wall_s + (time.perf_counter() - began))
        row |= dict(simulated_time_s=float(ledger.simulated_time_s), wall_s=float(ledger.wall_s))
        failures = [
            f"client {members[index]}, round {number}: the loss is not finite; its update is dropped"
            for index in np.flatnonzero(metrics.report.status == NONFINITE)
        ]
        return state._replace(ledger=ledger), row, failures

    @cached_property
    def _validation(self) -> tuple[EvaluationBatches, int, np.ndarray]:
        """Validation batches, then one a client of its own held-out examples; how many; each one's host."""
        limit = self.config.eval.max_examples or len(self.data.validation.labels)
        rng = np.random.default_rng([self.config.seed, COHORT_STREAM])
        rows = rng.permutation(len(self.data.validation.labels))[:limit]
        validation = type(self.data.validation)(*(x[rows] for x in self.data.validation))
        size = self.config.eval.batch_size
        parts = [pad_batches(validation, size), holdout_batches(self.data, size)]
        tokens, labels, weight = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        num_validation = len(parts[0][1])
        judge = np.concatenate([np.arange(num_validation) % self.num_clients, np.arange(self.num_clients)])
        hosts = np.concatenate([np.arange(num_validation), np.arange(self.num_clients)])
        batches = EvaluationBatches(tokens, labels, weight, judge.astype(np.int32))
        return batches, num_validation, host_of(hosts, self.hosts)

    def judge(self, params: Params) -> tuple[Quality, np.ndarray]:
        """Returns the quality on the validation split, and each client's accuracy on its own examples.

        For algorithms that keep a model a client, client i mod C judges validation batch i, and each
        client its own examples.
        """
        batches, num_validation, hosts = self._validation
        scores = self._evaluate(params, batches, hosts)
        quality = summarize(jax.tree.map(lambda x: x[:num_validation], scores))
        own = jax.tree.map(lambda x: x[num_validation:], scores)
        return quality, own.correct / np.maximum(own.count, 1)

    def finish(self, state: RunState) -> Outcome:
        """Reads the test split, once, with the final and the best model, and describes the routing."""
        tokens, labels, weight = pad_batches(self.data.test, self.config.eval.batch_size)
        judge = (np.arange(len(labels)) % self.num_clients).astype(np.int32)
        batches = EvaluationBatches(tokens, labels, weight, judge)
        hosts = host_of(np.arange(len(labels)), self.hosts)
        models = (state.server.params, state.best)
        final, best = (summarize(self._evaluate(params, batches, hosts)) for params in models)
        validation, client_accuracy = self.judge(state.server.params)
        members = self.cohort(int(state.round))
        before = state.server.records.usage[members]
        after = self._usage(state.server.params, self.blocks(int(state.round)))
        spread = client_spread(client_accuracy)
        return Outcome(final, best, client_accuracy, spread, validation.load, before, after)

    def majority_accuracy(self) -> float:
        """Returns the test accuracy of always answering the most frequent training label."""
        return float(np.mean(self.data.test.labels == self._majority_label))


def round_row(metrics: RoundMetrics, num_experts: int) -> dict[str, float]:
    """Returns a round's row of metrics: means over the clients whose update counted, and counts.

    `union_share` includes the clients that failed for it.
    """
    report = metrics.report
    ok = report.status == OK

    def mean(values: Any, among: np.ndarray = ok) -> float | None:
        value = np.mean(np.asarray(values, np.float64)[among]) if among.any() else np.nan
        return None if np.isnan(value) else float(value)

    counts = np.bincount(report.status, minlength=len(STATUS_NAMES))
    return dict(
        train_loss=mean(report.loss),
        train_accuracy=mean(report.accuracy),
        union_share=mean(report.union_size / num_experts, ok | (report.status == OVER_BUDGET)),
        trained_share=mean(report.trained_size / num_experts),
        routing_consistency=mean(metrics.consistency),
        router_entropy=mean(report.router_entropy),
        dropped_tokens_share=mean(report.dropped),
        padding_tokens_share=mean(report.padding),
        empty_slots_share=mean(report.empty_slots),
        **{f"clients_{name}": int(count) for name, count in zip(STATUS_NAMES, counts, strict=True)},
    )


COLUMNS = (
    "round",
    "train_loss",
    "train_accuracy",
    "validation_accuracy",
    "validation_loss",
    "validation_router_entropy",
    "client_accuracy_mean",
    "client_accuracy_std",
    "client_accuracy_worst10",
    "simulated_time_s",
    "round_time_s",
    "waiting_share",
    "bytes_up",
    "bytes_down",
    "union_share",
    "trained_share",
    "routing_consistency",
    "router_entropy",
    "dropped_tokens_share",
    "padding_tokens_share",
    "empty_slots_share",
    "empty_places_share",
    *(f"clients_{name}" for name in STATUS_NAMES),
    "wall_s",
)
"""Columns of metrics.csv, in order; those of an evaluation are missing in rounds without one."""
