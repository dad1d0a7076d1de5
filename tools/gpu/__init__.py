"""One run on a GPU: everything that a few minutes on a card can tell. docs/gpu-run.md says how.

python -m tools.gpu run      the run: checks, timings, profiles, and a report of them
python -m tools.gpu dry      every line of it that needs no GPU, with steps that fail on purpose
python -m tools.gpu report   the report of a folder of results, made again
python -m tools.gpu keep     puts results into benchmarks/results and docs/cuda.md

Read in this order:

steps.py        what is run, and in which order
run.py          steps with limits, and what is written when; process.py runs one program
check.py        has tasks (tasks.py) done by worker.py, which may hang or die
checks.py       what each task looks at: numbers.py, surroundings.py, load.py, limits.py
bench.py        times rows (rows.py) beside torch.nn
one.py, hot.py  what profilers look at, and what they found
results.py      what a run left; report.py makes it readable, keep.py keeps it
dry.py          the rehearsal, with planted.py and the interpreter of the tests
"""
