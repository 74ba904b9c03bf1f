"""Cores and memory that a process may use, read from control groups laid out as Linux lays them out."""

import gc
import os
import subprocess
import sys

import pytest

from herd import dtypes, machine
from herd.errors import ConfigError, StorageError


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return a function that lays out a control group tree and puts this process into one of its groups."""

    def lay_out(membership: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "self").write_text(membership)
        monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path / "cgroup")
        monkeypatch.setattr(machine, "PROC_CGROUP", tmp_path / "self")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)

    return lay_out


V1 = "4:memory:/a\n3:cpu,cpuacct:/a/b\n1:name=systemd:/x\n"


@pytest.mark.parametrize(
    "membership, files, cores",
    [
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b\n", {"cpu.max": "max 1", "a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("0::/not/visible\n", {"cpu.max": "400000 100000"}, 4),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "50000"}, 5),
        (V1, {"cpu/a/cpu.cfs_quota_us": "600000", "cpu/a/cpu.cfs_period_us": "100000"}, 6),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"}, 16),
        ("0::/\n", {"cpu.max": "nonsense"}, 16),
        ("", {}, 16),
    ],
)
def test_cores_respect_the_quota_of_every_parent_group(groups, membership, files, cores):
    groups(membership, files)
    assert machine.cores() == cores


def test_cores_respect_the_affinity_mask():
    code = "from herd import machine; print(machine.cores())"
    command = ["taskset", "-c", "0", sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs taskset")
    assert done.stdout.strip() == "1"


GB = 10**9
NO_LIMIT = 9223372036854771712
"""What control groups of the first version say if there is none."""


def first_version(limit: int, used: int, inactive: int) -> dict[str, str]:
    files = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": f"total_inactive_file {inactive}"}
    return {f"memory/a/memory.{name}": str(content) for name, content in files.items()}


def second_version(limit: int | str, used: int, inactive: int) -> dict[str, str]:
    files = {"max": limit, "current": used, "stat": f"anon 5\ninactive_file {inactive}"}
    return {f"a/memory.{name}": str(content) for name, content in files.items()}


@pytest.mark.parametrize(
    "membership, files, total, available",
    [
        ("0::/a\n", second_version(2 * GB, GB, GB // 2), 2 * GB, 3 * GB // 2),
        ("0::/\n", {"memory.max": "max", "memory.current": "5", "memory.stat": ""}, None, None),
        (V1, first_version(3 * GB, 2 * GB, GB), 3 * GB, 2 * GB),
        (V1, first_version(NO_LIMIT, 1, 0), None, None),
    ],
)
def test_memory_respects_the_limit_of_the_control_group(
    groups, monkeypatch, membership, files, total, available
):
    import psutil

    virtual = type("V", (), {"total": 8 * GB, "available": 7 * GB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: virtual)
    groups(membership, files)
    assert machine.total_memory() == (total or 8 * GB)
    assert machine.available_memory() == (available or 7 * GB)


def test_peak_memory_counts_what_was_freed_until_it_is_reset():
    machine.reset_peak_memory()
    before = machine.resident_memory()
    block = b"x" * (64 << 20)
    assert machine.peak_memory() >= before + (48 << 20)
    del block


def test_a_locked_folder_names_the_process_that_holds_it(tmp_path):
    code = (
        "import sys, pathlib; from herd.machine import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(StorageError, match=f"process {other.pid} is working"),
            machine.lock_folder(tmp_path),
        ):
            pass
        other.kill()
    with machine.lock_folder(tmp_path):  # the system released it
        pass


@pytest.mark.parametrize("text", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_a_dtype_is_found_by_each_of_its_names(text):
    assert dtypes.parse_dtype(text) == "bf16"
    assert dtypes.nbytes_per_value(text) == 2


def test_an_unknown_dtype_is_refused_with_the_allowed_ones():
    with pytest.raises(ConfigError, match="'int3' is not one of fp32, bf16"):
        dtypes.parse_dtype("int3", ("fp32", "bf16"))


def test_every_dtype_is_torchs_own_and_of_its_size():
    for name, dtype in dtypes.DTYPES.items():
        torch_dtype = dtypes.torch_dtype(name)
        assert torch_dtype.itemsize == dtype.nbytes
        assert dtypes.short_name(torch_dtype) == name


def test_waiting_threads_sleep_soon_unless_the_user_chose_otherwise(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    machine.limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    machine.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "2000"
    monkeypatch.delenv("GOMP_SPINCOUNT")


def test_torchs_libraries_are_loaded_without_importing_torch():
    code = (
        "import sys, time, pathlib\nfrom herd.machine import load_torch_libraries\nload_torch_libraries()\n"
        "maps = pathlib.Path('/proc/self/maps')\n"
        "while maps.exists() and 'libtorch_cpu' not in maps.read_text(): time.sleep(0.01)\n"
        "print('torch' in sys.modules)\nimport torch\nprint(int(torch.ones(2).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "2"], done.stderr


def test_garbage_is_collected_again_after_the_block():
    try:
        with machine.without_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_freed_memory_is_used_again_without_page_faults():
    code = """
import resource, torch
from herd import machine
if not machine.keep_freed_memory():
    raise SystemExit("without glibc")
for _ in range(16):  # glibc 2.36 keeps the first few blocks apart
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "without glibc" in done.stderr:
        pytest.skip("without glibc")
    assert int(done.stdout) < 1000  # of the 10,000 of the first time
