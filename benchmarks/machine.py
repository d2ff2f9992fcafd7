"""What a number must be read with: the machine, the system, and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import fastbn


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def cpu_model() -> str:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Of the first core: level and type -> size, and how many logical CPUs share it."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(folder / name) for name in ("level", "type", "size"))
        if level and kind and size:
            found[f"L{level} {kind}"] = f"{size}, CPUs {_text(folder / 'shared_cpu_list') or '?'}"
    return found


def memory_bytes(field: str) -> int | None:
    """MemTotal or MemAvailable of the machine; control groups may allow less."""
    for line in (_text("/proc/meminfo") or "").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def commit(folder: Path) -> str:
    """Short hash, with a + if tracked files differ; "unknown" outside a checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "--short=12", "HEAD")
    if not found:
        return "unknown"
    return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def record(threads: int, cpus: list[int]) -> dict[str, Any]:
    cpu0 = "/sys/devices/system/cpu/cpu0/cpufreq"
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "caches": caches(),
        "logical CPUs": os.cpu_count(),
        "CPUs used": cpus,
        "threads": threads,
        "governor": _text(f"{cpu0}/scaling_governor") or "not readable",
        "huge pages": _text("/sys/kernel/mm/transparent_hugepage/enabled") or "not readable",
        "memory": memory_bytes("MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "C library": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "commit": commit(Path(__file__).parent),
        "load at start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "fastbn": {key: value for key, value in fastbn.runtime.config().items() if key != "threads"},
    }
