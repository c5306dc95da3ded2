"""`headstart._stream`: what it reads, in which order, how fast, and what ends it."""

import gc
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

_stream = pytest.importorskip("headstart._stream", reason="the weight streamer is not built")

PAGE = 4096
LAYERS = 6
SIZE = 8 * PAGE
SOURCES = ("auto", "direct", "cached")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(LAYERS * SIZE - 100))  # the last layer's end is no whole page
    return path


def layers_of(path):
    ends = [min((i + 1) * SIZE, path.stat().st_size) for i in range(LAYERS)]
    return [(f"layer {i}", [(0, i * SIZE, ends[i], 0)]) for i in range(LAYERS)]


def make(path, slots=3, *, schedule=None, layers=None, size=SIZE, **options):
    buffers = [mmap.mmap(-1, size) for _ in range(slots)]
    layers = layers_of(path) if layers is None else layers
    schedule = list(range(len(layers))) if schedule is None else schedule
    return _stream.Streamer([str(path)], layers, buffers, schedule, **options), buffers


def take(streamer, buffers, layer):
    slot = streamer.acquire(layer)
    content = buffers[slot][:]
    streamer.release(slot)
    return content


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("block", [PAGE, 3 * PAGE, 1 << 20])
def test_layers_are_the_files_bytes(file, source, block):
    streamer, buffers = make(file, source=source, block=block)
    whole = file.read_bytes()
    for turn in range(3 * LAYERS):
        layer = turn % LAYERS
        want = whole[layer * SIZE : (layer + 1) * SIZE]
        assert take(streamer, buffers, layer)[: len(want)] == want
    found = streamer.statistics()
    assert found["layers"] == 3 * LAYERS and found["mispredicted"] == found["dropped"] == 0
    asked = 3 * len(whole)
    read = sum(found[key] for key in ("cached", "direct", "buffered"))
    assert asked <= read <= asked + 3 * SIZE  # and what is ahead
    if source == "cached":
        assert found["buffered"] == read


def test_extents_of_several_files_and_sparse_positions(tmp_path):
    contents = [os.urandom(5 * PAGE), os.urandom(3 * PAGE - 7)]
    for i, content in enumerate(contents):
        (tmp_path / str(i)).write_bytes(content)
    buffer = mmap.mmap(-1, 6 * PAGE)
    extents = [(1, PAGE, 3 * PAGE - 7, 0), (0, 2 * PAGE, 2 * PAGE + 5, 4 * PAGE)]
    files = [str(tmp_path / str(i)) for i in range(2)]
    streamer = _stream.Streamer(files, [("both", extents)], [buffer], [0])
    streamer.acquire(0)
    assert buffer[: 2 * PAGE - 7] == contents[1][PAGE:]
    assert buffer[4 * PAGE : 4 * PAGE + 5] == contents[0][2 * PAGE : 2 * PAGE + 5]


def test_pages_in_the_cache_are_not_read_from_storage(file):
    streamer, buffers = make(file, source="auto")
    file.read_bytes()
    take(streamer, buffers, 0)
    streamer.close()
    assert streamer.statistics()["cached"] > 0 and streamer.statistics()["direct"] == 0


def test_streaming_leaves_the_page_cache_as_it_is(tmp_path):
    """What is not in the cache is read past it, and does not get there."""
    path, size = tmp_path / "large", 4 << 20
    path.write_bytes(os.urandom(LAYERS * size))
    layers = [(f"layer {i}", [(0, i * size, (i + 1) * size, 0)]) for i in range(LAYERS)]
    with open(path, "rb") as opened:
        os.fsync(opened)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(opened.fileno(), 1, 2 * size)  # some pages, from here on
    streamer, buffers = make(path, layers=layers, size=size, block=1 << 20)
    for turn in range(3 * LAYERS):
        take(streamer, buffers, turn % LAYERS)
    streamer.close()
    found = streamer.statistics()
    if not found["direct"]:
        pytest.skip("this file system has no O_DIRECT")
    assert found["direct"] > 2 * LAYERS * size and 0 < found["cached"] <= 4 * size and found["buffered"] == 0


# --- order and time ------------------------------------------------------------------------------------------------


def test_reads_are_in_the_order_of_the_schedule_which_goes_round(file):
    streamer, buffers = make(file, schedule=[2, 0, 4, 0], block=PAGE, threads=4)
    for layer in [2, 0, 4, 0] * 2:
        take(streamer, buffers, layer)
    streamer.close()
    reads = [event for event in streamer.take_events() if event[0] == "read"]
    order = [layer for _, layer, *_ in sorted(reads, key=lambda event: event[2])]
    assert order == ([2, 0, 4, 0] * 3)[: len(order)] and len(order) >= 8
    assert streamer.statistics()["mispredicted"] == 0
    assert streamer.take_events() == []


def test_reading_and_computing_overlap(file):
    """A slow store and a slow caller: together they take what the slower of them takes, not the sum."""
    step, count = 0.03, 20
    streamer, _ = make(file, bytes_per_second=SIZE / step)
    begin = time.perf_counter()
    for turn in range(count):
        slot = streamer.acquire(turn % LAYERS)
        time.sleep(0.8 * step)
        streamer.release(slot)
    wall = time.perf_counter() - begin
    assert count * step * 0.95 < wall < 1.15 * (count + 1) * step
    streamer.close()
    events = streamer.take_events()
    assert {kind for kind, *_ in events} == {"read", "wait", "hold"}
    held = [end - start for kind, _, start, end, _ in events if kind == "hold"]
    assert len(held) == count and min(held) > 0.75 * step
    found = streamer.statistics()
    assert found["waiting"] == pytest.approx(sum(e[3] - e[2] for e in events if e[0] == "wait"))
    assert found["reading"] == pytest.approx(wall, abs=3 * step)


def test_next_round_is_read_while_the_caller_is_away(file):
    streamer, buffers = make(file)
    for layer in range(LAYERS):
        take(streamer, buffers, layer)
    time.sleep(0.2)  # the next three are there
    streamer.take_events()
    for layer in range(3):
        take(streamer, buffers, layer)
    assert all(end - begin < 0.05 for kind, _, begin, end, _ in streamer.take_events() if kind == "wait")


def test_another_layer_than_the_next_is_given_too(file):
    streamer, buffers = make(file)
    whole = file.read_bytes()

    def check(layer):
        want = whole[layer * SIZE : (layer + 1) * SIZE]
        assert take(streamer, buffers, layer)[: len(want)] == want

    for layer in (0, 1, 0, 0, 5, 2, 3, 4, 5, 0, 2):
        check(layer)
    found = streamer.statistics()
    assert found["mispredicted"] == 5  # 0, 0, 5, 2 and the last 2
    assert found["layers"] == 11


def test_every_slot_held_is_an_error_and_no_deadlock(file):
    streamer, _ = make(file, 2)
    streamer.acquire(0)
    second = streamer.acquire(1)
    with pytest.raises(RuntimeError, match="layer 2: expected a buffer to read it to, all 2 are held"):
        streamer.acquire(2)
    streamer.release(second)
    streamer.acquire(2)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_cut_short_names_layer_and_file(file, source):
    streamer, buffers = make(file, source=source)
    take(streamer, buffers, 0)
    streamer.close()
    streamer, buffers = make(file, source=source)
    os.truncate(file, 3 * SIZE + 10)
    for _ in range(2):  # and again: what was whole is still given
        for layer in range(3):
            take(streamer, buffers, layer)
        with pytest.raises(
            OSError, match=rf"{file}: layer 3: expected 32768 bytes at offset 98304, got 10; .*cut short"
        ):
            streamer.acquire(3)
    file.write_bytes(file.read_bytes().ljust(LAYERS * SIZE, b"x"))
    assert take(streamer, buffers, 3)[10:] == b"x" * (SIZE - 10)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match="gone: cannot be opened: No such file"):
        _stream.Streamer([str(tmp_path / "gone")], [("a", [(0, 0, 1, 0)])], [mmap.mmap(-1, PAGE)], [0])


def test_a_file_that_cannot_be_read_names_the_cause(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}: a: Is a directory"):
        _stream.Streamer([str(tmp_path)], [("a", [(0, 0, 1, 0)])], [mmap.mmap(-1, PAGE)], [0]).acquire(0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(threads=0), "threads: expected at least 1, got 0"),
        (dict(block=1000), "block: expected a positive multiple of 4096, got 1000"),
        (dict(source="tape"), "source: expected 'auto', 'direct' or 'cached', got 'tape'"),
        (dict(slots=0), "buffers: expected at least one"),
        (dict(schedule=[]), "schedule: expected at least one layer, got none"),
        (dict(schedule=[7]), "schedule: expected layers 0 to 5, got 7"),
        (dict(size=PAGE), "buffers: expected 32768 bytes from a multiple of 4096, got 4096 bytes"),
        (
            dict(layers=[("a", [(0, 5, 10, 0)])]),
            r"layers: a: expected bytes of a file, .*, got \[5, 10\) of file 0 to 0",
        ),
        (dict(layers=[("a", [(1, 0, 10, 0)])]), "of file 1 to 0"),
        (dict(layers=[("a", [])]), "layers: a: expected an extent, got none"),
    ],
)
def test_what_does_not_fit_is_named(file, change, words):
    with pytest.raises(ValueError, match=words):
        make(file, **change)


def test_layers_and_slots_are_checked(file):
    streamer, _ = make(file, schedule=[0, 1])
    for layer in (-1, 2, 99):
        with pytest.raises(ValueError, match=f"acquire: layer {layer} is not scheduled"):
            streamer.acquire(layer)
    slot = streamer.acquire(0)
    streamer.release(slot)
    for wrong in (slot, -1, 99):
        with pytest.raises(ValueError, match=f"release: expected a slot that is held, got {wrong}"):
            streamer.release(wrong)


# --- ends ----------------------------------------------------------------------------------------------------------


def threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("rate", [0, 1e6])
def test_it_can_end_at_any_point_and_leaves_nothing(file, rate):
    before, files = threads(), len(os.listdir("/proc/self/fd"))
    for moment in range(12):
        streamer, buffers = make(file, bytes_per_second=rate, block=PAGE)
        if moment % 3:
            streamer.start()
        if moment % 2:
            take(streamer, buffers, moment % LAYERS)
        time.sleep(moment * 1e-3)
        begin = time.perf_counter()
        if moment % 4 == 0:
            streamer.close()
            streamer.close()
            with pytest.raises(RuntimeError, match="layer 0: the streamer is closed"):
                streamer.acquire(0)
        del streamer
        assert time.perf_counter() - begin < 0.5
    assert threads() == before and len(os.listdir("/proc/self/fd")) == files


def test_views_outlive_the_streamer(file):
    streamer, buffers = make(file)
    slot = streamer.acquire(2)
    view = torch.frombuffer(buffers[slot], dtype=torch.uint8)
    del streamer, buffers
    gc.collect()
    assert view.numpy().tobytes() == file.read_bytes()[2 * SIZE : 3 * SIZE]


def test_a_signal_wakes_a_waiting_caller(file):
    """Ctrl-C, and a handler that raises something else; the streamer goes on afterwards."""

    def handler(*_):
        raise TimeoutError("enough")

    streamer, buffers = make(file, bytes_per_second=SIZE / 1.5)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        begin = time.perf_counter()
        with pytest.raises(TimeoutError, match="enough"):
            streamer.acquire(0)
        assert 0.05 < time.perf_counter() - begin < 0.6
    finally:
        signal.signal(signal.SIGALRM, before)
    assert take(streamer, buffers, 0) == file.read_bytes()[:SIZE]


def test_ctrl_c_ends_a_program(file):
    code = f"""
import mmap, signal
from headstart import _stream
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
buffers = [mmap.mmap(-1, {SIZE})]
streamer = _stream.Streamer([{str(file)!r}], [("a", [(0, 0, {SIZE}, 0)])], buffers, [0], bytes_per_second=100)
print("waiting", flush=True)
streamer.acquire(0)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT and errors.rstrip().endswith("KeyboardInterrupt")


def test_closed_while_storage_is_slow_it_counts_no_more_time(file):
    streamer, _ = make(file, bytes_per_second=100)
    streamer.start()
    time.sleep(0.1)
    streamer.close()
    before = streamer.statistics()["reading"]
    time.sleep(0.1)
    assert streamer.statistics()["reading"] == before > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads, which is what is tested
def test_a_forked_process_is_told_and_can_end(file):
    streamer, buffers = make(file, bytes_per_second=1e5)
    streamer.start()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for call in (lambda: streamer.acquire(0), lambda: streamer.release(0), streamer.statistics, streamer.close):
                try:
                    call()
                except RuntimeError as error:
                    os.write(write, f"{error}\n".encode())
            del streamer
            gc.collect()
            os.write(write, b"gone\n")
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as words:
        lines = words.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    assert len(lines) == 5 and lines[-1] == "gone"
    assert lines[0] == (
        f"streamer: made in process {os.getpid()}, and this is {child}, where nothing reads; "
        "load the model in this process"
    )
    streamer.close()


# --- under the sanitizers ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress_under_the_sanitizers(tmp_path, sanitizer):
    root = Path(__file__).parent.parent
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path / "stress"
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=undefined"]
    sources = [root / "tests" / "stream" / "stress.cpp", root / "csrc" / "stream" / "streamer.cpp"]
    build = subprocess.run(["g++", *flags, *sources, "-o", program], capture_output=True, text=True)
    if "cannot find" in build.stderr:
        pytest.skip(f"g++ has no -fsanitize={sanitizer}: {build.stderr}")
    assert build.returncode == 0, build.stderr
    done = subprocess.run([program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "good\n", done.stdout + done.stderr
