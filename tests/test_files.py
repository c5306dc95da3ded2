"""Files that appear whole or not at all: names, writers at once, links, and what is left alone."""

from __future__ import annotations

import os
import threading

import pytest

from headstart._files import write_whole, write_whole_folder


def text(words):
    return lambda path: path.write_text(words)


def folder(words):
    return lambda path: (path / "a.txt").write_text(words)


WRITERS = {"file": (write_whole, text), "folder": (write_whole_folder, folder)}


def content(path):
    return (path / "a.txt" if path.is_dir() else path).read_text()


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


def test_a_new_version_takes_the_place_of_the_old_one(writer, tmp_path):
    write, saving = writer
    for words in ("first", "second"):
        write(tmp_path / "out", saving(words))
        assert content(tmp_path / "out") == words
    assert os.listdir(tmp_path) == ["out"]


def test_what_fails_leaves_the_old_version_and_nothing_else(writer, tmp_path):
    write, saving = writer
    write(tmp_path / "out", saving("old"))

    def fail(path):
        saving("half")(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", fail)
    assert content(tmp_path / "out") == "old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["partial", "before"])
def test_leftovers_of_a_killed_run_with_the_same_process_id_are_left_alone(writer, tmp_path, kind, monkeypatch):
    """In a container every run may have the same id, so its leftovers have the names that this run would take."""
    write, saving = writer
    names = iter(["taken", "free", *(f"free{i}" for i in range(9))])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(names))  # even the random part is the same
    left = [tmp_path / f".out.{token}.{kind}" for token in (os.getpid(), "taken")]
    for path in left:
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    for words in ("first", "second"):
        write(tmp_path / "out", saving(words))
    assert content(tmp_path / "out") == "second"
    assert sorted(os.listdir(tmp_path)) == sorted(["out", *(path.name for path in left)])
    assert all(content(path / "mine.txt") == "mine" for path in left)


def test_writers_at_once_do_not_disturb_each_other(writer, tmp_path):
    write, saving = writer
    failed, barrier = [], threading.Barrier(4)

    def work(number):
        for turn in range(40):
            barrier.wait()
            try:
                write(tmp_path / "out", saving(f"{number} {turn} " * 50))
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    number, turn, *_ = content(tmp_path / "out").split()
    assert content(tmp_path / "out") == f"{number} {turn} " * 50 and turn == "39"
    assert os.listdir(tmp_path) == ["out"]


def test_the_path_is_resolved_before_it_is_used(writer, tmp_path, monkeypatch):
    write, saving = writer
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path)

    def leave(path):
        os.chdir(tmp_path / "elsewhere")
        saving("here")(path)

    write("out", leave)
    assert content(tmp_path / "out") == "here" and os.listdir(tmp_path / "elsewhere") == []
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    for words in ("new", "newer"):
        write(tmp_path / "link", saving(words))
        assert (tmp_path / "link").is_symlink() and content(tmp_path / "disk" / "target") == words
    assert os.listdir(tmp_path / "disk") == ["target"]


def test_permissions_are_those_of_any_new_file(writer, tmp_path):
    write, saving = writer
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", saving("x"))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == (0o750 if (tmp_path / "out").is_dir() else 0o640)


def test_long_names_have_room_for_a_temporary_one(writer, tmp_path):
    write, saving = writer
    name = "é" * 127  # 254 bytes; file systems allow 255
    write(tmp_path / name, saving("x"))
    assert content(tmp_path / name) == "x"
