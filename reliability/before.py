"""Earlier measurements, at commit 56c4d45 of 2026-11-25, by the name of the scenario or figure.

The machine was disturbed: times are upper values, losses and memory are not affected.
"""

_KILLED = "0 failed"

MEASURED = {
    "gate killed": _KILLED,
    "evaluator killed": _KILLED,
    "registry killed": _KILLED,
    "etcd leader killed": _KILLED,
    "worker killed": f"{_KILLED}, slowest 6.9 s",
    "gate stopped": _KILLED,
    "evaluator stopped": _KILLED,
    "registry stopped": _KILLED,
    "etcd leader stopped": _KILLED,
    "gate frozen 5 s": "6 of 1,015 failed (503), p99 4 to 6 s",
    "evaluator frozen 5 s": f"{_KILLED}, slowest 5.0 s",
    "registry frozen 5 s": _KILLED,
    "etcd leader frozen 5 s": _KILLED,
    "worker frozen 5 s": f"{_KILLED}, slowest 4.9 s",
    "gate frozen 40 s": "2 of 2,751 failed (503)",
    "evaluator frozen 40 s": f"{_KILLED}, slowest 3.9 s",
    "registry frozen 40 s": _KILLED,
    "etcd leader frozen 40 s": _KILLED,
    "worker frozen 40 s": "9 failed (504), slowest 30 s",
    "Envoy frozen 40 s": "464 of 2,751 failed: its own, and 429 for others",
    "two of three etcd members killed": f"{_KILLED} in 60 s",
    "every etcd member frozen": f"{_KILLED} in 30 s",
    "etcd emptied": "every app was down within 3 s",
    "etcd restored from a snapshot": _KILLED,
    "etcd compacted while a registry is frozen": _KILLED,
    "port of a killed instance reused": "10 of 23 callers got another app's answer",
    "version published again with other content": "of 20 answers, 11 had one content and 9 the other",
    "a fast app alone": "p50 8.8 ms, p99 17 ms",
    "overload of the CPUs beside a fast app": "p50 539 ms, p99 5.5 s; overload: 14,521 of 19,181 were 429",
    "script hangs": "504 for others of its batch",
    "script crashes": "its own request alone, others waited up to 12 s",
    "callers hang up or have no time": "all work cancelled within 0.15 s",
    "47 MiB answers": "small answers beside it took up to 4.9 s",
    "gRPC: 10.4 million empty resources": "caller waited 53.5 s, gate 1,620 MiB",
    "JSON: 1.3 million resources": "4 x 503, gate busy 27.7 s, 1,089 MiB",
    "a request that kills its gates": "6 gate processes killed in 210 s",
    "costly images": "10.6 s, 24 s, 1.3 s; worker 994 MiB",
    "60 uploads without end, HTTP/1": "of 40 uploads: Envoy 860 MiB for 60 s",
    "60 uploads without end, one HTTP/2 connection": "of 40 uploads: Envoy 863 MiB",
    "60 uploads without end, native gRPC": "of 40 uploads: gate 950 MiB",
    "2,000 streams of Health/Watch": "all alive after 75 s, 19 KiB each in the gate",
    "calls by GET": "0 failed; one of three gates ejected in 81 of 97 samples",
    "a batch of 60 answers of 8 MiB": "caller waited 59 s, gate 2,483 MiB",
    "four batches with URIs of a slow host": "363 of 370 were 429",
    "eight callers with batches of 100": "115 of 154 answers had a 429",
    "malformed access rules": "9 of 9 left the app open",
    "odd requests": "500 for 0xff, 502 for NUL, 200 for two Hosts and HTTP/0.9",
}

BY_HAND = {
    "the worker of an only instance dies": "12 s, on a busy machine",
    "refusals by instances for each 429": "1.88: 27,308 for 14,521",
    "a gate with 300 dead instances stops": "not within 20 min",
}
