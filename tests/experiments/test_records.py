"""A record is there whole or not at all, a table reads back as it was written, and both say where they came from."""

import errno
import json
import os
import subprocess

import pandas as pd
import pytest
import torch

from reprolib.experiments import records
from reprolib.files import paths

RECORD = {"experiment": {}, "row": {"run_id": "a", "accuracy_pct": 91.25}, "curve": [{"epoch": 1}], "provenance": {}}


def test_record_reads_back_and_its_folder_is_made(tmp_path):
    path = tmp_path / "runs" / "a" / "record.json"
    records.write(path, RECORD)
    assert records.read(path) == RECORD
    assert os.listdir(path.parent) == ["record.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_crash_while_writing_leaves_the_old_record_and_no_stray_file(tmp_path, monkeypatch, failing, error):
    def crash(*args, **kwargs):
        raise error

    path = tmp_path / "a" / "record.json"
    records.write(path, RECORD)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(os, failing, crash)
        records.write(path, RECORD | {"curve": []})
    assert records.read(path) == RECORD
    assert os.listdir(path.parent) == ["record.json"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORD)[: len(json.dumps(RECORD)) // 2].encode(),
        b"",
        b"[]",
        b'{"row": {}}',
        b"\xff\xfe\x00",
        json.dumps(RECORD | {"row": {"run_id": "another"}}).encode(),
        json.dumps({"fingerprint": "00000000"} | RECORD).encode(),
    ],
    ids=["half", "empty", "list", "no run_id", "no text", "of another network", "another fingerprint"],
)
def test_damaged_record_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "a" / "record.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged: make reproduce writes it anew"):
        records.read(path)


def test_a_full_disk_says_where(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'record.json'}'"):
        records.write(tmp_path / "record.json", RECORD)


@pytest.mark.parametrize("folder", ["file/runs", "file"])
def test_folder_that_cannot_be_written_is_an_os_error_that_names_it(tmp_path, folder):
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        records.write(tmp_path / folder / "record.json", RECORD)


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_table_written_read_and_written_again_has_equal_bytes(tmp_path):
    frame = pd.DataFrame(
        {
            "run_id": ["a", "b"],
            "pattern": ["dense", "Balanced(16) & Block(32, 32)"],
            "bank": [None, 16],
            "accuracy_pct": [100 / 3, 91.0],
            "group_lasso": [0.0, 1e-5],
            "flops": [626_403_328, 1],
            "prune_ends": [None, False],
        }
    )
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    records.write_csv(first, frame)
    records.write_csv(second, records.read_csv(first))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_text().splitlines()[1:] == [
        "a,dense,,33.33333333,0,626403328,",
        'b,"Balanced(16) & Block(32, 32)",16,91,1e-05,1,False',
    ]


def test_whole_numbers_with_gaps_are_written_whole(tmp_path):
    path = tmp_path / "table.csv"
    records.write_csv(path, pd.DataFrame({"run_id": ["a", "b"], "bank": [None, 16]}))
    records.write_csv(path, records.read_csv(path))
    assert path.read_text() == "run_id,bank\na,\nb,16\n"


@pytest.mark.parametrize("commit", ["047318265901", "12345678e901"])
def test_commit_that_looks_like_a_number_stays_text(commit, tmp_path):
    records.write_csv(tmp_path / "table.csv", pd.DataFrame({"run_id": ["a"], "commit": [commit]}))
    assert records.read_csv(tmp_path / "table.csv")["commit"].to_list() == [commit]


@pytest.fixture
def rows():
    return [
        {"dataset": "noisy-digits", "pattern": "dense", "seed": 0, "run_id": "d"},
        {"dataset": "noisy-digits", "pattern": "block", "target_sparsity": 0.9, "seed": 0, "run_id": "b9"},
        {"dataset": "noisy-digits", "pattern": "block", "target_sparsity": 0.5, "seed": 0, "run_id": "b5"},
    ]


ASKED = ["d", "b5", "b9"]


def test_table_has_an_order_of_its_own_and_is_left_alone_when_nothing_changes(tmp_path, rows):
    path = tmp_path / "table.csv"
    records.update(path, pd.DataFrame(rows), ASKED)
    assert records.read_csv(path)["run_id"].tolist() == ["b5", "b9", "d"]
    written = path.stat().st_mtime_ns
    records.update(path, pd.DataFrame(rows).iloc[::-1], ASKED)
    records.update(path, pd.DataFrame(), ASKED)
    assert path.stat().st_mtime_ns == written


def test_table_keeps_rows_of_earlier_runs_that_are_still_asked_for(tmp_path, rows):
    path = tmp_path / "table.csv"
    records.update(path, pd.DataFrame(rows), ASKED)
    records.update(path, pd.DataFrame([rows[1] | {"seed": 7}]), ["d", "b9"])
    table = records.read_csv(path)
    assert table["run_id"].tolist() == ["b9", "d"] and table["seed"].tolist() == [7, 0]


@pytest.mark.parametrize("content", [b"", b'a,b\n1,"2', b"a,b\n\xff,1", b"a,b\n1,2"])
def test_a_damaged_table_is_set_aside_and_written_anew(tmp_path, rows, content, capsys):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    records.update(path, pd.DataFrame(rows), ASKED)
    assert records.read_csv(path)["run_id"].tolist() == ["b5", "b9", "d"]
    assert path.with_name("table.csv.damaged").read_bytes() == content
    assert f"{path} is damaged: set aside as table.csv.damaged, made anew" in capsys.readouterr().err


def test_no_rows_make_no_table(tmp_path):
    records.update(tmp_path / "table.csv", pd.DataFrame(), [])
    assert not (tmp_path / "table.csv").exists()


def test_missing_table_says_how_to_compute_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results in .*none\.csv: make reproduce computes them"):
        records.read_csv(tmp_path / "none.csv")


@pytest.mark.parametrize("content", [b"", b'a,b\n1,"2', b"a,b\n\xff,1"], ids=["empty", "cut in half", "no text"])
def test_damaged_table_is_named(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.csv is damaged .*make reproduce writes it anew"):
        records.read_csv(path)


# --- Provenance -------------------------------------------------------------------------------------------------------


def test_provenance_says_commit_versions_hardware_and_date():
    found = records.provenance()
    assert {"commit", "hardware", "threads", "python", "torch", "platform", "date"} <= found.keys()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["hardware"]
    json.dumps(found)


@pytest.fixture
def other_root(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    records.commit.cache_clear()
    yield tmp_path
    records.commit.cache_clear()


def test_commit_is_unknown_outside_git(other_root, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(other_root.parent))
    assert records.commit() == "unknown"


def test_commit_marks_uncommitted_code(other_root):
    def git(*arguments):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", other_root, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (other_root / "reprolib").mkdir()
    (other_root / "reprolib" / "code.py").write_text("a = 1\n")
    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    (other_root / "notes.txt").write_text("no code\n")
    clean = records.commit()
    assert len(clean) == 12 and git("rev-parse", "HEAD").startswith(clean)
    (other_root / "reprolib" / "code.py").write_text("a = 2\n")
    records.commit.cache_clear()
    assert records.commit() == clean + "+"
