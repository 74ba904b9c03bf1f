"""The commands that run a planned service with vLLM, and Herd's keys, ledger and page before it.

The options are those of vLLM 0.32: `vllm serve --help`, and its documentation on parallelism over several
nodes.
"""

from __future__ import annotations

from ..errors import PlanError
from .machines import Machine
from .serve import MAX_BATCH, Load, Served

CHECKPOINTS = {
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
    "3B": "meta-llama/Llama-3.2-3B-Instruct",
    "8B": "meta-llama/Llama-3.1-8B-Instruct",
    "70B": "meta-llama/Llama-3.1-70B-Instruct",
    "405B": "meta-llama/Llama-3.1-405B-Instruct",
}
"""Published checkpoints of the sizes. Their holders ask for an agreement before the download."""
KV_DTYPES = {"bf16": "auto", "int8": "fp8"}
"""vLLM's names of the formats of the KV cache. It has no int8, and fp8 is as small."""
MEMORY_SHARE = 0.92
"""Share of a device's memory that plans count on, as `ways.CatalogueTarget.capacity` does."""
FIRST_PORT, RAY_PORT = 8000, 6379
RAY = "--distributed-executor-backend ray"


def vllm_commands(size: str, served: Served, machine: Machine, tp: int, load: Load) -> list[str]:
    """Return the lines of a shell script: each replica on its node, then the gateway before all of them.

    ``tp`` devices share the model in each replica. If they are on several nodes, Ray joins these. Raises
    `PlanError` for a machine without GPUs, or a size without a published checkpoint.
    """
    if machine.device.kind != "gpu":
        raise PlanError(
            f"--print vllm needs a machine with GPUs, and {machine.name} has none: use herd serve there"
        )
    if size not in CHECKPOINTS:
        known = ", ".join(CHECKPOINTS)
        raise PlanError(f"--print vllm knows no published checkpoint of {size}; there are {known}")
    model, lines = _model(CHECKPOINTS[size], served.way.weights.name)
    common = [
        f"vllm serve {model}",
        f"--tensor-parallel-size {tp}",
        f"--max-model-len {load.prompt + load.answer}",
        f"--max-num-seqs {min(served.most_batch, MAX_BATCH)}",
        "--dtype bfloat16",
        *(["--quantization fp8"] if served.way.weights.name == "fp8" else []),
        f"--kv-cache-dtype {KV_DTYPES[served.way.kv]}",
        f"--gpu-memory-utilization {MEMORY_SHARE}",
        "--enable-auto-tool-choice --tool-call-parser llama3_json",
    ]
    addresses = []
    if tp > machine.per_node:
        nodes = -(-tp // machine.per_node)
        for replica in range(served.replicas):
            first = replica * nodes + 1
            lines += [
                f"# on node {first}:",
                f"ray start --head --port={RAY_PORT}",
                f"# on {_nodes(first + 1, first + nodes - 1)}:",
                f"ray start --address=NODE{first}:{RAY_PORT}",
                f"# on node {first}, when all have joined:",
                _joined([*common, RAY, f"--host 0.0.0.0 --port {FIRST_PORT}"]),
            ]
            addresses.append(f"http://NODE{first}:{FIRST_PORT}")
    else:
        on_node = machine.per_node // tp
        for replica in range(served.replicas):
            node, place = divmod(replica, on_node)
            if machine.nodes > 1 and not place:
                lines.append(f"# on node {node + 1}:")
            devices = ",".join(str(place * tp + rank) for rank in range(tp))
            host = "127.0.0.1" if machine.nodes == 1 else "0.0.0.0"
            command = _joined([*common, f"--host {host} --port {FIRST_PORT + place}"])
            background = " &" if served.replicas > 1 else ""
            lines.append(f"CUDA_VISIBLE_DEVICES={devices} {command}{background}")
            name = "127.0.0.1" if machine.nodes == 1 else f"NODE{node + 1}"
            addresses.append(f"http://{name}:{FIRST_PORT + place}")
    upstreams = " ".join(f"--upstream {address}" for address in addresses)
    before = f"herd serve {upstreams} --port 8080 --keys"
    return [*lines, "# keys, limits, bills and the chat page before it:", before]


def _model(checkpoint: str, weights: str) -> tuple[str, list[str]]:
    """Return the model for vLLM, and the commands that make it if it has to be quantized first."""
    if weights in ("bf16", "fp8"):
        return checkpoint, []
    bits = {"int8": "q8", "w4a16": "q4"}[weights]
    folder = f"{checkpoint.partition('/')[2]}-{bits}"
    return f"./{folder}-vllm", [
        f"herd quantize hf:{checkpoint} --to {bits} --out {folder}",
        f"herd export {folder} {folder}-vllm --format vllm",
    ]


def _nodes(first: int, last: int) -> str:
    return f"node {first}" if first == last else f"each of the nodes {first} to {last}"


def _joined(parts: list[str]) -> str:
    return " \\\n  ".join(parts)
