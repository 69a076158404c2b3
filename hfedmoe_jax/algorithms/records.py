"""What the server remembers of every client, for figures; on the host.

Axes: C clients in all, M clients of a round's cohort, L MoE layers, E experts.
"""

import numpy as np

from hfedmoe_jax.algorithms.algorithm import ClientRecords
from hfedmoe_jax.algorithms.cohort import ClientReports
from hfedmoe_jax.reports import OK, OVER_BUDGET


def open_records(num_clients: int, num_layers: int, num_experts: int) -> ClientRecords:
    """Returns the records before the first round."""
    per_expert = (num_clients, num_layers, num_experts)
    return ClientRecords(
        usage=np.full(per_expert, np.nan, np.float32),
        times_trained=np.zeros(per_expert, np.int32),
        rounds_measured=np.zeros(num_clients, np.int32),
        union_total=np.zeros(num_clients, np.float32),
        missed=np.zeros(num_clients, np.int64),
    )


def remember(
    records: ClientRecords, reports: ClientReports, trained: np.ndarray, terms: int = 0
) -> ClientRecords:
    """Returns the records after a round of these clients.

    Args:
      reports: host arrays [M, ...].
      trained: bool [M, L, E], experts that count as trained.
      terms: bytes of `Traffic.terms` in the round; its own cohort received those before.
    """
    client, upload, report, _ = reports
    ok = report.status == OK
    measured = ok | (report.status == OVER_BUDGET)
    records = ClientRecords(*(np.array(x) for x in records))
    records.usage[client] = np.where(ok[:, None, None], upload.usage, np.nan)
    records.times_trained[client] += trained & ok[:, None, None]
    records.rounds_measured[client] += measured
    records.union_total[client] += np.where(measured, report.union_size, 0)
    records.missed[client] = 0
    return records._replace(missed=records.missed + terms)
