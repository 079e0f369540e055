# SPDX-License-Identifier: Apache-2.0
# usage: asyncssh_client.py PORT KEY HOSTKEY DIRECTORY
import asyncio, os, stat, sys, tempfile
import asyncssh

port, keyfile, hostfile, there = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]


async def main():
    known = asyncssh.import_known_hosts("[127.0.0.1]:%d %s" % (port, open(hostfile).read()))
    options = dict(port=port, username="root", client_keys=[keyfile], known_hosts=known, agent_path=None, config=[])
    async with asyncssh.connect("127.0.0.1", **options) as c:
        r = await c.run("cat; echo err >&2; exit 42", input="input")
        assert (r.stdout, r.stderr, r.exit_status) == ("input", "err\n", 42), r
        r = await c.run("kill -TERM $$")
        assert r.exit_signal and r.exit_signal[0] == "TERM", r
        # Many at a time on one connection.
        rs = await asyncio.gather(*(c.run("read x; echo %d; exit %d" % (i, i), input="x\n") for i in range(60)))
        assert [(r.stdout, r.exit_status) for r in rs] == [("%d\n" % i, i) for i in range(60)]
        r = await c.run("head -c 30000000 /dev/zero", encoding=None)
        assert r.stdout == bytes(30000000)
        async with c.create_process("sh", term_type="xterm", term_size=(90, 33)) as p:
            p.stdin.write("stty size\n")
            while "33 90" not in await p.stdout.readline():
                pass
            p.change_terminal_size(91, 34)
            p.stdin.write("until [ \"$(stty size)\" = '34 91' ]; do sleep 0.02; done; exit 6\n")
            await p.wait()
            assert p.exit_status == 6, p.exit_status
        p = await c.create_process("trap 'echo got; exit 7' USR1; echo ready; while :; do sleep 0.05; done")
        assert await p.stdout.readline() == "ready\n"
        p.send_signal("USR1")
        r = await p.wait()
        assert (r.stdout, r.exit_status) == ("got\n", 7), r

        local = tempfile.mkdtemp()
        data = os.urandom(1 << 20) * 16
        with open(local + "/from", "wb") as f:
            f.write(data)
        os.chmod(local + "/from", 0o4750)
        async with c.start_sftp_client() as sftp:
            await sftp.chdir(there)
            await sftp.put(local + "/from", "big", preserve=True)
            assert stat.S_IMODE((await sftp.stat("big")).permissions) == 0o4750
            await sftp.get("big", local + "/back", preserve=True)
            assert open(local + "/back", "rb").read() == data and stat.S_IMODE(os.stat(local + "/back").st_mode) == 0o4750
            await sftp.makedirs("d/e/f")
            for name in ("a", "b", "c"):
                async with sftp.open("d/e/" + name, "wb") as f:
                    await f.write(name.encode())
                    await f.fsync()
            assert sorted(await sftp.glob("d/e/[abc]")) == ["d/e/a", "d/e/b", "d/e/c"]
            try:
                await sftp.rename("d/e/a", "d/e/b")
                raise AssertionError("rename replaced a file")
            except asyncssh.SFTPError:
                pass
            await sftp.posix_rename("d/e/a", "d/e/b")
            await sftp.link("d/e/b", "d/e/hard")
            assert (await sftp.stat("d/e/hard")).nlink in (None, 2)
            cwd = await sftp.getcwd()
            await sftp.symlink(cwd + "/d/e/b", cwd + "/d/e/soft")  # 2.10 resolves the wrong one of the two
            assert await sftp.readlink("d/e/soft") == cwd + "/d/e/b"
            assert (await sftp.statvfs(".")).bsize > 0
            async with sftp.open("d/e/b") as f:
                assert (await f.statvfs()).bsize > 0 and await f.read() == "a"
            await sftp.get("d", local + "/tree", recurse=True)
            assert os.readlink(local + "/tree/e/soft") == cwd + "/d/e/b"
            os.remove(local + "/tree/e/soft")  # for the same reason
            await sftp.put(local + "/tree", "tree", recurse=True)
            await sftp.rmtree("tree")
            assert not await sftp.exists("tree")
            assert await sftp.realpath("d/../d/e/soft") == await sftp.realpath(".") + "/d/e/b"
        await asyncssh.scp(local + "/from", (c, there + "/scp"), preserve=True)
        await asyncssh.scp((c, there + "/scp"), local + "/scp")
        assert open(local + "/scp", "rb").read() == data


asyncio.run(main())
