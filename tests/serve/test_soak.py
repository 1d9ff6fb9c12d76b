"""Fifty clients at once, with a queue of eight: nothing is lost, and everybody gets his own."""

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def test_fifty_clients(server, monkeypatch):
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    soak = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", soak)  # its dataclass looks itself up there
    spec.loader.exec_module(soak)
    report = soak.soak(server.url, clients=50, seconds=0, lengths=("0.5", "1"))
    assert report["completed"] + report.get("deleted", 0) == 50 and report["completed"] > 30
    assert (report["lost"], report["wrong"], report.get("failed", 0)) == (0, [], 0)
    assert report["refused"] > 0
