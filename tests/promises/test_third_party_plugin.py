"""A stranger's plug-in, the one in the examples, works once it is installed with pip."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_plugin"

USE = """
import json, torch
from peft import get_peft_model
from scaled_linear import ScaledLinear
from sorsa_plugin import SORSAConfig, setup_adapter
torch.manual_seed(0)
base = ScaledLinear(6, 5)
x = torch.randn(3, 6)
before = base(x)
model = get_peft_model(torch.nn.Sequential(base), SORSAConfig(r=2, target_modules=["0"]))
same = torch.equal(model(x), before)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model(x).square().mean().backward()
optimizer.step()
trained = model(x)
merged = model.merge_and_unload()(x)
config = setup_adapter({"adapter": "house-style", "r": 3, "house-style": {"gamma": 0.2}}).peft_config
print(json.dumps({
    "same": same, "moved": not torch.equal(trained, before), "merge_error": float((merged - trained).abs().max()),
    "config": [config.r, config.target_modules, config.reg_update, config.gamma],
}))
"""


@pytest.mark.slow
def test_a_strangers_plugin_adds_a_layer_kind_an_adapter_type_and_a_command(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    # this environment's packages and paths, below the new one's own
    inherited = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(inherited)]
    (Path(site) / "inherited.pth").write_text("\n".join(lines) + "\n")
    source = tmp_path / "source"
    shutil.copytree(EXAMPLE, source)  # setuptools leaves build/ where it builds
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "--no-deps", "--no-build-isolation", str(source)], check=True)

    def run(*arguments: str) -> str:
        done = subprocess.run([str(python), *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    listed = json.loads(run("-c", "from sorsa_cli import main; main()", "doctor", "--json"))
    mine, command = (plugin for plugin in listed["plugins"] if plugin["name"] == "scaled_linear")
    assert command["hooks"] == ["sorsa_commands"]
    assert mine["distribution"] == "sorsa-scaled-linear 0.1.0"
    assert mine["adapters"] == ["house-style"]
    assert not listed["broken"]
    assert "house-style" in run("-c", "from sorsa_cli import main; main()", "--help")
    printed = run("-c", "from sorsa_cli import main; main()", "house-style", "-r", "3")
    assert printed == "adapter: house-style\nr: 3\nhouse-style: {gamma: 0.1}\n"
    found = json.loads(run("-c", USE).splitlines()[-1])
    assert found["same"]
    assert found["moved"]
    assert found["merge_error"] < 1e-5  # fp32 over 6 terms of size 1
    assert found["config"] == [3, "all-linear", "decoupled", 0.2]
