"""What a model profile is: units that are downloaded and executed in order, with their sizes and work.

A unit is counted from the operations it is made of. Work counts the multiply-accumulates (MACs) of
convolutions, matrix products and attention products; normalisations, activations, biases, softmax, pooling,
additions and look-ups are not counted, as in the published tables. A MAC is two FLOP.
"""

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

from slide_jax.errors import InputError


class Operation(NamedTuple):
    """Parameters of one operation and its MACs on one example."""

    parameters: int
    macs: int


class Layer(NamedTuple):
    """One unit of a model, downloaded as a whole and executed when it and its predecessors are there.

    Attributes:
      name: as in the reference implementation where there is one.
      parameters: numbers to download; 0 where they came with an earlier layer (a tied head).
      macs: multiply-accumulates on one example (an image, a sequence).
    """

    name: str
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """A model as the chain of its layers.

    Attributes:
      name: of the model.
      task: models of one task are rivals; their accuracies are of one benchmark.
      accuracy: on that task, in [0, 1].
      layers: in execution order.
    """

    name: str
    task: str
    accuracy: float
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the whole model."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates on one example."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flop(self) -> int:
        """FLOP on one example, two a multiply-accumulate."""
        return 2 * self.macs


def layer(name: str, *operations: Operation) -> Layer:
    """Returns the unit made of these operations."""
    return Layer(name, sum(o.parameters for o in operations), sum(o.macs for o in operations))


def convolution(
    inputs: int, outputs: int, kernel: int, output_size: int, groups: int = 1, bias: bool = False
) -> Operation:
    """Returns a square convolution.

    Args:
      inputs, outputs: channels.
      kernel: width of the kernel.
      output_size: width of the output [pixels]; padding is multiplied like the rest.
      groups: of channels; as many as inputs: depthwise.
      bias: a parameter more for each output channel.

    >>> convolution(3, 64, 7, output_size=112)
    Operation(parameters=9408, macs=118013952)
    """
    weights = inputs // groups * outputs * kernel**2
    return Operation(weights + bias * outputs, weights * output_size**2)


def dense(inputs: int, outputs: int, positions: int = 1, bias: bool = True) -> Operation:
    """Returns a matrix product applied to each of `positions` vectors.

    >>> dense(2048, 1000)
    Operation(parameters=2049000, macs=2048000)
    """
    return Operation(inputs * outputs + bias * outputs, inputs * outputs * positions)


def norm(channels: int, shift: bool = True) -> Operation:
    """Returns a normalisation: a scale and, with `shift`, a shift for each channel.

    Of a batch norm too, whose running statistics fold into these two: what published parameter counts hold.
    """
    return Operation((1 + shift) * channels, 0)


def table(rows: int, width: int) -> Operation:
    """Returns an embedding or any other learned table: parameters without multiplications."""
    return Operation(rows * width, 0)


def attention_products(tokens: int, width: int) -> Operation:
    """Returns queries times keys and weights times values, all heads together `width` wide.

    The whole square of tokens is counted, under a causal mask too: what dense kernels multiply.
    """
    return Operation(0, 2 * tokens**2 * width)


def positive_integers(**sizes: Any) -> list[int]:
    """Returns the sizes as Python integers, which neither overflow nor puzzle a JSON writer.

    Raises:
      InputError: names a size that is not a whole number of at least 1.

    >>> positive_integers(width=2, height=True)
    Traceback (most recent call last):
    ...
    slide_jax.errors.InputError: height=True: must be a whole number of at least 1; give e.g. 1
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise InputError(name, size, "must be a whole number of at least 1", "give e.g. 1")
    return [int(size) for size in sizes.values()]


def to_model(profile: Profile, bits_per_parameter: float = 16, batch_size: int = 1) -> dict[str, Any]:
    """Returns the profile as a model of a scenario file.

    Args:
      profile: of the model.
      bits_per_parameter: precision of the download [bits]; fractions are the averages of block formats.
      batch_size: examples of one task, executed layer by layer together: work grows, the download does not.

    Returns:
      `{"name", "task", "accuracy", "layers": [{"bits", "flop"}, ...]}`.

    Raises:
      InputError: no profile, or a precision or batch that is not above 0.

    >>> tiny = Profile("tiny", "vision", 0.5, (Layer("stem", 10, 1000), Layer("pool", 0, 4)))
    >>> to_model(tiny, bits_per_parameter=8, batch_size=2)["layers"]
    [{'bits': 80.0, 'flop': 4000.0}, {'bits': 0.0, 'flop': 16.0}]
    """
    if not isinstance(profile, Profile):
        raise InputError("profile", profile, "is no Profile", 'give e.g. profile("resnet50")')
    is_number = isinstance(bits_per_parameter, numbers.Real) and not isinstance(bits_per_parameter, bool)
    if not (is_number and 0 < bits_per_parameter < math.inf):
        raise InputError("bits_per_parameter", bits_per_parameter, "must be above 0", "give e.g. 16")
    (batch_size,) = positive_integers(batch_size=batch_size)
    return {
        "name": profile.name,
        "task": profile.task,
        "accuracy": profile.accuracy,
        "layers": [
            {"bits": float(unit.parameters * bits_per_parameter), "flop": float(2 * unit.macs * batch_size)}
            for unit in profile.layers
        ],
    }
