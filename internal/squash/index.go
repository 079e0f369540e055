// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"time"

	"golang.org/x/sys/unix"
)

// Index remembers, of an image and the tree that was unpacked from it, which
// file on disk has which inode's data, and when the file was last changed. With
// it DirSource knows files that were not touched since without reading them.
//
// An index file holds, in little-endian order:
//
//	magic "IMSINDX1"
//	digest of the image's superblock, 32 bytes
//	clock: seconds, nanoseconds          when the tree was complete
//	records, in the order of their inode numbers on disk:
//	  inode number, change time in seconds, in nanoseconds, inode reference in the image
//	digest of all that, 32 bytes
type Index struct {
	img     *Image
	clock   changeTime
	records []byte
}

const (
	indexMagic      = "IMSINDX1"
	indexHeaderSize = len(indexMagic) + sha256.Size + 12
	indexRecordSize = 8 + 8 + 4 + 8
)

// ErrIndex is what every error about an index file unwraps to. Packing without
// the index is always possible: it reads more.
var ErrIndex = errors.New("unusable index")

// changeTime is a file's ctime. Nobody can set it.
type changeTime struct {
	sec  int64
	nsec uint32
}

func ctimeOf(st *unix.Statx_t) changeTime { return changeTime{st.Ctime.Sec, st.Ctime.Nsec} }

func (t changeTime) add(d time.Duration) changeTime {
	sum := time.Unix(t.sec, int64(t.nsec)).Add(d)
	return changeTime{sum.Unix(), uint32(sum.Nanosecond())}
}

func (t changeTime) before(u changeTime) bool {
	return cmp.Or(cmp.Compare(t.sec, u.sec), cmp.Compare(t.nsec, u.nsec)) < 0
}

// A file that was changed in the same tick of the file system's clock as the
// index was made may have been changed once more in that tick, with no trace in
// its ctime. Git calls such entries racy. Linux stamps files with the time of
// the last timer interrupt, of which there are at least 100 per second.
const (
	clockTick   = 20 * time.Millisecond
	coarseClock = 2 * time.Second // of file systems that store whole seconds, or even ones
)

// granularity is what two ctimes of the clock must be apart to be told apart.
func (t changeTime) granularity() time.Duration {
	if t.nsec == 0 {
		return coarseClock
	}
	return clockTick
}

// imageID names an image by its superblock, which has the time it was made and
// the place of every table.
func imageID(img *Image) [sha256.Size]byte { return sha256.Sum256(img.sb.append(nil)) }

// WriteIndex writes the index of an image and the tree that was just unpacked
// from it to dir. It appears under its name only when it is complete, readable by
// its owner alone. The tree must be at rest.
func WriteIndex(ctx context.Context, img *Image, dir, name string) error {
	if err := writeIndex(ctx, img, dir, name); err != nil {
		return fmt.Errorf("index of %s: %w", dir, err)
	}
	return nil
}

func writeIndex(ctx context.Context, img *Image, dir, name string) error {
	root, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	records, last, err := indexRecords(ctx, img, int(root.Fd()))
	if err != nil {
		return err
	}
	clock, err := clockAfter(ctx, dir, last)
	if err != nil {
		return err
	}
	slices.SortFunc(records, func(a, b indexRecord) int { return cmp.Compare(a.ino, b.ino) })

	b := make([]byte, 0, indexHeaderSize+len(records)*indexRecordSize+sha256.Size)
	id := imageID(img)
	b = append(append(b, indexMagic...), id[:]...)
	b = clock.append(b)
	for _, r := range records {
		b = binary.LittleEndian.AppendUint64(b, r.ino)
		b = r.ctime.append(b)
		b = binary.LittleEndian.AppendUint64(b, uint64(r.ref))
	}
	sum := sha256.Sum256(b)
	return writeFileAtomic(name, append(b, sum[:]...))
}

func (t changeTime) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(t.sec))
	return binary.LittleEndian.AppendUint32(b, t.nsec)
}

func decodeChangeTime(b []byte) changeTime {
	return changeTime{int64(binary.LittleEndian.Uint64(b)), binary.LittleEndian.Uint32(b[8:])}
}

type indexRecord struct {
	ino   uint64
	ctime changeTime
	ref   inodeRef
}

// indexRecords looks at every file of the tree, beside the image's names, and
// returns the latest change, too.
func indexRecords(ctx context.Context, img *Image, rootFD int) (records []indexRecord, last changeTime, err error) {
	w, err := newWalker(img, "")
	if err != nil {
		return nil, last, err
	}
	defer w.close()
	fds := newDirFDs(rootFD)
	defer fds.close()
	err = w.walk(ctx, func(n *treeName) error {
		if !n.ino.isFile() || n.again {
			return nil
		}
		dir, err := fds.get(n.dir)
		if err != nil {
			return err
		}
		defer dir.put()
		var st unix.Statx_t
		if err := unix.Statx(dir.fd, n.name, unix.AT_SYMLINK_NOFOLLOW, statMask, &st); err != nil {
			return &fs.PathError{Op: "stat", Path: n.path(), Err: err}
		}
		if !indexable(&st, n.ino) {
			return fmt.Errorf("%s: is not what the image holds: index a tree right after unpacking it", n.path())
		}
		if c := ctimeOf(&st); last.before(c) {
			last = c
		}
		records = append(records, indexRecord{st.Ino, ctimeOf(&st), n.ino.ref})
		return nil
	})
	return records, last, err
}

// indexable tells whether a file can be the one an inode was unpacked to.
func indexable(st *unix.Statx_t, ino *Inode) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFREG && ino.isFile() && st.Size == uint64(ino.Size) &&
		st.Mtime.Sec == int64(ino.MTime) && st.Mtime.Nsec == 0
}

// clockAfter reads the clock that stamps the files of dir, if possible after it
// has moved on from the last of them. An unnamed file leaves dir as it is. Where
// there are none, the clock is taken to have stood still since 1970, and no file
// is trusted.
func clockAfter(ctx context.Context, dir string, last changeTime) (changeTime, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EINVAL) {
		return changeTime{}, nil
	}
	if err != nil {
		return changeTime{}, &fs.PathError{Op: "make unnamed file in", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	for range 20 {
		if err := futimens(fd, []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}); err != nil {
			return changeTime{}, err
		}
		var st unix.Statx_t
		if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
			return changeTime{}, err
		}
		now := ctimeOf(&st)
		if last.add(last.granularity()).before(now) || last.granularity() == coarseClock {
			return now, nil
		}
		select {
		case <-time.After(clockTick / 4):
		case <-ctx.Done():
			return changeTime{}, context.Cause(ctx)
		}
	}
	return last, nil
}

// writeFileAtomic gives b the name when it is complete. It need not reach the
// disk for that: an index that a crash has damaged is known by its digest.
func writeFileAtomic(name string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".index-*.tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// OpenIndex reads an index of img.
func OpenIndex(name string, img *Image) (*Index, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIndex, err)
	}
	defer f.Close()
	x, err := readIndex(f, img)
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrIndex, name, err)
	}
	return x, nil
}

func readIndex(f *os.File, img *Image) (*Index, error) {
	most := int64(indexHeaderSize) + int64(img.sb.Inodes)*indexRecordSize + sha256.Size
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	body := len(b) - indexHeaderSize - sha256.Size
	if body < 0 || int64(len(b)) > most || body%indexRecordSize != 0 || !bytes.HasPrefix(b, []byte(indexMagic)) {
		return nil, errors.New("it is no index, or is cut short")
	}
	end := len(b) - sha256.Size
	if sum := sha256.Sum256(b[:end]); !bytes.Equal(sum[:], b[end:]) {
		return nil, errors.New("it is damaged")
	}
	if id := imageID(img); !bytes.Equal(id[:], b[len(indexMagic):][:len(id)]) {
		return nil, errors.New("it was made for another image")
	}
	return &Index{img: img, clock: decodeChangeTime(b[indexHeaderSize-12:]), records: b[indexHeaderSize:end]}, nil
}

// unchanged returns the content of a file in the image, if it is the file that
// was unpacked and nothing has touched it since.
func (x *Index) unchanged(st *unix.Statx_t) *baseContent {
	at := func(i int) []byte { return x.records[i*indexRecordSize:] }
	n := len(x.records) / indexRecordSize
	i := sort.Search(n, func(i int) bool { return binary.LittleEndian.Uint64(at(i)) >= st.Ino })
	if i == n || binary.LittleEndian.Uint64(at(i)) != st.Ino {
		return nil
	}
	was := decodeChangeTime(at(i)[8:])
	if was != ctimeOf(st) || !was.add(was.granularity()).before(x.clock) {
		return nil
	}
	c := &baseContent{img: x.img, ref: inodeRef(binary.LittleEndian.Uint64(at(i)[20:]))}
	if ino, err := x.img.fileInode(c.ref); err != nil || !indexable(st, ino) {
		return nil
	}
	return c
}
