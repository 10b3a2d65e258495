"""Prometheus, its rules and Grafana's dashboard ask only for what the services really tell, where they tell it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import promql_parser as promql
import pytest
import yaml
from prometheus_client import REGISTRY

from parampara.db.models import JOB_STATES, RUN_STATES
from parampara.plan import QUEUES
from standalone.places import vllm_environment
from tests.deploy.code_metrics import Series, series_of, series_of_code
from tests.deploy.deployment_files import ROOT, substituted
from tests.deploy.promql_labels import Misfit, labels_of, selectors

FOLDER = ROOT / "docker" / "monitoring"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "parampara.json"
TARGET_LABELS = frozenset({"job", "instance"})
WORKER_METRICS = "shared/src/parampara/execution/metrics.py"
# vLLM's own, of its releases 0.32 and 0.33: vllm/v1/metrics/loggers.py. A series that goes away there must go away in the dashboard.
VLLM = {
    "vllm:num_requests_running": ("gauge", ()),
    "vllm:num_requests_waiting": ("gauge", ()),
    "vllm:kv_cache_usage_perc": ("gauge", ()),
    "vllm:prefix_cache_queries": ("counter", ()),
    "vllm:prefix_cache_hits": ("counter", ()),
    "vllm:prompt_tokens": ("counter", ()),
    "vllm:generation_tokens": ("counter", ()),
    "vllm:num_preemptions": ("counter", ()),
    "vllm:request_success": ("counter", ("finished_reason",)),
    "vllm:inter_token_latency_seconds": ("histogram", ()),
    "vllm:time_to_first_token_seconds": ("histogram", ()),
    "vllm:request_queue_time_seconds": ("histogram", ()),
    "vllm:e2e_request_latency_seconds": ("histogram", ()),
}
VALUES: dict[tuple[str, str], set[str]] = {
    ("parampara_runs", "state"): set(RUN_STATES),
    ("parampara_jobs", "state"): set(JOB_STATES),
    ("parampara_jobs", "kind"): set(QUEUES),
    ("parampara_jobs_total", "outcome"): {"succeeded", "reused", "failed", "crashed", "preempted", "cancelled", "stale"},
    ("ALERTS", "alertstate"): {"pending", "firing"},
}
"""Which values a label can have, where the code says so."""
PORT_VARIABLES = {
    "control-plane": {"PARAMPARA_CONTROL_PLANE__METRICS_PORT"},
    "gateway": {"PARAMPARA_GATEWAY__METRICS_PORT"},
    "embedder": {"PARAMPARA_EMBEDDER__PORT"},
    "model-server": {"PARAMPARA_MODEL_SERVER__PORT", "PARAMPARA_MODEL_SERVER__VLLM_PORT"},
}
Config = dict[str, Any]


@pytest.fixture(scope="module")
def prometheus() -> Config:
    return yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rules(prometheus: Config) -> list[Config]:
    files = [FOLDER / "prometheus" / name for name in prometheus["rule_files"]]
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard() -> Config:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def known(rules: list[Config]) -> dict[str, Series]:
    """Every series that Prometheus can have: the code's, vLLM's, its own, and what the rules record."""
    found = {
        name: Series(name, series.kind, series.labels | TARGET_LABELS | ({"queue"} if series.module == WORKER_METRICS else set()), name)
        for name, series in series_of_code().items()
    }
    for metric, (kind, labels) in VLLM.items():
        found |= {series.name: series for series in series_of(metric, kind, {"model_name", "engine", *labels, *TARGET_LABELS})}
    for metric in REGISTRY.collect():
        if metric.name.startswith("process_"):
            kind = "counter" if metric.type == "counter" else "gauge"
            found |= {series.name: series for series in series_of(metric.name, kind, TARGET_LABELS | {"queue"})}
    found["up"] = Series("up", "gauge", TARGET_LABELS | {"queue"}, "up")
    for rule in rules:
        if "record" in rule:
            found[rule["record"]] = Series(rule["record"], "gauge", labels_of(rule["expr"], found), "")
    of_alerts = frozenset().union(*(labels_of(rule["expr"], found) for rule in rules if "alert" in rule))
    found["ALERTS"] = Series("ALERTS", "gauge", of_alerts | {"alertname", "alertstate", "severity"}, "")
    return found


def panels_of(dashboard: Config) -> Iterator[Config]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries_of(dashboard: Config) -> list[tuple[str, Config]]:
    """``(panel, target)`` of every query, Grafana's own variables put in."""
    return [(panel["title"], target) for panel in panels_of(dashboard) for target in panel.get("targets", [])]


def promql_of(target: Config) -> str:
    return target["expr"].replace("$__rate_interval", "1m").replace("$__range", "6h")


def expressions(dashboard: Config, rules: list[Config]) -> list[str]:
    return [promql_of(target) for _, target in queries_of(dashboard)] + [rule["expr"] for rule in rules]


# ------------------------------------------------------------------------------------------------------------ metrics


def test_every_query_asks_for_series_and_labels_that_exist(dashboard: Config, known: dict[str, Series]) -> None:
    for title, target in queries_of(dashboard):
        try:
            labels = labels_of(promql_of(target), known)
        except ValueError as fault:
            pytest.fail(f"{title}: {fault}: {target['expr']}")
        shown = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
        assert shown <= labels, f"{title}: the legend shows labels that the result has not"


def test_every_rule_asks_for_series_and_labels_that_exist(rules: list[Config], known: dict[str, Series]) -> None:
    for rule in rules:
        labels = labels_of(rule["expr"], known)
        told = " ".join(rule.get("annotations", {}).values())
        assert set(re.findall(r"\$labels\.(\w+)", told)) <= labels, rule["alert"]


def test_matchers_ask_for_values_that_exist(
    dashboard: Config, rules: list[Config], prometheus: Config, compose: Config, known: dict[str, Series]
) -> None:
    values = {**VALUES, **{(name, "job"): {job["job_name"] for job in prometheus["scrape_configs"]} for name in known}}
    for expression in expressions(dashboard, rules):
        for selector in selectors(expression):
            for matcher in selector.matchers.matchers:
                possible = values.get((selector.name, matcher.name))
                if possible is not None:
                    exact = matcher.op in (promql.MatchOp.Equal, promql.MatchOp.NotEqual)
                    parts = [matcher.value] if exact else matcher.value.split("|")
                    unknown = [part for part in parts if not any(re.fullmatch(part, value) for value in possible)]
                    assert unknown == [], f"{selector.name}{{{matcher.name}}} is one of {sorted(possible)}"


def test_every_metric_of_the_code_is_shown_or_watched(dashboard: Config, rules: list[Config]) -> None:
    asked = {selector.name for expression in expressions(dashboard, rules) for selector in selectors(expression)}
    metrics: dict[str, set[str]] = {}
    for series in series_of_code().values():
        metrics.setdefault(series.metric, set()).add(series.name)
    assert len(metrics) > 20
    assert {metric for metric, names in metrics.items() if not names & asked} == set()


def test_the_code_s_metrics_are_those_of_the_registry() -> None:
    """What the source says, checked against what a process that has imported it would answer."""
    import gateway.metrics
    import model_server.supervisor
    import parampara.execution.metrics
    import parampara.http

    modules = (gateway.metrics, model_server.supervisor, parampara.execution.metrics, parampara.http)
    collectors = [value for module in modules for value in vars(module).values() if hasattr(value, "_labelnames")]
    code = series_of_code()
    assert len(collectors) > 15
    for collector in collectors:
        for series in series_of(collector._name, collector._type, collector._labelnames):
            assert (code[series.name].kind, code[series.name].labels) == (series.kind, series.labels)


def test_vllm_has_the_metrics_that_are_asked_for(dashboard: Config, rules: list[Config]) -> None:
    sources = sorted(vllm_environment(ROOT).glob("lib/python3*/site-packages/vllm/v1/metrics/loggers.py"))
    if not sources:
        pytest.skip("vLLM's environment was not made here")
    defined = set(re.findall(r'name="(vllm:\w+)"', sources[0].read_text(encoding="utf-8")))
    assert set(VLLM) <= defined


def test_operations_names_metrics_that_exist() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    named = {(name, labels) for name, labels in re.findall(r"`(parampara_\w+)(?:\{([\w,]+)\})?`", text)}
    known = series_of_code()
    by_metric = {series.metric: series for series in known.values() if not series.name.endswith("_bucket")}
    assert len(named) > 10
    for name, labels in named:
        series = known.get(name) or by_metric.get(name)
        assert series is not None, name
        assert {label for label in labels.split(",") if label} <= series.labels, name


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("sum(parampara_nothing)", "no series"),
        ('parampara_jobs{status="failed"}', "no label status"),
        ("sum by (state) (parampara_jobs_running)", "no label state"),
        ("rate(parampara_gateway_inflight[5m])", "does not only grow"),
        ("parampara_stage_loss and parampara_outbox_unsent", "no pair is equal"),
        ("histogram_quantile(0.5, sum by (model) (rate(parampara_gateway_first_token_seconds_bucket[5m])))", "no label le"),
        ("parampara_jobs > on (queue) parampara_jobs_running", "no label queue"),
        ("sum(up", "unclosed"),
    ],
)
def test_a_query_that_can_never_answer_is_a_fault(expression: str, fault: str, known: dict[str, Series]) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        labels_of(expression, known)
    assert isinstance(caught.value, Misfit) or fault == "unclosed"


# ------------------------------------------------------------------------------------------------------------ targets


def test_every_target_is_a_service_that_listens_there_and_can_be_reached(prometheus: Config, compose: Config) -> None:
    reached = set()
    networks = set(compose["services"]["prometheus"]["networks"])
    for job, target in targets_of(prometheus):
        if job == "prometheus":
            continue
        host, port = target.split(":")
        service = compose["services"][host]
        variables = PORT_VARIABLES.get(host, {"PARAMPARA_WORKER__METRICS_PORT"})
        assert port in {str(service["environment"].get(variable)) for variable in variables}, target
        assert networks & set(service["networks"]), f"Prometheus shares no network with {host}"
        reached.add(host)
    told = {name for name, service in compose["services"].items() if "build" in service and name != "migrate"}
    assert reached == told, "every service of ours is asked, and nothing else"


def test_workers_are_labelled_with_their_queue(prometheus: Config, compose: Config) -> None:
    (worker,) = [job for job in prometheus["scrape_configs"] if job["job_name"] == "worker"]
    queues = {group["targets"][0].split(":")[0]: group["labels"]["queue"] for group in worker["static_configs"]}
    assert sorted(queues.values()) == sorted(set(QUEUES.values()))
    for service, queue in queues.items():
        module = {"deployer": "model_server"}.get(service, service)
        source = (ROOT / "services" / module / "src" / module / "__main__.py").read_text(encoding="utf-8")
        assert f'queue="{queue}"' in source, service


def test_the_rule_maps_kinds_to_queues_as_the_plan_does(rules: list[Config]) -> None:
    (rule,) = [rule for rule in rules if rule.get("record") == "queue:parampara_jobs_queued:sum"]
    ((queue, pattern),) = re.findall(r'"queue", "(\w+)", "kind", "([\w|]+)"', rule["expr"])
    by_rule = {kind: queue if re.fullmatch(pattern, kind) else kind for kind in QUEUES}
    assert by_rule == QUEUES


def test_no_target_is_an_address_that_asks_for_a_key(prometheus: Config, compose: Config) -> None:
    ports = {host: port for _, target in targets_of(prometheus) for host, port in [target.split(":")]}
    for host in ("gateway", "control-plane"):
        environment = compose["services"][host]["environment"]
        section = host.upper().replace("-", "_")
        assert ports[host] == environment[f"PARAMPARA_{section}__METRICS_PORT"] != environment[f"PARAMPARA_{section}__PORT"]
        assert environment[f"PARAMPARA_{section}__METRICS_HOST"] == "0.0.0.0"


def targets_of(prometheus: Config) -> Iterator[tuple[str, str]]:
    for job in prometheus["scrape_configs"]:
        assert job.get("metrics_path", "/metrics") == "/metrics"
        for group in job["static_configs"]:
            yield from ((job["job_name"], target) for target in group["targets"])


# --------------------------------------------------------------------------------------------------- rules, dashboard


def test_alerts_say_how_bad_it_is_and_what_to_do(rules: list[Config]) -> None:
    alerts = [rule for rule in rules if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 10
    for rule in alerts:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]


def test_the_dashboard_is_whole(dashboard: Config) -> None:
    panels = list(panels_of(dashboard))
    identifiers = [panel["id"] for panel in panels]
    assert len(set(identifiers)) == len(identifiers)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), panel["title"]


def test_the_dashboard_uses_the_provisioned_data_source(dashboard: Config, compose: Config) -> None:
    provisioned = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    (source,) = provisioned["datasources"]
    for panel in panels_of(dashboard):
        if panel["type"] != "row":
            used = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(one == {"type": source["type"], "uid": source["uid"]} for one in used), panel["title"]
    address = urlsplit(source["url"])
    assert (address.hostname, address.port) == ("prometheus", 9090)
    services = compose["services"]
    assert set(services["grafana"]["networks"]) & set(services["prometheus"]["networks"])


# ------------------------------------------------------------------------------------------------------------ compose


def test_configuration_lies_where_the_containers_look_for_it(compose: Config, prometheus: Config) -> None:
    mounts = {name: mounts_of(compose["services"][name]) for name in ("prometheus", "grafana")}
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in compose["services"]["prometheus"]["command"])
    assert (mounts["prometheus"][str(Path(flags["config.file"]).parent)] / Path(flags["config.file"]).name).is_file()
    assert flags["storage.tsdb.path"] in mounts["prometheus"]
    assert all((FOLDER / "prometheus" / name).is_file() for name in prometheus["rule_files"])
    assert {path.name for path in mounts["grafana"]["/etc/grafana/provisioning"].iterdir()} == {"datasources", "dashboards"}
    provider = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/parampara.yml").read_text(encoding="utf-8"))["providers"][0]
    assert mounts["grafana"][provider["options"]["path"]] / "parampara.json" == DASHBOARD
    home = re.search(r"^GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH=(.+)$", grafana_settings(), re.MULTILINE)
    assert home is not None
    assert home[1] == f"{provider['options']['path']}/{DASHBOARD.name}"


def test_monitoring_is_confined_and_only_on_request(compose: Config) -> None:
    for name in ("prometheus", "grafana"):
        service = compose["services"][name]
        assert service["profiles"] == ["monitoring"], name
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"]), f"{name}: an exact version"
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert all(mount.endswith(":ro") for mount in service["volumes"] if mount.startswith("./")), name
    assert "ports" not in compose["services"]["prometheus"]
    (port,) = compose["services"]["grafana"]["ports"]
    assert port.startswith("127.0.0.1:")
    outside = {name for name, network in compose["networks"].items() if not network.get("internal")}
    assert not outside & set(compose["services"]["prometheus"]["networks"])
    shared = outside & set(compose["services"]["grafana"]["networks"])
    assert [name for name, service in compose["services"].items() if shared & set(service["networks"])] == ["grafana"]


def test_grafana_has_no_default_password_and_asks_nobody_outside(compose: Config) -> None:
    assert compose["services"]["grafana"]["env_file"] == [str((FOLDER / "grafana.env").relative_to(ROOT))]
    assert re.search(r"^GF_SECURITY_ADMIN_PASSWORD=\$\{GRAFANA_PASSWORD:\?[^}]*GRAFANA_PASSWORD in \.env", grafana_settings(), re.MULTILINE)
    assert "GRAFANA_PASSWORD" not in re.sub(r"#.*", "", (ROOT / "compose.yaml").read_text(encoding="utf-8"))
    for name in ("ANALYTICS_REPORTING_ENABLED", "ANALYTICS_CHECK_FOR_UPDATES", "NEWS_NEWS_FEED_ENABLED"):
        assert f"GF_{name}=false" in grafana_settings()


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_the_password_is_asked_for_only_with_the_profile() -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("docker has no compose plugin")
    assert compose_config().returncode == 0
    refused = compose_config("--profile", "monitoring")
    assert refused.returncode != 0
    assert "set GRAFANA_PASSWORD in .env" in refused.stderr
    accepted = compose_config("--profile", "monitoring", GRAFANA_PASSWORD="a $ecret")
    assert accepted.returncode == 0, accepted.stderr
    grafana = json.loads(accepted.stdout)["services"]["grafana"]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"].replace("$$", "$") == "a $ecret"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: package prometheus)")
def test_prometheus_accepts_its_files_and_the_rules_fire_as_they_should() -> None:
    for words in (
        ["check", "config", FOLDER / "prometheus" / "prometheus.yml"],
        ["test", "rules", Path(__file__).with_name("rules.test.yml")],
    ):
        outcome = subprocess.run(["promtool", *words], capture_output=True, text=True, check=False, timeout=60)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def mounts_of(service: Config) -> dict[str, Path]:
    """Target to source of a service's mounts."""
    parts = [substituted(mount, {}).split(":") for mount in service["volumes"]]
    return {target: ROOT / source for source, target, *_ in parts}


def grafana_settings() -> str:
    return (FOLDER / "grafana.env").read_text(encoding="utf-8")


def compose_config(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    secrets = {"POSTGRES_PASSWORD": "pw1", "REDIS_PASSWORD": "pw2", "PARAMPARA_KEY_PEPPER": "pepper"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GRAFANA_", "COMPOSE_"))}
    command = ["docker", "compose", "--env-file", os.devnull, "-f", "compose.yaml", *options, "config", "--format", "json"]
    environment = {**clean, **secrets, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
