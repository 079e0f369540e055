// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
)

// worker does the work that may be done in any order.
func (p *pipeline) worker(ctx context.Context) error {
	comp, err := newCompressor(p.w.opt)
	if err != nil {
		return err
	}
	sum := p.summer()
	for {
		b, ok, err := receive(ctx, p.work)
		if err != nil || !ok {
			return err
		}
		if err := p.process(b, comp, sum); err != nil {
			return err
		}
		b.done <- struct{}{}
	}
}

func (p *pipeline) process(b *block, comp compressor, sum *summer) error {
	raw := b.raw[:b.n]
	if f := b.file; f != nil {
		b.file = nil
		if err := f.readAt(raw, b.off); err != nil {
			return err
		}
		if err := p.release(f); err != nil {
			return err
		}
	}
	if b.job == jobData {
		if b.zero = bytes.Equal(raw, p.zeros[:b.n]); b.zero {
			return nil
		}
	}
	if b.hash {
		b.digest = sum.sum(raw)
	}
	if b.job == jobSmall {
		return nil
	}
	n, ok, err := comp.Compress(b.packed[:b.n], raw)
	if err != nil {
		return err
	}
	b.stored = raw
	if ok {
		b.stored = b.packed[:n]
	}
	b.word = dataWord(len(b.stored), !ok)
	return nil
}
