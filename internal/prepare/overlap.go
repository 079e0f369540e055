// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"golang.org/x/sys/unix"
)

// unpacking is the making of the tree while the image is being received. The tree gets its name only after the image was
// found to be the expected one.
type unpacking struct {
	run    *run
	cancel context.CancelCauseFunc
	done   chan struct{} // nil: it never began
	err    error
}

// unpackArriving has d begin to unpack what it receives, if that can be done before its end.
func (r *run) unpackArriving(ctx context.Context, d *download) *unpacking {
	u := &unpacking{run: r}
	if r.whyUnpacked() != "" {
		d.arriving = func(a *arrival) {
			ctx, u.cancel = context.WithCancelCause(ctx)
			u.done = make(chan struct{})
			go u.unpack(ctx, a)
		}
	}
	return u
}

func (u *unpacking) unpack(ctx context.Context, a *arrival) {
	defer close(u.done)
	defer func() {
		if p := recover(); p != nil {
			u.run.log.Error("internal error", "panic", p, "stack", string(debug.Stack()))
			u.err = fmt.Errorf("internal error: %v", p)
		}
	}()
	defer context.AfterFunc(ctx, func() { a.fail(context.Cause(ctx)) })()
	img, err := squash.Open(a, a.size)
	if err == nil {
		err = u.run.fill(ctx, img, u.run.room()-missingRoom(a))
	}
	u.err = err
}

// missingRoom is what the file will still take from the volume.
func missingRoom(a *arrival) int64 {
	var st unix.Stat_t
	if err := unix.Fstat(int(a.file.Fd()), &st); err != nil {
		return a.size
	}
	return max(0, a.size-st.Blocks*512)
}

// stop ends it because of err.
func (u *unpacking) stop(err error) {
	if u.done != nil {
		u.cancel(err)
		<-u.done
	}
}

// wait returns when it has ended. Where it failed the image is unpacked once more, from its file: what was received may
// have been replaced on the way, and what is wrong with the image itself will show again.
func (u *unpacking) wait() error {
	if u.done == nil {
		return nil
	}
	<-u.done
	u.cancel(nil)
	if u.run.filled = u.err == nil; u.run.filled {
		return nil
	}
	u.run.log.Info("unpacking during the download did not work; unpacking again", "err", u.err)
	for _, name := range layers.Names() {
		if err := u.run.vol.RemoveAll(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
