"""The raw results of a benchmark: one line of JSON for each measurement, kept in the repository beside its table."""

import json
from pathlib import Path
from typing import Any


def keep(benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Write the measurements behind a table to `benchmarks/<benchmark>.jsonl`, in place of those before.

    Args:
        benchmark: name of the module.
        rows: one for each measurement.
    """
    path = Path(__file__).with_name(f"{benchmark}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
