"""Imported first by every example here: the examples of a clone use the packages of that clone, whatever is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
