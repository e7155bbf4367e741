"""A release's `net.py`, in a process of its own: whatever it does, the evaluator lives and others get their answers.

`host` is that process; `process` is the evaluator's hold on it; `runner` starts it again when it has died, finds who is
to blame, and runs the others' requests again. `wire` is how the two speak.
"""
