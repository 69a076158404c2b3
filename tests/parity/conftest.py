"""Scripts here need torch, which the tests do not."""

collect_ignore = ["make_decoders.py", "make_encoder.py", "make_switch.py"]
