"""Building the native kernels, also without a compiler, with a broken one, and where it is declined."""

import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from herd.kernels import build

load = build._load.__wrapped__  # without its memory of the first answer


def test_no_compiler_is_one_warning_and_plain_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    with pytest.warns(
        UserWarning, match="native kernels are not available, so plain torch is used.*no-such-compiler"
    ) as seen:
        assert load() is False
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler")
def test_a_cache_folder_that_cannot_be_written_is_told_with_the_cure(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="file.*; set HERD_CACHE to a folder that can be written"):
        assert load() is False


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler")
def test_a_source_that_does_not_compile_is_told_by_its_first_error(monkeypatch, tmp_path):
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "broken.cpp").write_text("int x = nothing_of_that_name;\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"broken\.cpp.*error.*nothing_of_that_name"):
        assert load() is False
    assert not list((tmp_path / "cache").iterdir())  # nothing half-made stays


def test_native_kernels_can_be_declined(monkeypatch):
    monkeypatch.setenv("HERD_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load() is False


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler")
def test_the_name_depends_on_the_source(monkeypatch, tmp_path):
    name = build.library().name
    assert build.library().name == name
    for source in build.SOURCES.iterdir():
        (tmp_path / source.name).write_text(source.read_text() + "\n// changed\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "_compile", lambda *_: None)
    assert build.library().name != name


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler")
def test_those_that_come_together_build_once(monkeypatch, tmp_path):
    built = []

    def compile_slowly(compiler, flags, path):
        built.append(path)
        time.sleep(0.2)  # the others come meanwhile
        path.touch()

    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", compile_slowly)
    with ThreadPoolExecutor() as pool:
        paths = [pool.submit(build.library).result for _ in range(4)]
        assert len({path() for path in paths}) == len(built) == 1


@pytest.mark.parametrize(
    ("wanted", "march"), [("avx2", "haswell"), ("avx512", "native"), ("portable", "native"), ("", "native")]
)
def test_an_older_instruction_set_is_built_for_where_the_processor_has_it(monkeypatch, wanted, march):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "_processor", lambda: "flags : sse avx2 avx512f")
    monkeypatch.setenv("HERD_ISA", wanted)
    assert f"-march={march}" in build._machine_flags()
