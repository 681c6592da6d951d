# SPDX-License-Identifier: MIT
"""Every measuring script imports this first: it makes tests/support and api.py
importable, and keeps Hugging Face's library from asking the network."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
