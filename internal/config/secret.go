// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"log/slog"
)

const redacted = "[redacted]"

// Secret is a string that no formatter prints. The value sits behind a
// pointer because fmt ignores a type's methods below unexported fields, and
// would print a plain string there.
type Secret struct{ value *string }

// NewSecret wraps s.
func NewSecret(s string) Secret { return Secret{&s} }

// Reveal returns the secret itself.
func (s Secret) Reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

// String returns a placeholder.
func (Secret) String() string { return redacted }

// Format writes the placeholder for every verb, %#v and %x included.
func (Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, redacted) }

// LogValue gives slog the placeholder.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText gives encoding/json and its kin the placeholder.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
