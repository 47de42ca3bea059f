"""Dense against sparse on the CPU: `python -m benchmarks --help`."""
