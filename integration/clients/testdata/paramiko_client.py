# SPDX-License-Identifier: Apache-2.0
# usage: paramiko_client.py PORT KEY HOSTKEY DIRECTORY [long]
import hashlib, os, stat, sys, tempfile
import paramiko

port, keyfile, hostfile, there = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
key = paramiko.Ed25519Key.from_private_key_file(keyfile)
kind, blob = open(hostfile).read().split()[:2]
host = paramiko.Ed25519Key(data=__import__("base64").b64decode(blob))


def connect():
    c = paramiko.SSHClient()
    c.get_host_keys().add("[127.0.0.1]:%d" % port, kind, host)
    c.connect("127.0.0.1", port, username="root", pkey=key, allow_agent=False, look_for_keys=False)
    return c


def run(c, command, data=b"", **options):
    stdin, out, err = c.exec_command(command, **options)
    stdin.write(data)
    stdin.channel.shutdown_write()
    return out.read(), err.read(), out.channel.recv_exit_status()


c = connect()
assert run(c, "echo ~root && sleep 0") == (b"/root\n", b"", 0)
assert run(c, "cat; echo err >&2; exit 42", b"in\0put") == (b"in\0put", b"err\n", 42)
assert run(c, "printf 'a\\nb'; exit 3", get_pty=True)[2] == 3
terminal = c.get_transport().open_session()
terminal.get_pty("xterm", width=100, height=30)
terminal.exec_command("stty size; read x; stty size; exit 5")
text = b""
while b"30 100" not in text:
    text += terminal.recv(4096)
terminal.resize_pty(width=101, height=31)
terminal.sendall(b"\n")
while chunk := terminal.recv(4096):
    text += chunk
assert b"31 101" in text and terminal.recv_exit_status() == 5, text

sftp = c.open_sftp()
sftp.chdir(there)
data = os.urandom(1 << 20) * (64 if len(sys.argv) > 5 else 16)
local = tempfile.mkdtemp()
with open(local + "/up", "wb") as f:
    f.write(data)
seen = []
attributes = sftp.put(local + "/up", "big", callback=lambda done, total: seen.append(done))
assert attributes.st_size == len(data) and seen[-1] == len(data)
sftp.get("big", local + "/down")  # prefetches
assert open(local + "/down", "rb").read() == data
with sftp.open("big") as f:
    f.prefetch(len(data))
    f.seek(5 << 20)
    assert f.read(100) == data[5 << 20 : (5 << 20) + 100]
    assert [bytes(b) for b in f.readv([(7, 9), (1 << 20, 70000)])] == [data[7:16], data[1 << 20 : (1 << 20) + 70000]]

sftp.mkdir("d", 0o2750)
assert stat.S_IMODE(sftp.stat("d").st_mode) & 0o777 == 0o750
with sftp.open("d/a", "w") as f:
    f.write("one")
with sftp.open("d/a", "a") as f:
    f.write("two")
with sftp.open("d/b", "wx") as f:
    f.write("b")
try:
    sftp.open("d/b", "wx")
    raise AssertionError("an exclusive open of what exists")
except IOError:
    pass
try:
    sftp.rename("d/b", "d/a")
    raise AssertionError("rename replaced a file")
except IOError as e:
    assert "exist" in str(e).lower() or "failure" in str(e).lower(), e
sftp.posix_rename("d/a", "d/b")
assert sftp.open("d/b").read() == b"onetwo" and sftp.listdir("d") == ["b"]
sftp.symlink("../d/./b", "d/link")
assert sftp.readlink("d/link") == "../d/./b"
assert stat.S_ISLNK(sftp.lstat("d/link").st_mode) and sftp.stat("d/link").st_size == 6
sftp.chmod("d/b", 0o4755)
sftp.chown("d/b", 12, 34)
sftp.chmod("d/b", 0o6711)
sftp.utime("d/b", (1e9, 1e9 + 1))
s = sftp.stat("d/b")
assert (stat.S_IMODE(s.st_mode), s.st_uid, s.st_gid, s.st_mtime) == (0o6711, 12, 34, 1e9 + 1), s
sftp.truncate("d/b", 2)
assert sftp.stat("d/b").st_size == 2
try:
    sftp.remove("d")
    raise AssertionError("remove removed a directory")
except IOError:
    pass
try:
    sftp.rmdir("d")
    raise AssertionError("rmdir removed what is not empty")
except IOError as e:
    assert "not empty" in str(e), e
try:
    sftp.stat("d/none")
    raise AssertionError("a file that is not there")
except FileNotFoundError:
    pass
assert sftp.normalize("d/../d/link") == sftp.normalize(".") + "/d/b"

# New keys in the middle of transfers, asked for by the client.
c.get_transport().packetizer.REKEY_BYTES = 1 << 20
c.get_transport().packetizer.REKEY_PACKETS = 1 << 10
sftp.get("big", local + "/again")
assert open(local + "/again", "rb").read() == data
c.get_transport().renegotiate_keys()
assert run(c, "head -c 5000000 /dev/zero | sha256sum")[0].split()[0].decode() == hashlib.sha256(bytes(5000000)).hexdigest()
c.get_transport().send_ignore()
c.close()
