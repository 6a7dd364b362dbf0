"""What this processor can do, as the system says it."""

from __future__ import annotations

from functools import cache


@cache
def features() -> frozenset[str]:
    """Return its instruction sets by the kernel's names; none where the system does not say."""
    return frozenset(_said("flags", "Features").split())


@cache
def vendor() -> str:
    """Return who made it, as it calls itself (`AuthenticAMD`, `GenuineIntel`); "" if unknown."""
    return _said("vendor_id")


def _said(*names: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            line = next((line for line in handle if line.startswith(names)), "")
    except OSError:
        return ""
    return line.partition(":")[2].strip()
