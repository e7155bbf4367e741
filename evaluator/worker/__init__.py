"""The process that a release's net runs in, and the evaluator's hold on it.

A net of any kind, built in or a release's `net.py`, is in a process of its own: whatever it does, or native code below
it, the evaluator lives and others get their answers. And what decodes and runs nets has an interpreter of its own,
beside the one that talks gRPC.

`host` is that process. `process` is one life of it as the evaluator holds it, `worker` starts it again when it has
died, finds who is to blame, and runs the others' requests again. `wire` is how the two speak, `progress` where the host
writes down what it is at.
"""
