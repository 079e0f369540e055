// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// The words of the service's field validation.
const (
	msgMissing = "Missing data for required field."
	msgNull    = "Field may not be null."
	msgUnknown = "Unknown field."
	msgInput   = "Invalid input type."
)

// field is one member of a request body. check turns the JSON value into the
// value to store, or returns what stands under errors.<name> in the answer.
type field struct {
	name     string
	required bool
	null     bool
	check    func(v any) (out, errs any)
}

func fail(msg string) any { return []string{msg} }

// load checks v against fields. On success values holds the members given, on
// failure errs is the `errors` member of the answer.
func load(v any, fields []field) (values map[string]any, errs map[string]any) {
	o, ok := v.(*object)
	if !ok {
		return nil, map[string]any{"_schema": fail(msgInput)}
	}
	values, errs = map[string]any{}, map[string]any{}
	for _, f := range fields {
		raw, given := o.vals[f.name]
		switch {
		case !given && f.required:
			errs[f.name] = fail(msgMissing)
		case !given:
		case raw == nil && f.null:
			values[f.name] = nil
		case raw == nil:
			errs[f.name] = fail(msgNull)
		default:
			out, e := f.check(raw)
			if e != nil {
				errs[f.name] = e
			} else {
				values[f.name] = out
			}
		}
	}
	for _, k := range o.keys {
		if !slices.ContainsFunc(fields, func(f field) bool { return f.name == k }) {
			errs[k] = fail(msgUnknown)
		}
	}
	if len(errs) > 0 {
		return nil, errs
	}
	return values, nil
}

func checkString(v any) (any, any) {
	s, ok := v.(string)
	if !ok {
		return nil, fail("Not a valid string.")
	}
	return s, nil
}

// nonBlank accepts a string of at least one character.
func nonBlank(msg string) func(any) (any, any) {
	return func(v any) (any, any) {
		s, errs := checkString(v)
		if errs == nil && s == "" {
			errs = fail(msg)
		}
		return s, errs
	}
}

// oneOf accepts one of choices; prefix opens the error text.
func oneOf(prefix string, choices ...string) func(any) (any, any) {
	return func(v any) (any, any) {
		s, errs := checkString(v)
		if errs == nil && !slices.Contains(choices, s.(string)) {
			errs = fail(prefix + strings.Join(choices, ", ") + ".")
		}
		return s, errs
	}
}

// checkUUID keeps the text as it was given: the service compares ids as strings.
func checkUUID(v any) (any, any) {
	s, ok := v.(string)
	if !ok {
		return nil, fail("Not a valid UUID.")
	}
	if _, err := uuid.Parse(s); err != nil {
		return nil, fail("Not a valid UUID.")
	}
	return s, nil
}

var (
	truthy = []string{"t", "T", "true", "True", "TRUE", "on", "On", "ON", "y", "Y", "yes", "Yes", "YES", "1"}
	falsy  = []string{"f", "F", "false", "False", "FALSE", "off", "Off", "OFF", "n", "N", "no", "No", "NO", "0"}
)

func checkBool(v any) (any, any) {
	var s string
	switch v := v.(type) {
	case bool:
		return v, nil
	case string:
		s = v
	case json.Number:
		s = v.String()
	}
	switch {
	case slices.Contains(truthy, s):
		return true, nil
	case slices.Contains(falsy, s):
		return false, nil
	}
	return nil, fail("Not a valid boolean.")
}

// positive accepts an integer of at least 1; msg is the service's text for less.
func positive(msg string) func(any) (any, any) {
	return func(v any) (any, any) {
		var s string
		switch v := v.(type) {
		case json.Number:
			s = v.String()
		case string:
			s = strings.TrimSpace(v)
		}
		n, err := strconv.Atoi(s)
		if err != nil {
			// a JSON number such as 60.0 counts, cut to its whole part
			f, ferr := strconv.ParseFloat(s, 64)
			_, isNumber := v.(json.Number)
			if ferr != nil || !isNumber || math.Abs(f) > math.MaxInt32 {
				return nil, fail("Not a valid integer.")
			}
			n = int(f)
		}
		if n < 1 {
			return nil, fail(msg)
		}
		return n, nil
	}
}

// nested applies fields to an object inside the body.
func nested(fields []field) func(any) (any, any) {
	return func(v any) (any, any) {
		values, errs := load(v, fields)
		if errs != nil {
			return nil, errs
		}
		return values, nil
	}
}

// listOf applies fields to every element; errors are keyed by index.
func listOf(fields []field) func(any) (any, any) {
	return func(v any) (any, any) {
		in, ok := v.([]any)
		if !ok {
			return nil, fail("Not a valid list.")
		}
		var out []map[string]any
		errs := map[string]any{}
		for i, e := range in {
			values, eerrs := load(e, fields)
			if eerrs != nil {
				errs[strconv.Itoa(i)] = eerrs
			}
			out = append(out, values)
		}
		if len(errs) > 0 {
			return nil, errs
		}
		return out, nil
	}
}
