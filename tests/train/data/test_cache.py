"""Sources of every kind, their caches, and bad records."""

import dataclasses
import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from sources import MODEL, TOKENIZER, config_of, conversation, documents, write_lines

from train.data import cache, files, workers
from train.data.cache import open_cache
from train.data.config import DataConfig, Source
from zaya_jax import ConfigError, DataError
from zaya_jax.text.tokenizer import Tokenizer

DOCUMENTS = documents(0, 12)


def opened(folder: Path, source: Source, length=64, tokenizer=TOKENIZER, model=MODEL, **fields):
    return open_cache(source, config_of(folder, source, **fields), tokenizer, model, length)


def content(cache) -> list[tuple]:
    return [
        (tuple(cache.tokens(n).tolist()), tuple(cache.weights(n).tolist()), int(cache.bytes[n]))
        for n in range(len(cache))
    ]


@pytest.fixture
def made(monkeypatch):
    """How many caches were written."""
    written = []
    write = cache._write
    monkeypatch.setattr(cache, "_write", lambda *a: (written.append(a[0]), write(*a)))
    return written


@pytest.fixture
def expected(tmp_path):
    return content(opened(tmp_path, Source(str(write_lines(tmp_path / "x.jsonl", DOCUMENTS)))))


def test_every_kind_of_source_gives_the_same_examples(tmp_path, expected):
    lines = (tmp_path / "x.jsonl").read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    with fsspec.open("memory://somewhere/x.jsonl", "wb") as file:
        file.write(lines)
    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    for record in DOCUMENTS:
        writer.write(json.dumps(record).encode())
    writer.close()
    rows = datasets.Dataset.from_list(DOCUMENTS)
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(
        str(tmp_path / "splits")
    )
    for n, record in enumerate(DOCUMENTS):
        (tmp_path / f"document{n:02}.txt").write_text(record["text"])
    write_lines(tmp_path / "part-1.jsonl", DOCUMENTS[:5])
    write_lines(tmp_path / "part-2.jsonl", DOCUMENTS[5:])
    paths = ["x.jsonl.gz", "x.array_record", "saved", "splits", "document*.txt", "part-*.jsonl"]
    paths = [str(tmp_path / path) for path in paths]
    for path in [*paths, "memory://somewhere/*.jsonl", f"hf://{tmp_path}/splits:train"]:
        assert content(opened(tmp_path, Source(path))) == expected, path
    assert len(opened(tmp_path, Source(f"{tmp_path}/splits:test"))) < len(expected)


def test_a_row_of_a_data_set_has_no_fields_that_only_others_have(tmp_path):
    records = [conversation("Q", "A", weight=2.0), conversation("Q", "A")]
    records[0]["messages"][1]["train"] = True
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    saved = opened(tmp_path, Source(str(tmp_path / "saved"), "chat"))
    lines = opened(tmp_path, Source(str(write_lines(tmp_path / "x.jsonl", records)), "chat"))
    assert content(saved) == content(lines) and len(lines) == 2


def test_a_cache_is_used_again_wherever_its_content_stands(tmp_path, expected, made):
    assert content(opened(tmp_path, Source(str(tmp_path / "x.jsonl")))) == expected
    (tmp_path / "x.jsonl").rename(tmp_path / "renamed.jsonl")
    again = opened(tmp_path, Source(str(tmp_path / "renamed.jsonl"), weight=3.0), seed=5)
    assert content(again) == expected and not made


def test_whatever_the_tokens_depend_on_makes_a_new_cache(tmp_path, expected, made):
    file = tmp_path / "x.jsonl"
    first = opened(tmp_path, Source(str(file))).key
    keys = {first}
    tokenizer = {**TOKENIZER.files, "tokenizer.json": TOKENIZER.files["tokenizer.json"] + b" "}
    other = Tokenizer(TOKENIZER._core, TOKENIZER.template, tokenizer, TOKENIZER.end_tokens)
    keys.add(opened(tmp_path, Source(str(file)), tokenizer=other).key)
    keys.add(opened(tmp_path, Source(str(file)), length=63).key)
    keys.add(opened(tmp_path, Source(str(file), on_long="skip"), max_bad_share=1.0).key)
    times = file.stat()
    file.write_bytes(file.read_bytes().replace(b"0.3", b"0.4", 1))  # a byte
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = opened(tmp_path, Source(str(file)))
    assert content(changed) != expected
    assert len({*keys, changed.key}) == 5 and len(made) == 4


def test_an_old_files_hash_is_remembered_until_it_changes(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1.0)
    first = files.local_hash(file, tmp_path / "memory")
    hashed = []
    true_hash = files._hash
    monkeypatch.setattr(files, "_hash", lambda s: (hashed.append(s), true_hash(s))[1])
    assert files.local_hash(file, tmp_path / "memory") == first and not hashed
    times = file.stat()
    file.write_bytes(file.read_bytes().replace(b"0.3", b"0.4", 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files.local_hash(file, tmp_path / "memory") != first and hashed


def test_a_damaged_cache_is_made_again(tmp_path, expected, made):
    [folder] = [f.parent for f in (tmp_path / "cache").rglob("info.json")]
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(10)
    assert content(opened(tmp_path, Source(str(tmp_path / "x.jsonl")))) == expected
    assert len(made) == 1


def test_processes_do_not_change_the_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CHUNK_RECORDS", 5)
    records = [*documents(1, 60), b"{", *documents(2, 60)]
    source = Source(str(write_lines(tmp_path / "x.jsonl", records)))
    alone = opened(tmp_path / "a", source, workers=0, max_bad_share=0.1)
    several = opened(tmp_path / "b", source, workers=2, max_bad_share=0.1)
    assert content(alone) == content(several) and alone.info == several.info


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from sources import *
from train.data import cache
write = cache._write
def slow(folder, chunks, *rest):
    def endless():
        yield from chunks
        print("written", flush=True)
        time.sleep(600)
    write(folder, endless(), *rest)
cache._write = slow
folder = Path(sys.argv[1])
source = Source(str(folder / "x.jsonl"))
cache.open_cache(source, config_of(folder, source), TOKENIZER, MODEL, 64)
"""


def test_a_kill_in_the_middle_leaves_no_wrong_cache(tmp_path):
    source = Source(str(write_lines(tmp_path / "x.jsonl", DOCUMENTS)))
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert list((tmp_path / "cache").glob("*.unfinished"))
    found = content(opened(tmp_path, source))
    assert found == content(opened(tmp_path / "other", source))
    assert not list((tmp_path / "cache").glob("*.unfinished"))


ORPHANS = """
import multiprocessing, sys, time
sys.path.insert(0, sys.argv[1])
from train.data import workers
from train.data.records import Record
from sources import *

def records():
    for n in range(20):
        yield Record("x", n, b"")
    while True:
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        time.sleep(600)

if __name__ == "__main__":
    workers.CHUNK_RECORDS = 1
    workers.AHEAD = 1
    for _ in workers.in_order(len, records(), 1):
        pass
"""


def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        [child] = map(int, process.stdout.readline().split())
        os.kill(child, 0)
        process.send_signal(signal.SIGKILL)
    for _ in range(300):
        if _state(child) in (None, "Z"):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} goes on")


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None


def test_two_runs_at_once_make_one_cache(tmp_path, made):
    """The second one waits until the first is done, and takes what it made."""
    source = Source(str(write_lines(tmp_path / "x.jsonl", DOCUMENTS)))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(content(opened(tmp_path, source))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(f == found[0] for f in found) and len(made) == 1


BAD = [
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    (b'{"text": "x"', "invalid JSON"),
    (b'{"text": NaN}', "invalid JSON"),
    (b"[1]", "not a JSON object"),
    (b'{"txt": "x"}', "no field `text`"),
    (b'{"text": 3}', "the field `text` is no string"),
    (b'{"text": ""}', "empty text"),
    (b"", "empty line"),
    (b'{"text": "' + b"x" * 80 + b'"}', "82 tokens, more than the 64"),
]


def test_bad_records_are_counted_logged_and_skipped(tmp_path, caplog):
    good = documents(3, 3, 40)
    source = Source(
        str(write_lines(tmp_path / "x.jsonl", [*good, *(b for b, _ in BAD)])), on_long="skip"
    )
    with caplog.at_level(logging.WARNING, "train.data"):
        found = opened(tmp_path, source, max_bad_share=0.75)
    only_good = Source(str(write_lines(tmp_path / "good.jsonl", good)), on_long="skip")
    assert content(found) == content(opened(tmp_path, only_good))
    assert (found.info["records"], found.info["bad"]) == (12, 9)
    for number, (_, reason) in enumerate(BAD, 4):
        assert any(f"x.jsonl:{number}: {reason}" in m for m in caplog.messages), reason
    with pytest.raises(DataError, match=r"9 of 12 records are bad.*0\.7.*x\.jsonl:4: invalid UTF"):
        opened(tmp_path, source, max_bad_share=0.7)


def test_a_whole_file_can_be_bad(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"1 of 2 records are bad.*b\.txt: invalid UTF-8"):
        opened(tmp_path, Source(str(tmp_path / "*.txt")))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "no such file"),
        ("*.none", "no such file"),
        (".", "is a folder"),
        ("memory://none/x.jsonl", "no such file"),
        ("nosuch://x", "cannot be read"),
        ("bad.array_record", "cannot be read"),
        ("bad.jsonl.gz", "cannot be read"),
        ("empty.jsonl", "holds no example"),
        ("saved:test", "has no splits"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list(DOCUMENTS).save_to_disk("saved")
    for name in ("bad.array_record", "bad.jsonl.gz"):
        Path(name).write_bytes(b"nothing of the kind")
    Path("empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=message) as error:
        opened(tmp_path, Source(path))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*.unfinished"))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Source, {"path": ""}, "path"),
        (Source, {"path": "x", "format": "pdf"}, "format"),
        (Source, {"path": "x", "weight": 0}, "weight"),
        (Source, {"path": "x", "weight": float("nan")}, "weight"),
        (Source, {"path": "x", "on_long": "trim"}, "on_long must be split or skip"),
        (Source, {"path": "x", "format": "chat", "on_long": "split"}, "on_long"),
        (DataConfig, {"sources": ("x",)}, "sources"),
        (DataConfig, {"seed": -1}, "seed"),
        (DataConfig, {"window": 0}, "window"),
        (DataConfig, {"workers": -1}, "workers"),
        (DataConfig, {"cache": ""}, "cache"),
        (DataConfig, {"max_bad_share": 1.5}, "max_bad_share"),
    ],
)
def test_a_wrong_setting_is_named(kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


def test_tokens_of_a_large_vocabulary_are_kept(tmp_path):
    source = Source(str(write_lines(tmp_path / "x.jsonl", DOCUMENTS)))
    large = dataclasses.replace(MODEL, vocab_size=262272, eos_token_ids=(262271,))
    found = opened(tmp_path, source, model=large)
    assert 262271 in [found.tokens(n)[-1] for n in range(len(found))]
    assert found.tokens(0).dtype == np.uint32


def test_waiting_for_another_process_ends_with_it(tmp_path):
    """A lock goes with the process that held it, so nothing waits for a dead one."""
    source = Source(str(write_lines(tmp_path / "x.jsonl", DOCUMENTS)))
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
        start = time.monotonic()
        assert len(opened(tmp_path, source)) >= len(DOCUMENTS)
        assert time.monotonic() - start > 0.5
        killer.wait()


def test_the_same_bytes_under_a_name_that_says_compressed_are_other_content(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(gzip.compress(b'{"text": "words"}\n'))
    with pytest.raises(DataError, match="bad"):
        opened(tmp_path, Source(str(file)))
    file.rename(tmp_path / "x.jsonl.gz")
    assert len(content(opened(tmp_path, Source(f"{file}.gz")))) == 1
