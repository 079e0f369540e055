// SPDX-License-Identifier: Apache-2.0

package imageroot

import (
	"os"
	"strings"
	"testing"
)

var bootNames = BootNames{Kernel: "vmlinuz", Initrd: "initrd", Parameters: "kernel-parameters", Arch: "x86_64"}

// TestFindBootLayouts has the trees that distributions and image builds make.
func TestFindBootLayouts(t *testing.T) {
	for name, c := range map[string]struct {
		lines            []string
		kernel, initrd   string // where they resolve to
		parameters, text string
		names            BootNames
	}{
		"plain files": {
			lines:  []string{"file boot/vmlinuz 0644 K", "file boot/initrd 0644 I"},
			kernel: "/boot/vmlinuz", initrd: "/boot/initrd", names: bootNames,
		},
		"with parameters": {
			lines:  []string{"file boot/vmlinuz 0644 K", "file boot/initrd 0644 I", "file boot/kernel-parameters 0644 quiet"},
			kernel: "/boot/vmlinuz", initrd: "/boot/initrd", parameters: "/boot/kernel-parameters", names: bootNames,
		},
		"SLES usr-merged": {
			lines: []string{
				"file usr/lib/modules/6.4.0-150600.21-default/vmlinuz 0644 K",
				"symlink boot/vmlinuz-6.4.0-150600.21-default ../usr/lib/modules/6.4.0-150600.21-default/vmlinuz",
				"symlink boot/vmlinuz vmlinuz-6.4.0-150600.21-default",
				"file boot/initrd-6.4.0-150600.21-default 0600 I", "symlink boot/initrd initrd-6.4.0-150600.21-default",
			},
			kernel: "/usr/lib/modules/6.4.0-150600.21-default/vmlinuz", initrd: "/boot/initrd-6.4.0-150600.21-default", names: bootNames,
		},
		"RHEL with lib link": {
			lines: []string{
				"symlink lib usr/lib", "file usr/lib/modules/5.14.0-427.el9.x86_64/vmlinuz 0755 K",
				"symlink boot/vmlinuz /lib/modules/5.14.0-427.el9.x86_64/vmlinuz",
				"file boot/initramfs-5.14.0-427.el9.x86_64.img 0600 I", "symlink boot/initrd initramfs-5.14.0-427.el9.x86_64.img",
			},
			kernel: "/usr/lib/modules/5.14.0-427.el9.x86_64/vmlinuz", initrd: "/boot/initramfs-5.14.0-427.el9.x86_64.img", names: bootNames,
		},
		"Debian absolute links": {
			lines: []string{
				"file boot/vmlinuz-6.1.0-18-amd64 0644 K", "file boot/initrd.img-6.1.0-18-amd64 0644 I",
				"symlink boot/vmlinuz /boot/vmlinuz-6.1.0-18-amd64", "symlink boot/initrd /boot/initrd.img-6.1.0-18-amd64",
			},
			kernel: "/boot/vmlinuz-6.1.0-18-amd64", initrd: "/boot/initrd.img-6.1.0-18-amd64", names: bootNames,
		},
		"boot is a link, other names": {
			lines:  []string{"symlink boot /efi/boot", "file efi/boot/sub/Image 0644 K", "file efi/boot/ird 0644 I"},
			kernel: "/efi/boot/sub/Image", initrd: "/efi/boot/ird", names: BootNames{Kernel: "sub/Image", Initrd: "ird", Arch: "aarch64"},
		},
		"another boot directory": {
			lines:  []string{"file efi/vmlinuz 0644 K", "file efi/initrd 0644 I"},
			kernel: "/efi/vmlinuz", initrd: "/efi/initrd", names: BootNames{Dir: "efi", Kernel: "vmlinuz", Initrd: "initrd"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := open(t, c.lines...).FindBoot(c.names)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			if got := read(t, b.Kernel); got != "K" || b.Kernel.Resolved != c.kernel || b.Kernel.Size != 1 {
				t.Errorf("kernel %q at %s, %d bytes; want it at %s", got, b.Kernel.Resolved, b.Kernel.Size, c.kernel)
			}
			if got := read(t, b.Initrd); got != "I" || b.Initrd.Resolved != c.initrd {
				t.Errorf("initrd %q at %s, want it at %s", got, b.Initrd.Resolved, c.initrd)
			}
			if (b.Parameters != nil) != (c.parameters != "") {
				t.Errorf("parameters: %v", b.Parameters)
			}
		})
	}
}

// TestBootTheft: the image's owner tries to make the sidecar upload its own
// secrets as a kernel. Promise: an error, and no descriptor of that file.
func TestBootTheft(t *testing.T) {
	secret := canary(t)
	for name, c := range map[string]struct {
		lines []string
		names BootNames
	}{
		"link to the secret":    {[]string{"symlink boot/vmlinuz " + secret}, bootNames},
		"link with dots":        {[]string{"symlink boot/vmlinuz ../../../../../../../.." + secret}, bootNames},
		"link in a chain":       {[]string{"symlink boot/vmlinuz k", "symlink boot/k /x", "symlink x " + secret}, bootNames},
		"boot itself":           {[]string{"symlink boot " + secret[:strings.LastIndex(secret, "/")]}, BootNames{Kernel: "client-secret", Initrd: "client-secret"}},
		"name with dots":        {[]string{"file etc/shadow 0600 x"}, BootNames{Kernel: "../etc/shadow", Initrd: "../etc/shadow"}},
		"name far up":           {nil, BootNames{Kernel: "../../../../../../../.." + secret, Initrd: "x"}},
		"absolute name":         {nil, BootNames{Kernel: secret, Initrd: secret}},
		"admin-client-auth":     {[]string{"symlink boot/vmlinuz /etc/admin-client-auth/client-secret"}, bootNames},
		"process environment":   {[]string{"symlink boot/vmlinuz /proc/self/environ"}, bootNames},
		"fifo":                  {[]string{"fifo boot/vmlinuz"}, bootNames},
		"directory":             {[]string{"dir boot/vmlinuz"}, bootNames},
		"empty":                 {[]string{"file boot/vmlinuz"}, bootNames},
		"empty name":            {nil, BootNames{Initrd: "initrd"}},
		"parameters are a fifo": {[]string{"file boot/vmlinuz 0644 k", "fifo boot/kernel-parameters"}, bootNames},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.HasPrefix(name, "boot itself") {
				c.lines = append(c.lines, "file boot/initrd 0644 I")
			}
			b, err := open(t, c.lines...).FindBoot(c.names)
			if err == nil {
				defer b.Close()
				t.Fatalf("found %s", b.Kernel.Resolved)
			}
			if !strings.Contains(err.Error(), "on the job") {
				t.Errorf("the error names no next step: %v", err)
			}
		})
	}
}

// TestBootHints wants what was tried, where it led, and what else is there.
func TestBootHints(t *testing.T) {
	r := open(t, "file boot/vmlinuz-6.1.0-18-amd64 0644 K", "file boot/initrd.img-6.1.0-18-amd64 0644 I", "file boot/config-6.1 0644 c",
		"symlink boot/initrd /boot/initrd.img-5.10")
	_, err := r.FindBoot(bootNames)
	if err == nil {
		t.Fatal("found")
	}
	for _, want := range []string{
		"kernel: ", "/boot/vmlinuz:", `"vmlinuz-6.1.0-18-amd64"`, "kernel_file_name",
		"initrd: ", `a link to "/boot/initrd.img-5.10"`, `"initrd.img-6.1.0-18-amd64"`, "initrd_file_name",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "config-6.1") {
		t.Errorf("not a candidate: %v", err)
	}
	if _, err := open(t, "dir boot").FindBoot(BootNames{Kernel: "Image", Initrd: "initrd", Arch: "aarch64"}); err == nil || !strings.Contains(err.Error(), "for aarch64") {
		t.Errorf("no hint for aarch64: %v", err)
	}
}

// TestBootLeavesNoDescriptor: a failed search must not leak what it opened.
func TestBootLeavesNoDescriptor(t *testing.T) {
	r := open(t, "file boot/vmlinuz 0644 K")
	count := func() int {
		t.Helper()
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	_, _ = r.FindBoot(bootNames) // first use opens what the library keeps
	before := count()
	for range 10 {
		if _, err := r.FindBoot(bootNames); err == nil {
			t.Fatal("an initrd was found")
		}
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
