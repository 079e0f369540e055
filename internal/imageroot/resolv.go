// SPDX-License-Identifier: Apache-2.0

package imageroot

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ResolvBackup is the name, in the parent of the image root, under which the
// image's own resolv.conf is kept during a job. It lies outside the image, so
// that no `rm -rf /tmp/*` reaches it, and on the same file system, so that the
// very inode can be moved there and back with all that belongs to it.
const ResolvBackup = ".ims-resolv.conf"

// ResolvBackupSaved is where the image's own file itself is, beside ResolvBackup.
const ResolvBackupSaved = ResolvBackup + savedName

const (
	resolvPath = "/etc/resolv.conf"
	savedName  = ".saved" // suffix of the moved inode; the name itself holds our note
)

// resolvNote is what SwapResolvConf leaves for RestoreResolvConf, which may
// run in another process after a crash.
type resolvNote struct {
	Had      bool   `json:"had"`      // the image had something at /etc/resolv.conf
	Injected string `json:"injected"` // SHA-256 of what we put there
}

// SwapResolvConf moves the image's /etc/resolv.conf, whatever it is, to
// backupFile and puts the content of containerFile in its place, so that name
// lookups work in the user's shell. A swap that was never undone is undone
// first. A container without resolv.conf changes nothing.
func (r *Root) SwapResolvConf(containerFile, backupFile string) error {
	if _, err := r.RestoreResolvConf(backupFile); err != nil {
		return err
	}
	content, err := os.ReadFile(containerFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("replace the image's resolv.conf: %w", err)
	}
	dir, base, err := r.parent(resolvPath)
	if err != nil {
		return fmt.Errorf("replace the image's resolv.conf: %w: the image needs a directory /etc", err)
	}
	defer dir.Close()
	backup, err := openBackup(backupFile)
	if err != nil {
		return fmt.Errorf("replace the image's resolv.conf: %w", err)
	}
	defer backup.dir.Close()
	sum := sha256.Sum256(content)
	note := resolvNote{Had: true, Injected: hex.EncodeToString(sum[:])}
	if _, err := lstatat(dir, base); errors.Is(err, unix.ENOENT) {
		note.Had = false
	} else if err != nil {
		return fmt.Errorf("replace the image's resolv.conf: %w", err)
	}
	err = quietly(dir, func() error {
		// The note comes first: whatever is interrupted after it can be undone.
		if err := backup.write(note); err != nil {
			return err
		}
		if note.Had {
			if err := unix.Renameat(int(dir.Fd()), base, int(backup.dir.Fd()), backup.saved); err != nil {
				return fmt.Errorf("move %s to %s: %w", resolvPath, backupFile+savedName, err)
			}
		}
		return replaceFile(dir, base, content, 0o644)
	})
	if err != nil {
		_, undo := r.RestoreResolvConf(backupFile)
		return errors.Join(fmt.Errorf("replace the image's resolv.conf: %w", err), undo)
	}
	return nil
}

// RestoreResolvConf undoes SwapResolvConf: the image's own /etc/resolv.conf
// comes back as the inode it was, or none if there was none. When something
// else than the injected file lies there now, the user put it there; it stays
// and kept is true. Without a swap nothing happens.
func (r *Root) RestoreResolvConf(backupFile string) (kept bool, err error) {
	backup, err := openBackup(backupFile)
	if err != nil {
		return false, fmt.Errorf("restore the image's resolv.conf: %w", err)
	}
	defer backup.dir.Close()
	note, err := backup.read()
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("restore the image's resolv.conf: %w", err)
	}
	kept, err = r.restoreResolv(backup, note)
	if err != nil {
		return false, fmt.Errorf("restore the image's resolv.conf: %w", err)
	}
	if err := backup.drop(); err != nil {
		return kept, fmt.Errorf("remove the backup of resolv.conf: %w", err)
	}
	return kept, nil
}

func (r *Root) restoreResolv(backup backupPlace, note resolvNote) (kept bool, err error) {
	dir, base, err := r.parent(resolvPath)
	if IsAbsent(err) || errors.Is(err, ErrNotRegular) {
		return true, nil // the user removed all of /etc: there is no place to restore to
	}
	if err != nil {
		return false, err
	}
	defer dir.Close()
	now, err := readFileAt(dir, base, maxSmallFile)
	if !errors.Is(err, unix.ENOENT) { // a removed file is not a wish for none: legacy jobs died of it
		sum := sha256.Sum256(now)
		if err != nil || hex.EncodeToString(sum[:]) != note.Injected {
			return true, nil
		}
	}
	return false, quietly(dir, func() error {
		if !note.Had {
			return ignoreMissing(unix.Unlinkat(int(dir.Fd()), base, 0))
		}
		if st, err := lstatat(backup.dir, backup.saved); err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			// rename(2) puts a directory only where nothing is.
			if err := ignoreMissing(unix.Unlinkat(int(dir.Fd()), base, 0)); err != nil {
				return err
			}
		}
		// Not there: the swap was interrupted before the move, and what lies at
		// /etc/resolv.conf happens to equal what would have been injected.
		return ignoreMissing(unix.Renameat(int(backup.dir.Fd()), backup.saved, int(dir.Fd()), base))
	})
}

// backupPlace is the directory that holds the note and the moved inode.
type backupPlace struct {
	dir         *os.File
	note, saved string
}

func openBackup(file string) (backupPlace, error) {
	dir, err := os.Open(filepath.Dir(file))
	base := filepath.Base(file)
	return backupPlace{dir, base, base + savedName}, err
}

func (b backupPlace) write(n resolvNote) error {
	data, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return replaceFile(b.dir, b.note, data, 0o600)
}

func (b backupPlace) read() (n resolvNote, err error) {
	data, err := readFileAt(b.dir, b.note, maxSmallFile)
	if err == nil {
		err = json.Unmarshal(data, &n)
	}
	return n, err
}

// drop removes the moved inode, if it was not moved back, and then the note.
func (b backupPlace) drop() error {
	if st, err := lstatat(b.dir, b.saved); err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		root, err := os.OpenRoot(fdPath(b.dir))
		if err != nil {
			return err
		}
		defer root.Close()
		if err := root.RemoveAll(b.saved); err != nil {
			return err
		}
	} else if err := ignoreMissing(unix.Unlinkat(int(b.dir.Fd()), b.saved, 0)); err != nil {
		return err
	}
	return ignoreMissing(unix.Unlinkat(int(b.dir.Fd()), b.note, 0))
}

func ignoreMissing(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
