"""Imported first by every program here: the programs of a clone run the packages of that clone, whatever is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
