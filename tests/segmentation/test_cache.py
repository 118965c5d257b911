import json
import logging
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from segmentation import cache
from segmentation.epoch import DataError
from segmentation.samples import Sample

MASK = np.zeros((8, 8), np.uint8)


def build(count=3, value=7):
    return [Sample(f"s{i}", f"g{i}", np.full((1, 8, 8), value, np.uint8), MASK) for i in range(count)]


def refuse():
    raise AssertionError("built again")


def test_a_second_call_opens_what_the_first_one_built(tmp_path):
    first = cache.cached("k", build, folder=tmp_path)
    second = cache.cached("k", refuse, folder=tmp_path, verify=True)
    assert first.names == second.names == ("s0", "s1", "s2")
    assert int(second.image(2).max()) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.arrow", "k.json", "k.lock"]


def test_the_environment_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "there"))
    cache.cached("k", build)
    assert (tmp_path / "there" / "k.arrow").is_file()


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def zero_end(path):
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))


def flip_middle(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def drop_note(path):
    path.with_suffix(".json").unlink()


def spoil_note(path):
    path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize("damage", [cut, zero_end, flip_middle, drop_note, spoil_note])
def test_a_damaged_file_is_built_again_with_one_line(tmp_path, caplog, damage):
    cache.cached("k", build, folder=tmp_path)
    damage(tmp_path / "k.arrow")
    with caplog.at_level(logging.WARNING):
        again = cache.cached("k", lambda: build(value=9), folder=tmp_path, verify=True)
    assert int(again.image(0).max()) == 9
    assert len(caplog.records) == 1
    assert "is damaged" in caplog.text
    cache.cached("k", refuse, folder=tmp_path, verify=True)


def test_samples_opened_before_a_rebuild_stay_readable(tmp_path):
    before = cache.cached("k", build, folder=tmp_path)
    drop_note(tmp_path / "k.arrow")
    cache.cached("k", lambda: build(value=9), folder=tmp_path)
    assert int(before.image(0).max()) == 7


@pytest.mark.parametrize("problem", [DataError("a.png: broken"), OSError("disk gone"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing_behind(tmp_path, problem):
    def broken():
        yield build()[0]
        raise problem

    with pytest.raises(KeyboardInterrupt if isinstance(problem, KeyboardInterrupt) else DataError) as caught:
        cache.cached("k", broken, folder=tmp_path)
    assert cache.VARIABLE not in str(caught.value), "the data is at fault, not the cache"
    assert [path.name for path in tmp_path.iterdir()] == ["k.lock"]
    assert len(cache.cached("k", build, folder=tmp_path)) == 3


def test_what_a_killed_builder_left_is_removed(tmp_path):
    (tmp_path / "k.arrow.0123.tmp").write_bytes(b"half")
    cache.cached("k", build, folder=tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("limit", [100, 2000, 20000])
def test_a_full_disk_is_explained(tmp_path, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DataError, match=f"{tmp_path}: cannot write the cache: .*set SEGMENTATION_CACHE"):
            cache.cached("k", lambda: build(200), folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.tmp"))
    assert not (tmp_path / "k.arrow").exists()


@pytest.fixture
def read_only(tmp_path):
    """A folder that this process cannot write, even if it was started by root."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):  # pytest's own are its user's alone
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    cache.cached("there", build, folder=folder)
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    yield folder
    if was_root:
        os.seteuid(0)
    folder.chmod(0o755)


def test_a_read_only_cache_serves_what_it_has_and_explains_what_it_cannot(read_only):
    assert len(cache.cached("there", refuse, folder=read_only)) == 3
    with pytest.raises(DataError, match=r"cannot write the cache: Permission denied; set SEGMENTATION_CACHE"):
        cache.cached("new", build, folder=read_only)
    assert cache.content_hash([read_only / "there.json"], folder=read_only)


def test_a_file_in_the_folder_s_place_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write the cache"):
        cache.cached("k", build, folder=tmp_path / "file")


def test_a_key_that_is_no_file_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"key: got '\.\./k'"):
        cache.cached("../k", build, folder=tmp_path)


def slow_build(log):
    with log.open("a") as stream:
        stream.write("built\n")
    for sample in build(value=5):
        time.sleep(0.1)
        yield sample


def open_cache(folder, log, queue):
    samples = cache.cached("k", lambda: slow_build(log), folder=folder)
    queue.put([int(samples.image(i).max()) for i in range(len(samples))])


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    queue, log = context.Queue(), tmp_path / "log"
    workers = [context.Process(target=open_cache, args=(tmp_path / "c", log, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join(20)
    assert results == [[5, 5, 5]] * 4
    assert log.read_text() == "built\n"


def test_a_builder_that_dies_gives_its_place_to_the_next(tmp_path):
    def die():
        yield build()[0]
        os._exit(9)

    context = multiprocessing.get_context("fork")
    worker = context.Process(target=lambda: cache.cached("k", die, folder=tmp_path))
    worker.start()
    worker.join(20)
    assert worker.exitcode == 9
    assert len(cache.cached("k", build, folder=tmp_path)) == 3
    assert not list(tmp_path.glob("*.tmp"))


def tree(root: Path, **contents):
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return [root / name for name in contents]


def digest(root, files, **options):
    return cache.content_hash(files, folder=root / "cache", **options)


def test_the_hash_is_of_relative_names_and_contents(tmp_path):
    first, second = tree(tmp_path / "a", x="1", y="2"), tree(tmp_path / "b", x="1", y="2")
    assert digest(tmp_path, first) == digest(tmp_path, second[::-1])
    assert digest(tmp_path, first) != digest(tmp_path, first, extra="tile 32")
    assert digest(tmp_path, first) != digest(tmp_path, tree(tmp_path / "c", x="1", z="2"))
    assert digest(tmp_path, first) != digest(tmp_path, tree(tmp_path / "d", x="2", y="1"))
    assert digest(tmp_path, first) != digest(tmp_path, first[:1])


@pytest.mark.parametrize("settled", [False, True])
def test_a_change_that_keeps_size_and_time_stamp_changes_the_hash(tmp_path, monkeypatch, settled):
    if settled:
        monkeypatch.setattr(cache, "SETTLED_NS", -(10**12))
    files = tree(tmp_path / "a", x="1")
    before, state = digest(tmp_path, files), files[0].stat()
    time.sleep(0.02)  # longer than the grain of a file system's clock
    files[0].write_text("2")
    os.utime(files[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest(tmp_path, files) != before


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    files = tree(tmp_path / "a", x="1", y="2")
    monkeypatch.setattr(cache, "SETTLED_NS", -(10**12))
    first = digest(tmp_path, files)
    monkeypatch.setattr(cache, "_sha256", lambda path: refuse())
    assert digest(tmp_path, files) == first
    assert len(json.loads(next((tmp_path / "cache" / "hashes").glob("*.json")).read_text())) == 2


def test_a_memo_that_is_no_memo_is_ignored(tmp_path):
    files = tree(tmp_path / "a", x="1")
    first = digest(tmp_path, files)
    for text in ("", "[]", '{"x": 3}'):
        next((tmp_path / "cache" / "hashes").glob("*.json")).write_text(text)
        assert digest(tmp_path, files) == first


def test_a_file_that_vanished_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        digest(tmp_path, [tmp_path / "gone.png"])


NAMES = ("weights.safetensors", "checkpoint.json", "rewind.safetensors")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "network-drive"
    folder.mkdir()
    for name in (*NAMES[:2], "state.pt"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


def copy(source, folder, check=lambda copied: None):
    return cache.local_copy(source, "k", NAMES, check=check, folder=folder)


def copies(folder):
    return sorted(path.name for path in (folder / "copies").iterdir())


def test_a_folder_is_copied_once_and_only_what_is_asked_for(source, tmp_path):
    found = copy(source, tmp_path)
    assert sorted(path.name for path in found.iterdir()) == sorted(NAMES[:2])
    assert all((found / name).read_bytes() == (source / name).read_bytes() for name in NAMES[:2])
    shutil.rmtree(source)
    assert copy(source, tmp_path) == found
    assert copies(tmp_path) == ["k", "k.lock"]


def copied_by(source, folder, wait):
    wait.wait()

    def check(begun):
        (folder / f"copied-{os.getpid()}").touch()

    assert copy(source, folder, check).name == "k"


def test_processes_that_ask_at_once_copy_once(source, tmp_path):
    context = multiprocessing.get_context("fork")
    wait = context.Barrier(4)
    processes = [context.Process(target=copied_by, args=(source, tmp_path, wait)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("copied-*"))) == 1


def test_a_copy_without_room_is_explained_and_leaves_nothing(source, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(DataError, match=r"copies: cannot write the cache: .*set SEGMENTATION_CACHE"):
            copy(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert copies(tmp_path) == ["k.lock"]
    assert copy(source, tmp_path).is_dir()


def test_what_a_killed_process_had_begun_to_copy_goes(source, tmp_path):
    torn = tmp_path / "copies" / ".k-0123"
    torn.mkdir(parents=True)
    (torn / NAMES[0]).write_bytes(b"half")
    assert (copy(source, tmp_path) / NAMES[0]).read_bytes() == (source / NAMES[0]).read_bytes()
    assert copies(tmp_path) == ["k", "k.lock"]


def test_a_copy_that_is_found_wrong_is_none(source, tmp_path):
    def refused(begun):
        raise DataError("damaged")

    with pytest.raises(DataError, match="damaged"):
        copy(source, tmp_path, refused)
    assert copies(tmp_path) == ["k.lock"]
