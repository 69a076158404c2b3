"""Solve a cell of your own and say for each user what it gets, or why it gets nothing.

python examples/scenario.py
"""

import pathlib

import slide_jax

problem = slide_jax.read_scenario(pathlib.Path(__file__).with_name("cell.json"))
allocation = slide_jax.solve(problem)
assert slide_jax.verify(problem, allocation) == []  # an independent check, layer by layer

print(f"{allocation.throughput} of {problem.num_users} users are served")
for k, user in enumerate(problem.labels.users):
    if allocation.served[k]:
        model = problem.labels.models[allocation.model[k]]
        bandwidth, latency = allocation.bandwidth_hz[k] / 1e6, allocation.latency_s[k]
        print(f"{user}: {model} over {bandwidth:.2f} MHz, done after {latency:.2f} s")
    else:
        print(f"{user}: {slide_jax.REASONS[allocation.reason[k]]}")
