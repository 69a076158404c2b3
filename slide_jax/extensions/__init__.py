"""Problems beyond the paper's, one a file, each solved exactly or with a bound that is stated."""

from slide_jax.extensions.layer_clocks import LayerClocks, cheapest_clocks, layer_clocks
from slide_jax.extensions.memory import decide_streaming_memory, peak_memory, streaming_memory
from slide_jax.extensions.released_spectrum import Download, ReleasedSpectrum, released_spectrum
from slide_jax.extensions.resource_blocks import decide_resource_blocks, resource_blocks
from slide_jax.extensions.weighted import WeightedAllocation, fractional_bound, weighted, weighted_greedy

__all__ = [
    "Download",
    "LayerClocks",
    "ReleasedSpectrum",
    "WeightedAllocation",
    "cheapest_clocks",
    "decide_resource_blocks",
    "decide_streaming_memory",
    "fractional_bound",
    "layer_clocks",
    "peak_memory",
    "released_spectrum",
    "resource_blocks",
    "streaming_memory",
    "weighted",
    "weighted_greedy",
]
