"""Measures fusedrnn against torch.nn and other libraries: `python -m benchmarks --help`."""
