# SPDX-License-Identifier: Apache-2.0
# usage: paramiko_forget.py PORT KEY DIRECTORY LOOPS: run a command and be gone at once
import sys
import paramiko

port, keyfile, there, loops = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
key = paramiko.Ed25519Key.from_private_key_file(keyfile)
for i in range(loops):
    c = paramiko.SSHClient()
    c.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    c.connect("127.0.0.1", port, username="root", pkey=key, allow_agent=False, look_for_keys=False)
    c.exec_command("touch %s/%d" % (there, i))
    c.close()
