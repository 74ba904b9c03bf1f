"""`herd plan serve --print vllm`: commands whose numbers are the plan's, on one node, on several, and quantized."""

import re
import shlex

from herd import cli
from herd.llama.config import SIZES
from herd.plan.machines import find_machine
from herd.plan.serve import Load, predict_serving
from herd.plan.vllm import vllm_commands
from herd.plan.ways import CatalogueTarget


def run(*words: str) -> int:
    return cli.run(["plan", "serve", *words])


def printed(capsys, *words: str) -> str:
    assert run(*words, "--print", "vllm") == 0
    return capsys.readouterr().out


def commands(text: str) -> list[dict[str, str]]:
    """Return the options of each `vllm serve`."""
    out = []
    text = text.replace("\\\n", "")
    for command in re.findall(r"vllm serve .*", text):
        model, *words = shlex.split(command.removeprefix("vllm serve ").removesuffix(" &"))
        pairs = {"model": model}
        for word in words:
            if word.startswith("--"):
                pairs[name := word] = ""
            else:
                pairs[name] = word
        out.append(pairs)
    return out


def test_replicas_on_one_node_have_devices_and_ports_of_their_own(capsys):
    text = printed(capsys, "--size", "8B", "--machine", "4xH100", "--users", "100", "--prompt", "2k")
    found = commands(text)
    replicas = int(re.search(r"(\d+) replica", text).group(1))
    assert len(found) == replicas
    devices = [
        each for part in re.findall(r"CUDA_VISIBLE_DEVICES=([\d,]+)", text) for each in part.split(",")
    ]
    assert devices == [str(number) for number in range(4 if replicas > 1 else len(devices))]
    ports = [each["--port"] for each in found]
    assert len(set(ports)) == replicas
    for each in found:
        assert each["--max-model-len"] == str(2048 + 400)
        assert int(each["--tensor-parallel-size"]) * replicas == len(devices)
    last = text.strip().splitlines()[-1]
    assert last.startswith("herd serve --upstream")
    assert [f"http://127.0.0.1:{port}" for port in ports] == re.findall(r"--upstream (\S+)", last)


def test_a_model_over_several_nodes_is_joined_by_ray(capsys):
    text = printed(capsys, "--size", "405B", "--machine", "16xA100", "--users", "5", "--p95-ttft", "60s")
    (found,) = commands(text)
    assert found["--tensor-parallel-size"] == "16"
    assert found["--distributed-executor-backend"] == "ray"
    assert "ray start --head --port=6379" in text
    assert "ray start --address=NODE1:6379" in text


def test_machines_without_gpus_are_refused(capsys):
    assert run("--size", "1B", "--machine", "M2Ultra-192GB", "--users", "1", "--print", "vllm") != 0
    assert "needs a machine with GPUs" in capsys.readouterr().err
    assert run("--print", "sglang") != 0
    assert "only vllm is known" in capsys.readouterr().err


def test_weights_of_four_bits_are_made_first():
    machine = find_machine("1xRTX4090")
    target = CatalogueTarget(machine, 1)
    load = Load(3, 8192, 400)
    w4a16 = next(each for each in target.formats if each.name == "w4a16")
    lines = vllm_commands("8B", predict_serving(target, SIZES["8B"], w4a16, load), machine, 1, load)
    assert (
        lines[0] == "herd quantize hf:meta-llama/Llama-3.1-8B-Instruct --to q4 --out Llama-3.1-8B-Instruct-q4"
    )
    assert lines[1].endswith("Llama-3.1-8B-Instruct-q4-vllm --format vllm")
    assert "vllm serve ./Llama-3.1-8B-Instruct-q4-vllm" in lines[2]
