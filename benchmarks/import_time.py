"""What `import sorsa_plugin` adds to `import peft`: seconds of fresh processes, in turn.

An installed package registers itself when PEFT is imported (`sorsa_autoload`). That is switched off in all rows but the
one that says so, or `import peft` would hold what is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys

from common import Chart, Table, arguments, interleave, publish, ratios, spread

KNOWN = "import peft, SORSA installed"
STATEMENTS = {
    "import peft": "import peft",
    KNOWN: "import peft",
    "import sorsa_plugin": "import sorsa_plugin",
    "and all its plug-ins": "import sorsa_plugin; sorsa_plugin.registered_adapters()",
    "TRL's SFTTrainer": "from trl import SFTTrainer",
}


def fresh(statement: str, autoload: bool) -> None:
    environment = {**os.environ, "SORSA_AUTOLOAD": "1" if autoload else "0"}
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True, env=environment)


def main() -> None:
    options = arguments(__doc__, repeats=7).parse_args()
    times = interleave(
        {name: lambda name=name: fresh(STATEMENTS[name], name == KNOWN) for name in STATEMENTS},
        options.repeats,
        warmup=1,
    )
    found = ratios(times, "import peft")
    lines = [
        [name, f"{spread(values)['median']:.2f}", "{median:.3f} ({low:.3f}-{high:.3f})".format(**found[name])]
        for name, values in times.items()
    ]
    table = Table("A fresh process", ["statement", "seconds", "/ import peft: median (quartiles)"], lines)
    medians = [found[name]["median"] for name in STATEMENTS]
    chart = Chart("a fresh process", "time / import peft", list(STATEMENTS), {"": medians})
    publish("import_time", "cpu", {"repeats": options.repeats, "seconds": times}, table, [chart])


if __name__ == "__main__":
    main()
