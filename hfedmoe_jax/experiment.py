"""A whole federated run without files: build it from a config, advance it a round, evaluate it.

`launch` adds work directories, checkpoints and figures; a notebook needs only this module:

    experiment = Experiment(config, make_mesh())
    state = experiment.init()
    for _ in range(config.fl.rounds):
        state, row, failures = experiment.step(state)

Axes: C clients in all, M clients of a round's cohort, L MoE layers, E experts.
"""

import functools
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hfedmoe_jax.accounting import Ledger, account_round, enter, open_ledger
from hfedmoe_jax.aggregation.sums import power_below
from hfedmoe_jax.algorithms import Portion, ServerState, Setting, algorithms
from hfedmoe_jax.checks import check_config
from hfedmoe_jax.client import ClientData
from hfedmoe_jax.cost import model_cost
from hfedmoe_jax.data import (
    FederatedData,
    Prefetch,
    fingerprint,
    host_of,
    load_federated,
    most_tokens,
    num_rows,
    round_batches,
)
from hfedmoe_jax.devices import assign_devices, expert_budget, fraction_budget, read_profiles
from hfedmoe_jax.errors import InputError
from hfedmoe_jax.evaluation import Evaluator, Snapshot
from hfedmoe_jax.initial import initial_frozen, initial_params
from hfedmoe_jax.mesh import CLIENTS, EXPERTS, is_described
from hfedmoe_jax.metrics import metric_columns, round_row
from hfedmoe_jax.mixtures import load_start
from hfedmoe_jax.models import ModelSizes, build_model, tree_bytes
from hfedmoe_jax.models.adapter_files import open_adapters
from hfedmoe_jax.models.lora import lora_rule
from hfedmoe_jax.optimizers import build_optimizer
from hfedmoe_jax.population import put_members
from hfedmoe_jax.pretrained import find_source
from hfedmoe_jax.published import PUBLISHED
from hfedmoe_jax.quality import Quality, Splits, client_spread
from hfedmoe_jax.ranges import check_batch, check_evaluation, check_local_steps, check_memory
from hfedmoe_jax.reports import NONFINITE, OK, STATUS_NAMES, failed_clients
from hfedmoe_jax.schedule import NOBODY, Block, block_size, chunk_size, empty_places
from hfedmoe_jax.tasks import tasks
from hfedmoe_jax.trunk import cache_features, feature_shape, find_cut, no_features

COHORT_STREAM, DEVICE_STREAM = 101, 102  # the host's random streams, apart from those of the data


class RunState(NamedTuple):
    """Everything that a run changes; what a checkpoint holds.

    Attributes:
      round: rounds done.
      server: the algorithm's state.
      best: model of the best round so far by the task's metric on the validation split, among the rounds
        that `eval.every` names. So no state depends on how many rounds the run will have.
      best_score, best_round: of that round (minus infinity and 0 before the first evaluation).
      ledger: totals.
    """

    round: np.int64
    server: ServerState
    best: Snapshot
    best_score: np.float64
    best_round: np.int64
    ledger: Ledger


class Outcome(NamedTuple):
    """The end of a run.

    Attributes:
      final, best: test quality of the last model, and of the best one by validation.
      best_score, best_round: the task's metric on the validation split of that one, and its round.
      client_scores: float [C], the task's metric of the last model on each client's own held-out examples.
      client_spread: its mean, standard deviation and mean of the worst 10%.
      expert_load: [L, E], share of a layer's validation tokens that each expert served.
      usage_before, usage_after: [M, L, E], u_c (16) of the last cohort as its members reported it while
        training (NaN where a member failed), and under the aggregated model on the same batches.
    """

    final: Quality
    best: Quality
    best_score: float
    best_round: int
    client_scores: np.ndarray
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
      memory_bytes: of a device; the device says if not given.
      shapes_only: nothing will run: parameters are neither read nor drawn. So it is for devices that are
        described only.

    Attributes:
      model, task, algorithm, cost: see their modules.
      start: what it starts from, see `hfedmoe_jax.mixtures`; None: from parameters drawn at random.
      frozen: parameters that nobody trains, on the mesh.
      profiles: each client's device.
      budgets: int [C], experts that each client can train, over all layers.
      sizes: int [C], passages that each client trains on.
      num_passages: of all clients, those they hold out included.
      fingerprint: of the data, see `hfedmoe_jax.data.fingerprint`.
      splits: evaluates models on the validation and the test split.
      hosts: how many processes share the work; `data` then has this one's clients only.

    Raises:
      InputError: what the config asks for cannot be done.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        data: FederatedData | None = None,
        memory_bytes: float | None = None,
        shapes_only: bool = False,
    ):
        check_config(config)
        self.task = tasks[config.task.name]
        data = data if data is not None else load_federated(config, self.task.prepare)
        self.config, self.mesh = config, mesh
        self.shapes_only = shapes_only or is_described(mesh)
        self.num_clients = len(data.client_train)
        batch = {
            name: jax.ShapeDtypeStruct((config.fl.batch_size, *values.shape[1:]), values.dtype)
            for name, values in data.train.items()
        }
        sizes = ModelSizes(
            self.task.num_outputs(data.label_names, data.vocab_size), data.vocab_size, config.data.seq_len,
            data.token_offset,
        )  # fmt: skip
        self.model = build_model(config.model, sizes, batch)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        cut = None
        if config.model.cache_trunk:
            cut = find_cut(self.model)
            batch[cut.name] = feature_shape(self.model, batch["tokens"])
        check_memory(tree_bytes(shapes), memory_bytes and memory_bytes * mesh.shape[EXPERTS])
        self.init_key, self.round_key = jax.random.split(jax.random.key(config.seed))
        optimizer = build_optimizer(config.client, config.client.optimizer, "client")
        self.cost = model_cost(self.model, self.task, config.model, optimizer, batch)
        if memory_bytes is None and not self.shapes_only:
            memory_bytes = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
        check_batch(config.fl.batch_size, self.cost.shared_training_bytes, memory_bytes)
        classes, shares = read_profiles(config.devices)
        rng = np.random.default_rng([config.seed, DEVICE_STREAM])
        self.profiles = [classes[index] for index in assign_devices(self.num_clients, shares, rng)]
        build = algorithms[config.fl.algorithm](config)
        self.budgets = self._budgets(getattr(build, "uses_budgets", True))
        self.chunk = chunk_size(config.fl.chunk, self.cost, mesh, config.fl.clients_per_round, memory_bytes)
        self._check_batches(batch, num_rows(data.validation), memory_bytes)
        self.num_passages = num_rows(data.train)
        self.sizes = np.array([len(rows) for rows in data.client_train])
        self.relative_sizes = (self.sizes * power_below(1 / self.sizes.max())).astype(np.float32)
        self.hosts = len({device.process_index for device in mesh.devices.flat})
        if self.num_clients < self.hosts:
            raise InputError(
                "fl.clients",
                self.num_clients,
                f"fewer than the {self.hosts} processes",
                "use at least a client a process",
            )
        # Computed from all data, so alike on every host; from here on a host has its own clients' data only.
        self.baseline = self.task.baseline(data.train, data.test)
        self.fingerprint = fingerprint(data)
        table_rows = most_tokens(data, config.fl)
        self.data = data if self.hosts == 1 else data.of_host(jax.process_index(), self.hosts)
        self.start = None
        if self.shapes_only and config.model.source not in ("", *PUBLISHED):
            self.model.module.read(find_source(config.model.source))  # it refuses what a run would
        elif config.model.source and not self.shapes_only:
            self.start = load_start(config.model, self.model.module)
            rule = lora_rule(config.model)
            if rule is not None and config.model.adapters:
                names = self.model.module.names()
                stored = open_adapters(config.model.adapters, names, shapes[0], rule, self.start.digest)
                self.start = self.start._replace(adapters=stored)
        if self.shapes_only:
            _, self.frozen = jax.eval_shape(self.model.init, self.init_key)
        else:
            self.frozen = initial_frozen(self.model, self.init_key, self.start, mesh, config.model.base)
        if cut and self.shapes_only:
            self.data = no_features(self.data, self.model, cut)
        elif cut:
            self.data = cache_features(self.data, self.model, self.frozen, config, cut)
        setting = Setting(
            config, self.model, self.task, self.frozen, self.budgets, table_rows, mesh, self.chunk
        )
        self.algorithm = build(setting)
        self._evaluator = Evaluator(
            self.model, self.task, self.frozen, self.algorithm.personal, self.num_clients, mesh, self.chunk,
            config.importance.unit,
        )  # fmt: skip
        self.splits = Splits(self._evaluator, self.data, config, self.task, self.hosts)
        self._compiled: set[int] = set()  # tiers that have run: a first time is no measure of speed
        self._next: tuple[CohortPlan, Prefetch] | None = None  # the next round, assembled while this one runs

    def _check_batches(self, batch: Any, num_validation: int, memory_bytes: float | None) -> None:
        """Refuses batches, of a round or of an evaluation, that no memory holds."""
        fl, size = self.config.fl, self.config.eval.batch_size
        row_bytes = tree_bytes(batch) / fl.batch_size
        block = self.mesh.shape[CLIENTS] * block_size(self.chunk)
        count = block + self.num_clients + -(-num_validation // size)
        layer_bytes = self.cost.activation_bytes / fl.batch_size / self.model.num_layers * size
        if not is_described(self.mesh):  # whose hosts are not this machine
            check_local_steps(fl.local_steps, block * fl.local_steps * tree_bytes(batch))
            check_evaluation(size, count * size * row_bytes, layer_bytes, memory_bytes)

    def _budgets(self, used: bool) -> np.ndarray:
        """Returns each client's budget; all experts where budgets are not used."""
        if not used:
            budgets = [self.cost.all_experts] * self.num_clients
        elif self.config.budget.fraction:
            budgets = [fraction_budget(self.config.budget.fraction, self.cost.all_experts)] * self.num_clients
        else:
            budgets = [expert_budget(profile, self.cost, self.config.fl.forward) for profile in self.profiles]
        return np.array(budgets, np.int32)

    def init(self) -> RunState:
        """Returns the state before the first round."""
        params = initial_params(self.model, self.init_key, self.start, self.mesh)
        server = self.algorithm.init(params)
        best = jax.tree.map(jnp.copy, self.algorithm.snapshot(server))
        return RunState(np.int64(0), server, best, np.float64(-np.inf), np.int64(0), open_ledger())

    def cohort(self, round_number: int) -> np.ndarray:
        """Returns the clients of a round, int [M], sampled without replacement."""
        rng = np.random.default_rng([self.config.seed, COHORT_STREAM, round_number])
        return np.sort(rng.choice(self.num_clients, self.config.fl.clients_per_round, replace=False))

    def client_data(
        self, round_number: int, cohort: np.ndarray, places: np.ndarray | None = None
    ) -> ClientData:
        """Returns the input of a round, stacked over members of its cohort.

        Args:
          cohort: of that round.
          places: which members; a negative one gives zeros. Default: all, in order.
        """
        fl = self.config.fl
        places = np.arange(len(cohort)) if places is None else places
        clients = cohort[places[places >= 0]]
        rng = np.random.default_rng([self.config.seed, COHORT_STREAM, round_number, 1])
        available = rng.random(self.num_clients)[clients] >= fl.dropout_probability
        batch = round_batches(
            self.data, clients, round_number, fl.local_steps, fl.batch_size, self.config.seed
        )
        sizes = self.relative_sizes[clients]
        decay = np.float32(self.config.client.learning_rate_decay ** (round_number - 1))
        rates = np.full(len(clients), decay)
        data = ClientData(clients.astype(np.int32), batch, sizes, self.budgets[clients], available, rates)

        def spread(values):
            result = np.zeros((len(places), *values.shape[1:]), values.dtype)
            result[places >= 0] = values
            return result

        return jax.tree.map(spread, data)

    def plan(self, round_number: int) -> "CohortPlan":
        """Returns who takes part in a round, and in which blocks."""
        cohort = self.cohort(round_number)
        return CohortPlan(round_number, cohort, self.algorithm.plan(cohort, host_of(cohort, self.hosts)))

    def blocks(self, plan: "CohortPlan") -> Iterator[tuple[Block, ClientData]]:
        """Yields the blocks of a round with the data of this process's clients, as host arrays."""
        mine = np.array([device.process_index for device in self.mesh.devices[:, 0]]) == jax.process_index()
        for block in plan.blocks:
            places = np.where(mine[:, None], block.members, NOBODY).reshape(-1)
            yield block, self.client_data(plan.round, plan.cohort, places)

    def portions(self, plan: "CohortPlan") -> Prefetch:
        """Begins to assemble the blocks of a round on the devices."""

        def on_devices() -> Iterator[Portion]:
            for block, data in self.blocks(plan):
                members = block.members.reshape(-1)
                data = data._replace(available=data.available & (members != NOBODY))
                numbers = np.where(members == NOBODY, NOBODY, plan.cohort[np.maximum(members, 0)])
                yield Portion(block, numbers, put_members(self.mesh, data))

        return Prefetch(on_devices())

    def _prefetched(self, round_number: int) -> tuple["CohortPlan", Prefetch]:
        """Returns the plan and the data of a round, assembled during the round before if there was one."""
        if self._next is not None and self._next[0].round == round_number:
            expected, self._next = self._next, None
            return expected
        self.close()
        plan = self.plan(round_number)
        return plan, self.portions(plan)

    def lower(self) -> Iterator[tuple[str, Callable[[], jax.stages.Lowered]]]:
        """Yields every program of the run: its name, and a function that lowers it from shapes alone.

        Nothing runs, so the mesh may be one of a topology (see `jax.experimental.topologies`).
        """
        block, data = next(self.blocks(self.plan(1)))
        model = jax.eval_shape(
            lambda key: self.algorithm.snapshot(self.algorithm.init(self.model.init(key)[0])), self.init_key
        )
        rows, held_out = len(data.client), self.splits.holdout
        evaluated = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), held_out)
        for part, arguments in (
            (self.algorithm, self.algorithm.arguments(data)),
            (self._evaluator, self._evaluator.arguments(model, evaluated, data)),
        ):
            for name, shapes in arguments.items():
                yield name, functools.partial(part.programs[name].lower, *shapes)

    def close(self) -> None:
        """Stops the assembly of the next round's data, for a run that ends before its last round."""
        if self._next is not None:
            self._next[1].close()
            self._next = None

    def _round_portions(self, portions: Prefetch, following: int) -> Iterator[Portion]:
        """Yields the portions of a round, then begins to assemble those of the following one."""
        yield from portions
        if following <= self.config.fl.rounds:
            plan = self.plan(following)
            self._next = plan, self.portions(plan)

    def step(self, state: RunState) -> tuple[RunState, dict[str, float], list[str]]:
        """Runs one round; `state` is consumed (its buffers are donated).

        Returns:
          The new state, the round's row of metrics, and a line for each client whose update was not
          finite, and for a round in which no client's update counted.
        """
        began = time.perf_counter()
        number, steps = int(state.round) + 1, self.config.fl.local_steps
        key = jax.random.fold_in(self.round_key, number)
        plan, portions = self._prefetched(number)
        members, tiers = plan.cohort, {block.tier for block in plan.blocks}
        server, metrics = self.algorithm.round(state.server, self._round_portions(portions, number + 1), key)
        jax.block_until_ready(server.params)
        round_s = time.perf_counter() - began
        profiles = [self.profiles[c] for c in members]
        account = account_round(metrics, profiles, self.cost, steps, self.algorithm.scoring)
        ledger = enter(state.ledger, account, metrics)
        if tiers <= self._compiled:
            ledger = ledger._replace(
                train_s=ledger.train_s + round_s, timed_steps=ledger.timed_steps + steps * len(members)
            )
        self._compiled |= tiers
        row = {"round": number, **round_row(metrics, self.cost.all_experts), **account._asdict()}
        row["empty_places_share"] = empty_places(plan.blocks, self.chunk)
        state = state._replace(round=np.int64(number), server=server)
        if self.is_scheduled(number) or number == self.config.fl.rounds:
            model = self.algorithm.snapshot(server)
            quality, client_scores = self.splits.validate(model)
            mean, deviation, worst = client_spread(client_scores)
            metric = self.task.metric
            row |= {f"validation_{name}": value for name, value in quality.scores.items()}
            row["validation_router_entropy"] = quality.router_entropy
            row |= {f"client_{metric}_mean": mean, f"client_{metric}_std": deviation}
            row[f"client_{metric}_worst10"] = worst
            if self.is_scheduled(number):
                state = self._with_best(state, model, quality)
        ledger = ledger._replace(wall_s=ledger.wall_s + (time.perf_counter() - began))
        row |= dict(simulated_time_s=float(ledger.simulated_time_s), wall_s=float(ledger.wall_s))
        failures = [
            f"client {members[index]}, round {number}: the loss or a score is not finite; update dropped"
            for index in np.flatnonzero(metrics.report.status == NONFINITE)
        ]
        counts = np.bincount(metrics.report.status, minlength=len(STATUS_NAMES))
        if not counts[OK]:
            failures.append(f"round {number} trained nothing: {failed_clients(counts)}")
        return state._replace(ledger=ledger), row, failures

    def is_scheduled(self, round_number: int) -> bool:
        """Says whether a round is evaluated in a run of any length; the last one always is."""
        return round_number % self.config.eval.every == 0

    def _with_best(self, state: RunState, model: Snapshot, quality: Quality) -> RunState:
        """Returns the state with the model of its last round as the best, if it is."""
        score = np.float64(quality.scores[self.task.metric])
        if not score > state.best_score:
            return state
        best = jax.tree.map(jnp.copy, model)
        return state._replace(best=best, best_score=score, best_round=np.int64(state.round))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns of metrics.csv, in order; those of an evaluation are missing in rounds without one."""
        return metric_columns(self.task)

    def finish(self, state: RunState) -> Outcome:
        """Reads the test split, once, with the final and the best model, and describes the routing."""
        last = self.algorithm.snapshot(state.server)
        validation, client_scores = self.splits.validate(last)
        state = self._with_best(state, last, validation)
        final = self.splits.test(last)
        best = final if state.best_round == state.round else self.splits.test(state.best)
        plan = self.plan(int(state.round))
        before = state.server.records.usage[plan.cohort]
        after = self._evaluator.usage(last, self.blocks(plan))
        spread = client_spread(client_scores)
        chosen = float(state.best_score), int(state.best_round)
        return Outcome(final, best, *chosen, client_scores, spread, validation.load, before, after)


class CohortPlan(NamedTuple):
    """Who takes part in a round.

    Attributes:
      round: its number.
      cohort: int [M], the clients.
      blocks: where and together with whom each runs.
    """

    round: int
    cohort: np.ndarray
    blocks: list[Block]
