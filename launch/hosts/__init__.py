"""What a run computes on: devices, processes on several hosts, and the programs compiled for them."""
