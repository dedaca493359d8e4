"""Files that a command writes: found fit before the work, and written so that nothing is lost."""

import os
import stat
import threading

import pytest

from offload.errors import InvalidInput, OffloadError
from offload.outfile import check_output, write_output


def write(path, content=b"new", **options):
    check_output(path, "--json", **options)
    write_output(path, lambda file: file.write(content), "--json")


class TestFiles:
    """A file is the old one or the new one, and keeps its mode; a link stays one."""

    def test_a_new_one_has_what_the_umask_leaves(self, tmp_path):
        umask = os.umask(0o027)
        try:
            write(tmp_path / "a")
        finally:
            os.umask(umask)
        assert (tmp_path / "a").read_bytes() == b"new" and stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
        assert os.listdir(tmp_path) == ["a"]

    def test_one_that_is_there_keeps_its_mode(self, tmp_path):
        (tmp_path / "a").write_text("old")
        (tmp_path / "a").chmod(0o604)
        write(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"new" and stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o604

    @pytest.mark.parametrize("there", [True, False])
    def test_a_link_is_followed(self, tmp_path, there):
        (tmp_path / "far").mkdir()
        if there:
            (tmp_path / "far" / "target").write_text("old")
        (tmp_path / "link").symlink_to("far/target")
        write(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "target").read_bytes() == b"new"
        assert os.listdir(tmp_path / "far") == ["target"]

    def test_a_failure_leaves_the_old_one(self, tmp_path):
        (tmp_path / "a").write_text("old")

        def write(file):
            file.write(b"half")
            raise OSError(28, "No space left on device")
        with pytest.raises(OffloadError, match=r"--json '.*/a' cannot be written: No space left on device; .*make room") as full:
            write_output(tmp_path / "a", write, "--json")
        assert full.value.errno == 28 and (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize("path, word", [("/", "directory"), ("/proc/x.json", "No such file"), ("/nowhere/x", "No such file"),
                                            ("/dev/fd/99", "No such file")])
    def test_what_cannot_be_is_found_before_the_work(self, path, word):
        with pytest.raises(OffloadError, match=word) as refused:
            check_output(path, "--json")
        assert repr(path) in str(refused.value) and "\n" not in str(refused.value)

    def test_no_name(self):
        with pytest.raises(InvalidInput, match="--json '' names no file"):
            check_output("", "--json")

    def test_a_folder_that_is_missing_is_named(self, tmp_path):
        with pytest.raises(InvalidInput, match=r"-o '.*/far/off/x' cannot be written: .*: there is no folder '.*/far/off'; make it .mkdir -p."):
            check_output(tmp_path / "far" / "off" / "x", "-o")

    def test_looking_leaves_nothing(self, tmp_path):
        (tmp_path / "a").write_text("old")
        for name in ("a", "b"):
            check_output(tmp_path / name, "--json")
        assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


class TestInputs:
    """The input is never replaced, whatever name it is given by."""

    @pytest.mark.parametrize("name", ["in", "./in", "link", "hard"])
    def test_refused(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "in").write_text("precious")
        (tmp_path / "link").symlink_to("in")
        os.link("in", "hard")
        with pytest.raises(InvalidInput, match="is the input 'in', which would be lost"):
            check_output(name, "--json", inputs=["other", "in"])

    def test_a_terminal_may_be_both(self):
        check_output("/dev/null", "--json", inputs=["/dev/null"])


class TestWhatIsNoFile:
    """It is written into and stays what it is."""

    def test_a_fifo(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        got = []
        reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_bytes()))
        reader.start()
        write(tmp_path / "fifo")
        reader.join()
        assert got == [b"new"] and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and os.listdir(tmp_path) == ["fifo"]

    def test_a_device(self, tmp_path):
        (tmp_path / "link").symlink_to("/dev/null")
        write(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode)

    def test_a_block_device(self, tmp_path):
        if os.geteuid():
            pytest.skip("only root makes device nodes")
        try:
            os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 4095))      # there is none
        except OSError as error:
            pytest.skip(f"no device node can be made here: {error}")
        with pytest.raises(InvalidInput, match="block device"):
            check_output(tmp_path / "disk", "--json")

    @pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}", "link"])
    def test_a_descriptor_goes_on_where_it_stands(self, tmp_path, form):
        with open(tmp_path / "a", "wb", buffering=0) as file:
            file.write(b"before ")
            (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
            write(tmp_path / "link" if form == "link" else form.format(file.fileno()))
            file.write(b" after")
        assert (tmp_path / "a").read_bytes() == b"before new after"

    def test_a_descriptor_that_cannot_be_written(self, tmp_path):
        (tmp_path / "a").write_text("old")
        with open(tmp_path / "a") as file, pytest.raises(OffloadError, match="for reading alone"):
            check_output(f"/dev/fd/{file.fileno()}", "--json")

    def test_a_reader_that_is_gone(self):
        reader, writer = os.pipe()
        os.close(reader)
        try:
            with pytest.raises(BrokenPipeError):
                write_output(f"/dev/fd/{writer}", lambda file: file.write(b"new"), "--json")
        finally:
            os.close(writer)
