"""One run on a GPU: everything that a few minutes on a card can tell. docs/gpu-run.md says how.

python -m tools.gpu run      the run: checks, timings, profiles, and a report of them
python -m tools.gpu dry      every line of it that needs no GPU, with steps that fail on purpose
python -m tools.gpu report   the report of a folder of results, made again
python -m tools.gpu keep     puts results into benchmarks/results and docs/cuda.md
"""
