"""One look at what a GPU does for this project: `scripts/gpu_check`.

Parts are functions of a `Setting` that return a JSON object; each also runs, small, on a CPU.
"""
