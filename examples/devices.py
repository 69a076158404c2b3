"""Your own device classes instead of phone, tablet and laptop.

python -m launch.main --config=examples/devices.py
"""

from configs import hfedmoe


def get_config(preset: str = "bbc"):
    config = hfedmoe.get_config(preset)
    config.devices = {
        #                      share, memory_bytes, flop_per_s, uplink_bps, downlink_bps
        "nano": hfedmoe.device(0.75, 47e6, 5e9, 10e6, 20e6),
        "orin": hfedmoe.device(0.25, 64e6, 40e9, 50e6, 100e6),
    }
    return config
