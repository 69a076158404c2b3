"""Benchmark suites for `launch.bench`: one package a suite, whose module `suite` yields its tables."""
