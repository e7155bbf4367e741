"""The sandbox of a worker: what the process that runs a release's net may do.

The front decides it, and tells what of it the host can enforce (:mod:`evaluator.sandbox.decision`). The worker enters
it (:mod:`evaluator.sandbox.enter`) before it has a second thread or reads anything of the release. None of it needs
rights: Landlock and seccomp work in a container without capabilities, where namespaces do not.
"""
