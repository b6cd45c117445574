"""Examples parse, say what they take, and use options that exist. Engines are not started here."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from commands import complaints, json_options
from packaging.specifiers import SpecifierSet

from vllm_tailorkv.cache.huge_pages import _MODE_FILE
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
    scraped = pod["metadata"]["annotations"]
    assert int(scraped["prometheus.io/port"]) in ports.values()
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in server["volumeMounts"]} == volumes
    assert server["resources"]["requests"] == server["resources"]["limits"]


def test_the_manifest_serves_by_options_that_exist() -> None:
    (server,) = MANIFEST[0]["spec"]["template"]["spec"]["containers"]
    assert not complaints(shlex.join(["vllm", "serve", *server["args"]]))
    given = dict(argument.partition("=")[::2] for argument in server["args"][1:])
    load_config(json.loads(given["--additional-config"])["tailorkv"])
    memory = int(server["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert int(given["--kv-cache-memory-bytes"]) < memory


def test_the_manifest_uses_transparent_huge_pages() -> None:
    """As the package does: reserved ones would stay unused, and cost the pod its memory."""
    pod = MANIFEST[0]["spec"]["template"]["spec"]
    (first,) = pod["initContainers"]
    assert first["command"] == ["cat", str(_MODE_FILE)]
    assert first["image"] == pod["containers"][0]["image"]
    for container in (first, *pod["containers"]):
        assert set(container["resources"]["limits"]) == {"cpu", "memory"}


def stages(dockerfile: Path) -> str:
    """A Dockerfile without comments, each instruction on one line."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_copy_and_install_what_exists(path: Path) -> None:
    text = stages(path)
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    assert {"requirements", "."} <= set(sources)
    for source in " ".join(sources).split():
        assert (ROOT / source).exists(), source
    built = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"^COPY --from=(\S+)", text, re.MULTILINE)) <= built
    installs = [
        step.strip()
        for run in re.findall(r"^RUN (.+)$", text, re.MULTILINE)
        for step in run.split("&&")
        if "pip install" in step
    ]
    # Requirements, then this package.
    assert len(installs) >= 2
    for command in installs:
        assert not complaints(command)
        variables = re.findall(r"TAILORKV_\w+(?==)", command)
        assert all(variable in (ROOT / "setup.py").read_text() for variable in variables)
        for folder in re.findall(r" (\.\S*)", command):
            assert any((ROOT / folder / file).exists() for file in ("setup.py", "pyproject.toml"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_have_a_python_that_will_do(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = set(re.findall(r"python:?(3\.\d+)", stages(path)))
    assert len(versions) == 1
    assert all(SpecifierSet(project["requires-python"]).contains(one) for one in versions)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_serve_by_options_that_exist(path: Path) -> None:
    """What the image starts, and what the comment has it started with."""
    text = path.read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (\[.+\])$", text, re.MULTILINE)
    command = json.loads(entry)
    assert command[:4] == ["vllm", "serve", "--attention-backend", "tailorkv"]
    (usage,) = re.findall(r"^#   docker run (.+)$", text.replace("\\\n#", ""), re.MULTILINE)
    arguments = shlex.split(usage)
    image = next(word for word in arguments if word.startswith("vllm-tailorkv:"))
    assert f"-t {image} " in text
    served = shlex.join([*command, *arguments[arguments.index(image) + 1 :]])
    assert not complaints(served)
    for options in json_options(served):
        load_config(options)
    assert "not been built" in text.lower() or "not built" in text.lower()


def test_the_shell_script_serves_by_options_that_exist() -> None:
    text = (EXAMPLES / "server_and_client.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^vllm serve .+$", text, re.MULTILINE)
    options = " ".join(re.findall(r"--[a-z][\w-]*", line))
    assert "--attention-backend" in options
    assert not complaints(f"vllm serve MODEL {options}")
