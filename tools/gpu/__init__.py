"""A run on a GPU, which checks, times and profiles the library in minutes. See docs/gpu-run.md.

python -m tools.gpu run      makes the run: checks, timings, profiles, and a report of them
python -m tools.gpu dry      rehearses all of it that needs no GPU, with steps that fail on purpose
python -m tools.gpu report   makes the report of a folder of results again
python -m tools.gpu keep     copies results to benchmarks/results and into docs/cuda.md
python -m tools.gpu choices  prints which regime was fastest for each layer that was timed, or makes
                             the table that the plan follows

Read the files in this order:

steps.py        the steps and their order
run.py          runs steps with time limits and writes their results; process.py runs one program
check.py        gives tasks (tasks.py) to worker.py, which may hang or die
checks.py       the functions of the tasks, from numbers.py, surroundings.py, load.py, limits.py
bench.py        times rows (rows.py) and torch.nn's layers, in each regime (regimes.py, fastest.py)
sweep.py        times other plans of these rows: other blocks, cores and exchanges (swept.py)
one.py, hot.py  the program that profilers run, and a summary of what they find
results.py      reads the results of a run; report.py makes a report, keep.py keeps them, choices.py
                says which regimes were fastest, table.py writes it as C++
dry.py          the rehearsal, with planted.py and the interpreter of the tests
"""
