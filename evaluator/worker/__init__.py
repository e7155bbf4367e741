"""The worker process, which runs the net of a release, built in or scripted.

A crash of the net, or of native code below it, ends only this process: the front survives and retries the other
requests. The worker also has a Python interpreter of its own, so that decoding and inference do not compete with gRPC.

``main`` is the process, ``batcher`` and ``schedule`` run its threads, ``planning`` decides how many there are. The
front imports only ``plan``, ``progress`` and ``channel``.
"""
