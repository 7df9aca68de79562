import subprocess
import zipfile
from pathlib import Path

import pytest

from crosshead.io.files import sha256_file
from crosshead.io.wheels import download_wheel, extract_member, matching_members

METADATA = "Metadata-Version: 2.1\nName: speeches\nVersion: 1.0\nRequires-Dist: surely-absent-package\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(directory: Path, members: dict[str, str]) -> Path:
    """A minimal wheel ``speeches==1.0`` that pip accepts."""
    path = directory / "speeches-1.0-py3-none-any.whl"
    info = {"METADATA": METADATA, "WHEEL": WHEEL, "RECORD": ""}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (members | {f"speeches-1.0.dist-info/{name}": text for name, text in info.items()}).items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes packages from, instead of the network."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_download_fetches_the_wheel_alone_and_only_once(index, tmp_path, monkeypatch):
    origin = write_wheel(index, {"speeches/a.txt": "hello"})
    wheel = download_wheel("speeches==1.0", tmp_path / "work", sha256=sha256_file(origin))
    assert wheel.read_bytes() == origin.read_bytes()
    assert [path.name for path in wheel.parent.iterdir()] == [origin.name]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called again"))
    assert download_wheel("speeches==1.0", tmp_path / "work") == wheel


def test_a_wheel_damaged_in_the_work_directory_is_fetched_again(index, tmp_path):
    origin = write_wheel(index, {"speeches/a.txt": "hello"})
    wheel = download_wheel("speeches==1.0", tmp_path / "work")
    wheel.write_bytes(wheel.read_bytes()[:-40])
    assert download_wheel("speeches==1.0", tmp_path / "work").read_bytes() == origin.read_bytes()


def test_a_wheel_with_another_hash_is_refused(index, tmp_path):
    write_wheel(index, {"speeches/a.txt": "hello"})
    with pytest.raises(ValueError, match=r"speeches==1\.0 has sha256 .*, expected 00"):
        download_wheel("speeches==1.0", tmp_path / "work", sha256="00")


def test_an_absent_package_gives_pips_own_reason(index, tmp_path):
    with pytest.raises(ConnectionError, match=r"could not download absent-package==9.*No matching distribution"):
        download_wheel("absent-package==9", tmp_path / "work")


def test_extract_checks_the_hash_and_keeps_the_earlier_file_when_it_differs(tmp_path):
    wheel = write_wheel(tmp_path, {"speeches/a.txt": "hello"})
    target = tmp_path / "a.txt"
    digest = extract_member(wheel, "speeches/a.txt", target)
    assert (target.read_text(), digest) == ("hello", sha256_file(target))
    target.write_text("earlier")
    with pytest.raises(ValueError, match="expected 00"):
        extract_member(wheel, "speeches/a.txt", target, sha256="00")
    with pytest.raises(ValueError, match=r"holds no file speeches/b\.txt"):
        extract_member(wheel, "speeches/b.txt", target)
    assert target.read_text() == "earlier"


def test_extract_refuses_a_damaged_wheel(tmp_path):
    wheel = tmp_path / "broken-1.0-py3-none-any.whl"
    wheel.write_text("no archive")
    with pytest.raises(ValueError, match="is damaged"):
        extract_member(wheel, "speeches/a.txt", tmp_path / "a.txt")


def test_a_member_whose_bytes_are_damaged_is_told_as_a_damaged_wheel(tmp_path):
    wheel = tmp_path / "speeches-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("speeches/a.txt", "hello " * 500)
        start = archive.infolist()[0].header_offset + 30 + len("speeches/a.txt")
    content = bytearray(wheel.read_bytes())
    content[start : start + 8] = b"\xff" * 8
    wheel.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .*; delete it and run the stage again"):
        extract_member(wheel, "speeches/a.txt", tmp_path / "a.txt")
    assert not list(tmp_path.glob("*a.txt*"))


def test_members_match_by_pattern_in_sorted_order(tmp_path):
    wheel = write_wheel(tmp_path, {"speeches/b.txt": "", "speeches/a.txt": "", "speeches/c.csv": ""})
    assert matching_members(wheel, "speeches/*.txt") == ["speeches/a.txt", "speeches/b.txt"]
