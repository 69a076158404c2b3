"""What a run prints about its data at its start: labels, copies, what was left out, and warnings."""

import sys

from ml_collections import ConfigDict

from hfedmoe_jax.data.facts import UNKNOWN_WARNED, Facts

MOST_LABELS = 20


def print_data_notes(facts: Facts, clients: int, config: ConfigDict) -> None:
    """Prints the facts of the data, and on stderr what is likely to be a mistake."""
    for line in notes(facts, clients, config):
        print(line)
    for line in warnings(facts):
        print(f"warning: {line}", file=sys.stderr)


def notes(facts: Facts, clients: int, config: ConfigDict) -> list[str]:
    """Returns the facts that hold something, as lines."""
    shown = [f"{name!r} {count:,}" for name, count in list(facts.label_counts.items())[:MOST_LABELS]]
    more = len(facts.label_counts) - len(shown)
    lines = [f"documents by label: {', '.join(shown)}{f' and {more} labels more' if more else ''}"]
    if config.data.tokenizer != "bpe":  # which reads everything
        lines.append(f"characters of the training texts in [UNK]: {facts.unknown_share:.2%}")
    if facts.copies:
        lines.append(
            f"{facts.copies:,} documents repeat an earlier text; copies of a text are in the same split"
        )
    lines += [f"left out of {reason}: {count:,}" for reason, count in facts.left_out.items()]
    if facts.moved:
        lines.append(f"{facts.moved:,} texts were moved to training: a label or an owner had no other there")
    if config.partition.name == "column" and facts.owners > clients:
        lines.append(f"note: {facts.owners:,} owners share {clients:,} clients; fl.clients={facts.owners} "
                     "gives each its own")  # fmt: skip
    return lines + [f"note: {note}" for note in facts.notes]


def warnings(facts: Facts) -> list[str]:
    """Returns what is likely to be a mistake, as lines."""
    lines = [
        f"the labels {', '.join(map(repr, names))} differ in case or spaces only: are they one?"
        for names in facts.alike_labels
    ]
    if facts.disputed:
        lines.append(f"{facts.disputed:,} texts have more than one label")
    if facts.unknown_share > UNKNOWN_WARNED:
        share = f"{facts.unknown_share:.0%} of the characters of the training texts"
        lines.append(f"{share} are in words that become [UNK]: data.tokenizer=bpe, or another checkpoint, "
                     "reads more scripts")  # fmt: skip
    return lines
