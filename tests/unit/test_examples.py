"""Examples parse, say what they take, and use options that exist. Engines are not started here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_tailorkv.config import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))
DOCKERFILES = sorted(EXAMPLES.rglob("Dockerfile.*"))
MANIFEST = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help(script: Path) -> None:
    """It comes before anything slow, and without what is only needed to run."""
    assert "example" in run(sys.executable, str(script), "--help")


def test_the_shell_script() -> None:
    script = str(EXAMPLES / "server_and_client.sh")
    run("bash", "-n", script)
    assert "MODEL" in run("bash", script, "--help")


def test_every_example_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.parent.name != "ray":
            assert f"({path.relative_to(EXAMPLES)})" in page or path.name == "README.md", path


def test_the_manifest() -> None:
    deployment, service = MANIFEST
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (server,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"]["port"] in ports
        assert server[probe]["httpGet"]["path"] == "/health"
    assert service["spec"]["ports"][0]["targetPort"] in ports
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in server["volumeMounts"]} == volumes
    assert server["resources"]["requests"] == server["resources"]["limits"]


def test_the_manifest_serves_by_options_that_exist() -> None:
    (server,) = MANIFEST[0]["spec"]["template"]["spec"]["containers"]
    given = dict(argument.partition("=")[::2] for argument in server["args"][1:])
    load_config(json.loads(given["--additional-config"])["tailorkv"])
    memory = int(server["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert int(given["--kv-cache-memory-bytes"]) < memory


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_copy_what_exists(path: Path) -> None:
    text = path.read_text()
    names = re.findall(r"-r (\S+)|\./(requirements/\S+)", text)
    assert names
    for name in (first or second for first, second in names):
        assert (ROOT / name).exists(), name
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE):
        assert (ROOT / source).exists(), source
    assert '"--attention-backend", "tailorkv"' in text
    assert "not been built" in text.lower() or "not built" in text.lower()
