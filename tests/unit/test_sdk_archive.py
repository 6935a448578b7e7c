"""A downloaded checkpoint: what its archive says is not believed."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tinkerbell.errors import ServerError
from tinkerbell.sdk.archive import MAX_FILES, unpack


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data) if data else None)
    return stream.getvalue()


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def sparse() -> bytes:
    """A file of one block that says it has 2^40 bytes."""
    raw = bytearray(tar(member("weights", b"x" * 512)))
    raw[156:157] = b"S"
    raw[386:398] = b"%011o\0" % 0
    raw[398:410] = b"%011o\0" % 512
    raw[483:495] = (1 << 40).to_bytes(12, "big")
    raw[483] |= 0x80
    return checked(raw)


def longer() -> bytes:
    raw = bytearray(tar(member("weights", b"x" * 512)))
    raw[124:136] = b"%011o\0" % (1 << 32)
    return checked(raw)


def checked(raw: bytearray) -> bytes:
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (sparse, "cut off in 'weights'"),
        (longer, "cut off in 'weights'"),
        (lambda: tar(*(member(f"f{number}") for number in range(MAX_FILES + 1))), "more than 64 files"),
        (lambda: tar(member("weights", b"x" * 4096))[:2000], "cut off|not an archive"),
        (lambda: b"\1" * 3000, "not an archive"),
        (lambda: b"", "not an archive"),
        (lambda: tar(member("a/../../b", b"x")), "unexpected name"),
    ],
)
def test_what_is_no_checkpoint_leaves_nothing(tmp_path: Path, make: Callable[[], bytes], says: str) -> None:
    with pytest.raises(ServerError, match=says):
        unpack(make(), tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_links_and_devices_are_left_out(tmp_path: Path) -> None:
    links = [member("l", type=kind, linkname="/etc/passwd") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)]
    found = unpack(tar(*links, member("f", type=tarfile.FIFOTYPE), member("ck/weights", b"w")), tmp_path / "made")
    assert [(path.name, path.read_bytes()) for path in found.iterdir()] == [("weights", b"w")]
