"""What `import sorsa_plugin` adds to `import peft`: seconds of fresh processes, in turn."""

from __future__ import annotations

import subprocess
import sys

from common import Chart, Table, arguments, interleave, publish, ratios, spread

STATEMENTS = {
    "import peft": "import peft",
    "import sorsa_plugin": "import sorsa_plugin",
    "and all its plug-ins": "import sorsa_plugin; sorsa_plugin.registered_adapters()",
    "TRL's SFTTrainer": "from trl import SFTTrainer",
}


def fresh(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)


def main() -> None:
    options = arguments(__doc__, repeats=7).parse_args()
    times = interleave(
        {name: lambda code=code: fresh(code) for name, code in STATEMENTS.items()}, options.repeats, warmup=1
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
