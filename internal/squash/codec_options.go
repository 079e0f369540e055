// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// compressorOptions are what a writer may leave behind the superblock, in a
// stored metadata block, when flagCompressorOptions is set. Only a program that
// appends to the image needs them, and lz4 readers for the version. The fields
// that count depend on the method.
type compressorOptions struct {
	Level      uint32 `json:"level,omitempty"`      // gzip 1..9, zstd 1..22, lzo
	WindowBits uint16 `json:"windowBits,omitempty"` // gzip 8..15
	Strategies uint16 `json:"strategies,omitempty"` // gzip, bit set
	DictSize   uint32 `json:"dictSize,omitempty"`   // xz, bytes
	Filters    uint32 `json:"filters,omitempty"`    // xz, bit set of BCJ filters
	Version    uint32 `json:"version,omitempty"`    // lz4, always 1
	HC         bool   `json:"hc,omitempty"`         // lz4, high compression
	Algorithm  uint32 `json:"algorithm,omitempty"`  // lzo
}

// writerOptions returns the options an image packed with opt should hold, or
// nothing where readers take the same for granted: mksquashfs leaves them out in
// the same cases. It has no levels above 9 for gzip.
func writerOptions(opt *Options) (*compressorOptions, error) {
	level, err := opt.level()
	if err != nil {
		return nil, err
	}
	switch opt.Compressor {
	case Gzip:
		if opt.Level != 0 && opt.Level < impliedGzipLevel {
			return &compressorOptions{Level: uint32(level), WindowBits: 15}, nil
		}
	case XZ:
		if dict, err := opt.dictSize(); err != nil || dict != max(opt.BlockSize, metaBlockSize) {
			return &compressorOptions{DictSize: uint32(dict)}, err
		}
	case LZ4:
		return &compressorOptions{Version: 1, HC: level > 0}, nil
	case Zstd:
		if level != impliedZstdLevel {
			return &compressorOptions{Level: uint32(level)}, nil
		}
	}
	return nil, nil
}

// String lists what is set.
func (o *compressorOptions) String() string {
	var list []string
	for _, field := range []struct {
		name  string
		value uint32
	}{{"level", o.Level}, {"window bits", uint32(o.WindowBits)}, {"strategies", uint32(o.Strategies)},
		{"dictionary", o.DictSize}, {"filters", o.Filters}, {"version", o.Version}, {"algorithm", o.Algorithm}} {
		if field.value != 0 {
			list = append(list, fmt.Sprintf("%s %d", field.name, field.value))
		}
	}
	if o.HC {
		list = append(list, "high compression")
	}
	return strings.Join(list, ", ")
}

// append appends the options for method c to dst, without the metadata header.
func (o *compressorOptions) append(dst []byte, c Compressor) ([]byte, error) {
	le := binary.LittleEndian
	switch c {
	case Gzip:
		if o.Level < 1 || o.Level > 9 {
			return dst, fmt.Errorf("gzip level %d in the compressor options: readers accept 1 to 9", o.Level)
		}
		dst = le.AppendUint32(dst, o.Level)
		dst = le.AppendUint16(dst, o.WindowBits)
		return le.AppendUint16(dst, o.Strategies), nil
	case XZ:
		dst = le.AppendUint32(dst, o.DictSize)
		return le.AppendUint32(dst, o.Filters), nil
	case LZ4:
		var flags uint32
		if o.HC {
			flags = 1
		}
		dst = le.AppendUint32(dst, o.Version)
		return le.AppendUint32(dst, flags), nil
	case Zstd:
		if o.Level < 1 || o.Level > 22 {
			return dst, fmt.Errorf("zstd level %d in the compressor options: readers accept 1 to 22", o.Level)
		}
		return le.AppendUint32(dst, o.Level), nil
	}
	return dst, fmt.Errorf("compressor options of %v cannot be written", c)
}

// decodeCompressorOptions reads the options of method c.
func decodeCompressorOptions(b []byte, c Compressor) (*compressorOptions, error) {
	want := map[Compressor]int{Gzip: 8, XZ: 8, LZ4: 8, Zstd: 4, LZO: 8}[c]
	if want == 0 || len(b) < want {
		return nil, corruptf("%d bytes of compressor options for %v", len(b), c)
	}
	le := binary.LittleEndian
	o := &compressorOptions{}
	switch c {
	case Gzip:
		o.Level, o.WindowBits, o.Strategies = le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:])
	case XZ:
		o.DictSize, o.Filters = le.Uint32(b), le.Uint32(b[4:])
	case LZ4:
		o.Version, o.HC = le.Uint32(b), le.Uint32(b[4:])&1 != 0
		if o.Version != 1 {
			return nil, fmt.Errorf("lz4 format version %d: only 1, the legacy block format, is known", o.Version)
		}
	case Zstd:
		o.Level = le.Uint32(b)
	case LZO:
		o.Algorithm, o.Level = le.Uint32(b), le.Uint32(b[4:])
	}
	return o, nil
}
