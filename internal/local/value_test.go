// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestPythonRepr(t *testing.T) {
	for in, want := range map[string]string{
		`{"b": 1, "a": [true, null, "x"]}`: `{'b': 1, 'a': [True, None, 'x']}`,
		`"it's"`:                           `"it's"`,
		`"it's \"so\""`:                    `'it\'s "so"'`,
		`"a\nb\\c\u0001ü"`:                 `'a\nb\\c\x01ü'`,
	} {
		v, err := decodeValue([]byte(in))
		if err != nil {
			t.Fatal(err)
		}
		if got := pyRepr(v); got != want {
			t.Errorf("repr of %s is %s, want %s", in, got, want)
		}
	}
}

func TestEncodeAsPython(t *testing.T) {
	v := map[string]any{"a": []int{1, 2}, "b": "x: y, \"z\" <ü𝄞>"}
	for compact, want := range map[bool]string{
		false: `{"a": [1, 2], "b": "x: y, \"z\" <\u00fc\ud834\udd1e>"}`,
		true:  `{"a":[1,2],"b":"x: y, \"z\" <\u00fc\ud834\udd1e>"}`,
	} {
		if got, err := encode(v, compact); err != nil || string(got) != want {
			t.Errorf("compact %v: %s, %v; want %s", compact, got, err, want)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, in := range []string{"", "{", "{} {}", "nonsense", `{"a":}`, strings.Repeat("[", maxDepth+2) + strings.Repeat("]", maxDepth+2)} {
		if v, err := decodeValue([]byte(in)); err == nil {
			t.Errorf("%.40q was taken for %v", in, v)
		}
	}
}

// FuzzRequestBody: whatever a client sends is refused or taken, and what is
// taken survives the way out.
func FuzzRequestBody(f *testing.F) {
	f.Add([]byte(`{"job_type": "customize", "artifact_id": "nope", "ssh_containers": [{"jail": 1.0, "x": {}}], "build_env_size": 1e400}`))
	f.Add([]byte(`{"link": {"path": "s3://b/k", "type": "s3"}, "metadata": {"operation": "set", "key": "ü\u0000"}}`))
	f.Add([]byte(`[{"name": "\ud834"}, null, -0.0]`))
	f.Fuzz(func(t *testing.T, body []byte) {
		v, err := decodeValue(body)
		if err != nil {
			return
		}
		if empty(v) {
			return
		}
		for _, fields := range [][]field{keyFields, imageFields, imagePatchFields, jobFields, jobPatchFields, undeleteFields} {
			values, errs := load(v, fields)
			if (values == nil) == (errs == nil) {
				t.Fatalf("%s: values %v, errors %v", body, values, errs)
			}
			if _, err := encode(errs, false); err != nil {
				t.Fatal(err)
			}
		}
		text := pyRepr(v)
		out, err := encode(text, false)
		if err != nil {
			t.Fatal(err)
		}
		var back string
		if err := json.Unmarshal(out, &back); err != nil || utf8.ValidString(text) && back != text {
			t.Fatalf("%q came back as %q, %v", text, back, err)
		}
	})
}

func TestRenderable(t *testing.T) {
	for text, want := range map[string]bool{
		"lab_image": true, "my image": true, "../../x": true, "a$id": true, "123": true, "a/b ü": true, "a:b": true,
		"": false, "a: b": false, "a:": false, "a\nb": false, "{a}": false, "'a": false, "@a": false, "# a": false, "*a": false,
	} {
		if got := renderable(text); got != want {
			t.Errorf("renderable(%q) is %v", text, got)
		}
	}
}

func TestAgeFilter(t *testing.T) {
	at := time.Date(2026, 11, 23, 12, 0, 0, 0, time.Local)
	for age, want := range map[string]time.Duration{
		"1d": 24 * time.Hour, "2w": 14 * 24 * time.Hour, "3h": 3 * time.Hour, "90m": 90 * time.Minute, "xyz": 0, "": 0,
		"5D": 5 * 24 * time.Hour, "99999999999999999999w": 521 * 7 * 24 * time.Hour,
	} {
		if got := at.Sub(sinceAge(age, at)); got != want {
			t.Errorf("age %q is %s, want %s", age, got, want)
		}
	}
	a, _, _ := testAPI(t, nil)
	for id, created := range map[string]time.Time{"old": time.Now().Add(-48 * time.Hour), "new": time.Now()} {
		if err := a.state.jobs.put(Job{ID: id, Status: "success", JobType: "customize", Created: created.Format(timestamp)}); err != nil {
			t.Fatal(err)
		}
	}
	p := &player{t: t, api: a}
	p.do("DELETE", "/jobs?age=1d&status=success", "", "")
	if jobs := a.state.jobs.all(); len(jobs) != 1 || jobs[0].ID != "new" {
		t.Errorf("left are %+v", jobs)
	}
	p.do("DELETE", "/jobs?job_type=create", "", "")
	p.do("DELETE", "/jobs?status=error&status=creating", "", "")
	if jobs := a.state.jobs.all(); len(jobs) != 1 {
		t.Errorf("filters that do not fit left %+v", jobs)
	}
}
