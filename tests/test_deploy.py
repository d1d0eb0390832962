"""What deploy/ says exists: commands, flags, variables, ports; every setting in its files is one the commands know."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from preread_cli.main import cli
from preread_edge.access import Guard

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFESTS = [
    one
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    if file.name != "kustomization.yaml"
    for one in yaml.safe_load_all(file.read_text())
]
# Commands that are run where those files are, with what each cannot be made without.
NEEDED = {
    "serve": ["--model", "m"],
    "encode-worker": ["--model", "m"],
    "index": ["--model", "m", "-", "--collection", "docs"],
    "doctor": ["--model", "m"],
    "health": [],
    "stats": [],
}
PORTS = {"encode-worker": 50052, "serve": 50051}


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None, name
    return found


def variables(name: str) -> set[str]:
    return {str(param.envvar) for param in command(name).params if isinstance(param, click.Option)}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_is_not_root_and_has_a_health_check(file: Path) -> None:
    text = file.read_text()
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert 'CMD ["preread", "health"]' in text
    # A variable would win over the file that someone mounts.
    assert set(re.findall(r"\b(PREREAD_\w+)=", text)) == {"PREREAD_CONFIG"}
    assert "COPY deploy/image.toml /etc/preread/preread.toml" in text


def test_images_differ_in_what_they_must() -> None:
    cpu, cuda = (
        {line.strip(" \\") for line in file.read_text().splitlines() if not line.startswith("#")}
        for file in DOCKERFILES
    )
    assert {line.split("=")[0] for line in cpu ^ cuda} == {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}


def test_an_image_gets_every_package_there_is_and_the_pinned_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    let_through = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    packages = {path.partition("/")[0] for path in wheel}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert packages | files | {"deploy/image.toml"} == let_through
    (torch,) = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for file in DOCKERFILES:
        text = file.read_text()
        assert re.findall(r"\btorch==(\S+)", text) == [torch]
        (extras,) = re.findall(r'\./preread "\.\[([\w,]+)\]"', text)
        assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


@pytest.mark.parametrize("name", NEEDED)
def test_the_images_settings_are_settings(name: str) -> None:
    parent = click.Context(cli, info_name="preread")
    arguments = ["--config", str(DEPLOY / "image.toml"), *NEEDED[name]]
    params = command(name).make_context(name, arguments, parent=parent).params
    assert params.get("host", "0.0.0.0") == "0.0.0.0"


@pytest.mark.parametrize("service", ["worker", "server"])
def test_compose_speaks_of_flags_there_are(service: str) -> None:
    settings = COMPOSE["services"][service]
    (name,) = settings["command"]
    assert set(settings["environment"]) <= variables(name)
    for published in settings.get("ports", ()):
        assert published.startswith("127.0.0.1:"), "loopback unless someone decides otherwise"


def test_the_config_map_is_a_settings_file(tmp_path: Path) -> None:
    file = DEPLOY / "kubernetes" / "preread.toml"
    for name, needed in NEEDED.items():
        parent = click.Context(cli, info_name="preread")
        arguments = ["--config", str(file), *needed]
        context = command(name).make_context(name, arguments, parent=parent)
        assert context.params.get("store", "redis://redis:6379/0") == "redis://redis:6379/0"
        if name in ("serve", "doctor"):
            assert context.params["encoder_address"] == "dns:///worker:50052"


def answers(guard: Guard, name: str, own: str) -> bool:
    """Whether a listener at the address `own` answers to a name."""
    headers = [(b"host", name.encode())]
    scope = {"method": "GET", "headers": headers, "server": (own, 1), "raw_path": b"/", "path": "/"}
    return guard.problem(scope) is None


def test_compose_answers_to_its_services_names_and_to_published_ports() -> None:
    for service, settings in COMPOSE["services"].items():
        if "command" in settings and settings["command"][0] in PORTS:
            guard = Guard(tuple(settings["environment"]["PREREAD_ALLOWED_HOST"].split()))
            published = [f"127.0.0.1:{port.split(':')[1]}" for port in settings.get("ports", ())]
            for name in (service, f"{service}:9464", "172.18.0.3:9464", "localhost:8080", *published):
                assert answers(guard, name, "172.18.0.3"), name
            assert not answers(guard, "evil.example", "172.18.0.3")


def test_kubernetes_answers_to_its_services_names_and_to_a_pods_address() -> None:
    settings = tomllib.loads((DEPLOY / "kubernetes" / "preread.toml").read_text())
    guard = Guard(tuple(settings["allowed-host"]))
    namespace = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["namespace"]
    for manifest in MANIFESTS:
        if manifest["kind"] == "Service" and manifest["metadata"]["name"] != "redis":
            name = manifest["metadata"]["name"]
            suffixes = ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local")
            for written in (*(name + suffix for suffix in suffixes), "10.244.1.7:9464", "[fd00::7]:9464"):
                assert answers(guard, written, "fd00::7" if "[" in written else "10.244.1.7"), written
    assert not answers(guard, "evil.example", "10.244.1.7")


def containers() -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for manifest in MANIFESTS:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            pod = manifest["spec"]["template"]["spec"]
            for container in pod["containers"]:
                yield pod, container


def test_containers_are_confined_and_probed() -> None:
    for pod, container in containers():
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        assert "memory" in container["resources"]["limits"]
        if container["image"] == "preread":
            name = container["args"][0]
            assert pod["terminationGracePeriodSeconds"] > 30
            assert pod["enableServiceLinks"] is False, "PREREAD_PORT is a setting"
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe]["grpc"]["port"] == PORTS[name]


def test_grpc_services_are_headless_and_select_pods_that_listen() -> None:
    pods = {}
    for manifest in MANIFESTS:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            name = manifest["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]
            pods[name] = {port["containerPort"] for port in container["ports"]}
    services = [manifest for manifest in MANIFESTS if manifest["kind"] == "Service"]
    assert len(services) == 4
    for service in services:
        ports = {port["port"] for port in service["spec"]["ports"]}
        assert ports <= pods[service["spec"]["selector"]["app.kubernetes.io/name"]]
        if any(port["name"] == "grpc" for port in service["spec"]["ports"]):
            assert service["spec"]["clusterIP"] == "None"
