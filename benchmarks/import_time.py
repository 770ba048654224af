"""What `import sorsa_plugin` adds to `import peft`: seconds of fresh processes, interleaved."""

from __future__ import annotations

import argparse
import subprocess
import sys

from common import interleave, ratios, write
from rich.console import Console
from rich.table import Table

STATEMENTS = {
    "import peft": "import peft",
    "import sorsa_plugin": "import sorsa_plugin",
    "and the plug-ins": "import sorsa_plugin; sorsa_plugin.registered_adapters()",
    "import trl.SFTTrainer": "from trl import SFTTrainer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    def fresh(statement: str) -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)

    times = interleave(
        {name: lambda s=statement: fresh(s) for name, statement in STATEMENTS.items()}, options.repeats, warmup=1
    )
    found = ratios(times, "import peft")
    table = Table("a fresh process", "seconds", "x import peft")
    for name, values in times.items():
        table.add_row(name, f"{sorted(values)[len(values) // 2]:.2f}", f"{found[name]['median']:.3f}")
    Console().print(table)
    write("import_time", {"seconds": times, "ratio_to_peft": found})


if __name__ == "__main__":
    main()
