"""What was measured once, at commit 56c4d45 of 2026-11-25, by the name of the scenario. The machine was disturbed."""

MEASURED = {
    "gate killed": "0 failed",
}
